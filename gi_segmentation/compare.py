"""`python -m gi_segmentation.compare`: checkpoints side by side, alone, with test-time flips, and as an ensemble."""

import argparse
import json
import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from datasets import Dataset
from torch.utils.data import DataLoader
from tqdm.auto import tqdm

from gi_segmentation.data import SliceNeighbours, SliceTransform, collate, find_dataset
from gi_segmentation.errors import InputError, exit_on_input_error
from gi_segmentation.evaluation import count_labels, flip_logits, predict_masks
from gi_segmentation.metrics import DiceCounts, count_pixels
from gi_segmentation.predict import Member, add_prediction_flags, check_prediction_flags, load_members
from gi_segmentation.schema import ORGANS, SCAN_SLICES
from gi_segmentation.score import combine_scores, hausdorff_distance

COLUMNS = {
    "dice": "Dice",
    **{f"dice_{organ}": organ.replace("_", " ") for organ in ORGANS},
    "dice_volume": "whole scans",
    "competition_score": "competition score",
}


@dataclass
class Tally:
    """What is known of one way to predict after some slices."""

    counts: DiceCounts = field(default_factory=DiceCounts)
    hausdorff: list[float] = field(default_factory=list)
    scan: list[tuple[np.ndarray, np.ndarray]] = field(default_factory=list)  # union of the organs, slice by slice

    def end_scan(self) -> None:
        """Measure the scan whose slices were added."""
        if self.scan:
            preds, target = (np.stack(masks) for masks in zip(*self.scan, strict=True))
            self.hausdorff.append(hausdorff_distance(preds, target))
        self.scan = []

    def scores(self) -> dict[str, float]:
        """Dice as in training, and the competition's score."""
        scores = self.counts.scores()
        return {**scores, **combine_scores(scores["dice"], self.hausdorff)}


def ways_to_predict(members: list[Member], logits: list[torch.Tensor]) -> dict[str, list[torch.Tensor]]:
    """The logits to combine, by what the way is called.

    Args:
        members: The checkpoints.
        logits: Of each, from `evaluation.flip_logits`.
    """
    ways = {}
    for member, flipped in zip(members, logits, strict=True):
        ways[member.name] = [flipped[0]]
        ways[f"{member.name}, flips"] = [flipped.mean(dim=0)]
    if len(members) > 1:
        ways["all together"] = [flipped[0] for flipped in logits]
        ways["all together, flips"] = [flipped.mean(dim=0) for flipped in logits]
    return ways


def read_batches(
    members: list[Member], dataset: Dataset, batch_size: int, num_workers: int
) -> Iterator[list[dict[str, Any]]]:
    """The same slices for each member, as it wants them; batch by batch."""
    loaders = []
    for member in members:
        mode = "multilabel" if len(member.labels) == len(ORGANS) else "multiclass"
        neighbours = SliceNeighbours(dataset, member.slice_context) if member.slice_context else None
        transform = SliceTransform(member.processor, mode, neighbours, scoring=True)
        workers = max(num_workers // len(members), min(num_workers, 1))
        loaders.append(
            DataLoader(dataset.with_transform(transform), batch_size, num_workers=workers, collate_fn=collate)
        )
    for batches in zip(*loaders, strict=True):
        yield list(batches)


def compare_members(
    members: list[Member], dataset: Dataset, batch_size: int, num_workers: int
) -> tuple[dict[str, dict[str, float]], float]:
    """Score every way to predict in one pass over the slices.

    Args:
        members: The checkpoints, on their device.
        dataset: The slices, scan after scan.
        batch_size: Slices a forward pass.
        num_workers: Processes that read slices.

    Returns:
        Scores by way: those of `metrics.GiTractDice` and of `score.competition_score`; and the seconds that the first
        checkpoint alone needed for `SCAN_SLICES` slices, reading them aside.
    """
    tallies: dict[str, Tally] = {}
    seconds, number, scan = 0.0, 0, None
    progress = tqdm(total=len(dataset), desc="Comparing", unit="slice")
    with progress, torch.no_grad():
        for batches in read_batches(members, dataset, batch_size, num_workers):
            inputs = [b["pixel_values"].to(m.model.device) for m, b in zip(members, batches, strict=True)]
            logits = [flip_logits(member.model, values).cpu() for member, values in zip(members, inputs, strict=True)]
            ways, batch = ways_to_predict(members, logits), batches[0]
            label_counts = {way: count_labels(chosen, batch["labels"]) for way, chosen in ways.items()}
            for index, (height, width) in enumerate(batch["native_size"].tolist()):
                if scan not in (None, int(batch["scan"][index])):
                    for tally in tallies.values():
                        tally.end_scan()
                scan = int(batch["scan"][index])
                target = batch["organ_masks"][index, :, :height, :width]
                for way, chosen in ways.items():
                    tally = tallies.setdefault(way, Tally())
                    preds = predict_masks([one[index : index + 1] for one in chosen], height, width)[0]
                    organ_counts = torch.stack(count_pixels(preds, target), dim=-1)
                    tally.counts.add_slice(scan, organ_counts.tolist(), label_counts[way][index])
                    tally.scan.append((preds.any(dim=0).numpy(), target.any(dim=0).numpy()))
            seconds += time_first(members[0], inputs[0], batch) if number < SCAN_SLICES else 0
            number += len(inputs[0]) if number < SCAN_SLICES else 0
            progress.update(len(inputs[0]))
    for tally in tallies.values():
        tally.end_scan()
    return {way: tally.scores() for way, tally in tallies.items()}, seconds / max(number, 1) * SCAN_SLICES


def time_first(member: Member, pixel_values: torch.Tensor, batch: dict[str, Any]) -> float:
    """Seconds from model input to masks on the native grid."""
    start = time.perf_counter()
    logits = member.model(pixel_values=pixel_values).logits
    for one, (height, width) in zip(logits, batch["native_size"].tolist(), strict=True):
        predict_masks([one[None]], height, width).cpu()
    return time.perf_counter() - start


def format_comparison(scores: dict[str, dict[str, float]]) -> str:
    """A Markdown table, each way with its gain in Dice over the best single checkpoint without flips."""
    single = [values["dice"] for way, values in scores.items() if ", flips" not in way and way != "all together"]
    lines = ["| | " + " | ".join(COLUMNS.values()) + " | gain in Dice |", "|---" * (len(COLUMNS) + 2) + "|"]
    for way, values in scores.items():
        cells = [f"{values[name]:.4f}" for name in COLUMNS]
        lines.append(f"| {way} | {' | '.join(cells)} | {values['dice'] - max(single):+.4f} |")
    return "\n".join(lines)


def main(argv: list[str] | None = None) -> dict[str, dict[str, float]]:
    """Compare checkpoints on a split and print a table.

    Raises:
        InputError: If a checkpoint or the dataset cannot be used.
    """
    parser = argparse.ArgumentParser(
        "python -m gi_segmentation.compare",
        description=__doc__,
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
    )
    add_prediction_flags(parser)
    parser.add_argument("--dataset_name", default="gi_tract", help="folder of a built dataset, or a Hub id")
    parser.add_argument("--split", default="validation", help="the slices to score; patients never trained on")
    parser.add_argument("--output", type=Path, help="a JSON file for the scores; None: only print them")
    arguments = check_prediction_flags(parser.parse_args(argv))
    slices = find_dataset(arguments.dataset_name, None)
    if arguments.split not in slices:
        raise InputError(f"--split {arguments.split}: expected one of {', '.join(slices)}")
    members = load_members(arguments.model, arguments.revision, arguments.device)
    scores, seconds = compare_members(members, slices[arguments.split], arguments.batch_size, arguments.num_workers)
    print(format_comparison(scores))
    print(f"{members[0].name} alone, without reading files: {seconds:.2f} s for a scan of {SCAN_SLICES} slices")
    if arguments.output is not None:
        arguments.output.write_text(json.dumps({"scores": scores, "seconds_per_scan": seconds}, indent=2) + "\n")
    return scores


if __name__ == "__main__":
    with exit_on_input_error():
        main()
