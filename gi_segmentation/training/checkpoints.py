"""Checkpoints of a run: their weights, the last whole one, and whether the run is over.

A checkpoint holds up to two sets of weights:

- `model.safetensors` has the weights that are scored and published: averaged if `--ema_decay` is set, without an
  auxiliary head.
- `training_weights.safetensors` has the weights from which an interrupted training continues: those of the last step,
  with the auxiliary head. It is missing if both sets are the same.

A checkpoint is whole if its files have the checksums in the checksum file `checksums.json`, which is written last. Any
other checkpoint is not resumed, for example one whose process was killed while it was written.
"""

import json
import logging
import math
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, cast

from accelerate import PartialState
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch.optim.swa_utils import AveragedModel
from transformers import PreTrainedModel, Trainer, TrainerCallback, TrainerControl, TrainerState, TrainingArguments
from transformers.trainer_utils import PREFIX_CHECKPOINT_DIR, rotate_checkpoints, sort_checkpoints

from gi_segmentation.errors import InputError, one_line
from gi_segmentation.files import flush_file, hash_file, write_json
from gi_segmentation.models.heads import without_auxiliary_head
from gi_segmentation.training.sharding import divide_like

logger = logging.getLogger(__name__)

TRAINING_WEIGHTS = "training_weights.safetensors"
STATE_FILE = "trainer_state.json"
CHECKSUMS = "checksums.json"


def load_published_weights(model: PreTrainedModel, checkpoint: Path) -> None:
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
        load_published_weights(model, checkpoint)
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


def step_folder(args: TrainingArguments, state: TrainerState) -> Path:
    """Return where the checkpoint of the present step lies, or would lie."""
    return Path(str(args.output_dir)) / f"{PREFIX_CHECKPOINT_DIR}-{state.global_step}"


def seal(checkpoint: Path) -> None:
    """Write the checksum file of a checkpoint, which makes it whole."""
    files = [path for path in sorted(checkpoint.rglob("*")) if path.is_file() and path.name != CHECKSUMS]
    for path in files:
        # The files reach the disk before their checksums. So a power cut leaves no checksum file of lost files.
        flush_file(path)
    write_json(checkpoint / CHECKSUMS, {path.relative_to(checkpoint).as_posix(): hash_file(path) for path in files})


def find_fault(checkpoint: Path) -> str | None:
    """Return why a checkpoint is not whole; None if it is."""
    try:
        checksums = dict(json.loads((checkpoint / CHECKSUMS).read_text(encoding="utf-8")))
        if STATE_FILE not in checksums:
            raise ValueError(f"{STATE_FILE} is not among them")
    except OSError:
        return f"it has no {CHECKSUMS}, because its writing was cut off, or because an older version wrote it"
    except (ValueError, TypeError) as error:
        return f"{CHECKSUMS}: {one_line(error)}"
    for name, checksum in checksums.items():
        path = checkpoint / name
        if not path.is_file() or hash_file(path) != checksum:
            return f"{name} is not as it was written"
    return None


def find_last_checkpoint(output_dir: Path) -> Path | None:
    """Return the last checkpoint that is whole, and whose best checkpoint is whole; None if there is none.

    Later ones are removed. The run makes them again.
    """
    # `sort_checkpoints` sorts by the step in the folder's name.
    for checkpoint in map(Path, reversed(sort_checkpoints(str(output_dir)))):
        fault = find_fault(checkpoint)
        best = None if fault else read_state(checkpoint).best_model_checkpoint
        # The best checkpoint is loaded at the end of the run. If it is damaged, the run has to find it again.
        if best is not None and not Path(best).samefile(checkpoint) and (best_fault := find_fault(Path(best))):
            fault = f"its best checkpoint is {best}, and there {best_fault}"
        if fault is None:
            return checkpoint
        logger.warning("%s is not whole (%s), so it is removed; the one before it is used", checkpoint, fault)
        # Another process of this run may remove the same folder at this moment.
        shutil.rmtree(checkpoint, ignore_errors=True)
    return None


class CheckpointCallback(TrainerCallback):
    """Seals each checkpoint after all processes have written their part, and only then deletes older ones.

    `Trainer` deletes older checkpoints when the main process has written its part. A process that is killed then would
    leave neither the old checkpoint nor a whole new one.

    Args:
        limit: Number of checkpoints to keep, from `--save_total_limit`. The last and the best one stay in any case.
    """

    def __init__(self, limit: int | None) -> None:
        self.limit = limit

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Let `Trainer` delete nothing."""
        args.save_total_limit = None

    def on_save(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        """Seal the checkpoint that was written, and delete older ones."""
        PartialState().wait_for_everyone()
        # True on the main process; with --save_on_each_node, on that of each machine.
        if args.should_save:
            seal(step_folder(args, state))
            rotate_checkpoints(str(args.output_dir), self.limit, state.best_model_checkpoint)
        # No process may end the run before the checkpoint is whole.
        PartialState().wait_for_everyone()

    def on_train_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Give the limit back."""
        args.save_total_limit = self.limit


@contextmanager
def explaining_failed_saves(trainer: Trainer) -> Iterator[None]:
    """Turn the error of a checkpoint that cannot be written, for example on a full disk, into an `InputError`."""
    try:
        yield
    # safetensors and PyTorch raise their own errors, which do not say what the system refused.
    except (OSError, RuntimeError, SafetensorError) as error:
        checkpoint = step_folder(trainer.args, trainer.state)
        # An error before or after the writing of a checkpoint is another one.
        if not checkpoint.is_dir() or (checkpoint / CHECKSUMS).exists():
            raise
        raise InputError(
            f"{checkpoint}: the checkpoint cannot be written ({one_line(error)}); free some space in its folder, and "
            f"run the same command again, which goes on from the checkpoint before"
        ) from error


def find_good_checkpoint(output_dir: Path, log_history: list[dict[str, float]], max_loss: float) -> Path | None:
    """Return the last checkpoint whose validation loss was below a limit, or None."""
    # The entry of an evaluation has `eval_loss`. All other entries of the log count as infinite. So does NaN, because
    # its comparison is false.
    good = {entry["step"] for entry in log_history if entry.get("eval_loss", math.inf) < max_loss}
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
    if state.best_model_checkpoint is not None:
        # The folder of the run may have been moved or copied. Its checkpoints lie beside each other.
        best = checkpoint.parent / Path(state.best_model_checkpoint).name
        # The user may have deleted the folder of the best checkpoint. `Trainer` treats this case in the same way.
        state.best_model_checkpoint = str(best) if best.is_dir() else None
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
