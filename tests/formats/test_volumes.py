"""A volume of any orientation becomes the slices of the training, and masks go back to the voxel."""

import nibabel
import numpy as np
import pytest

from gi_segmentation.errors import InputError
from gi_segmentation.formats.volumes import (
    Volume,
    VolumeSlice,
    cut_window,
    list_slices,
    native_grid,
    read_intensities,
    to_intensities,
)
from tests.support.volumes import ORIENTATIONS, rotation, store


def make_volume(voxels: np.ndarray, affine: np.ndarray) -> Volume:
    return Volume("scan", __file__, voxels.shape, affine, read=lambda: voxels.astype(np.float32))  # type: ignore[arg-type]


class TestOrientation:
    @pytest.mark.parametrize(("order", "flipped"), ORIENTATIONS)
    def test_each_way_to_store_a_volume_gives_the_same_slices(
        self, order: tuple[int, ...], flipped: tuple[int, ...]
    ) -> None:
        # Columns to the left, rows to the back, slices to the feet.
        plain = np.arange(2 * 3 * 4).reshape(4, 3, 2)
        affine = np.diag([-300.0, -200.0, -100.0, 1.0])
        volume = make_volume(*store(plain, affine, order, flipped))
        assert volume.training_shape == (2, 3, 4) and volume.spacing_mm == (100, 200, 300)
        voxels = volume.read()  # type: ignore[misc]
        np.testing.assert_array_equal(volume.to_training(voxels), plain.transpose(2, 1, 0))
        np.testing.assert_array_equal(volume.to_native(volume.to_training(voxels)), voxels)

    @pytest.mark.parametrize("degrees", [0, 10, 30, 40])
    def test_a_tilted_volume_gets_the_orientation_that_nibabel_finds(self, degrees: float) -> None:
        rng = np.random.default_rng(int(degrees))
        for order, flipped in ORIENTATIONS:
            affine = np.diag([-1.5, -1.5, -3, 1])
            affine[:3, :3] = rotation(rng, degrees) @ affine[:3, :3]
            voxels, affine = store(rng.random((5, 6, 7)), affine, order, flipped)
            volume = make_volume(voxels, affine)
            ours = volume.to_training(voxels)
            wanted = nibabel.orientations.axcodes2ornt("IPL")
            change = nibabel.orientations.ornt_transform(nibabel.io_orientation(affine), wanted)
            np.testing.assert_array_equal(ours, nibabel.orientations.apply_orientation(voxels, change))
            assert volume.tilt_degrees <= degrees + 1e-4

    def test_a_line_says_where_the_axes_point(self) -> None:
        volume = make_volume(np.zeros((4, 3, 2)), np.diag([-100, -150, 3, 1]))
        assert volume.describe() == "2 x 3 x 4 slices x rows x columns of 3.00 x 150.00 x 100.00 mm, axes LPS"

    @pytest.mark.parametrize("affine", [np.zeros((4, 4)), np.full((4, 4), np.nan), np.diag([1, 1, 0, 1])])
    def test_an_affine_that_is_no_grid_is_refused(self, affine: np.ndarray) -> None:
        with pytest.raises(InputError, match="not that of a grid"):
            make_volume(np.zeros((2, 2, 2)), affine)


class TestWindow:
    @pytest.mark.parametrize(
        ("pixels", "spacing_mm", "expected"),
        [
            (266, 1.5, 266),
            (360, 1.5, 310),
            (100, 1.0, 351),
            (600, 1.0, 465),
            (500, 1.0, 500),
            (330, 1.0, 330),
            (90, 5.0, 90),
            (1, 1.0, 351),
        ],
    )
    def test_rows_get_a_field_of_view_of_the_training(self, pixels: int, spacing_mm: float, expected: int) -> None:
        volume = make_volume(np.zeros((266, pixels, 2)), np.diag([-1.5, -spacing_mm, -3, 1]))
        (top, left), (height, width) = volume.window
        assert (height, left, width) == (expected, 0, 266)
        assert top == (pixels - expected) // 2

    def test_masks_come_back_from_a_padded_and_a_cropped_window(self) -> None:
        rng = np.random.default_rng(0)
        for shape, spacing in (((9, 8, 3), (20, 30)), ((40, 50, 2), (20, 20)), ((9, 50, 3), (20, 20))):
            volume = make_volume(rng.random(shape), np.diag([-spacing[0], spacing[1], -3, 1]))
            slices = list_slices([volume])
            (top, left), size = volume.window
            truth = rng.random((3, *volume.training_shape)) > 0.5
            predictions = [(one, cut_window(truth[:, one.number - 1], (top, left), size)) for one in slices]
            assert all(masks.shape[1:] == one.read_pixels().shape == size for one, masks in predictions)
            found = native_grid(volume, predictions)
            # A row or column is empty outside of the window, and as it was inside.
            seen = np.zeros(volume.training_shape, dtype=bool)
            seen[:, max(top, 0) : top + size[0], max(left, 0) : left + size[1]] = True
            expected = np.stack([volume.to_native(organ & seen) for organ in truth])
            np.testing.assert_array_equal(found, expected)
            assert found.shape == (3, *shape) and found.any()


class TestIntensities:
    def test_whole_numbers_from_0_on_stay_as_they_are(self) -> None:
        voxels = np.random.default_rng(0).integers(0, 5000, (4, 4, 4)).astype(np.float32)
        np.testing.assert_array_equal(to_intensities(voxels), voxels)

    def test_ct_gets_air_of_0(self) -> None:
        voxels = np.full((10, 10, 10), -1024, dtype=np.float32)
        voxels[3:6] = 40
        assert sorted(np.unique(to_intensities(voxels))) == [0, 1064]

    def test_a_few_negative_voxels_do_not_lift_the_air(self) -> None:
        voxels = np.zeros((10, 10, 10), dtype=np.float32)
        voxels[0, 0, :5], voxels[5] = -80, 900
        assert sorted(np.unique(to_intensities(voxels))) == [0, 900]

    def test_a_black_volume_stays_black(self) -> None:
        assert not to_intensities(np.zeros((2, 2, 2), dtype=np.float32)).any()

    def test_a_volume_without_a_number_is_refused(self) -> None:
        volume = make_volume(np.full((2, 2, 2), np.inf), np.eye(4))
        with pytest.raises(InputError, match="no finite intensity"):
            read_intensities(volume)


def test_a_slice_has_the_thickness_of_its_volume() -> None:
    one = VolumeSlice(make_volume(np.zeros((3, 3, 3)), np.diag([-150.0, 5.0, 160.0, 1])), 1)
    assert (one.thickness_mm, one.pixel_spacing) == (160, (5, 150))
