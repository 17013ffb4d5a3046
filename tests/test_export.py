"""An ONNX file computes what PyTorch does, and the lines on its card give the masks of `predict` without PyTorch."""

import csv
import json
import shutil
from pathlib import Path

import numpy as np
import pytest
from huggingface_hub import HfApi

from gi_segmentation import predict
from gi_segmentation.errors import InputError
from gi_segmentation.export import main
from gi_segmentation.labels import GI_TRACT, LabelSet
from gi_segmentation.postprocessing.limits import OrganLimits, Postprocessing
from gi_segmentation.publishing import onnx_model
from gi_segmentation.rle import decode
from loopback_hub import LoopbackHub
from tests.support.models import MAX_TIES, SIZE, save_model
from tests.support.processes import RunPython

CARD = "---\nlicense: other\n---\n\n# Model\n\n## 3. Training\n\nSix patients.\n"
FIVE = LabelSet(("liver", "spleen", "Lung (left)", "stomach", "duodenum"))
NUM_COMPARED = 4 * SIZE * SIZE  # the check compares four images
# Runs the Python lines of a card where neither PyTorch nor transformers nor this project can be imported.
CARD_LINES = """
import re, sys
from pathlib import Path
sys.modules.update(torch=None, transformers=None, gi_segmentation=None)
code = re.search(r"```python\\n(.*?)```", Path("README.md").read_text(), re.S)[1]
assert len([line for line in code.splitlines() if line.strip()]) <= 28
exec(re.sub(r"slice_(?=.*png)", f"{sys.argv[1]}/slice_", code).replace("slice_0001", "slice_0070"))
numpy.save("mask.npy", mask)
"""


def predict_slice(model: Path, scan_dir: Path, output_dir: Path) -> dict[str, str]:
    """Return what `predict` writes for slice 70, by organ."""
    words = ["--model", str(model), "--input", str(scan_dir), "--output_dir", str(output_dir), "--num_workers", "0"]
    (path,) = predict.main([*words, "--device", "cpu", "--precision", "fp32"])
    with path.open(newline="") as file:
        return {row["class"]: row["predicted"] for row in csv.DictReader(file) if row["id"].endswith("0070")}


def compare_with_predict(
    model: Path, card_dir: Path, scan_dir: Path, run_python: RunPython, labels: LabelSet = GI_TRACT
) -> None:
    """Run the lines of the card in a folder, and compare the mask of slice 70 with that of `predict`."""
    slices = next(scan_dir.rglob("slice_0070*.png")).parent
    done = run_python(["-c", CARD_LINES, str(slices)], cwd=card_dir)
    assert done.returncode == 0, done.stderr
    mask = np.load(card_dir / "mask.npy")
    rows = predict_slice(model, scan_dir, card_dir)
    masks = mask if mask.ndim == 3 else mask == np.arange(1, len(labels) + 1)[:, None, None]
    predicted = np.stack([decode(rows[organ], *masks.shape[1:]) for organ in labels.names])
    assert predicted.any(axis=(1, 2)).sum() > 1, "several organs are predicted"
    assert np.count_nonzero(predicted != masks) <= MAX_TIES * masks.size


@pytest.mark.parametrize(
    ("family", "label_mode", "slice_context", "labels"),
    [
        ("segformer", "multiclass", 0, FIVE),
        pytest.param("dpt", "multiclass", 2, GI_TRACT, marks=pytest.mark.long),
        ("beit", "multilabel", 2, GI_TRACT),
    ],
)
def test_the_cards_lines_give_the_masks_of_predict_without_pytorch(
    family: str,
    label_mode: str,
    slice_context: int,
    labels: LabelSet,
    scan_dir: Path,
    tmp_path: Path,
    run_python: RunPython,
    capsys: pytest.CaptureFixture[str],
) -> None:
    model = save_model(tmp_path / "model", family, 0, label_mode, slice_context, labels)
    (model / "README.md").write_text(CARD)
    assert main(["--model", str(model), "--output_dir", str(model)]) == model / "onnx" / "model.onnx"
    assert f"labels in 0 of {NUM_COMPARED:,} pixels" in capsys.readouterr().out
    assert [path.name for path in (model / "onnx").iterdir()] == ["model.onnx"]
    compare_with_predict(model, model, scan_dir, run_python, labels)


@pytest.mark.parametrize("label_mode", ["multiclass", "multilabel"])
def test_the_cards_lines_apply_the_limits_for_pixels_and_slices(
    label_mode: str, scan_dir: Path, tmp_path: Path, run_python: RunPython
) -> None:
    # A scan of one slice, because a gate looks at the slices beside it too.
    (alone,) = scan_dir.rglob("slice_0070*.png")
    folder = tmp_path / "scan" / alone.parent.relative_to(scan_dir)
    folder.mkdir(parents=True)
    shutil.copy(alone, folder)
    before = save_model(tmp_path / "before", "segformer", 0, label_mode)
    plain = predict_slice(before, tmp_path / "scan", tmp_path / "plain")
    model = save_model(tmp_path / "model", "segformer", 0, label_mode)
    # The first organ gets faint pixels, the second one is too doubtful, and the third one stays.
    limits = [OrganLimits(threshold=0.1), OrganLimits(min_slice_confidence=0.999), OrganLimits(min_volume_ml=0.001)]
    config = json.loads((model / "config.json").read_text())
    config["postprocessing"] = Postprocessing(dict(zip(GI_TRACT.names, limits, strict=True))).to_config()
    (model / "config.json").write_text(json.dumps(config))
    (model / "README.md").write_text(CARD)
    main(["--model", str(model), "--output_dir", str(model)])
    assert "The lines leave out the limits for components, which" in (model / "README.md").read_text()
    compare_with_predict(model, model, tmp_path / "scan", run_python)
    cleaned = predict_slice(model, tmp_path / "scan", tmp_path / "cleaned")
    assert len(cleaned["large_bowel"]) != len(plain["large_bowel"]) and plain["small_bowel"] and plain["stomach"]
    assert not cleaned["small_bowel"] and cleaned["stomach"]


def test_the_file_and_its_section_are_published_in_one_commit(
    scan_dir: Path, tmp_path: Path, hub: LoopbackHub, run_python: RunPython, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = save_model(tmp_path / "model", "upernet", 0, "multilabel")
    (model / "README.md").write_text(CARD)
    api = HfApi(endpoint=hub.endpoint, token="any")
    api.create_repo("tester/model")
    first = api.upload_folder(repo_id="tester/model", folder_path=model).oid
    words = ["-m", "gi_segmentation.export", "--model", "tester/model", "--output_dir", "out", "--push_to_hub"]
    done = run_python(words, cwd=tmp_path, env=hub.environment(), timeout=300)
    assert done.returncode == 0, done.stderr
    assert f"labels in 0 of {NUM_COMPARED:,} pixels" in done.stdout
    head = api.model_info("tester/model").sha
    assert f"(commit {head[:12]})" in done.stdout and head != first
    names = set(api.list_repo_files("tester/model")) - {".gitattributes"}
    assert names == {*(path.name for path in model.iterdir()), "onnx/model.onnx"}
    copy = tmp_path / "copy"
    for name in names:
        api.hf_hub_download("tester/model", name, local_dir=copy)
    assert (copy / "onnx/model.onnx").read_bytes() == (tmp_path / "out" / "onnx" / "model.onnx").read_bytes()
    card = (copy / "README.md").read_text()
    assert "hf download tester/model onnx/model.onnx --local-dir ." in card
    assert card.startswith(CARD.partition("## 3.")[0]) and card.endswith("## 3. Training\n\nSix patients.\n")
    compare_with_predict(model, copy, scan_dir, run_python)

    # An "export" with other weights than the model's.
    def write_another(model: object, processor: object, path: Path) -> None:
        shutil.copyfile(copy / "onnx/model.onnx", path)

    monkeypatch.setattr(onnx_model, "write_onnx", write_another)
    other = save_model(tmp_path / "other", "upernet", 1, "multilabel")
    (other / "README.md").write_text(CARD)
    with pytest.raises(InputError, match=r"expected logits within 0\.001 of PyTorch's, got .*nothing was kept"):
        main(["--model", str(other), "--output_dir", str(other)])
    assert not (other / "onnx").exists() and (other / "README.md").read_text() == CARD


def test_a_folder_cannot_be_published(tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"--push_to_hub: expected a Hub id as --model, got the folder"):
        main(["--model", str(tmp_path), "--output_dir", str(tmp_path), "--push_to_hub"])
