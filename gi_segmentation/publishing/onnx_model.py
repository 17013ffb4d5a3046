"""A checkpoint as an ONNX file, which runs without PyTorch and `transformers`, and its section on the model card."""

import json
import tempfile
import warnings
from pathlib import Path
from typing import Any, NamedTuple, cast

import torch
from huggingface_hub import HfApi
from huggingface_hub.errors import EntryNotFoundError
from torch import nn
from torch.nn import functional as F
from transformers import PreTrainedModel, SegformerImageProcessorPil

from gi_segmentation.data.intensity import MAX_PIXEL
from gi_segmentation.data.transforms import normalize
from gi_segmentation.errors import InputError, hub_errors, one_line
from gi_segmentation.files import copy_file
from gi_segmentation.inference.members import find_commit
from gi_segmentation.models.configuration import Task, find_task
from gi_segmentation.models.loading import load_checkpoint
from gi_segmentation.models.masks import choose_labels, resize_logits
from gi_segmentation.postprocessing.limits import Postprocessing
from gi_segmentation.publishing.cards import render_card
from gi_segmentation.publishing.hub import add_files
from gi_segmentation.publishing.model_card import CARD

# Where other programs, for example transformers.js, look for the file in a repository.
ONNX_FILE = "onnx/model.onnx"
# Logits of the ONNX file may differ from those of PyTorch by this much. Rounding makes differences of about 0.00001.
MAX_DIFFERENCE = 1e-3
# The section stands on the card before this heading.
HEADING, NEXT_HEADING = "### How to use it without PyTorch", "## 3. Training"


class OnnxCheck(NamedTuple):
    """How the ONNX file differs from the model in PyTorch.

    Attributes:
        difference: The largest difference between two logits.
        differing: Number of pixels with another label.
        pixels: Number of pixels that were compared.
    """

    difference: float
    differing: int
    pixels: int

    def describe(self) -> str:
        """Return a line for the terminal."""
        return (
            f"compared with PyTorch: logits differ by at most {self.difference:.1e}, "
            f"labels in {self.differing:,} of {self.pixels:,} pixels"
        )


class LogitsOnly(nn.Module):
    """A segmentation model that returns its logits alone: the outputs of an ONNX file are tensors."""

    def __init__(self, model: PreTrainedModel) -> None:
        super().__init__()
        self.model = model

    def forward(self, pixel_values: torch.Tensor) -> torch.Tensor:
        """Return the logits, float, shape `(B, channels, h, w)`."""
        return self.model(pixel_values=pixel_values).logits


def describe_model(model: PreTrainedModel, processor: SegformerImageProcessorPil) -> dict[str, Any]:
    """Return what a user of the ONNX file must know to prepare slices and to read the logits."""
    task = cast(Task, find_task(model.config))
    return {
        "labels": task.channels,
        "label_mode": task.label_mode,
        "image_size": processor.size["height"],
        "image_mean": list(processor.image_mean),
        "image_std": list(processor.image_std),
        "slice_context": getattr(model.config, "slice_context", 0),
        "scaling": "x / (x + mean of x), resized with antialiasing, rounded to multiples of 1 / 65535",
        "postprocessing": limits.to_config() if (limits := read_limits(model)) else None,
    }


def read_limits(model: PreTrainedModel) -> Postprocessing | None:
    """Return the limits of post-processing of a checkpoint; None if it has none.

    Raises:
        InputError: If they have another form.
    """
    value = getattr(model.config, "postprocessing", None)
    try:
        return None if value is None else Postprocessing.from_config(value, cast(Task, find_task(model.config)).labels)
    except InputError as error:
        raise InputError(f"config.json: {error}; correct it, or remove the entry") from error


def describe_limits(settings: Postprocessing | None) -> dict[str, Any]:
    """Return which limits the lines on the card apply, and what they leave out, because it needs a whole scan."""
    organs = list(settings.organs.values()) if settings else []
    left_out = []
    if any(one.min_neighbour_confidence < one.min_slice_confidence for one in organs):
        left_out.append("the lower limit beside slices that stay")
    if any(one.min_volume_ml or one.min_confidence for one in organs):
        left_out.append("the limits for components")
    return {
        "gated": any(one.threshold < 1 or one.min_slice_confidence or one.min_slice_area_mm2 for one in organs),
        "left_out": " and ".join(left_out),
    }


def write_onnx(model: PreTrainedModel, processor: SegformerImageProcessorPil, path: Path) -> None:
    """Write a model as an ONNX file.

    The input is `pixel_values`, float32, shape `(B, 3, S, S)`, and the output is `logits`. The batch size B is free.
    The metadata of the file has the values of `describe_model`, each as JSON.

    Args:
        model: A model from `load_checkpoint`.
        processor: Its image processor.
        path: The file to write.

    Raises:
        InputError: If PyTorch cannot export this model.
    """
    import onnx

    size = processor.size["height"]
    # A batch of 2, because PyTorch takes a size of 1 for a constant.
    example = torch.zeros(2, 3, size, size)
    # PyTorch warns about its own deprecated functions here. Users cannot do anything about these.
    with warnings.catch_warnings(), torch.no_grad():
        warnings.simplefilter("ignore")
        try:
            torch.onnx.export(
                LogitsOnly(model).eval(),
                (example,),
                path,
                input_names=["pixel_values"],
                output_names=["logits"],
                # The older exporter, without dynamo, fails for BEiT.
                dynamo=True,
                dynamic_shapes=({0: torch.export.Dim("batch")},),
                # One file, and no second one beside it for the weights.
                external_data=False,
                verbose=False,
            )
        except (torch.onnx.OnnxExporterError, RuntimeError) as error:
            family, reason = model.config.model_type, one_line(error)[:300]
            raise InputError(f"PyTorch {torch.__version__} cannot export this {family} ({reason})") from error
    written = onnx.load(path)
    facts = describe_model(model, processor)
    onnx.helper.set_model_props(written, {key: json.dumps(value) for key, value in facts.items()})
    onnx.save(written, path)


def compare_onnx(model: PreTrainedModel, processor: SegformerImageProcessorPil, path: Path) -> OnnxCheck:
    """Compare an ONNX file with its model in PyTorch, on random images in batches of 1 and of 3.

    Args:
        model: The model that was exported.
        processor: Its image processor.
        path: The ONNX file.
    """
    import onnxruntime

    session = onnxruntime.InferenceSession(path, providers=["CPUExecutionProvider"])
    label_mode = cast(Task, find_task(model.config)).label_mode
    size = processor.size["height"]
    generator = torch.Generator().manual_seed(0)
    difference, differing, pixels = 0.0, 0, 0
    # The model was exported with a batch of 2. Other batch sizes show that this number is not fixed.
    for batch in (1, 3):
        # Smooth images with blobs of about the size of an organ.
        coarse = torch.rand(batch, 3, 8, 8, generator=generator)
        smooth = F.interpolate(coarse, size=(size, size), mode="bilinear")
        pixel_values = normalize(MAX_PIXEL * smooth.permute(0, 2, 3, 1), processor)
        with torch.no_grad():
            expected = model(pixel_values=pixel_values).logits
        got = torch.from_numpy(session.run(["logits"], {"pixel_values": pixel_values.numpy()})[0])
        # A logit that is not a number counts as an infinite difference.
        difference = max(difference, float((got - expected).abs().nan_to_num(nan=torch.inf).max()))
        labels = [choose_labels(resize_logits([logits], size, size), label_mode) for logits in (got, expected)]
        differing += int((labels[0] != labels[1]).sum())
        pixels += labels[0].numel()
    return OnnxCheck(difference, differing, pixels)


def render_section(model: PreTrainedModel, name: str, revision: str | None) -> str:
    """Return the section of the model card about the ONNX file.

    Args:
        model: The model that was exported.
        name: Folder or Hub id.
        revision: Its branch on the Hub; None: the main branch.
    """
    section = render_card(
        "onnx_section.md",
        repo_id=name,
        revision=revision,
        on_hub=not Path(name).is_dir(),
        label_mode=cast(Task, find_task(model.config)).label_mode,
        slice_context=getattr(model.config, "slice_context", 0),
        **describe_limits(read_limits(model)),
    )
    return f"{HEADING}\n\n{section.rstrip()}\n"


def add_section(card: str, section: str) -> str:
    """Put the section about the ONNX file on a model card. An earlier section is replaced.

    Example:
        >>> card = add_section("# Model\\n\\n## 3. Training\\n", HEADING + "\\n\\nold\\n")
        >>> add_section(card, HEADING + "\\n\\nnew\\n") == card.replace("old", "new")
        True
    """
    before, heading, rest = card.partition(f"{NEXT_HEADING}\n")
    before = before.partition(f"{HEADING}\n")[0].rstrip("\n")
    # A card of another form has no such heading. The section is then its last one.
    return f"{before}\n\n{section}" + (f"\n{heading}{rest}" if heading else "")


def keep_file(source: Path, folder: Path) -> None:
    """Copy a file into a folder, whole or not at all. An older file of this name is replaced."""
    folder.mkdir(parents=True, exist_ok=True)
    copy_file(source, folder / source.name)


def read_card(name: str, revision: str | None) -> str | None:
    """Return the model card of a repository; None if it has none."""
    try:
        path = HfApi().hf_hub_download(name, CARD, revision=revision)
    except EntryNotFoundError:
        return None
    return Path(path).read_text(encoding="utf-8")


def export_model(name: str, revision: str | None, output_dir: Path, push_to_hub: bool) -> Path:
    """Write a checkpoint as an ONNX file, check it, and publish it if wanted. Print what was done.

    If the checkpoint lies in `output_dir`, its model card gets a section about the file. A published card does too.

    Args:
        name: Folder or Hub id of the checkpoint.
        revision: Branch, tag or commit on the Hub; None: the main branch.
        output_dir: Folder for `onnx/model.onnx`.
        push_to_hub: Whether to add the file to the repository `name`.

    Returns:
        The path of the file.

    Raises:
        InputError: If the checkpoint cannot be used, or the file does not compute the same: nothing is written then.
            If the Hub refuses.
    """
    model, processor = load_checkpoint(name, revision)
    commit = find_commit(name, revision)
    # The folder has what will be published: the file and the card.
    with tempfile.TemporaryDirectory() as scratch:
        folder = Path(scratch)
        draft, card_draft = folder / ONNX_FILE, folder / CARD
        draft.parent.mkdir()
        write_onnx(model.float(), processor, draft)
        check = compare_onnx(model, processor, draft)
        print(check.describe())
        if check.difference > MAX_DIFFERENCE:
            raise InputError(
                f"{name}: expected logits within {MAX_DIFFERENCE} of PyTorch's, got a difference of "
                f"{check.difference:.1e}; nothing was kept. Try other versions of torch, onnxscript or onnxruntime"
            )
        path, card = output_dir / ONNX_FILE, output_dir / CARD
        keep_file(draft, path.parent)
        print(f"{path}: {path.stat().st_size / 1e6:.1f} MB")
        section = render_section(model, name, revision)
        if Path(name).is_dir() and output_dir.resolve() == Path(name).resolve() and card.exists():
            card_draft.write_text(add_section(card.read_text(encoding="utf-8"), section), encoding="utf-8")
            keep_file(card_draft, output_dir)
            print(f"{card}: has a section about the file")
        if push_to_hub:
            with hub_errors("reading the card of", name):
                old = read_card(name, commit or revision)
            if old is not None:
                card_draft.write_text(add_section(old, section), encoding="utf-8")
            # The commit is refused if the branch has moved on, because the file belongs to the weights of this commit.
            print(add_files(folder, name, f"Add {ONNX_FILE}", branch=revision, parent=commit))
    return path
