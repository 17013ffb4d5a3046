"""The parts of `transformers` and `datasets` that this project uses and that are not public.

A new release may change them. Then one of these tests fails, and its message says what changed and where to correct
it.
"""

import copy
import inspect
import multiprocessing
import re
import time
from typing import Any

import datasets.load
import pytest
import torch
import transformers
from transformers import (
    SegformerConfig,
    SegformerForSemanticSegmentation,
    Trainer,
    UperNetConfig,
    UperNetForSemanticSegmentation,
)
from transformers.modeling_layers import GradientCheckpointingLayer
from transformers.models.convnext.modeling_convnext import ConvNextLayer

from gi_segmentation import internals
from gi_segmentation.labels import GI_TRACT, LabelMode
from tests.support.models import FAMILIES
from tests.support.processes import ROOT

VERSION = f"transformers {transformers.__version__}"
PLACE = "correct gi_segmentation/internals.py, or narrow the range of transformers in setup.cfg"


def calls(function: object, name: str) -> bool:
    """Return whether the source of a function calls a method of its own object."""
    return f"self.{name}(" in inspect.getsource(function)  # type: ignore[arg-type]


def test_a_resumed_run_loads_by_our_method() -> None:
    assert calls(Trainer.train, "_load_from_checkpoint"), (
        f"{VERSION}: Trainer.train no longer calls _load_from_checkpoint, so a resumed run would keep the weights it "
        f"started from; {PLACE}"
    )
    parameters = list(inspect.signature(Trainer._load_from_checkpoint).parameters)
    ours = list(inspect.signature(internals.CheckpointLoading._load_from_checkpoint).parameters)
    assert parameters == ours, f"{VERSION}: Trainer._load_from_checkpoint takes {parameters}, ours {ours}; {PLACE}"


def test_the_best_checkpoint_is_loaded_by_our_method() -> None:
    assert "self._load_best_model()" in inspect.getsource(Trainer), (
        f"{VERSION}: Trainer no longer calls _load_best_model, so SegFormer would end with most of the last weights; "
        f"{PLACE}"
    )


def test_the_trainer_knows_its_batch_size() -> None:
    assert "self._train_batch_size =" in inspect.getsource(Trainer), (
        f"{VERSION}: Trainer no longer keeps _train_batch_size, which --auto_find_batch_size changes; {PLACE}"
    )


def test_convnext_layers_can_become_checkpointed_ones() -> None:
    model = UperNetForSemanticSegmentation(UperNetConfig(**FAMILIES["upernet"]))
    number = sum(type(module) is ConvNextLayer for module in model.modules())
    assert number and internals.checkpoint_convnext_layers(model) == number, (
        f"{VERSION}: the layers of a ConvNeXt backbone are no longer of the class ConvNextLayer; {PLACE}"
    )
    assert sum(isinstance(module, GradientCheckpointingLayer) for module in model.modules()) >= number
    assert not issubclass(ConvNextLayer, GradientCheckpointingLayer), (
        f"{VERSION}: ConvNextLayer can be checkpointed now; remove checkpoint_convnext_layers"
    )


@pytest.mark.parametrize("label_mode", ["multiclass", "multilabel"])
def test_the_fast_head_of_a_segformer_computes_the_same(label_mode: LabelMode) -> None:
    torch.manual_seed(0)
    config = SegformerConfig(**FAMILIES["segformer"] | {"num_labels": len(GI_TRACT.channels(label_mode))})
    stock = SegformerForSemanticSegmentation(config).train()
    fast = copy.deepcopy(stock)
    assert internals.speed_up_segformer_head(fast), f"{VERSION}: a SegFormer has another head; {PLACE}"
    # Dropout draws other pixels in each call.
    for model in (stock, fast):
        model.decode_head.dropout.p = 0.0
        for layer in model.modules():
            if type(layer).__name__ == "SegformerDropPath":
                layer.drop_prob = 0.0
    # No side is a multiple of 32, so no scale is an exact half of the one before.
    images = torch.randn(3, 3, 72, 104)
    expected, logits = (model(pixel_values=images).logits for model in (stock, fast))
    torch.testing.assert_close(logits, expected, atol=1e-5, rtol=1e-5, msg=lambda m: f"{VERSION}: {m}; {PLACE}")
    # The logits are not all near zero, where any result would do.
    assert expected.std() > 0.01
    expected.square().sum().backward()
    logits.square().sum().backward()
    for (name, left), right in zip(stock.named_parameters(), fast.parameters(), strict=True):
        assert left.grad is not None and right.grad is not None, name
        torch.testing.assert_close(right.grad, left.grad, atol=1e-4, rtol=1e-3, msg=lambda m, n=name: f"{n}: {m}")
    assert stock.state_dict().keys() == fast.state_dict().keys()
    # In evaluation mode, batch normalisation takes its running statistics.
    expected, logits = (model.eval()(pixel_values=images).logits for model in (stock, fast))
    torch.testing.assert_close(logits, expected, atol=1e-5, rtol=1e-5)


def test_only_a_segformer_has_a_fast_head() -> None:
    assert not internals.speed_up_segformer_head(UperNetForSemanticSegmentation(UperNetConfig(**FAMILIES["upernet"])))


def test_datasets_calls_the_function_that_we_replace() -> None:
    assert "dataset_module_factory(" in inspect.getsource(datasets.load.load_dataset_builder), (
        f"datasets {datasets.__version__}: load_dataset no longer asks dataset_module_factory, so that the name "
        f"gi_tract would not be found; {PLACE}"
    )


@pytest.mark.parametrize("path", sorted((ROOT / "gi_segmentation").rglob("*.py")), ids=lambda path: path.name)
def test_no_other_module_uses_private_names(path: object) -> None:
    if path == ROOT / "gi_segmentation" / "internals.py":
        return
    text = path.read_text(encoding="utf-8")  # type: ignore[attr-defined]
    # Find names with one underscore in front, and keep those that a Trainer has.
    names = set(re.findall(r"(?:self|trainer|super\(\)|args|accelerator|state)\.(_[a-z]\w*)", text))
    private = {name for name in names if hasattr(Trainer, name)}
    assert not private, f"{path}: {sorted(private)} belong into gi_segmentation/internals.py"
    assert "__class__ =" not in text


def test_a_process_that_cannot_send_a_batch_ends() -> None:
    context = multiprocessing.get_context("fork")

    def lose(queue: Any) -> None:
        internals.end_if_a_batch_is_lost()
        queue.put(lambda: None)  # cannot be pickled
        time.sleep(60)

    process = context.Process(target=lose, args=(context.Queue(),))
    process.start()
    process.join(30)
    assert process.exitcode == 1
