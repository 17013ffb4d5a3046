"""Commands that are killed: nothing half is taken for whole, no process stays, and the next start completes it.

Each command is a real process, and SIGKILL reaches only the first one, as without memory. A build that is killed,
damaged checkpoints, signals, full disks and two writers at once have tests beside those of their wings.
"""

import random
import signal
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from loopback_hub import Fault, LoopbackHub
from tests.support.hub_faults import (
    COMMIT,
    CREATE,
    FILE,
    LARGE,
    REPO_ID,
    TAG,
    call_publish,
    client_of,
    describe_repository,
)
from tests.support.launches import RUN, Launch
from tests.support.models import save_model
from tests.support.processes import processes_of
from tests.support.runs import write_run
from tests.support.training import arguments, assert_same_end

# With all that has a state of its own: averaged weights, balanced sampling, augmentation, patience, a loader process.
FLAGS = {"ema_decay": 0.9, "slice_sampling": "balanced", "early_stopping_patience": 50, "save_total_limit": 2}
FLAGS |= {"max_steps": 20, "eval_steps": 4, "save_steps": 4, "dataloader_num_workers": 1}


def run(words: list[str], folder: Path) -> str:
    """Run Python to its end, and return what it wrote to stderr."""
    with Launch(folder, [[sys.executable, *words]]) as launch:
        assert launch.wait() == [0], launch.said()[-3000:]
        return launch.said()


def kill(words: list[str], folder: Path, moment: Callable[[], bool], delay_s: float, env: dict[str, str]) -> None:
    """Start Python, kill it `delay_s` seconds after a moment, and check that all that it started ends by itself."""
    with Launch(folder, [[sys.executable, *words]], env) as launch:
        process, deadline = launch.started[0], time.monotonic() + 240
        while not moment():
            assert process.poll() is None and time.monotonic() < deadline, launch.said()[-3000:]
            time.sleep(0.005)
        time.sleep(delay_s)
        process.kill()
        assert process.wait() == -signal.SIGKILL, "it ended before it was killed"
        deadline = time.monotonic() + 30
        while left := processes_of(folder.parent):
            assert time.monotonic() < deadline, left
            time.sleep(0.05)
        assert "Traceback" not in launch.said(), launch.said()[-3000:]


@pytest.mark.long
@pytest.mark.timeout(1500)
def test_a_training_ends_bit_by_bit_as_one_that_nobody_killed(dataset_dir: Path, tmp_path: Path) -> None:
    whole, killed = tmp_path / "whole" / "run", tmp_path / "killed" / "run"
    run([str(RUN), *arguments(dataset_dir, whole, **FLAGS)], tmp_path / "whole" / "log")
    words, chance = [str(RUN), *arguments(dataset_dir, killed, **FLAGS)], random.Random(0)
    # Before the first checkpoint, while one is written or soon after, and while the best one is scored.
    for step, delay_s in [(0, 0.1), (4, 0), (8, chance.uniform(0, 0.3)), (20, 0)]:
        begun = killed / (f"checkpoint-{step}" if step else ".lock")
        kill(words, tmp_path / "killed" / "log", begun.exists, delay_s, {})
    said = run(words, tmp_path / "killed" / "log")
    assert "Resuming from" in said or "scoring its best checkpoint" in said
    assert_same_end(whole, killed)


@pytest.mark.long
@pytest.mark.timeout(600)
def test_a_prediction_has_only_files_of_whole_scans(kaggle_dir: Path, tmp_path: Path) -> None:
    model = save_model(tmp_path / "model", "segformer", seed=0)
    common = ["-m", "gi_segmentation.predict", "--model", str(model), "--input", str(kaggle_dir / "train")]
    common += ["--format", "kaggle", "nifti", "--num_workers", "1", "--batch_size", "2", "--output_dir"]

    def files(folder: Path) -> dict[str, bytes]:
        return {path.name: path.read_bytes() for path in folder.glob("*") if not path.name.startswith(".")}

    run([*common, str(tmp_path / "whole" / "out")], tmp_path / "whole" / "log")
    expected, killed = files(tmp_path / "whole" / "out"), tmp_path / "killed" / "out"
    # The four scans are written one after the other.
    for number in range(4):

        def written(number: int = number) -> bool:
            return (killed / ".lock").exists() and len(list(killed.glob("*.nii.gz"))) >= number

        kill([*common, str(killed)], tmp_path / "killed" / "log", written, 0, {})
        assert files(killed).items() <= expected.items()
    run([*common, str(killed)], tmp_path / "killed" / "log")
    assert files(killed) == expected


@pytest.mark.long
@pytest.mark.timeout(600)
@pytest.mark.parametrize(
    ("method", "path"), [("POST", CREATE), ("PUT", LARGE), ("POST", COMMIT), ("GET", FILE), ("POST", TAG)]
)
def test_a_publication_leaves_no_half_repository(method: str, path: str, tmp_path: Path) -> None:
    folder = write_run(tmp_path / "killed" / "run")
    words = ["-m", "gi_segmentation.publish", "--output_dir", str(folder), "--hub_model_id", REPO_ID]
    with LoopbackHub(tmp_path / "first") as first, client_of(first):
        assert not call_publish(folder)  # from now on, the card names the repository
    with LoopbackHub(tmp_path / "hub") as hub:
        # The Hub holds this request until the client is dead, and then does what it asks.
        hub.faults.set([Fault(method, path, delay_s=3)])
        kill(words, tmp_path / "killed" / "log", lambda: hub.faults.count == 1, 0, hub.environment())
        hub.faults.set()
        with client_of(hub):
            for number in range(2):
                state = describe_repository(hub, folder, tmp_path / str(number))
                assert "half" not in state and state != "empty, tagged"
                # `client_of` takes `time.sleep` away.
                threading.Event().wait(3)
            assert not call_publish(folder)
            assert describe_repository(hub, folder, tmp_path / "then") == "whole, tagged"
