"""How far a training is, in a file for the command that has started it."""

import contextlib
import json
from pathlib import Path
from typing import Any, NamedTuple

from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from gi_segmentation.files import write_json

# In the output folder. Such a name is neither a result nor published.
PROGRESS_FILE = ".progress.json"


class Progress(NamedTuple):
    """How far a training is.

    Attributes:
        step: The steps that are done.
        max_steps: The steps of the whole training.
    """

    step: int
    max_steps: int


def read_progress(output_dir: Path) -> Progress | None:
    """Return how far the training in a folder is; None if it has not begun, or the file cannot be read."""
    try:
        return Progress(**json.loads((output_dir / PROGRESS_FILE).read_text(encoding="utf-8")))
    except (OSError, ValueError, TypeError):
        return None


class ProgressCallback(TrainerCallback):
    """Writes the file at the beginning of the training and at each log line."""

    def write(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        """Write the file, from the main process."""
        if state.is_world_process_zero:
            # It serves an estimate only. A full disk has better ways to end a training.
            with contextlib.suppress(OSError):
                progress = Progress(state.global_step, state.max_steps)
                write_json(Path(str(args.output_dir)) / PROGRESS_FILE, progress._asdict())

    on_train_begin = on_log = write
