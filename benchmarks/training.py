"""What the benchmarks that train have in common: data, processes, a trainer, and cells of a table."""

import argparse
import json
import statistics
import subprocess
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

from datasets import DatasetDict
from transformers import set_seed

from gi_segmentation.arguments import DataArguments, ModelArguments, RunArguments
from gi_segmentation.data.slices import transform_splits
from gi_segmentation.labels import find_labels
from gi_segmentation.models.loading import load_model
from gi_segmentation.training.trainer import SegmentationTrainer, build_trainer

# The best of this many checkpoints is scored.
NUM_EVALUATIONS = 4


def evaluation_flags(steps: int) -> dict[str, Any]:
    """Return the flags of a quiet training of some steps, which is scored and saved `NUM_EVALUATIONS` times."""
    # Division that rounds up: -(-a // b). Rounded down, there could be one evaluation more.
    evaluate_every = -(-steps // NUM_EVALUATIONS)
    return {
        "max_steps": steps,
        "eval_strategy": "steps",
        "eval_steps": evaluate_every,
        "save_strategy": "steps",
        "save_steps": evaluate_every,
        "report_to": "none",
        "disable_tqdm": True,
    }


def write_phantom_dataset(
    folder: Path,
    num_cases: int,
    days_per_case: int,
    slices_per_scan: int,
    num_folds: int,
    difficulty: str = "hard",
) -> Path:
    """Write a dataset of synthetic patients, and return its folder. One of `num_folds` folds is for validation."""
    from dataset_builder.build import build
    from dataset_builder.gi_tract import GiTractConfig
    from dataset_builder.phantom import write_phantom

    # The choices in docs/benchmark_notes.md were made on patients of other seeds. On the same patients, the chosen
    # recipe would look better than it is.
    sizes = num_cases, days_per_case, slices_per_scan
    write_phantom(folder / "kaggle", *sizes, seed=1, difficulty=difficulty)
    build(folder / "kaggle", folder / "gi_tract", GiTractConfig(num_folds=num_folds))
    return folder / "gi_tract"


def make_trainer(
    slices: DatasetDict,
    samples: DatasetDict,
    model_args: ModelArguments,
    data_args: DataArguments,
    run_args: RunArguments,
) -> SegmentationTrainer:
    """Make a trainer by the stages of `run_segmentation.py`.

    Args:
        slices: All slices of `train` and `validation`. Neighbouring slices are looked up here.
        samples: The slices of both splits that are trained on and scored.
        model_args: Which model. This and the next two come from `parse_arguments`.
        data_args: How slices are read.
        run_args: How to train.
    """
    set_seed(run_args.seed)
    labels = find_labels(slices["train"].features)
    model, processor, _ = load_model(model_args, labels, data_args.image_size, data_args.slice_context)
    splits = transform_splits(slices, samples, processor, model_args, data_args, run_args.seed)
    return build_trainer(model, processor, *splits, data_args, run_args)


def run_apart(module: str, name: str, job: dict[str, Any]) -> Any:
    """Do one job of a benchmark in a process of its own, with a temporary `output_dir`.

    Args:
        module: Name of the benchmark's module, for example `benchmarks.leakage`. It calls `add_job_flag` and `do_job`.
        name: Name of the job in the error message.
        job: Arguments of the benchmark's function. They must have a form in JSON. `output_dir` is added to `flags`.

    Returns:
        What the function returned, as JSON has it.

    Raises:
        RuntimeError: If the job fails.
    """
    # So each training starts from the same state: random numbers, memory and threads. Job and result are files,
    # because a training also prints other lines.
    with tempfile.TemporaryDirectory() as scratch:
        job = {**job, "flags": {**job["flags"], "output_dir": Path(scratch) / "run"}}
        job_file, result_file = Path(scratch) / "job.json", Path(scratch) / "result.json"
        job_file.write_text(json.dumps(job, default=str), encoding="utf-8")
        command = [sys.executable, "-m", module, "--job", str(job_file), str(result_file)]
        ended = subprocess.run(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, check=False)
        if ended.returncode:
            raise RuntimeError(f"{name}: ended with {ended.returncode}\n{ended.stdout[-3000:]}")
        return json.loads(result_file.read_text(encoding="utf-8"))


def add_job_flag(parser: argparse.ArgumentParser) -> None:
    """Add the hidden flag `--job`, with which `run_apart` starts a benchmark for one job."""
    parser.add_argument("--job", nargs=2, type=Path, help=argparse.SUPPRESS)


def do_job(files: list[Path], function: Callable[..., Any]) -> None:
    """Call a function with the job of the first file, and write its result to the second file."""
    job_file, result_file = files
    result = function(**json.loads(job_file.read_text(encoding="utf-8")))
    result_file.write_text(json.dumps(result), encoding="utf-8")


def flag_words(flags: dict[str, Any]) -> list[str]:
    """Turn flags into the words of a command line.

    Example:
        >>> flag_words({"max_steps": 4, "augmentation": False})
        ['--max_steps', '4', '--augmentation', 'False']
    """
    return [word for name, value in flags.items() for word in (f"--{name}", str(value))]


def mean_and_spread(values: list[float], sign: str = "") -> str:
    """Format the mean and the standard deviation over seeds for a table.

    Args:
        values: The value of each seed.
        sign: "+" shows the sign of positive values too, for differences.

    Example:
        >>> mean_and_spread([0.5, 0.7])
        '0.600 ± 0.141'
    """
    # The sample's standard deviation, with n - 1. The `z` below writes -0.000 as 0.000.
    spread = statistics.stdev(values) if len(values) > 1 else 0.0
    return f"{statistics.mean(values):{sign}z.3f} ± {spread:.3f}"
