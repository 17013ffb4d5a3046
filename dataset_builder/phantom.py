"""Write a folder of synthetic patients in Kaggle's layout, for tests and the demo.

The steps of a scan are:

1. Draw the patient: the sizes of the body, ellipsoids for most structures, and tubes for the three organs.
2. Cut these shapes with the plane of a slice, and paint the cuts. The masks of the organs are painted with them.
3. Bend image and masks together, so that no outline is a perfect ellipse.
4. Add what a scanner adds: texture, a bias field, artefacts, blur and noise. The masks stay as they are.

Lengths are in millimetres, in the order (z, y, x), from the middle of the body. z grows from head to feet as the slice
numbers do, y grows towards the back, and x grows towards the patient's left, which is at the right of the image.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import partial
from multiprocessing import get_context
from pathlib import Path
from typing import NamedTuple, TypeAlias

import cv2
import numpy as np
from scipy.interpolate import CubicSpline
from tqdm.auto import tqdm

from dataset_builder.difficulty import DIFFICULTIES, Difficulty
from gi_segmentation.data.synthetic import mark_synthetic
from gi_segmentation.files import writing_folder
from gi_segmentation.formats.kaggle.folder import FAULTY_SCANS
from gi_segmentation.formats.kaggle.label_file import LabelFile, ScanFacts, write_label_file
from gi_segmentation.labels import GI_TRACT, LabelSet
from gi_segmentation.processes import count_cores, process_pool
from gi_segmentation.rle import encode
from gi_segmentation.schema import scan_name, slice_name

Array: TypeAlias = np.ndarray

# The four kinds of real scans: width and height in pixels, spacing in mm, number of slices.
SCAN_KINDS = ((266, 266, 1.50, 144), (360, 310, 1.50, 144), (276, 276, 1.63, 80), (234, 234, 1.50, 144))
# Kaggle's 85 patients have numbers up to this one, and the days count from 0.
HIGHEST_CASE = 156
NUM_DAYS = 40

# 144 real slices of 3 mm. The organs lie in about half of this length: 55 % of the slices are empty here, and 57 % of
# the real ones.
BODY_LENGTH_MM = 432.0
# Balls at this distance make a tube. Their radii are several times as large, so the tube looks smooth.
PATH_STEP_MM = 2.0
# A smaller cut of an organ is left out. In 22 real scans, 5 % of the stomach's cuts are smaller than 431 mm².
MIN_ORGAN_MM2 = 450.0
# How much the days of a patient differ, as a share of how much patients differ. Nobody has measured the real share.
DAY_SHARE = 0.15
# Share of the slices on which touching organs share a rim. In 22 real scans, organs overlap on 32 % of the slices that
# show several organs (419 of 1,313).
TOUCHING_SHARE = 0.3
# OpenCV draws with whole numbers. With 4 of their bits behind the binary point, centres and radii are exact to 1/16
# of a pixel, so small changes between slices are not lost.
SUBPIXEL_BITS = 4

# A look is a pair: the intensity relative to subcutaneous fat, and the strength of its texture. On these scans fat is
# bright and muscle is dark.
FAT, VISCERAL_FAT, MUSCLE, AIR = (1.0, 0.05), (0.50, 0.10), (0.24, 0.25), (0.02, 0.0)
# The intensity of all three organs in the hard phantom. On the 300 real slices of our test data (8-bit copies), the
# median intensity of each organ is 0.27 to 0.30 of the slice's 98th percentile. With this level the phantom has 0.28
# to 0.30.
ORGAN_LEVEL = 0.37

# What the phantom can annotate, in the order in which more labels come in. Every structure is painted in any case.
STRUCTURES = (
    "stomach", "liver", "spleen", "large_bowel", "small_bowel", "kidney_left", "kidney_right", "heart", "bladder",
    "aorta", "vertebrae", "psoas_left", "psoas_right", "lung_left", "lung_right", "vena_cava", "spinal_canal",
    "hip_bone_left", "hip_bone_right",
)  # fmt: skip


class Rngs(NamedTuple):
    """The random numbers of a scan.

    Attributes:
        patient: Gives the same numbers on each day of a patient, because its seed does not contain the day.
        day: Gives other numbers on each day.
        spread: A factor on all differences, 1.0 for the easy phantom.
    """

    patient: np.random.Generator
    day: np.random.Generator
    spread: float


@dataclass(frozen=True)
class PhantomSummary:
    """Counts of what was written.

    Attributes:
        cases: Patients.
        scans: Scans of all patients.
        slices: Slices of all scans.
        empty_slices: Slices that show no organ.
        multi_organ_slices: Slices that show at least two organs.
        overlapping_slices: Slices on which organs overlap.
        overlap_pixels: Pixels that belong to more than one organ.
    """

    cases: int
    scans: int
    slices: int
    empty_slices: int
    multi_organ_slices: int
    overlapping_slices: int
    overlap_pixels: int


@dataclass(frozen=True)
class _PhantomScan:
    """A scan that is to be written: its name, its size in pixels and slices, and the organs that are annotated."""

    case: int
    day: int
    num_slices: int
    width: int
    height: int
    spacing_mm: float
    organs: tuple[str, ...]
    slice_mm: float | None

    @property
    def name(self) -> str:
        return scan_name(self.case, self.day)

    def height_mm(self, number: int) -> float:
        """Return where the slice with a number lies. The middle slice is at 0 mm, where the three organs are.

        So even a scan of one slice shows all of them.
        """
        place = number - 1 - self.num_slices // 2
        return self.slice_mm * place if self.slice_mm else BODY_LENGTH_MM * place / self.num_slices


@dataclass(frozen=True)
class _Blob:
    """An ellipsoid of one look; centre and radii in mm as (z, y, x). `name` is one of `STRUCTURES`, or empty."""

    centre_mm: Array
    radii_mm: Array
    look: tuple[float, float]
    name: str = ""


@dataclass(frozen=True)
class _Tube:
    """A hollow organ: balls along a path, with a wall around contents.

    Attributes:
        centres_mm: Centres of the balls, shape `(points, 3)` as (z, y, x).
        radii_mm: Their outer radii, shape `(points,)`.
        wall_mm: Thickness of the wall.
        wall_look: Intensity and texture of the wall.
        contents: Intensity of the contents at each ball, shape `(points,)`. It goes up and down along the path, which
            looks like the folds of a bowel.
        contents_texture: Strength of the contents' texture.
    """

    centres_mm: Array
    radii_mm: Array
    wall_mm: float
    wall_look: tuple[float, float]
    contents: Array
    contents_texture: float


@dataclass(frozen=True)
class _Anatomy:
    """Everything that is drawn once for a scan.

    Attributes:
        torso_mm: Half axes (y, x) of the body's elliptic outline.
        rim_mm: Thickness (y, x) of the fat under the skin.
        blobs: Structures in the abdominal cavity, in painting order.
        spine: Structures along the back, which run through all slices.
        tubes: The three organs by name, in painting order.
        offset_mm: Where the body's middle lies (y, x), seen from the middle of the image.
        fat_intensity: Pixel value of subcutaneous fat.
        noise: Standard deviation of the noise, relative to fat.
        arm: An arm beside the body; empty on scans without a hot spot.
        hot_spot: Where the signal is too strong. The first number of its look is the gain at the centre, less 1.
        ghost: Strength of the copies of the body that breathing leaves.
        ghost_mm: Distance of these copies along y.
    """

    torso_mm: Array
    rim_mm: Array
    blobs: list[_Blob]
    spine: list[_Blob]
    tubes: dict[str, _Tube]
    offset_mm: Array
    fat_intensity: float
    noise: float
    arm: Sequence[_Blob] = ()
    hot_spot: _Blob | None = None
    ghost: float = 0.0
    ghost_mm: float = 0.0


def write_phantom(
    output_dir: Path,
    num_cases: int = 6,
    days_per_case: int = 2,
    slices_per_scan: int | None = None,
    seed: int = 0,
    num_proc: int | None = None,
    difficulty: str = "easy",
    num_labels: int | None = None,
    undrawn: Sequence[str] = (),
    slice_spacing_mm: float | None = None,
) -> PhantomSummary:
    """Write synthetic scans and their masks in Kaggle's layout: `train.csv` and `train/`.

    With one of the last three arguments, the folder is like that of another hospital: it has `labels.json`.

    The same arguments give the same bytes on any number of processes. The folder gets its name when it is complete.

    Args:
        output_dir: Folder to create. An empty folder may exist there.
        num_cases: Number of patients.
        days_per_case: Number of scans of each patient.
        slices_per_scan: Number of slices that the body is divided into; None takes 144 or 80, as the real scans have.
        seed: A number from 0 on. Another seed gives other patients.
        num_proc: Number of processes; None takes one per core. With more than one, Python must be able to import the
            main module, because `multiprocessing` starts new processes (spawn).
        difficulty: In "easy", brightness tells the organs apart. In "hard" it does not, as on real scans: all organs
            are equally bright and have a low contrast, patients differ more, and there are bias fields, noise and
            breathing. On some scans the maximum is a hot spot.
        num_labels: Number of organs that are annotated, the first ones of `STRUCTURES`; None: Kaggle's three organs.
        undrawn: Organs that nobody has drawn in the second scan, the fourth, and so on.
        slice_spacing_mm: Distance between slices; None: the slices are spread over the body.

    Returns:
        Counts of what was written.

    Raises:
        FileExistsError: If `output_dir` is a file or a folder that is not empty.
        ValueError: If a size is below 1, the seed is below 0, or the difficulty or an organ is unknown.
    """
    names = ("num_cases", "days_per_case", "slices_per_scan", "num_proc", "num_labels")
    for name, size in zip(names, (num_cases, days_per_case, slices_per_scan, num_proc, num_labels), strict=True):
        if size is not None and size < 1:
            raise ValueError(f"{name} must be at least 1, got {size}")
    if seed < 0:
        raise ValueError(f"seed must not be negative, got {seed}")
    if difficulty not in DIFFICULTIES:
        raise ValueError(f"difficulty must be one of {', '.join(DIFFICULTIES)}, got {difficulty!r}")
    labels = _choose_labels(num_labels, undrawn, slice_spacing_mm)
    scans = _plan_scans(num_cases, days_per_case, slices_per_scan, seed, slice_spacing_mm)
    scans = [
        replace(scan, organs=tuple(organ for organ in labels.names if index % 2 == 0 or organ not in undrawn))
        for index, scan in enumerate(scans)
    ]
    _check_phantom_dir(Path(output_dir))
    with writing_folder(Path(output_dir)) as folder:
        results = _write_scans(scans, folder / "train", seed, num_proc or count_cores(), difficulty)
        rows = [row for scan_rows, _ in results for row in scan_rows]
        (folder / "train.csv").write_text("\n".join(["id,class,segmentation", *rows]) + "\n", encoding="utf-8")
        if num_labels or undrawn or slice_spacing_mm:
            write_label_file(folder, LabelFile(labels, {scan.name: _describe_scan(scan, labels) for scan in scans}))
    counts = np.sum([scan_counts for _, scan_counts in results], axis=0).tolist()
    return PhantomSummary(num_cases, len(scans), sum(scan.num_slices for scan in scans), *counts)


def _check_phantom_dir(output_dir: Path) -> None:
    """Check that a folder does not exist or is empty."""
    if output_dir.exists() and not (output_dir.is_dir() and not any(output_dir.iterdir())):
        raise FileExistsError(
            f"{output_dir} exists and is not an empty folder: remove it or choose another output_dir"
        )


def _choose_labels(num_labels: int | None, undrawn: Sequence[str], slice_spacing_mm: float | None) -> LabelSet:
    """Check the last arguments of `write_phantom`, and return the labels."""
    if num_labels is not None and num_labels > len(STRUCTURES):
        raise ValueError(f"num_labels must be at most {len(STRUCTURES)}, got {num_labels}")
    labels = GI_TRACT if num_labels is None else LabelSet(STRUCTURES[:num_labels])
    if strangers := [organ for organ in undrawn if organ not in labels.names]:
        raise ValueError(f"undrawn must be some of {', '.join(labels.names)}, got {strangers[0]!r}")
    if set(undrawn) == set(labels.names):
        raise ValueError(f"undrawn must leave an organ of {', '.join(labels.names)}, got all of them")
    if slice_spacing_mm is not None and not 0 < slice_spacing_mm <= BODY_LENGTH_MM:
        raise ValueError(f"slice_spacing_mm must be above 0 and at most {BODY_LENGTH_MM:g}, got {slice_spacing_mm}")
    return labels


def _describe_scan(scan: _PhantomScan, labels: LabelSet) -> ScanFacts:
    """Return what `labels.json` says of a scan."""
    unknown = tuple(organ for organ in labels.names if organ not in scan.organs)
    return ScanFacts(scan.slice_mm or BODY_LENGTH_MM / scan.num_slices, unknown=unknown)


def _plan_scans(
    num_cases: int, days_per_case: int, slices_per_scan: int | None, seed: int, slice_mm: float | None = None
) -> list[_PhantomScan]:
    """Draw the numbers of cases and days, and give the cases the four sizes in turn. Sort by case and day."""
    rng = np.random.default_rng(np.random.SeedSequence(seed))
    cases = rng.permutation(np.arange(1, max(HIGHEST_CASE, num_cases) + 1))[:num_cases].tolist()
    scans = []
    for index, case in enumerate(cases):
        width, height, spacing_mm, num_slices = SCAN_KINDS[index % len(SCAN_KINDS)]
        if slice_mm:
            num_slices = round(BODY_LENGTH_MM / slice_mm)
        size = (slices_per_scan or num_slices, width, height, spacing_mm)
        # `build` leaves out scans whose names are on the list of faulty scans. No synthetic scan gets such a name.
        days = [day for day in range(max(NUM_DAYS, 2 * days_per_case)) if scan_name(case, day) not in FAULTY_SCANS]
        for day in sorted(rng.choice(days, size=days_per_case, replace=False).tolist()):
            scans.append(_PhantomScan(case, day, *size, organs=(), slice_mm=slice_mm))
    return sorted(scans, key=lambda scan: (scan.case, scan.day))


def _write_scans(
    scans: list[_PhantomScan], train_dir: Path, seed: int, num_proc: int, difficulty: str
) -> list[tuple[list[str], list[int]]]:
    """Write all scans, and return for each what `_write_scan` returns."""
    write = partial(_write_scan, train_dir=train_dir, seed=seed, difficulty=DIFFICULTIES[difficulty])
    progress = partial(tqdm, total=len(scans), desc="Writing the phantom", unit="scan")
    if min(num_proc, len(scans)) == 1:
        return list(progress(map(write, scans)))
    # The processes are spawned: a fork of a process that has used threads of OpenCV or PyTorch can hang. Each process
    # uses one thread of OpenCV, so that `num_proc` says how many cores are busy.
    with process_pool(min(num_proc, len(scans)), cv2.setNumThreads, 1, context=get_context("spawn")) as pool:
        return list(progress(pool.map(write, scans)))


def _write_scan(scan: _PhantomScan, train_dir: Path, seed: int, difficulty: Difficulty) -> tuple[list[str], list[int]]:
    """Write the slices of a scan.

    Returns:
        The scan's lines of `train.csv`, and the counts of `PhantomSummary` from `empty_slices` on.
    """
    # Each scan has streams of its own, made from the seed and its numbers. So the order in which the processes take
    # the scans does not matter.
    patient = np.random.default_rng(np.random.SeedSequence(seed, spawn_key=(scan.case,)))
    day = np.random.default_rng(np.random.SeedSequence(seed, spawn_key=(scan.case, scan.day)))
    folder = train_dir / f"case{scan.case}" / scan.name / "scans"
    folder.mkdir(parents=True)
    rngs = Rngs(patient, day, difficulty.spread)
    painter = _Painter(scan, _draw_anatomy(rngs, difficulty), rngs, difficulty)
    rows, counts = [], np.zeros(4, dtype=int)
    for number in range(1, scan.num_slices + 1):
        image, masks = painter.paint(scan.height_mm(number))
        # Kaggle writes the width before the height.
        size = f"{scan.width}_{scan.height}_{scan.spacing_mm:.2f}_{scan.spacing_mm:.2f}"
        path = folder / f"slice_{number:04d}_{size}.png"
        written, png = cv2.imencode(".png", image, [cv2.IMWRITE_PNG_COMPRESSION, 1])
        if not written:
            raise OSError(f"could not write {path}")
        path.write_bytes(mark_synthetic(png.tobytes()))
        rows += [f"{slice_name(scan.name, number)},{organ},{encode(masks[organ])}" for organ in scan.organs]
        shared = int((np.stack(list(masks.values())).sum(axis=0) > 1).sum())
        present = sum(mask.any() for mask in masks.values())
        counts += [present == 0, present > 1, shared > 0, shared]
    return rows, counts.tolist()


def _vary(rngs: Rngs, values: float | list[float] | Array, spread: float | list[float] | Array) -> Array:
    """Vary the usual values for this patient and this day.

    The formula is: usual + reach * spread * (u_patient + DAY_SHARE * u_day), where both u are uniform in -1 to 1.
    Each call takes as many numbers from both streams as there are values, so a new call changes all values after it.
    """
    patient, day, reach = rngs
    usual = np.asarray(values, dtype=float)
    shape = usual.shape
    return usual + reach * np.asarray(spread) * (patient.uniform(-1, 1, shape) + DAY_SHARE * day.uniform(-1, 1, shape))


def _draw_anatomy(rngs: Rngs, difficulty: Difficulty) -> _Anatomy:
    """Draw the body of this patient on this day."""
    # From outside to inside: the skin's ellipse of about 224 x 296 mm, fat, 7 mm of muscle, and the cavity.
    torso_mm = _vary(rngs, [112, 148], [9, 11])
    rim_mm = _vary(rngs, [15, 14], 4)
    cavity_mm = torso_mm - rim_mm - 7
    # Positions inside are z in mm, and y and x as shares of the cavity's half axes. This factor turns all into mm. So
    # organs keep their place in a larger body.
    place = np.array([1.0, *cavity_mm])
    anatomy = _Anatomy(
        torso_mm=torso_mm,
        rim_mm=rim_mm,
        blobs=_inner_blobs(rngs, place),
        spine=_spine_blobs(rngs, place),
        tubes={
            "small_bowel": _small_bowel(rngs, place),
            "large_bowel": _large_bowel(rngs, place),
            "stomach": _stomach(rngs, place),
        },
        offset_mm=_vary(rngs, [8, 0], 8),
        # MR intensities have no unit, and they differ much between scans. The 98th percentiles of two original
        # slices are 1,767 and 5,225.
        fat_intensity=float(_vary(rngs, 2800, 900)),
        noise=difficulty.noise * float(_vary(rngs, 0.022, 0.008)),
    )
    # The easy phantom stops here. If it drew one more number, all its later numbers and so its bytes would change.
    return anatomy if difficulty == DIFFICULTIES["easy"] else _make_hard(rngs, anatomy, difficulty)


def _make_hard(rngs: Rngs, anatomy: _Anatomy, difficulty: Difficulty) -> _Anatomy:
    """Give all organs the same brightness, and draw ghosts, arm and hot spot."""
    level = float(_vary(rngs, ORGAN_LEVEL, 0.03))
    anatomy = replace(
        anatomy,
        tubes={organ: _alike(rngs, tube, level) for organ, tube in anatomy.tubes.items()},
        ghost=difficulty.ghost * rngs.day.uniform(0.2, 1),
        ghost_mm=rngs.day.uniform(25, 70),
    )
    if rngs.day.random() >= difficulty.hot_scans:
        return anatomy
    arm, hot_spot = _arm(rngs.day, anatomy.torso_mm)
    return replace(anatomy, arm=arm, hot_spot=hot_spot)


def _alike(rngs: Rngs, tube: _Tube, level: float) -> _Tube:
    """Change a tube's contents to about the common level, with weak folds and a weak wall."""
    own = float(_vary(rngs, level, 0.04))
    # About a third of the folds' contrast stays.
    contents = own + 0.35 * (tube.contents - tube.contents.mean())
    return replace(tube, wall_look=(0.6 * own, 0.1), contents=contents, contents_texture=0.2)


def _arm(day: np.random.Generator, torso_mm: Array) -> tuple[list[_Blob], _Blob]:
    """Draw an arm beside the body, and a hot spot between arm and body, where a receiver coil is too near."""
    # The angle in radians says where on the flank the arm lies; positive is towards the back.
    side, angle = day.choice([-1, 1]), day.uniform(-0.3, 0.7)
    rim_mm = np.array([0, torso_mm[0] * np.sin(angle), side * torso_mm[1] * np.cos(angle)])
    # A radius of 1,200 mm along z makes a cylinder: its cut hardly changes over the body's 432 mm.
    centre_mm, radii_mm = rim_mm + np.array([0, 0, 36 * side]), np.array([1200, *day.uniform(26, 34, 2)])
    arm = [_Blob(centre_mm, radii_mm, FAT), _Blob(centre_mm, radii_mm - 8, MUSCLE)]
    hot_mm = rim_mm + np.array([day.uniform(-50, 50), 0, 8 * side])
    return arm, _Blob(hot_mm, np.array([day.uniform(60, 140), 22, 15]), (day.uniform(1.5, 6), 0))


def _blob(
    rngs: Rngs,
    place: Array,
    centre: list[float],
    radii_mm: list[float],
    level: float,
    texture: float = 0.08,
    name: str = "",
) -> _Blob:
    """Draw an ellipsoid near `centre`, which is z in mm, and y and x as shares of the cavity's half axes."""
    centre_mm = _vary(rngs, np.array(centre) * place, 4)
    radii = _vary(rngs, radii_mm, 0.1 * np.array(radii_mm))
    return _Blob(centre_mm, radii, (float(_vary(rngs, level, 0.03)), texture), name)


def _inner_blobs(rngs: Rngs, place: Array) -> list[_Blob]:
    """Draw what lies in the cavity beside the three organs, in painting order."""
    blob = partial(_blob, rngs, place)
    # x grows towards the patient's left. The lungs are almost as dark as air.
    sides = {-1: "right", 1: "left"}
    blobs = [blob([-240, 0.0, 0.5 * side], [125, 72, 56], 0.05, 0.05, f"lung_{sides[side]}") for side in sides]
    # The heart lies between them.
    blobs += [blob([-165, -0.35, 0.15], [62, 42, 48], 0.52, name="heart")]
    # The liver's right lobe is at negative x, and its left lobe reaches over the middle.
    liver = partial(blob, level=0.36, name="liver")
    blobs += [liver([-60, -0.05, -0.52], [78, 62, 58]), liver([-68, -0.35, -0.15], [36, 38, 62])]
    # The spleen lies behind the stomach.
    blobs += [blob([-55, 0.3, 0.72], [44, 30, 20], 0.33, name="spleen")]
    for side, name in ((-0.46, "right"), (0.46, "left")):
        # Each kidney has a brighter pelvis inside.
        kidney = blob([12, 0.52, side], [52, 26, 23], 0.42, name=f"kidney_{name}")
        blobs += [kidney, replace(kidney, radii_mm=0.42 * kidney.radii_mm, look=(0.6, 0.1))]
        # The psoas muscles run down along the spine.
        blobs += [blob([120, 0.55, side * 0.55], [110, 20, 18], 0.28, 0.05, f"psoas_{name}")]
        # The hip bones (ilia) reach into the image from the sides.
        blobs += [blob([185, 0.3, side * 1.7], [70, 55, 22], 0.5, 0.15, f"hip_bone_{name}")]
        # Muscles cover the hip bones on their inner side.
        blobs += [blob([215, 0.0, side * 1.1], [60, 30, 34], 0.32, 0.05)]
    # The bladder lies below all three organs.
    blobs += [blob([195, -0.15, 0.0], [45, 36, 44], 0.45, 0.03, "bladder")]
    return blobs


def _spine_blobs(rngs: Rngs, place: Array) -> list[_Blob]:
    """Draw what runs along the back, through all slices."""
    blob = partial(_blob, rngs, place)
    # There is a muscle of the back on each side of the spine.
    blobs = [blob([0, 0.88, side], [1200, 19, 31], 0.24, 0.35) for side in (-0.3, 0.3)]
    # Behind the vertebrae is the spinal canal, whose fluid is brighter than fat.
    blobs += [blob([0, 0.68, 0.0], [1200, 18, 23], 0.46, 0.12, "vertebrae")]
    blobs += [blob([0, 0.98, 0.0], [1200, 7, 10], 1.8, name="spinal_canal")]
    # The vena cava and the aorta run in front of the vertebrae.
    places = ((-0.12, "vena_cava"), (0.1, "aorta"))
    vessels = [blob([0, 0.38, side], [1200, 9, 9], 0.3, 0.05, name) for side, name in places]
    return [*vessels, *blobs]


def _spline(points_mm: Array, radii_mm: Array) -> tuple[Array, Array, Array]:
    """Lay a smooth path through some points.

    Returns:
        Centres `(points, 3)`, radii and distance along the path, in mm, every `PATH_STEP_MM`.
    """
    # The curve's parameter is the length of the straight lines between the points, so that the balls of the tube have
    # about equal distances whatever the distances of the points.
    chords = np.linalg.norm(np.diff(points_mm, axis=0), axis=1)
    knots = np.concatenate([[0.0], np.cumsum(chords)])
    path_mm = np.arange(0.0, knots[-1], PATH_STEP_MM)
    return CubicSpline(knots, points_mm)(path_mm), np.interp(path_mm, knots, radii_mm), path_mm


def _folds(path_mm: Array, level: float, swing: float, period_mm: float) -> Array:
    """Return intensities that go up and down around a level along a path."""
    return level + swing * np.sin(2 * np.pi * path_mm / period_mm)


def _small_bowel(rngs: Rngs, place: Array) -> _Tube:
    """Draw the small bowel: seven bundles of loops, one below the other, with bright contents and narrow folds."""
    # A bundle crosses the body from one side to the other, and the next one goes back. On its way it alternates
    # between the front (y = -0.38) and the middle (y = 0.18). In 22 real scans, the small bowel reaches over 45.5
    # slices of 3 mm in the median. Here it reaches over 42.
    columns = np.array([-0.48, -0.29, -0.1, 0.1, 0.29, 0.48])
    points = []
    for bundle, z_mm in enumerate(np.linspace(-8, 82, 7)):
        across = columns if bundle % 2 else columns[::-1]
        up_and_down = np.where(np.arange(len(columns)) % 2 == bundle % 2, -0.38, 0.18)
        points += [[z_mm, y, x] for y, x in zip(up_and_down, across, strict=True)]
    points_mm = _vary(rngs, np.array(points) * place, [5.0, 9.0, 7.0]) + _vary(rngs, [0, 0, 0], [3, 5, 6])
    centres_mm, radii_mm, path_mm = _spline(points_mm, _vary(rngs, np.full(len(points), 12.0), 1.5))
    contents = _folds(path_mm, float(_vary(rngs, 0.76, 0.04)), 0.22, 9.0)
    return _Tube(centres_mm, radii_mm, 2.2, (float(_vary(rngs, 0.30, 0.03)), 0.05), contents, 0.1)


def _large_bowel(rngs: Rngs, place: Array) -> _Tube:
    """Draw the large bowel: a frame around the small bowel, with pouches and dark, mottled contents."""
    # It runs from the caecum up the patient's right side, across the front, and down the left side to the sigmoid. A
    # real large bowel reaches over 63 slices in the median, and this one over 50.
    ascending = [[82, 0.05, -0.66], [55, 0.1, -0.74], [25, 0.1, -0.76], [0, -0.1, -0.72]]
    transverse = [[-8, -0.45, -0.5], [2, -0.64, -0.2], [4, -0.68, 0.12], [-10, -0.58, 0.42], [-34, -0.25, 0.74]]
    descending = [[-30, 0.12, 0.84], [0, 0.2, 0.84], [40, 0.18, 0.82], [72, 0.12, 0.74], [86, 0.05, 0.48]]
    points = np.array(ascending + transverse + descending) * place
    usual_mm = np.array([20, 21, 20, 18, 16, 15, 15, 15, 14, 13, 12, 12, 12, 12])
    centres_mm, radii_mm, path_mm = _spline(_vary(rngs, points, 5.0), _vary(rngs, usual_mm, 2.0))
    # The pouches (haustra) of the colon: the radius changes by 13 %, with a pouch every 28 mm.
    pouches = 1 + 0.13 * np.sin(2 * np.pi * path_mm / 28.0)
    contents = _folds(path_mm, float(_vary(rngs, 0.15, 0.03)), 0.05, 28.0)
    return _Tube(centres_mm, radii_mm * pouches, 3.2, (float(_vary(rngs, 0.36, 0.03)), 0.1), contents, 0.8)


def _stomach(rngs: Rngs, place: Array) -> _Tube:
    """Draw the stomach: a J with evenly bright contents in a thick wall."""
    # It runs from below the left half of the diaphragm (z = -66 mm) to the patient's right side. It reaches over 35
    # slices of 3 mm here, and over 32.5 in the median of 22 real scans. The second `_vary` shifts the whole organ.
    points = [[-66, 0.05, 0.42], [-46, -0.12, 0.44], [-24, -0.3, 0.32], [-6, -0.36, 0.1], [2, -0.28, -0.16]]
    points_mm = _vary(rngs, np.array(points) * place, 4.0) + _vary(rngs, [0, 0, 0], [3, 4, 5])
    centres_mm, radii_mm, path_mm = _spline(points_mm, _vary(rngs, [27, 28, 25, 20, 13], 2.5))
    contents = _folds(path_mm, float(_vary(rngs, 1.45, 0.08)), 0.05, 40.0)
    return _Tube(centres_mm, radii_mm, 3.0, (float(_vary(rngs, 0.27, 0.03)), 0.1), contents, 0.14)


class _Painter:
    """Paints the slices of one scan, from head to feet. Some random numbers are drawn anew for each slice."""

    def __init__(self, scan: _PhantomScan, anatomy: _Anatomy, rngs: Rngs, difficulty: Difficulty) -> None:
        patient, self.rng, _ = rngs
        self.anatomy = anatomy
        self.difficulty = difficulty
        self.organs = scan.organs
        self.spacing_mm = scan.spacing_mm
        self.size = (scan.height, scan.width)
        self.middle = (np.array(self.size) - 1) / 2 + anatomy.offset_mm / scan.spacing_mm
        rows, columns = np.indices(self.size, dtype=np.float32)
        # OpenCV's order is (x, y).
        self.pixels = np.stack([columns, rows])
        # Two fields F and G give a smooth volume without much memory: the slice at z gets F cos(z / s) + G sin(z / s).
        # The variance is the same on all slices, and slices at a distance d have a correlation of cos(d / s). Bends
        # belong to the patient: one pair of fields is for shifts along x, and one for shifts along y.
        self.bends = [self._fields(patient, 60.0), self._fields(patient, 60.0)]
        self.texture = self._fields(self.rng, 4.5)
        # The bias field is a gain that changes slowly over the body. It is the exponential of a field, so it is never
        # negative, and a strength of 0.3 means factors of about 0.74 to 1.35 at one standard deviation.
        self.bias = np.exp(difficulty.bias * self._fields(self.rng, 140.0)[0])

    def _fields(self, rng: np.random.Generator, grain_mm: float) -> Array:
        """Return two smooth random fields with a standard deviation of about 1, float32, `(2, height, width)`."""
        # Random numbers on a grid of `grain_mm` are enlarged to pixels by cubic interpolation.
        height, width = (int(np.ceil(side * self.spacing_mm / grain_mm)) + 3 for side in self.size)
        coarse = rng.standard_normal((2, height, width), dtype=np.float32)
        return np.stack([cv2.resize(field, self.size[::-1], interpolation=cv2.INTER_CUBIC) for field in coarse])

    def _ellipse(self, canvas: Array, centre_mm: Array, radii_mm: Array, look: tuple[float, float]) -> None:
        """Fill an ellipse with a look; centre and radii as (y, x)."""
        centre, radii = self.middle + centre_mm / self.spacing_mm, radii_mm / self.spacing_mm
        y, x, radius_y, radius_x = np.rint(2**SUBPIXEL_BITS * np.concatenate([centre, radii])).astype(int).tolist()
        cv2.ellipse(canvas, (x, y), (radius_x, radius_y), 0, 0, 360, look, -1, cv2.LINE_8, SUBPIXEL_BITS)

    def _blobs(self, canvas: Array, blobs: Sequence[_Blob], z_mm: float) -> None:
        """Paint the cuts of ellipsoids with the plane at a height."""
        for blob in blobs:
            # At a distance d from the centre, the radii of the cut are sqrt(1 - (d / r)²) of the ellipsoid's radii.
            inside = 1 - ((z_mm - blob.centre_mm[0]) / blob.radii_mm[0]) ** 2
            if inside > 0:
                self._ellipse(canvas, blob.centre_mm[1:], blob.radii_mm[1:] * np.sqrt(inside), blob.look)

    def _tube(self, canvas: Array, tube: _Tube, z_mm: float) -> Array:
        """Paint the cut of a tube, and return its mask. A cut that is too small is left out.

        All walls are painted before all contents. Otherwise the wall of each ball would cut through the contents of
        the ball before it.
        """
        mask = np.zeros(self.size, dtype=np.uint8)
        # The cut of a ball with radius r at a distance d is a disc with radius sqrt(r² - d²).
        squares = tube.radii_mm**2 - (tube.centres_mm[:, 0] - z_mm) ** 2
        cut = np.flatnonzero(squares > 0)
        radii_mm = np.sqrt(squares[cut])
        scale = 2**SUBPIXEL_BITS / self.spacing_mm
        centres = 2**SUBPIXEL_BITS * self.middle + scale * tube.centres_mm[cut, 1:]
        discs = np.rint(np.column_stack([centres[:, ::-1], scale * radii_mm])).astype(int)
        for x, y, radius in discs.tolist():
            cv2.circle(mask, (x, y), radius, 1, -1, cv2.LINE_8, SUBPIXEL_BITS)
        if np.count_nonzero(mask) * self.spacing_mm**2 < MIN_ORGAN_MM2:
            return np.zeros_like(mask)
        np.copyto(canvas, np.array(tube.wall_look, dtype=np.float32), where=mask[..., None] > 0)
        discs[:, 2] -= round(scale * tube.wall_mm)
        for (x, y, radius), level in zip(discs.tolist(), tube.contents[cut].tolist(), strict=True):
            if radius > 0:
                look = (level, tube.contents_texture)
                cv2.circle(canvas, (x, y), radius, look, -1, cv2.LINE_8, SUBPIXEL_BITS)
        return mask

    def paint(self, z_mm: float) -> tuple[Array, dict[str, Array]]:
        """Paint the slice at a height.

        Returns:
            Image, uint16, and the mask of each annotated organ, uint8; each of shape `(height, width)`.
        """
        # The outline grows and shrinks by 4 % along z, so it is not the same on all slices.
        anatomy, torso_mm = self.anatomy, self.anatomy.torso_mm * (1 + 0.04 * np.cos(z_mm / 60))
        # A canvas has two channels: intensity and strength of the texture.
        canvas = np.full((*self.size, 2), AIR, dtype=np.float32)
        # The inside is painted on a canvas of its own. Only what lies in the cavity is copied, so no organ can reach
        # into muscle or fat.
        inner = np.full((*self.size, 2), VISCERAL_FAT, dtype=np.float32)
        self._blobs(inner, anatomy.blobs, z_mm)
        masks = {organ: self._tube(inner, tube, z_mm) for organ, tube in anatomy.tubes.items()}
        cavity = np.zeros(self.size, dtype=np.uint8)
        cavity_mm = torso_mm - anatomy.rim_mm - 7
        self._ellipse(cavity, np.zeros(2), cavity_mm, (1, 0))
        self._blobs(canvas, anatomy.arm, z_mm)
        self._ellipse(canvas, np.zeros(2), torso_mm, FAT)
        self._ellipse(canvas, np.zeros(2), torso_mm - anatomy.rim_mm, MUSCLE)
        np.copyto(canvas, inner, where=cavity[..., None] > 0)
        self._blobs(canvas, anatomy.spine, z_mm)
        self._separate(masks, cavity)
        masks |= self._solid_masks(masks, cavity, z_mm)
        return self._bend_and_scan(canvas, {organ: masks[organ] for organ in masks if organ in self.organs}, z_mm)

    def _solid_masks(self, tubes: dict[str, Array], cavity: Array, z_mm: float) -> dict[str, Array]:
        """Return the masks of the annotated blobs: what is seen of them behind the tubes and behind other blobs."""
        masks = {}
        for organ in set(self.organs) - set(tubes):
            # They are painted as for the picture, with 1 for the organ and 0 for everything else.
            seen = np.zeros((*self.size, 2), dtype=np.float32)
            inner, spine = ([replace(one, look=(one.name == organ, 0)) for one in blobs]
                            for blobs in (self.anatomy.blobs, self.anatomy.spine))  # fmt: skip
            self._blobs(seen, inner, z_mm)
            seen[np.any([cavity == 0, *(mask > 0 for mask in tubes.values())], axis=0)] = 0
            self._blobs(seen, spine, z_mm)
            masks[organ] = seen[..., 0].astype(np.uint8)
        return masks

    def _separate(self, masks: dict[str, Array], cavity: Array) -> None:
        """Give each pixel to one organ; on some slices, touching organs share a rim.

        A later organ was painted over the earlier ones, so their common pixels belong to it. For a rim, the later one
        is eroded by one pixel first, and the earlier organ keeps the pixels along its border.
        """
        shares_rim = self.rng.random() < TOUCHING_SHARE
        kernel = np.ones((3, 3), dtype=np.uint8)
        organs = list(masks)
        for index, organ in enumerate(organs):
            masks[organ] &= cavity
            for later in organs[index + 1 :]:
                masks[organ] &= 1 - (cv2.erode(masks[later], kernel) if shares_rim else masks[later])

    def _bend_and_scan(self, canvas: Array, masks: dict[str, Array], z_mm: float) -> tuple[Array, dict[str, Array]]:
        """Bend the drawn shapes into irregular ones, and add texture, bias, blur and noise.

        Returns:
            As `paint`.
        """
        # Image and masks are bent by the same maps, so the masks fit exactly. Masks take the nearest pixel: they stay
        # 0 or 1. A full turn is 80 * 2π = 503 mm, more than the body's length, so no slice has the bends of another.
        turn = np.array([np.cos(z_mm / 80), np.sin(z_mm / 80)], dtype=np.float32)
        bend = np.stack([np.tensordot(turn, fields, 1) for fields in self.bends])
        maps = self.pixels + bend * np.float32(self.difficulty.bend_mm / self.spacing_mm)
        # Slices are taken at different moments of breathing, so each one is shifted along y by another distance.
        if self.difficulty.breath_mm:
            maps[1] += np.float32(self.difficulty.breath_mm / self.spacing_mm * self.rng.standard_normal())
        canvas = cv2.remap(canvas, maps[0], maps[1], cv2.INTER_LINEAR, borderMode=cv2.BORDER_REPLICATE)
        masks = {organ: cv2.remap(mask, maps[0], maps[1], cv2.INTER_NEAREST) for organ, mask in masks.items()}
        # Texture multiplies the intensity. Slices 3 mm apart have a correlation of cos(3 / 9) = 0.94.
        turn = np.array([np.cos(z_mm / 9), np.sin(z_mm / 9)], dtype=np.float32)
        signal = canvas[..., 0] * (1 + canvas[..., 1] * np.tensordot(turn, self.texture, 1)) * self.bias
        # Towards both ends of the scanner's field of view the signal falls to a half.
        signal *= np.float32(1 - 0.5 * (2 * abs(z_mm) / BODY_LENGTH_MM) ** 4)
        signal = self._artefacts(signal, z_mm)
        # The scanner's blur has a standard deviation of 1.05 mm. Breathing blurs further along y.
        sigma = 0.7 * 1.5 / self.spacing_mm
        signal = cv2.GaussianBlur(signal, (0, 0), sigma, None, sigma + self.difficulty.breath_mm / 3 / self.spacing_mm)
        # A scanner measures a complex signal with Gaussian noise in both parts, and shows its magnitude. So the noise
        # is Rician: air is not 0 but about 1.25 sigma (Gudbjartsson and Patz 1995, "The Rician distribution of noisy
        # MRI data").
        noise = np.float32(self.anatomy.noise) * self.rng.standard_normal((2, *self.size), dtype=np.float32)
        magnitude = np.hypot(signal + noise[0], noise[1]) * np.float32(self.anatomy.fat_intensity)
        return np.clip(np.rint(magnitude), 0, 65535).astype(np.uint16), masks

    def _artefacts(self, signal: Array, z_mm: float) -> Array:
        """Brighten the hot spot, and add ghosts: faint copies of the slice, shifted along y in both directions."""
        # The gain is 1 + look * exp(-r² / 2), where r is a distance in standard deviations (the spot's radii). On the
        # real slices of our test data, the maximum is 3.2 to 16 times the median of the image's middle (5th and 95th
        # percentile over slices). In the hard phantom it is 4.2 to 13 times.
        spot = self.anatomy.hot_spot
        if spot:
            centre = (self.middle + spot.centre_mm[1:] / self.spacing_mm)[:, None, None]
            offsets = (self.pixels[::-1] - centre) * self.spacing_mm / spot.radii_mm[1:, None, None]
            squares = (offsets**2).sum(axis=0) + ((z_mm - spot.centre_mm[0]) / spot.radii_mm[0]) ** 2
            signal = signal * (1 + spot.look[0] * np.exp(-squares / 2)).astype(np.float32)
        if self.anatomy.ghost:
            shift = round(self.anatomy.ghost_mm / self.spacing_mm)
            # The phase of breathing is random on each slice, so a ghost brightens or darkens what it lies on.
            share = np.float32(self.anatomy.ghost * np.cos(self.rng.uniform(0, np.pi)))
            signal = signal + share * (np.roll(signal, shift, axis=0) + np.roll(signal, -shift, axis=0))
        return signal
