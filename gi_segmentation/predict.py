"""`python -m gi_segmentation.predict`: from a checkpoint and a folder of slices to prediction files."""

import argparse
import csv
import io
from collections import defaultdict
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from torch.utils.data import DataLoader, Dataset
from tqdm.auto import tqdm
from transformers import PreTrainedModel, SegformerImageProcessorPil

from dataset_builder.kaggle import KaggleDataError, SliceFile, find_slices, read_slice
from gi_segmentation.data import SliceTransform, find_neighbours
from gi_segmentation.errors import InputError, exit_on_input_error
from gi_segmentation.evaluation import flip_logits, predict_masks
from gi_segmentation.modeling import load_checkpoint
from gi_segmentation.rle import encode
from gi_segmentation.schema import ORGANS

SUBMISSION = "submission.csv"


@dataclass(frozen=True)
class Member:
    """A checkpoint ready to predict, alone or as one of several."""

    name: str
    model: PreTrainedModel
    processor: SegformerImageProcessorPil
    slice_context: int

    @property
    def labels(self) -> list[str]:
        """What its channels mean."""
        return list((self.model.config.id2label or {}).values())


def load_members(names: list[str], revision: str | None, device: str) -> list[Member]:
    """Load the checkpoints whose probabilities are averaged.

    Args:
        names: Folders or Hub ids.
        revision: Branch, tag or commit of all of them.
        device: Where they run.

    Raises:
        InputError: If one cannot be used, or they have different labels.
    """
    members = []
    for name in names:
        model, processor = load_checkpoint(name, revision)
        context = getattr(model.config, "slice_context", 0)
        members.append(Member(name, move_model(model, device), processor, context))
    if len({len(member.labels) for member in members}) > 1:
        labels = "; ".join(f"{m.name}: {', '.join(m.labels)}" for m in members)
        raise InputError(f"--model: expected checkpoints of one label mode, got {labels}")
    return members


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
                masks = predict_masks([one[None] for one in logits], slice_file.height, slice_file.width)
                yield slice_file, masks[0].cpu().numpy()
            bar.update(len(inputs[0]))


def write_submission(predictions: Iterator[tuple[SliceFile, np.ndarray]], path: Path) -> None:
    """Write Kaggle's `submission.csv`, whole or not at all: a row per slice and organ, `id,class,predicted`."""
    scratch = path.with_name(f".{path.name}.partial")
    try:
        with scratch.open("w", newline="", encoding="utf-8") as file:
            writer = csv.writer(file, lineterminator="\n")
            writer.writerow(["id", "class", "predicted"])
            for slice_file, masks in predictions:
                writer.writerows([slice_file.id, organ, encode(m)] for organ, m in zip(ORGANS, masks, strict=True))
        scratch.replace(path)
    finally:
        scratch.unlink(missing_ok=True)


def find_input(folder: Path) -> list[SliceFile]:
    """List the slices to predict.

    Raises:
        InputError: If the folder is missing, has no slices, or has PNGs that are none.
    """
    if not folder.is_dir():
        raise InputError(f"--input {folder}: no such folder")
    slices, problems = find_slices(folder)
    if problems:
        raise KaggleDataError(problems)
    if not slices:
        raise InputError(f"--input {folder}: no slices; expected caseN_dayN/scans/slice_*.png below it")
    return slices


def add_prediction_flags(parser: argparse.ArgumentParser) -> None:
    """Add the flags of all commands that predict: which checkpoints, where, and how many slices at once."""
    parser.add_argument(
        "--model", required=True, nargs="+", help="folder or Hub id of a checkpoint of this project; of several, the "
        "probabilities are averaged",
    )  # fmt: skip
    parser.add_argument("--revision", help="branch, tag or commit on the Hub; None: its main branch")
    parser.add_argument("--batch_size", type=int, default=16, help="slices a forward pass")
    parser.add_argument("--num_workers", type=int, default=2, help="processes that read slices")
    parser.add_argument(
        "--device", default="cuda" if torch.cuda.is_available() else "cpu", help="where the model runs"
    )


def check_prediction_flags(arguments: argparse.Namespace) -> argparse.Namespace:
    """Check the numbers among the flags of `add_prediction_flags`.

    Raises:
        InputError: If one is too small.
    """
    if arguments.batch_size < 1 or arguments.num_workers < 0:
        raise InputError(
            f"expected --batch_size of at least 1 and --num_workers of at least 0, "
            f"but got {arguments.batch_size} and {arguments.num_workers}"
        )
    return arguments


def parse_arguments(argv: list[str] | None) -> argparse.Namespace:
    """Read the command line."""
    parser = argparse.ArgumentParser(
        "python -m gi_segmentation.predict",
        description=__doc__,
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
    )
    add_prediction_flags(parser)
    parser.add_argument(
        "--test_time_flips",
        action="store_true",
        help="average over flipped slices, four passes; for a model trained with flips",
    )
    parser.add_argument("--input", type=Path, required=True, help="folder of scans: caseN_dayN/scans/slice_*.png")
    parser.add_argument("--output_dir", type=Path, required=True, help="where the files go")
    parser.add_argument("--format", choices=["kaggle"], default="kaggle", help=f"kaggle: {SUBMISSION}")
    return check_prediction_flags(parser.parse_args(argv))


def move_model(model: PreTrainedModel, device: str) -> PreTrainedModel:
    """Bring a model to a device.

    Raises:
        InputError: If there is no such device.
    """
    try:
        return model.to(device)  # type: ignore[arg-type]
    except (RuntimeError, AssertionError) as error:
        raise InputError(f"--device {device}: {error}") from error


def main(argv: list[str] | None = None) -> Path:
    """Predict a folder of slices.

    Returns:
        The file written.

    Raises:
        InputError: If checkpoint or input cannot be used, or the output exists.
    """
    arguments = parse_arguments(argv)
    path: Path = arguments.output_dir / SUBMISSION
    if path.exists():
        raise InputError(f"{path}: exists; remove it or name another --output_dir")
    slices = find_input(arguments.input)
    members = load_members(arguments.model, arguments.revision, arguments.device)
    arguments.output_dir.mkdir(parents=True, exist_ok=True)
    flips = arguments.test_time_flips
    predictions = predict_slices(members, slices, arguments.batch_size, arguments.num_workers, flips)
    write_submission(predictions, path)
    print(f"{len(slices)} slices of {len({s.scan for s in slices})} scans: {path}")
    return path


if __name__ == "__main__":
    with exit_on_input_error():
        main()
