"""Load checkpoints, and predict the masks of slices with them."""

import re
from collections import defaultdict
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import cache
from itertools import islice
from math import isnan, nan
from pathlib import Path
from typing import Any, NamedTuple, TypeVar, cast

import numpy as np
import torch
from accelerate.utils import tqdm
from huggingface_hub import HfApi, try_to_load_from_cache
from torch.utils.data import DataLoader, Dataset, default_collate, get_worker_info
from transformers import PreTrainedModel, SegformerImageProcessorPil

from gi_segmentation.data.kaggle import decode_image, read_file
from gi_segmentation.data.preprocessing import (
    attached_transform,
    find_neighbours,
    normalize,
    prepare_image,
)
from gi_segmentation.errors import InputError, describe_fault, hub_errors
from gi_segmentation.inference.algorithm import Algorithm, hash_weights
from gi_segmentation.inference.arguments import Computation
from gi_segmentation.inference.inputs import Scan
from gi_segmentation.inference.masks import FLIPS, flip_logits, predict_batch, predict_masks, predict_organs
from gi_segmentation.inference.outputs import PredictedScan
from gi_segmentation.inference.postprocessing import Postprocessing, remove_components
from gi_segmentation.inference.triage import TrainingRanges, join_ranges
from gi_segmentation.inference.volumes import Slice, VolumeSlice
from gi_segmentation.internals import speed_up_segformer_head
from gi_segmentation.models.configuration import find_label_mode
from gi_segmentation.models.loading import load_checkpoint
from gi_segmentation.processes import start_loader
from gi_segmentation.rle import organ_masks
from gi_segmentation.schema import LABELS_BY_MODE, ORGANS, SLICE_THICKNESS_MM, LabelMode
from gi_segmentation.scoring.dice import count_pixels, dice_score
from gi_segmentation.shortages import find_shortage

T = TypeVar("T")


class SliceOrgans(NamedTuple):
    """What was predicted for a slice.

    Attributes:
        masks: bool, shape `(organs, height, width)`.
        probabilities: float16, same shape; None if they are not needed.
        overlaps: Pixels in both masks, in the mask of one model or one flip alone, and in the common mask: int64,
            shape `(models and flips, organs, 3)`; None if they are not needed.
    """

    masks: np.ndarray
    probabilities: np.ndarray | None = None
    overlaps: np.ndarray | None = None


@dataclass(frozen=True)
class Settings:
    """How slices are predicted.

    Attributes:
        batch_size: Number of slices in a forward pass.
        num_workers: Number of processes that read files.
        flips: Whether to average over flipped slices.
        postprocessing: Limits for the components of each scan; None: nothing is removed.
    """

    batch_size: int = 16
    num_workers: int = 2
    flips: bool = False
    postprocessing: Postprocessing | None = None


@dataclass(frozen=True)
class Member:
    """A checkpoint that is ready to predict, alone or as a member of an ensemble.

    Attributes:
        name: Folder or Hub id of the checkpoint, and after an @ its revision if one was named.
        model: The model, on its device.
        bf16: Whether it computes in 16 bits where autocast does so.
        processor: Its image processor.
        slice_context: Distance to the slices for the first and the last channel; 0: all channels show the slice.
        label_mode: What its channels mean.
        commit: The commit on the Hub that it was loaded from; for a folder, a fingerprint of its weights.
    """

    name: str
    model: PreTrainedModel
    bf16: bool
    processor: SegformerImageProcessorPil
    slice_context: int
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
        axes = FLIPS if flips else FLIPS[:1]
        with torch.autocast(self.model.device.type, torch.bfloat16, enabled=self.bf16):
            return flip_logits(self.model, pixel_values, axes)


def load_members(names: list[str], revision: str | None, computation: Computation) -> list[Member]:
    """Load one checkpoint, or several for an ensemble.

    Args:
        names: Folders or Hub ids.
        revision: Branch, tag or commit of all of them on the Hub; None: the main branch.
        computation: How the models are computed.

    Raises:
        InputError: If a checkpoint cannot be used, or if the checkpoints have different labels.
    """
    return check_label_modes([load_member(name, revision, computation) for name in names])


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
    return check_label_modes(
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
    # `load_checkpoint` has refused checkpoints with other labels, so the result is not None.
    label_mode = cast(LabelMode, find_label_mode(model.config))
    title = f"{name}@{revision}" if revision else name
    model = move_model(model, computation.device)
    if computation.fast_head:
        speed_up_segformer_head(model)
    commit = find_commit(name, revision) or hash_weights(Path(name))
    bf16 = computation.precision == "bf16" or (computation.precision == "auto" and has_bf16_units(model.device))
    return Member(title, model, bf16, processor, context, label_mode, commit)


def find_commit(name: str, revision: str | None) -> str | None:
    """Return the commit on the Hub from which a checkpoint was loaded; None for a folder."""
    if Path(name).is_dir():
        return None
    # The cache has a folder per commit. A model does not always know its commit.
    path = try_to_load_from_cache(name, "config.json", revision=revision)
    return Path(path).parent.name if isinstance(path, str) else None


def has_bf16_units(device: torch.device) -> bool:
    """Return whether a device has units that multiply matrices of 16-bit numbers (bfloat16)."""
    if device.type == "cuda":
        return torch.cuda.is_bf16_supported(including_emulation=False)
    # On a CPU these units are called AMX.
    return device.type == "cpu" and processor_has("amx_bf16")


def processor_has(capability: str) -> bool:
    """Return whether the processor has a set of instructions, by PyTorch's name for it."""
    # Older releases of PyTorch cannot tell.
    capabilities = torch.cpu.get_capabilities() if hasattr(torch.cpu, "get_capabilities") else {}
    return bool(capabilities.get(capability))


def describe_computation(members: Sequence[Member]) -> str:
    """Return a line that tells the user where and in which precision the checkpoints are computed."""
    bits = "16 bits (bf16)" if members[0].bf16 else "32 bits"
    return f"computes on {members[0].model.device} in {bits}"


def check_label_modes(members: list[Member]) -> list[Member]:
    """Return the members of an ensemble, if their channels mean the same.

    Raises:
        InputError: If not.
    """
    # A softmax over four labels and a sigmoid per organ are different probabilities, and their mean has no meaning.
    if len({member.label_mode for member in members}) > 1:
        labels = "; ".join(f"{m.name}: {', '.join(LABELS_BY_MODE[m.label_mode])}" for m in members)
        raise InputError(f"--model: expected checkpoints of one label mode, got {labels}")
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


class SliceFolder(Dataset):
    """Reads slice files. An item has the prepared pixels for each checkpoint: uint16, shape `(S, S, 1 or 3)`.

    Args:
        slices: The files. Neighbours are found among them.
        members: The checkpoints. Each has its own input size and its own neighbours.
    """

    def __init__(self, slices: Sequence[Slice], members: list[Member]) -> None:
        self.slices = slices
        # Worker processes get a copy of this object, and do not need the models.
        self.settings = [(member.processor.size["height"], member.slice_context) for member in members]
        self.scans: dict[str, dict[int, Slice]] = defaultdict(dict)
        for slice_file in slices:
            self.scans[slice_file.scan][slice_file.number] = slice_file
        # Scans with a slice that could not be read. Each worker process has its own dictionary.
        self.unreadable: dict[str, InputError] = {}

    def __len__(self) -> int:
        return len(self.slices)

    def __getitem__(self, index: int) -> list[torch.Tensor] | InputError:
        return self.__getitems__([index])[0]

    def __getitems__(self, indices: list[int]) -> list[list[torch.Tensor] | InputError]:
        """Read the slices of a batch. PyTorch calls this method if there is one."""

        # Most neighbours are in the batch themselves. So each file of a batch is read once, for each input size.
        @cache
        def prepare(slice_file: Slice, image_size: int) -> np.ndarray:
            return prepare_image(read_pixels(slice_file), image_size)

        items: list[list[torch.Tensor] | InputError] = []
        for slice_file in (self.slices[index] for index in indices):
            try:
                # The other slices of such a scan are of no use. To read a damaged volume again for each takes long.
                if slice_file.scan in self.unreadable:
                    raise self.unreadable[slice_file.scan]
                items.append(
                    [
                        stack_channels([prepare(one, size) for one in self.find_channels(slice_file, slice_context)])
                        for size, slice_context in self.settings
                    ]
                )
            except InputError as error:
                # Kept and not raised: an exception would end the worker process, and with it all other scans.
                self.unreadable[slice_file.scan] = error
                items.append(error)
            except MemoryError:
                raise
            except Exception as error:
                fault = InputError(f"{slice_file.path}: {describe_fault(error)}")
                self.unreadable[slice_file.scan] = fault
                items.append(fault)
        return items

    def find_channels(self, slice_file: Slice, slice_context: int) -> list[Slice]:
        """Return the files that the channels of a slice show: itself, or three with its neighbours."""
        if not slice_context:
            return [slice_file]
        scan, number = self.scans[slice_file.scan], slice_file.number
        # In the training, slices are 3 mm apart. Elsewhere, as many slices are passed over as make this distance.
        distance = max(1, round(slice_context * SLICE_THICKNESS_MM / slice_file.thickness_mm))
        # The same rule for gaps and ends as in training.
        before, after = find_neighbours(scan, number, distance)
        return [scan[before], slice_file, scan[after]]


def stack_channels(images: list[np.ndarray]) -> torch.Tensor:
    """Stack images from `prepare_image` to the channels of a slice, uint16, shape `(S, S, channels)`."""
    return torch.from_numpy(np.stack(images, axis=-1))


def read_pixels(slice_file: Slice) -> np.ndarray:
    """Read the raw intensities of a slice, shape `(height, width)`.

    Raises:
        InputError: If the file is damaged, or has another size than its name or header says.
    """
    if isinstance(slice_file, VolumeSlice):
        return slice_file.read_pixels()
    return decode_image(read_file(slice_file.path), slice_file.path, slice_file.width, slice_file.height)


class Batch(NamedTuple):
    """Slices that were read together.

    Attributes:
        problems: For each slice, why it cannot be predicted, or None.
        inputs: For each checkpoint, the slices without a problem: uint16, shape `(B, S, S, 1 or 3)`.
    """

    problems: list[InputError | None]
    inputs: list[torch.Tensor]


def stack_slices(items: list[list[torch.Tensor] | InputError]) -> Batch:
    """Stack items of `SliceFolder` to a batch."""
    problems = [item if isinstance(item, InputError) else None for item in items]
    whole = [item for item in items if not isinstance(item, InputError)]
    inputs = [torch.stack(one) for one in zip(*whole, strict=True)]
    # PyTorch would do this in a thread whose errors nobody hears, for example if shared memory is full.
    if get_worker_info() is not None:
        for one in inputs:
            one.share_memory_()
    return Batch(problems, inputs)


def member_logits(members: list[Member], inputs: Sequence[torch.Tensor], flips: bool) -> list[torch.Tensor]:
    """Return the logits of each checkpoint for its own input: without a flip and, with `flips`, with each flip.

    The shapes are `(1 or number of flips, B, channels, h, w)`.
    """
    return [member.logits(images, flips) for member, images in zip(members, inputs, strict=True)]


def count_overlaps(votes: list[torch.Tensor], label_mode: LabelMode) -> np.ndarray:
    """Compare the masks of each model and each flip alone with the common masks, on the grid of its own logits.

    Args:
        votes: From `member_logits`.
        label_mode: What the channels mean.

    Returns:
        int64, shape `(B, models and flips, organs, 3)`, see `SliceOrgans`.
    """
    means = [one.mean(dim=0) for one in votes]
    counts = []
    for one in votes:
        common = predict_masks(means, label_mode, *one.shape[-2:]).flatten(2)
        for alone in one:
            masks = predict_masks([alone], label_mode, *one.shape[-2:]).flatten(2)
            counts.append(torch.stack([(masks & common).sum(2), masks.sum(2), common.sum(2)], dim=-1))
    return torch.stack(counts, dim=1).cpu().numpy()


def predict_batches(
    members: list[Member], slices: Sequence[Slice], settings: Settings, probabilities: bool, agreement: bool
) -> Iterator[list[SliceOrgans | InputError]]:
    """Yield, for the slices of each batch, what was predicted or why it was not, with a progress bar."""
    folder = SliceFolder(slices, members)
    loader = DataLoader(
        folder,
        settings.batch_size,
        num_workers=settings.num_workers,
        collate_fn=stack_slices,
        worker_init_fn=start_loader,
    )
    # The loader keeps the order of the slices, so the next batch belongs to the next files.
    remaining = iter(slices)
    # With several processes, only the first one on a machine shows a bar.
    with tqdm(total=len(slices), desc="Predicting", unit="slice") as bar:
        for problems, inputs in loader:
            files = list(islice(remaining, len(problems)))
            whole = [file for file, problem in zip(files, problems, strict=True) if problem is None]
            predicted: Iterator[SliceOrgans] = iter(())
            if whole:
                # Not around `yield`: the code that takes the slices would then run without gradients too.
                with torch.no_grad():
                    votes = member_logits(members, inputs, settings.flips)
                    predicted = iter(predict_each(whole, votes, members[0].label_mode, probabilities, agreement))
            yield [next(predicted) if problem is None else problem for problem in problems]
            bar.update(len(files))


def predict_each(
    files: list[Slice], votes: list[torch.Tensor], label_mode: LabelMode, probabilities: bool, agreement: bool
) -> list[SliceOrgans]:
    """Return what is predicted for the slices of a batch, each on its own grid; `votes` as from `member_logits`."""
    logits = [one.mean(dim=0) for one in votes]
    if not probabilities:
        sizes = torch.tensor([[file.height, file.width] for file in files])
        return [SliceOrgans(masks.cpu().numpy()) for masks in predict_batch(logits, label_mode, sizes)]
    # One model without flips always agrees with itself.
    several = sum(map(len, votes)) > 1
    overlaps = count_overlaps(votes, label_mode) if agreement and several else [None] * len(files)
    organs: list[SliceOrgans] = []
    for index, file in enumerate(files):
        # One slice at a time, as a batch of its own: only the slices of one scan have the same size for sure.
        alone = [one[index : index + 1] for one in logits]
        masks, means = predict_organs(alone, label_mode, file.height, file.width)
        organs.append(SliceOrgans(masks[0].cpu().numpy(), means[0].cpu().numpy(), overlaps[index]))
    return organs


def predict_scans(
    members: list[Member], scans: Sequence[Scan], settings: Settings, probabilities: bool = False
) -> Iterator[tuple[Scan, PredictedScan | InputError]]:
    """Predict scans one after the other, with a progress bar. The slices of the next scans are read meanwhile.

    Only the masks of one scan are kept in memory.

    Args:
        members: One checkpoint, or several for an ensemble.
        scans: The scans, none of them with a problem.
        settings: How they are predicted.
        probabilities: Whether all that a report needs is wanted: probabilities, agreement, and training ranges.

    Yields:
        A scan, and what was predicted; or the error, if one of its files is damaged.

    Raises:
        InputError: If the ranges are wanted, and a configuration has them in another form.
    """
    algorithm = Algorithm({member.name: member.commit for member in members})
    ranges = find_common_ranges(members) if probabilities else None
    # Post-processing needs the mean probability of each component.
    needed = probabilities or settings.postprocessing is not None
    batches = predict_batches(members, [one for scan in scans for one in scan.slices], settings, needed, probabilities)
    slices = (one for batch in batches for one in batch)
    for scan in scans:
        organs: list[SliceOrgans] = []
        error = None
        for one in islice(slices, len(scan.slices)):
            if isinstance(one, InputError):
                error = error or one
                organs.clear()
            elif error is None:
                organs.append(one)
        if error is not None:
            yield scan, error
            continue
        masks = [one.masks for one in organs]
        means = [one.probabilities for one in organs if one.probabilities is not None]
        overlaps = [one.overlaps for one in organs if one.overlaps is not None]
        if settings.postprocessing is not None:
            try:
                masks = clean_scan(scan, masks, means, settings.postprocessing)
            except MemoryError:
                raise
            except Exception as fault:
                yield scan, InputError(f"{scan.name}: {describe_fault(fault)}")
                continue
        agreement = find_agreement(np.sum(overlaps, axis=0)) if overlaps else None
        yield scan, PredictedScan(scan, masks, means if probabilities else None, algorithm, ranges, agreement)
        # The next scan needs the memory of this one.
        del organs, masks, means, overlaps


def find_agreement(overlaps: np.ndarray) -> dict[str, float]:
    """Return the smallest Dice of a model or a flip alone with the common mask, for each organ; NaN without a mask.

    Args:
        overlaps: Sum over the slices of a scan, shape `(models and flips, organs, 3)`, see `SliceOrgans`.

    Example:
        >>> find_agreement(np.array([[[1, 2, 1]] * 3, [[1, 1, 1]] * 3]))["stomach"]
        0.6666666666666666
    """
    # One mask of two that is empty has a Dice of 0. Only if both are empty, there is none.
    return {
        organ: min((dice for one in overlaps[:, index].tolist() if not isnan(dice := dice_score(one))), default=nan)
        for index, organ in enumerate(ORGANS)
    }


def clean_scan(
    scan: Scan, masks: list[np.ndarray], probabilities: list[np.ndarray], limits: Postprocessing
) -> list[np.ndarray]:
    """Return the masks of the slices of a scan after post-processing; shapes as in `PredictedScan`."""
    first = scan.slices[0]
    # Slices are on the second axis of a volume, (organs, D, H, W).
    cleaned = remove_components(
        np.stack(masks, axis=1),
        np.stack(probabilities, axis=1),
        (first.thickness_mm, *first.pixel_spacing),
        [one.number for one in scan.slices],
        limits,
    )
    return list(cleaned.swapaxes(0, 1))


def find_common_ranges(members: Sequence[Member]) -> TrainingRanges | None:
    """Return the ranges of the scans that the checkpoints were trained on; None if one of them does not say it.

    Raises:
        InputError: If a configuration has ranges of another form.
    """
    found = []
    for member in members:
        ranges = read_config(member, "training_ranges", TrainingRanges.from_config, "leave report out of --format")
        if ranges is None:
            return None
        found.append(ranges)
    return join_ranges(found)


def read_config(member: Member, key: str, read: Callable[[Any], T], way_out: str) -> T | None:
    """Read what a training wrote into the configuration of a checkpoint; None if it has no such key.

    Args:
        member: The checkpoint.
        key: The key.
        read: Reads and checks the value.
        way_out: What the user can do if the value is wrong, for the message.

    Raises:
        InputError: If the value has another form.
    """
    value = getattr(member.model.config, key, None)
    try:
        return None if value is None else read(value)
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
    found = [read_config(member, "postprocessing", Postprocessing.from_config, way_out) for member in members]
    # The limits of one checkpoint were learnt on its own probabilities. An ensemble has other probabilities, so its
    # members must at least agree.
    if any(settings != found[0] for settings in found):
        return None, "no post-processing is applied, because the checkpoints do not have the same"
    if found[0] is None:
        return None, ""
    return found[0], f"post-processing of the checkpoint: {found[0].describe()} (off: --no_postprocessing)"


def count_slices(model: PreTrainedModel, dataset: Any, batch_size: int = 16) -> np.ndarray:
    """Predict a split and count the pixels of the masks of each slice, with a progress bar.

    The counts give the Dice of single slices.

    Args:
        model: The model that predicts.
        dataset: A split with a scoring `SliceTransform` attached.
        batch_size: Number of slices in a forward pass.

    Returns:
        Pixels in both masks, predicted and true, on the native grid: int64, shape `(slices, organs, 3)`.
    """
    counts = []
    transform = attached_transform(dataset)
    # The truth comes from the encodings and not from `labels`, which have the size of the model's input.
    outlines = iter(dataset.with_format(None)["segmentation"])
    for batch in tqdm(DataLoader(dataset, batch_size, collate_fn=default_collate), desc="Scoring", unit="batch"):
        with torch.no_grad():
            logits = model(pixel_values=normalize(batch["images"].to(model.device), transform.processor)).logits
        for preds in predict_batch([logits], transform.label_mode, batch["native_size"]):
            target = organ_masks(next(outlines), *preds.shape[1:])
            counts.append(count_pixels(preds.cpu().numpy(), target))
    return np.stack(counts)
