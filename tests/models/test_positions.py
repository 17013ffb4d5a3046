"""Tables of positions are interpolated for another input size, and the rows of the class token stay."""

import pytest
import torch

from gi_segmentation.errors import InputError
from gi_segmentation.models.positions import resize_table


def test_position_embeddings_solved_by_hand() -> None:
    # The table has a class token (9) and a grid of 1 x 1 positions (4). Enlarged to 3 x 3, all nine positions are
    # 4, and the class token stays.
    table = torch.tensor([[[9.0], [4.0]]])
    assert resize_table("dpt.embeddings.position_embeddings", table, 10).flatten().tolist() == [9.0] + [4.0] * 9


@pytest.mark.parametrize("name", ["dpt.embeddings.position_embeddings", "beit.embeddings.position_embeddings"])
def test_a_ramp_stays_a_ramp(name: str) -> None:
    ramp = torch.arange(8.0).expand(8, 8).reshape(64, 1)
    table = torch.cat([torch.tensor([[-1.0]]), ramp])[None]
    resized = resize_table(name, table, 1 + 16 * 16)[0]
    assert resized[0].item() == -1
    # The ramp rises by 1 per position. With twice as many positions it rises by 1/2, and the first one lies 1/4
    # before the old first one. Bicubic interpolation bends the ends, so only the inner part is compared.
    inner = resized[1:].reshape(16, 16)[3:-3, 3:-3]
    torch.testing.assert_close(inner, (torch.arange(16.0) / 2 - 0.25).expand(16, 16)[3:-3, 3:-3], atol=0.05, rtol=0)


def test_relative_biases_keep_the_entries_of_the_class_token() -> None:
    table = torch.randn(7 * 7 + 3, 2)
    name = "beit.layers.0.relative_position_bias_table"
    resized = resize_table(name, table, 11 * 11 + 3)
    assert resized.shape == (11 * 11 + 3, 2) and torch.equal(resized[-3:], table[-3:])
    centre = resized[:-3].reshape(11, 11, 2)[5, 5]
    # The middle of the table is the bias of a position to itself, on each grid.
    torch.testing.assert_close(centre, table[:-3].reshape(7, 7, 2)[3, 3])
    torch.testing.assert_close(resize_table(name, table, 7 * 7 + 3), table)


def test_tensors_that_are_not_position_tables_are_refused() -> None:
    with pytest.raises(InputError, match="cannot be interpolated"):
        resize_table("encoder.weight", torch.zeros(4, 4), 9)
    with pytest.raises(InputError, match="no square"):
        resize_table("dpt.embeddings.position_embeddings", torch.zeros(1, 7, 2), 10)
