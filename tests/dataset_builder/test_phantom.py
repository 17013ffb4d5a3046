"""The phantom has Kaggle's layout, resembles real scans in some numbers, and is repeatable."""

import csv
import re
from collections import defaultdict
from itertools import pairwise
from pathlib import Path

import cv2
import numpy as np
import pytest

from dataset_builder import phantom
from dataset_builder.phantom import PhantomSummary, write_phantom
from gi_segmentation import rle
from gi_segmentation.labels import GI_TRACT

NUM_CASES, DAYS_PER_CASE, SLICES_PER_SCAN = 4, 2, 16
IMAGE_NAME = re.compile(r"slice_(\d{4})_(\d+)_(\d+)_(\d\.\d\d)_(\d\.\d\d)\.png")


@pytest.fixture(scope="module")
def written(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, PhantomSummary]:
    folder = tmp_path_factory.mktemp("phantom") / "kaggle"
    return folder, write_phantom(folder, NUM_CASES, DAYS_PER_CASE, SLICES_PER_SCAN, num_proc=1)


@pytest.fixture(scope="module")
def hard(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("phantom") / "hard"
    write_phantom(folder, NUM_CASES, DAYS_PER_CASE, SLICES_PER_SCAN, num_proc=1, difficulty="hard")
    return folder


def read_rows(folder: Path) -> list[list[str]]:
    with (folder / "train.csv").open(newline="") as file:
        return list(csv.reader(file))


def find_images(folder: Path) -> dict[str, Path]:
    """Return the image file of each slice id."""
    paths = sorted((folder / "train").glob("case*/case*_day*/scans/*.png"))
    return {f"{path.parent.parent.name}_slice_{path.name.split('_')[1]}": path for path in paths}


def read_masks(rows: list[list[str]], images: dict[str, Path]) -> dict[str, np.ndarray]:
    """Return the masks of each scan, shape `(organs, slices, height, width)`."""
    masks: dict[str, list[np.ndarray]] = defaultdict(list)
    for slice_id, _, segmentation in rows[1:]:
        match = IMAGE_NAME.fullmatch(images[slice_id].name)
        assert match is not None
        mask = rle.decode(segmentation, height=int(match[3]), width=int(match[2]))
        assert rle.encode(mask) == segmentation
        masks[slice_id.split("_slice_")[0]].append(mask)
    return {
        scan: np.stack(parts).reshape(-1, len(GI_TRACT), *parts[0].shape).swapaxes(0, 1)
        for scan, parts in masks.items()
    }


@pytest.fixture(scope="module")
def rows(written: tuple[Path, PhantomSummary]) -> list[list[str]]:
    return read_rows(written[0])


@pytest.fixture(scope="module")
def images(written: tuple[Path, PhantomSummary]) -> dict[str, Path]:
    return find_images(written[0])


@pytest.fixture(scope="module")
def volumes(rows: list[list[str]], images: dict[str, Path]) -> dict[str, np.ndarray]:
    return read_masks(rows, images)


@pytest.fixture(scope="module")
def hard_volumes(hard: Path) -> dict[str, np.ndarray]:
    return read_masks(read_rows(hard), find_images(hard))


def read_scans(folder: Path) -> dict[str, np.ndarray]:
    """Return the images of each scan, shape `(slices, height, width)`."""
    scans: dict[str, list[np.ndarray]] = defaultdict(list)
    for slice_id, path in find_images(folder).items():
        scans[slice_id.split("_slice_")[0]].append(cv2.imread(str(path), cv2.IMREAD_UNCHANGED))
    return {scan: np.stack(slices) for scan, slices in scans.items()}


def contrasts(folder: Path, volumes: dict[str, np.ndarray]) -> tuple[float, float]:
    """Measure contrasts, as medians over the slices.

    The unit is the standard deviation of the intensities in a ring of 20 pixels around the organs.

    Returns:
        The contrast between the brightest and the darkest organ of a slice, and between an organ and the ring.
    """
    among, around = [], []
    for scan, images in read_scans(folder).items():
        for image, masks in zip(images, volumes[scan].swapaxes(0, 1), strict=True):
            organs = masks.any(axis=0)
            ring = image[(cv2.dilate(organs.astype(np.uint8), np.ones((41, 41))) > 0) & ~organs]
            means = [image[mask > 0].mean() / ring.std() for mask in masks if mask.any()]
            around += [abs(mean - ring.mean() / ring.std()) for mean in means]
            among += [max(means) - min(means)] if len(means) > 1 else []
    return float(np.median(among)), float(np.median(around))


def contents(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def test_the_rows_are_sorted_and_name_every_image(rows: list[list[str]], images: dict[str, Path]) -> None:
    assert rows[0] == ["id", "class", "segmentation"]
    assert [row[1] for row in rows[1:]] == list(GI_TRACT.names) * len(images)
    ids = [row[0] for row in rows[1 :: len(GI_TRACT)]]
    keys = [tuple(map(int, re.findall(r"\d+", slice_id))) for slice_id in ids]
    assert keys == sorted(keys)
    assert set(ids) == set(images)
    assert all(re.fullmatch(r"case\d+_day\d+_slice_\d{4}", slice_id) for slice_id in ids)
    assert len(ids) == len(set(ids)) == NUM_CASES * DAYS_PER_CASE * SLICES_PER_SCAN


def test_images_are_16_bit_and_of_the_size_in_their_name(images: dict[str, Path]) -> None:
    kinds = set()
    for path in images.values():
        match = IMAGE_NAME.fullmatch(path.name)
        assert match is not None
        assert path.parent.parent.parent.name == path.parent.parent.name.split("_")[0]
        image = cv2.imread(str(path), cv2.IMREAD_UNCHANGED)
        assert image.dtype == np.uint16
        assert image.shape == (int(match[3]), int(match[2]))
        assert 1000 < image.max() < 20000
        # Some pixels are much brighter than most, as on real slices. Air is not 0, because the noise is Rician.
        assert image.max() > 1.5 * np.percentile(image, 90)
        assert np.median(image[:10]) > 0
        kinds.add((match[2], match[3], match[4], match[5]))
    assert kinds == {
        ("266", "266", "1.50", "1.50"),
        ("360", "310", "1.50", "1.50"),
        ("276", "276", "1.63", "1.63"),
        ("234", "234", "1.50", "1.50"),
    }


def test_every_scan_has_all_organs_and_about_half_its_slices_empty(
    volumes: dict[str, np.ndarray], hard_volumes: dict[str, np.ndarray]
) -> None:
    for masks in [*volumes.values(), *hard_volumes.values()]:
        present = masks.any(axis=(2, 3))
        assert present.any(axis=1).all()
        # 57 % of the real slices are empty.
        assert 0.4 <= 1 - present.any(axis=0).mean() <= 0.7


def test_neighbouring_slices_of_an_organ_overlap(volumes: dict[str, np.ndarray]) -> None:
    touching = []
    for masks in volumes.values():
        for organ in masks:
            slices = np.flatnonzero(organ.any(axis=(1, 2)))
            assert np.all(np.diff(slices) == 1)
            touching += [(organ[z] & organ[z + 1]).any() for z in slices[:-1]]
    assert np.mean(touching) > 0.8


def test_organs_share_a_few_pixels_on_some_slices(
    volumes: dict[str, np.ndarray], written: tuple[Path, PhantomSummary]
) -> None:
    shared = [(masks.sum(axis=0) > 1).sum(axis=(1, 2)) for masks in volumes.values()]
    present = np.concatenate([masks.any(axis=(2, 3)).sum(axis=0) for masks in volumes.values()])
    per_slice = np.concatenate(shared)
    # In 22 real scans, organs overlap on 32 % of the slices with several organs, and at most on 659 pixels.
    assert 0.05 < (per_slice > 0).sum() / (present > 1).sum() < 0.4
    assert per_slice.max() < 300
    num_scans = NUM_CASES * DAYS_PER_CASE
    assert written[1] == PhantomSummary(
        cases=NUM_CASES,
        scans=num_scans,
        slices=num_scans * SLICES_PER_SCAN,
        empty_slices=int((present == 0).sum()),
        multi_organ_slices=int((present > 1).sum()),
        overlapping_slices=int((per_slice > 0).sum()),
        overlap_pixels=int(per_slice.sum()),
    )


def test_days_of_a_patient_are_more_alike_than_patients(volumes: dict[str, np.ndarray]) -> None:
    areas: dict[str, list[np.ndarray]] = defaultdict(list)
    for scan, masks in volumes.items():
        areas[scan.split("_")[0]].append(masks.sum(axis=(2, 3)) / masks.sum())
    between_days = np.mean([np.abs(first - second).sum() for first, second in areas.values()])
    patients = [first for first, _ in areas.values()]
    between_patients = np.mean([np.abs(a - b).sum() for a, b in pairwise(patients)])
    assert 0 < between_days < between_patients


def test_the_bytes_depend_on_the_seed_alone(tmp_path: Path) -> None:
    for name, seed, num_proc in (("one", 3, 1), ("two", 3, 2), ("other", 4, 1)):
        write_phantom(tmp_path / name, 2, 1, 2, seed=seed, num_proc=num_proc, difficulty="hard")
    assert contents(tmp_path / "one") == contents(tmp_path / "two")
    # Another seed draws other patients, so even the names of the files differ.
    assert contents(tmp_path / "one").keys().isdisjoint(contents(tmp_path / "other").keys() - {"train.csv"})
    assert sorted(path.name for path in tmp_path.iterdir()) == ["one", "other", "two"]


def test_the_easy_phantom_is_the_default(tmp_path: Path) -> None:
    write_phantom(tmp_path / "default", 1, 1, 3, num_proc=1)
    write_phantom(tmp_path / "easy", 1, 1, 3, num_proc=1, difficulty="easy")
    assert contents(tmp_path / "default") == contents(tmp_path / "easy")
    write_phantom(tmp_path / "hard", 1, 1, 3, num_proc=1, difficulty="hard")
    assert contents(tmp_path / "hard").keys() == contents(tmp_path / "easy").keys()
    assert contents(tmp_path / "hard") != contents(tmp_path / "easy")


def test_brightness_tells_organs_apart_in_the_easy_phantom_only(
    written: tuple[Path, PhantomSummary],
    volumes: dict[str, np.ndarray],
    hard: Path,
    hard_volumes: dict[str, np.ndarray],
) -> None:
    easy_among, easy_around = contrasts(written[0], volumes)
    hard_among, hard_around = contrasts(hard, hard_volumes)
    assert hard_among < 0.2 * easy_among
    assert 0.1 < hard_around < 0.6 * easy_around


def test_a_hot_spot_is_the_maximum_of_some_hard_scans(written: tuple[Path, PhantomSummary], hard: Path) -> None:
    def outshine(folder: Path) -> list[float]:
        """Divide the maximum of each scan by the median of its middle, which lies in the body."""
        middles = [tuple(slice(side // 4, -side // 4) for side in scan.shape) for scan in read_scans(folder).values()]
        scans = zip(read_scans(folder).values(), middles, strict=True)
        return [float(scan.max() / np.median(scan[middle])) for scan, middle in scans]

    assert max(outshine(written[0])) < 7
    hot = np.array(outshine(hard)) > 10
    assert 0 < hot.sum() < len(hot)


@pytest.mark.parametrize("difficulty", ["easy", "hard"])
@pytest.mark.parametrize("num_slices", [1, 2])
def test_few_slices_still_show_every_organ(tmp_path: Path, num_slices: int, difficulty: str) -> None:
    write_phantom(tmp_path / "phantom", 3, 1, num_slices, num_proc=1, difficulty=difficulty)
    with (tmp_path / "phantom" / "train.csv").open(newline="") as file:
        present = {(row["id"].split("_")[0], row["class"]) for row in csv.DictReader(file) if row["segmentation"]}
    assert len(present) == 3 * len(GI_TRACT)


def test_the_plan_avoids_faulty_scans_and_has_the_real_numbers_of_slices() -> None:
    # So many patients and days that the plan would meet the faulty scans if it did not avoid them.
    scans = phantom._plan_scans(num_cases=200, days_per_case=39, slices_per_scan=None, seed=0)
    names = [(scan.case, scan.day) for scan in scans]
    assert len(set(names)) == len(names) == 200 * 39
    assert names == sorted(names)
    assert not phantom.FAULTY_SCANS & set(names)
    assert {scan.num_slices for scan in scans} == {80, 144}


def test_a_folder_that_is_not_empty_is_left_untouched(tmp_path: Path) -> None:
    folder = tmp_path / "phantom"
    folder.mkdir()
    (folder / "notes.txt").write_text("mine")
    with pytest.raises(FileExistsError, match=re.escape(str(folder))):
        write_phantom(folder, 1, 1, 1, num_proc=1)
    assert contents(tmp_path) == {"phantom/notes.txt": b"mine"}
    with pytest.raises(FileExistsError, match="remove it or choose another"):
        write_phantom(folder / "notes.txt", 1, 1, 1, num_proc=1)
    (folder / "notes.txt").unlink()
    write_phantom(folder, 1, 1, 1, num_proc=1)
    assert (folder / "train.csv").is_file()


def test_a_failed_run_leaves_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cv2, "imencode", lambda *args: (False, None))
    with pytest.raises(OSError, match="could not write"):
        write_phantom(tmp_path / "phantom", 1, 1, 1, num_proc=1)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("argument", ["num_cases", "days_per_case", "slices_per_scan", "num_proc"])
def test_sizes_below_one_are_refused(tmp_path: Path, argument: str) -> None:
    with pytest.raises(ValueError, match=f"{argument} must be at least 1, got 0"):
        write_phantom(tmp_path / "phantom", **{argument: 0})
    with pytest.raises(ValueError, match="seed must not be negative, got -1"):
        write_phantom(tmp_path / "phantom", seed=-1)
    assert list(tmp_path.iterdir()) == []


def test_an_unknown_difficulty_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="difficulty must be one of easy, hard, got 'medium'"):
        write_phantom(tmp_path / "phantom", difficulty="medium")
    assert list(tmp_path.iterdir()) == []
