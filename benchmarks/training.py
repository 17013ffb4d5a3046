"""What the benchmarks that train share: data, a job in a process of its own, a trainer, a cell of a table."""

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
from gi_segmentation.models.loading import load_model
from gi_segmentation.training.trainer import SegmentationTrainer, build_trainer

NUM_EVALUATIONS = 4


def evaluation_flags(steps: int) -> dict[str, Any]:
    """Flags of a training of so many steps that is scored and saved a few times, and quiet."""
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
    """Patients of the phantom, one fold of them to validate on."""
    from dataset_builder.build import build
    from dataset_builder.gi_tract import GiTractConfig
    from dataset_builder.phantom import write_phantom

    # Seed 1: none of the choices in benchmarks/README.md was made on these patients.
    sizes = num_cases, days_per_case, slices_per_scan
    write_phantom(folder / "kaggle", *sizes, seed=1, num_proc=1, difficulty=difficulty)
    build(folder / "kaggle", folder / "gi_tract", GiTractConfig(num_folds=num_folds), num_proc=1)
    return folder / "gi_tract"


def make_trainer(
    slices: DatasetDict,
    samples: DatasetDict,
    model_args: ModelArguments,
    data_args: DataArguments,
    run_args: RunArguments,
) -> SegmentationTrainer:
    """Go through the project's own stages up to the training.

    Args:
        slices: Where neighbours are found, `train` and `validation`.
        samples: What is trained on and scored, of the same splits.
        model_args: From `parse_arguments`, as the others.
        data_args: How slices are read.
        run_args: How to train.
    """
    set_seed(run_args.seed)
    model, processor = load_model(model_args, data_args.image_size, data_args.slice_context)
    splits = transform_splits(slices, samples, processor, model_args, data_args, run_args.seed)
    return build_trainer(model, processor, *splits, data_args, run_args)


def run_apart(module: str, name: str, job: dict[str, Any]) -> Any:
    """Do a job of a benchmark in a process of its own, with a folder `output_dir` that goes with it.

    Args:
        module: The benchmark, as `benchmarks.leakage`; calls `add_job_flag` and `do_job`.
        name: What to call the job if it fails.
        job: What its function is called with, as JSON has it; `output_dir` among the `flags` is added.

    Raises:
        RuntimeError: If it fails.
    """
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
    """Let a benchmark be started for one job."""
    parser.add_argument("--job", nargs=2, type=Path, help=argparse.SUPPRESS)


def do_job(files: list[Path], function: Callable[..., Any]) -> None:
    """Call the function with the job of the first file and write what it gives into the second."""
    job_file, result_file = files
    result = function(**json.loads(job_file.read_text(encoding="utf-8")))
    result_file.write_text(json.dumps(result), encoding="utf-8")


def flag_words(flags: dict[str, Any]) -> list[str]:
    """Command-line words.

    Example:
        >>> flag_words({"max_steps": 4, "augmentation": False})
        ['--max_steps', '4', '--augmentation', 'False']
    """
    return [word for name, value in flags.items() for word in (f"--{name}", str(value))]


def mean_and_spread(values: list[float], sign: str = "") -> str:
    """A cell of the table.

    Args:
        values: Of each seed.
        sign: "+" for a difference.

    Example:
        >>> mean_and_spread([0.5, 0.7])
        '0.600 ± 0.141'
    """
    spread = statistics.stdev(values) if len(values) > 1 else 0.0
    return f"{statistics.mean(values):{sign}z.3f} ± {spread:.3f}"
