"""Train with every configuration of `accelerate_configs/`, kill, resume, score and publish, and write the table.

python -m tests.support.launch_table

It takes about 10 minutes on two cores. The network namespaces need root and the program `ip`.
"""

import json
import os
import tempfile
import time
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from loopback_hub import LoopbackHub
from tests.support.launches import FSDP_ON_CPU, RUN, Launch, Machines, accelerate_commands, two_namespaces
from tests.support.models import change_config, save_model
from tests.support.pages import replace_table
from tests.support.processes import ROOT
from tests.support.training import arguments

PAGE, START = ROOT / "accelerate_configs" / "README.md", "<!-- launches -->\n"
STEPS, REPO_ID = 6, "tester/model"
EMA, NO_EMA = {"ema_decay": 0.9}, {"ema_decay": 0}
IN_32_BITS = ("cpu", "multi_cpu", "fsdp2")


@dataclass(frozen=True)
class Start:
    """How a training is started.

    Attributes:
        config: Name of a configuration.
        num_processes: Number of processes, on all machines together.
        machines: `one`, `two` on the loopback of this machine, or two `namespaces`.
    """

    config: str
    num_processes: int
    machines: str = "one"

    def __str__(self) -> str:
        where = {"one": "", "two": " on two machines", "namespaces": " in two network namespaces"}[self.machines]
        return f"`{self.config}`, {self.num_processes} process{'es' * (self.num_processes > 1)}{where}"


@dataclass(frozen=True)
class Case:
    """A row of the table: how the training begins, and how it goes on after it was killed."""

    first: Start
    then: Start
    family: str
    flags: dict[str, Any]


CASES = [
    Case(Start("cpu", 1), Start("multi_cpu", 2), "beit", EMA),
    Case(Start("multi_cpu", 2), Start("multi_cpu", 3), "upernet", EMA),
    Case(Start("single_gpu", 1), Start("multi_gpu", 2), "segformer", EMA),
    Case(Start("multi_node", 2, "two"), Start("multi_cpu", 3), "segformer", EMA),
    Case(Start("multi_node", 2, "namespaces"), Start("multi_node", 4, "namespaces"), "segformer", EMA),
    Case(Start("fsdp2", 2), Start("fsdp2", 3), "segformer", NO_EMA),
    Case(Start("fsdp2", 3), Start("fsdp2", 2), "upernet", NO_EMA),
    Case(Start("fsdp2", 2), Start("fsdp2", 1), "dpt", NO_EMA),
]


def launch(start: Start, folder: Path, words: list[str], machines: Machines, hub: LoopbackHub) -> Launch:
    """Start a training. In a namespace, the Hub of this machine cannot be reached."""
    program = FSDP_ON_CPU if start.config == "fsdp2" else RUN
    publish = [] if machines.namespaces else ["--push_to_hub", "--hub_model_id", REPO_ID]
    commands = accelerate_commands(start.config, [*words, *publish], start.num_processes, machines, program)
    return Launch(folder, commands, hub.environment() | machines.environment())


def scores_of(run: Path) -> dict[str, float]:
    """Return the scores of a finished run, with all digits, and without the validation loss.

    The loss is a mean over batches, so it depends on how the slices are divided into batches.
    """
    scores = json.loads((run / "run.json").read_text())["scores"]
    return {name: value for name, value in scores.items() if name != "eval_loss"}


def kill_and_resume(case: Case, words: list[str], run: Path, folder: Path, hub: LoopbackHub) -> tuple[float, bool]:
    """Run the training of a case.

    Returns:
        The seconds from the death of a process until all launchers had ended, and whether the model was published.
    """
    places = {"one": Machines(), "two": Machines(2)}
    with ExitStack() as stack:
        if "namespaces" in (case.first.machines, case.then.machines):
            places["namespaces"] = stack.enter_context(two_namespaces())
        with launch(case.first, folder / "first", words, places[case.first.machines], hub) as started:
            started.wait_for(run / "checkpoint-3")
            started.kill(rank=case.first.num_processes - 1)
            killed = time.monotonic()
            assert all(started.wait(60)), "a launcher ended without an error"
            seconds = time.monotonic() - killed
        with launch(case.then, folder / "then", words, places[case.then.machines], hub) as started:
            assert not any(started.wait()), started.said()[-3000:]
            assert started.said().count("Resuming from") == 1, started.said()[-3000:]
            assert started.printed().count("best checkpoint:") == 1, started.printed()
            return seconds, "published:" in started.printed()


def try_case(case: Case, dataset_dir: Path, folder: Path, hub: LoopbackHub) -> list[str]:
    """Run a case, and return the cells of its row.

    Raises:
        AssertionError: If something does not go as it should. The message has the output.
    """
    # A model that predicts some pixels of each organ, so that the scores are not 0.
    run, model = folder / "run", save_model(folder / "model", case.family, seed=0)
    if case.family == "upernet":
        change_config(model, use_auxiliary_head=True)
    flags = {"model_type": None, "config_overrides": None, "model_name_or_path": model, "learning_rate": 1e-4}
    flags |= {"head_lr_multiplier": 10, "save_total_limit": 9, **case.flags}
    words = arguments(dataset_dir, run, case.family, max_steps=STEPS, **flags)
    seconds, published = kill_and_resume(case, words, run, folder, hub)
    scores = scores_of(run)
    # With bfloat16, the settings of the GPUs, a model computes something else.
    single, several = ("cpu", "multi_cpu") if case.then.config in IN_32_BITS else ("single_gpu", "multi_gpu")
    again = Start(single, 1) if case.then.num_processes > 1 else Start(several, 2)
    with launch(again, folder / "again", words, Machines(), hub) as started:
        assert not any(started.wait()), started.said()[-3000:]
        assert "scoring its best checkpoint" in started.said()
    greatest = max(abs((value or 0) - (scores[name] or 0)) for name, value in scores_of(run).items())
    outcome = f"differ by {greatest:.0e}" if greatest else "identical"
    return [
        str(case.first),
        case.family
        + (", auxiliary head" if case.family == "upernet" else "")
        + (", averaged weights" if case.flags == EMA else ""),
        f"{seconds:.1f} s",
        str(case.then),
        f"`{again.config}`: {outcome} (Dice {scores['eval_dice']:.4f})",
        "yes" if published else "no Hub there",
    ]


def make_table(dataset_dir: Path, scratch: Path) -> str:
    """Return the outcome of each case as a table."""
    lines = [
        "| begun with | model | ended after the kill in | gone on with | scored again with | published |",
        "|---|---|---|---|---|---|",
    ]
    for number, case in enumerate(CASES):
        folder = scratch / str(number)
        with LoopbackHub(folder / "hub") as hub:
            try:
                cells = try_case(case, dataset_dir, folder, hub)
            except OSError as error:
                cells = [str(case.first), case.family, f"not run: {error}", str(case.then), "", ""]
        lines.append(f"| {' | '.join(cells)} |")
        print(lines[-1], flush=True)
    return "\n".join(lines) + "\n"


def main() -> None:
    """Write the table into the page."""
    from dataset_builder.build import build
    from dataset_builder.gi_tract import GiTractConfig
    from dataset_builder.phantom import write_phantom

    with tempfile.TemporaryDirectory() as name:
        scratch = Path(name)
        os.environ |= {"HF_HOME": str(scratch / "hf"), "HF_HUB_DISABLE_XET": "1", "OMP_NUM_THREADS": "1"}
        write_phantom(scratch / "kaggle", num_cases=4, days_per_case=1, slices_per_scan=12, num_proc=1)
        build(scratch / "kaggle", scratch / "gi_tract", GiTractConfig(num_folds=2), num_proc=1)
        table = make_table(scratch / "gi_tract", scratch)
    replace_table(PAGE, START, table)


if __name__ == "__main__":
    main()
