"""Load checkpoints, and predict the masks of slices with them."""

import io
import re
from collections import defaultdict
from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import cache
from itertools import groupby, islice
from pathlib import Path
from typing import Any, TypeVar, cast

import numpy as np
import torch
from huggingface_hub import HfApi, try_to_load_from_cache
from PIL import Image
from torch.utils.data import DataLoader, Dataset, default_collate
from tqdm.auto import tqdm
from transformers import PreTrainedModel, SegformerImageProcessorPil

from gi_segmentation.data.kaggle import KaggleDataError, read_slice
from gi_segmentation.data.preprocessing import (
    attached_transform,
    find_neighbours,
    normalize,
    prepare_image,
)
from gi_segmentation.errors import InputError, hub_errors
from gi_segmentation.inference.arguments import Computation
from gi_segmentation.inference.masks import FLIPS, flip_logits, predict_batch, predict_organs
from gi_segmentation.inference.postprocessing import Postprocessing, remove_components
from gi_segmentation.inference.volumes import Slice, VolumeSlice, check_volumes
from gi_segmentation.internals import speed_up_segformer_head
from gi_segmentation.models.configuration import find_label_mode
from gi_segmentation.models.loading import load_checkpoint
from gi_segmentation.rle import organ_masks
from gi_segmentation.schema import LABELS_BY_MODE, SLICE_THICKNESS_MM, LabelMode
from gi_segmentation.scoring.dice import count_pixels

T = TypeVar("T")


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
        commit: The commit on the Hub that it was loaded from; None for a folder.
    """

    name: str
    model: PreTrainedModel
    bf16: bool
    processor: SegformerImageProcessorPil
    slice_context: int
    label_mode: LabelMode
    commit: str | None = None

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
        with hub_errors(name):
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
    bf16 = computation.precision == "bf16" or (computation.precision == "auto" and has_bf16_units(model.device))
    return Member(title, model, bf16, processor, context, label_mode, find_commit(name, revision))


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
    # On a CPU these units are called AMX. Older releases of PyTorch cannot tell whether there are any.
    capabilities = torch.cpu.get_capabilities() if hasattr(torch.cpu, "get_capabilities") else {}
    return device.type == "cpu" and bool(capabilities.get("amx_bf16"))


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
                items.append(
                    [
                        stack_channels([prepare(one, size) for one in self.find_channels(slice_file, slice_context)])
                        for size, slice_context in self.settings
                    ]
                )
            except InputError as error:
                # Kept and not raised: PyTorch would put the whole traceback of the worker process into the message.
                items.append(error)
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
    # `np.array` keeps all 16 bits. `convert("RGB")`, as in many examples, would clip every intensity above 255.
    with Image.open(io.BytesIO(read_slice(slice_file))) as image:
        try:
            return np.array(image)
        except (OSError, SyntaxError, ValueError) as error:
            # `read_slice` looks at checksums. The pixels of a faulty program may have right checksums.
            raise KaggleDataError([f"{slice_file.path}: its pixels cannot be decoded ({error})"]) from error


def stack_slices(items: list[list[torch.Tensor] | InputError]) -> list[torch.Tensor] | InputError:
    """Stack items of `SliceFolder` to a batch: per checkpoint uint16, `(B, S, S, 1 or 3)`; or return an error."""
    errors = [item for item in items if isinstance(item, InputError)]
    return errors[0] if errors else [torch.stack(inputs) for inputs in zip(*items, strict=True)]


def member_logits(members: list[Member], inputs: Sequence[torch.Tensor], flips: bool) -> list[torch.Tensor]:
    """Return the logits of each checkpoint for its own input. With `flips`, they are averaged over flipped slices."""
    return [member.logits(images, flips).mean(dim=0) for member, images in zip(members, inputs, strict=True)]


def run_ahead(items: Iterable[T]) -> Iterator[T]:
    """Yield the items of an iterable that runs in a thread, one item ahead.

    So the next batch is predicted while the slices of this one are written.
    """
    iterator, end = iter(items), object()
    with ThreadPoolExecutor(1) as thread:
        coming = thread.submit(next, iterator, end)
        while (item := coming.result()) is not end:
            coming = thread.submit(next, iterator, end)
            yield cast(T, item)


def predict_logits(
    members: list[Member], slices: Sequence[Slice], batch_size: int, num_workers: int, flips: bool
) -> Iterator[tuple[list[Slice], list[torch.Tensor]]]:
    """Yield the slices of each batch with the logits of each checkpoint, `(B, channels, h, w)`, with a progress bar.

    The arguments and errors are those of `predict_slices`.
    """
    loader = DataLoader(SliceFolder(slices, members), batch_size, num_workers=num_workers, collate_fn=stack_slices)
    # The loader keeps the order of the slices, so the next logits belong to the next files.
    remaining = iter(slices)
    with tqdm(total=len(slices), desc="Predicting", unit="slice") as bar:
        for inputs in loader:
            if isinstance(inputs, InputError):
                raise inputs
            # Not around `yield`: the code that takes the slices would then run without gradients too.
            with torch.no_grad():
                logits = member_logits(members, inputs, flips)
            files = list(islice(remaining, len(inputs[0])))
            yield files, logits
            bar.update(len(files))


def predict_slices(
    members: list[Member],
    slices: Sequence[Slice],
    batch_size: int,
    num_workers: int,
    flips: bool = False,
    postprocessing: Postprocessing | None = None,
) -> Iterator[tuple[Slice, np.ndarray]]:
    """Predict the masks of slices, with a progress bar.

    Args:
        members: One checkpoint, or several for an ensemble.
        slices: The files, sorted by scan and number. The masks come in the same order.
        batch_size: Number of slices in a forward pass.
        num_workers: Number of processes that read files.
        flips: Whether to average over flipped slices.
        postprocessing: Limits for the components of each scan; None: nothing is removed.

    Yields:
        A slice, and the masks of its organs on its own grid: bool, shape `(organs, height, width)`.

    Raises:
        InputError: If a file is damaged, or has another size than its name or header says. If post-processing is
            wanted, and the slices of a scan do not form a volume.
    """
    if postprocessing is not None:
        reason = "post-processing works on whole scans; correct the file name, or add --no_postprocessing"
        check_volumes(slices, reason)
    label_mode = members[0].label_mode
    batches = predict_logits(members, slices, batch_size, num_workers, flips)
    # A component reaches over many slices, so a scan is kept until its last slice comes. Without post-processing, only
    # the slices of two batches are in memory at a time.
    if postprocessing is not None:
        # One slice at a time, as a batch of its own: only the slices of one scan have the same size for sure.
        predictions = (
            (file, [one[index : index + 1] for one in logits])
            for files, logits in run_ahead(batches)
            for index, file in enumerate(files)
        )
        for _, scan in groupby(predictions, key=lambda prediction: prediction[0].scan):
            yield from clean_scan(scan, label_mode, postprocessing)
    else:
        for predicted in run_ahead(mask_slices(files, logits, label_mode) for files, logits in batches):
            yield from predicted


def mask_slices(
    files: list[Slice], logits: list[torch.Tensor], label_mode: LabelMode
) -> list[tuple[Slice, np.ndarray]]:
    """Return the slices of a batch with their masks, see `predict_slices`."""
    native_sizes = torch.tensor([[file.height, file.width] for file in files])
    masks = predict_batch(logits, label_mode, native_sizes)
    return [(file, mask.cpu().numpy()) for file, mask in zip(files, masks, strict=True)]


def clean_scan(
    predictions: Iterable[tuple[Slice, list[torch.Tensor]]], label_mode: LabelMode, settings: Postprocessing
) -> Iterator[tuple[Slice, np.ndarray]]:
    """Yield the slices of one scan with their masks after post-processing.

    Args:
        predictions: The slices of the scan, each with its logits of shape `(1, channels, h, w)` for each checkpoint.
        label_mode: What the channels mean.
        settings: Limits for the components.
    """
    files, masks, probabilities = [], [], []
    for slice_file, logits in predictions:
        mask, probability = predict_organs(logits, label_mode, slice_file.height, slice_file.width)
        files.append(slice_file)
        masks.append(mask[0].cpu().numpy())
        probabilities.append(probability[0].cpu().numpy())
    # Slices are on the second axis of a volume, (organs, D, H, W).
    cleaned = remove_components(
        np.stack(masks, axis=1),
        np.stack(probabilities, axis=1),
        (files[0].thickness_mm, *files[0].pixel_spacing),
        [slice_file.number for slice_file in files],
        settings,
    )
    yield from zip(files, cleaned.swapaxes(0, 1), strict=True)


def find_postprocessing(members: Sequence[Member]) -> tuple[Postprocessing | None, str]:
    """Find the post-processing that all checkpoints have in their configuration.

    Returns:
        The post-processing, or None; and a line for the user, which is empty if no checkpoint has any.

    Raises:
        InputError: If a configuration has post-processing of another form.
    """
    found = []
    for member in members:
        value = getattr(member.model.config, "postprocessing", None)
        try:
            found.append(None if value is None else Postprocessing.from_config(value))
        except InputError as error:
            raise InputError(
                f"{member.name}: config.json: {error}; --no_postprocessing predicts without it"
            ) from error
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
