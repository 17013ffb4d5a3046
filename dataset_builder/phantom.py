"""A synthetic folder in the layout of the Kaggle data, for tests and the demo."""

import os
import shutil
from collections.abc import Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from contextlib import contextmanager
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
from gi_segmentation.data.kaggle import FAULTY_SCANS
from gi_segmentation.rle import encode
from gi_segmentation.schema import ORGANS, scan_name, slice_name

Array: TypeAlias = np.ndarray

# Width and height in pixels, spacing in mm, slices: the four kinds of real scans.
SCAN_KINDS = ((266, 266, 1.50, 144), (360, 310, 1.50, 144), (276, 276, 1.63, 80), (234, 234, 1.50, 144))
NUM_REAL_CASES = 156
NUM_DAYS = 40

BODY_LENGTH_MM = 432.0
PATH_STEP_MM = 2.0
MIN_ORGAN_MM2 = 450.0
DAY_SHARE = 0.15  # how much a day differs, of how much a patient differs
TOUCHING_SHARE = 0.3  # of the slices: where two organs touch, their outlines share a rim
SUBPIXEL_BITS = 4

# Intensities relative to subcutaneous fat, each with the strength of its texture.
FAT, VISCERAL_FAT, MUSCLE, AIR = (1.0, 0.05), (0.50, 0.10), (0.24, 0.25), (0.02, 0.0)
ORGAN_LEVEL = 0.37  # of all three in the hard phantom


class Rngs(NamedTuple):
    """Where a scan's values come from: the patient's and the day's numbers, and how far they reach."""

    patient: np.random.Generator
    day: np.random.Generator
    spread: float


@dataclass(frozen=True)
class PhantomSummary:
    """What was written: counts of cases, scans and slices, and of pixels in two organs at once."""

    cases: int
    scans: int
    slices: int
    empty_slices: int
    multi_organ_slices: int
    overlapping_slices: int
    overlap_pixels: int


@dataclass(frozen=True)
class _Scan:
    case: int
    day: int
    num_slices: int
    width: int
    height: int
    spacing_mm: float

    @property
    def name(self) -> str:
        return scan_name(self.case, self.day)


@dataclass(frozen=True)
class _Blob:
    """An ellipsoid; centre and radii in mm as (z, y, x), zero at the middle of the body."""

    centre_mm: Array
    radii_mm: Array
    look: tuple[float, float]


@dataclass(frozen=True)
class _Tube:
    """Balls along a path: a wall around contents whose intensity swings along the path, as folds do."""

    centres_mm: Array
    radii_mm: Array
    wall_mm: float
    wall_look: tuple[float, float]
    contents: Array
    contents_texture: float


@dataclass(frozen=True)
class _Anatomy:
    torso_mm: Array
    rim_mm: Array
    blobs: list[_Blob]
    spine: list[_Blob]
    tubes: dict[str, _Tube]
    offset_mm: Array
    fat_intensity: float
    noise: float
    arm: Sequence[_Blob] = ()
    hot_spot: _Blob | None = None  # its look: the gain at the centre, less 1
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
) -> PhantomSummary:
    """Write synthetic scans and their masks as the Kaggle folder has them: `train.csv` and `train/`.

    The same arguments give the same bytes, whatever `num_proc`. The folder appears under its name only when complete.

    Args:
        output_dir: Folder to create; may exist if empty.
        num_cases: Patients.
        days_per_case: Scans of each patient.
        slices_per_scan: Slices that the body is divided into; None for 144 or 80 as in the real scans.
        seed: Not negative; another one gives other patients.
        num_proc: Processes; None for one per core. More than one needs an importable main module, as
            `multiprocessing` with spawn does.
        difficulty: "easy", where brightness tells the organs apart, or "hard", as on real scans: organs alike and of
            low contrast, unlike patients, bias, noise, breathing, and on some scans a hot spot that is the maximum.

    Returns:
        Counts of what was written.

    Raises:
        FileExistsError: If `output_dir` is a file or a folder that is not empty.
        ValueError: If a size is below 1, the seed below 0 or the difficulty unknown.
    """
    names = ("num_cases", "days_per_case", "slices_per_scan", "num_proc")
    for name, size in zip(names, (num_cases, days_per_case, slices_per_scan, num_proc), strict=True):
        if size is not None and size < 1:
            raise ValueError(f"{name} must be at least 1, got {size}")
    if seed < 0:
        raise ValueError(f"seed must not be negative, got {seed}")
    if difficulty not in DIFFICULTIES:
        raise ValueError(f"difficulty must be one of {', '.join(DIFFICULTIES)}, got {difficulty!r}")
    scans = _plan_scans(num_cases, days_per_case, slices_per_scan, seed)
    with _folder_in_the_making(Path(output_dir)) as folder:
        results = _write_scans(scans, folder / "train", seed, num_proc or os.cpu_count() or 1, difficulty)
        rows = [row for scan_rows, _ in results for row in scan_rows]
        (folder / "train.csv").write_text("\n".join(["id,class,segmentation", *rows]) + "\n", newline="\n")
    counts = np.sum([scan_counts for _, scan_counts in results], axis=0).tolist()
    return PhantomSummary(num_cases, len(scans), sum(scan.num_slices for scan in scans), *counts)


@contextmanager
def _folder_in_the_making(output_dir: Path) -> Iterator[Path]:
    """Give a temporary folder beside `output_dir` that takes its name at the end, or goes if anything fails."""
    output_dir = output_dir.resolve()
    if output_dir.exists() and not (output_dir.is_dir() and not any(output_dir.iterdir())):
        raise FileExistsError(
            f"{output_dir} exists and is not an empty folder: remove it or choose another output_dir"
        )
    output_dir.parent.mkdir(parents=True, exist_ok=True)
    folder = output_dir.with_name(f".{output_dir.name}.partial-{os.getpid()}")
    folder.mkdir()
    try:
        yield folder
        folder.replace(output_dir)
    except BaseException:
        shutil.rmtree(folder, ignore_errors=True)
        raise


def _plan_scans(num_cases: int, days_per_case: int, slices_per_scan: int | None, seed: int) -> list[_Scan]:
    """Draw cases and days; the sizes go round among the cases. Sorted by case and day."""
    rng = np.random.default_rng(np.random.SeedSequence(seed))
    cases = rng.permutation(np.arange(1, max(NUM_REAL_CASES, num_cases) + 1))[:num_cases].tolist()
    scans = []
    for index, case in enumerate(cases):
        width, height, spacing_mm, num_slices = SCAN_KINDS[index % len(SCAN_KINDS)]
        # A name on the faulty list would be left out of the dataset.
        days = [day for day in range(max(NUM_DAYS, 2 * days_per_case)) if scan_name(case, day) not in FAULTY_SCANS]
        for day in sorted(rng.choice(days, size=days_per_case, replace=False).tolist()):
            scans.append(_Scan(case, day, slices_per_scan or num_slices, width, height, spacing_mm))
    return sorted(scans, key=lambda scan: (scan.case, scan.day))


def _write_scans(
    scans: list[_Scan], train_dir: Path, seed: int, num_proc: int, difficulty: str
) -> list[tuple[list[str], list[int]]]:
    write = partial(_write_scan, train_dir=train_dir, seed=seed, difficulty=DIFFICULTIES[difficulty])
    progress = partial(tqdm, total=len(scans), desc="Writing the phantom", unit="scan")
    if min(num_proc, len(scans)) == 1:
        return list(progress(map(write, scans)))
    # Spawned, for a fork of a process that has used OpenCV's or torch's threads can hang.
    with ProcessPoolExecutor(
        min(num_proc, len(scans)), get_context("spawn"), initializer=cv2.setNumThreads, initargs=(1,)
    ) as pool:
        return list(progress(pool.map(write, scans)))


def _write_scan(scan: _Scan, train_dir: Path, seed: int, difficulty: Difficulty) -> tuple[list[str], list[int]]:
    """Write the slices of a scan.

    Returns:
        Lines of `train.csv`, and the counts of `PhantomSummary` from `empty_slices` on.
    """
    patient = np.random.default_rng(np.random.SeedSequence(seed, spawn_key=(scan.case,)))
    day = np.random.default_rng(np.random.SeedSequence(seed, spawn_key=(scan.case, scan.day)))
    folder = train_dir / f"case{scan.case}" / scan.name / "scans"
    folder.mkdir(parents=True)
    rngs = Rngs(patient, day, difficulty.spread)
    painter = _Painter(scan, _draw_anatomy(rngs, difficulty), rngs, difficulty)
    rows, counts = [], np.zeros(4, dtype=int)
    for number in range(1, scan.num_slices + 1):
        # The middle slice lies at 0 mm, where every organ is, however few the slices are.
        z_mm = BODY_LENGTH_MM * (number - 1 - scan.num_slices // 2) / scan.num_slices
        image, masks = painter.paint(z_mm)
        size = f"{scan.width}_{scan.height}_{scan.spacing_mm:.2f}_{scan.spacing_mm:.2f}"
        path = folder / f"slice_{number:04d}_{size}.png"
        if not cv2.imwrite(str(path), image, [cv2.IMWRITE_PNG_COMPRESSION, 1]):
            raise OSError(f"could not write {path}")
        rows += [f"{slice_name(scan.name, number)},{organ},{encode(masks[organ])}" for organ in ORGANS]
        shared = int((np.stack(list(masks.values())).sum(axis=0) > 1).sum())
        present = sum(mask.any() for mask in masks.values())
        counts += [present == 0, present > 1, shared > 0, shared]
    return rows, counts.tolist()


def _vary(rngs: Rngs, values: float | list[float] | Array, spread: float | list[float] | Array) -> Array:
    """Values of this patient on this day: uniform within about `spread` of the usual ones, as far as `rngs` reach."""
    patient, day, reach = rngs
    usual = np.asarray(values, dtype=float)
    shape = usual.shape
    return usual + reach * np.asarray(spread) * (patient.uniform(-1, 1, shape) + DAY_SHARE * day.uniform(-1, 1, shape))


def _draw_anatomy(rngs: Rngs, difficulty: Difficulty) -> _Anatomy:
    torso_mm = _vary(rngs, [112, 148], [9, 11])
    rim_mm = _vary(rngs, [15, 14], 4)
    cavity_mm = torso_mm - rim_mm - 7
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
        fat_intensity=float(_vary(rngs, 2800, 900)),
        noise=difficulty.noise * float(_vary(rngs, 0.022, 0.008)),
    )
    # The easy phantom ends here: a further number drawn would change its bytes.
    return anatomy if difficulty == DIFFICULTIES["easy"] else _make_hard(rngs, anatomy, difficulty)


def _make_hard(rngs: Rngs, anatomy: _Anatomy, difficulty: Difficulty) -> _Anatomy:
    """Make the organs alike, and draw what spoils the scan."""
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
    """Give a tube contents of about the common level, faint folds and a faint wall."""
    own = float(_vary(rngs, level, 0.04))
    contents = own + 0.35 * (tube.contents - tube.contents.mean())
    return replace(tube, wall_look=(0.6 * own, 0.1), contents=contents, contents_texture=0.2)


def _arm(day: np.random.Generator, torso_mm: Array) -> tuple[list[_Blob], _Blob]:
    """Draw an arm beside a flank, and the hot spot of a coil between the two."""
    side, angle = day.choice([-1, 1]), day.uniform(-0.3, 0.7)  # radians, positive towards the back
    rim_mm = np.array([0, torso_mm[0] * np.sin(angle), side * torso_mm[1] * np.cos(angle)])
    centre_mm, radii_mm = rim_mm + np.array([0, 0, 36 * side]), np.array([1200, *day.uniform(26, 34, 2)])
    arm = [_Blob(centre_mm, radii_mm, FAT), _Blob(centre_mm, radii_mm - 8, MUSCLE)]
    hot_mm = rim_mm + np.array([day.uniform(-50, 50), 0, 8 * side])
    return arm, _Blob(hot_mm, np.array([day.uniform(60, 140), 22, 15]), (day.uniform(1.5, 6), 0))


def _blob(
    rngs: Rngs, place: Array, centre: list[float], radii_mm: list[float], level: float, texture: float = 0.08
) -> _Blob:
    """Vary an ellipsoid; `centre` is z in mm, y and x as shares of the cavity's half axes."""
    centre_mm = _vary(rngs, np.array(centre) * place, 4)
    return _Blob(
        centre_mm, _vary(rngs, radii_mm, 0.1 * np.array(radii_mm)), (float(_vary(rngs, level, 0.03)), texture)
    )


def _inner_blobs(rngs: Rngs, place: Array) -> list[_Blob]:
    """What lies in the cavity, in painting order; the patient's left is at the right of the image."""
    blob = partial(_blob, rngs, place)
    blobs = [blob([-240, 0.0, side], [125, 72, 56], 0.05, 0.05) for side in (-0.5, 0.5)]  # lungs
    blobs += [blob([-165, -0.35, 0.15], [62, 42, 48], 0.52)]  # heart
    blobs += [blob([-60, -0.05, -0.52], [78, 62, 58], 0.36), blob([-68, -0.35, -0.15], [36, 38, 62], 0.36)]  # liver
    blobs += [blob([-55, 0.3, 0.72], [44, 30, 20], 0.33)]  # spleen
    for side in (-0.46, 0.46):
        kidney = blob([12, 0.52, side], [52, 26, 23], 0.42)
        blobs += [kidney, _Blob(kidney.centre_mm, 0.42 * kidney.radii_mm, (0.6, 0.1))]
        blobs += [blob([120, 0.55, side * 0.55], [110, 20, 18], 0.28, 0.05)]  # psoas
        blobs += [blob([185, 0.3, side * 1.7], [70, 55, 22], 0.5, 0.15)]  # ilium
        blobs += [blob([215, 0.0, side * 1.1], [60, 30, 34], 0.32, 0.05)]  # pelvic muscle
    blobs += [blob([195, -0.15, 0.0], [45, 36, 44], 0.45, 0.03)]  # bladder
    return blobs


def _spine_blobs(rngs: Rngs, place: Array) -> list[_Blob]:
    """What runs along the back, through all slices."""
    blob = partial(_blob, rngs, place)
    blobs = [blob([0, 0.88, side], [1200, 19, 31], 0.24, 0.35) for side in (-0.3, 0.3)]  # muscles of the back
    blobs += [blob([0, 0.68, 0.0], [1200, 18, 23], 0.46, 0.12), blob([0, 0.98, 0.0], [1200, 7, 10], 1.8)]  # spine
    vessels = [blob([0, 0.38, side], [1200, 9, 9], 0.3, 0.05) for side in (-0.12, 0.1)]
    return [*vessels, *blobs]


def _spline(points_mm: Array, radii_mm: Array) -> tuple[Array, Array, Array]:
    """Give centres `(points, 3)`, radii and arc length in mm, every `PATH_STEP_MM` along a smooth path."""
    chords = np.linalg.norm(np.diff(points_mm, axis=0), axis=1)
    knots = np.concatenate([[0.0], np.cumsum(chords)])
    path_mm = np.arange(0.0, knots[-1], PATH_STEP_MM)
    return CubicSpline(knots, points_mm)(path_mm), np.interp(path_mm, knots, radii_mm), path_mm


def _folds(path_mm: Array, level: float, swing: float, period_mm: float) -> Array:
    return level + swing * np.sin(2 * np.pi * path_mm / period_mm)


def _small_bowel(rngs: Rngs, place: Array) -> _Tube:
    """Loops, one bundle below the other: bright contents crossed by narrow folds."""
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
    """A frame from the caecum over both flexures to the sigmoid: pouches with dark, mottled contents."""
    ascending = [[82, 0.05, -0.66], [55, 0.1, -0.74], [25, 0.1, -0.76], [0, -0.1, -0.72]]
    transverse = [[-8, -0.45, -0.5], [2, -0.64, -0.2], [4, -0.68, 0.12], [-10, -0.58, 0.42], [-34, -0.25, 0.74]]
    descending = [[-30, 0.12, 0.84], [0, 0.2, 0.84], [40, 0.18, 0.82], [72, 0.12, 0.74], [86, 0.05, 0.48]]
    points = np.array(ascending + transverse + descending) * place
    usual_mm = np.array([20, 21, 20, 18, 16, 15, 15, 15, 14, 13, 12, 12, 12, 12])
    centres_mm, radii_mm, path_mm = _spline(_vary(rngs, points, 5.0), _vary(rngs, usual_mm, 2.0))
    pouches = 1 + 0.13 * np.sin(2 * np.pi * path_mm / 28.0)
    contents = _folds(path_mm, float(_vary(rngs, 0.15, 0.03)), 0.05, 28.0)
    return _Tube(centres_mm, radii_mm * pouches, 3.2, (float(_vary(rngs, 0.36, 0.03)), 0.1), contents, 0.8)


def _stomach(rngs: Rngs, place: Array) -> _Tube:
    """A J from below the left dome of the diaphragm across the middle: evenly bright contents in a thick wall."""
    points = [[-66, 0.05, 0.42], [-46, -0.12, 0.44], [-24, -0.3, 0.32], [-6, -0.36, 0.1], [2, -0.28, -0.16]]
    points_mm = _vary(rngs, np.array(points) * place, 4.0) + _vary(rngs, [0, 0, 0], [3, 4, 5])
    centres_mm, radii_mm, path_mm = _spline(points_mm, _vary(rngs, [27, 28, 25, 20, 13], 2.5))
    contents = _folds(path_mm, float(_vary(rngs, 1.45, 0.08)), 0.05, 40.0)
    return _Tube(centres_mm, radii_mm, 3.0, (float(_vary(rngs, 0.27, 0.03)), 0.1), contents, 0.14)


class _Painter:
    """Paints the slices of one scan, top to bottom."""

    def __init__(self, scan: _Scan, anatomy: _Anatomy, rngs: Rngs, difficulty: Difficulty) -> None:
        patient, self.rng, _ = rngs
        self.anatomy = anatomy
        self.difficulty = difficulty
        self.spacing_mm = scan.spacing_mm
        self.size = (scan.height, scan.width)
        self.middle = (np.array(self.size) - 1) / 2 + anatomy.offset_mm / scan.spacing_mm
        rows, columns = np.indices(self.size, dtype=np.float32)
        self.pixels = np.stack([columns, rows])
        # Two fields each, mixed at a turning angle from slice to slice: smooth along z and never the same.
        self.bends = [self._fields(patient, 60.0), self._fields(patient, 60.0)]
        self.texture = self._fields(self.rng, 4.5)
        self.bias = np.exp(difficulty.bias * self._fields(self.rng, 140.0)[0])

    def _fields(self, rng: np.random.Generator, grain_mm: float) -> Array:
        """Two smooth random fields of about unit strength, float32, shape `(2, height, width)`."""
        height, width = (int(np.ceil(side * self.spacing_mm / grain_mm)) + 3 for side in self.size)
        coarse = rng.standard_normal((2, height, width), dtype=np.float32)
        return np.stack([cv2.resize(field, self.size[::-1], interpolation=cv2.INTER_CUBIC) for field in coarse])

    def _ellipse(self, canvas: Array, centre_mm: Array, radii_mm: Array, look: tuple[float, float]) -> None:
        centre, radii = self.middle + centre_mm / self.spacing_mm, radii_mm / self.spacing_mm
        y, x, radius_y, radius_x = np.rint(2**SUBPIXEL_BITS * np.concatenate([centre, radii])).astype(int).tolist()
        cv2.ellipse(canvas, (x, y), (radius_x, radius_y), 0, 0, 360, look, -1, cv2.LINE_8, SUBPIXEL_BITS)

    def _blobs(self, canvas: Array, blobs: Sequence[_Blob], z_mm: float) -> None:
        for blob in blobs:
            inside = 1 - ((z_mm - blob.centre_mm[0]) / blob.radii_mm[0]) ** 2
            if inside > 0:
                self._ellipse(canvas, blob.centre_mm[1:], blob.radii_mm[1:] * np.sqrt(inside), blob.look)

    def _tube(self, canvas: Array, tube: _Tube, z_mm: float) -> Array:
        """Paint a tube's cut, first all walls and then all contents, and give its mask; leave out a tiny one."""
        mask = np.zeros(self.size, dtype=np.uint8)
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
            Image, uint16, and the mask of each organ, uint8; shape `(height, width)` each.
        """
        anatomy, torso_mm = self.anatomy, self.anatomy.torso_mm * (1 + 0.04 * np.cos(z_mm / 60))
        canvas = np.full((*self.size, 2), AIR, dtype=np.float32)
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
        return self._bend_and_scan(canvas, masks, z_mm)

    def _separate(self, masks: dict[str, Array], cavity: Array) -> None:
        """Keep organs out of one another but, on some slices, for a rim where they touch."""
        shares_rim = self.rng.random() < TOUCHING_SHARE
        kernel = np.ones((3, 3), dtype=np.uint8)
        organs = list(masks)
        for index, organ in enumerate(organs):
            masks[organ] &= cavity
            for later in organs[index + 1 :]:
                masks[organ] &= 1 - (cv2.erode(masks[later], kernel) if shares_rim else masks[later])

    def _bend_and_scan(self, canvas: Array, masks: dict[str, Array], z_mm: float) -> tuple[Array, dict[str, Array]]:
        """Bend the drawn shapes into irregular ones, and add texture, bias, blur and noise."""
        turn = np.array([np.cos(z_mm / 80), np.sin(z_mm / 80)], dtype=np.float32)
        bend = np.stack([np.tensordot(turn, fields, 1) for fields in self.bends])
        maps = self.pixels + bend * np.float32(self.difficulty.bend_mm / self.spacing_mm)
        if self.difficulty.breath_mm:
            maps[1] += np.float32(self.difficulty.breath_mm / self.spacing_mm * self.rng.standard_normal())
        canvas = cv2.remap(canvas, maps[0], maps[1], cv2.INTER_LINEAR, borderMode=cv2.BORDER_REPLICATE)
        masks = {organ: cv2.remap(mask, maps[0], maps[1], cv2.INTER_NEAREST) for organ, mask in masks.items()}
        turn = np.array([np.cos(z_mm / 9), np.sin(z_mm / 9)], dtype=np.float32)
        signal = canvas[..., 0] * (1 + canvas[..., 1] * np.tensordot(turn, self.texture, 1)) * self.bias
        signal *= np.float32(1 - 0.5 * (2 * abs(z_mm) / BODY_LENGTH_MM) ** 4)
        signal = self._artefacts(signal, z_mm)
        sigma = 0.7 * 1.5 / self.spacing_mm
        signal = cv2.GaussianBlur(signal, (0, 0), sigma, None, sigma + self.difficulty.breath_mm / 3 / self.spacing_mm)
        noise = np.float32(self.anatomy.noise) * self.rng.standard_normal((2, *self.size), dtype=np.float32)
        magnitude = np.hypot(signal + noise[0], noise[1]) * np.float32(self.anatomy.fat_intensity)
        return np.clip(np.rint(magnitude), 0, 65535).astype(np.uint16), masks

    def _artefacts(self, signal: Array, z_mm: float) -> Array:
        """Brighten the hot spot, and add ghosts of the slice above and below it, at a phase of its own."""
        spot = self.anatomy.hot_spot
        if spot:
            centre = (self.middle + spot.centre_mm[1:] / self.spacing_mm)[:, None, None]
            offsets = (self.pixels[::-1] - centre) * self.spacing_mm / spot.radii_mm[1:, None, None]
            squares = (offsets**2).sum(axis=0) + ((z_mm - spot.centre_mm[0]) / spot.radii_mm[0]) ** 2
            signal = signal * (1 + spot.look[0] * np.exp(-squares / 2)).astype(np.float32)
        if self.anatomy.ghost:
            shift = round(self.anatomy.ghost_mm / self.spacing_mm)
            share = np.float32(self.anatomy.ghost * np.cos(self.rng.uniform(0, np.pi)))
            signal = signal + share * (np.roll(signal, shift, axis=0) + np.roll(signal, -shift, axis=0))
        return signal
