"""Dice, Hausdorff and HD95 of three organs a scan against MONAI, on the same arrays in one run: seconds and ratios."""

import argparse
import math
import time
import warnings
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from functools import partial
from multiprocessing import get_context
from typing import Any

import numpy as np
import torch
from monai.metrics import compute_dice, compute_hausdorff_distance
from scipy.ndimage import distance_transform_edt, find_objects, zoom

from gi_segmentation.schema import ORGANS, SLICE_THICKNESS_MM
from gi_segmentation.scoring.clinical import measure_organ
from gi_segmentation.scoring.competition import normalised_hausdorff

SHAPE, SPACING_MM = (144, 266, 266), (SLICE_THICKNESS_MM, 1.5, 1.5)
ORGAN_SHARE = 0.01  # of the voxels: about 100,000, as of a real organ
Scan = tuple[np.ndarray, np.ndarray]  # prediction and target, bool, shape (organs, D, H, W)
kept: list[Scan] = []  # of a worker process


def draw_scan(seed: int) -> Scan:
    """Winding blobs of the organs' size in the middle of the body, and a prediction that errs at their borders."""
    rng = np.random.default_rng(seed)
    places = np.meshgrid(*(np.linspace(-1, 1, size, dtype=np.float32) for size in SHAPE), indexing="ij", sparse=True)
    middle = sum(place**2 for place in places)
    volumes = np.zeros((2, len(ORGANS), *SHAPE), dtype=bool)
    for preds, target in volumes.swapaxes(0, 1):
        coarse, fine = (rng.standard_normal(size, dtype=np.float32) for size in ((9, 12, 12), (24, 34, 34)))
        field, errors = (zoom(noise, np.array(SHAPE) / noise.shape, order=1) for noise in (coarse, fine))
        field -= 2 * middle
        level = np.quantile(field, 1 - ORGAN_SHARE)
        np.greater(field, level, out=target)
        np.greater(field + 0.15 * errors, level, out=preds)
    return volumes[0], volumes[1]


def score_here(scan: Scan) -> list[list[float]]:
    """Dice, Hausdorff and HD95 of each organ, of all the scores that come with them."""
    scores = [measure_organ(*masks, SPACING_MM) for masks in zip(*scan, strict=True)]
    return [[organ[name] for organ in scores] for name in ("volume_dice", "hausdorff_mm", "hausdorff95_mm")]


def score_with_monai(scan: Scan) -> list[list[float]]:
    """The same from MONAI."""
    preds, target = (torch.from_numpy(volume[None]) for volume in scan)
    measure = partial(compute_hausdorff_distance, preds, target, include_background=True, spacing=list(SPACING_MM))
    return [scores[0].tolist() for scores in (compute_dice(preds, target), measure(), measure(percentile=95))]


def union_here(scan: Scan) -> float:
    """The competition's distance of all organs together."""
    return normalised_hausdorff(np.any(scan[0], axis=0), np.any(scan[1], axis=0))


def union_by_transform(scan: Scan) -> float:
    """The competition's distance from two distance transforms of the box around both masks."""
    preds, target = (np.any(volume, axis=0) for volume in scan)
    box = find_objects((preds | target).astype(np.int8))[0]
    sampling = [1 / size for size in SHAPE]
    pairs = ((preds[box], target[box]), (target[box], preds[box]))
    return float(max(distance_transform_edt(~b, sampling=sampling)[a].max() for a, b in pairs)) / math.sqrt(3)


def keep(scans: list[Scan]) -> None:
    """Give a worker process its scans, and one thread."""
    torch.set_num_threads(1)
    kept.extend(scans)


def score_kept(score: Callable[[Scan], Any], index: int) -> Any:
    """Score a scan that the process holds."""
    return score(kept[index])


def time_all(score: Callable[[Scan], Any], scans: list[Scan], num_proc: int) -> tuple[float, list[Any]]:
    """Seconds and results, in worker processes that inherit the scans: none is sent."""
    with ProcessPoolExecutor(num_proc, get_context("fork"), initializer=keep, initargs=(scans,)) as pool:
        list(pool.map(abs, range(num_proc)))  # the processes are up before the clock starts
        start = time.perf_counter()
        results = list(pool.map(partial(score_kept, score), range(len(scans))))
        return time.perf_counter() - start, results


def main() -> None:
    """Score with both and print a table for each number of processes."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--scans", type=int, default=6, help="number of scans to draw (default: %(default)s)")
    parser.add_argument(
        "--num_proc",
        type=int,
        nargs="+",
        default=[1],
        help="numbers of processes; each gets a table (default: %(default)s)",
    )
    arguments = parser.parse_args()
    warnings.simplefilter("ignore")  # MONAI's, on deprecated names
    scans = [draw_scan(seed) for seed in range(arguments.scans)]
    for num_proc in arguments.num_proc:
        print(f"| {len(scans)} scans, {num_proc} process(es) | seconds | peer's | ratio |\n|---|---|---|---|")
        for name, score, peer in (
            ("all clinical scores; MONAI's Dice, Hausdorff and HD95", score_here, score_with_monai),
            ("the competition's Hausdorff; by distance transforms", union_here, union_by_transform),
        ):
            seconds, results = time_all(score, scans, num_proc)
            peer_seconds, expected = time_all(peer, scans, num_proc)
            np.testing.assert_allclose(results, expected, rtol=1e-3)  # MONAI ranks percentiles in single precision
            print(f"| {name} | {seconds:.2f} | {peer_seconds:.2f} | {peer_seconds / seconds:.1f} |", flush=True)


if __name__ == "__main__":
    main()
