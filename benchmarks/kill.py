"""Kill, stop and disturb trainings, builds, predictions and publications, and look at what they leave.

Each command is a real process, killed by SIGKILL. The moments are random: uniform between the moment at which the
command begins to write and its end. Every fifth kill of a training waits for a checkpoint that is being written.
"""

import argparse
import json
import os
import random
import re
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from benchmarks.training import flag_words
from gi_segmentation.files import hash_file
from gi_segmentation.training.checkpoints import CHECKSUMS, find_checkpoint, find_fault

ROOT = Path(__file__).resolve().parents[1]
PYTHON = sys.executable
# A tiny SegFormer. All that has a state of its own is on: averaged weights, balanced sampling, augmentation, dropout,
# early stopping, the best checkpoint, and a process that loads slices.
MODEL = {
    "num_encoder_blocks": 2, "depths": [1, 1], "sr_ratios": [2, 1], "hidden_sizes": [16, 32], "patch_sizes": [7, 3],
    "num_attention_heads": [1, 2], "strides": [4, 2], "mlp_ratios": [2, 2], "decoder_hidden_size": 32,
}  # fmt: skip
FLAGS: dict[str, Any] = {
    "model_type": "segformer", "config_overrides": json.dumps(MODEL), "image_size": 64, "max_steps": 60,
    "eval_strategy": "steps", "eval_steps": 4, "save_strategy": "steps", "save_steps": 4, "logging_steps": 1,
    "per_device_train_batch_size": 4, "learning_rate": 0.005, "ema_decay": 0.9, "early_stopping_patience": 50,
    "max_eval_samples": 8, "dataloader_num_workers": 1, "report_to": "none", "disable_tqdm": True,
}  # fmt: skip
STEPS = int(FLAGS["max_steps"])
REPO_ID = "tester/model"
KILLED = ["training", "publication", "prediction", "build"]
TABLES = [*KILLED, "damage", "signals", "disks", "two"]


class Workshop:
    """A folder with a dataset, and the commands that are killed.

    Args:
        folder: An empty folder.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.environment = {
            **os.environ,
            "PYTHONPATH": str(ROOT),
            "HF_HOME": str(folder / "hf_home"),
            "OMP_NUM_THREADS": "1",
            "HF_HUB_DISABLE_XET": "1",
        }
        self.log = folder / "log"
        phantom = ["--num_cases", 6, "--days_per_case", 1, "--slices_per_scan", 24]
        self.run(["-m", "dataset_builder", "phantom", "--output_dir", folder / "kaggle", *phantom])
        self.run(self.build(folder / "gi_tract"))

    def build(self, target: Path, num_folds: int = 3) -> list[Any]:
        """Return the words of a build."""
        words = ["-m", "dataset_builder", "build", "--kaggle_dir", self.folder / "kaggle", "--num_proc", 2]
        return [*words, "--num_folds", num_folds, "--output_dir", target]

    def train(self, target: Path, **flags: Any) -> list[Any]:
        """Return the words of a training."""
        flags = {"dataset_name": self.folder / "gi_tract", "output_dir": target, **FLAGS, **flags}
        return [ROOT / "run_segmentation.py", *flag_words(flags)]

    def predict(self, model: Path, target: Path) -> list[Any]:
        """Return the words of a prediction of all scans."""
        words = ["-m", "gi_segmentation.predict", "--model", model, "--input", self.folder / "kaggle" / "train"]
        return [*words, "--format", "kaggle", "nifti", "--num_workers", 1, "--output_dir", target]

    def start(self, words: Sequence[Any], environment: dict[str, str] | None = None) -> subprocess.Popen[bytes]:
        """Start Python with some words, in a session of its own. What it prints goes to a new log."""
        with self.log.open("w") as log:
            return subprocess.Popen(
                [PYTHON, *map(str, words)], cwd=self.folder, env={**self.environment, **(environment or {})},
                stdout=log, stderr=subprocess.STDOUT, start_new_session=True,
            )  # fmt: skip

    def run(
        self, words: Sequence[Any], environment: dict[str, str] | None = None, expected: int = 0
    ) -> tuple[float, str]:
        """Run Python to its end, and return the seconds and what it printed.

        Raises:
            RuntimeError: If it ends with another status, or with a traceback.
        """
        started = time.monotonic()
        status = self.start(words, environment).wait()
        printed = self.log.read_text(errors="replace")
        if status != expected or "Traceback" in printed:
            raise RuntimeError(f"{words}: ended with {status}, expected {expected}\n{printed[-4000:]}")
        return time.monotonic() - started, printed


def processes_of(folder: Path) -> list[str]:
    """Return the command lines of all processes that name a folder."""
    found = []
    for path in Path("/proc").glob("[0-9]*/cmdline"):
        try:
            line = path.read_text(errors="replace").replace("\0", " ")
        except OSError:  # the process has ended
            continue
        if str(folder) in line:
            found.append(line)
    return found


def contents(folder: Path, pattern: str = "**/*") -> dict[str, str]:
    """Return the checksums of the files of a folder that are not hidden, by name."""
    files = [path for path in sorted(folder.glob(pattern)) if path.is_file() and not path.name.startswith(".")]
    return {
        str(path.relative_to(folder)): hash_file(path)
        for path in files
        if not any(part.startswith(".") for part in path.relative_to(folder).parts)
    }


def kill_after(
    process: subprocess.Popen[bytes], begun: Callable[[], bool], seconds: float, aim: Callable[[], bool] | None = None
) -> bool:
    """Kill a process; return False if it ended by itself before.

    Only this process is killed, as by a system without memory. Those that it started stay.

    Args:
        process: The process.
        begun: Whether it has begun to write.
        seconds: When to kill it, after it has begun.
        aim: Kill it soon after this is true, if that comes first.
    """
    while process.poll() is None and not begun():
        time.sleep(0.002)
    deadline = time.monotonic() + seconds
    while time.monotonic() < deadline and process.poll() is None:
        if aim is not None and aim():
            time.sleep(random.uniform(0, 0.02))
            break
        time.sleep(0.001)
    process.kill()
    return process.wait() == -signal.SIGKILL


def holds(process: subprocess.Popen[bytes], lock_file: Path) -> Callable[[], bool]:
    """Return a function that says whether a process holds the lock of a folder, and so has begun to write."""
    return lambda: lock_file.exists() and f" {process.pid} " in lock_file.read_text(errors="replace")


def describe_state(folder: Path) -> str:
    """Return where a training was when it was killed."""
    log = sorted(folder.glob("checkpoint-*"), key=lambda path: int(path.name.split("-")[1]))
    if any(not (path / CHECKSUMS).exists() for path in log):
        return "while a checkpoint was written"
    if log and log[-1].name == f"checkpoint-{STEPS}":
        return "while the results were scored and written"
    return "between two checkpoints"


def end_of(folder: Path) -> dict[str, Any]:
    """Return all that must be equal at the end of a training."""
    import torch

    last = folder / f"checkpoint-{STEPS}"
    state = json.loads((last / "trainer_state.json").read_text())
    torch.set_printoptions(profile="full", precision=20, sci_mode=True)
    return {
        "weights": {path.name: hash_file(path) for path in last.glob("*.safetensors")},
        "published": hash_file(folder / "model.safetensors"),
        **{name: str(torch.load(last / f"{name}.pt")) for name in ("optimizer", "scheduler")},
        "random numbers": str(torch.load(last / "rng_state.pth", weights_only=False)),
        "early stopping": state["stateful_callbacks"],
        "best": (state["best_global_step"], state["best_metric"]),
        "scores": [(one["step"], one["eval_dice"]) for one in state["log_history"] if "eval_dice" in one],
        "final scores": json.loads((folder / "run.json").read_text())["scores"],
    }


def check_end(expected: dict[str, Any], folder: Path) -> str:
    """Return that a training has ended as the one that nobody disturbed.

    Raises:
        RuntimeError: If not.
    """
    found = end_of(folder)
    if different := [name for name in expected if expected[name] != found[name]]:
        raise RuntimeError(f"{folder}: differs from the run that nobody disturbed: {different}")
    return "ends bit-identical"


def row(*cells: Any) -> None:
    """Print a row of a table."""
    words = {True: "yes", False: "no"}
    print(f"| {' | '.join(words[cell] if isinstance(cell, bool) else str(cell) for cell in cells)} |", flush=True)


def kill_trainings(shop: Workshop, whole: Path, seconds: float, kills: int) -> None:
    """Kill trainings, and go on with them until they end, and print the row; `seconds` is how long its steps take."""
    expected, states, done, ended, resumed = end_of(whole), dict[str, int](), 0, 0, 0
    while done < kills:
        folder = shop.folder / f"killed-{ended}"

        def unsealed(folder: Path = folder) -> bool:
            return any(not (path / CHECKSUMS).exists() for path in folder.glob("checkpoint-*"))

        killed = True
        while done < kills and killed:
            last = find_checkpoint(folder)
            left = 1 - int(last.name.split("-")[1]) / STEPS if last else 1.0
            # A kill may also come after the last step, while the results are scored.
            moment = random.uniform(0, max(left, 0.2) * seconds)
            # Every fifth kill waits for a checkpoint that is being written.
            aim = unsealed if done % 5 == 4 else None
            process = shop.start(shop.train(folder))
            killed = kill_after(process, holds(process, folder / ".lock"), 9 * moment if aim else moment, aim)
            printed = shop.log.read_text(errors="replace")
            if "Traceback" in printed:
                raise RuntimeError(printed[-4000:])
            resumed += "Resuming from" in printed
            if killed:
                done += 1
                state = describe_state(folder)
                states[state] = states.get(state, 0) + 1
                print(f"  kill {done}: {moment:.1f} s, {state}", file=sys.stderr, flush=True)
        shop.run(shop.train(folder))
        ended += 1
        check_end(expected, folder)
        shutil.rmtree(folder)
    where = ", ".join(f"{number} {state}" for state, number in sorted(states.items()))
    row("training", done, where, 0, f"{ended} of {ended} runs end bit-identical, after {resumed} resumed starts")


def kill_builds(shop: Workshop, kills: int) -> None:
    """Kill builds, every second one over an earlier dataset, and print the row."""
    target = shop.folder / "killed" / "gi_tract"
    earlier, new = shop.folder / "gi_tract", shop.folder / "new"
    # A build writes from its lock to the dataset.
    process = shop.start(shop.build(new, num_folds=2))
    wait_for(holds(process, new.with_name(".new.lock")), process)
    started = time.monotonic()
    wait_for(new.exists, process)
    seconds = time.monotonic() - started
    process.wait()
    names = {str({}): "no dataset", str(contents(earlier)): "the earlier one", str(contents(new)): "the new one"}
    states, done, ended = dict[str, int](), 0, 0
    while done < kills:
        shutil.rmtree(target.parent, ignore_errors=True)
        if ended % 2:
            shutil.copytree(earlier, target)
        state = ""
        while done < kills and state != "the new one":
            process = shop.start(shop.build(target, num_folds=2))
            begun = holds(process, target.with_name(".gi_tract.lock"))
            killed = kill_after(process, begun, random.uniform(0, seconds))
            # Any other content would be a half.
            state = names[str(contents(target))]
            if killed:
                done += 1
                states[state] = states.get(state, 0) + 1
        shop.run(shop.build(target, num_folds=2))
        ended += 1
        if contents(target) != contents(new) or len(list(target.parent.iterdir())) != 1:
            raise RuntimeError(f"{target}: is not what an undisturbed build writes")
    where = "afterwards " + "; ".join(f"{state}: {number}" for state, number in sorted(states.items()))
    row("`build`", done, where, 0, f"{ended} of {ended} datasets end equal")


def kill_predictions(shop: Workshop, model: Path, kills: int) -> None:
    """Kill predictions, and go on with them until they end, and print the row."""
    whole = shop.folder / "predicted"
    # A prediction writes from the lock of its folder to `submission.csv`.
    process = shop.start(shop.predict(model, whole))
    wait_for(holds(process, whole / ".lock"), process)
    started = time.monotonic()
    wait_for((whole / "submission.csv").exists, process)
    seconds = time.monotonic() - started
    process.wait()
    expected, done, ended, scans = contents(whole), 0, 0, 0
    while done < kills:
        folder = shop.folder / f"predicted-{ended}"
        while done < kills:
            process = shop.start(shop.predict(model, folder))
            killed = kill_after(process, holds(process, folder / ".lock"), random.uniform(0, seconds))
            found = contents(folder)
            if not found.items() <= expected.items():
                raise RuntimeError(f"{folder}: {found.keys()} are not as an undisturbed prediction writes them")
            done += killed
            if not killed or "submission.csv" in found:
                break
            scans += len(found)
        # A prediction that is complete would not be overwritten.
        if "submission.csv" not in contents(folder) or any(folder.glob(".predictions/*.csv")):
            shop.run(shop.predict(model, folder))
        ended += 1
        if contents(folder) != expected or any(folder.glob(".predictions/*.csv")):
            raise RuntimeError(f"{folder}: is not what an undisturbed prediction writes")
    row("`predict`", done, f"{scans} files of whole scans were there", 0, f"{ended} of {ended} predictions end equal")


@contextmanager
def serving(shop: Workshop) -> Iterator[dict[str, str]]:
    """Run the small Hub of the tests in a process, and yield the variables that lead to it."""
    command = [PYTHON, "-m", "loopback_hub", "--root", str(shop.folder / "hub")]
    with subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE, text=True) as server:
        assert server.stdout is not None
        endpoint = server.stdout.readline().split()[3].rstrip(",")
        try:
            yield {"HF_ENDPOINT": endpoint, "HF_TOKEN": "loopback-token"}
        finally:
            server.terminate()


def copy_run(run: Path, folder: Path) -> Path:
    """Copy the files of a finished run, without its checkpoints."""
    return Path(shutil.copytree(run, folder, ignore=shutil.ignore_patterns("checkpoint-*")))


def publish(folder: Path, repo_id: str) -> list[Any]:
    """Return the words of a publication."""
    return ["-m", "gi_segmentation.publish", "--output_dir", folder, "--hub_model_id", repo_id]


def read_repository(hub: dict[str, str], repo_id: str, folder: Path) -> str:
    """Return the state of a repository: absent, empty, whole or half, and whether it has a tag."""
    from huggingface_hub import HfApi

    api = HfApi(endpoint=hub["HF_ENDPOINT"], token=hub["HF_TOKEN"])
    if not api.repo_exists(repo_id):
        return "absent"
    names = set(api.list_repo_files(repo_id)) - {".gitattributes"}
    tagged = ", tagged" if api.list_repo_refs(repo_id).tags else ""
    if not names:
        return "empty" + tagged
    with tempfile.TemporaryDirectory() as scratch:
        copies = {name: Path(api.hf_hub_download(repo_id, name, local_dir=scratch)) for name in names}
        same = all(copy.read_bytes() == (folder / name).read_bytes() for name, copy in copies.items())
    wanted = {"README.md", "model.safetensors", "config.json", "preprocessor_config.json", "run.json", "cases.png"}
    wanted |= {"overlay.png", "learning_curve.png", "scan_scores.csv"}
    return ("whole" if same and names == wanted else "half") + tagged


def kill_publications(shop: Workshop, run: Path, hub: dict[str, str], kills: int) -> None:
    """Kill publications, complete one for each state in which a repository was left, and print the row."""
    folder = copy_run(run, shop.folder / "published")

    def has(repo_id: str, content: str) -> Callable[[], bool]:
        path = shop.folder / "hub" / "models" / repo_id / "repo.json"
        return lambda: path.exists() and content in path.read_text()

    # A publication writes from the creation of the repository to the tag.
    process = shop.start(publish(folder, "tester/first"), hub)
    wait_for(has("tester/first", ""), process)
    started = time.monotonic()
    wait_for(has("tester/first", '"dice-'), process)
    seconds, states, done = time.monotonic() - started, dict[str, list[str]](), 0
    process.wait()
    while done < kills:
        repo_id = f"{REPO_ID}-{done}"
        process = shop.start(publish(folder, repo_id), hub)
        if not kill_after(process, has(repo_id, ""), random.uniform(0, seconds)):
            raise RuntimeError(f"{repo_id}: the publication ended before it was killed")
        done += 1
        state = read_repository(hub, repo_id, folder)
        states.setdefault(state, []).append(repo_id)
        if "half" in state or state == "empty, tagged":
            raise RuntimeError(f"{repo_id}: {state}")
    for names in states.values():
        shop.run(publish(folder, names[-1]), hub)
        if read_repository(hub, names[-1], folder) != "whole, tagged":
            raise RuntimeError(f"{names[-1]}: the next publication did not complete it")
    where = "afterwards " + "; ".join(f"{state}: {len(names)}" for state, names in sorted(states.items()))
    row(
        "publication", done, where, 0, f"one of each kind was published again: {len(states)} of {len(states)} complete"
    )


def damage_checkpoints(shop: Workshop, whole: Path) -> None:
    """Damage each file of the last checkpoint, and print which checkpoint serves."""
    last, before = f"checkpoint-{STEPS}", f"checkpoint-{STEPS - 4}"
    for damage in ("cut to a half", "one bit altered", "removed"):
        served, names = 0, sorted(path.name for path in (whole / last).iterdir())
        for name in names:
            with tempfile.TemporaryDirectory(dir=shop.folder) as scratch:
                for kept in (last, before):
                    shutil.copytree(whole / kept, Path(scratch) / kept)
                path = Path(scratch) / last / name
                data = path.read_bytes()
                middle = len(data) // 2
                path.write_bytes(data[:middle] + (b"" if "cut" in damage else bytes([data[middle] ^ 1])))
                if "altered" in damage:
                    path.write_bytes(data[:middle] + bytes([data[middle] ^ 1]) + data[middle + 1 :])
                elif damage == "removed":
                    path.unlink()
                served += find_checkpoint(Path(scratch)) == Path(scratch) / before
        row(f"each file of a checkpoint, {damage}", f"the one before serves: {served} of {len(names)}")
    folder = shop.folder / "damaged"
    copy_run(whole, folder)
    for step in (STEPS - 8, STEPS - 4):
        shutil.copytree(whole / f"checkpoint-{step}", folder / f"checkpoint-{step}")
    path = folder / before / "model.safetensors"
    path.write_bytes(path.read_bytes()[:1000])
    _, printed = shop.run(shop.train(folder))
    resumed = re.findall(r"Resuming from \S+/(\S+)", printed)
    end = check_end(end_of(whole), folder)
    row(f"a run whose {before} has a cut `model.safetensors`", f"resumes from {resumed[0]}, {end}")


def last_line(printed: str) -> str:
    """Return the last line of an output that says something, without paths of this machine."""
    line = [line for line in printed.splitlines() if re.match(r"error:|stopped|interrupted", line)][-1]
    return re.sub(r"/\S+/(?=[^/\s]+)", "", line).replace(socket.gethostname(), "HOST")


def stop_training(shop: Workshop, folder: Path, number: int, launch: Sequence[Any] = ()) -> tuple[int, str]:
    """Send a signal to a training after its first checkpoint, and start it again.

    Returns:
        The exit status, and what was printed before the signal took effect.
    """
    words = [*launch, *shop.train(folder)]
    process = shop.start(words)
    wait_for(lambda: any(folder.glob(f"checkpoint-*/{CHECKSUMS}")), process)
    time.sleep(random.uniform(0, 0.5))
    if launch:
        # As from `kill`. The launcher passes it on.
        process.send_signal(number)
    else:
        # Slurm sends it to all processes, and so does a terminal.
        os.killpg(process.pid, number)
    status = process.wait()
    printed = shop.log.read_text(errors="replace")
    shop.run(words)
    return status, printed


def send_signals(shop: Workshop, whole: Path) -> None:
    """Send signals to trainings in one process and in two, and to a build and a prediction, and print the rows."""
    for number in (signal.SIGTERM, signal.SIGINT):
        folder = shop.folder / f"stopped-{number}"
        status, printed = stop_training(shop, folder, number)
        name, end = signal.Signals(number).name, check_end(end_of(whole), folder)
        row(f"training, {name}", status, f"`{last_line(printed)}`", "Traceback" in printed, end)
    launch = ["-m", "accelerate.commands.launch", "--quiet", "--config_file"]
    launch += [str(ROOT / "accelerate_configs" / "multi_cpu.yaml")]
    undisturbed, folder = shop.folder / "two-whole", shop.folder / "two"
    shop.run([*launch, *shop.train(undisturbed)])
    status, printed = stop_training(shop, folder, signal.SIGTERM, launch)
    left, right = (contents(one / f"checkpoint-{STEPS}", "*.safetensors") for one in (undisturbed, folder))
    of_launcher = "that of the launcher" if "SignalException" in printed else "Traceback" in printed
    weights = "the same weights at the end" if left == right else "other weights at the end"
    row("training in two processes, SIGTERM", status, f"`{last_line(printed)}`", of_launcher, weights)
    built, predicted = shop.folder / "interrupted" / "gi_tract", shop.folder / "interrupted-predictions"
    for name, words, lock_file in (
        ("build", shop.build(built), built.with_name(".gi_tract.lock")),
        ("predict", shop.predict(whole, predicted), predicted / ".lock"),
    ):
        process = shop.start(words)
        wait_for(holds(process, lock_file), process)
        os.killpg(process.pid, signal.SIGINT)
        status = process.wait()
        printed = shop.log.read_text(errors="replace")
        shop.run(words)
        row(f"`{name}`, SIGINT", status, f"`{last_line(printed)}`", "Traceback" in printed, "completes")


def wait_for(condition: Callable[[], bool], process: subprocess.Popen[bytes]) -> None:
    """Wait until something is true."""
    while not condition():
        if process.poll() is not None:
            raise RuntimeError(f"a command ended with {process.returncode} too early")
        time.sleep(0.005)


@contextmanager
def small_disk(folder: Path, size: str) -> Iterator[None]:
    """Mount a small file system in memory. Only root may do so.

    Raises:
        subprocess.CalledProcessError: If this is refused.
    """
    folder.mkdir(parents=True)
    mount = ["mount", "-t", "tmpfs", "-o", f"size={size}", "tmpfs", str(folder)]
    subprocess.run(mount, check=True, capture_output=True)
    try:
        yield
    finally:
        subprocess.run(["umount", str(folder)], check=True)


def fill_disks(shop: Workshop, whole: Path, hub: dict[str, str]) -> None:
    """Let each command write to a disk that is too small, enlarge the disk, and run it again; print the rows."""
    size = sum(path.stat().st_size for path in (whole / f"checkpoint-{STEPS}").iterdir())
    disk = shop.folder / "disk"

    def fill(name: str, words: list[Any], size: int, check: Callable[[], str], environment: dict[str, str]) -> None:
        with small_disk(disk, str(size)):
            if name == "publication":
                copy_run(whole, disk / "run")
            _, printed = shop.run(words, environment, expected=1)
            left = check()
            subprocess.run(["mount", "-o", "remount,size=500m", str(disk)], check=True)
            shop.run(words, environment)
            row(name, f"`{last_line(printed)}`", left, check())
        disk.rmdir()

    def training() -> str:
        if (disk / "run" / "README.md").exists():
            return check_end(end_of(whole), disk / "run")
        faults = {path.name: find_fault(path) for path in (disk / "run").glob("checkpoint-*")}
        good = sorted((name for name in faults if faults[name] is None), key=lambda name: int(name.split("-")[1]))
        return f"{good[-1]} is whole"

    built, predicted = contents(shop.folder / "gi_tract"), contents(shop.folder / "predicted")

    def build() -> str:
        return "whole" if contents(disk / "gi_tract") == built else f"{len(contents(disk))} files"

    def prediction() -> str:
        found = contents(disk / "out")
        if found == predicted:
            return "whole"
        return f"{len(found)} files of whole scans" if found.items() <= predicted.items() else "half files"

    def publication() -> str:
        return read_repository(hub, f"{REPO_ID}-disk", disk / "run")

    files = [path.stat().st_size for path in (shop.folder / "gi_tract").rglob("*") if path.is_file()]
    run = [path.stat().st_size + 4096 for path in whole.glob("*") if path.is_file()]
    fill("training", shop.train(disk / "run", save_total_limit=50), int(4.5 * size), training, {})
    fill("`build`", shop.build(disk / "gi_tract"), sum(files) // 2, build, {})
    fill("`predict`", shop.predict(whole, disk / "out"), 16 * 4096, prediction, {})
    # What is published is first copied to the folder for temporary files.
    words = publish(disk / "run", f"{REPO_ID}-disk")
    weights = (whole / "model.safetensors").stat().st_size
    fill("publication", words, sum(run) + weights // 2, publication, {**hub, "TMPDIR": str(disk)})


def run_two(shop: Workshop, words: list[list[Any]], environment: dict[str, str]) -> tuple[list[int], str]:
    """Start two commands at once, and return both statuses and the message of the one that failed.

    Raises:
        RuntimeError: If one has a traceback.
    """
    logs = [shop.folder / f"log-{index}" for index in range(2)]
    processes = []
    for one, log in zip(words, logs, strict=True):
        shop.log = log
        processes.append(shop.start(one, environment))
    shop.log = shop.folder / "log"
    statuses = [process.wait() for process in processes]
    printed = [log.read_text(errors="replace") for log in logs]
    if "Traceback" in "".join(printed):
        raise RuntimeError("\n".join(text[-3000:] for text in printed))
    failed = [last_line(text) for text, status in zip(printed, statuses, strict=True) if status]
    return sorted(statuses), failed[0] if failed else ""


def run_twice(shop: Workshop, whole: Path, hub: dict[str, str], times: int) -> None:
    """Start two of each command at once, several times, and print the rows."""
    expected = end_of(whole)
    other = copy_run(whole, shop.folder / "other")
    # Another file, so that nobody takes one publication for the other.
    (other / "cases.png").write_bytes((other / "cases.png").read_bytes() + b"0")
    cases: dict[str, tuple[Callable[[int], list[list[Any]]], Callable[[int], bool]]] = {
        "training": (
            lambda index: [shop.train(shop.folder / f"both-{index}")] * 2,
            lambda index: bool(check_end(expected, shop.folder / f"both-{index}")),
        ),
        "`build`": (
            lambda index: [shop.build(shop.folder / f"both-built-{index}" / "gi_tract")] * 2,
            lambda index: (
                contents(shop.folder / f"both-built-{index}" / "gi_tract") == contents(shop.folder / "gi_tract")
            ),
        ),
        "`predict`": (
            lambda index: [shop.predict(whole, shop.folder / f"both-predicted-{index}")] * 2,
            lambda index: contents(shop.folder / f"both-predicted-{index}") == contents(shop.folder / "predicted"),
        ),
        "publication of two runs to one repository": (
            lambda index: [publish(folder, f"{REPO_ID}-both-{index}") for folder in (whole, other)],
            lambda index: (
                "whole, tagged"
                in [read_repository(hub, f"{REPO_ID}-both-{index}", folder) for folder in (whole, other)]
            ),
        ),
    }
    for name, (words, check) in cases.items():
        won, message, whole_ones = 0, "", 0
        for index in range(times):
            statuses, said = run_two(shop, words(index), hub)
            won += statuses == [0, 1]
            message = said or message
            whole_ones += check(index)
        row(name, times, won, f"`{message}`", f"{whole_ones} of {times}")


def main() -> None:
    """Do all, and print the tables."""
    parser = argparse.ArgumentParser("python -m benchmarks.kill", description=__doc__)
    parser.add_argument("--kills", type=int, default=25, help="number of kills of each command")
    parser.add_argument("--seed", type=int, default=0, help="seed of the moments")
    parser.add_argument(
        "--only", nargs="*", choices=TABLES, default=TABLES, help="the tables, or rows of the first one"
    )
    options = parser.parse_args()
    # In the background of a script, Ctrl-C is ignored, and the processes would inherit this.
    signal.signal(signal.SIGINT, signal.default_int_handler)
    random.seed(options.seed)
    wanted = options.only
    with tempfile.TemporaryDirectory() as scratch:
        shop = Workshop(Path(scratch))
        whole = shop.folder / "whole"
        # The first run fills the cache of slices; the second one is measured.
        shop.run(shop.train(shop.folder / "first", max_steps=1, eval_steps=1, save_steps=1))
        process = shop.start(shop.train(whole, save_total_limit=50))
        wait_for((whole / "run.json").exists, process)
        started = time.monotonic()
        wait_for((whole / f"checkpoint-{STEPS}" / CHECKSUMS).exists, process)
        seconds = time.monotonic() - started
        process.wait()
        shop.run(shop.predict(whole, shop.folder / "predicted-first"))
        with serving(shop) as hub:
            if not set(wanted).isdisjoint(KILLED):
                row("killed", "kills", "when, or what was there", "halves taken for whole", "the next starts")
                row(*["---"] * 5)
                if "training" in wanted:
                    kill_trainings(shop, whole, seconds, options.kills)
                if "publication" in wanted:
                    kill_publications(shop, whole, hub, options.kills)
                if "prediction" in wanted:
                    kill_predictions(shop, whole, options.kills)
                if "build" in wanted:
                    kill_builds(shop, options.kills)
                time.sleep(6)
                # The Hub does not count.
                row("processes that were left", "", "", "", len(processes_of(shop.folder)) - 1)
                print()
            if "damage" in wanted:
                row("damage", "result")
                row(*["---"] * 2)
                damage_checkpoints(shop, whole)
                print()
            if "signals" in wanted:
                row("signal", "exit status", "last line", "traceback", "the same command again")
                row(*["---"] * 5)
                send_signals(shop, whole)
                print()
            if not (shop.folder / "predicted").exists():
                shop.run(shop.predict(whole, shop.folder / "predicted"))
            if "disks" in wanted:
                row("full disk", "the error, exit status 1", "what is left", "after the disk was enlarged")
                row(*["---"] * 4)
                fill_disks(shop, whole, hub)
                print()
            if "two" in wanted:
                row("two at once", "pairs", "one wins, one says so", "what it says", "the result is whole")
                row(*["---"] * 5)
                run_twice(shop, whole, hub, times=3)


if __name__ == "__main__":
    main()
