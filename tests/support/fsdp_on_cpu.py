"""Run `run_segmentation.py` with a model that FSDP really divides, on a machine without a GPU.

`accelerate` divides models on GPUs only. Here it is told that the processes have formed a group of GPUs. The rest is
what it would be on GPUs: the same wrapping, the same DTensors and the same checkpoints, with `gloo` in place of NCCL.
"""

import os
from unittest.mock import patch

import torch
from accelerate import PartialState
from accelerate.utils import DistributedType

from gi_segmentation.errors import exit_on_input_error
from gi_segmentation.processes import leaving_no_process_behind, noticing_lost_processes
from run_segmentation import main

if __name__ == "__main__":
    os.environ["ACCELERATE_TORCH_DEVICE"] = "cpu"
    torch.distributed.init_process_group("gloo")
    group = ("gloo", DistributedType.MULTI_GPU)
    patched = patch.object(PartialState, "_prepare_backend", lambda *args, **kwargs: group)
    with leaving_no_process_behind(), patched, exit_on_input_error(), noticing_lost_processes():
        main()
