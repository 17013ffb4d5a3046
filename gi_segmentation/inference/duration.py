"""How long a prediction will take, from the batches that it begins with."""

import os
import time
from collections.abc import Sequence
from datetime import timedelta

import torch
from tqdm.auto import tqdm

from gi_segmentation.inference.batches import Batch, PredictionSettings, predict_slices
from gi_segmentation.inference.members import Member

# Seconds of batches that make an estimate. The first batch takes longer, so it is not among them.
MEASURED_S = 3.0
# A shorter rest needs no estimate.
SHORT_S = 60.0
# The hidden test set of the competition has about 50 scans. Most scans have 144 slices of this height and width.
HIDDEN_SCANS, SCAN_SLICES, SLICE_SIZE = 50, 144, (266, 266)


class Estimate:
    """Prints once how long a prediction will take, after its first batches.

    Args:
        slices: Number of slices that this process predicts.
    """

    def __init__(self, slices: int) -> None:
        self.slices, self.done, self.first = slices, 0, 0
        self.started_s = 0.0
        # Of several processes, the first one has the most scans.
        self.said = int(os.environ.get("RANK", "0")) > 0

    def add(self, slices: int) -> None:
        """Count the slices of a batch that has been predicted."""
        self.done += slices
        if not self.first:
            self.first, self.started_s = slices, time.monotonic()
            return
        seconds = time.monotonic() - self.started_s
        if self.said or seconds < MEASURED_S:
            return
        self.said = True
        rate = (self.done - self.first) / seconds
        if (left_s := (self.slices - self.done) / rate) >= SHORT_S:
            # Beside a progress bar.
            tqdm.write(describe_duration(left_s, self.slices, rate))


def describe_duration(seconds: float, slices: int, rate: float, processes: int = 1) -> str:
    """Return a line for the user.

    Args:
        seconds: The time.
        slices: Number of slices of a process.
        rate: Slices per second of a process.
        processes: Number of processes that share the slices.

    Example:
        >>> describe_duration(3600, 7200, 2.0)
        'about 1:00:00 for 7,200 slices (2 slices a second)'
    """
    shared = f", {processes} processes" if processes > 1 else ""
    return f"about {timedelta(seconds=round(seconds))} for {slices:,} slices ({rate:.3g} slices a second{shared})"


def estimate_hidden_test(members: Sequence[Member], settings: PredictionSettings, processes: int) -> str:
    """Measure a batch of made-up slices, and return a line about the hidden test set of the competition.

    Args:
        members: The checkpoints.
        settings: How slices are predicted.
        processes: Number of processes that will share the scans.
    """
    # On a GPU, the first batch takes longer.
    for _ in range(1 + (members[0].model.device.type == "cuda")):
        started_s = time.monotonic()
        predict_noise(members, settings)
        rate = settings.batch_size / (time.monotonic() - started_s)
    # The scans are shared, and not the slices.
    scans = -(-HIDDEN_SCANS // processes)
    line = describe_duration(scans * SCAN_SLICES / rate, HIDDEN_SCANS * SCAN_SLICES, rate, processes)
    return f"a hidden test set of {HIDDEN_SCANS} scans: {line}, without the reading of the files"


@torch.no_grad()
def predict_noise(members: Sequence[Member], settings: PredictionSettings) -> None:
    """Predict a batch of slices without a file, with all that the settings say."""
    sizes = torch.tensor([SLICE_SIZE] * settings.batch_size)
    examples, logits = [], []
    for member in members:
        side, channels = member.processor.size["height"], 3 if member.slice_context else 1
        images = torch.randint(2**15, (settings.batch_size, side, side, channels)).to(torch.uint16)
        examples.append({"images": images, "native_size": sizes})
        logits.append(member.logits(images, settings.flips).mean(dim=0))
    batch = Batch([None] * settings.batch_size, examples)
    predict_slices(batch, logits, members[0].label_mode, settings.postprocessing is not None)
