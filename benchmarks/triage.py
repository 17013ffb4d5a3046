"""Count how many faulty scans the triage of `gi_segmentation.predict` flags, and how many good ones it leaves alone.

Each phantom patient is predicted as it is, and with one deliberate fault at a time. The limits are chosen before, on
other patients: the smallest deviation, and the largest confidence, at which at most one in twenty good scans is
flagged. A scan fails at four times this deviation, or if the confidence is lower by 0.2. The defaults of
`triage.TriageLimits` are what the documented run chose.
"""

import argparse
import tempfile
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import TypeAlias

import numpy as np

from dataset_builder.phantom import write_phantom
from gi_segmentation.data.slices import find_dataset
from gi_segmentation.errors import InputError
from gi_segmentation.formats.inputs import InputScan, find_scans
from gi_segmentation.formats.volumes import Volume, list_slices, read_pixels
from gi_segmentation.inference.arguments import Computation
from gi_segmentation.inference.batches import PredictionSettings
from gi_segmentation.inference.members import Member, load_members
from gi_segmentation.inference.scans import predict_scans
from gi_segmentation.review.predicted_scan import PredictedScan
from gi_segmentation.review.ranges import TrainingRanges, find_deviation, find_features, list_features
from gi_segmentation.review.triage import Triage, TriageLimits, judge_scan
from gi_segmentation.training.training_ranges import find_training_ranges

# A scan as in the training: intensities, float32, shape `(slices, rows, columns)`, and its voxel size (z, y, x) in mm.
Voxels: TypeAlias = tuple[np.ndarray, tuple[float, float, float]]
# The choices for the two limits that are chosen.
DEVIATIONS = (0.25, 0.5, 0.75, 1.0, 1.5, 2.0, 3.0, 4.0)
CONFIDENCES = (0.95, 0.9, 0.85, 0.8, 0.75, 0.7, 0.65, 0.6, 0.55, 0.5)
FALSE_ALARMS = 0.05


def add_noise(share: float) -> Callable[[np.ndarray], np.ndarray]:
    """Return a function that adds Gaussian noise, with this share of the 98th percentile as its deviation."""

    def change(voxels: np.ndarray) -> np.ndarray:
        noise = np.random.default_rng(0).normal(0, share * np.percentile(voxels, 98), voxels.shape)
        return np.maximum(voxels + noise, 0).astype(np.float32)

    return change


def crop_field(share: float) -> Callable[[np.ndarray], np.ndarray]:
    """Return a function that cuts this share of rows and columns off at each side."""

    def change(voxels: np.ndarray) -> np.ndarray:
        top, left = (int(length * share) for length in voxels.shape[1:])
        return voxels[:, top : voxels.shape[1] - top, left : voxels.shape[2] - left]

    return change


def draw_legs(voxels: np.ndarray) -> np.ndarray:
    """Draw two thighs of fat, muscle and bone in the place of the body, as long as the scan."""
    depth, height, width = voxels.shape
    rows, columns = np.mgrid[:height, :width]
    bright, image = float(np.percentile(voxels, 98)), np.zeros((height, width))
    for centre in (0.3 * width, 0.7 * width):
        distance = np.hypot(rows - 0.5 * height, columns - centre) / (0.17 * width)
        image = np.where(distance < 1, np.select([distance < 0.2, distance < 0.8], [0.7, 0.3], 1.0) * bright, image)
    noise = np.random.default_rng(0).normal(0, 0.02 * bright, voxels.shape)
    return np.maximum(image[None].repeat(depth, axis=0) + noise, 0).astype(np.float32)


FAULTS: dict[str, Callable[[np.ndarray], np.ndarray]] = {
    "head and feet swapped": lambda voxels: voxels[::-1],
    "left and right swapped": lambda voxels: voxels[:, :, ::-1],
    "front and back swapped": lambda voxels: voxels[:, ::-1],
    "rows and columns swapped": lambda voxels: voxels.transpose(0, 2, 1),
    "inverted intensities": lambda voxels: voxels.max() - voxels,
    "noise, 3 %": add_noise(0.03),
    "noise, 10 %": add_noise(0.1),
    "noise, 30 %": add_noise(0.3),
    "constant": lambda voxels: np.full_like(voxels, 500),
    "field of view cropped to 90 %": crop_field(0.05),
    "field of view cropped to 60 %": crop_field(0.2),
    "lower eighth missing": lambda voxels: voxels[: len(voxels) * 7 // 8],
    "lower half missing": lambda voxels: voxels[: len(voxels) // 2],
    "contrast, gamma 0.8": lambda voxels: voxels.max() * (voxels / voxels.max()) ** 0.8,
    "thighs": draw_legs,
}


def read_phantoms(folder: Path, num_cases: int, seed: int, slices_per_scan: int | None) -> Iterator[Voxels]:
    """Write phantom patients, and yield one scan of each."""
    write_phantom(folder, num_cases=num_cases, days_per_case=1, slices_per_scan=slices_per_scan, seed=seed)
    yield from read_scans(folder / "train")


def read_scans(path: Path) -> Iterator[Voxels]:
    """Yield the scans of any input that `predict` takes, if they have enough slices to be a scan."""
    for scan in find_scans(path).usable:
        if len(scan.slices) > 2:
            first = scan.slices[0]
            voxels = np.stack([read_pixels(one) for one in scan.slices]).astype(np.float32)
            yield voxels, (first.thickness_mm, *first.pixel_spacing)


def to_scan(name: str, voxels: np.ndarray, spacing_mm: tuple[float, float, float]) -> InputScan:
    """Return intensities as a scan, whose header says that they lie as in the training."""
    # Columns, rows and slices, all against the patient's axes. For `formats.volumes`, this is the orientation of the
    # training.
    native = np.ascontiguousarray(voxels.transpose(2, 1, 0))
    affine = np.diag([*(-length for length in spacing_mm[::-1]), 1.0])
    volume = Volume(name, Path(name), native.shape, affine, lambda: native)
    return InputScan(name, list_slices([volume]))


def predict_one(members: list[Member], scan: InputScan) -> PredictedScan:
    """Predict a scan, with all that a verdict needs.

    Raises:
        InputError: If the scan cannot be used. It counts as flagged.
    """
    # The voxels are in memory already, so no process has to read them.
    settings = PredictionSettings(num_workers=0)
    ((_, predicted),) = predict_scans(members, [scan], settings, probabilities=True)
    if isinstance(predicted, InputError):
        raise predicted
    return predicted


def choose_limits(scans: Iterable[PredictedScan], ranges: TrainingRanges) -> tuple[float, float]:
    """Return the deviation and the confidence at which at most `FALSE_ALARMS` of good scans are flagged by each."""
    deviations, confidences = [], []
    for scan in scans:
        values, features = find_features(scan.measured), list_features(scan.labels.names)
        worst = [
            (find_deviation(features[name], values[name], ends), name)
            for name, ends in ranges.ranges.items()
            if not np.isnan(values[name])
        ]
        deviations.append(max(worst)[0])
        confidences.append(np.nanmin([one.confidence for one in scan.measured.organs.values()]))
        print(f"{scan.scan.name}: deviation {deviations[-1]:.2f} ({max(worst)[1]}), confidence {confidences[-1]:.2f}")
    # The lists begin with the strictest limit, and the strictest one with few enough false alarms is chosen.
    far = [limit for limit in DEVIATIONS if np.mean(np.array(deviations) > limit) <= FALSE_ALARMS]
    sure = [limit for limit in CONFIDENCES if np.mean(np.array(confidences) < limit) <= FALSE_ALARMS]
    return far[0], sure[0]


def print_row(title: str, triages: list[Triage], refused: int) -> None:
    """Print a row of the table: how many scans got each verdict, and the checks that found most of them."""
    verdicts = Counter(triage.verdict for triage in triages)
    checks = Counter(check for triage in triages for check in {reason.check for reason in triage.reasons})
    number = len(triages) + refused
    found = ", ".join(f"`{check}` {times}" for check, times in checks.most_common(3)) or "–"
    cells = [number, verdicts["good"], verdicts["look"], verdicts["fail"], refused, number - verdicts["good"], found]
    print(f"| {title} | {' | '.join(map(str, cells))} |", flush=True)


def main() -> None:
    """Choose limits on some patients, and print the table for others."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.ArgumentDefaultsHelpFormatter)
    parser.add_argument("--model", required=True, help="folder or Hub id of a checkpoint that was trained on phantoms")
    parser.add_argument("--dataset_name", help="dataset for the ranges; None: those in the checkpoint's config.json")
    parser.add_argument("--num_cases", type=int, default=12, help="number of patients that are measured")
    parser.add_argument("--num_chosen", type=int, default=20, help="number of patients on which limits are chosen")
    parser.add_argument("--slices_per_scan", type=int, help="number of slices of each scan; None: 144 or 80")
    parser.add_argument("--others", type=Path, nargs="*", default=[], help="other scans, for example CT or real MR")
    arguments = parser.parse_args()
    members = load_members([arguments.model], None, Computation())
    if arguments.dataset_name:
        ranges = find_training_ranges(find_dataset(arguments.dataset_name, None)["train"])
    else:
        ranges = TrainingRanges.from_config(members[0].model.config.training_ranges, members[0].labels)

    def judge(
        title: str, scans: Iterable[Voxels], change: Callable[[np.ndarray], np.ndarray], limits: TriageLimits
    ) -> None:
        triages, refused = [], 0
        for voxels, mm in scans:
            try:
                scan = predict_one(members, to_scan(title, change(voxels), mm))
                triages.append(judge_scan(scan.measured, ranges, limits=limits))
            except InputError:
                refused += 1
        print_row(title, triages, refused)

    with tempfile.TemporaryDirectory() as scratch:
        chosen = read_phantoms(Path(scratch) / "chosen", arguments.num_chosen, 101, arguments.slices_per_scan)
        scans = (predict_one(members, to_scan(f"good {i}", *one)) for i, one in enumerate(chosen))
        deviation, confidence = choose_limits(scans, ranges)
        limits = TriageLimits((deviation, 4 * deviation), (confidence, round(confidence - 0.2, 2)))
        print(f"chosen on {arguments.num_chosen} patients: {limits}; the defaults: {TriageLimits()}")
        measured = list(read_phantoms(Path(scratch) / "measured", arguments.num_cases, 102, arguments.slices_per_scan))
        print("| scans | number | good | look | fail | refused | flagged | most frequent reasons |", flush=True)
        print("|---|---|---|---|---|---|---|---|", flush=True)
        judge("as they are", measured, lambda voxels: voxels, limits)
        for title, change in FAULTS.items():
            judge(title, measured, change, limits)
        for path in arguments.others:
            judge(path.name, read_scans(path), lambda voxels: voxels, limits)


if __name__ == "__main__":
    main()
