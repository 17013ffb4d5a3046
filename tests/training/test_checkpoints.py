"""What a run leaves when it is killed, stopped, damaged or out of disk: the same command goes on as if nothing was."""

import json
import os
import resource
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
from safetensors.torch import load_file
from transformers import TrainerCallback, TrainerState

import run_segmentation
from gi_segmentation.errors import InputError, StoppedError
from gi_segmentation.publishing.facts import is_finished, read_earlier
from gi_segmentation.training import checkpoints
from gi_segmentation.training.checkpoints import CHECKSUMS, find_fault, find_last_checkpoint, read_state
from gi_segmentation.training.trainer import train
from tests.support.processes import CONFIGS, LAUNCH, ROOT, hold
from tests.support.training import arguments, assert_same_end, make_trainer

# With all that has a state of its own: averaged weights, balanced sampling, patience.
FLAGS = {"ema_decay": 0.9, "slice_sampling": "balanced", "early_stopping_patience": 50, "save_total_limit": 10}
FLAGS |= {"cache_slices": False}


@pytest.fixture(scope="module")
def whole(dataset_dir: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A finished run of 4 steps that nobody interrupted. Tests only read it."""
    folder = tmp_path_factory.mktemp("whole") / "run"
    run_segmentation.main(arguments(dataset_dir, folder, **FLAGS))
    return folder


def begin(whole: Path, folder: Path, *steps: int) -> None:
    """Make the folder of a run that has some of the checkpoints of `whole`."""
    folder.mkdir()
    shutil.copy(whole / "run.json", folder)
    for step in steps:
        shutil.copytree(whole / f"checkpoint-{step}", folder / f"checkpoint-{step}")


def test_a_checkpoint_with_a_damaged_file_is_not_taken_for_whole(whole: Path, tmp_path: Path) -> None:
    names = sorted(path.name for path in (whole / "checkpoint-4").iterdir())
    assert {CHECKSUMS, "model.safetensors", "optimizer.pt", "rng_state.pth", "trainer_state.json"} <= set(names)
    for name in names:
        for damage in ("cut", "altered", "removed"):
            folder = tmp_path / f"{name}-{damage}"
            begin(whole, folder, 3, 4)
            path = folder / "checkpoint-4" / name
            data = path.read_bytes()
            middle = len(data) // 2
            cut, altered = data[:middle], data[:middle] + bytes([data[middle] ^ 1]) + data[middle + 1 :]
            path.write_bytes(cut if damage == "cut" else altered)
            if damage == "removed":
                path.unlink()
            assert find_last_checkpoint(folder) == folder / "checkpoint-3", (name, damage)
            assert not (folder / "checkpoint-4").exists()


def test_a_run_with_a_cut_checkpoint_goes_on_from_the_one_before(
    whole: Path, dataset_dir: Path, tmp_path: Path
) -> None:
    begin(whole, tmp_path / "run", 2, 3)
    path = tmp_path / "run" / "checkpoint-3" / "model.safetensors"
    path.write_bytes(path.read_bytes()[:1000])
    run_segmentation.main(arguments(dataset_dir, tmp_path / "run", **FLAGS))
    assert_same_end(whole, tmp_path / "run")


def test_a_checkpoint_whose_best_one_is_damaged_does_not_serve(whole: Path, tmp_path: Path) -> None:
    begin(whole, tmp_path / "run", 1, 2, 3)
    state = tmp_path / "run" / "checkpoint-3" / "trainer_state.json"
    content = json.loads(state.read_text()) | {"best_model_checkpoint": str(tmp_path / "run" / "checkpoint-2")}
    state.write_text(json.dumps(content))
    checkpoints.seal(state.parent)
    assert find_last_checkpoint(tmp_path / "run") == state.parent
    (tmp_path / "run" / "checkpoint-2" / "model.safetensors").write_bytes(b"")
    assert find_last_checkpoint(tmp_path / "run") == tmp_path / "run" / "checkpoint-1"


def test_a_run_whose_folder_was_moved_finds_its_best_checkpoint(tmp_path: Path) -> None:
    run = tmp_path / "run"
    for step in (2, 4):
        (run / f"checkpoint-{step}").mkdir(parents=True)
        state = TrainerState(global_step=step, best_model_checkpoint=str(tmp_path / "before" / "checkpoint-2"))
        state.save_to_json(str(run / f"checkpoint-{step}" / "trainer_state.json"))
        checkpoints.seal(run / f"checkpoint-{step}")
    assert read_state(run / "checkpoint-4").best_model_checkpoint == str(run / "checkpoint-2")
    shutil.rmtree(run / "checkpoint-2")
    assert read_state(run / "checkpoint-4").best_model_checkpoint is None


def test_an_old_checkpoint_is_deleted_only_when_the_new_one_is_whole(
    dataset_dir: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    class Killed(BaseException):
        """The process ends at this place."""

    def kill(checkpoint: Path) -> None:
        if checkpoint.name == "checkpoint-3":
            raise Killed
        seal(checkpoint)

    seal = checkpoints.seal
    monkeypatch.setattr(checkpoints, "seal", kill)
    # With this limit, `Trainer` itself would have deleted checkpoint 2 by now, or checkpoint 1.
    with pytest.raises(Killed):
        run_segmentation.main(arguments(dataset_dir, tmp_path / "run", **FLAGS | {"save_total_limit": 1}))
    assert (tmp_path / "run" / "checkpoint-3" / "trainer_state.json").exists()
    found = find_last_checkpoint(tmp_path / "run")
    assert found == tmp_path / "run" / "checkpoint-2"


class StopAt(TrainerCallback):
    """Sends a signal to this process within a step."""

    def __init__(self, step: int, number: int) -> None:
        self.step, self.number = step, number

    def on_substep_end(self, *args: Any, **kwargs: Any) -> None:
        self.on_optimizer_step(*args, **kwargs)

    def on_optimizer_step(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if state.global_step + 1 == self.step:
            os.kill(os.getpid(), self.number)


def test_a_signal_saves_the_step_and_the_same_command_goes_on(dataset_dir: Path, tmp_path: Path) -> None:
    # 8 slices in batches of 4 are two steps. So step 3 is amid an epoch, and step 2 is the end of one.
    flags = FLAGS | {"max_train_samples": 8, "slice_sampling": "all", "eval_steps": None, "save_steps": None}
    flags |= {"eval_strategy": "epoch", "save_strategy": "epoch"}
    run_segmentation.main(arguments(dataset_dir, tmp_path / "whole", **flags))
    # Tests in the background of a script ignore Ctrl-C, and so would the training.
    signal.signal(signal.SIGINT, signal.default_int_handler)
    for step, number in ((2, signal.SIGTERM), (3, signal.SIGINT)):
        folder = tmp_path / str(step)
        words = arguments(dataset_dir, folder, **flags)
        trainer, _ = make_trainer(words)
        trainer.add_callback(StopAt(step, number))
        handlers = [signal.getsignal(one) for one in (signal.SIGTERM, signal.SIGINT)]
        with pytest.raises(StoppedError, match=f"stopped at step {step} of 4, .*the same command goes on") as caught:
            train(trainer)
        assert caught.value.status == 128 + number
        assert [signal.getsignal(one) for one in (signal.SIGTERM, signal.SIGINT)] == handlers
        assert find_last_checkpoint(folder) == folder / f"checkpoint-{step}"
        shutil.copy(tmp_path / "whole" / "run.json", folder)
        run_segmentation.main(words)
        assert_same_end(tmp_path / "whole", folder)


def run_part(words: list[str]) -> str:
    """Run a part of a training that ends before the whole, and return what it says."""
    with pytest.raises(StoppedError) as caught:
        run_segmentation.main(words)
    assert caught.value.status == 0
    return str(caught.value)


def test_parts_of_a_limited_time_make_the_same_weights_as_the_whole(
    whole: Path, dataset_dir: Path, tmp_path: Path
) -> None:
    folder = tmp_path / "run"
    # Each part has time for one step.
    words = arguments(dataset_dir, folder, **FLAGS, max_hours=1e-6)
    part = folder / "part_done.json"
    for step in (1, 2, 3):
        assert f"step {step} of 4, and saved it in {folder}; the same command goes on from there" in run_part(words)
        assert json.loads(part.read_text()) == {"step": step, "of": 4}
    # The last step is done, and there is no time left to score it. The next part does only that.
    assert "step 4 of 4, and saved it" in (said := run_part(words)) and "only scores the best checkpoint" in said
    assert not is_finished(read_earlier(folder))
    run_segmentation.main(words)
    assert not part.exists() and is_finished(read_earlier(folder))
    assert_same_end(whole, folder)
    assert "max_hours" not in (folder / "run.json").read_text()


def test_two_processes_stop_at_the_same_step(dataset_dir: Path, tmp_path: Path) -> None:
    flags = FLAGS | {"max_steps": 5000, "eval_strategy": "epoch", "save_strategy": "epoch", "num_train_epochs": 5000}
    words = arguments(dataset_dir, tmp_path / "run", **flags | {"per_device_train_batch_size": 2, "logging_steps": 1})
    command = [sys.executable, *LAUNCH, str(CONFIGS / "multi_cpu.yaml"), str(ROOT / "run_segmentation.py"), *words]
    with (tmp_path / "log").open("w") as log:
        running = subprocess.Popen(command, stdout=log, stderr=log, env=os.environ)
        deadline = time.monotonic() + 120
        while not (tmp_path / "run" / "checkpoint-6" / CHECKSUMS).exists():
            assert running.poll() is None and time.monotonic() < deadline, (tmp_path / "log").read_text()[-2000:]
            time.sleep(0.05)
        # Only the launcher gets it, as from `kill`. It passes it on to both processes.
        running.send_signal(signal.SIGTERM)
        running.wait(60)
    printed = (tmp_path / "log").read_text()
    assert printed.count("the same command goes on from there") == 1, printed[-3000:]
    last = find_last_checkpoint(tmp_path / "run")
    assert last is not None and f"stopped at step {last.name.split('-')[1]} of" in printed
    # Both have written their part of the last checkpoint, and nothing was removed as damaged.
    assert {"rng_state_0.pth", "rng_state_1.pth"} <= {path.name for path in last.iterdir()}
    assert all(find_fault(path) is None for path in (tmp_path / "run").glob("checkpoint-*"))


@contextmanager
def largest_file(size: int) -> Iterator[None]:
    """Let no file of this process grow beyond a size, as on a full disk."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)


@pytest.mark.parametrize("name", ["model.safetensors", "optimizer.pt"])
def test_a_full_disk_ends_in_one_error_and_the_last_checkpoint_serves(
    name: str, whole: Path, dataset_dir: Path, tmp_path: Path
) -> None:
    begin(whole, tmp_path / "run", 1, 2)
    words = arguments(dataset_dir, tmp_path / "run", **FLAGS)
    sizes = {path.name: path.stat().st_size for path in (whole / "checkpoint-3").iterdir()}
    assert sizes["training_weights.safetensors"] < sizes["optimizer.pt"]
    message = r"checkpoint-3: the checkpoint cannot be written \(.+\); free some space"
    with largest_file(sizes[name] - 100), pytest.raises(InputError, match=message) as caught:
        run_segmentation.main(words)
    assert "\n" not in str(caught.value)
    assert find_last_checkpoint(tmp_path / "run") == tmp_path / "run" / "checkpoint-2"


def test_a_second_run_into_the_same_folder_ends_before_it_changes_anything(
    whole: Path, dataset_dir: Path, tmp_path: Path
) -> None:
    begin(whole, tmp_path / "run", 1)
    words = arguments(dataset_dir, tmp_path / "run", **FLAGS)
    with hold(tmp_path / "run" / ".lock") as pid:
        before = {path: path.read_bytes() for path in (tmp_path / "run").rglob("*") if path.is_file()}
        with pytest.raises(InputError, match=rf"run: process {pid} on \S+ writes to this folder; wait for its end"):
            run_segmentation.main(words)
        assert {path: path.read_bytes() for path in (tmp_path / "run").rglob("*") if path.is_file()} == before
    # The process was killed, and its lock with it.
    run_segmentation.main(words)
    assert not (tmp_path / "run" / ".lock").exists()
    assert load_file(tmp_path / "run" / "model.safetensors").keys() == load_file(whole / "model.safetensors").keys()
