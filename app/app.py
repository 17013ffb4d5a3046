"""A web page that predicts a scan and shows its slices. `python -m app` starts it, and a Space of Hugging Face does.

A Space runs this file as a script, so it imports nothing from this folder.
The server keeps no scan. The browser gets the slices, the masks and the files, and then all of them are deleted here.
"""

import argparse
import base64
import gzip
import html
import logging
import os
import re
import shutil
import tempfile
from collections import defaultdict
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from functools import lru_cache
from pathlib import Path
from typing import TYPE_CHECKING, Any

import gradio as gr
import numpy as np

from gi_segmentation.errors import InputError, exit_on_input_error
from gi_segmentation.labels import GI_TRACT
from gi_segmentation.memory import keep_freed_memory, release_memory
from gi_segmentation.processes import leaving_no_process_behind
from gi_segmentation.shortages import Advice, describe_shortage

if TYPE_CHECKING:
    from gi_segmentation.formats.inputs import InputScan
    from gi_segmentation.formats.volumes import Volume
    from gi_segmentation.inference.members import Member
    from gi_segmentation.inference.outputs import OutputPlan
    from gi_segmentation.review.predicted_scan import PredictedScan

logger = logging.getLogger(__name__)

FOLDER = Path(__file__).resolve().parent
SAMPLES = {path.name.split(".")[0].replace("_", " "): path for path in sorted((FOLDER / "samples").glob("*.*"))}
# The environment variable with the checkpoint of a Space.
MODEL_VARIABLE = "GI_SEGMENTATION_MODEL"

# A study of one visit has some hundred files.
MAX_UPLOAD_FILES = 2_000
# A zip may grow to this many times the size of an upload. Slices of MR shrink to about a half.
MAX_GROWTH = 4
# The progress bar moves after each batch, so batches are smaller than those of the command.
BATCH_SIZE = 4
# The browser gets a byte for each voxel, and one for the masks. A whole Kaggle scan has 10 to 16 million voxels.
MAX_SHOWN_VOXELS = 64_000_000
# The server keeps a mask and a probability for each voxel and organ, which take three bytes.
MAX_ORGAN_VOXELS = 640_000_000
# Intensities above this percentile are shown as white. A few voxels beside a coil may be many times as bright.
BRIGHTEST_PERCENTILE = 99.9
# The percentile that the first window ends at.
WINDOW_PERCENTILE = 99.0

# What a visitor can do if the server has not enough memory.
ADVICE = Advice(*["try again later, upload a smaller scan, or predict it on your own computer"] * 3)

# The buttons for the files of each format that the page offers.
BUTTONS = {
    "nifti": ["NIfTI"],
    "dicom-seg": ["DICOM SEG"],
    "rtstruct": ["RTSTRUCT"],
    "report": ["Report (JSON)", "Report"],
}

# Gradio fills this argument of a function, and shows the progress bars of `tqdm` with it.
PROGRESS = gr.Progress(track_tqdm=True)
# The uploads of each session that were not predicted yet. They are deleted when the visitor leaves.
waiting: dict[str, set[Path]] = defaultdict(set)


def parse_arguments(argv: list[str] | None) -> argparse.Namespace:
    """Read the command line."""
    parser = argparse.ArgumentParser(
        "python -m app", description=main.__doc__, formatter_class=argparse.ArgumentDefaultsHelpFormatter
    )
    parser.add_argument(
        "--model",
        default=os.environ.get(MODEL_VARIABLE, ""),
        help=f"checkpoint that the page starts with: a Hub id, or a folder, the only one that it may read; "
        f"the default is in {MODEL_VARIABLE}",
    )
    parser.add_argument("--max_upload_mb", type=int, default=512, help="size of an upload, all files together")
    arguments = parser.parse_args(argv)
    if arguments.max_upload_mb < 1:
        raise InputError(f"expected --max_upload_mb of at least 1, but got {arguments.max_upload_mb}")
    return arguments


def main(argv: list[str] | None = None) -> None:
    """Serve a web page that predicts scans. GRADIO_SERVER_NAME and GRADIO_SERVER_PORT set its address."""
    arguments = parse_arguments(argv)
    max_bytes = arguments.max_upload_mb * 10**6
    keep_freed_memory()
    if arguments.model:
        # So a wrong name is an error at once, and the first visitor need not wait.
        load_members_once(arguments.model)
    build_page(arguments.model, max_bytes).launch(
        theme=gr.themes.Default(primary_hue="sky", neutral_hue="slate", font=["system-ui", "sans-serif"]),
        css_paths=FOLDER / "page.css",
        max_file_size=max_bytes,
        footer_links=[],
        ssr_mode=False,
    )


def build_page(model: str, max_bytes: int) -> gr.Blocks:
    """Build the page. Its title is that of the checkpoint that it starts with.

    Args:
        model: The checkpoint that it starts with: a Hub id, or a folder that visitors may use.
        max_bytes: The largest upload.
    """
    folders = {Path(model).resolve().name: model} if model and Path(model).is_dir() else {}
    ours = not model or load_members_once(model)[0].labels == GI_TRACT
    title = "Stomach and bowels on MR" if ours else "Predicted organs"

    def predict_upload(name: str, files: list[str] | None, progress: gr.Progress = PROGRESS) -> list[dict[str, Any]]:
        progress(0, desc="Loading the model")
        with shown_errors(), tempfile.TemporaryDirectory(prefix="gi-segmentation-") as folder:
            members = load_members_once(check_model_name(name, folders))
            path = take_upload([Path(file) for file in files or []], Path(folder) / "upload", max_bytes)
            return predict_and_show(members, path, max_bytes)

    def predict_sample(name: str, sample: str, progress: gr.Progress = PROGRESS) -> list[dict[str, Any]]:
        progress(0, desc="Loading the model")
        with shown_errors():
            return predict_and_show(load_members_once(check_model_name(name, folders)), SAMPLES[sample], max_bytes)

    with gr.Blocks(title=title, analytics_enabled=False, delete_cache=(300, 3600)) as page:
        gr.HTML(
            f"<header class='gi-header'><h1>{title}</h1><p>outlined by a model of gi-segmentation</p>"
            "<p class='gi-warning'>Research software, no medical device. A clinician must check every contour.</p>"
            "</header>",
            elem_classes="gi-flush",
        )
        with gr.Row():
            with gr.Column(scale=0, min_width=290, elem_classes="gi-inputs"):
                checkpoint = gr.Textbox(
                    next(iter(folders), model), label="Model", info="Hub id of a checkpoint of gi-segmentation"
                )
                upload = gr.File(label="Scan: NIfTI, DICOM files, or a zip", file_count="multiple", height=150)
                start = gr.Button("Predict", variant="primary")
                gr.HTML(
                    "<p class='gi-quiet'>Files are deleted as soon as they are predicted.</p>", elem_classes="gi-flush"
                )
                samples = [gr.Button(f"Sample: {name}", size="sm") for name in SAMPLES]
            with gr.Column(scale=1, min_width=320):
                viewer = gr.HTML(
                    [],
                    html_template=(FOLDER / "viewer.html").read_text(encoding="utf-8"),
                    js_on_load=(FOLDER / "viewer.js").read_text(encoding="utf-8"),
                    apply_default_css=False,
                    elem_classes="gi-flush",
                )
        # One prediction at a time, because each takes all cores or the whole GPU.
        settings: dict[str, Any] = {"api_visibility": "private", "concurrency_id": "model", "concurrency_limit": 1}
        upload.upload(remember_upload, upload, api_visibility="private")
        predicted = start.click(predict_upload, [checkpoint, upload], viewer, **settings)
        for after in (predicted.success, predicted.failure):
            after(forget_upload, outputs=upload, api_visibility="private")
        for button, name in zip(samples, SAMPLES, strict=True):
            button.click(predict_sample, [checkpoint, gr.State(name)], viewer, **settings)
        page.unload(forget_upload)
    return page.queue(max_size=20)


@contextmanager
def shown_errors() -> Iterator[None]:
    """Show a mistake of the visitor on the page. Any other error goes to the log, and the page only says so."""
    try:
        yield
    except InputError as error:
        raise gr.Error(public_message(error), duration=None, print_exception=False) from error
    except Exception as error:
        logger.exception("a prediction failed")
        message = describe_shortage(error, ADVICE) or "Something went wrong on the server. Its log says what."
        raise gr.Error(message, duration=None, print_exception=False) from error


def public_message(error: InputError) -> str:
    """Return the message of an error as HTML, without the folders of this machine.

    Example:
        >>> public_message(InputError("--input /tmp/x1/scan 1.nii.gz: not a whole <file>; see https://a.org/b"))
        'scan 1.nii.gz: not a whole &lt;file&gt;; see https://a.org/b'
    """
    return html.escape(public_text(str(error)).removeprefix("--input "), quote=False)


def public_text(text: str) -> str:
    """Return a text without the folders of this machine."""
    # An absolute path starts after a space or a bracket. The slashes of an address do not.
    return re.sub(r"(?<![\w:/.-])/(?:[^/\s]+/)*", "", text)


def check_model_name(name: str, folders: dict[str, str]) -> str:
    """Return the Hub id or the folder that a visitor named.

    Args:
        name: What the visitor wrote.
        folders: The folders that visitors may use, by the names that the page shows.

    Raises:
        InputError: If it is neither, for example another folder of this machine.
    """
    name = name.strip()
    if name in folders:
        return folders[name]
    if not re.fullmatch(r"\w[\w.-]*/\w[\w.-]*", name) or Path(name).exists():
        raise InputError(f"Model: expected a Hub id like NAMESPACE/NAME, got {name or 'nothing'}")
    return name


@lru_cache(maxsize=2)
def load_members_once(name: str) -> "list[Member]":
    """Load a checkpoint. The last two stay in memory.

    Raises:
        InputError: If it cannot be used.
    """
    # Imported here, because `--help` must not wait for PyTorch.
    from gi_segmentation.inference.arguments import Computation
    from gi_segmentation.inference.members import load_members

    return load_members([name], None, Computation())


def remember_upload(files: list[str], request: gr.Request) -> None:
    """Note the uploads of a session, so that they are deleted when the visitor leaves."""
    waiting[str(request.session_hash)] |= {Path(file) for file in files}


def forget_upload(request: gr.Request) -> None:
    """Delete the uploads of a session that are still there."""
    for path in waiting.pop(str(request.session_hash), ()):
        path.unlink(missing_ok=True)


def take_upload(files: list[Path], folder: Path, max_bytes: int) -> Path:
    """Move uploads into a folder, before any of them is opened.

    Args:
        files: The uploads.
        folder: A temporary folder.
        max_bytes: The largest size of all files together.

    Returns:
        The file, or the folder if there are several.

    Raises:
        InputError: If there is no upload, or too much of it.
    """
    if not files or not all(file.is_file() for file in files):
        raise InputError("expected a scan, got no file; upload one")
    size = sum(file.stat().st_size for file in files)
    if len(files) > MAX_UPLOAD_FILES or size > max_bytes:
        raise InputError(
            f"expected at most {MAX_UPLOAD_FILES} files and {max_bytes / 1e6:.0f} MB, got {len(files)} and "
            f"{size / 1e6:.0f} MB; run python -m gi_segmentation.predict on your own computer"
        )
    if len(files) > 1 and any(file.suffix.lower() == ".zip" for file in files):
        raise InputError("expected one zip, or files without a zip, got both or several zips; upload one zip alone")
    for index, file in enumerate(files):
        # Files of two folders may have one name. The folder of a scan belongs to its name.
        place = folder if not (folder / file.name).exists() else folder / str(index)
        place.mkdir(exist_ok=True)
        shutil.move(file, place / file.name)
    return folder if len(files) > 1 else folder / files[0].name


def predict_and_show(members: "list[Member]", path: Path, max_bytes: int) -> list[dict[str, Any]]:
    """Predict all scans at a path.

    Args:
        members: The checkpoint.
        path: What `gi_segmentation.predict` takes as `--input`.
        max_bytes: The largest upload.

    Returns:
        What the viewer shows, for each scan; see `describe_view`.

    Raises:
        InputError: If the input cannot be used, or is too large.
    """
    from gi_segmentation.formats.archives import unpacked
    from gi_segmentation.formats.inputs import find_scans
    from gi_segmentation.inference import outputs
    from gi_segmentation.inference.batches import PredictionSettings
    from gi_segmentation.inference.members import find_postprocessing
    from gi_segmentation.inference.scans import predict_scans

    postprocessing, _ = find_postprocessing(members)
    settings = PredictionSettings(BATCH_SIZE, num_workers=0, postprocessing=postprocessing)
    shown: list[dict[str, Any]] = []
    with unpacked(path, MAX_UPLOAD_FILES, MAX_GROWTH * max_bytes) as source:
        scans = find_scans(source)
        problems = [InputError(scan.problem) for scan in scans.scans if scan.problem]
        plans = {}
        for scan in scans.usable:
            formats = [name for name in outputs.possible_formats(scan.kind) if name in BUTTONS]
            with collected_problems(scan, problems):
                plans[scan.name] = outputs.plan_outputs(scan, formats)
        usable = [scan for scan in scans.usable if scan.name in plans]
        check_voxel_count((scan.volume for scan in usable), len(members[0].labels))
        for scan, predicted in predict_scans(members, usable, settings, probabilities=True):
            with collected_problems(scan, problems), tempfile.TemporaryDirectory() as folder:
                if isinstance(predicted, InputError):
                    raise predicted
                plan = outputs.write_formats(predicted, plans[scan.name], Path(folder))
                shown.append(describe_view(predicted, plan, Path(folder)))
            # The report of the scan has needed volumes of several kinds.
            release_memory()
    if not shown:
        raise problems[0]
    if postprocessing is not None:
        gr.Info(f"Post-processing of the model: {html.escape(postprocessing.describe(), quote=False)}", duration=None)
    for line in scans.left_out:
        gr.Info(html.escape(public_text(line), quote=False), duration=None)
    for problem in problems:
        gr.Warning(public_message(problem), duration=None)
    return shown


@contextmanager
def collected_problems(scan: "InputScan", problems: list[InputError]) -> Iterator[None]:
    """Let an error of one scan not stop the others. The list gets a message for the visitor."""
    try:
        yield
    except InputError as error:
        problems.append(error)
    except MemoryError:
        raise
    except Exception:
        logger.exception("a scan failed")
        problems.append(InputError(f"{scan.name}: something went wrong on the server. Its log says what."))


def check_voxel_count(volumes: "Iterable[Volume]", num_organs: int) -> None:
    """Check from the headers that the scans are not too large for memory and for a browser.

    Args:
        volumes: The scans.
        num_organs: Number of organs that are predicted.

    Raises:
        InputError: If they are.
    """
    voxels = 0
    for volume in volumes:
        depth, height, width = volume.training_shape
        # The window that the model sees may be much larger than the slice, if a header has a wrong size of pixels.
        _, (seen_height, seen_width) = volume.window
        voxels += depth * max(height * width, seen_height * seen_width)
    if voxels > (most := min(MAX_SHOWN_VOXELS, MAX_ORGAN_VOXELS // num_organs)):
        raise InputError(
            f"expected scans of at most {most / 1e6:.0f} million voxels together, got {voxels / 1e6:.0f} "
            f"million; upload fewer scans, or run python -m gi_segmentation.predict on your own computer"
        )


def describe_view(predicted: "PredictedScan", plan: "OutputPlan", folder: Path) -> dict[str, Any]:
    """Return what `viewer.js` needs to show a scan.

    Args:
        predicted: The scan and its masks.
        plan: What was written for it, and what could not be written.
        folder: The folder with its files.

    Returns:
        Names, sizes and volumes of organs in millilitres; the verdict; intensities as one byte for each voxel, and
        masks as one bit for each organ and voxel, both packed; the files in base64, and what was left out. The axes
        are slices from head to feet, rows and columns.
    """
    # A visitor has no flags.
    notes = [
        f"No {BUTTONS[name][0]}: {public_text(reason).partition(', or choose --format')[0]}"
        for name, reason in plan.refused.items()
    ]
    return {
        "name": predicted.volume.name,
        "shape": predicted.volume.training_shape,
        "spacing_mm": predicted.volume.spacing_mm,
        **describe_voxels(predicted),
        "organs": [
            {"name": organ.replace("_", " "), "colour": colour, "volume_ml": one.volume_ml}
            for (organ, one), colour in zip(predicted.measured.organs.items(), predicted.labels.colours, strict=True)
        ],
        "verdict": predicted.triage.verdict,
        "reasons": [reason.text for reason in predicted.triage.reasons],
        "unchecked": list(predicted.triage.unchecked),
        "files": describe_files(predicted.scan, plan, folder),
        "notes": [*notes, *plan.remarks],
    }


def describe_voxels(predicted: "PredictedScan") -> dict[str, Any]:
    """Return the intensities and the masks of a scan for `viewer.js`, and with what it begins; see `describe_view`."""
    volume, numbers = predicted.volume, predicted.numbers
    # Slices that are missing are 0.
    intensities = np.zeros(volume.training_shape, dtype=np.float32)
    for place, number in enumerate(numbers):
        intensities[number - numbers[0]] = predicted.read_slice(place)
    # 8 bits are enough for a screen, and 16 bits of a whole Kaggle scan would have 25 MB.
    brightest = max(float(np.percentile(intensities, BRIGHTEST_PERCENTILE)), 1.0)
    eight_bits = (np.clip(intensities / brightest, 0, 1) * 255).round().astype(np.uint8)
    # Organ number n is bit n, because organs may overlap. A browser has words of one, two or four bytes.
    word = np.min_scalar_type((1 << len(predicted.labels)) - 1).newbyteorder("<")
    bits = np.zeros(volume.shape, dtype=word)
    for number, mask in enumerate(predicted.masks):
        bits[mask] |= word.type(1 << number)
    shown = volume.to_training(bits)
    areas = np.count_nonzero(shown, axis=(1, 2))
    return {
        # The slice that shows most of the organs.
        "first_slice": int(areas.argmax()) + 1 if areas.any() else len(areas) // 2 + 1,
        "brightest_percent": float(np.percentile(eight_bits, WINDOW_PERCENTILE)) / 255 * 100,
        "intensities": compress_to_text(eight_bits),
        "masks": compress_to_text(shown),
        "mask_bytes": word.itemsize,
    }


def describe_files(scan: "InputScan", plan: "OutputPlan", folder: Path) -> list[dict[str, str]]:
    """Return label, name and content of each file of a scan; see `describe_view`."""
    from gi_segmentation.inference.outputs import output_paths

    *folders, _ = scan.name.split("/")
    return [
        # Files of two patients may have one name, and all of them are saved to one folder.
        {
            "label": label,
            "name": "_".join([*folders, path.name]),
            "data": base64.b64encode((folder / path.name).read_bytes()).decode(),
        }
        for name in plan.formats
        for label, path in zip(BUTTONS[name], output_paths(name, scan), strict=True)
    ]


def compress_to_text(voxels: np.ndarray) -> str:
    """Return bytes as text that `viewer.js` unpacks."""
    return base64.b64encode(gzip.compress(voxels.tobytes(), compresslevel=4)).decode()


if __name__ == "__main__":
    with leaving_no_process_behind(), exit_on_input_error():
        main()
