"""Score an untrained model. `accelerate launch` runs this program in one process or in several."""

import json
import sys
from pathlib import Path

from tests.support.training import make_trainer

if __name__ == "__main__":
    trainer, _ = make_trainer(sys.argv[2:])
    scores = trainer.evaluate(clinical=True)
    if trainer.is_world_process_zero():
        Path(sys.argv[1]).write_text(json.dumps(scores))
    trainer.accelerator.end_training()
