"""`python -m gi_segmentation.predict`: from a checkpoint and a folder of slices to prediction files."""

import argparse
import csv
import io
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from torch.utils.data import DataLoader, Dataset
from tqdm.auto import tqdm
from transformers import PreTrainedModel, SegformerImageProcessorPil

from dataset_builder.kaggle import KaggleDataError, SliceFile, find_slices, read_slice
from gi_segmentation.data import SliceTransform
from gi_segmentation.errors import InputError, exit_on_input_error
from gi_segmentation.evaluation import one_hot, predict_labels
from gi_segmentation.modeling import load_checkpoint
from gi_segmentation.rle import encode
from gi_segmentation.schema import ORGANS

SUBMISSION = "submission.csv"


class SliceFolder(Dataset):
    """Slice files as model input.

    Args:
        slices: The files.
        transform: Its `pixel_values` is used.
    """

    def __init__(self, slices: list[SliceFile], transform: SliceTransform) -> None:
        self.slices = slices
        self.transform = transform

    def __len__(self) -> int:
        return len(self.slices)

    def __getitem__(self, index: int) -> torch.Tensor | KaggleDataError:
        try:
            data = read_slice(self.slices[index])
        except KaggleDataError as error:
            return error  # raised in a worker process, it would arrive as a traceback inside a message
        with Image.open(io.BytesIO(data)) as image:
            return self.transform.pixel_values(np.array(image))


def stack_slices(items: list[torch.Tensor | KaggleDataError]) -> torch.Tensor | KaggleDataError:
    """A batch of `SliceFolder`: float32, shape `(B, 3, S, S)`; or the first of its errors."""
    errors = [item for item in items if isinstance(item, KaggleDataError)]
    return errors[0] if errors else torch.stack(items)  # type: ignore[arg-type]


def predict_slices(
    model: PreTrainedModel,
    processor: SegformerImageProcessorPil,
    slices: list[SliceFile],
    batch_size: int,
    num_workers: int,
) -> Iterator[tuple[SliceFile, np.ndarray]]:
    """Predict slice by slice, with a progress bar.

    Args:
        model: In evaluation mode, on the device to use.
        processor: Its image processor.
        slices: The files, in the order of the result.
        batch_size: Slices a forward pass.
        num_workers: Processes that read files.

    Yields:
        A slice and its organs' masks on the slice's own grid: bool, shape `(organs, height, width)`.

    Raises:
        KaggleDataError: If a file is not the slice that its name says.
    """
    dataset = SliceFolder(slices, SliceTransform(processor))
    loader = DataLoader(dataset, batch_size, num_workers=num_workers, collate_fn=stack_slices)
    remaining = iter(slices)
    with tqdm(total=len(slices), desc="Predicting", unit="slice") as bar, torch.inference_mode():
        for pixel_values in loader:
            if isinstance(pixel_values, KaggleDataError):
                raise pixel_values
            for logits in model(pixel_values=pixel_values.to(model.device)).logits:
                slice_file = next(remaining)
                labels = predict_labels(logits[None], slice_file.height, slice_file.width)
                yield slice_file, one_hot(labels)[0, 1:].cpu().numpy()
            bar.update(len(pixel_values))


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


def parse_arguments(argv: list[str] | None) -> argparse.Namespace:
    """Read the command line."""
    parser = argparse.ArgumentParser(
        "python -m gi_segmentation.predict",
        description=__doc__,
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
    )
    parser.add_argument("--model", required=True, help="folder or Hub id of a checkpoint of this project")
    parser.add_argument("--revision", help="branch, tag or commit on the Hub; None: its main branch")
    parser.add_argument("--input", type=Path, required=True, help="folder of scans: caseN_dayN/scans/slice_*.png")
    parser.add_argument("--output_dir", type=Path, required=True, help="where the files go")
    parser.add_argument("--format", choices=["kaggle"], default="kaggle", help=f"kaggle: {SUBMISSION}")
    parser.add_argument("--batch_size", type=int, default=16, help="slices a forward pass")
    parser.add_argument("--num_workers", type=int, default=2, help="processes that read slices")
    parser.add_argument(
        "--device", default="cuda" if torch.cuda.is_available() else "cpu", help="where the model runs"
    )
    arguments = parser.parse_args(argv)
    if arguments.batch_size < 1 or arguments.num_workers < 0:
        raise InputError(
            f"expected --batch_size of at least 1 and --num_workers of at least 0, "
            f"but got {arguments.batch_size} and {arguments.num_workers}"
        )
    return arguments


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
    model, processor = load_checkpoint(arguments.model, arguments.revision)
    model = move_model(model, arguments.device)
    arguments.output_dir.mkdir(parents=True, exist_ok=True)
    predictions = predict_slices(model, processor, slices, arguments.batch_size, arguments.num_workers)
    write_submission(predictions, path)
    print(f"{len(slices)} slices of {len({s.scan for s in slices})} scans: {path}")
    return path


if __name__ == "__main__":
    with exit_on_input_error():
        main()
