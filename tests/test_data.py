"""From slices to tensors: nothing clipped, nothing invented, the same on any worker, other in every epoch."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from datasets import Dataset, DatasetDict, load_dataset
from torch.utils.data import DataLoader
from transformers import SegformerImageProcessorPil

from gi_segmentation.arguments import DataArguments, ModelArguments
from gi_segmentation.augmentation import build_augmentation
from gi_segmentation.data import (
    BalancedSampler,
    SliceTransform,
    attached_transform,
    collate,
    find_neighbours,
    load_slices,
    organ_masks,
    resize_image,
    resize_labels,
    scale_intensity,
    select_samples,
    shown_organs,
    transform_splits,
)
from gi_segmentation.errors import InputError
from gi_segmentation.modeling import new_processor
from gi_segmentation.rle import encode
from gi_segmentation.schema import ORGANS

SIZE = 64


@pytest.fixture(scope="module")
def slices(dataset_dir: Path) -> DatasetDict:
    return load_slices(DataArguments(dataset_name=str(dataset_dir)))


def transformed(slices: DatasetDict, label_mode: str = "multiclass", **settings: Any) -> tuple[Dataset, Dataset]:
    """The training and the validation slices, ready for a model."""
    arguments = ModelArguments(label_mode=label_mode), DataArguments(**settings)
    return transform_splits(slices, slices, new_processor(SIZE), *arguments, seed=0)


def pixel_values_by_the_card(raw: np.ndarray, processor: Any, size: int) -> torch.Tensor:
    """The model card's own lines."""
    scaled = torch.from_numpy(raw.astype("float32"))
    image = (scaled / (scaled + scaled.mean().clamp(min=1))).expand(1, 3, -1, -1)
    image = torch.nn.functional.interpolate(image, (size, size), mode="bilinear", antialias=True)
    return processor(image, do_resize=False, do_rescale=False, return_tensors="pt")["pixel_values"][0]


class TestPixels:
    def test_sixteen_bits_are_scaled_without_clipping(self) -> None:
        raw = np.arange(65536, dtype=np.uint16).reshape(256, 256)
        scaled = scale_intensity(raw)
        assert scaled.dtype == np.float32 and scaled.min() == 0
        np.testing.assert_allclose(scaled, raw / (raw + 32767.5), rtol=1e-6)
        assert (np.diff(scaled.ravel()) > 0).all()

    def test_a_bright_spot_leaves_the_rest_as_it_was(self) -> None:
        raw = np.random.default_rng(0).integers(0, 2000, (266, 266)).astype(np.uint16)
        spotted = raw.copy()
        spotted[:8, :8] = 20_000
        np.testing.assert_allclose(scale_intensity(spotted)[8:], scale_intensity(raw)[8:], atol=0.005)

    @pytest.mark.parametrize("dtype", [np.uint16, np.int32, np.uint8])
    def test_a_black_slice_stays_black(self, dtype: type) -> None:
        scaled = scale_intensity(np.zeros((3, 4), dtype=dtype))
        assert scaled.dtype == np.float32 and not scaled.any()

    @pytest.mark.parametrize("shape", [(266, 266), (310, 360), (40, 30)])
    @pytest.mark.parametrize("kind", ["bright", "dark", "black"])
    def test_pixel_values_are_those_of_the_model_card(self, shape: tuple[int, int], kind: str) -> None:
        top = {"bright": 65535, "dark": 300, "black": 0}[kind]
        raw = np.random.default_rng(0).integers(0, top + 1, shape).astype(np.uint16)
        processor = new_processor(SIZE, mean=[0.1, 0.2, 0.3], std=[0.4, 0.5, 0.6])
        values = SliceTransform(processor).pixel_values([raw])
        assert (values.shape, values.dtype) == ((3, SIZE, SIZE), torch.float32)
        torch.testing.assert_close(values, pixel_values_by_the_card(raw, processor, SIZE), atol=2e-6, rtol=0)

    def test_shrinking_averages_instead_of_picking(self) -> None:
        chequered = np.indices((128, 128)).sum(axis=0) % 2
        np.testing.assert_allclose(resize_image(chequered.astype(np.float32), 32)[2:-2, 2:-2], 0.5, atol=0.01)

    def test_labels_are_picked_and_not_averaged(self) -> None:
        labels = np.array([[0, 3], [1, 2]], dtype=np.uint8)
        np.testing.assert_array_equal(resize_labels(labels, 6), labels.repeat(3, axis=0).repeat(3, axis=1))
        wide = np.repeat([[1, 3]], 50, axis=1).repeat(70, axis=0).astype(np.uint8)
        small = resize_labels(wide, 10)
        assert (small[:, :5] == 1).all() and (small[:, 5:] == 3).all() and small.dtype == np.uint8

    def test_image_and_labels_keep_their_places(self) -> None:
        labels = np.zeros((266, 310), dtype=np.uint8)
        labels[60:200, 100:250] = 1
        image = resize_image(labels.astype(np.float32), SIZE)
        assert ((image > 0.5) == (resize_labels(labels, SIZE) == 1)).mean() > 0.99


class TestOrganMasks:
    def test_overlaps_are_kept(self) -> None:
        masks = np.zeros((3, 4, 5), dtype=bool)
        masks[0, :2] = masks[2, 1:] = True
        decoded = organ_masks(dict(zip(ORGANS, map(encode, masks), strict=True)), height=4, width=5)
        np.testing.assert_array_equal(decoded, masks)
        assert (decoded.sum(axis=0) == 2).sum() == 5

    def test_validation_rows_carry_the_outlines_as_drawn(self, slices: DatasetDict) -> None:
        _, validation = transformed(slices)
        overlapping = 0
        for row, example in zip(slices["validation"], validation, strict=True):
            masks = example["organ_masks"].numpy()
            assert masks.shape == (3, row["height"], row["width"])
            assert [encode(mask) for mask in masks] == [row["segmentation"][organ] for organ in ORGANS]
            assert int(example["scan"]) == row["case"] * 100_000 + row["day"]
            labels = np.array(row["annotation"])
            np.testing.assert_array_equal(example["labels"].numpy(), resize_labels(labels, SIZE))
            np.testing.assert_array_equal(masks.any(axis=0), labels > 0)
            overlapping += (masks.sum(axis=0) > 1).any()
        assert overlapping, "the test data has no overlap to keep"


class TestAugmentation:
    """What a slice turns into depends on (seed, epoch, id) and on nothing else."""

    def dataset(self, slices: DatasetDict, seed: int = 0) -> tuple[Dataset, SliceTransform]:
        transform = SliceTransform(new_processor(SIZE), augmentation=build_augmentation(), seed=seed)
        return slices["train"].select(range(8)).with_transform(transform), transform

    def read(self, dataset: Dataset, num_workers: int = 0, batch_size: int = 4) -> torch.Tensor:
        loader = DataLoader(dataset, batch_size, num_workers=num_workers, collate_fn=collate)
        return torch.cat([batch["pixel_values"] for batch in loader])

    def test_workers_and_batches_change_nothing(self, slices: DatasetDict) -> None:
        dataset, _ = self.dataset(slices)
        expected = self.read(dataset)
        assert torch.equal(self.read(dataset, num_workers=2), expected)
        assert torch.equal(self.read(dataset, batch_size=3), expected)
        plain = slices["train"].select(range(8)).with_transform(SliceTransform(new_processor(SIZE)))
        assert not torch.equal(self.read(plain), expected)

    def test_order_changes_nothing(self, slices: DatasetDict) -> None:
        dataset, _ = self.dataset(slices)
        expected = self.read(dataset)
        assert torch.equal(self.read(dataset.select(range(7, -1, -1))).flip(0), expected)

    def test_another_seed_or_epoch_changes_most_slices(self, slices: DatasetDict) -> None:
        dataset, transform = self.dataset(slices)
        first = self.read(dataset)
        transform.epoch.fill_(1)
        second = self.read(dataset)
        third = self.read(self.dataset(slices, seed=1)[0])
        for one, other in ((first, second), (first, third), (second, third)):
            assert sum(not torch.equal(a, b) for a, b in zip(one, other, strict=True)) >= 6
        transform.epoch.fill_(0)
        assert torch.equal(self.read(dataset), first)

    def test_workers_that_live_on_see_the_next_epoch(self, slices: DatasetDict) -> None:
        dataset, transform = self.dataset(slices)
        expected = []
        for epoch in range(3):
            transform.epoch.fill_(epoch)
            expected.append(self.read(dataset))
        loader = DataLoader(dataset, 4, num_workers=2, persistent_workers=True, collate_fn=collate)
        for epoch in range(3):
            transform.epoch.fill_(epoch)
            assert torch.equal(torch.cat([batch["pixel_values"] for batch in loader]), expected[epoch])
        assert not torch.equal(expected[0], expected[1])

    def test_slices_of_one_epoch_are_augmented_differently(self, slices: DatasetDict) -> None:
        transform = SliceTransform(new_processor(SIZE), augmentation=build_augmentation())
        row = slices["train"].with_format(None)[0]
        examples = [transform.labelled_example({**row, "id": f"slice {n}"}, None)["pixel_values"] for n in range(8)]
        assert len({example.numpy().tobytes() for example in examples}) >= 5

    def test_validation_is_never_augmented(self, slices: DatasetDict) -> None:
        _, validation = transformed(slices, augmentation=True)
        row = slices["validation"][5]
        expected = SliceTransform(new_processor(SIZE)).pixel_values([np.array(row["image"])])
        assert torch.equal(validation[5]["pixel_values"], expected)


class TestContext:
    """Channels are slices of one scan, whichever slices are trained on."""

    def channels(self, dataset: Dataset, index: int) -> torch.Tensor:
        return dataset[index]["pixel_values"]

    @pytest.mark.parametrize("slice_context", [1, 2, 30])
    def test_every_channel_is_the_slice_that_it_should_be(self, slice_context: int, slices: DatasetDict) -> None:
        _, validation = transformed(slices, slice_context=slice_context)
        _, plain = transformed(slices)
        place = {(row["scan"], row["slice"]): index for index, row in enumerate(slices["validation"])}
        last = {row["scan"]: row["slice"] for row in slices["validation"]}
        for index, row in enumerate(slices["validation"]):
            scan, number = row["scan"], row["slice"]
            wanted = (max(number - slice_context, 1), number, min(number + slice_context, last[scan]))
            for channel, other in enumerate(wanted):
                expected = self.channels(plain, place[scan, other])[channel]
                assert torch.equal(self.channels(validation, index)[channel], expected)

    def test_slices_left_out_of_training_are_still_neighbours(self, slices: DatasetDict) -> None:
        arguments = ModelArguments(), DataArguments(slice_context=1, augmentation=False)
        chosen = DatasetDict(train=slices["train"].select([5]), validation=slices["validation"])
        few, _ = transform_splits(slices, chosen, new_processor(SIZE), *arguments, seed=0)
        all_of_them, _ = transform_splits(slices, slices, new_processor(SIZE), *arguments, seed=0)
        assert torch.equal(self.channels(few, 0), self.channels(all_of_them, 5))
        assert not torch.equal(self.channels(few, 0)[0], self.channels(few, 0)[1])

    @pytest.mark.parametrize(
        ("numbers", "number", "expected"),
        [
            ([1, 2, 3, 4, 5], 3, (1, 5)),
            ([1, 2, 3, 4, 5], 1, (1, 3)),
            ([1, 2, 3, 4, 5], 5, (3, 5)),
            ([7], 7, (7, 7)),
            ([1, 4, 7], 4, (4, 4)),
            ([2, 3, 6], 3, (2, 3)),
        ],
    )
    def test_ends_and_gaps(self, numbers: list[int], number: int, expected: tuple[int, int]) -> None:
        assert find_neighbours(numbers, number, slice_context=2) == expected

    def test_a_dataset_without_neighbours(self, slices: DatasetDict) -> None:
        lone = slices["train"].filter(lambda row: row["slice"] % 5 == 0)
        with pytest.raises(InputError, match=r"--slice_context 2: none of the \d+ slices of a split has a neighbour"):
            transformed(DatasetDict(train=lone, validation=slices["validation"]), slice_context=2)
        transformed(DatasetDict(train=lone, validation=slices["validation"]), slice_context=5)

    def test_augmentation_moves_all_channels_alike(self, slices: DatasetDict) -> None:
        _, validation = transformed(slices, slice_context=1)
        transform = attached_transform(validation)
        transform.augmentation = build_augmentation()
        row = {**slices["validation"][4], "slice": 1, "scan": "twice"}
        transform.neighbours.rows["twice"] = {1: 4}  # its own neighbour on both sides
        for epoch in range(6):
            transform.epoch.fill_(epoch)
            channels = transform.labelled_example(row, None)["pixel_values"]
            scaled = channels * torch.from_numpy(transform.std) + torch.from_numpy(transform.mean)
            torch.testing.assert_close(scaled[0], scaled[1])
            torch.testing.assert_close(scaled[1], scaled[2])


def test_overlaps_are_labels_of_their_own_channel(slices: DatasetDict) -> None:
    train, validation = transformed(slices, label_mode="multilabel", augmentation=False)
    overlapping = 0
    for dataset, split in ((train, "train"), (validation, "validation")):
        for row, example in zip(slices[split], dataset, strict=True):
            masks = organ_masks(row["segmentation"], row["height"], row["width"]).astype(np.uint8)
            expected = np.stack([resize_labels(mask, SIZE) for mask in masks])
            assert example["labels"].dtype == torch.float32
            np.testing.assert_array_equal(example["labels"].numpy(), expected)
            overlapping += bool((expected.sum(axis=0) > 1).any())
    assert overlapping


class TestBalancedSampling:
    def organs(self) -> np.ndarray:
        """90 empty slices, 6 with the first organ, 3 with the second, 1 with the second and the third."""
        rows = [[0, 0, 0]] * 90 + [[1, 0, 0]] * 6 + [[0, 1, 0]] * 3 + [[0, 1, 1]]
        return np.array(rows, dtype=bool)

    def test_every_group_is_drawn_equally_often(self) -> None:
        epoch = torch.zeros(1, dtype=torch.int64)
        sampler, organs, counts = BalancedSampler(self.organs(), 0, epoch), self.organs(), np.zeros(4)
        for number in range(200):
            epoch.fill_(number)
            drawn = organs[list(sampler)]
            assert len(drawn) == len(sampler) == 100
            counts += [(~drawn.any(axis=1)).sum(), drawn[:, 0].sum(), drawn[:, 1:2].sum(), drawn[:, 2].sum()]
        # The one slice with two organs is drawn for either: 1/4 for the third organ, a quarter of 1/4 for the second.
        np.testing.assert_allclose(counts / counts[0], [1, 1, 2, 1.25], rtol=0.1)

    def test_draws_depend_on_seed_and_epoch_alone(self) -> None:
        epoch = torch.zeros(1, dtype=torch.int64)
        one, same, other = (BalancedSampler(self.organs(), seed, epoch) for seed in (0, 0, 1))
        first = list(one)
        assert first == list(same) != list(other)
        epoch.fill_(1)
        assert list(one) != first
        epoch.fill_(0)
        assert list(one) == first

    def test_an_organ_that_nobody_has_is_no_obstacle(self) -> None:
        organs = self.organs()
        organs[:, 2] = False
        assert len(list(BalancedSampler(organs, 0, torch.zeros(1, dtype=torch.int64)))) == 100

    def test_which_organs_a_slice_shows(self, slices: DatasetDict) -> None:
        shown = shown_organs(slices["train"])
        for row, organs in zip(slices["train"], shown, strict=True):
            labels = np.array(row["annotation"])
            assert organs.any() == labels.any() and organs[labels[labels > 0] - 1].all()


def test_collate_pads_to_the_largest_and_tells_the_true_sizes() -> None:
    sizes = [(3, 7), (6, 2), (4, 4)]
    examples = [
        {
            "pixel_values": torch.full((3, 8, 8), float(index)),
            "labels": torch.full((8, 8), index),
            "organ_masks": torch.ones((3, *size), dtype=torch.bool),
            "scan": torch.tensor(index),
        }
        for index, size in enumerate(sizes)
    ]
    batch = collate(examples)
    assert batch["organ_masks"].shape == (3, 3, 6, 7) and batch["organ_masks"].dtype == torch.bool
    assert batch["native_size"].tolist() == [list(size) for size in sizes]
    for masks, (height, width) in zip(batch["organ_masks"], sizes, strict=True):
        assert masks[:, :height, :width].all() and masks.sum() == 3 * height * width
    assert batch["scan"].tolist() == [0, 1, 2] and batch["labels"][:, 0, 0].tolist() == [0, 1, 2]
    assert set(collate([{key: e[key] for key in ("pixel_values", "labels")} for e in examples])) == {
        "pixel_values",
        "labels",
    }


class TestLoading:
    def load(self, name: Path | str, **limits: int) -> DatasetDict:
        arguments = DataArguments(dataset_name=str(name), **limits)  # type: ignore[arg-type]
        return select_samples(load_slices(arguments), arguments, seed=0)

    def message(self, name: Path | str, **limits: int) -> str:
        with pytest.raises(InputError) as caught:
            self.load(name, **limits)
        return str(caught.value)

    def rewrite(self, dataset_dir: Path, folder: Path, change: Callable[[DatasetDict], dict[str, Dataset]]) -> Path:
        """A copy of the dataset with other splits."""
        (folder / "data").mkdir(parents=True)
        for split, rows in change(load_dataset(str(dataset_dir))).items():
            rows.to_parquet(folder / "data" / f"{split}-00000-of-00001.parquet")
        return folder

    def test_the_built_dataset(self, dataset_dir: Path) -> None:
        loaded = self.load(dataset_dir)
        assert set(loaded) == {"train", "validation"}
        assert not set(loaded["train"]["case"]) & set(loaded["validation"]["case"])

    def test_fewer_slices(self, dataset_dir: Path) -> None:
        whole, fewer = self.load(dataset_dir), self.load(dataset_dir, max_train_samples=5, max_eval_samples=12)
        assert (len(fewer["train"]), len(fewer["validation"])) == (5, 12)
        assert fewer["train"]["id"] != whole["train"]["id"][:5]  # drawn, so that they are not all of one scan's end
        assert fewer["train"]["id"] == self.load(dataset_dir, max_train_samples=5)["train"]["id"]
        assert fewer["validation"]["id"] == whole["validation"]["id"][:12]
        many = self.load(dataset_dir, max_train_samples=10_000, max_eval_samples=10_000)
        assert (len(many["train"]), len(many["validation"])) == (len(whole["train"]), len(whole["validation"]))

    def test_no_such_folder(self, tmp_path: Path) -> None:
        message = self.message(tmp_path / "a" / "b")
        assert "no such folder" in message and "python -m dataset_builder build" in message

    def test_the_bare_name_without_a_build(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.chdir(tmp_path)
        message = self.message("gi_tract")
        assert "no such folder" in message and "python -m dataset_builder build" in message

    def test_a_kaggle_folder(self, kaggle_dir: Path) -> None:
        message = self.message(kaggle_dir)
        assert "a Kaggle folder, not a dataset yet" in message and "python -m dataset_builder build" in message

    def test_an_empty_folder(self, tmp_path: Path) -> None:
        assert "python -m dataset_builder build" in self.message(tmp_path)

    @pytest.mark.parametrize("split", ["train", "validation"])
    def test_a_missing_split(self, split: str, dataset_dir: Path, tmp_path: Path) -> None:
        folder = self.rewrite(dataset_dir, tmp_path / "d", lambda d: {name: d[name] for name in d if name != split})
        assert "expected the splits train and validation, got" in self.message(folder)

    def test_a_missing_column(self, dataset_dir: Path, tmp_path: Path) -> None:
        folder = self.rewrite(
            dataset_dir, tmp_path / "d", lambda d: {name: d[name].remove_columns("segmentation") for name in d}
        )
        assert "lacks the columns segmentation" in self.message(folder)

    def test_a_patient_in_both_splits(self, dataset_dir: Path, tmp_path: Path) -> None:
        folder = self.rewrite(dataset_dir, tmp_path / "d", lambda d: {"train": d["train"], "validation": d["train"]})
        case = self.load(dataset_dir)["train"][0]["case"]
        message = self.message(folder)
        assert "stand in train and in validation" in message and str(case) in message

    def test_validation_without_organs(self, dataset_dir: Path, tmp_path: Path) -> None:
        folder = self.rewrite(
            dataset_dir,
            tmp_path / "d",
            lambda d: {
                "train": d["train"],
                "validation": d["validation"].filter(lambda row: not any(row["segmentation"].values())),
            },
        )
        assert "the validation slices show no organ" in self.message(folder)


def test_the_processor_on_disk_normalizes_alike(tmp_path: Path) -> None:
    new_processor(SIZE, mean=[0.5, 0.5, 0.5], std=[0.25, 0.5, 1.0]).save_pretrained(tmp_path)
    transform = SliceTransform(SegformerImageProcessorPil.from_pretrained(tmp_path))
    values = transform.normalize(np.full((2, 2, 1), 0.75, dtype=np.float32))
    assert values[:, 0, 0].tolist() == [1.0, 0.5, 0.25]
