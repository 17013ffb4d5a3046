"""Pictures of a training: the same few validation slices at each evaluation, with true and predicted outlines.

They go where `--report_to` sends the curves. The evaluation predicts these slices anyway, so nothing is predicted for
the pictures. They show slices of patients. So by default only TensorBoard gets them, which writes to this machine.
"""

import logging
import math
from collections import Counter, defaultdict
from collections.abc import Iterable
from operator import itemgetter
from typing import Any, NamedTuple

import numpy as np
from datasets import Dataset
from huggingface_hub import HfApi
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments
from transformers.integrations import TensorBoardCallback, TrackioCallback, WandbCallback

from gi_segmentation.arguments import RunArguments
from gi_segmentation.data.prepared import read_image
from gi_segmentation.data.transforms import attached_transform
from gi_segmentation.errors import InputError, list_some, one_line
from gi_segmentation.files import to_json
from gi_segmentation.labels import find_labels
from gi_segmentation.review.overlays import Panel, annotated_panel, draw_panels
from gi_segmentation.scoring.dice import count_pixels, dice_score, nanmean
from gi_segmentation.training.evaluation import ComputeMetrics

logger = logging.getLogger(__name__)

NUM_SLICES = 4
# The name of the pictures in the log.
TAG = "eval/slices"
# The programs that can get pictures.
PROGRAMS = (TensorBoardCallback, WandbCallback, TrackioCallback)
# Some of the other programs send away what TensorBoard writes. Beside them, it gets no pictures by default.
NAMES = {"tensorboard", "wandb", "trackio"}


class ShownSlice(NamedTuple):
    """The slice of a scan that a picture shows.

    Attributes:
        truth: The slice with the annotations of the dataset.
        predicted: The same slice with the predicted masks.
        number: Its number in the scan.
        dice: Mean Dice over its organs; None if no organ is in either mask.
    """

    truth: Panel
    predicted: Panel
    number: int
    dice: float | None


def pick_slices(dataset: Dataset, number: int) -> list[int]:
    """Choose slices that show an organ, from as many patients and scans as possible. Chance has no part in it.

    Args:
        dataset: A split.
        number: Number of slices. There may be fewer slices to choose from.

    Returns:
        Their rows.
    """
    scans: dict[tuple[int, str], list[int]] = defaultdict(list)
    for index, row in enumerate(dataset.with_format(None).select_columns(["case", "scan", "segmentation"])):
        if any(row["segmentation"].values()):
            scans[row["case"], row["scan"]].append(index)
    # Each scan gives the same number of slices; what is left over comes one each from the first scans. Those
    # with the most slices that show an organ come first, but a second scan of a patient only after the first ones of
    # all patients. Sorting keeps the order of equals.
    turns: Counter[int] = Counter()
    ordered = []
    for (case, _), members in sorted(scans.items(), key=lambda item: len(item[1]), reverse=True):
        ordered.append((turns[case], members))
        turns[case] += 1
    ordered.sort(key=itemgetter(0))
    share, more = divmod(number, len(scans))
    chosen: list[int] = []
    for place, (_, members) in enumerate(ordered[:number]):
        # Evenly spaced positions without the two ends, because an organ is small on its first and last slice. If there
        # are few slices, rounding gives the same position twice. `dict.fromkeys` then keeps it once, in order.
        positions = np.linspace(0, len(members) - 1, share + (place < more) + 2)[1:-1].round()
        chosen += [members[position] for position in dict.fromkeys(positions.astype(int).tolist())]
    return chosen


def read_row(dataset: Dataset, index: int) -> dict[str, Any]:
    """Return a row of a split, with its image: raw intensities, uint16, shape `(height, width)`.

    Args:
        dataset: A split with a `SliceTransform` attached.
        index: Number of the row.

    Raises:
        InputError: As `read_image`.
    """
    # `with_format(None)` gives the stored row, and not the tensors of the transform. A streamed row has no image.
    row, slices = dataset.with_format(None)[index], attached_transform(dataset).slices
    row["image"] = read_image(slices.images[slices.rows[row["scan"]][row["slice"]]])
    return row


def show_slice(row: dict[str, Any], preds: np.ndarray) -> ShownSlice:
    """Show a slice with its annotations and with predicted masks.

    Args:
        row: From `read_row`.
        preds: Predicted masks, bool, shape `(organs, height, width)`.

    Returns:
        The slice. The title of the prediction has the mean Dice of its organs. Those that nobody has drawn are not
        scored, and the title of the annotations names them.
    """
    unknown = [organ for organ, rle in row["segmentation"].items() if rle is None]
    note = f"\nnot drawn: {list_some(unknown)}" if unknown else ""
    truth = annotated_panel(row, f"{row['id']}\nreference outlines{note}")
    known = [organ not in unknown for organ in row["segmentation"]]
    dice = score_slice(preds[known], truth.masks[known])
    return ShownSlice(truth, Panel(truth.image, preds, f"predicted, Dice {dice:.2f}"), row["slice"], to_json(dice))


def score_slice(preds: np.ndarray, target: np.ndarray) -> float:
    """Return the mean Dice over the organs of a slice; NaN if no organ is in either mask.

    Args:
        preds: Predicted masks on the native grid of the slice, bool, shape `(organs, height, width)`.
        target: True masks, same shape.
    """
    # An organ that is in neither mask has a Dice of NaN and is left out of the mean.
    return nanmean(map(dice_score, count_pixels(preds, target).tolist()))


def render(figure: Figure) -> np.ndarray:
    """Return the pixels of a figure: uint8, shape `(height, width, 3)`."""
    canvas = FigureCanvasAgg(figure)
    canvas.draw()
    return np.asarray(canvas.buffer_rgba())[..., :3]


def send_to_trackio(pixels: np.ndarray, step: int) -> None:
    """Send a picture to Trackio: without a Space, it writes to this machine.

    Raises:
        InputError: If the Space is public. A Space that exists stays so, whatever `--hub_private_repo` says.
    """
    import trackio

    space = trackio.context_vars.current_space_id.get()
    if space is not None and not HfApi().repo_info(space, repo_type="space").private:
        raise InputError(f"the Space {space} is public, and the pictures show slices of patients; make it private")
    trackio.log({TAG: trackio.Image(pixels), "train/global_step": step})


def send_picture(callback: TrainerCallback, pixels: np.ndarray, step: int, away: bool) -> None:
    """Send a picture to a program of `--report_to`.

    Args:
        callback: The callback of the program, one of `PROGRAMS`.
        pixels: From `render`.
        step: The step of the training.
        away: Whether the picture may leave this machine.
    """
    if isinstance(callback, TensorBoardCallback) and callback.tb_writer is not None:
        # TensorBoard can write into the storage of a cloud, whose folder is an address.
        if away or "://" not in str(callback.tb_writer.log_dir):
            callback.tb_writer.add_image(TAG, pixels, step, dataformats="HWC")
            callback.tb_writer.flush()
    elif isinstance(callback, WandbCallback) and away:
        import wandb

        wandb.log({TAG: wandb.Image(pixels), "train/global_step": step})
    elif isinstance(callback, TrackioCallback) and away:
        send_to_trackio(pixels, step)


class PictureCallback(TrainerCallback):
    """Sends the pictures after each evaluation of a training, from the main process.

    Args:
        dataset: The validation split, with a `SliceTransform` attached.
        metrics: Sees the predictions of all slices. It is told which ones to keep.
        callbacks: All callbacks of the Trainer, with those of `--report_to`.
        args: Says where pictures may go (`--log_pictures`).
    """

    def __init__(
        self, dataset: Dataset, metrics: ComputeMetrics, callbacks: Iterable[TrainerCallback], args: RunArguments
    ) -> None:
        self.dataset = dataset
        self.metrics = metrics
        self.callbacks = callbacks
        self.away = args.log_pictures == "all"
        self.labels = find_labels(dataset.features)
        self.indices = pick_slices(dataset, NUM_SLICES)
        numbers = dataset.with_format(None).select_columns(["case", "day", "slice"]).select(self.indices)
        self.numbers = [(row["case"], row["day"], row["slice"]) for row in numbers]
        self.rows: list[dict[str, Any]] = []
        self.failed: list[TrainerCallback] = []
        self.training = False
        metrics.watched = set(self.numbers)

    def on_train_begin(self, *args: Any, **kwargs: Any) -> None:
        """Send pictures from now on."""
        self.training = True

    def on_train_end(self, *args: Any, **kwargs: Any) -> None:
        """Send no more pictures: the best checkpoint is scored next, and its picture is on the card."""
        self.training = False

    def on_evaluate(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Draw the slices, and send the picture to each program."""
        if not (self.training and state.is_world_process_zero):
            return
        pixels = None
        for callback in self.callbacks:
            if not isinstance(callback, PROGRAMS) or callback in self.failed:
                continue
            try:
                pixels = self.draw() if pixels is None else pixels
                send_picture(callback, pixels, state.global_step, self.away)
            except Exception as error:
                # Whatever a program or its server does, a picture is not worth the training.
                self.failed.append(callback)
                logger.warning("no more pictures for the %s: %s", type(callback).__name__, one_line(error))

    def draw(self) -> np.ndarray:
        """Return the picture: reference outlines in the upper row, predicted outlines in the lower row."""
        # The images are read once. A streamed image is far away.
        self.rows = self.rows or [read_row(self.dataset, index) for index in self.indices]
        shown = []
        for row, numbers in zip(self.rows, self.numbers, strict=True):
            shape = len(row["segmentation"]), row["height"], row["width"]
            # A batch pads the masks of small slices. `count` leaves the padding out.
            packed = self.metrics.watched_masks[numbers]
            shown.append(show_slice(row, np.unpackbits(packed, count=math.prod(shape)).view(bool).reshape(shape)))
        panels = [*(one.truth for one in shown), *(one.predicted for one in shown)]
        return render(draw_panels(panels, self.labels, columns=len(shown)))


def find_picture_callback(
    dataset: Dataset, metrics: ComputeMetrics | None, callbacks: Iterable[TrainerCallback], args: RunArguments
) -> list[TrainerCallback]:
    """Return the callback for the pictures; an empty list if no program may get any.

    Args:
        dataset: As in `PictureCallback`, as well as `callbacks` and `args`.
        metrics: As in `PictureCallback`; None with `--fold all`, where nothing is scored.
    """
    programs = set(args.report_to or ())
    local = "tensorboard" in programs and programs <= NAMES
    wanted = {"none": False, "local": local, "all": bool(programs & NAMES)}[args.log_pictures]
    return [PictureCallback(dataset, metrics, callbacks, args)] if wanted and metrics is not None else []
