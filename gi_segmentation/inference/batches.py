"""Read slices in batches, and predict their masks with one checkpoint or several."""

from collections import defaultdict
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cache
from itertools import islice
from typing import Any, NamedTuple

import numpy as np
import torch
from accelerate.utils import tqdm
from torch.utils.data import DataLoader, Dataset, default_collate, get_worker_info
from transformers import PreTrainedModel

from gi_segmentation.data.preprocessing import find_neighbours, prepare_image
from gi_segmentation.data.transforms import attached_transform, normalize
from gi_segmentation.errors import InputError, describe_fault
from gi_segmentation.formats.volumes import Slice, read_pixels
from gi_segmentation.inference.members import Member
from gi_segmentation.models.masks import predict_batch, predict_masks, predict_organs
from gi_segmentation.postprocessing.limits import Postprocessing
from gi_segmentation.processes import start_loader
from gi_segmentation.rle import organ_masks
from gi_segmentation.schema import SLICE_THICKNESS_MM, LabelMode
from gi_segmentation.scoring.dice import count_pixels


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
                    predicted = iter(predict_slices(whole, votes, members[0].label_mode, probabilities, agreement))
            yield [next(predicted) if problem is None else problem for problem in problems]
            bar.update(len(files))


def predict_slices(
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
