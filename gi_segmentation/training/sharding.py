"""Checkpoints of a training whose model, or whose optimizer, is divided among the processes (FSDP, DeepSpeed)."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import nn
from torch.distributed.tensor import DTensor, distribute_tensor
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from gi_segmentation.arguments import Sharding
from gi_segmentation.errors import InputError

# Where a checkpoint has the state of the optimizer. DeepSpeed writes a file for each process.
OPTIMIZER_FILES: dict[Sharding | None, str] = {
    None: "optimizer.pt",
    "FSDP": "optimizer.bin",
    "DeepSpeed": "global_step*/*zero_pp_rank_*_optim_states.pt",
}


def divide_like(tensors: Mapping[str, torch.Tensor], model: nn.Module) -> dict[str, torch.Tensor]:
    """Divide whole tensors among the processes in the way in which a model is divided.

    Args:
        tensors: Tensors by name. Every process has all of them.
        model: A model with tensors of these names. If it is not divided, the tensors stay as they are.

    Returns:
        The tensors, as `load_state_dict` of the model expects them.
    """
    own = model.state_dict()
    divided = dict(tensors)
    for name, tensor in tensors.items():
        if isinstance(like := own.get(name), DTensor):
            # Without a source, each process takes its part from its own copy, and nothing is sent.
            divided[name] = distribute_tensor(tensor, like.device_mesh, like.placements, src_data_rank=None)
    return divided


def check_optimizer(checkpoint: Path, sharding: Sharding | None, num_processes: int) -> None:
    """Check that a training can go on with the optimizer of a checkpoint.

    `Trainer` would go on with a new optimizer, and say nothing, or stop in the middle of a library.

    Args:
        checkpoint: Folder of the checkpoint.
        sharding: What divides this run.
        num_processes: Number of processes of this run.

    Raises:
        InputError: If another kind of run wrote the checkpoint.
    """
    found = {kind: list(checkpoint.glob(name)) for kind, name in OPTIMIZER_FILES.items()}
    files = found[sharding]
    if not files:
        used = [kind or "neither FSDP nor DeepSpeed" for kind, others in found.items() if others]
        raise InputError(
            f"{checkpoint} has no state of the optimizer for a run with {sharding or 'neither FSDP nor DeepSpeed'}; "
            + (f"the run used {used[0]}; " if used else "")
            + "take the --config_file with which it began, or name another --output_dir"
        )
    if sharding == "DeepSpeed" and len(files) != num_processes:
        raise InputError(
            f"{checkpoint} was written by {len(files)} processes, and DeepSpeed goes on only with as many, but got "
            f"{num_processes}; set --num_processes {len(files)}, or name another --output_dir"
        )


class UnusedWeightsCallback(TrainerCallback):
    """Gives every weight a state in the optimizer. FSDP loads no state of an optimizer that lacks a weight.

    Some models have weights that they do not use, for example the last normalisation of a DPT. Such a weight gets no
    gradient, so the optimizer would make no state for it.
    """

    def on_pre_optimizer_step(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Give a weight without gradient a gradient of zero, once."""
        for weight in kwargs["model"].parameters():
            if weight.requires_grad and weight.grad is None and weight not in kwargs["optimizer"].state:
                weight.grad = torch.zeros_like(weight)
