"""The web page in a real browser: Debian's Chromium, driven by Playwright.

The page is published to a loopback Hub as a Space, by the commands of its README, and started from there. So is its
checkpoint.
"""

import json
import os
import re
import shutil
import subprocess
import sys
import time
import zipfile
from collections.abc import Iterator
from contextlib import contextmanager
from importlib.util import find_spec
from pathlib import Path

import nibabel
import numpy as np
import pydicom
import pytest
from huggingface_hub import HfApi

from gi_segmentation.errors import InputError
from gi_segmentation.labels import LabelSet
from gi_segmentation.predict import main as predict
from loopback_hub import LoopbackHub
from tests.support.models import save_model
from tests.support.processes import ROOT

# Importing gradio takes seconds, so only the tests of its functions do it.
if find_spec("gradio") is None:
    pytest.skip("needs gradio: pip install -e .[app]", allow_module_level=True)
playwright = pytest.importorskip("playwright.sync_api", reason="needs playwright: pip install -e .[test]")
CHROMIUM = shutil.which("chromium")
needs_chromium = pytest.mark.skipif(CHROMIUM is None, reason="needs Chromium: apt-get install chromium")

SAMPLES = ROOT / "app" / "samples"
SPACE_ID, MODEL_ID, OTHER_ID = "loopback/gi-tract", "loopback/tiny", "loopback/other"
OTHER_LABELS = LabelSet(tuple(f"muscle {number}" for number in range(1, 13)))
MAX_UPLOAD_MB = 1
WAIT_MS = 60_000
# That of the page.
BATCH_SIZE = 4


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_model(tmp_path_factory.mktemp("models") / "tiny", "segformer", seed=0)


@pytest.fixture(scope="module")
def uploads(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder in which Gradio keeps uploads."""
    return tmp_path_factory.mktemp("uploads")


@pytest.fixture(scope="module")
def published(model: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[LoopbackHub]:
    """A Hub with two checkpoints, and with the page as a Space."""
    (block,) = re.findall(r"```bash\n(hf repos create .*?)```", (ROOT / "app" / "README.md").read_text(), re.S)
    other = save_model(tmp_path_factory.mktemp("models") / "other", "segformer", seed=1, labels=OTHER_LABELS)
    with LoopbackHub(tmp_path_factory.mktemp("hub")) as hub:
        api = HfApi(hub.endpoint, token="any")
        for repo_id, folder in ((MODEL_ID, model), (OTHER_ID, other)):
            api.create_repo(repo_id)
            api.upload_folder(folder_path=folder, repo_id=repo_id)
        script = block.replace("NAMESPACE/NAME", MODEL_ID).replace("NAMESPACE", "loopback")
        environment = {
            **os.environ,
            **hub.environment(),
            "PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}",
        }
        subprocess.run(["bash", "-e", "-c", script], cwd=ROOT, env=environment, check=True)
        yield hub


@pytest.fixture(scope="module")
def address(published: LoopbackHub, uploads: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """The address of a page that runs as a Space does: from its files, with its variables."""
    api = HfApi(published.endpoint, token="any")
    space = api.snapshot_download(SPACE_ID, repo_type="space", local_dir=tmp_path_factory.mktemp("space"))
    variables = {name: variable.value for name, variable in api.get_space_variables(SPACE_ID).items()}
    # A Space has no other flags. Small uploads are a limit that a test can reach.
    words = [sys.executable, "app.py", "--max_upload_mb", str(MAX_UPLOAD_MB)]
    environment = {
        **os.environ,
        **published.environment(),
        **variables,
        "HF_HOME": str(tmp_path_factory.mktemp("cache")),
        "GRADIO_TEMP_DIR": str(uploads),
        "PYTHONUNBUFFERED": "1",
    }
    with subprocess.Popen(
        words, cwd=space, env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
    ) as server:
        assert server.stdout is not None
        for line in server.stdout:
            if match := re.search(r"http://\S+", line):
                break
        else:
            pytest.fail("the server did not start")
        yield match[0]
        server.terminate()
        # What is left in the pipe would keep the server from ending.
        log = server.stdout.read()
    assert "Traceback" not in log


@pytest.fixture(scope="module")
def browser() -> Iterator["playwright.Browser"]:
    with playwright.sync_playwright() as driver:
        browser = driver.chromium.launch(executable_path=CHROMIUM, args=["--no-sandbox"])
        yield browser
        browser.close()


@contextmanager
def visit(browser: "playwright.Browser", address: str) -> Iterator["playwright.Page"]:
    """Open the page as a new visitor. It asks no other server for anything."""
    context = browser.new_context(viewport={"width": 1280, "height": 800}, accept_downloads=True)
    context.set_default_timeout(WAIT_MS)
    asked: list[str] = []
    faults: list[str] = []
    page = context.new_page()
    page.on("request", lambda request: asked.append(request.url))
    page.on("pageerror", lambda error: faults.append(str(error)))
    page.goto(address)
    page.wait_for_selector(".gi-welcome")
    yield page
    context.close()
    assert not [url for url in asked if not url.startswith((address, "data:", "blob:"))]
    assert not faults


@pytest.fixture
def page(browser: "playwright.Browser", address: str) -> Iterator["playwright.Page"]:
    with visit(browser, address) as page:
        yield page


@pytest.fixture(scope="module")
def sample(browser: "playwright.Browser", address: str) -> Iterator["playwright.Page"]:
    """A page that shows the NIfTI sample. Tests leave organs and opacity as they were."""
    with visit(browser, address) as page:
        page.get_by_role("button", name="Sample: phantom NIfTI").click()
        page.wait_for_selector(".gi-viewer:not(.is-empty) .gi-number")
        yield page


def upload(page: "playwright.Page", *paths: Path) -> None:
    page.locator("input[type=file]").set_input_files(list(paths))


def predict_upload(page: "playwright.Page", *paths: Path) -> None:
    upload(page, *paths)
    page.get_by_label("Remove this file").or_(page.get_by_label("Clear")).first.wait_for()
    page.get_by_role("button", name="Predict").click()


def picture(page: "playwright.Page") -> str:
    return page.locator(".gi-canvas").evaluate("canvas => canvas.toDataURL()")


def number(page: "playwright.Page") -> str:
    return page.locator(".gi-number").inner_text()


def download(page: "playwright.Page", label: str, folder: Path) -> Path:
    with page.expect_download() as started:
        page.get_by_role("button", name=label, exact=True).click()
    path = folder / started.value.suggested_filename
    started.value.save_as(path)
    return path


def predicted_by_command(model: Path, path: Path, folder: Path, name: str) -> Path:
    words = ["--model", str(model), "--input", str(path), "--output_dir", str(folder), "--format", name]
    # Another size of the batches may round differently.
    (written,) = predict([*words, "--batch_size", str(BATCH_SIZE)])
    return written


def left_files(folder: Path) -> list[Path]:
    # Gradio leaves empty files behind.
    return [path for path in folder.rglob("*") if path.is_file() and path.stat().st_size]


@needs_chromium
def test_a_sample_is_scrolled_and_downloaded(sample: "playwright.Page", model: Path, tmp_path: Path) -> None:
    sample.locator(".gi-slice").fill("8")
    shown = [(number(sample), picture(sample))]
    sample.locator(".gi-stage").hover()
    sample.mouse.wheel(0, 120)
    shown.append((number(sample), picture(sample)))
    sample.keyboard.press("ArrowDown")
    shown.append((number(sample), picture(sample)))
    sample.locator(".gi-stage").click()
    sample.keyboard.press("PageUp")
    shown.append((number(sample), picture(sample)))
    assert [text for text, _ in shown] == ["8 / 16", "9 / 16", "10 / 16", "1 / 16"]
    assert len({image for _, image in shown}) == 4

    file = download(sample, "NIfTI", tmp_path)
    expected = predicted_by_command(model, SAMPLES / "phantom_NIfTI.nii.gz", tmp_path / "command", "nifti")
    labels, theirs = nibabel.load(file), nibabel.load(expected)
    # Another number of threads may round differently, which decides between labels of equal probability.
    assert labels.shape == theirs.shape and np.count_nonzero(labels.get_fdata() != theirs.get_fdata()) <= 3
    np.testing.assert_array_equal(labels.affine, theirs.affine)
    volumes = sample.locator(".gi-organs tbody td:last-child").all_inner_texts()
    voxel_ml = np.prod(labels.header.get_zooms()) / 1000
    for label, text in enumerate(volumes, start=1):
        assert float(text.removesuffix(" mL")) == pytest.approx(
            (labels.get_fdata() == label).sum() * voxel_ml, abs=0.6
        )


@needs_chromium
def test_organs_window_and_opacity_change_the_picture(sample: "playwright.Page") -> None:
    before = picture(sample)
    boxes = sample.locator(".gi-organs input")
    for index in range(boxes.count()):
        boxes.nth(index).uncheck()
    without = picture(sample)
    assert without != before
    # Without organs, the opacity changes nothing, and the window does.
    sample.locator(".gi-opacity").fill("10")
    assert picture(sample) == without
    sample.locator(".gi-level").fill("20")
    assert picture(sample) != without
    sample.get_by_role("button", name="Reset window").click()
    assert picture(sample) == without
    for index in range(boxes.count()):
        boxes.nth(index).check()
    sample.locator(".gi-opacity").fill("60")
    assert picture(sample) == before


@needs_chromium
def test_a_series_gives_dicom_files_and_is_deleted(
    page: "playwright.Page", model: Path, uploads: Path, tmp_path: Path
) -> None:
    predict_upload(page, SAMPLES / "phantom_DICOM.zip")
    page.wait_for_selector(".gi-viewer:not(.is-empty) .gi-number")
    assert left_files(uploads) == []
    segmentation = pydicom.dcmread(download(page, "DICOM SEG", tmp_path))
    expected = predicted_by_command(model, SAMPLES / "phantom_DICOM.zip", tmp_path / "command", "dicom-seg")
    assert segmentation.PixelData == pydicom.dcmread(expected).PixelData
    contours = pydicom.dcmread(download(page, "RTSTRUCT", tmp_path))
    assert len(contours.StructureSetROISequence) == 3


@needs_chromium
def test_a_series_without_uids_offers_what_can_be_written(page: "playwright.Page", tmp_path: Path) -> None:
    with zipfile.ZipFile(SAMPLES / "phantom_DICOM.zip") as archive:
        archive.extractall(tmp_path / "series")
    for path in (path for path in (tmp_path / "series").rglob("*") if path.is_file()):
        dataset = pydicom.dcmread(path)
        for name in ("SOPInstanceUID", "SeriesInstanceUID", "StudyInstanceUID", "FrameOfReferenceUID"):
            del dataset[name]
        dataset.save_as(path)
    upload_path = Path(shutil.make_archive(str(tmp_path / "no uids"), "zip", tmp_path / "series"))
    predict_upload(page, upload_path)
    page.wait_for_selector(".gi-viewer:not(.is-empty) .gi-number")
    assert page.locator(".gi-downloads button").all_inner_texts() == ["NIfTI", "Report (JSON)", "Report"]
    notes = page.locator(".gi-notes li").all_inner_texts()
    assert [note.split(":")[0] for note in notes] == ["No DICOM SEG", "No RTSTRUCT"]
    for note in notes:
        assert "has no SOPInstanceUID, which contours have to name; export it with its UIDs" in note
        assert "/" not in note and "--" not in note
    assert nibabel.load(download(page, "NIfTI", tmp_path)).shape[2] == 16
    report = json.loads(download(page, "Report (JSON)", tmp_path).read_text())
    assert report["files"]["rtstruct"]["names"] == [] and "/" not in report["files"]["rtstruct"]["reason"]


@needs_chromium
def test_a_visitor_names_another_checkpoint(page: "playwright.Page", published: LoopbackHub, tmp_path: Path) -> None:
    name, start = page.get_by_label("Model"), page.get_by_role("button", name="Sample: phantom NIfTI")
    assert name.input_value() == MODEL_ID
    name.fill("loopback/absent")
    start.click()
    assert "loopback/absent" in page.get_by_test_id("toast-body").inner_text()
    name.fill(OTHER_ID)
    start.click()
    page.wait_for_selector(".gi-viewer:not(.is-empty) .gi-number")
    report = json.loads(download(page, "Report (JSON)", tmp_path).read_text())
    commit = HfApi(published.endpoint, token="any").model_info(OTHER_ID).sha
    assert report["checkpoints"] == {OTHER_ID: commit}
    # It has more labels than a byte has bits, and each can be hidden.
    boxes = page.locator(".gi-organs tbody label")
    assert boxes.all_inner_texts() == list(OTHER_LABELS.names)
    volumes = [one["volume_ml"] for one in report["organs"].values()]
    last = max(index for index, volume in enumerate(volumes) if volume > 1)
    assert last >= 8
    page.locator(".gi-slice").fill(str(report["organs"][OTHER_LABELS.names[last]]["first_slice"]))
    shown = picture(page)
    boxes.nth(last).click()
    assert picture(page) != shown
    boxes.nth(last).click()
    assert picture(page) == shown


@needs_chromium
def test_garbage_gets_a_message_without_a_path(page: "playwright.Page", uploads: Path, tmp_path: Path) -> None:
    garbage = tmp_path / "my garbage.nii.gz"
    garbage.write_bytes(b"no scan")
    predict_upload(page, garbage)
    message = page.get_by_test_id("toast-body").inner_text()
    assert "my garbage.nii.gz: not a whole NIfTI file" in message
    assert not re.search(r"/\w+/|Traceback", message)
    page.locator(".gi-inputs").get_by_label("Clear").wait_for(state="detached")
    assert left_files(uploads) == []


@needs_chromium
def test_an_upload_that_is_too_large_is_refused(page: "playwright.Page", uploads: Path, tmp_path: Path) -> None:
    large, parts = tmp_path / "large.nii", [tmp_path / f"{index}.dcm" for index in range(3)]
    large.write_bytes(bytes(MAX_UPLOAD_MB * 10**6 + 1))
    upload(page, large)
    assert "maximum" in page.get_by_test_id("toast-body").inner_text()
    page.reload()
    for part in parts:
        part.write_bytes(os.urandom(MAX_UPLOAD_MB * 400_000))
    predict_upload(page, *parts)
    assert f"at most 2000 files and {MAX_UPLOAD_MB} MB, got 3" in page.get_by_test_id("toast-body").inner_text()


@needs_chromium
def test_visitors_do_not_share_scans(
    sample: "playwright.Page", browser: "playwright.Browser", address: str, uploads: Path
) -> None:
    assert sample.locator(".gi-canvas").is_visible()
    with visit(browser, address) as page:
        assert not page.locator(".gi-canvas").is_visible()
        upload(page, SAMPLES / "phantom_NIfTI.nii.gz")
        page.get_by_label("Clear").first.wait_for()
        assert len(left_files(uploads)) == 1
        # The server hears of the upload a moment after the page shows it.
        page.wait_for_timeout(3000)
    # The visitor has left without a prediction.
    deadline = time.monotonic() + 20
    while left_files(uploads) and time.monotonic() < deadline:
        time.sleep(0.1)
    assert left_files(uploads) == []


@pytest.mark.parametrize("name", ["", "tiny", "/etc", "../models", "app/samples", "a/b/c"])
def test_a_visitor_cannot_name_a_folder(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    from app.app import check_model_name

    monkeypatch.chdir(ROOT)
    with pytest.raises(InputError, match="expected a Hub id"):
        check_model_name(name, {"run": "demo/run"})
    assert check_model_name(" run ", {"run": "demo/run"}) == "demo/run"
    assert check_model_name("name/model", {}) == "name/model"


def test_a_header_that_asks_for_too_much_memory_is_refused(tmp_path: Path) -> None:
    from app.app import check_voxel_count
    from gi_segmentation.formats.nifti import open_volume

    # Pixels of 0.001 mm, so the field of the training has 351,000 of them in each direction.
    image = nibabel.Nifti1Image(np.ones((8, 8, 2), np.uint8), np.diag([0.001, 0.001, 3, 1]))
    nibabel.save(image, tmp_path / "tiny.nii.gz")
    with pytest.raises(InputError, match="at most 64 million voxels"):
        check_voxel_count([open_volume(tmp_path / "tiny.nii.gz")], num_organs=3)


def test_the_space_holds_only_sources(published: LoopbackHub) -> None:
    names = HfApi(published.endpoint, token="any").list_repo_files(SPACE_ID, repo_type="space")
    assert {"app.py", "README.md", "requirements.txt", "viewer.js", "gi_segmentation/predict.py"} <= set(names)
    kinds = {"", ".py", ".md", ".txt", ".js", ".css", ".html", ".j2", ".gz", ".zip"}
    assert {Path(name).suffix for name in names} == kinds


def test_the_space_installs_what_the_package_needs() -> None:
    wanted = set((ROOT / "app" / "requirements.txt").read_text().split())
    assert wanted <= set((ROOT / "setup.cfg").read_text().split())
    (version,) = re.findall(r"^sdk_version: (.+)$", (ROOT / "app" / "README.md").read_text(), re.M)
    assert f"gradio>={version.rsplit('.', 1)[0]},<7" in (ROOT / "setup.cfg").read_text()
