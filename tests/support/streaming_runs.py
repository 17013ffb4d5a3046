"""Does a training with `--streaming` see each slice once an epoch, and go on at the right place after a kill?

python -m tests.support.streaming_runs; docs/scale.md says what it shows.
"""

import json
import os
import subprocess
import sys
import tempfile
from collections import Counter
from pathlib import Path
from typing import Any

from dataset_builder.build import build
from dataset_builder.gi_tract import GiTractConfig
from dataset_builder.phantom import write_phantom
from tests.support.processes import CONFIGS, LAUNCH, ROOT_ON_PATH
from tests.support.training import arguments

PATIENTS, SCANS, SLICES, BATCH, EPOCHS = 6, 2, 40, 8, 2


def train(folder: Path, processes: int, words: list[str], last_step: int = 0) -> int:
    """Run a training that writes its records into a folder. Return the exit status."""
    folder.mkdir(exist_ok=True)
    config = CONFIGS / ("multi_cpu.yaml" if processes == 2 else "cpu.yaml")
    command = [sys.executable, *LAUNCH, str(config), "-m", "tests.support.stream_once", str(folder), str(last_step)]
    environment = {**os.environ, **ROOT_ON_PATH, "OMP_NUM_THREADS": "1"}
    with (folder / "log").open("a") as log:
        return subprocess.run([*command, *words], stdout=log, stderr=log, env=environment, check=False).returncode


def read_lines(path: Path) -> list[Any]:
    """Return the records of a file."""
    return [json.loads(line) for line in path.read_text().splitlines()]


def slices_by_step(folder: Path) -> dict[tuple[int, int], list[tuple[int, ...]]]:
    """Return the slices of all processes, by epoch and step. A step that was repeated after a kill counts once."""
    found: dict[tuple[int, int], list[tuple[int, ...]]] = {}
    for epoch, step, ids in read_lines(folder / "slices.jsonl"):
        found.setdefault((epoch, step), []).extend(map(tuple, ids))
    return {key: sorted(ids) for key, ids in found.items()}


def measure(folder: Path, dataset: Path, processes: int, workers: int, slices: int) -> str:
    """Train once without and once with a kill in the second epoch. Return a row of the table."""
    flags: dict[str, Any] = {"streaming": True, "dataloader_num_workers": workers, "max_train_samples": slices}
    steps = -(-slices // (BATCH * processes))
    flags |= {"max_steps": EPOCHS * steps, "per_device_train_batch_size": BATCH, "max_eval_samples": SLICES}
    flags |= {"eval_steps": steps // 2, "save_steps": steps // 2, "save_total_limit": 10}
    whole, killed = folder / "whole", folder / "killed"
    if train(whole, processes, arguments(dataset, whole / "run", **flags)):
        raise RuntimeError((whole / "log").read_text()[-3000:])
    # Between two checkpoints: some steps have to be repeated.
    last_step = steps + steps // 2 + 2
    if not train(killed, processes, arguments(dataset, killed / "run", **flags), last_step):
        raise RuntimeError("the training was not killed")
    before = slices_by_step(killed)
    (killed / "slices.jsonl").unlink()
    if train(killed, processes, arguments(dataset, killed / "run", **flags)):
        raise RuntimeError((killed / "log").read_text()[-3000:])
    uninterrupted, after = slices_by_step(whole), slices_by_step(killed)
    same = {**before, **after} == uninterrupted and max(before) < max(after)
    twice, missing = [], []
    for epoch in range(EPOCHS):
        seen = Counter(one for (number, _), ids in uninterrupted.items() if number == epoch for one in ids)
        twice.append(sum(number - 1 for number in seen.values()))
        missing.append(slices - len(seen))
    orders = [[uninterrupted[key] for key in sorted(uninterrupted) if key[0] == epoch] for epoch in range(EPOCHS)]
    files = [(name, group) for name, group in read_lines(whole / "groups.jsonl") if name.startswith("train")]
    cells = [processes, workers, slices, steps, missing, twice, "no" if orders[0] != orders[1] else "yes"]
    return "| " + " | ".join(map(str, [*cells, "yes" if same else "no", len(set(files)), len(files)])) + " |"


def main() -> None:
    """Print the table, row by row."""
    columns = ("processes", "workers each", "slices", "steps an epoch", "slices missed", "slices seen twice",
               "same order twice", "same slices after a kill", "row groups", "reads of them")  # fmt: skip
    with tempfile.TemporaryDirectory() as scratch:
        folder = Path(scratch)
        write_phantom(folder / "kaggle", PATIENTS, SCANS, SLICES, num_proc=2)
        build(folder / "kaggle", folder / "gi_tract", GiTractConfig(num_folds=3), num_proc=4)
        print(f"| {' | '.join(columns)} |\n{'|---' * len(columns)}|", flush=True)
        for number, (processes, workers, slices) in enumerate(((1, 0, 320), (1, 2, 320), (2, 0, 320), (2, 2, 310))):
            where = folder / str(number)
            where.mkdir()
            print(measure(where, folder / "gi_tract", processes, workers, slices), flush=True)


if __name__ == "__main__":
    main()
