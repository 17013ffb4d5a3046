"""Train a few steps, and save the weights, the losses and the scores. `accelerate launch` runs this program."""

import json
import sys
from pathlib import Path

from safetensors.torch import save_file

from tests.support.training import train_steadily

if __name__ == "__main__":
    trainer, losses, scores = train_steadily(sys.argv[2:])
    if trainer.is_world_process_zero():
        save_file(trainer.model.state_dict(), sys.argv[1])
        Path(sys.argv[1]).with_suffix(".json").write_text(json.dumps([losses, scores]))
    trainer.accelerator.end_training()
