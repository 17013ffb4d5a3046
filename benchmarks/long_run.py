"""Train 2,000 steps with an evaluation and a checkpoint every 50, and look whether anything grows without end.

A small SegFormer is trained on a phantom by `run_segmentation.py`, with averaged weights, augmentation, two processes
that load slices, and TensorBoard. Five times a second this program counts the memory, the open files and the processes
of the training and of all processes that it starts, and the bytes in its output folder.
"""

import argparse
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import psutil

from benchmarks.process_memory import proportional_memory
from benchmarks.training import flag_words, write_phantom_dataset

ROOT = Path(__file__).resolve().parents[1]
PARTS = 8
FLAGS = {
    "model_type": "segformer",
    "config_overrides": "depths=[1,1,1,1],hidden_sizes=[8,8,16,16],decoder_hidden_size=16",
    "image_size": 64,
    "per_device_train_batch_size": 4,
    "ema_decay": 0.99,
    "slice_sampling": "balanced",
    "augmentation": True,
    "dataloader_num_workers": 2,
    "save_total_limit": 2,
    "eval_strategy": "steps",
    "save_strategy": "steps",
    "logging_steps": 10,
    "report_to": "tensorboard",
    "disable_tqdm": True,
}


def count_files(root: psutil.Process) -> tuple[int, int]:
    """Count the open files of a process and of all its children, and these processes."""
    files, processes = 0, [root, *root.children(recursive=True)]
    for process in processes:
        try:
            files += process.num_fds()
        except (psutil.NoSuchProcess, psutil.AccessDenied):
            # The process ended after it was listed.
            continue
    return files, len(processes)


def count_bytes(folder: Path) -> int:
    """Count the bytes of all files in a folder, which another process writes."""
    total = 0
    for path in folder.rglob("*"):
        try:
            total += path.stat().st_size if path.is_file() else 0
        except FileNotFoundError:
            # A checkpoint was deleted after it was listed.
            continue
    return total


def find_last_step(output_dir: Path) -> int:
    """Return the step of the last checkpoint; 0 if there is none."""
    return max((int(path.name.rsplit("-", 1)[1]) for path in output_dir.glob("checkpoint-*")), default=0)


def main() -> None:
    """Train, and print a table with the peaks of each eighth of the training."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.ArgumentDefaultsHelpFormatter)
    parser.add_argument("--steps", type=int, default=2000, help="number of steps, a multiple of 400")
    steps = parser.parse_args().steps
    peaks = [[0.0] * 4 for _ in range(PARTS)]
    with tempfile.TemporaryDirectory() as folder:
        scratch = Path(folder)
        dataset = write_phantom_dataset(scratch, 6, days_per_case=1, slices_per_scan=24, num_folds=3)
        flags = {**FLAGS, "dataset_name": dataset, "output_dir": scratch / "run", "max_steps": steps}
        flags |= {"eval_steps": steps // 40, "save_steps": steps // 40}
        command = [sys.executable, str(ROOT / "run_segmentation.py"), *flag_words(flags)]
        with (scratch / "log").open("w") as log:
            running = subprocess.Popen(command, stdout=log, stderr=log, env={**os.environ, "HF_HOME": folder})
        root = psutil.Process(running.pid)
        while running.poll() is None:
            # The last checkpoint tells how far the training is, without a look into its log.
            part = min(find_last_step(scratch / "run") * PARTS // steps, PARTS - 1)
            try:
                seen = [proportional_memory(root) / 1e9, *count_files(root), count_bytes(scratch / "run") / 1e6]
            except psutil.NoSuchProcess:
                break
            peaks[part] = [max(pair) for pair in zip(peaks[part], seen, strict=True)]
            time.sleep(0.2)
        if running.wait():
            sys.exit((scratch / "log").read_text()[-3000:])
    print("| steps | memory, GB | open files | processes | output folder, MB |\n|---|---|---|---|---|")
    for part, (memory, files, processes, disk) in enumerate(peaks):
        span = f"{part * steps // PARTS} to {(part + 1) * steps // PARTS}"
        print(f"| {span} | {memory:.3f} | {files:.0f} | {processes:.0f} | {disk:.2f} |")


if __name__ == "__main__":
    main()
