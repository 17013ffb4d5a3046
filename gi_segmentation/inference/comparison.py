"""Compare checkpoints on one split: each alone, each with test-time flips, and all of them as an ensemble."""

import math
import time
from typing import Any

import torch
from datasets import Dataset

from gi_segmentation.data.transforms import unpack_labels
from gi_segmentation.inference.batches import Example, PredictionSettings, compute_logits
from gi_segmentation.inference.members import Member
from gi_segmentation.inference.splits import read_split
from gi_segmentation.labels import find_labels
from gi_segmentation.models.masks import count_labels, pack_masks, predict_batch
from gi_segmentation.rules import CompetitionRules
from gi_segmentation.schema import SCAN_SLICES
from gi_segmentation.scoring.intervals import find_intervals
from gi_segmentation.scoring.scans import ScanScore, count_known_scans, score_scans
from gi_segmentation.scoring.streaming import StreamingScorer
from gi_segmentation.scoring.tables import format_by_preset, format_interval


def ways_to_predict(members: list[Member], logits: list[torch.Tensor]) -> dict[str, list[torch.Tensor]]:
    """List the ways to predict, each with the logits that it combines.

    Args:
        members: The checkpoints.
        logits: Logits of each checkpoint with flips, shape `(flips, B, channels, h, w)`.

    Returns:
        By the name of the way, one tensor of shape `(B, channels, h, w)` per checkpoint that it uses.
    """
    # All ways follow from the same forward passes: the first element is without a flip, and the mean is with flips.
    ways = {}
    for member, flipped in zip(members, logits, strict=True):
        ways[member.name] = [flipped[0]]
        ways[f"{member.name}, flips"] = [flipped.mean(dim=0)]
    if len(members) > 1:
        ways["all together"] = [flipped[0] for flipped in logits]
        ways["all together, flips"] = [flipped.mean(dim=0) for flipped in logits]
    return ways


def compare_members(
    members: list[Member], dataset: Dataset, batch_size: int, num_workers: int, rules: CompetitionRules
) -> tuple[dict[str, list[ScanScore]], float]:
    """Score every way to predict in one pass over the slices.

    Args:
        members: The checkpoints, on their device.
        dataset: The slices.
        batch_size: Number of slices in a forward pass.
        num_workers: Number of processes that read slices.
        rules: How to read the competition's metric.

    Returns:
        The scores of the scans, by way; and the seconds that the first checkpoint alone needs for `SCAN_SLICES`
        slices, without the time to read them.
    """
    scorers: dict[str, StreamingScorer] = {}
    seconds, number, label_mode = 0.0, 0, members[0].label_mode
    organs = len(find_labels(dataset.features))
    settings = PredictionSettings(batch_size, num_workers, flips=True)
    for batch, logits in compute_logits(members, read_split(members, dataset), settings, "Comparing"):
        # Sizes and ids are the same for all checkpoints. The labels have the input size of the first one.
        examples = batch.examples[0]
        labels = unpack_labels(examples["organs"], label_mode, organs)
        for way, chosen in ways_to_predict(members, [one.cpu() for one in logits]).items():
            packed = pack_masks(predict_batch(chosen, label_mode, examples["native_size"])).numpy()
            label_counts = count_labels(chosen, label_mode, labels, examples.get("known")).numpy()
            if way not in scorers:
                scorers[way] = StreamingScorer(dataset, rules)
                scorers[way].restart(presets=True)
            for one in zip(examples["slice_id"].tolist(), packed, label_counts, strict=True):
                scorers[way].add(*one)
        # The time of a usual scan is enough, so only the first slices are predicted a second time for it.
        if number < SCAN_SLICES:
            seconds += time_first(members[0], examples)
            number += len(labels)
    return {way: scorer.take() for way, scorer in scorers.items()}, seconds / max(number, 1) * SCAN_SLICES


@torch.no_grad()
def time_first(member: Member, examples: Example) -> float:
    """Measure the seconds from intensities to masks on the native grid."""
    start = time.perf_counter()
    logits = member.logits(examples["images"])[0]
    # A GPU works on while Python goes on. `cpu()` waits until a mask is there, so the time is that of the whole work.
    for mask in predict_batch([logits], member.label_mode, examples["native_size"]):
        mask.cpu()
    return time.perf_counter() - start


def describe_ways(scans_by_way: dict[str, list[ScanScore]], rules: CompetitionRules) -> dict[str, Any]:
    """Compute the scores of each way, and its gain in Dice over the best single checkpoint without flips.

    Args:
        scans_by_way: From `compare_members`.
        rules: How to read the competition's metric.

    Returns:
        `organs`: the number of scans in which each organ is known, of `num_scans`; `scores` and their confidence
        `intervals` by way; and `gains` by way: the way that it is compared with, the gain, and the confidence interval
        of the gain.
    """
    scores = {way: score_scans(scans, rules) for way, scans in scans_by_way.items()}
    single = [way for way in scans_by_way if ", flips" not in way and way != "all together"]
    best = max(single, key=lambda way: scores[way]["dice"])
    # The intervals of two scores may overlap although one way is better for every patient. So each gain has an
    # interval of its own, over the same patients on both sides.
    gains = {
        way: (
            best,
            scores[way]["dice"] - scores[best]["dice"],
            find_intervals(scans, rules, baseline=scans_by_way[best])["dice"],
        )
        for way, scans in scans_by_way.items()
    }
    intervals = {way: find_intervals(scans, rules) for way, scans in scans_by_way.items()}
    scans = scans_by_way[best]
    return {
        "organs": count_known_scans(scans),
        "num_scans": len(scans),
        "scores": scores,
        "intervals": intervals,
        "gains": gains,
    }


def format_comparison(described: dict[str, Any]) -> str:
    """Format the result of `describe_ways` as a Markdown table, with confidence intervals in brackets."""
    # Names of scores, and their headings.
    number = described["num_scans"]
    columns = {"dice": "Dice"}
    for organ, known in described["organs"].items():
        fewer = f" (known in {known} of {number} scans)" if known < number else ""
        columns[f"dice_{organ}"] = organ.replace("_", " ") + fewer
    columns |= {"dice_volume": "whole scans", "competition_score": "competition score"}
    lines = ["| | " + " | ".join(columns.values()) + " | gain in Dice |", "|---" * (len(columns) + 2) + "|"]
    for way, (_, gain, around) in described["gains"].items():
        scores, intervals = described["scores"][way], described["intervals"][way]
        # No slice shows an organ without a score, or nobody has drawn it.
        values = ["none" if math.isnan(scores[name]) else f"{scores[name]:.4f}" for name in columns]
        ends = [format_interval(intervals[name], ".3f") for name in columns]
        cells = [value + interval for value, interval in zip(values, ends, strict=True)]
        lines.append(f"| {way} | {' | '.join(cells)} | {gain:+.4f}{format_interval(around, '+.4f')} |")
    rows = {way: (described["scores"][way], described["intervals"][way]) for way in described["scores"]}
    return "\n".join([*lines, "", format_by_preset(rows)])
