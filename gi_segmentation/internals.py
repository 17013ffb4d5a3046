"""All the places where we stand on what `transformers` and `datasets` keep to themselves, each with its reason.

Everything else in this project uses public names. tests/test_internals.py says in words what a new release changed
here; `make test-transformers` runs it at the lowest and the highest release that setup.cfg allows.
"""

import functools
from abc import ABC, abstractmethod
from collections.abc import Callable
from pathlib import Path
from typing import Any


class CheckpointLoading(ABC):
    """Lets a `Trainer` load checkpoints by two methods of ours; a class inherits from this one first.

    Reason: `Trainer` loads a checkpoint's file key by key and skips keys that it does not know. Checkpoints of some
    families carry older names, so most weights would stay as they were, with nothing but a warning (116 of 124 tensors
    of a SegFormer). To load them once more after `Trainer` did, in `on_train_begin`, would leave that warning, and
    without `load_best_model_at_end` its `EarlyStoppingCallback` warns.
    """

    state: Any

    @abstractmethod
    def load_training_weights(self, checkpoint: Path) -> None:
        """Load what training goes on from."""

    @abstractmethod
    def load_best_weights(self, checkpoint: Path) -> None:
        """Load what is scored and published at the end."""

    def _load_from_checkpoint(self, resume_from_checkpoint: str, model: Any = None) -> None:
        self.load_training_weights(Path(resume_from_checkpoint))

    def _load_best_model(self) -> None:
        self.load_best_weights(Path(self.state.best_model_checkpoint))


def find_train_batch_size(trainer: Any) -> int:
    """Slices a batch of this process.

    Reason: with `--auto_find_batch_size` it shrinks while training, and only the Trainer itself knows by how much.
    """
    return int(trainer._train_batch_size)


def checkpoint_convnext_layers(model: Any) -> int:
    """Let the layers of a ConvNeXt backbone drop their activations and compute them anew in the backward pass.

    Reason: `transformers` offers gradient checkpointing for layers of its class `GradientCheckpointingLayer` only, and
    its ConvNeXt layers are not of that class. So the layers of this model become layers of a class that is both.

    Returns:
        How many layers there are.
    """
    from transformers.modeling_layers import GradientCheckpointingLayer
    from transformers.models.convnext.modeling_convnext import ConvNextLayer

    class CheckpointedConvNextLayer(GradientCheckpointingLayer, ConvNextLayer):
        """A ConvNeXt layer that can drop its activations."""

    layers = [module for module in model.modules() if type(module) is ConvNextLayer]
    for layer in layers:
        layer.__class__ = CheckpointedConvNextLayer
    if layers:
        model.supports_gradient_checkpointing = True
    return len(layers)


def register_dataset(name: str, find: Callable[[str | None], Any | None]) -> None:
    """Teach `datasets.load_dataset` a name.

    Reason: `datasets` loads no scripts any more, only builders that it knows by name, and it offers no way to add one.
    Its own table of packaged builders takes no notice of `train.csv`, so an edited file would load as it was; it lists
    the current folder where `data_dir` is missing; and it needs 40 s for the files of the whole competition.

    Args:
        name: What users pass to `load_dataset`.
        find: From the argument `data_dir` to a `datasets.load.DatasetModule`; None leaves the name to `datasets`.
    """
    import datasets.load

    find_module = datasets.load.dataset_module_factory

    @functools.wraps(find_module)
    def find_module_or_ours(path: str, *args: Any, data_dir: str | None = None, **kwargs: Any) -> Any:
        ours = find(data_dir) if path == name else None
        return ours or find_module(path, *args, data_dir=data_dir, **kwargs)

    datasets.load.dataset_module_factory = find_module_or_ours
