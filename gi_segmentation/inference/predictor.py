"""Checkpoints ready to predict, and the masks they predict slice by slice."""

import io
from collections import defaultdict
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any, cast

import numpy as np
import torch
from PIL import Image
from torch.utils.data import DataLoader, Dataset
from tqdm.auto import tqdm
from transformers import PreTrainedModel, SegformerImageProcessorPil

from gi_segmentation.data.kaggle import KaggleDataError, SliceFile, read_slice
from gi_segmentation.data.preprocessing import SliceTransform, attached_transform, collate, find_neighbours
from gi_segmentation.errors import InputError
from gi_segmentation.inference.masks import flip_logits, predict_batch, predict_masks
from gi_segmentation.models.configuration import find_label_mode
from gi_segmentation.models.loading import load_checkpoint
from gi_segmentation.rle import organ_masks
from gi_segmentation.schema import LABELS_BY_MODE, LabelMode
from gi_segmentation.scoring.dice import count_pixels


@dataclass(frozen=True)
class Member:
    """A checkpoint ready to predict, alone or as one of several."""

    name: str
    model: PreTrainedModel
    processor: SegformerImageProcessorPil
    slice_context: int
    label_mode: LabelMode


def load_members(names: list[str], revision: str | None, device: str | None) -> list[Member]:
    """Load the checkpoints whose probabilities are averaged.

    Args:
        names: Folders or Hub ids.
        revision: Branch, tag or commit of all of them.
        device: Where they run; None takes the GPU if there is one.

    Raises:
        InputError: If one cannot be used, or they have different labels.
    """
    members = []
    for name in names:
        model, processor = load_checkpoint(name, revision)
        context = getattr(model.config, "slice_context", 0)
        # `load_checkpoint` refuses other labels than ours
        label_mode = cast(LabelMode, find_label_mode(model.config))
        members.append(Member(name, move_model(model, device), processor, context, label_mode))
    if len({member.label_mode for member in members}) > 1:
        labels = "; ".join(f"{m.name}: {', '.join(LABELS_BY_MODE[m.label_mode])}" for m in members)
        raise InputError(f"--model: expected checkpoints of one label mode, got {labels}")
    return members


def move_model(model: PreTrainedModel, device: str | None) -> PreTrainedModel:
    """Bring a model to a device; None takes the GPU if there is one.

    Raises:
        InputError: If there is no such device.
    """
    device = device or ("cuda" if torch.cuda.is_available() else "cpu")
    try:
        return model.to(device)  # type: ignore[arg-type]
    except (RuntimeError, AssertionError) as error:
        raise InputError(f"--device {device}: {error}") from error


class SliceFolder(Dataset):
    """Slice files as model input.

    Args:
        slices: The files; neighbours are found among them.
        members: What each item is prepared for.
    """

    def __init__(self, slices: list[SliceFile], members: list[Member]) -> None:
        self.slices = slices
        self.settings = [(SliceTransform(member.processor), member.slice_context) for member in members]
        self.scans: dict[str, dict[int, SliceFile]] = defaultdict(dict)
        for slice_file in slices:
            self.scans[slice_file.scan][slice_file.number] = slice_file

    def __len__(self) -> int:
        return len(self.slices)

    def __getitem__(self, index: int) -> list[torch.Tensor] | KaggleDataError:
        try:
            return [self.prepare(self.slices[index], *settings) for settings in self.settings]
        except KaggleDataError as error:
            return error  # raised in a worker process, it would arrive as a traceback inside a message

    def prepare(self, slice_file: SliceFile, transform: SliceTransform, slice_context: int) -> torch.Tensor:
        """Model input of one slice: float32, shape `(3, S, S)`."""
        if not slice_context:
            return transform.pixel_values([read_pixels(slice_file)])
        scan, number = self.scans[slice_file.scan], slice_file.number
        before, after = find_neighbours(scan, number, slice_context)
        return transform.pixel_values([read_pixels(scan[which]) for which in (before, number, after)])


def read_pixels(slice_file: SliceFile) -> np.ndarray:
    """Raw intensities of a slice file, shape `(height, width)`.

    Raises:
        KaggleDataError: If the file is not the slice that its name says.
    """
    with Image.open(io.BytesIO(read_slice(slice_file))) as image:
        return np.array(image)


def stack_slices(items: list[list[torch.Tensor] | KaggleDataError]) -> list[torch.Tensor] | KaggleDataError:
    """A batch of `SliceFolder`: per member float32, shape `(B, 3, S, S)`; or the first of its errors."""
    errors = [item for item in items if isinstance(item, KaggleDataError)]
    return errors[0] if errors else [torch.stack(inputs) for inputs in zip(*items, strict=True)]


def member_logits(members: list[Member], inputs: Sequence[torch.Tensor], flips: bool) -> list[torch.Tensor]:
    """Logits of each member for its own input, averaged over flipped slices if so asked."""
    return [
        flip_logits(member.model, pixel_values.to(member.model.device)).mean(dim=0)
        if flips
        else member.model(pixel_values=pixel_values.to(member.model.device)).logits
        for member, pixel_values in zip(members, inputs, strict=True)
    ]


def predict_slices(
    members: list[Member], slices: list[SliceFile], batch_size: int, num_workers: int, flips: bool = False
) -> Iterator[tuple[SliceFile, np.ndarray]]:
    """Predict slice by slice, with a progress bar.

    Args:
        members: The checkpoint, or several.
        slices: The files, in the order of the result.
        batch_size: Slices a forward pass.
        num_workers: Processes that read files.
        flips: Whether to average over flipped slices.

    Yields:
        A slice and its organs' masks on the slice's own grid: bool, shape `(organs, height, width)`.

    Raises:
        KaggleDataError: If a file is not the slice that its name says.
    """
    loader = DataLoader(SliceFolder(slices, members), batch_size, num_workers=num_workers, collate_fn=stack_slices)
    remaining = iter(slices)
    with tqdm(total=len(slices), desc="Predicting", unit="slice") as bar, torch.no_grad():
        for inputs in loader:
            if isinstance(inputs, KaggleDataError):
                raise inputs
            for logits in zip(*member_logits(members, inputs, flips), strict=True):
                slice_file = next(remaining)
                size = slice_file.height, slice_file.width
                masks = predict_masks([one[None] for one in logits], members[0].label_mode, *size)
                yield slice_file, masks[0].cpu().numpy()
            bar.update(len(inputs[0]))


def count_slices(model: PreTrainedModel, dataset: Any, batch_size: int = 16) -> np.ndarray:
    """Count the pixels of every slice of a split, with a progress bar; for a look at single slices.

    Args:
        model: Predicts.
        dataset: A split whose `SliceTransform` is scoring.
        batch_size: Slices a forward pass.

    Returns:
        Pixels in both, predicted and true, on the native grid: int64, shape `(slices, organs, 3)`.
    """
    counts = []
    label_mode = attached_transform(dataset).label_mode
    outlines = iter(dataset.with_format(None)["segmentation"])
    for batch in tqdm(DataLoader(dataset, batch_size, collate_fn=collate), desc="Scoring", unit="batch"):
        with torch.no_grad():
            logits = model(pixel_values=batch["pixel_values"].to(model.device)).logits
        for preds in predict_batch([logits], label_mode, batch["native_size"]):
            target = organ_masks(next(outlines), *preds.shape[1:])
            counts.append(np.stack(count_pixels(preds.cpu().numpy(), target), axis=-1))
    return np.stack(counts)
