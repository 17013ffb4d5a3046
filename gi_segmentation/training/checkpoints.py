"""Checkpoints of a run: what they hold, which one is whole, which one is good, and whether the run is over.

A checkpoint's `model.safetensors` is what is scored and published: averaged weights if so asked, without an auxiliary
head. Where training goes on from other weights, these lie beside it in `training_weights.safetensors`.
"""

import json
import logging
import math
import shutil
from pathlib import Path
from typing import cast

from safetensors.torch import load_file, save_file
from torch.optim.swa_utils import AveragedModel
from transformers import PreTrainedModel, TrainerState
from transformers.trainer_utils import sort_checkpoints

from gi_segmentation.models.heads import without_auxiliary_head
from gi_segmentation.training.losses import MAX_LOSS

logger = logging.getLogger(__name__)

TRAINING_WEIGHTS = "training_weights.safetensors"
STATE_FILE = "trainer_state.json"  # the last file that a checkpoint gets


def load_weights(model: PreTrainedModel, checkpoint: Path) -> None:
    """Load a checkpoint's published weights into a model, every tensor of it.

    `from_pretrained` knows the older names that checkpoints of some families carry; the file itself does not say.

    Raises:
        RuntimeError: If the checkpoint lacks a tensor or has one too many.
    """
    loaded = type(model).from_pretrained(checkpoint, config=model.config)
    model.load_state_dict(loaded.state_dict(), strict=True)


def has_training_weights(model: PreTrainedModel, average: AveragedModel | None) -> bool:
    """Whether training goes on from other weights than those that are published."""
    return average is not None or getattr(model, "auxiliary_head", None) is not None


def save_training_weights(model: PreTrainedModel, average: AveragedModel | None, checkpoint: Path) -> None:
    """Write the weights that training goes on from, where they are not those that are published."""
    if has_training_weights(model, average):
        checkpoint.mkdir(parents=True, exist_ok=True)
        tensors = {name: tensor.contiguous() for name, tensor in model.state_dict().items()}
        save_file(tensors, checkpoint / TRAINING_WEIGHTS)


def load_training_weights(model: PreTrainedModel, average: AveragedModel | None, checkpoint: Path) -> None:
    """Load what training goes on from: the model's own weights, and their average where there is one."""
    with without_auxiliary_head(model):
        load_weights(model, checkpoint)
    if average is not None:
        # What was published is the average. How long it is follows from the step, which names the folder.
        average.module.load_state_dict(model.state_dict())
        average.n_averaged.fill_(find_step(checkpoint))
    if has_training_weights(model, average):
        model.load_state_dict(load_file(checkpoint / TRAINING_WEIGHTS))


def find_step(checkpoint: Path) -> int:
    """The step at which a checkpoint was saved.

    Example:
        >>> find_step(Path("runs/gi_tract/checkpoint-40"))
        40
    """
    return int(checkpoint.name.rsplit("-", 1)[-1])


def find_checkpoint(output_dir: Path) -> Path | None:
    """The last checkpoint that was saved whole. Later ones that were cut off are removed."""
    for checkpoint in map(Path, reversed(sort_checkpoints(str(output_dir)))):
        try:
            json.loads((checkpoint / STATE_FILE).read_text(encoding="utf-8"))
        except (OSError, ValueError):
            logger.warning("%s was not saved whole; going back to the one before", checkpoint)
            shutil.rmtree(checkpoint, ignore_errors=True)
        else:
            return checkpoint
    return None


def find_good_checkpoint(output_dir: Path, log_history: list[dict[str, float]]) -> Path | None:
    """The last checkpoint whose validation loss was no sign of trouble yet."""
    good = {entry["step"] for entry in log_history if entry.get("eval_loss", math.inf) < MAX_LOSS}
    for checkpoint in map(Path, reversed(sort_checkpoints(str(output_dir)))):
        if find_step(checkpoint) in good:
            return checkpoint
    return None


def read_state(checkpoint: Path) -> TrainerState:
    """The Trainer's state when it saved a checkpoint.

    A best checkpoint that is no longer there is forgotten, as `Trainer` does when it goes on.
    """
    state = TrainerState.load_from_json(str(checkpoint / STATE_FILE))
    if state.best_model_checkpoint is not None and not Path(state.best_model_checkpoint).is_dir():
        state.best_model_checkpoint = None
    return state


def is_over(state: TrainerState, max_steps: int, early_stopping_patience: int | None) -> bool:
    """Whether a run has nothing left to do: `Trainer` would take one step more before it looks.

    Args:
        state: From `read_state`.
        max_steps: Steps of the whole run.
        early_stopping_patience: Evaluations without a better score after which the run stops; None: it does not.
    """
    if state.global_step >= max_steps:
        return True
    stopping = cast(dict, state.stateful_callbacks or {}).get("EarlyStoppingCallback")
    if early_stopping_patience is None or not isinstance(stopping, dict):
        return False
    return stopping["attributes"]["early_stopping_patience_counter"] >= early_stopping_patience
