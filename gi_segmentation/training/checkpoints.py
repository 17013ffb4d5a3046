"""Checkpoints of a run: their weights, the last complete one, and whether the run is over.

A checkpoint holds up to two sets of weights:

- `model.safetensors` has the weights that are scored and published: averaged if `--ema_decay` is set, without an
  auxiliary head.
- `training_weights.safetensors` has the weights from which an interrupted training continues: those of the last step,
  with the auxiliary head. It is missing if both sets are the same.
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

from gi_segmentation.errors import InputError, one_line
from gi_segmentation.models.heads import without_auxiliary_head
from gi_segmentation.training.losses import MAX_LOSS
from gi_segmentation.training.sharding import divide_like

logger = logging.getLogger(__name__)

TRAINING_WEIGHTS = "training_weights.safetensors"
# `Trainer` writes this file last. A checkpoint that has it is complete.
STATE_FILE = "trainer_state.json"


def load_weights(model: PreTrainedModel, checkpoint: Path) -> None:
    """Load the published weights of a checkpoint into a model.

    Raises:
        RuntimeError: If the tensors of the checkpoint and of the model do not have the same names and shapes.
    """
    # Some families write their tensors under older names. Only `from_pretrained` translates these names, so the file
    # is not read directly. `load_state_dict` then keeps the model's own tensors, which the optimizer holds.
    loaded = type(model).from_pretrained(checkpoint, config=model.config)
    model.load_state_dict(divide_like(loaded.state_dict(), model), strict=True)


def has_training_weights(model: PreTrainedModel, average: AveragedModel | None) -> bool:
    """Return whether training continues from other weights than the published ones."""
    return average is not None or getattr(model, "auxiliary_head", None) is not None


def save_training_weights(model: PreTrainedModel, average: AveragedModel | None, checkpoint: Path) -> None:
    """Write the weights from which training continues, unless they are the published ones."""
    if has_training_weights(model, average):
        checkpoint.mkdir(parents=True, exist_ok=True)
        # safetensors writes only tensors that lie in memory without gaps.
        tensors = {name: tensor.contiguous() for name, tensor in model.state_dict().items()}
        save_file(tensors, checkpoint / TRAINING_WEIGHTS)


def load_training_weights(model: PreTrainedModel, average: AveragedModel | None, checkpoint: Path) -> None:
    """Load the weights from which training continues.

    Args:
        model: Gets the weights of the last step.
        average: Gets the averaged weights; None if `--ema_decay` is 0.
        checkpoint: Folder of the checkpoint.
    """
    # The published weights come first. They have no auxiliary head, so the model must have none while they load.
    with without_auxiliary_head(model):
        load_weights(model, checkpoint)
    if average is not None:
        # At this moment the model holds the averaged weights. The number of averaged steps decides how fast the
        # average moves. It is the step of the checkpoint.
        average.module.load_state_dict(model.state_dict())
        average.n_averaged.fill_(find_step(checkpoint))
    if has_training_weights(model, average):
        # This file has the names that the model itself uses: `save_training_weights` wrote it.
        model.load_state_dict(load_file(checkpoint / TRAINING_WEIGHTS))


def find_step(checkpoint: Path) -> int:
    """Return the step at which a checkpoint was saved.

    Example:
        >>> find_step(Path("runs/gi_tract/checkpoint-40"))
        40
    """
    return int(checkpoint.name.rsplit("-", 1)[-1])


def find_checkpoint(output_dir: Path) -> Path | None:
    """Return the last complete checkpoint, or None. Later ones are removed, because their writing was cut off."""
    # `sort_checkpoints` sorts by the step in the folder's name.
    for checkpoint in map(Path, reversed(sort_checkpoints(str(output_dir)))):
        try:
            json.loads((checkpoint / STATE_FILE).read_text(encoding="utf-8"))
        except (OSError, ValueError):
            logger.warning("%s is not complete, so it is removed; the checkpoint before it is used", checkpoint)
            # Another process of this run may remove the same folder at this moment.
            shutil.rmtree(checkpoint, ignore_errors=True)
        else:
            return checkpoint
    return None


def find_good_checkpoint(output_dir: Path, log_history: list[dict[str, float]]) -> Path | None:
    """Return the last checkpoint whose validation loss was below `MAX_LOSS`, or None."""
    # The entry of an evaluation has `eval_loss`. All other entries of the log count as infinite. So does NaN, because
    # its comparison is false.
    good = {entry["step"] for entry in log_history if entry.get("eval_loss", math.inf) < MAX_LOSS}
    for checkpoint in map(Path, reversed(sort_checkpoints(str(output_dir)))):
        if find_step(checkpoint) in good:
            return checkpoint
    return None


def read_state(checkpoint: Path) -> TrainerState:
    """Return the Trainer's state at the moment when it saved a checkpoint.

    Raises:
        InputError: If the file has another form than `Trainer` writes.
    """
    path = checkpoint / STATE_FILE
    try:
        state = TrainerState.load_from_json(str(path))
    except (ValueError, TypeError, AttributeError, LookupError) as error:
        raise InputError(f"{path}: not a state of a training ({one_line(error)}); remove {checkpoint}") from error
    kinds = {"global_step": int, "log_history": list, "best_model_checkpoint": str | None}
    wrong = [name for name, kind in kinds.items() if not isinstance(getattr(state, name), kind)]
    if wrong:
        raise InputError(f"{path}: {wrong[0]} has a value of another kind; remove {checkpoint}")
    # The user may have deleted the folder of the best checkpoint. `Trainer` treats this case in the same way.
    if state.best_model_checkpoint is not None and not Path(state.best_model_checkpoint).is_dir():
        state.best_model_checkpoint = None
    return state


def is_over(state: TrainerState, max_steps: int, early_stopping_patience: int | None) -> bool:
    """Return whether a run has nothing left to do.

    `Trainer` itself would take one more step before it notices.

    Args:
        state: From `read_state`.
        max_steps: Number of steps of the whole run.
        early_stopping_patience: Number of evaluations without a better score after which the run stops; None: never.
    """
    if state.global_step >= max_steps:
        return True
    # `Trainer` saves the state of its callbacks, and with it the count of evaluations without a better score. A run
    # that was started without early stopping has no such entry.
    stopping = cast(dict, state.stateful_callbacks or {}).get("EarlyStoppingCallback")
    if early_stopping_patience is None or not isinstance(stopping, dict):
        return False
    return stopping["attributes"]["early_stopping_patience_counter"] >= early_stopping_patience
