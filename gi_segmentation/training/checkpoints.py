"""Checkpoints of a run: which one is whole, which one is good, and how all of its tensors come back."""

import json
import logging
import math
import shutil
from pathlib import Path

from transformers import PreTrainedModel
from transformers.trainer_utils import sort_checkpoints

from gi_segmentation.training.losses import MAX_LOSS

logger = logging.getLogger(__name__)
TRAINING_WEIGHTS = "training_weights.safetensors"


def load_weights(model: PreTrainedModel, checkpoint: Path) -> None:
    """Load a checkpoint into a model, every tensor of it.

    `Trainer` would load the file's keys as they are and skip those it does not know. Checkpoints of some families
    carry older names, so that most weights would silently stay as they were (transformers 5.23: 116 of 124 tensors
    of a SegFormer). `from_pretrained` knows the older names.
    """
    loaded = type(model).from_pretrained(checkpoint, config=model.config)
    model.load_state_dict(loaded.state_dict(), strict=True)


def find_checkpoint(output_dir: Path) -> Path | None:
    """The last checkpoint that was saved whole; later ones that were cut off are removed.

    `trainer_state.json` is the last file a checkpoint gets.
    """
    for checkpoint in map(Path, reversed(sort_checkpoints(str(output_dir)))):
        try:
            json.loads((checkpoint / "trainer_state.json").read_text(encoding="utf-8"))
        except (OSError, ValueError):
            logger.warning("%s was not saved whole; going back to the one before", checkpoint)
            shutil.rmtree(checkpoint, ignore_errors=True)
        else:
            return checkpoint
    return None


def last_good_checkpoint(output_dir: Path, log_history: list[dict[str, float]]) -> Path | None:
    """The last checkpoint whose validation loss was no sign of trouble yet."""
    good = {entry["step"] for entry in log_history if entry.get("eval_loss", math.inf) < MAX_LOSS}
    for checkpoint in map(Path, reversed(sort_checkpoints(str(output_dir)))):
        if int(checkpoint.name.rsplit("-", 1)[-1]) in good:
            return checkpoint
    return None
