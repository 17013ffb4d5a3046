"""Connected components below the limits disappear."""

from collections.abc import Sequence

import numpy as np
import pytest

from gi_segmentation.postprocessing.cleaning import clean_masks
from gi_segmentation.postprocessing.components import find_components
from gi_segmentation.postprocessing.limits import Postprocessing
from tests.support.postprocessing import limit

# A voxel of 2.5 x 20 x 20 mm has 1,000 mm³, which is 1 ml. So the volume in ml is the number of voxels.
ONE_ML = (2.5, 20.0, 20.0)


def clean_stomach(
    voxels: dict[tuple[int, int, int], float], settings: Postprocessing, numbers: Sequence[int] = (1, 2, 3)
) -> set[tuple[int, ...]]:
    """Return which voxels of a stomach stay. The voxels are given with their probabilities."""
    masks, probabilities = np.zeros((3, 3, 4, 8), dtype=bool), np.zeros((3, 3, 4, 8), dtype=np.float16)
    for place, probability in voxels.items():
        # The other organs have the same mask, and no limits.
        masks[(slice(None), *place)] = True
        probabilities[(slice(None), *place)] = probability
    cleaned = clean_masks(masks, probabilities, ONE_ML, numbers, settings, "multilabel")
    assert cleaned.dtype == bool and np.array_equal(cleaned[:2], masks[:2])
    return {tuple(place) for place in np.argwhere(cleaned[2]).tolist()}


class TestComponents:
    def test_a_component_below_the_volume_disappears(self) -> None:
        large, small = {(0, 0, x): 1.0 for x in (0, 1, 2)}, {(0, 0, x): 1.0 for x in (5, 6)}
        assert clean_stomach({**large, **small}, limit(2.5)) == large.keys()
        # A component that is exactly as large as the limit stays.
        assert clean_stomach({**large, **small}, limit(2.0)) == large.keys() | small.keys()
        assert clean_stomach({**large, **small}, limit(3.5)) == set()

    def test_a_component_below_the_confidence_disappears(self) -> None:
        # The means are 0.75 and 0.625. The first has a voxel of lower probability than the second one has.
        sure, doubtful = {(0, 0, 0): 1.0, (0, 0, 1): 0.5}, {(0, 0, 5): 0.625}
        assert clean_stomach({**sure, **doubtful}, limit(0, 0.7)) == sure.keys()
        assert clean_stomach({**sure, **doubtful}, limit(0, 0.625)) == sure.keys() | doubtful.keys()
        # Each limit is enough to remove a component.
        assert clean_stomach({**sure, **doubtful}, limit(1.5, 0.8)) == set()

    def test_a_corner_joins_voxels_of_two_slices(self) -> None:
        diagonal = {(0, 0, 0): 1.0, (1, 1, 1): 1.0, (2, 2, 2): 1.0}
        assert clean_stomach(diagonal, limit(3.0)) == diagonal.keys()
        # Two columns apart is not a neighbour.
        assert clean_stomach({(0, 0, 0): 1.0, (1, 0, 2): 1.0}, limit(2.0)) == set()

    def test_a_gap_between_slices_does_not_join(self) -> None:
        column = {(0, 0, 0): 1.0, (1, 0, 0): 1.0, (2, 0, 0): 1.0}
        assert clean_stomach(column, limit(3.0), numbers=(7, 8, 9)) == column.keys()
        assert clean_stomach(column, limit(2.0), numbers=(7, 8, 10)) == {(0, 0, 0), (1, 0, 0)}
        assert clean_stomach(column, limit(2.0), numbers=(7, 10, 13)) == set()

    def test_components_of_a_random_volume_equal_a_search_voxel_by_voxel(self) -> None:
        random = np.random.default_rng(0)
        mask, probability = random.random((7, 9, 8)) < 0.1, random.random((7, 9, 8))
        numbers = np.array([1, 2, 3, 5, 6, 7, 8])
        found = find_components(mask, probability, ONE_ML, numbers.tolist())
        places = [tuple(place) for place in np.argwhere(mask)]
        remaining, components = set(places), []
        while remaining:
            grown, border = set(), [remaining.pop()]
            while border:
                here = border.pop()
                grown.add(here)
                near = {p for p in remaining if abs(numbers[p[0]] - numbers[here[0]]) <= 1}
                near = {p for p in near if max(abs(p[1] - here[1]), abs(p[2] - here[2])) <= 1}
                remaining -= near
                border += near
            components.append(grown)
        assert len(components) == len(found.volumes_ml) > 5
        for component in components:
            (label,) = {int(found.labels[place]) for place in component}
            assert found.volumes_ml[label - 1] == pytest.approx(len(component))
            mean = sum(probability[place] for place in component) / len(component)
            assert found.confidences[label - 1] == pytest.approx(mean)

    def test_half_precision_does_not_add_up(self) -> None:
        # A sum of 40,000 halves in half precision would stop growing at 1,024.
        mask = np.ones((1, 200, 200), dtype=bool)
        found = find_components(mask, np.full(mask.shape, 0.5, dtype=np.float16), ONE_ML, [1])
        assert found.confidences.tolist() == [0.5]
