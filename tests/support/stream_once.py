"""Train, and write down which slices each step sees and which row groups are read. `accelerate launch` runs this too.

Words: a folder for the records, the step at which this process kills itself (0: never), and flags of the training.
"""

import json
import os
import signal
import sys
from pathlib import Path
from typing import Any

from gi_segmentation.data.streaming import StreamedRows
from gi_segmentation.data.transforms import attach_transform
from gi_segmentation.training.trainer import SegmentationTrainer, train
from tests.support.training import make_trainer


def write_line(path: Path, record: list[Any]) -> None:
    """Add a line to a file, which other processes write too."""
    with path.open("a") as file:
        file.write(json.dumps(record) + "\n")


def watch(trainer: SegmentationTrainer, folder: Path, last_step: int) -> None:
    """Let a training write down its slices, and kill it after a step."""
    # With this, batches say which slices they have.
    trainer.transform.scoring = True
    trainer.train_dataset = attach_transform(trainer.train_dataset, trainer.transform)
    compute_loss, read_group = trainer.compute_loss, StreamedRows.read_group

    def note_slices(model: Any, inputs: Any, *args: Any, **kwargs: Any) -> Any:
        if model.training:
            step = trainer.state.global_step
            if last_step and step == last_step:
                os.kill(os.getpid(), signal.SIGKILL)
            write_line(folder / "slices.jsonl", [int(trainer.state.epoch or 0), step, inputs["slice_id"].tolist()])
        return compute_loss(model, inputs, *args, **kwargs)

    def note_group(self: StreamedRows, file: int, group: int) -> Any:
        write_line(folder / "groups.jsonl", [Path(self.names[file]).name, group])
        return read_group(self, file, group)

    trainer.compute_loss = note_slices  # type: ignore[method-assign]
    StreamedRows.read_group = note_group  # type: ignore[method-assign]


if __name__ == "__main__":
    trainer, _ = make_trainer(sys.argv[3:])
    watch(trainer, Path(sys.argv[1]), int(sys.argv[2]))
    train(trainer)
    trainer.accelerator.end_training()
