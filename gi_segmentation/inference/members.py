"""Load the checkpoints that predict, one or several for an ensemble, and read their configurations."""

import logging
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any, TypeVar, cast

import torch
from huggingface_hub import HfApi, try_to_load_from_cache
from transformers import PreTrainedModel, SegformerImageProcessorPil

from gi_segmentation.data.transforms import normalize
from gi_segmentation.errors import InputError, hub_errors, list_some
from gi_segmentation.formats.algorithm import hash_weights
from gi_segmentation.formats.inputs import InputScan
from gi_segmentation.formats.volumes import FIELD_MM
from gi_segmentation.inference.arguments import Computation, Precision
from gi_segmentation.internals import speed_up_segformer_head
from gi_segmentation.labels import LabelMode, LabelSet
from gi_segmentation.models.configuration import Task, find_task, read_field_mm
from gi_segmentation.models.loading import load_checkpoint
from gi_segmentation.models.masks import FLIPS, find_flips, flip_logits
from gi_segmentation.postprocessing.limits import Postprocessing
from gi_segmentation.review.ranges import TrainingRanges, join_ranges
from gi_segmentation.schema import FieldOfView
from gi_segmentation.shortages import find_shortage

logger = logging.getLogger(__name__)

T = TypeVar("T")
# Labels of a checkpoint that a message names.
LISTED = 8


@dataclass(frozen=True)
class Member:
    """A checkpoint that is ready to predict, alone or as a member of an ensemble.

    Attributes:
        name: Folder or Hub id of the checkpoint, and after an @ its revision if one was named.
        model: The model, on its device.
        dtype: What it computes in where autocast does so: `torch.bfloat16` or `torch.float16`; None: 32 bits.
        processor: Its image processor.
        slice_context: Distance to the slices for the first and the last channel; 0: all channels show the slice.
        labels: The names of its organs, and their colours.
        label_mode: What its channels mean.
        commit: The commit on the Hub that it was loaded from; for a folder, a fingerprint of its weights.
    """

    name: str
    model: PreTrainedModel
    dtype: torch.dtype | None
    processor: SegformerImageProcessorPil
    slice_context: int
    labels: LabelSet
    label_mode: LabelMode
    commit: str

    def logits(self, images: torch.Tensor, flips: bool = False) -> torch.Tensor:
        """Return the logits of slices, without a flip and, with `flips`, with each flip.

        Args:
            images: Prepared pixels, uint16, shape `(B, S, S, 1 or 3)`, on any device.
            flips: Whether to compute the flips too.

        Returns:
            float32, shape `(1 or number of flips, B, channels, h, w)`.
        """
        pixel_values = normalize(images.to(self.model.device), self.processor)
        axes = find_flips(self.labels) if flips else FLIPS[:1]
        with torch.autocast(self.model.device.type, self.dtype, enabled=self.dtype is not None):
            logits = flip_logits(self.model, pixel_values, axes)
        # The numbers of fp16 end at 65,504. What comes behind them would be an empty mask, and no error.
        if self.dtype == torch.float16 and not logits.isfinite().all():
            warn_of_overflow(self.name)
            logits = flip_logits(self.model, pixel_values, axes)
        return logits


def load_members(names: list[str], revision: str | None, computation: Computation) -> list[Member]:
    """Load one checkpoint, or several for an ensemble.

    Args:
        names: Folders or Hub ids.
        revision: Branch, tag or commit of all of them on the Hub; None: the main branch.
        computation: How the models are computed.

    Raises:
        InputError: If a checkpoint cannot be used, or if the checkpoints have different labels.
    """
    return check_labels([load_member(name, revision, computation) for name in names])


def load_folds(name: str, computation: Computation) -> list[Member]:
    """Load the models of all folds of a cross-validation, for an ensemble.

    Args:
        name: The folder of a cross-validation with folders `fold-K`, or a Hub id with branches `fold-K`.
        computation: How the models are computed.

    Raises:
        InputError: If there are no folds, or if a checkpoint cannot be used.
    """
    local = Path(name).is_dir()
    if local:
        found = [path.name for path in Path(name).iterdir() if path.is_dir()]
    else:
        with hub_errors("listing the branches of", name):
            found = [branch.name for branch in HfApi().list_repo_refs(name).branches]
    # `fold-all` is not among them: it was trained on all patients. Shorter names come first, so 10 comes after 9.
    folds = sorted((fold for fold in found if re.fullmatch(r"fold-\d+", fold)), key=lambda fold: (len(fold), fold))
    if not folds:
        raise InputError(
            f"--folds: {name} has no folders or branches fold-0, fold-1, ...; name what cross_validate wrote or "
            f"published, or leave out --folds"
        )
    return check_labels(
        [
            load_member(str(Path(name) / fold), None, computation) if local else load_member(name, fold, computation)
            for fold in folds
        ]
    )


def load_member(name: str, revision: str | None, computation: Computation) -> Member:
    """Load one checkpoint; arguments as `load_members`."""
    model, processor = load_checkpoint(name, revision)
    # Training writes `slice_context` into the configuration. Without it, a model sees the slice alone.
    context = getattr(model.config, "slice_context", 0)
    # `load_checkpoint` has refused every other model.
    labels, label_mode = cast(Task, find_task(model.config))
    title = f"{name}@{revision}" if revision else name
    model = move_model(model, computation.device)
    if computation.fast_head:
        speed_up_segformer_head(model)
    commit = find_commit(name, revision) or hash_weights(Path(name))
    dtype = find_dtype(computation.precision, model.device)
    return Member(title, model, dtype, processor, context, labels, label_mode, commit)


@cache
def warn_of_overflow(name: str) -> None:
    """Say once that numbers of a checkpoint are too large for fp16."""
    logger.warning("%s: numbers too large for fp16; such batches are computed again in 32 bits", name)


def find_commit(name: str, revision: str | None) -> str | None:
    """Return the commit on the Hub from which a checkpoint was loaded; None for a folder."""
    if Path(name).is_dir():
        return None
    # The cache has a folder per commit. A model does not always know its commit.
    path = try_to_load_from_cache(name, "config.json", revision=revision)
    return Path(path).parent.name if isinstance(path, str) else None


def find_dtype(precision: Precision, device: torch.device) -> torch.dtype | None:
    """Return the 16-bit numbers that a precision means on a device; None: 32 bits."""
    if precision != "auto":
        return {"fp32": None, "bf16": torch.bfloat16, "fp16": torch.float16}[precision]
    if device.type == "cuda":
        return find_gpu_dtype(torch.cuda.get_device_capability(device))
    # On a CPU the units that multiply matrices of bfloat16 are called AMX.
    return torch.bfloat16 if device.type == "cpu" and processor_has("amx_bf16") else None


def find_gpu_dtype(capability: tuple[int, int]) -> torch.dtype | None:
    """Return the 16-bit numbers that a GPU computes faster than 32 bits; None if there are none.

    PyTorch also offers bfloat16 on older GPUs, where it is emulated and slow. So the compute capability decides.

    Args:
        capability: The compute capability of the GPU.

    Source: CUDA C++ Programming Guide, table "Throughput of Native Arithmetic Instructions". A GPU of 6.1 multiplies
    64 times fewer numbers of fp16 than of 32 bits.

    Example:
        >>> [find_gpu_dtype(one) for one in ((8, 0), (7, 5), (6, 0), (6, 1))]  # A100, T4, P100, GTX 1080
        [torch.bfloat16, torch.float16, torch.float16, None]
    """
    if capability >= (8, 0):
        return torch.bfloat16
    return torch.float16 if capability >= (7, 0) or capability == (6, 0) else None


def processor_has(capability: str) -> bool:
    """Return whether the processor has a set of instructions, by PyTorch's name for it."""
    # Older releases of PyTorch cannot tell.
    capabilities = torch.cpu.get_capabilities() if hasattr(torch.cpu, "get_capabilities") else {}
    return bool(capabilities.get(capability))


def precision_name(member: Member) -> str:
    """Return what `--precision` calls the numbers that a checkpoint computes in."""
    return {torch.bfloat16: "bf16", torch.float16: "fp16"}.get(member.dtype or torch.float32, "fp32")


def describe_computation(members: Sequence[Member]) -> str:
    """Return a line that tells the user where and in which precision the checkpoints are computed."""
    name = precision_name(members[0])
    bits = "32 bits" if name == "fp32" else f"16 bits ({name})"
    return f"computes on {members[0].model.device} in {bits}"


def check_labels(members: list[Member]) -> list[Member]:
    """Return the members of an ensemble, if their channels mean the same.

    Raises:
        InputError: If not.
    """
    # A softmax over all labels and a sigmoid per organ are different probabilities, and their mean has no meaning.
    channels = [member.labels.channels(member.label_mode) for member in members]
    if len(set(channels)) > 1:
        got = "; ".join(f"{m.name}: {list_some(names, LISTED)}" for m, names in zip(members, channels, strict=True))
        same = len({member.labels for member in members}) == 1
        raise InputError(
            f"--model: expected checkpoints {'of one label mode' if same else 'with the same labels in one order'}, "
            f"got {got}"
        )
    return members


def move_model(model: PreTrainedModel, device: str | None) -> PreTrainedModel:
    """Move a model to a device; None: the GPU if there is one.

    Raises:
        InputError: If the device does not exist.
    """
    device = device or ("cuda" if torch.cuda.is_available() else "cpu")
    try:
        return model.to(device)  # type: ignore[arg-type]
    # PyTorch raises AssertionError if it was built without CUDA.
    except (RuntimeError, AssertionError) as error:
        if find_shortage(error):
            raise
        raise InputError(f"--device {device}: {error}") from error


def find_common_field(members: Sequence[Member]) -> FieldOfView:
    """Return the field of view of the slices that the checkpoints were trained on.

    Raises:
        InputError: If a configuration has one of another form.
    """
    fields = []
    for member in members:
        try:
            fields.append(read_field_mm(member.model.config) or FIELD_MM)
        except InputError as error:
            raise InputError(f"{member.name}: {error}; copy the one of the training") from error
    # A slice stays as it is if one of the members has seen such slices.
    heights, widths = ([field[axis] for field in fields] for axis in (0, 1))
    return (
        (min(low for low, _ in heights), max(high for _, high in heights)),
        (min(low for low, _ in widths), max(high for _, high in widths)),
    )


def describe_field(members: Sequence[Member], scans: Sequence[InputScan]) -> str:
    """Return a line for the user; empty if the checkpoints were trained on the field of view of Kaggle's slices."""
    field_mm = find_common_field(members)
    if field_mm == FIELD_MM:
        return ""
    (low, high), (left, right) = field_mm
    changed = [scan.name for scan in scans if scan.in_field(field_mm).is_cut]
    seen = f"cropped or padded to it: {list_some(changed)}" if changed else "no scan is cropped or padded"
    return f"field of view of the training: {low:g} to {high:g} mm high, {left:g} to {right:g} mm wide; {seen}"


def find_common_ranges(members: Sequence[Member]) -> TrainingRanges | None:
    """Return the ranges of the scans that the checkpoints were trained on; None if one of them does not say it.

    Raises:
        InputError: If a configuration has ranges of another form.
    """
    found = []
    for member in members:
        ranges = read_config_entry(
            member, "training_ranges", TrainingRanges.from_config, "leave report out of --format"
        )
        if ranges is None:
            return None
        found.append(ranges)
    return join_ranges(found, members[0].labels.names)


def read_config_entry(member: Member, key: str, read: Callable[[Any, LabelSet], T], way_out: str) -> T | None:
    """Read what a training wrote into the configuration of a checkpoint; None if it has no such key.

    Args:
        member: The checkpoint.
        key: The key.
        read: Reads and checks the value. It gets the labels of the checkpoint, too.
        way_out: What the user can do if the value is wrong, for the message.

    Raises:
        InputError: If the value has another form.
    """
    value = getattr(member.model.config, key, None)
    try:
        return None if value is None else read(value, member.labels)
    except InputError as error:
        raise InputError(f"{member.name}: config.json: {error}; {way_out}") from error


def find_postprocessing(members: Sequence[Member]) -> tuple[Postprocessing | None, str]:
    """Find the post-processing that all checkpoints have in their configuration.

    Returns:
        The post-processing, or None; and a line for the user, which is empty if no checkpoint has any.

    Raises:
        InputError: If a configuration has post-processing of another form.
    """
    way_out = "--no_postprocessing predicts without it"
    found = [read_config_entry(member, "postprocessing", Postprocessing.from_config, way_out) for member in members]
    # The limits of one checkpoint were learnt on its own probabilities. An ensemble has other probabilities, so its
    # members must at least agree.
    if any(settings != found[0] for settings in found):
        return None, "no post-processing is applied, because the checkpoints do not have the same"
    if found[0] is None:
        return None, ""
    return found[0], f"post-processing of the checkpoint: {found[0].describe()} (off: --no_postprocessing)"
