"""From slices to the logits of checkpoints, and to masks on the grids of the slices, batch by batch.

The slices come from files (`SliceFolder`) or from rows of a dataset (`inference.splits`).
"""

from collections import defaultdict
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import cache
from typing import Any, NamedTuple, TypeAlias

import numpy as np
import torch
from accelerate.utils import tqdm
from torch.utils.data import DataLoader, Dataset, default_collate

from gi_segmentation.data.preprocessing import find_channels, prepare_image, stack_channels
from gi_segmentation.errors import InputError, describe_fault
from gi_segmentation.formats.volumes import Slice, read_pixels
from gi_segmentation.inference.arguments import OnError
from gi_segmentation.inference.members import Member
from gi_segmentation.labels import LabelMode
from gi_segmentation.models.masks import predict_batch, predict_organs
from gi_segmentation.postprocessing.limits import Postprocessing
from gi_segmentation.processes import start_loader

# What a checkpoint needs of a slice: `images`, prepared pixels, uint16, shape `(S, S, 1 or 3)`; and `native_size`,
# height and width of the slice's own grid.
Example: TypeAlias = dict[str, torch.Tensor]


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
class PredictionSettings:
    """How slices are predicted.

    Attributes:
        batch_size: Number of slices in a forward pass.
        num_workers: Number of processes that read files.
        flips: Whether to average over flipped slices.
        postprocessing: Limits for the components of each scan; None: nothing is removed.
        on_error: `stop` predicts no scan with a slice that cannot be read. `empty` gives such a slice empty masks.
            Other slices then see the scan as if it were missing.
    """

    batch_size: int = 16
    num_workers: int = 2
    flips: bool = False
    postprocessing: Postprocessing | None = None
    on_error: OnError = "stop"


class SliceFolder(Dataset):
    """Reads slice files. An item has an example for each checkpoint, or says why its scan cannot be predicted.

    Args:
        slices: The files. Neighbours are found among them.
        members: The checkpoints. Each has its own input size and its own neighbours.
        on_error: As in `PredictionSettings`.
    """

    def __init__(self, slices: Sequence[Slice], members: list[Member], on_error: OnError = "stop") -> None:
        self.slices, self.on_error = slices, on_error
        # Worker processes get a copy of this object, and do not need the models.
        self.settings = [(member.processor.size["height"], member.slice_context) for member in members]
        self.scans: dict[str, dict[int, Slice]] = defaultdict(dict)
        for slice_file in slices:
            self.scans[slice_file.scan][slice_file.number] = slice_file
        # Scans with a slice that could not be read. Each worker process has its own dictionary.
        self.unreadable: dict[str, InputError] = {}

    def __len__(self) -> int:
        return len(self.slices)

    def __getitem__(self, index: int) -> list[Example] | InputError:
        return self.__getitems__([index])[0]

    def __getitems__(self, indices: list[int]) -> list[list[Example] | InputError]:
        """Read the slices of a batch. PyTorch calls this method if there is one."""

        # Most neighbours are in the batch themselves. So each file of a batch is read once, for each input size.
        @cache
        def prepare(slice_file: Slice, image_size: int) -> np.ndarray:
            return prepare_image(read_pixels(slice_file), image_size)

        items: list[list[Example] | InputError] = []
        for slice_file in (self.slices[index] for index in indices):
            try:
                # The other slices of such a scan are not needed, and reading a damaged volume takes long.
                if slice_file.scan in self.unreadable:
                    raise self.unreadable[slice_file.scan]
                scan, native_size = self.scans[slice_file.scan], torch.tensor([slice_file.height, slice_file.width])
                examples = []
                if self.on_error == "empty":
                    self.forget_unreadable(slice_file, lambda one: prepare(one, self.settings[0][0]))
                for size, slice_context in self.settings:
                    shown = find_channels(scan, slice_file.number, slice_context, slice_file.thickness_mm)
                    images = torch.from_numpy(stack_channels([prepare(one, size) for one in shown]))
                    examples.append({"images": images, "native_size": native_size})
                items.append(examples)
            except MemoryError:
                raise
            except Exception as error:
                # Kept and not raised: an exception would end the worker process, and with it all other scans.
                fault = (
                    error
                    if isinstance(error, InputError)
                    else InputError(f"{slice_file.path}: {describe_fault(error)}")
                )
                if self.on_error == "stop":
                    self.unreadable[slice_file.scan] = fault
                items.append(fault)
        return items

    def forget_unreadable(self, slice_file: Slice, read: Callable[[Slice], object]) -> None:
        """Remove slices that cannot be read from those that a slice may have as neighbours.

        Args:
            slice_file: The slice. If it cannot be read itself, the error is raised.
            read: Reads a slice.
        """
        read(slice_file)
        scan = self.scans[slice_file.scan]
        for _, slice_context in self.settings:
            # In the next round, the nearest one that can be read takes its place, as for a missing slice.
            while unreadable := [
                one.number
                for one in find_channels(scan, slice_file.number, slice_context, slice_file.thickness_mm)
                if not can_read(one, read)
            ]:
                scan.pop(unreadable[0])


def can_read(slice_file: Slice, read: Callable[[Slice], object]) -> bool:
    """Return whether a slice can be read by a function."""
    try:
        read(slice_file)
    except MemoryError:
        raise
    except Exception:
        return False
    return True


class Batch(NamedTuple):
    """Slices that were read together.

    Attributes:
        problems: For each slice, why it cannot be predicted, or None.
        examples: For each checkpoint, the examples of the slices without a problem, stacked; none without such slices.
    """

    problems: list[InputError | None]
    examples: list[Example]


def stack_slices(items: list[Any]) -> Batch:
    """Stack items of a source to a batch. An item has an example for each checkpoint, or it is an `InputError`."""
    problems = [item if isinstance(item, InputError) else None for item in items]
    whole = [item for item in items if not isinstance(item, InputError)]
    # In a process of a loader, this function puts tensors into shared memory. PyTorch would do so later, in a thread
    # whose errors are lost, for example if this memory is full.
    return Batch(problems, default_collate(whole) if whole else [])


def compute_logits(
    members: Sequence[Member], source: Dataset, settings: PredictionSettings, progress: str = ""
) -> Iterator[tuple[Batch, list[torch.Tensor]]]:
    """Yield the batches of a source in its order, with the logits of each checkpoint.

    Args:
        members: The checkpoints.
        source: A `SliceFolder`, or what `splits.read_split` returns.
        settings: How slices are predicted.
        progress: What a progress bar says; empty: there is none.

    Yields:
        A batch; and for each checkpoint, the logits of its examples, from `Member.logits`: without a flip and, with
        `settings.flips`, with each flip. Their shape is `(1 or number of flips, B, channels, h, w)`. Without examples,
        there are none.
    """
    loader = DataLoader(
        source,
        settings.batch_size,
        num_workers=settings.num_workers,
        collate_fn=stack_slices,
        worker_init_fn=start_loader,
    )
    # With several processes, only the first one on a machine shows a bar.
    with tqdm(total=len(source), desc=progress, unit="slice", disable=not progress) as bar:  # type: ignore[arg-type]
        for batch in loader:
            # Not around `yield`: the code that takes the logits would then run without gradients too.
            with torch.no_grad():
                # Without slices that could be read, there are no examples.
                votes = [
                    member.logits(examples["images"], settings.flips)
                    for member, examples in zip(members, batch.examples, strict=False)
                ]
            # The caller may not come back after the last batch.
            bar.update(len(batch.problems))
            yield batch, votes


def predict_slices(
    batch: Batch, logits: list[torch.Tensor], label_mode: LabelMode, probabilities: bool = False
) -> list[SliceOrgans]:
    """Return what is predicted for the slices of a batch without a problem, each on its own grid.

    Args:
        batch: From `compute_logits`.
        logits: For each checkpoint, its logits without a flip, or the mean of those with flips: shape
            `(B, channels, h, w)`.
        label_mode: What the channels mean.
        probabilities: Whether the probabilities are wanted.
    """
    if not logits:
        return []
    sizes = batch.examples[0]["native_size"]
    if not probabilities:
        return [SliceOrgans(masks.cpu().numpy()) for masks in predict_batch(logits, label_mode, sizes)]
    organs: list[SliceOrgans] = []
    for index, (height, width) in enumerate(sizes.tolist()):
        # One slice at a time, as a batch of its own: only the slices of one scan have the same size for sure.
        alone = [one[index : index + 1] for one in logits]
        masks, means = predict_organs(alone, label_mode, height, width)
        organs.append(SliceOrgans(masks[0].cpu().numpy(), means[0].cpu().numpy()))
    return organs
