"""Compare the speed of our scores with that of MONAI and of distance transforms.

Both sides score the same scans in the same run, and their results must agree. The ratio is the peer's seconds divided
by ours: 10 means that we are ten times as fast. Seconds depend on the machine; the ratio of one run depends on it much
less.
"""

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

from gi_segmentation.labels import GI_TRACT
from gi_segmentation.schema import SLICE_THICKNESS_MM
from gi_segmentation.scoring.clinical import compare_organ
from gi_segmentation.scoring.competition import normalised_hausdorff

SHAPE, SPACING_MM = (144, 266, 266), (SLICE_THICKNESS_MM, 1.5, 1.5)
# Share of the voxels that belong to an organ: about 100,000 voxels, as in a real one.
ORGAN_SHARE = 0.01
# Prediction and target, bool, shape `(organs, D, H, W)`.
Scan = tuple[np.ndarray, np.ndarray]
# The scans that a worker process keeps.
kept: list[Scan] = []


def draw_scan(seed: int) -> Scan:
    """Draw winding shapes of the size of real organs, and a prediction that is wrong at their borders."""
    rng = np.random.default_rng(seed)
    places = np.meshgrid(*(np.linspace(-1, 1, size, dtype=np.float32) for size in SHAPE), indexing="ij", sparse=True)
    # Distance from the middle, squared; 1 at the middle of a side.
    middle = sum(place**2 for place in places)
    volumes = np.zeros((2, len(GI_TRACT.names), *SHAPE), dtype=bool)
    for preds, target in volumes.swapaxes(0, 1):
        # An organ is where a smooth random field is above a level. The coarse field gives the shape. The finer one is
        # added for the prediction, so its border is wrong here and there, by a few voxels.
        coarse, fine = (rng.standard_normal(size, dtype=np.float32) for size in ((9, 12, 12), (24, 34, 34)))
        field, errors = (zoom(noise, np.array(SHAPE) / noise.shape, order=1) for noise in (coarse, fine))
        # The field is lowered towards the outside, so the organs lie in the middle.
        field -= 2 * middle
        # With this quantile as the level, exactly the wanted share of voxels is above it.
        level = np.quantile(field, 1 - ORGAN_SHARE)
        np.greater(field, level, out=target)
        np.greater(field + 0.15 * errors, level, out=preds)
    return volumes[0], volumes[1]


def score_here(scan: Scan) -> list[list[float]]:
    """Return Dice, Hausdorff and HD95 of each organ. `compare_organ` computes all other clinical scores too."""
    scores = [compare_organ(*masks, SPACING_MM) for masks in zip(*scan, strict=True)]
    return [[organ[name] for organ in scores] for name in ("volume_dice", "hausdorff_mm", "hausdorff95_mm")]


def score_with_monai(scan: Scan) -> list[list[float]]:
    """Return the same scores, computed by MONAI."""
    preds, target = (torch.from_numpy(volume[None]) for volume in scan)
    measure = partial(compute_hausdorff_distance, preds, target, include_background=True, spacing=list(SPACING_MM))
    return [scores[0].tolist() for scores in (compute_dice(preds, target), measure(), measure(percentile=95))]


def union_here(scan: Scan) -> float:
    """Return the competition's distance of the union of all organs."""
    return normalised_hausdorff(np.any(scan[0], axis=0), np.any(scan[1], axis=0))


def union_by_transform(scan: Scan) -> float:
    """Return the same distance, computed by two distance transforms of the box around both masks."""
    preds, target = (np.any(volume, axis=0) for volume in scan)
    box = find_objects((preds | target).astype(np.int8))[0]
    sampling = [1 / size for size in SHAPE]
    # The transform of one mask gives each voxel's distance to it. The maximum over the other mask is the distance in
    # one direction, and the larger of both directions is the Hausdorff distance. Coordinates are divided by the shape
    # of the volume, and distances by the diagonal of the unit cube.
    pairs = ((preds[box], target[box]), (target[box], preds[box]))
    return float(max(distance_transform_edt(~b, sampling=sampling)[a].max() for a, b in pairs)) / math.sqrt(3)


def keep(scans: list[Scan]) -> None:
    """Store the scans in a worker process, which uses one thread."""
    torch.set_num_threads(1)
    kept.extend(scans)


def score_kept(score: Callable[[Scan], Any], index: int) -> Any:
    """Score one of the scans that the process keeps."""
    return score(kept[index])


def time_all(score: Callable[[Scan], Any], scans: list[Scan], num_proc: int) -> tuple[float, list[Any]]:
    """Score all scans in worker processes.

    Returns:
        Seconds, and the scores of each scan.
    """
    # A forked process inherits the scans. If they were sent to it, the time for 61 MB a scan would be measured too.
    with ProcessPoolExecutor(num_proc, get_context("fork"), initializer=keep, initargs=(scans,)) as pool:
        # The processes are started before the clock is.
        list(pool.map(abs, range(num_proc)))
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
    # MONAI warns of deprecated names.
    warnings.simplefilter("ignore")
    scans = [draw_scan(seed) for seed in range(arguments.scans)]
    for num_proc in arguments.num_proc:
        # The empty line ends the table before.
        print(f"\n| {len(scans)} scans, {num_proc} process(es) | seconds | peer's | ratio |\n|---|---|---|---|")
        for name, score, peer in (
            ("all clinical scores; MONAI's Dice, Hausdorff and HD95", score_here, score_with_monai),
            ("the competition's Hausdorff; by distance transforms", union_here, union_by_transform),
        ):
            seconds, results = time_all(score, scans, num_proc)
            peer_seconds, expected = time_all(peer, scans, num_proc)
            # A ratio means something only if both sides compute the same. MONAI takes percentiles in single precision,
            # so they agree to three digits.
            np.testing.assert_allclose(results, expected, rtol=1e-3)
            print(f"| {name} | {seconds:.2f} | {peer_seconds:.2f} | {peer_seconds / seconds:.1f} |", flush=True)


if __name__ == "__main__":
    main()
