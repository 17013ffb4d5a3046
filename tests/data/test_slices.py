"""From slices to tensors: no intensity is clipped, no label is new, and unusable datasets are refused."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from datasets import Dataset, DatasetDict, load_dataset
from transformers import SegformerImageProcessorPil

from gi_segmentation.arguments import DataArguments, ModelArguments
from gi_segmentation.data.intensity import MAX_PIXEL, scale_intensity, to_intensity, to_pixels
from gi_segmentation.data.preprocessing import prepare_image, resize_image, resize_organs
from gi_segmentation.data.sampling import shown_organs
from gi_segmentation.data.slices import load_slices, select_samples, transform_splits
from gi_segmentation.data.transforms import normalize, unpack_labels
from gi_segmentation.errors import InputError
from gi_segmentation.formats.volumes import to_intensities, to_whole_intensities
from gi_segmentation.labels import GI_TRACT
from gi_segmentation.models.loading import new_processor
from gi_segmentation.rle import encode, organ_masks

SIZE = 64


@pytest.fixture(scope="module")
def slices(dataset_dir: Path) -> DatasetDict:
    return load_slices(DataArguments(dataset_name=str(dataset_dir)))


def transformed(slices: DatasetDict, label_mode: str = "multiclass", **settings: Any) -> tuple[Dataset, Dataset]:
    """Return the training and the validation slices, ready for a model."""
    arguments = ModelArguments(label_mode=label_mode), DataArguments(**settings)
    return transform_splits(slices, slices, new_processor(SIZE), *arguments, seed=0)


def pixel_values_by_the_card(raw: np.ndarray, processor: Any, size: int) -> torch.Tensor:
    """Compute pixel values by the lines of the model card."""
    scaled = torch.from_numpy(raw.astype("float32"))
    image = (scaled / (scaled + scaled.mean().clamp(min=1))).expand(1, 3, -1, -1)
    image = torch.nn.functional.interpolate(image, (size, size), mode="bilinear", antialias=True)
    image = (image * 65535).round() / 65535
    return processor(image, do_resize=False, do_rescale=False, return_tensors="pt")["pixel_values"][0]


class TestPixels:
    def test_sixteen_bits_are_scaled_without_clipping(self) -> None:
        raw = np.arange(65536, dtype=np.uint16).reshape(256, 256)
        scaled = scale_intensity(raw)
        assert scaled.dtype == np.float32 and scaled.min() == 0
        # The slice has each value from 0 to 65535 once, so its mean is 32767.5.
        np.testing.assert_allclose(scaled, raw / (raw + 32767.5), rtol=1e-6)
        assert (np.diff(scaled.ravel()) > 0).all()

    @pytest.mark.parametrize(("low", "high"), [(-1000, 3000), (0, 1), (-2.5, 2.5), (0, 4095), (0, 90_000)])
    def test_a_training_on_converted_slices_sees_what_a_prediction_sees(self, low: float, high: float) -> None:
        # CT, fractions, standardised MR, whole numbers, and more than 16 bits.
        voxels = np.random.default_rng(0).uniform(low, high, (3, 40, 50)).astype(np.float32)
        voxels = np.rint(voxels) if high - low > 100 else voxels
        whole, _, _ = to_whole_intensities(voxels)
        for converted, predicted in zip(whole, to_intensities(voxels), strict=True):
            np.testing.assert_allclose(scale_intensity(converted), scale_intensity(predicted), atol=2e-5)

    def test_a_bright_spot_hardly_changes_the_rest_of_the_slice(self) -> None:
        raw = np.random.default_rng(0).integers(0, 2000, (266, 266)).astype(np.uint16)
        spotted = raw.copy()
        spotted[:8, :8] = 20_000
        # 64 pixels of 20,000 raise the mean of about 1,000 by about 17, or 2 %. Scaling by the maximum would make all
        # other pixels ten times as dark.
        np.testing.assert_allclose(scale_intensity(spotted)[8:], scale_intensity(raw)[8:], atol=0.005)

    def test_every_pixel_survives_the_way_to_an_intensity_and_back(self) -> None:
        pixels = np.arange(MAX_PIXEL + 1, dtype=np.uint16).reshape(256, 256)
        intensity = to_intensity(pixels)
        assert intensity.dtype == np.float32 and (intensity.min(), intensity.max()) == (0, 1)
        np.testing.assert_array_equal(to_pixels(intensity), pixels)
        # To the nearest pixel, and not down: an augmentation must not darken a slice.
        np.testing.assert_array_equal(
            to_pixels((np.float32([9.4, 9.6, 65534.7])) / np.float32(MAX_PIXEL)), [9, 10, 65535]
        )

    @pytest.mark.parametrize("dtype", [np.uint16, np.int32, np.uint8])
    def test_a_black_slice_stays_black(self, dtype: type) -> None:
        scaled = scale_intensity(np.zeros((3, 4), dtype=dtype))
        assert scaled.dtype == np.float32 and not scaled.any()

    @pytest.mark.parametrize("shape", [(266, 266), (310, 360), (40, 30)])
    @pytest.mark.parametrize("kind", ["bright", "dark", "black"])
    def test_pixel_values_equal_those_of_the_model_cards_lines(self, shape: tuple[int, int], kind: str) -> None:
        top = {"bright": 65535, "dark": 300, "black": 0}[kind]
        raw = np.random.default_rng(0).integers(0, top + 1, shape).astype(np.uint16)
        processor = new_processor(SIZE, mean=[0.1, 0.2, 0.3], std=[0.4, 0.5, 0.6])
        images = torch.from_numpy(prepare_image(raw, SIZE))[None, ..., None]
        (values,) = normalize(images, processor)
        assert (values.shape, values.dtype) == ((3, SIZE, SIZE), torch.float32)
        torch.testing.assert_close(values, pixel_values_by_the_card(raw, processor, SIZE), atol=2e-6, rtol=0)

    def test_shrinking_an_image_averages_its_pixels(self) -> None:
        chequered = np.indices((128, 128)).sum(axis=0) % 2
        # A checkerboard of 0 and 1 becomes grey. If single pixels were picked, it would stay 0 or 1.
        np.testing.assert_allclose(resize_image(chequered.astype(np.float32), 32)[2:-2, 2:-2], 0.5, atol=0.01)

    def test_resizing_labels_takes_the_nearest_pixel(self) -> None:
        labels = np.array([[0, 3], [1, 2]], dtype=np.uint8)
        np.testing.assert_array_equal(resize_organs(labels, 6), labels.repeat(3, axis=0).repeat(3, axis=1))
        wide = np.repeat([[1, 3]], 50, axis=1).repeat(70, axis=0).astype(np.uint8)
        small = resize_organs(wide, 10)
        assert (small[:, :5] == 1).all() and (small[:, 5:] == 3).all() and small.dtype == np.uint8

    def test_resized_image_and_labels_still_fit(self) -> None:
        labels = np.zeros((266, 310), dtype=np.uint8)
        labels[60:200, 100:250] = 1
        image = resize_image(labels.astype(np.float32), SIZE)
        assert ((image > 0.5) == (resize_organs(labels, SIZE) == 1)).mean() > 0.99


class TestOrganMasks:
    def test_overlaps_are_kept(self) -> None:
        masks = np.zeros((3, 4, 5), dtype=bool)
        masks[0, :2] = masks[2, 1:] = True
        decoded = organ_masks(dict(zip(GI_TRACT.names, map(encode, masks), strict=True)), height=4, width=5)
        np.testing.assert_array_equal(decoded, masks)
        assert (decoded.sum(axis=0) == 2).sum() == 5

    def test_validation_rows_tell_which_slice_they_are(self, slices: DatasetDict) -> None:
        _, validation = transformed(slices)
        overlapping = 0
        for row, example in zip(slices["validation"], validation, strict=True):
            assert example["slice_id"].tolist() == [row["case"], row["day"], row["slice"]]
            assert example["native_size"].tolist() == [row["height"], row["width"]]
            labels = np.array(row["annotation"])
            masks = organ_masks(row["segmentation"], row["height"], row["width"])
            ids = unpack_labels(example["organs"][None], "multiclass", 3)[0]
            np.testing.assert_array_equal(ids.numpy(), resize_organs(labels, SIZE))
            both = unpack_labels(example["organs"][None], "multilabel", 3)[0]
            for mask, resized in zip(masks, both, strict=True):
                np.testing.assert_array_equal(resized.numpy(), resize_organs(mask.astype(np.uint8), SIZE))
            np.testing.assert_array_equal(masks.any(axis=0), labels > 0)
            overlapping += (masks.sum(axis=0) > 1).any()
        assert overlapping, "the test data has no overlap to keep"
        shown = shown_organs(slices["train"])
        for row, organs in zip(slices["train"], shown, strict=True):
            labels = np.array(row["annotation"])
            assert organs.any() == labels.any() and organs[labels[labels > 0] - 1].all()


class TestLoading:
    def load(self, name: Path | str, **limits: int) -> DatasetDict:
        arguments = DataArguments(dataset_name=str(name), **limits)  # type: ignore[arg-type]
        return select_samples(load_slices(arguments), arguments, seed=0)

    def message(self, name: Path | str, **limits: int) -> str:
        with pytest.raises(InputError) as caught:
            self.load(name, **limits)
        return str(caught.value)

    def rewrite(self, dataset_dir: Path, folder: Path, change: Callable[[DatasetDict], dict[str, Dataset]]) -> Path:
        """Write a copy of the dataset with other splits."""
        (folder / "data").mkdir(parents=True)
        for split, rows in change(load_dataset(str(dataset_dir))).items():
            rows.to_parquet(folder / "data" / f"{split}-00000-of-00001.parquet")
        return folder

    def test_a_built_dataset_is_loaded(self, dataset_dir: Path) -> None:
        loaded = self.load(dataset_dir)
        assert set(loaded) == {"train", "validation"}
        assert not set(loaded["train"]["case"]) & set(loaded["validation"]["case"])

    def test_fewer_slices_are_drawn_from_all(self, dataset_dir: Path) -> None:
        whole, fewer = self.load(dataset_dir), self.load(dataset_dir, max_train_samples=5, max_eval_samples=12)
        assert (len(fewer["train"]), len(fewer["validation"])) == (5, 12)
        # The first five slices are all from one end of one scan. Drawn slices are not.
        assert fewer["train"]["id"] != whole["train"]["id"][:5]
        assert fewer["train"]["id"] == self.load(dataset_dir, max_train_samples=5)["train"]["id"]
        assert fewer["validation"]["id"] == whole["validation"]["id"][:12]
        many = self.load(dataset_dir, max_train_samples=10_000, max_eval_samples=10_000)
        assert (len(many["train"]), len(many["validation"])) == (len(whole["train"]), len(whole["validation"]))

    def test_a_missing_folder_is_refused(self, tmp_path: Path) -> None:
        message = self.message(tmp_path / "a" / "b")
        assert "no such folder" in message and "python -m dataset_builder build" in message

    def test_the_name_gi_tract_without_a_build_is_refused(
        self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.chdir(tmp_path)
        message = self.message("gi_tract")
        assert "no such folder" in message and "python -m dataset_builder build" in message

    def test_a_kaggle_folder_is_refused(self, kaggle_dir: Path) -> None:
        message = self.message(kaggle_dir)
        assert "a Kaggle folder, not a dataset yet" in message and "python -m dataset_builder build" in message

    def test_an_empty_folder_is_refused(self, tmp_path: Path) -> None:
        assert "python -m dataset_builder build" in self.message(tmp_path)

    @pytest.mark.parametrize("split", ["train", "validation"])
    def test_a_missing_split_is_refused(self, split: str, dataset_dir: Path, tmp_path: Path) -> None:
        folder = self.rewrite(dataset_dir, tmp_path / "d", lambda d: {name: d[name] for name in d if name != split})
        assert "expected the splits train and validation, got" in self.message(folder)

    def test_a_missing_column_is_refused(self, dataset_dir: Path, tmp_path: Path) -> None:
        folder = self.rewrite(
            dataset_dir, tmp_path / "d", lambda d: {name: d[name].remove_columns("segmentation") for name in d}
        )
        assert "lacks the columns segmentation" in self.message(folder)

    @pytest.mark.parametrize("column", ["id", "scan"])
    def test_a_name_that_is_not_that_of_a_slice_is_refused(
        self, column: str, dataset_dir: Path, tmp_path: Path
    ) -> None:
        def rename(slices: DatasetDict) -> dict[str, Dataset]:
            names = [*slices["validation"][column][:-1], "../../<b>case1_day2</b>"]
            changed = slices["validation"].remove_columns(column).add_column(column, names)
            return {"train": slices["train"], "validation": changed}

        message = self.message(self.rewrite(dataset_dir, tmp_path / "d", rename))
        assert "expected names like case1_day2_slice_0003" in message and "../../<b>case1_day2</b>" in message

    def test_validation_slices_that_do_not_form_a_volume_are_refused(self, dataset_dir: Path, tmp_path: Path) -> None:
        def widen(slices: DatasetDict) -> dict[str, Dataset]:
            wider = slices["validation"].map(lambda row, n: {"pixel_spacing": [1.5, 1.5 + n % 2]}, with_indices=True)
            return {"train": slices["train"], "validation": wider}

        message = self.message(self.rewrite(dataset_dir, tmp_path / "d", widen))
        assert "expected slices of one size and spacing, but got 2 (2 such scans of 2)" in message

    def test_a_patient_in_both_splits_is_refused(self, dataset_dir: Path, tmp_path: Path) -> None:
        folder = self.rewrite(dataset_dir, tmp_path / "d", lambda d: {"train": d["train"], "validation": d["train"]})
        case = self.load(dataset_dir)["train"][0]["case"]
        message = self.message(folder)
        assert "are in train and in validation" in message and str(case) in message

    def test_a_validation_split_without_organs_is_refused(self, dataset_dir: Path, tmp_path: Path) -> None:
        folder = self.rewrite(
            dataset_dir,
            tmp_path / "d",
            lambda d: {
                "train": d["train"],
                "validation": d["validation"].filter(lambda row: not any(row["segmentation"].values())),
            },
        )
        assert "the validation slices show no organ" in self.message(folder)


def test_a_saved_processor_normalizes_with_its_own_mean_and_deviation(tmp_path: Path) -> None:
    new_processor(SIZE, mean=[0.5, 0.5, 0.5], std=[0.25, 0.5, 1.0]).save_pretrained(tmp_path)
    processor = SegformerImageProcessorPil.from_pretrained(tmp_path)
    (values,) = normalize(torch.full((1, 2, 2, 1), MAX_PIXEL * 3 // 4, dtype=torch.uint16), processor)
    torch.testing.assert_close(values[:, 0, 0], torch.tensor([1.0, 0.5, 0.25]), atol=1e-4, rtol=0)
