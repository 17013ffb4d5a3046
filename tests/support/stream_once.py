"""Train, and write down which slices each step sees. `accelerate launch` runs this program.

Words: a file for the records, the step at which this process kills itself (0: never), and flags of the training.
"""

import json
import os
import signal
import sys
from pathlib import Path
from typing import Any

from gi_segmentation.data.transforms import attach_transform
from gi_segmentation.training.trainer import SegmentationTrainer, train
from tests.support.training import make_trainer


def watch(trainer: SegmentationTrainer, records: Path, last_step: int) -> None:
    """Let a training write down its slices, and kill it after a step."""
    # With this, batches say which slices they have.
    trainer.transform.scoring = True
    trainer.train_dataset = attach_transform(trainer.train_dataset, trainer.transform)
    compute_loss = trainer.compute_loss

    def note_slices(model: Any, inputs: Any, *args: Any, **kwargs: Any) -> Any:
        if model.training:
            step = trainer.state.global_step
            if last_step and step == last_step:
                os.kill(os.getpid(), signal.SIGKILL)
            # The processes write to the same file.
            with records.open("a") as file:
                file.write(json.dumps([step, inputs["slice_id"].tolist()]) + "\n")
        return compute_loss(model, inputs, *args, **kwargs)

    trainer.compute_loss = note_slices  # type: ignore[method-assign]


if __name__ == "__main__":
    trainer, _ = make_trainer(sys.argv[3:])
    watch(trainer, Path(sys.argv[1]), int(sys.argv[2]))
    train(trainer)
    trainer.accelerator.end_training()
