"""Which run can go on from which checkpoint. `test_accelerate.py` trains with FSDP."""

import contextlib
from pathlib import Path
from types import SimpleNamespace

import pytest

from gi_segmentation.errors import InputError
from gi_segmentation.publishing.facts import prepare_output_dir
from gi_segmentation.training.sharding import check_optimizer


@pytest.fixture
def checkpoint(tmp_path: Path) -> Path:
    return tmp_path / "checkpoint-3"


def write(checkpoint: Path, *names: str) -> None:
    for name in names:
        (checkpoint / name).parent.mkdir(parents=True, exist_ok=True)
        (checkpoint / name).touch()


def test_a_checkpoint_of_the_same_kind_is_accepted(checkpoint: Path) -> None:
    write(checkpoint, "optimizer.pt")
    check_optimizer(checkpoint, None, 3)


def test_a_checkpoint_of_another_kind_is_refused(checkpoint: Path) -> None:
    write(checkpoint, "optimizer.bin", "pytorch_model_fsdp.bin")
    check_optimizer(checkpoint, "FSDP", 5)
    with pytest.raises(InputError, match=r"the run used FSDP; take the --config_file with which it began"):
        check_optimizer(checkpoint, None, 2)


def test_a_checkpoint_without_an_optimizer_is_refused(checkpoint: Path) -> None:
    write(checkpoint, "model.safetensors")
    with pytest.raises(InputError, match=r"has no state of the optimizer"):
        check_optimizer(checkpoint, None, 1)


def test_deepspeed_goes_on_with_the_same_number_of_processes_only(checkpoint: Path) -> None:
    write(checkpoint, *(f"global_step3/bf16_zero_pp_rank_{rank}_mp_rank_00_optim_states.pt" for rank in range(2)))
    check_optimizer(checkpoint, "DeepSpeed", 2)
    with pytest.raises(InputError, match=r"by 2 processes.*but got 4; set --num_processes 2"):
        check_optimizer(checkpoint, "DeepSpeed", 4)


def test_a_machine_that_does_not_share_the_folder_says_so_before_the_training(tmp_path: Path) -> None:
    class Arguments(SimpleNamespace):
        def main_process_first(self, local: bool, desc: str) -> object:
            return contextlib.nullcontext()

    run_args = Arguments(output_dir=str(tmp_path / "run"), process_index=8)
    with (
        pytest.raises(InputError, match=r"process 8 does not see the folder .* all machines of this run share"),
        prepare_output_dir(run_args, facts=None),  # type: ignore[arg-type]
    ):
        pytest.fail("the training began")
    assert not (tmp_path / "run").exists()
