"""Train a few steps and save the weights. `accelerate launch` runs this program in one process or in several."""

import sys

from safetensors.torch import save_file

from gi_segmentation.training.trainer import train
from tests.support.training import freeze_batch_norm, make_trainer

if __name__ == "__main__":
    trainer, _ = make_trainer(sys.argv[2:])
    freeze_batch_norm(trainer.model)
    train(trainer)
    if trainer.is_world_process_zero():
        save_file(trainer.model.state_dict(), sys.argv[1])
    trainer.accelerator.end_training()
