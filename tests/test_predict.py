"""Prediction files have the masks of plain `transformers`, for each number of workers and each batch size.

Only pixels whose two best labels are equal but for rounding may differ between batch sizes, see `MAX_TIES`.

A file is complete, or it is not written at all.
"""

import csv
import json
import random
import re
import shutil
from pathlib import Path
from typing import Any

import jinja2
import numpy as np
import pytest
import torch
from PIL import Image
from transformers import (
    AutoConfig,
    AutoModelForImageClassification,
    AutoModelForSemanticSegmentation,
    SegformerImageProcessorPil,
    pipeline,
)

from gi_segmentation.arguments import ModelArguments
from gi_segmentation.errors import InputError
from gi_segmentation.formats.inputs import find_scans
from gi_segmentation.formats.kaggle.folder import find_slices
from gi_segmentation.inference import duration
from gi_segmentation.inference.arguments import Computation
from gi_segmentation.inference.batches import PredictionSettings
from gi_segmentation.inference.members import load_members
from gi_segmentation.inference.prediction import predict_files
from gi_segmentation.labels import GI_TRACT
from gi_segmentation.models.loading import load_model
from gi_segmentation.predict import main
from gi_segmentation.rle import decode, encode
from gi_segmentation.schema import slice_name
from tests.support.models import FAMILIES, ID2LABEL, MAX_TIES, SIZE, save_model
from tests.support.processes import ROOT
from tests.support.scoring import score_submission


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A SegFormer with random weights that predicts all four labels, in patches."""
    torch.manual_seed(0)
    model, processor, _ = load_model(
        ModelArguments(model_type="segformer", config_overrides=json.dumps(FAMILIES["segformer"])), GI_TRACT, SIZE
    )
    with torch.no_grad():
        torch.nn.init.normal_(model.decode_head.classifier.weight, std=3)
    folder = tmp_path_factory.mktemp("model") / "checkpoint"
    model.save_pretrained(folder)
    processor.save_pretrained(folder)
    return folder


def predict(model: Path | str, folder: Path, output_dir: Path, *flags: str) -> Path:
    words = ["--model", str(model), "--input", str(folder), "--output_dir", str(output_dir), "--device", "cpu"]
    (path,) = main([*words, *(flags or ("--num_workers", "0"))])
    return path


@pytest.fixture(scope="module")
def submission(checkpoint: Path, kaggle_dir: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return predict(checkpoint, kaggle_dir / "train", tmp_path_factory.mktemp("predicted"))


def read_rows(path: Path) -> list[dict[str, str]]:
    with path.open(newline="", encoding="utf-8") as file:
        return list(csv.DictReader(file))


def message(model: Path | str, folder: Path, output_dir: Path, *flags: str) -> str:
    with pytest.raises(InputError) as caught:
        predict(model, folder, output_dir, *flags)
    assert not list(output_dir.glob("*submission*"))
    return str(caught.value)


def card_lines(repo_id: str, label_mode: str = "multiclass", slice_context: int = 0, block: int = 0) -> str:
    """Return the Python lines of a checkpoint's model card. Block 0 takes a raw slice, and 1 the stock pipeline."""
    template = (ROOT / "model_cards" / "model_card.md").read_text(encoding="utf-8")
    blocks = re.findall(r"```python\n(.*?)```", template, flags=re.DOTALL)
    environment = jinja2.Environment(undefined=jinja2.StrictUndefined, trim_blocks=True, lstrip_blocks=True)
    settings = {"label_mode": label_mode, "slice_context": slice_context, "image_size": SIZE, "at_revision": ""}
    lines = environment.from_string(blocks[block]).render(repo_id=repo_id, **settings)
    assert len([line for line in lines.splitlines() if line]) <= 10
    return lines


class TestSubmission:
    def test_there_is_one_row_per_slice_and_organ_in_order(self, submission: Path, kaggle_dir: Path) -> None:
        slices, _ = find_slices(kaggle_dir / "train")
        rows = read_rows(submission)
        assert submission.read_text().splitlines()[0] == "id,class,predicted"
        assert [(row["id"], row["class"]) for row in rows] == [
            (s.id, organ) for s in slices for organ in GI_TRACT.names
        ]
        numbers = [tuple(map(int, re.findall(r"\d+", row["id"]))) for row in rows]
        assert numbers == sorted(numbers) and len(rows) == 3 * 48
        assert sorted(path.name for path in submission.parent.iterdir()) == ["submission.csv"]

    def test_the_masks_equal_those_of_the_model_cards_lines(
        self, submission: Path, checkpoint: Path, kaggle_dir: Path
    ) -> None:
        predicted: dict[str, dict[str, str]] = {}
        for row in read_rows(submission):
            predicted.setdefault(row["id"], {})[row["class"]] = row["predicted"]
        slices, _ = find_slices(kaggle_dir / "train")
        sizes, labels, pixels, differing = set(), set(), 0, 0
        for slice_file in slices[::4]:
            names: dict[str, Any] = {}
            lines = card_lines(str(checkpoint))
            assert "slice_0001_266_266_1.50_1.50.png" in lines
            exec(lines.replace("slice_0001_266_266_1.50_1.50.png", str(slice_file.path)), names)
            mask = names["mask"].numpy()
            assert mask.shape == (slice_file.height, slice_file.width)
            for label in (1, 2, 3):
                rle = predicted[slice_file.id][ID2LABEL[label]]
                assert rle == encode(decode(rle, *mask.shape))
                differing += np.count_nonzero(decode(rle, *mask.shape) != (mask == label))
            pixels += mask.size
            sizes.add(mask.shape)
            labels |= set(np.unique(mask).tolist())
        assert len(sizes) > 1 and labels == {0, 1, 2, 3}
        assert differing <= MAX_TIES * pixels

    def test_workers_do_not_change_the_file(
        self, submission: Path, checkpoint: Path, kaggle_dir: Path, tmp_path: Path
    ) -> None:
        path = predict(checkpoint, kaggle_dir / "train", tmp_path, "--num_workers", "2")
        assert path.read_bytes() == submission.read_bytes()

    @pytest.mark.parametrize("units", [True, False])
    def test_auto_computes_in_16_bits_where_the_processor_has_units_for_it(
        self,
        units: bool,
        submission: Path,
        checkpoint: Path,
        kaggle_dir: Path,
        tmp_path: Path,
        monkeypatch: pytest.MonkeyPatch,
        capsys: pytest.CaptureFixture[str],
    ) -> None:
        monkeypatch.setattr(torch.cpu, "get_capabilities", lambda: {"amx_bf16": units})
        path = predict(checkpoint, kaggle_dir / "train", tmp_path, "--num_workers", "0", "--precision", "auto")
        assert ("computes on cpu in 16 bits" if units else "computes on cpu in 32 bits") in capsys.readouterr().out
        sizes = {s.id: (s.height, s.width) for s in find_slices(kaggle_dir / "train")[0]}
        differing = pixels = 0
        for row, other in zip(read_rows(path), read_rows(submission), strict=True):
            masks = [decode(each["predicted"], *sizes[row["id"]]) for each in (row, other)]
            differing += np.count_nonzero(masks[0] != masks[1])
            pixels += masks[0].size
        # Random weights are the worst case, because their logits are close to each other.
        assert (0 < differing < 0.01 * pixels) if units else differing == 0

    def test_fp16_changes_few_pixels_and_is_recorded(
        self, submission: Path, checkpoint: Path, kaggle_dir: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
    ) -> None:
        flags = ("--num_workers", "0", "--precision", "fp16")
        rows = read_rows(predict(checkpoint, kaggle_dir / "train", tmp_path, *flags))
        assert "computes on cpu in 16 bits (fp16)" in capsys.readouterr().out
        whole = read_rows(submission)
        assert sum(one["predicted"] != other["predicted"] for one, other in zip(rows, whole, strict=True)) > 0
        sizes = {s.id: (s.height, s.width) for s in find_slices(kaggle_dir / "train")[0]}
        different = [
            np.mean(decode(one["predicted"], *sizes[one["id"]]) != decode(other["predicted"], *sizes[one["id"]]))
            for one, other in zip(rows, whole, strict=True)
        ]
        # fp16 has three more bits than bf16, see the test above.
        assert np.mean(different) < 0.002

    def test_numbers_too_large_for_fp16_are_computed_again_in_32_bits(
        self, scan_dir: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
    ) -> None:
        folder = save_model(tmp_path / "model", "segformer", 0)
        model = AutoModelForSemanticSegmentation.from_pretrained(folder)
        with torch.no_grad():
            model.decode_head.classifier.weight *= 1e6
        model.save_pretrained(folder)
        exact = predict(folder, scan_dir, tmp_path / "exact")
        again = predict(folder, scan_dir, tmp_path / "again", "--num_workers", "0", "--precision", "fp16")
        assert again.read_bytes() == exact.read_bytes() and any(row["predicted"] for row in read_rows(again))
        assert caplog.text.count("too large for fp16") == 1

    def test_a_long_prediction_says_how_long_it_will_take(
        self,
        checkpoint: Path,
        scan_dir: Path,
        tmp_path: Path,
        monkeypatch: pytest.MonkeyPatch,
        capsys: pytest.CaptureFixture[str],
    ) -> None:
        monkeypatch.setattr(duration, "MEASURED_S", 0)
        monkeypatch.setattr(duration, "SHORT_S", 0)
        predict(checkpoint, scan_dir, tmp_path, "--num_workers", "0", "--batch_size", "4")
        assert (
            len(re.findall(r"about 0:\d\d:\d\d for 12 slices \([\d.e+]+ slices a second\)", capsys.readouterr().out))
            == 1
        )

    @pytest.mark.parametrize("batch_size", ["1", "5", "48"])
    def test_the_batch_size_changes_only_ties(
        self, batch_size: str, submission: Path, checkpoint: Path, kaggle_dir: Path, tmp_path: Path
    ) -> None:
        flags = ("--num_workers", "0", "--batch_size", batch_size)
        rows = read_rows(predict(checkpoint, kaggle_dir / "train", tmp_path, *flags))
        sizes = {s.id: (s.height, s.width) for s in find_slices(kaggle_dir / "train")[0]}
        differing = 0
        for row, other in zip(rows, read_rows(submission), strict=True):
            assert (row["id"], row["class"]) == (other["id"], other["class"])
            masks = [decode(each["predicted"], *sizes[row["id"]]) for each in (row, other)]
            differing += np.count_nonzero(masks[0] != masks[1])
        assert differing <= MAX_TIES * sum(height * width for height, width in sizes.values())

    def test_a_scan_alone_has_the_same_slices_and_organs(
        self, submission: Path, checkpoint: Path, kaggle_dir: Path, tmp_path: Path
    ) -> None:
        scan = next((kaggle_dir / "train").glob("case*/case*_day*"))
        expected = [(r["id"], r["class"]) for r in read_rows(submission) if r["id"].startswith(scan.name + "_")]
        rows = read_rows(predict(checkpoint, scan, tmp_path / "new" / "folder"))
        assert [(row["id"], row["class"]) for row in rows] == expected and len(expected) == 36

    def test_the_score_command_accepts_it(self, submission: Path, kaggle_dir: Path) -> None:
        scores = score_submission(kaggle_dir / "train.csv", submission, num_proc=1)
        assert 0 < scores["dice"] < 0.5 and 0 < scores["competition_score"] < 1


class TestErrors:
    def test_an_existing_output_is_not_overwritten(self, checkpoint: Path, kaggle_dir: Path, tmp_path: Path) -> None:
        existing = tmp_path / "submission.csv"
        existing.write_text("precious")
        with pytest.raises(InputError, match=r"submission\.csv: exists; remove it or name another --output_dir"):
            predict(checkpoint, kaggle_dir / "train", tmp_path)
        assert existing.read_text() == "precious"

    def test_an_input_without_slices_is_refused(self, checkpoint: Path, tmp_path: Path) -> None:
        assert "no such file or folder" in message(checkpoint, tmp_path / "nowhere", tmp_path / "out")
        (tmp_path / "empty").mkdir()
        assert "no slices; expected caseN_dayN" in message(checkpoint, tmp_path / "empty", tmp_path / "out")

    def test_a_png_that_is_not_a_slice_is_named(self, checkpoint: Path, kaggle_copy: Path, tmp_path: Path) -> None:
        (kaggle_copy / "train" / "overview.png").write_bytes(b"")
        assert "overview.png" in message(checkpoint, kaggle_copy, tmp_path / "out")

    @pytest.mark.parametrize("num_workers", ["0", "2"])
    @pytest.mark.parametrize("damage", ["cut off", "8 bit", "other size"])
    def test_a_damaged_slice_is_named(
        self, damage: str, num_workers: str, checkpoint: Path, kaggle_copy: Path, tmp_path: Path
    ) -> None:
        path = sorted(kaggle_copy.rglob("*.png"))[3]
        if damage == "cut off":
            path.write_bytes(path.read_bytes()[:300])
        else:
            width, height = (int(number) for number in path.name.split("_")[2:4])
            shape = (height, width) if damage == "8 bit" else (height + 1, width)
            Image.fromarray(np.zeros(shape, dtype=np.uint8 if damage == "8 bit" else np.uint16)).save(path)
        flags = ("--num_workers", num_workers, "--batch_size", "2")
        text = message(checkpoint, kaggle_copy, tmp_path / "out", *flags)
        assert f"1 of 2 scans failed: {path.parent.parent.name} ({path}: " in text
        assert "Traceback" not in text and "\n" not in text

    @pytest.mark.parametrize(
        ("flags", "expected"),
        [
            (("--batch_size", "0"), "but got 0 and 2"),
            (("--num_workers", "-1"), "but got 16 and -1"),
            (("--device", "gpu9"), "--device gpu9"),
        ],
    )
    def test_impossible_flags_are_refused(
        self, flags: tuple[str, ...], expected: str, checkpoint: Path, kaggle_dir: Path, tmp_path: Path
    ) -> None:
        assert expected in message(checkpoint, kaggle_dir / "train", tmp_path / "out", *flags)

    def test_models_of_other_projects_are_refused(self, checkpoint: Path, kaggle_dir: Path, tmp_path: Path) -> None:
        slices, output_dir = kaggle_dir / "train", tmp_path / "out"
        (tmp_path / "bare").mkdir()
        assert "bare: not a checkpoint of this project" in message(tmp_path / "bare", slices, output_dir)
        processor = SegformerImageProcessorPil()
        config = AutoConfig.for_model("segformer", **FAMILIES["segformer"], num_labels=4, id2label=ID2LABEL)
        AutoModelForImageClassification.from_config(config).save_pretrained(tmp_path / "classifier")
        processor.save_pretrained(tmp_path / "classifier")
        assert "classifier: lacks" in message(tmp_path / "classifier", slices, output_dir)
        config = AutoConfig.for_model("convnext", depths=[1, 1], hidden_sizes=[4, 4], num_stages=2)
        AutoModelForImageClassification.from_config(config).save_pretrained(tmp_path / "convnext")
        processor.save_pretrained(tmp_path / "convnext")
        assert "not a checkpoint of this project" in message(tmp_path / "convnext", slices, output_dir)
        settings = json.loads((checkpoint / "config.json").read_text())
        settings["id2label"] = {str(index): f"thing {index}" for index in range(150)}
        settings["label2id"] = {name: int(index) for index, name in settings["id2label"].items()}
        (tmp_path / "ade").mkdir()
        (tmp_path / "ade" / "config.json").write_text(json.dumps(settings))
        (tmp_path / "ade" / "model.safetensors").write_bytes((checkpoint / "model.safetensors").read_bytes())
        processor.save_pretrained(tmp_path / "ade")
        assert "ade: " in message(tmp_path / "ade", slices, output_dir)


def test_a_mistake_of_the_user_ends_in_one_error(run_python: Any, checkpoint: Path, tmp_path: Path) -> None:
    words = ["-m", "gi_segmentation.predict", "--model", str(checkpoint), "--input", "nowhere", "--output_dir", "out"]
    done = run_python(words, cwd=tmp_path)
    assert (done.returncode, done.stdout) == (1, "")
    assert done.stderr.splitlines()[-1] == "error: --input nowhere: no such file or folder"
    assert "Traceback" not in done.stderr and not (tmp_path / "out").exists()


@pytest.mark.parametrize("family", ["segformer", "beit"])
@pytest.mark.parametrize(("label_mode", "slice_context"), [("multilabel", 0), ("multilabel", 2), ("multiclass", 2)])
def test_the_model_cards_lines_work_for_each_label_mode_and_context(
    family: str, label_mode: str, slice_context: int, scan_dir: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = save_model(tmp_path / "model", family, 0, label_mode, slice_context)
    lines = card_lines(str(model), label_mode, slice_context)
    path = predict(model, scan_dir, tmp_path / "out")
    rows = {row["class"]: row["predicted"] for row in read_rows(path) if row["id"].endswith("slice_0070")}
    slices, _ = find_slices(scan_dir)
    monkeypatch.chdir(slices[0].path.parent)
    names: dict[str, Any] = {}
    exec(lines.replace("slice_0001", "slice_0070"), names)
    mask = names["mask"].numpy()
    masks = mask if label_mode == "multilabel" else mask == np.arange(1, 4)[:, None, None]
    assert masks.shape == (3, slices[0].height, slices[0].width) and masks.any()
    predicted = np.stack([decode(rows[organ], *masks.shape[1:]) for organ in GI_TRACT.names])
    assert np.count_nonzero(predicted != masks) <= MAX_TIES * masks.size
    if label_mode == "multilabel":
        # Overlaps are written to the file, too.
        assert (masks.sum(axis=0) > 1).any()


def test_the_lines_for_the_stock_pipeline_lose_little_against_predict(scan_dir: Path, tmp_path: Path) -> None:
    model = save_model(tmp_path / "model", "segformer", 0)
    rows = read_rows(predict(model, scan_dir, tmp_path / "out"))
    predicted = {(row["id"], row["class"]): row["predicted"] for row in rows}
    segment = pipeline("image-segmentation", model=str(model), device="cpu")
    differing = raw_differing = organ_pixels = 0
    for slice_file in find_slices(scan_dir)[0][::4]:
        names: dict[str, Any] = {}
        lines = card_lines(str(model), block=1).replace("slice_0001_266_266_1.50_1.50.png", str(slice_file.path))
        exec(lines, names)
        assert names["masks"].keys() <= set(ID2LABEL.values())
        raw_masks = {found["label"]: found["mask"] for found in segment(str(slice_file.path))}
        empty = Image.new("L", (slice_file.width, slice_file.height))
        for organ in GI_TRACT.names:
            expected = decode(predicted[slice_file.id, organ], slice_file.height, slice_file.width)
            organ_pixels += np.count_nonzero(expected)
            differing += np.count_nonzero(expected != (np.array(names["masks"].get(organ, empty)) > 0))
            raw_differing += np.count_nonzero(expected != (np.array(raw_masks.get(organ, empty)) > 0))
    # The picture has 256 grey levels. Random weights are the worst case, because their logits are close to each other.
    assert 0 < differing < 0.05 * organ_pixels
    # The raw file is clipped at 255. Its masks have little to do with those of `predict`.
    assert raw_differing > 0.3 * organ_pixels


def test_neighbouring_slices_come_from_the_same_scan(scan_dir: Path, tmp_path: Path) -> None:
    # A second scan of the same patient must change nothing. Without slice 65, its neighbours 64 and 66 get other
    # context, and all other slices stay as they were.
    model = save_model(tmp_path / "model", "segformer", 0, slice_context=1)
    both = tmp_path / "both"
    shutil.copytree(scan_dir, both)
    (first,) = both.glob("case*/case*_day*")
    shutil.copytree(first, first.with_name(f"{first.name.rsplit('day', 1)[0]}day99"))

    def masks(folder: Path, name: str) -> dict[tuple[str, str], str]:
        rows = read_rows(predict(model, folder, tmp_path / name, "--num_workers", "0", "--batch_size", "1"))
        return {(row["id"], row["class"]): row["predicted"] for row in rows if "day99" not in row["id"]}

    alone = masks(scan_dir, "alone")
    assert masks(both, "together") == alone
    next(first.rglob("slice_0065*.png")).unlink()
    changed = masks(both, "changed")
    assert {key[0][-4:] for key, rle in changed.items() if rle != alone[key]} == {"0064", "0066"}


def differing(rows: list[dict[str, str]], others: list[dict[str, str]], folder: Path, mirrored: bool = False) -> float:
    """Return the share of pixels in which two predictions differ. `mirrored` first flips the other one sideways."""
    size = find_slices(folder)[0][0]
    shape = (size.height, size.width)
    different = 0
    for row, other in zip(rows, others, strict=True):
        mask = decode(other["predicted"], *shape)
        different += np.count_nonzero(decode(row["predicted"], *shape) != (mask[:, ::-1] if mirrored else mask))
    return different / (len(rows) * shape[0] * shape[1])


def test_an_ensemble_averages_probabilities(scan_dir: Path, tmp_path: Path) -> None:
    one, other = (save_model(tmp_path / str(seed), "segformer", seed) for seed in (0, 1))
    words = ["--input", str(scan_dir), "--device", "cpu", "--num_workers", "0", "--output_dir"]
    alone = read_rows(*main(["--model", str(one), *words, str(tmp_path / "alone")]))
    twice = read_rows(*main(["--model", str(one), str(one), *words, str(tmp_path / "twice")]))
    both = read_rows(*main(["--model", str(one), str(other), *words, str(tmp_path / "both")]))
    reverse = read_rows(*main(["--model", str(other), str(one), *words, str(tmp_path / "reverse")]))
    # The mean of a model with itself is the model, and the order of two models does not matter, except for ties. Two
    # different models give something else.
    assert differing(twice, alone, scan_dir) <= MAX_TIES
    assert differing(reverse, both, scan_dir) <= MAX_TIES < 100 * MAX_TIES < differing(both, alone, scan_dir)


def test_flips_at_test_time_make_the_answer_symmetric(scan_dir: Path, tmp_path: Path) -> None:
    model = save_model(tmp_path / "model", "segformer", 0)
    mirrored = tmp_path / "mirrored"
    shutil.copytree(scan_dir, mirrored)
    for path in mirrored.rglob("*.png"):
        with Image.open(path) as image:
            image.load()
        image.transpose(Image.Transpose.FLIP_LEFT_RIGHT).save(path)
    shares = {}
    for flags in ((), ("--test_time_flips",)):
        both = [
            read_rows(predict(model, folder, tmp_path / f"{folder.name}{len(flags)}", "--num_workers", "0", *flags))
            for folder in (scan_dir, mirrored)
        ]
        shares[len(flags)] = differing(*both, scan_dir, mirrored=True)
    # Averaged over all flips, a mirrored slice has the mirrored prediction. Without flips it has not.
    assert shares[1] < 0.001 < shares[0]


def test_an_ensemble_of_two_label_modes_is_refused(scan_dir: Path, tmp_path: Path) -> None:
    one = save_model(tmp_path / "one", "segformer", 0)
    other = save_model(tmp_path / "other", "segformer", 0, "multilabel")
    with pytest.raises(InputError, match=r"expected checkpoints of one label mode, got .*one: background, .*other: l"):
        main(["--model", str(one), str(other), "--input", str(scan_dir), "--output_dir", str(tmp_path / "out")])
    assert not (tmp_path / "out").exists()


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A checkpoint that sees the neighbours of a slice."""
    return save_model(tmp_path_factory.mktemp("model") / "model", "segformer", 0, slice_context=1)


@pytest.fixture(scope="module")
def whole(model: Path, kaggle_dir: Path, tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, str]]:
    return read_rows(predict(model, kaggle_dir / "train", tmp_path_factory.mktemp("predicted")))


class TestHiddenTest:
    """What Kaggle's notebooks need: the rows of a sample, also for slices that are missing or damaged."""

    @staticmethod
    def write_sample(path: Path, rows: list[tuple[str, str]], encoding: str = "predicted") -> Path:
        path.write_text("".join(f"{one},{organ},{rle}\n" for one, organ, rle in [("id", "class", encoding), *(
            (*row, "") for row in rows)]))  # fmt: skip
        return path

    @pytest.mark.parametrize("encoding", ["predicted", "segmentation"])
    def test_the_rows_of_a_sample_come_in_its_order(
        self,
        encoding: str,
        model: Path,
        whole: list[dict[str, str]],
        kaggle_dir: Path,
        tmp_path: Path,
        capsys: pytest.CaptureFixture[str],
    ) -> None:
        expected = {(row["id"], row["class"]): row["predicted"] for row in whole}
        # Shuffled, some twice, without a slice of the first scan, without the last scan, and without a class.
        last = whole[-1]["id"].rsplit("_slice", 1)[0]
        rows = [
            key for key in expected if key[1] != "stomach" and key[0] != whole[3]["id"] and not key[0].startswith(last)
        ]
        random.Random(0).shuffle(rows)
        rows += rows[:5]
        sample = self.write_sample(tmp_path / "sample.csv", rows, encoding)
        path = predict(model, kaggle_dir / "train", tmp_path / "out", "--sample_submission", str(sample))
        found = read_rows(path)
        assert list(found[0]) == ["id", "class", encoding]
        assert [(row["id"], row["class"]) for row in found] == rows
        assert [row[encoding] for row in found] == [expected[row] for row in rows]
        printed = capsys.readouterr().out
        assert f"left out: 13 slices that {sample} does not name: {whole[3]['id']}, " in printed
        assert f"left out: stomach, which {sample} does not name" in printed
        # The scan that it does not name was not predicted.
        assert f"\n{last}" not in printed

    @pytest.mark.parametrize("folder", ["missing", "empty"])
    def test_a_sample_without_rows_and_an_empty_test_set_give_a_header_and_an_estimate(
        self, folder: str, model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
    ) -> None:
        (tmp_path / "empty").mkdir()
        sample = self.write_sample(tmp_path / "sample.csv", [])
        flags = ("--sample_submission", str(sample), "--format", "kaggle")
        path = predict(model, tmp_path / folder, tmp_path / "out", *flags)
        assert path.read_text() == "id,class,predicted\n"
        assert [one.name for one in path.parent.iterdir()] == ["submission.csv"]
        said = re.search(
            r"hidden test set of 50 scans: about (\d+:\d\d:\d\d) for 7,200 slices", capsys.readouterr().out
        )
        assert said and said[1] > "0:00:00"

    def test_a_sample_without_rows_takes_the_slices_that_are_there(
        self, model: Path, whole: list[dict[str, str]], kaggle_dir: Path, tmp_path: Path
    ) -> None:
        sample = self.write_sample(tmp_path / "sample.csv", [])
        flags = ("--sample_submission", str(sample), "--on_error", "empty")
        assert read_rows(predict(model, kaggle_dir / "train", tmp_path / "out", *flags)) == whole

    def test_ids_without_a_slice_are_an_error_or_empty(
        self,
        model: Path,
        whole: list[dict[str, str]],
        kaggle_dir: Path,
        tmp_path: Path,
        capsys: pytest.CaptureFixture[str],
    ) -> None:
        rows = [(row["id"], row["class"]) for row in whole[:3]] + [("case999_day1_slice_0001", "stomach")]
        flags = ("--sample_submission", str(self.write_sample(tmp_path / "sample.csv", rows)))
        said = "1 of 2 ids have no slice in --input: case999_day1_slice_0001"
        for folder in (kaggle_dir / "train", tmp_path / "nowhere"):
            assert "no slice in --input" in message(model, folder, tmp_path / "out", *flags)
        found = read_rows(predict(model, kaggle_dir / "train", tmp_path / "out", *flags, "--on_error", "empty"))
        assert found == [*whole[:3], {"id": rows[-1][0], "class": "stomach", "predicted": ""}]
        assert f"warning: empty rows: {tmp_path / 'sample.csv'}: {said}" in capsys.readouterr().out
        nothing = predict(model, tmp_path / "nowhere", tmp_path / "none", *flags, "--on_error", "empty")
        assert [row["predicted"] for row in read_rows(nothing)] == [""] * 4

    @pytest.mark.parametrize(
        ("text", "expected"),
        [
            ("id,class,predicted\nID,liver,\n", "rows of the class liver, which the checkpoint does not predict"),
            ("id,class\n", "expected the columns id, class, and predicted or segmentation, but got id, class"),
            ("id,class,predicted,more\n", "but got id, class, predicted, more"),
            ("id;class;predicted\n", "expected values separated by commas"),
            ("", "it is empty"),
        ],
    )
    def test_a_sample_that_cannot_be_used_is_refused(
        self, text: str, expected: str, model: Path, kaggle_dir: Path, tmp_path: Path
    ) -> None:
        first = find_slices(kaggle_dir / "train")[0][0]
        (tmp_path / "sample.csv").write_text(text.replace("ID", slice_name(first.scan, first.number)))
        flags = ("--sample_submission", str(tmp_path / "sample.csv"), "--on_error", "empty")
        assert expected in message(model, kaggle_dir / "train", tmp_path / "out", *flags)

    @pytest.mark.parametrize("num_workers", ["0", "2"])
    def test_a_damaged_slice_is_empty_and_its_neighbours_see_the_scan_without_it(
        self,
        num_workers: str,
        model: Path,
        kaggle_dir: Path,
        tmp_path: Path,
        capsys: pytest.CaptureFixture[str],
    ) -> None:
        damaged, without = (Path(shutil.copytree(kaggle_dir / "train", tmp_path / str(name))) for name in (1, 2))
        # Two neighbours, and a link to nothing.
        slices = [one.path.relative_to(kaggle_dir / "train") for one in find_slices(kaggle_dir / "train")[0]]
        for index in (4, 5, 20):
            (damaged / slices[index]).write_bytes(b"no picture")
            (without / slices[index]).unlink()
        (damaged / slices[20]).unlink()
        (damaged / slices[20]).symlink_to(tmp_path / "nowhere")
        (damaged / slices[30]).with_name("overview.png").write_bytes(b"")
        words = ("--num_workers", num_workers, "--batch_size", "3")
        rows = read_rows(predict(model, without, tmp_path / "2out", *words))
        expected = {(one["id"], one["class"]): one["predicted"] for one in rows}
        path = predict(model, damaged, tmp_path / "1out", *words, "--on_error", "empty")
        found = read_rows(path)
        assert len(found) == 3 * 48 and len(expected) == 3 * 45
        assert [one["predicted"] for one in found] == [expected.get((one["id"], one["class"]), "") for one in found]
        captured = capsys.readouterr()
        assert captured.err.count("warning: empty rows: ") == 3 and str(damaged / slices[4]) in captured.err
        assert "overview.png: expected caseN_dayN" in captured.out and "left out of " in captured.out

    def test_a_submission_is_not_empty_as_a_whole(self, model: Path, kaggle_copy: Path, tmp_path: Path) -> None:
        sample = self.write_sample(tmp_path / "sample.csv", [("case999_day1_slice_0001", "stomach")])
        flags = ("--on_error", "empty", "--sample_submission", str(sample))
        assert "expected ids of the slices in --input" in message(model, kaggle_copy, tmp_path / "out", *flags)
        for path in kaggle_copy.rglob("*.png"):
            path.write_bytes(b"no picture")
        # The second time, nothing counts as predicted before.
        for _ in range(2):
            assert "but got none; see the warnings" in message(model, kaggle_copy, tmp_path / "out", *flags[:2])
        assert not (tmp_path / "out" / "submission.csv").exists()

    def test_only_slices_of_kaggles_may_be_empty(self, model: Path, kaggle_dir: Path, tmp_path: Path) -> None:
        flags = ("--on_error", "empty", "--format", "kaggle", "nifti")
        assert "--format kaggle alone" in message(model, kaggle_dir / "train", tmp_path / "out", *flags)

    def test_a_fault_of_the_output_folder_empties_no_scan(
        self, model: Path, kaggle_copy: Path, tmp_path: Path
    ) -> None:
        scans, members = find_scans(kaggle_copy).scans, load_members([str(model)], None, Computation("cpu"))
        settings = PredictionSettings(num_workers=0, on_error="empty")
        list(predict_files(members, scans, ["kaggle"], tmp_path / "out", settings))
        # Somebody has repaired a slice between two runs.
        first, second = (one.path for one in scans[0].slices[:2])
        first.write_bytes(second.read_bytes())
        assert "has predictions of another scan" in message(
            model, kaggle_copy, tmp_path / "out", "--on_error", "empty"
        )
        assert not (tmp_path / "out" / "submission.csv").exists()

    def test_what_is_done_stays_valid_if_the_rest_may_be_empty(
        self, model: Path, kaggle_copy: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
    ) -> None:
        path = sorted(kaggle_copy.rglob("*.png"))[1]
        content = path.read_bytes()
        path.write_bytes(b"no picture")
        message(model, kaggle_copy, tmp_path / "out")
        submission = predict(model, kaggle_copy, tmp_path / "out", "--on_error", "empty")
        assert "skipped" in capsys.readouterr().out
        assert len(read_rows(submission)) == 18
        # The other way round, the empty rows would count as predicted.
        scans, settings = find_scans(kaggle_copy).scans, PredictionSettings(num_workers=0, on_error="empty")
        members = load_members([str(model)], None, Computation("cpu"))
        list(predict_files(members, scans, ["kaggle"], tmp_path / "other", settings))
        with pytest.raises(InputError, match="on_error was empty and is now None"):
            list(predict_files(members, scans, ["kaggle"], tmp_path / "other", PredictionSettings(num_workers=0)))
        path.write_bytes(content)
