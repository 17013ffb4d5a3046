"""All code that uses private names of `transformers` and `datasets`, each with its reason.

Everything else in this project uses public names. A new release may change private names. tests/test_internals.py then
fails and says what changed. `make test-transformers` runs it at the lowest and the highest release of `transformers`
that setup.cfg allows.
"""

import functools
import multiprocessing.queues
import os
import sys
import traceback
from abc import ABC, abstractmethod
from collections.abc import Callable
from pathlib import Path
from typing import Any


class CheckpointLoading(ABC):
    """A `Trainer` that inherits from this class loads checkpoints by the two methods below.

    Reason: `Trainer` loads the file of a checkpoint key by key and skips keys that it does not know. Some families
    save older names, so most weights would stay as they were, with only a warning. For a SegFormer these were 116 of
    124 tensors. Two public ways have drawbacks. A callback could load the weights once more in `on_train_begin`, but
    the warning of `Trainer` would stay. A run without `load_best_model_at_end` could load the best checkpoint itself,
    but then `EarlyStoppingCallback` warns.
    """

    state: Any

    @abstractmethod
    def load_training_weights(self, checkpoint: Path) -> None:
        """Load the weights from which training continues."""

    @abstractmethod
    def load_best_weights(self, checkpoint: Path) -> None:
        """Load the weights that are scored and published at the end."""

    # `Trainer` defines the next two methods too. A subclass names this class before `Trainer`, so that Python finds
    # these first.

    def _load_from_checkpoint(self, resume_from_checkpoint: str, model: Any = None) -> None:
        self.load_training_weights(Path(resume_from_checkpoint))

    def _load_best_model(self) -> None:
        self.load_best_weights(Path(self.state.best_model_checkpoint))


def find_train_batch_size(trainer: Any) -> int:
    """Return the number of slices in a training batch of this process.

    Reason: with `--auto_find_batch_size`, `Trainer` makes the batches smaller until they fit the memory. Only this
    attribute has the present number.
    """
    return int(trainer._train_batch_size)


def checkpoint_convnext_layers(model: Any) -> int:
    """Make gradient checkpointing possible for the layers of a ConvNeXt backbone.

    Reason: `transformers` checkpoints only layers of its class `GradientCheckpointingLayer`. Its ConvNeXt layers are
    not of this class. So the layers of the model get a new class that inherits from both.

    Returns:
        The number of these layers.
    """
    from transformers.modeling_layers import GradientCheckpointingLayer
    from transformers.models.convnext.modeling_convnext import ConvNextLayer

    class CheckpointedConvNextLayer(GradientCheckpointingLayer, ConvNextLayer):
        """A ConvNeXt layer that can drop its activations."""

    layers = [module for module in model.modules() if type(module) is ConvNextLayer]
    # A new class changes neither the weights nor the names of a layer, so checkpoints stay the same.
    for layer in layers:
        layer.__class__ = CheckpointedConvNextLayer
    # `transformers` refuses to switch checkpointing on where this attribute is false.
    if layers:
        model.supports_gradient_checkpointing = True
    return len(layers)


def speed_up_segformer_head(model: Any) -> bool:
    """Make the head of a SegFormer compute the same logits with fewer operations.

    The head maps the features f_k of each of the four scales k to the same number of channels, with a matrix P_k and a
    bias b_k. It enlarges all of them to the size of the first one (U), and adds them up with matrices F_k, which are
    parts of one 1 x 1 convolution over all channels:

        sum over k of F_k U(P_k f_k + b_k)

    Bilinear interpolation computes each channel by itself, and its weights add up to 1. So it does not matter whether
    it comes before or after the matrices:

        sum over k of U((F_k P_k) f_k + F_k b_k)

    Now a single product of small matrices takes the place of the convolution over all enlarged channels. After a
    training, batch normalisation is a factor and a constant for each channel. They become part of the matrices too.
    The weights are the same, and so are their gradients and the saved checkpoint. Logits differ from those of stock
    `transformers` only by rounding, by less than 0.00001.

    Reason: `transformers` has no other way to exchange the computation of a head, and this one uses the names of its
    layers.

    Returns:
        Whether the model has such a head.
    """
    import torch
    from torch.nn import functional as F
    from transformers import SegformerDecodeHead

    class FastSegformerDecodeHead(SegformerDecodeHead):
        """A SegFormer head without the convolution over the enlarged channels of all scales."""

        def forward(self, encoder_hidden_states: Any, **kwargs: Any) -> torch.Tensor:
            """Return the logits, shape `(B, channels, h, w)`, of features of shape `(B, C_k, h_k, w_k)`."""
            if any(features.ndim != 4 for features in encoder_hidden_states):
                return super().forward(encoder_hidden_states, **kwargs)
            size = encoder_hidden_states[0].shape[2:]
            norm: Any = self.batch_norm
            matrix, constant = self.linear_fuse.weight[:, :, 0, 0], None
            if not self.training:
                factor = norm.weight * (norm.running_var + norm.eps).rsqrt()
                matrix, constant = matrix * factor[:, None], norm.bias - norm.running_mean * factor
            # The convolution expects the deepest scale first.
            parts = matrix.chunk(len(encoder_hidden_states), dim=1)[::-1]
            fused: Any = None
            projections: Any = self.linear_projections
            for features, layer, part in zip(encoder_hidden_states, projections, parts, strict=True):
                # With the channels last in memory, the interpolation is twice as fast as with the pixels last.
                pixels = features.permute(0, 2, 3, 1)
                bias = part @ layer.proj.bias
                if fused is None and constant is not None:
                    bias = bias + constant
                mapped = F.linear(pixels, part @ layer.proj.weight, bias).permute(0, 3, 1, 2)
                if mapped.shape[2:] != size:
                    mapped = F.interpolate(mapped, size=size, mode="bilinear", align_corners=False)
                # In place, because a new map of all channels takes as long as the sum. The first map is at full size.
                fused = mapped if fused is None else fused.add_(mapped)
            # The activation is a ReLU.
            return self.classifier(self.dropout((norm(fused) if self.training else fused).relu_()))

    head = getattr(model, "decode_head", None)
    if type(head) is not SegformerDecodeHead:
        return False
    head.__class__ = FastSegformerDecodeHead
    return True


def register_dataset(name: str, find: Callable[[str | None], Any | None]) -> None:
    """Teach `datasets.load_dataset` a name.

    Reason: `datasets` no longer loads scripts, only builders that it knows by name, and it offers no way to add one.
    An entry in its private table of packaged builders would have three faults. It does not notice that `train.csv` was
    edited, and loads the old rows. Without `data_dir` it reads the current folder. And it needs 40 s to list the files
    of the whole competition.

    Args:
        name: The name that users pass to `load_dataset`.
        find: Takes the argument `data_dir` and returns a `datasets.load.DatasetModule`. If it returns None, `datasets`
            itself looks the name up.
    """
    import datasets.load

    find_module = datasets.load.dataset_module_factory

    # `load_dataset` calls this function first, with the name, to find out which builder to use.
    @functools.wraps(find_module)
    def find_module_or_ours(path: str, *args: Any, data_dir: str | None = None, **kwargs: Any) -> Any:
        ours = find(data_dir) if path == name else None
        return ours or find_module(path, *args, data_dir=data_dir, **kwargs)

    datasets.load.dataset_module_factory = find_module_or_ours


def end_if_a_batch_is_lost() -> None:
    """Let a process that loads slices end if it cannot send a batch, for example because shared memory is full.

    Reason: a thread of `multiprocessing.Queue` sends the batches. If this fails, it prints the error and goes on. The
    training would then wait for this batch for ever. `concurrent.futures` overrides the same method for its processes.
    """

    def end(error: BaseException, batch: object) -> None:
        traceback.print_exception(error)
        sys.stderr.flush()
        os._exit(1)

    multiprocessing.queues.Queue._on_queue_feeder_error = staticmethod(end)  # type: ignore[attr-defined]
