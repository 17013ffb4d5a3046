"""Limits, and predictions with them, for the tests of post-processing."""

from pathlib import Path

from gi_segmentation.labels import GI_TRACT
from gi_segmentation.postprocessing.limits import OrganLimits, Postprocessing, no_postprocessing
from gi_segmentation.predict import main


def limit(min_volume_ml: float = 0.0, min_confidence: float = 0.0) -> Postprocessing:
    """Return limits for the stomach only."""
    return Postprocessing(
        {
            **no_postprocessing(GI_TRACT.names).organs,
            "stomach": OrganLimits(min_volume_ml=min_volume_ml, min_confidence=min_confidence),
        }
    )


def predict(models: list[Path], folder: Path, output_dir: Path, *flags: str) -> Path:
    words = ["--model", *map(str, models), "--input", str(folder), "--output_dir", str(output_dir)]
    (path,) = main([*words, "--device", "cpu", "--num_workers", "0", *flags])
    return path
