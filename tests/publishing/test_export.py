"""An ONNX file computes what PyTorch does, and the lines on its card give the masks of `predict` without PyTorch."""

import csv
import re
import shutil
from pathlib import Path

import numpy as np
import pytest
from huggingface_hub import HfApi

from dataset_builder.phantom import write_phantom
from gi_segmentation import predict
from gi_segmentation.errors import InputError
from gi_segmentation.export import main
from gi_segmentation.publishing import onnx_model
from gi_segmentation.rle import decode
from gi_segmentation.schema import ORGANS
from tests.support.loopback_hub import LoopbackHub
from tests.support.models import MAX_TIES, SIZE, save_model
from tests.support.processes import RunPython

CARD = "---\nlicense: other\n---\n\n# Model\n\n## 3. Training\n\nSix patients.\n"
# Runs the Python lines of a card where PyTorch and transformers cannot be imported.
CARD_LINES = """
import re, sys
from pathlib import Path
sys.modules.update(torch=None, transformers=None, gi_segmentation=None)
code = re.search(r"```python\\n(.*?)```", Path("README.md").read_text(), re.S)[1]
assert len([line for line in code.splitlines() if line.strip()]) <= 20
exec(re.sub(r"slice_(?=.*png)", f"{sys.argv[1]}/slice_", code).replace("slice_0001", "slice_0070"))
numpy.save("mask.npy", mask)
"""


@pytest.fixture(scope="module")
def scan_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Three slices of a scan with the numbers 68, 70 and 72. The size and spacing are those of the card's lines."""
    folder = tmp_path_factory.mktemp("scans") / "kaggle"
    write_phantom(folder, num_cases=1, days_per_case=1, slices_per_scan=72, num_proc=1)
    for path in folder.rglob("slice_*.png"):
        if path.name[6:10] not in ("0068", "0070", "0072"):
            path.unlink()
    return folder / "train"


def count_differing(model: Path, mask: np.ndarray, scan_dir: Path, output_dir: Path) -> int:
    """Count the pixels in which a mask of slice 70 differs from that of `predict`."""
    words = ["--model", str(model), "--input", str(scan_dir), "--output_dir", str(output_dir), "--num_workers", "0"]
    (path,) = predict.main([*words, "--device", "cpu", "--precision", "fp32"])
    with path.open(newline="") as file:
        rows = {row["class"]: row["predicted"] for row in csv.DictReader(file) if row["id"].endswith("0070")}
    masks = mask if mask.ndim == 3 else mask == np.arange(1, 4)[:, None, None]
    assert masks.any(axis=(1, 2)).all(), "every organ is predicted somewhere"
    predicted = np.stack([decode(rows[organ], *masks.shape[1:]) for organ in ORGANS])
    return np.count_nonzero(predicted != masks)


@pytest.mark.parametrize(
    ("family", "label_mode", "slice_context"),
    [
        ("segformer", "multiclass", 0),
        ("upernet", "multilabel", 2),
        ("dpt", "multiclass", 2),
        ("beit", "multilabel", 0),
    ],
)
def test_the_cards_lines_give_the_masks_of_predict_without_pytorch(
    family: str,
    label_mode: str,
    slice_context: int,
    scan_dir: Path,
    tmp_path: Path,
    run_python: RunPython,
    capsys: pytest.CaptureFixture[str],
) -> None:
    model = save_model(tmp_path / "model", family, 0, label_mode, slice_context)
    (model / "README.md").write_text(CARD)
    assert main(["--model", str(model), "--output_dir", str(model)]) == model / "onnx" / "model.onnx"
    pixels = 4 * SIZE * SIZE
    assert f"labels in 0 of {pixels:,} pixels" in capsys.readouterr().out
    folder = next(scan_dir.rglob("slice_0070*.png")).parent
    done = run_python(["-c", CARD_LINES, str(folder)], cwd=model)
    assert done.returncode == 0, done.stderr
    mask = np.load(model / "mask.npy")
    assert count_differing(model, mask, scan_dir, tmp_path / "out") <= MAX_TIES * mask.size
    assert sorted(path.name for path in (model / "onnx").iterdir()) == ["model.onnx"]


@pytest.fixture(scope="module")
def exported(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The ONNX file of a tiny UPerNet."""
    folder = tmp_path_factory.mktemp("exported")
    return main(["--model", str(save_model(folder / "model", "upernet", 0)), "--output_dir", str(folder)])


def test_a_file_that_computes_something_else_is_not_kept(
    exported: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    # The export "succeeds", but with the weights of another model.
    monkeypatch.setattr(onnx_model, "write_onnx", lambda model, processor, path: shutil.copyfile(exported, path))
    model = save_model(tmp_path / "model", "upernet", 1)
    (model / "README.md").write_text(CARD)
    with pytest.raises(
        InputError, match=r"expected logits within 0\.001 of PyTorch's, got a difference of .*nothing was kept"
    ):
        main(["--model", str(model), "--output_dir", str(model)])
    assert not (model / "onnx").exists() and (model / "README.md").read_text() == CARD


def test_the_file_and_its_section_are_published_in_one_commit(
    tmp_path: Path, hub: LoopbackHub, run_python: RunPython
) -> None:
    model = save_model(tmp_path / "model", "upernet", 0)
    (model / "README.md").write_text(CARD)
    api = HfApi(endpoint=hub.endpoint, token="any")
    api.create_repo("tester/model")
    first = api.upload_folder(repo_id="tester/model", folder_path=model).oid
    words = ["-m", "gi_segmentation.export", "--model", "tester/model", "--output_dir", "out", "--push_to_hub"]
    done = run_python(words, cwd=tmp_path, env=hub.environment(), timeout=300)
    assert done.returncode == 0, done.stderr
    head = api.model_info("tester/model").sha
    assert f"(commit {head[:12]})" in done.stdout and head != first
    names = set(api.list_repo_files("tester/model")) - {".gitattributes"}
    copies = {name: Path(api.hf_hub_download("tester/model", name, local_dir=tmp_path / "copy")) for name in names}
    assert names == {*(path.name for path in model.iterdir()), "onnx/model.onnx"}
    assert copies["onnx/model.onnx"].read_bytes() == (tmp_path / "out" / "onnx" / "model.onnx").read_bytes()
    card = copies["README.md"].read_text()
    assert "hf download tester/model onnx/model.onnx --local-dir ." in card
    assert card.startswith(CARD.partition("## 3.")[0]) and card.endswith("## 3. Training\n\nSix patients.\n")


def test_a_folder_cannot_be_published(tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"--push_to_hub: expected a Hub id as --model, got the folder"):
        main(["--model", str(tmp_path), "--output_dir", str(tmp_path), "--push_to_hub"])


def test_an_earlier_section_is_replaced(tmp_path: Path) -> None:
    once = onnx_model.add_section(CARD, f"{onnx_model.HEADING}\n\nold\n")
    twice = onnx_model.add_section(once, f"{onnx_model.HEADING}\n\nnew\n")
    assert twice == once.replace("old", "new")
    assert len(re.findall(onnx_model.HEADING, twice)) == 1
