"""The auxiliary head is used in training only, and is neither scored nor saved."""

from pathlib import Path

import pytest
import torch

from gi_segmentation.models.heads import all_logits, return_auxiliary_logits, without_auxiliary_head
from gi_segmentation.models.loading import load_checkpoint
from tests.support.models import SIZE, new_model


def test_auxiliary_logits_are_returned_only_in_training() -> None:
    for family in ("upernet", "beit", "dpt"):
        model, _ = new_model(family)
        return_auxiliary_logits(model)
        images = torch.randn(2, 3, SIZE, SIZE)
        head, auxiliary = all_logits(model.train()(pixel_values=images))
        assert head.shape[:2] == auxiliary.shape[:2] == (2, 4)
        auxiliary.sum().backward()
        assert all(p.grad is not None for p in model.auxiliary_head.parameters())
        assert len(all_logits(model.eval()(pixel_values=images))) == 1


@pytest.mark.parametrize("family", ["upernet", "beit", "dpt"])
def test_a_model_is_saved_without_its_auxiliary_head_and_keeps_it(family: str, tmp_path: Path) -> None:
    model, processor = new_model(family)
    images = torch.randn(2, 3, SIZE, SIZE)
    expected = model.eval()(pixel_values=images).logits
    names = set(model.state_dict())
    with without_auxiliary_head(model):
        torch.testing.assert_close(model(pixel_values=images).logits, expected)
        model.save_pretrained(tmp_path)
        processor.save_pretrained(tmp_path)
    assert set(model.state_dict()) == names and model.config.use_auxiliary_head
    loaded, _ = load_checkpoint(str(tmp_path))
    assert set(loaded.state_dict()) == {name for name in names if not name.startswith("auxiliary_head")}
    torch.testing.assert_close(loaded(pixel_values=images).logits, expected)
