"""What is fuzzed. A target makes cases with hypothesis, and checks one case.

A check returns "clear error" or "right result". Anything else is a failure: another exception, an error of several
lines, or a result that differs from that of the slow decoder.
"""

import ast
import json
import re
import struct
import zlib
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any, Literal

import numpy as np
import yaml
from hypothesis import strategies as st
from PIL import Image

from dataset_builder.phantom import write_phantom
from gi_segmentation.errors import InputError
from gi_segmentation.formats.kaggle.annotations import read_annotations, read_segmentation
from gi_segmentation.formats.kaggle.folder import find_slices
from gi_segmentation.formats.kaggle.images import decode_image, read_slice
from gi_segmentation.formats.kaggle.label_file import LabelFile
from gi_segmentation.formats.kaggle.names import SliceFile, parse_slice_path
from gi_segmentation.labels import GI_TRACT
from gi_segmentation.rle import decode, fill_runs
from tests.fuzz import oracles

Outcome = Literal["clear error", "right result"]
RECIPES = Path(__file__).resolve().parents[2] / "recipes"


@dataclass(frozen=True)
class Target:
    """Something that reads input.

    Attributes:
        cases: Makes cases.
        check: Checks one case.
        share: Share of all cases of a run. A case of a slow target takes tens of milliseconds.
    """

    cases: st.SearchStrategy[Any]
    check: Callable[[Any], Outcome]
    share: float


class Refused(Exception):
    """A clear error ended the case."""


@contextmanager
def clear_errors() -> Iterator[None]:
    """Turn an `InputError` with a readable message into `Refused`."""
    try:
        yield
    except InputError as error:
        first, *more = str(error).splitlines()
        # `KaggleDataError` counts the other problems on a second line.
        assert first.strip() and not any(not line.startswith("... and ") for line in more), repr(str(error))
        assert len(first) < 3000, f"a message of {len(first)} characters"
        raise Refused from error


# -- Mutations of real files ------------------------------------------------------------------------------------------


def edits(alphabet: bytes) -> st.SearchStrategy[list[tuple[str, float, bytes, int]]]:
    """Make a few edits: what to do, where (a share of the file), with which bytes, and how many bytes."""
    kinds = st.sampled_from(["flip", "replace", "insert", "remove", "repeat", "cut"])
    text = st.lists(st.sampled_from(alphabet), min_size=1, max_size=6).map(bytes)
    return st.lists(st.tuples(kinds, st.floats(0, 1), text, st.integers(0, 40)), max_size=3)


def apply_edits(data: bytes, changes: list[tuple[str, float, bytes, int]]) -> bytes:
    """Apply edits to the bytes of a file."""
    for kind, share, text, number in changes:
        at = min(int(share * len(data)), max(len(data) - 1, 0))
        before, after = data[:at], data[at:]
        if kind == "flip" and after:
            after = bytes([after[0] ^ 1 << number % 8]) + after[1:]
        elif kind == "replace":
            after = text + after[len(text) :]
        elif kind == "insert":
            after = text + after
        elif kind == "remove":
            after = after[number:]
        elif kind == "repeat":
            after = after[:number] + after
        elif kind == "cut":
            after = b""
        data = before + after
    return data


@cache
def scratch() -> Path:
    """A folder for the files of the cases, which `use_folder` sets."""
    raise RuntimeError("call use_folder first")


def use_folder(folder: Path) -> None:
    """Write a phantom into a folder, from which the cases are made, and put the files of the cases beside it."""
    global scratch
    # Slow packages are imported here, so that their time does not count as a case's.
    import markdown_it  # noqa: F401

    write_phantom(folder / "kaggle", num_cases=2, days_per_case=1, slices_per_scan=3, num_proc=1)
    scratch = cache(lambda: folder)  # type: ignore[assignment]


# -- Encodings --------------------------------------------------------------------------------------------------------

HEIGHT, WIDTH = 9, 7
NUMBERS = st.one_of(st.integers(-2, HEIGHT * WIDTH + 3), st.integers(0, 10**20)).map(str)


def join_runs(pairs: list[tuple[int, int]]) -> str:
    """Write ascending runs, from the gap before each run and its length. With many pairs, they leave the image."""
    words, end = [], 0
    for gap, length in pairs:
        words += [end + gap, length]
        end += gap + length
    return " ".join(map(str, words))


# Most of these encodings are valid. If one more number, space or sign goes in, most are not.
RUNS = st.lists(st.tuples(st.integers(1, 9), st.integers(1, 9)), max_size=7).map(join_runs)
ENCODINGS = st.one_of(
    st.text(alphabet="0123456789 \t\n-+_.e٣\x00", max_size=20),
    st.lists(NUMBERS, max_size=8).map(" ".join),
    RUNS,
    st.tuples(RUNS, edits(b"0123456789 -")).map(
        lambda case: apply_edits(case[0].encode(), case[1]).decode(errors="replace")
    ),
)


def check_rle(text: str) -> Outcome:
    """An encoding gives the mask of the slow decoder, or an error if and only if it has none."""
    expected = oracles.decode_rle(text, HEIGHT, WIDTH)
    try:
        with clear_errors():
            mask = decode(text, HEIGHT, WIDTH)
    except Refused:
        assert expected is None, f"a valid encoding was refused: {text!r}"
        return "clear error"
    assert expected is not None and np.array_equal(mask, expected), f"wrong mask of {text!r}"
    return "right result"


# -- CSV --------------------------------------------------------------------------------------------------------------


@cache
def real_csv() -> bytes:
    """The first rows of the phantom's `train.csv`."""
    return b"".join((scratch() / "kaggle" / "train.csv").read_bytes().splitlines(keepends=True)[:13])


CSV_EDITS = edits(b'0123456789 ,"\n\r\x00-_case\xef\xff\tstomach')


def expected_masks(data: bytes, column: str, shape: tuple[int, int]) -> dict[tuple[str, str], np.ndarray] | None:
    """Read a CSV with the slow decoders: the masks by slice id and organ."""
    rows = oracles.read_csv(data)
    if not rows or any(rows[0].count(name) != 1 for name in ("id", "class", column)):
        return None
    places = [rows[0].index(name) for name in ("id", "class", column)]
    masks: dict[tuple[str, str], np.ndarray] = {}
    for row in rows[1:]:
        if not row:
            continue
        if len(row) != len(rows[0]):
            return None
        slice_id, organ, rle = (row[place] for place in places)
        if not (slice_id or organ or rle):
            continue
        mask = oracles.decode_rle(rle, *shape)
        if mask is None or (slice_id, organ) in masks or organ not in GI_TRACT.names:
            return None
        if not re.fullmatch(r"case(0|[1-9][0-9]{0,8})_day(0|[1-9][0-9]{0,8})_slice_[0-9]{4,9}", slice_id):
            return None
        masks[slice_id, organ] = mask
    return masks


def check_csv(changes: list[tuple[str, float, bytes, int]]) -> Outcome:
    """A damaged `train.csv` has problems, or gives the masks that the slow decoders give."""
    data, path = apply_edits(real_csv(), changes), scratch() / "train.csv"
    path.write_bytes(data)
    found: dict[tuple[str, str], np.ndarray] = {}
    one = find_slices(scratch() / "kaggle" / "train")[0][0]
    problems: list[str] = []
    try:
        with clear_errors():
            annotations, problems = read_annotations(path, GI_TRACT.names)
            for slice_id, organs in annotations.items():
                runs, wrong = read_segmentation(organs, one, path, GI_TRACT.names)
                problems += wrong
                found |= {(slice_id, organ): fill_runs(run, one.height * one.width) for organ, run in runs.items()}
    except Refused:
        assert changes, "an unchanged file was refused"
        return "clear error"
    # A file with problems is never built.
    if problems:
        assert changes, "an unchanged file was refused"
        assert all("\n" not in problem and "\r" not in problem for problem in problems), problems
        return "clear error"
    expected = expected_masks(data, "segmentation", (one.height, one.width))
    assert expected is not None and found.keys() == expected.keys(), "rows differ"
    assert all(np.array_equal(mask, expected[key].ravel()) for key, mask in found.items()), "masks differ"
    return "right result"


# -- Submissions ------------------------------------------------------------------------------------------------------


@cache
def small_table(column: str) -> bytes:
    """A table of one scan with three slices, with the sizes as columns."""
    lines = [f"id,class,{column},width,height,spacing_x,spacing_y"]
    for number in (1, 2, 3):
        for place, organ in enumerate(GI_TRACT.names):
            rle = "" if place == number % 3 else f"{1 + place} {number} {20 + place} 5"
            lines.append(f"case1_day2_slice_{number:04d},{organ},{rle},{WIDTH},{HEIGHT},1.5,1.50")
    return ("\n".join(lines) + "\n").encode()


def check_submission(case: tuple[bool, list[tuple[str, float, bytes, int]]]) -> Outcome:
    """Truth and submission, one of them damaged, are refused, or have the masks that the slow decoders give."""
    from gi_segmentation.rules import DEFAULT_RULES
    from gi_segmentation.scoring.submissions import (
        decode_volume,
        measure_pair,
        pair_scans,
        raise_first,
        read_grids,
        read_whole_table,
    )

    in_truth, changes = case
    columns = {"truth.csv": "segmentation", "submission.csv": "predicted"}
    data = {name: small_table(column) for name, column in columns.items()}
    changed = "truth.csv" if in_truth else "submission.csv"
    data[changed] = apply_edits(data[changed], changes)
    paths = {name: scratch() / name for name in columns}
    for name, path in paths.items():
        path.write_bytes(data[name])
    truth, submission = paths.values()
    try:
        with clear_errors():
            label_file = LabelFile(GI_TRACT, {})
            tables = [
                read_whole_table(*one, label_file) for one in ((truth, "segmentation"), (submission, "predicted"))
            ]
            pairs = pair_scans(*tables, read_grids(truth, None, clinical=True), label_file)
            for pair in pairs:
                measured = measure_pair(pair, truth, submission, DEFAULT_RULES)
                raise_first(measured if isinstance(measured, list) else [])
    except Refused:
        assert changes, "an unchanged file was refused"
        return "clear error"
    for pair in pairs:
        shape = pair.grid.height, pair.grid.width
        for slices, path in ((pair.target, truth), (pair.preds, submission)):
            volume, _ = decode_volume(pair, slices, path)
            expected = expected_masks(data[path.name], columns[path.name], shape)
            assert expected is not None, "an unreadable file was scored"
            for (organ, row), mask in np.ndenumerate(np.empty((len(GI_TRACT), len(pair.slice_ids)))):
                mask = volume[organ, row]
                assert np.array_equal(mask, expected[pair.slice_ids[row], GI_TRACT.names[organ]]), "masks differ"
    return "right result"


# -- Images -----------------------------------------------------------------------------------------------------------


@cache
def real_pngs() -> list[bytes]:
    """Slices of the phantom and, if there are any, real ones; then small ones with each filter of PNG."""
    real = Path(__file__).resolve().parents[3] / "shared" / "data" / "uwmgi_originals"
    paths = [find_slices(scratch() / "kaggle" / "train")[0][0].path, *sorted(real.glob("*.png"))[:2]]
    return [path.read_bytes() for path in paths] + [small_png(kind) for kind in range(5)]


def small_png(kind: int) -> bytes:
    """A PNG of 12 x 10 pixels whose rows have one filter."""
    raw = np.random.default_rng(kind).integers(0, 256, (10, 24), dtype=np.uint8)
    lines = b"".join(bytes([kind]) + row.tobytes() for row in raw)
    return write_png([(b"IHDR", struct.pack(">IIBBBBB", 12, 10, 16, 0, 0, 0, 0)), (b"IDAT", zlib.compress(lines))])


def write_png(chunks: list[tuple[bytes, bytes]]) -> bytes:
    """Write chunks with right checksums, and the last chunk."""
    parts = [
        struct.pack(">I", len(body)) + name + body + struct.pack(">I", zlib.crc32(name + body))
        for name, body in [*chunks, (b"IEND", b"")]
    ]
    return b"\x89PNG\r\n\x1a\n" + b"".join(parts)


def mend_checksums(data: bytes) -> bytes:
    """Write right checksums for the chunks of a damaged PNG, as somebody with bad intentions would."""
    chunks, place = [], 8
    while place + 12 <= len(data):
        end = place + 8 + min(int.from_bytes(data[place : place + 4]), len(data) - place - 12)
        chunks.append((data[place + 4 : place + 8], data[place + 8 : end]))
        place = end + 4
    return write_png([chunk for chunk in chunks if chunk[0] != b"IEND"])


BOMBS = [
    write_png([(b"IHDR", struct.pack(">IIBBBBB", 60_000, 60_000, 16, 0, 0, 0, 0)), (b"IDAT", zlib.compress(b"\0" * 99))]),
    write_png([(b"IHDR", struct.pack(">IIBBBBB", 12, 10, 16, 0, 0, 0, 0)), (b"IDAT", zlib.compress(b"\0" * 10**7))]),
    write_png([
        (b"IHDR", struct.pack(">IIBBBBB", 12, 10, 16, 0, 0, 0, 0)),
        (b"zTXt", b"a\0\0" + zlib.compress(b"\0" * 10**7)), (b"IDAT", zlib.compress(b"\0" * 250)),
    ]),
]  # fmt: skip
PNG_CASES = st.one_of(
    st.tuples(st.integers(0, 7), edits(bytes(range(256))), st.just(False)),
    st.tuples(st.integers(0, 7), edits(bytes(range(256))), st.just(True)),
    st.tuples(st.integers(-len(BOMBS), -1), st.just([]), st.just(False)),
)


def check_png(case: tuple[int, list[tuple[str, float, bytes, int]], bool]) -> Outcome:
    """All readers of slices refuse a damaged image, or give the pixels of the slow decoder."""
    from gi_segmentation.data.prepared import read_image
    from gi_segmentation.data.preprocessing import prepare_image
    from gi_segmentation.formats.volumes import read_pixels

    number, changes, mend = case
    originals = real_pngs()
    data = BOMBS[number] if number < 0 else apply_edits(originals[number % len(originals)], changes)
    data = mend_checksums(data) if mend else data
    # The name states the size in the header, so that the size alone is no reason to refuse the file.
    width, height = struct.unpack(">II", data[16:24].ljust(8, b"\0"))
    path = scratch() / "slice.png"
    path.write_bytes(data)
    one = SliceFile(path, 1, 1, 1, width, height, (1.5, 1.5))
    expected = oracles.decode_png(data)
    row = {"id": one.id, "image": {"bytes": data, "path": None}, "width": width, "height": height}
    outcomes = set()
    for read in (lambda: read_pixels(one), lambda: decode_image(data, path, width, height)):
        try:
            with clear_errors():
                pixels = read()
        except Refused:
            outcomes.add("clear error")
        else:
            outcomes.add("right result")
            # The slow decoder does not know interlaced images, which may be right.
            interlaced = data[28:29] == b"\1"
            assert interlaced or (expected is not None and np.array_equal(pixels, expected)), "wrong pixels"
    try:
        with clear_errors():
            prepared = prepare_image(read_image(row), 32)
    except Refused:
        outcomes.add("clear error")
    else:
        outcomes.add("right result")
        assert np.array_equal(prepared, prepare_image(pixels, 32))
    assert len(outcomes) == 1, "the readers differ"
    (outcome,) = outcomes
    try:
        with clear_errors():
            assert read_slice(one) == data
    except Refused:
        assert outcome == "clear error", "only the build refuses it"
    assert changes or mend or number < 0 or outcome == "right result", "an unchanged image was refused"
    return outcome  # type: ignore[return-value]


# -- File names -------------------------------------------------------------------------------------------------------

NAME_PARTS = st.sampled_from(
    ["case1_day2", "scans", "slice_0001_12_10_1.50_1.50.png", "..", ".", "", "/", "\\", "case1_day2/../..", "~", "case٣",
     "slice_0001_12_10_1.5_nan.png", "slice_1_2_3_4_5.png", "\x00", "case" + "9" * 30, "_day", "slice_", "1.50", ".png",
     "slice_9999999999_1_1_1.0_1.0.png", "\n", "%2e%2e", "C:", "<b>", "slice_0001_0_0_0.00_0.00.png"]
)  # fmt: skip
SMALL_NUMBERS = st.integers(0, 400)
# A path as the competition has it. In some of them, one part is another one.
PATHS = st.tuples(
    st.builds("case{}_day{}".format, st.integers(0, 10**9), SMALL_NUMBERS),
    st.just("scans"),
    st.builds(
        "slice_{:04d}_{}_{}_{:.2f}_{:.2f}.png".format,
        SMALL_NUMBERS,
        SMALL_NUMBERS,
        SMALL_NUMBERS,
        st.floats(0, 9),
        st.floats(0, 9),
    ),
).map(list)
PATHS = st.one_of(
    st.lists(NAME_PARTS, max_size=5),
    PATHS,
    st.tuples(PATHS, st.integers(0, 2), NAME_PARTS).map(
        lambda case: [*case[0][: case[1]], case[2], *case[0][case[1] + 1 :]]
    ),
)


def check_name(parts: list[str]) -> Outcome:
    """A path is refused, or its scan and id are plain names, from which no path leads out of a folder."""
    path = Path("/".join(parts))
    try:
        with clear_errors():
            one = parse_slice_path(path)
    except Refused:
        return "clear error"
    assert re.fullmatch(r"case\d+_day\d+_slice_\d{4,9}", one.id, re.ASCII)
    assert re.fullmatch(r"case\d+_day\d+", one.scan, re.ASCII)
    width, height = re.search(r"slice_\d+_(\d+)_(\d+)_", path.name).groups()  # type: ignore[union-attr]
    assert (one.width, one.height) == (int(width), int(height))
    assert max(one.case, one.day, one.number) < 2**31
    return "right result"


# -- Recipes ----------------------------------------------------------------------------------------------------------


@cache
def real_recipes() -> list[bytes]:
    """The shipped recipes."""
    return [path.read_bytes() for path in sorted(RECIPES.glob("*.yaml"))]


VALUES = st.recursive(
    st.one_of(
        st.none(), st.booleans(), st.integers(-(10**20), 10**20), st.floats(), st.text(max_size=6), st.dates(),
        st.sampled_from(["1e-4", "no", "yes", "all", "-1", "nan", "1_0", "{}", "[1]", "adamw_torch", "cosine", "-h"]),
    ),
    lambda inner: st.one_of(st.lists(inner, max_size=3), st.dictionaries(st.text(max_size=4), inner, max_size=3)),
    max_leaves=5,
)  # fmt: skip
# Flags of `transformers` that connect to something or change the machine are left out.
RECIPE_KEYS = st.sampled_from(
    ["model_type", "image_size", "slice_context", "fold", "learning_rate", "max_steps", "num_train_epochs", "lr_drop_at",
     "label_mode", "augmentation", "ema_decay", "seed", "warmup_steps", "optim", "optim_args", "lr_scheduler_type",
     "lr_scheduler_kwargs", "save_total_limit", "eval_steps", "logging_steps", "license", "dataset_title", "preset",
     "config_overrides", "per_device_train_batch_size", "gradient_accumulation_steps", "max_grad_norm", "adam_beta1",
     "early_stopping_patience", "dataloader_num_workers", "save_steps", "report_to", "max_eval_samples"]
)  # fmt: skip
BILLION_LAUGHS = "a: &a [1,1,1,1,1,1,1,1,1]\n" + "".join(
    f"{b}: &{b} [{','.join([f'*{a}'] * 9)}]\n" for a, b in zip("abcdefgh", "bcdefghi", strict=True)
)
YAMLS = st.one_of(
    st.tuples(st.integers(0, 30), edits(b"0123456789:{}[]&*!#-\"'\n\t .e~|>%@x\xff\x00")).map(
        lambda case: apply_edits(real_recipes()[case[0] % len(real_recipes())], case[1])
    ),
    st.dictionaries(RECIPE_KEYS, VALUES, max_size=3).map(lambda d: yaml.safe_dump(d, allow_unicode=True).encode()),
    st.sampled_from([BILLION_LAUGHS.encode(), b"[" * 3000, b"seed: 2026-99-99", b"seed: " + b"9" * 5000, b"? [a]: 1"]),
)


def check_recipe(data: bytes) -> Outcome:
    """A recipe is refused, or each of its values is that of the flag."""
    from gi_segmentation.command_line import ALIASES, parse_arguments

    path = scratch() / "recipe.yaml"
    path.write_bytes(data)
    try:
        with clear_errors():
            groups = parse_arguments(["--config", str(path), "--output_dir", str(scratch() / "run")])
    except Refused:
        return "clear error"
    for key, value in yaml.safe_load(data).items():
        name = ALIASES.get(f"--{key}", f"--{key}")[2:]
        if isinstance(value, list | dict) or (f"--{key}" in ALIASES and name in ("optim", "lr_scheduler_type")):
            continue
        read = next(getattr(group, name) for group in groups if hasattr(group, name))
        read = getattr(read, "value", read)
        read = read[0] if isinstance(read, list) and len(read) == 1 else read
        assert same(read, value), (key, value, read)
    return "right result"


def same(read: Any, value: Any) -> bool:
    """Tell whether the value of a flag is that of a recipe, whatever types both have."""
    if isinstance(read, bool):
        return read == (str(value).lower() in ("1", "true", "t", "yes", "y"))
    if isinstance(read, int | float):
        return float(value) == read or str(float(value)) == str(float(read))
    if isinstance(read, dict):
        return read == json.loads(str(value))
    return read is None or str(read) == str(value)


# -- Values for a configuration ---------------------------------------------------------------------------------------

OVERRIDE_KEYS = st.sampled_from(
    ["depths", "hidden_sizes", "drop_path_rate", "num_encoder_blocks", "sr_ratios", "patch_sizes", "strides",
     "decoder_hidden_size", "hidden_act", "layer_norm_eps", "num_labels", "id2label", "image_size", "to_dict", "é",
     "num_attention_heads", "mlp_ratios", "reshape_last_stage", "backbone_config", "__class__", "auto_map"]
)  # fmt: skip
SMALL = st.one_of(
    st.integers(-3, 12), st.floats(-2, 2), st.booleans(), st.none(), st.sampled_from(["gelu", "x", "1e-4"])
)
OVERRIDES = st.one_of(
    st.text(alphabet="abdepths=[]{},:1234567890.-\"' \n&*!", max_size=30),
    st.dictionaries(OVERRIDE_KEYS, st.one_of(SMALL, st.lists(SMALL, max_size=4)), max_size=3).map(json.dumps),
    st.dictionaries(OVERRIDE_KEYS, st.one_of(SMALL, st.lists(SMALL, max_size=3)), max_size=3).map(
        lambda values: ",".join(f"{key}={json.dumps(value)}" for key, value in values.items())
    ),
    st.sampled_from(
        [
            "{" * 5000,
            "[" * 5000,
            "a=&a [1],b=*a",
            '{"a":' * 4000,
            "depths=2026-99-99",
            "hidden_sizes=[1" + "0" * 9 + "]",
        ]
    ),
)


def check_overrides(text: str) -> Outcome:
    """`--config_overrides` is refused, or makes a model whose configuration has the values."""
    from gi_segmentation.arguments import ModelArguments
    from gi_segmentation.labels import GI_TRACT
    from gi_segmentation.models.configuration import Task
    from gi_segmentation.models.random import new_model, parse_overrides
    from tests.support.models import FAMILIES

    try:
        with clear_errors():
            values = parse_overrides(text)
            # The other values are those of a tiny model, so that a case takes little time.
            tiny = json.dumps({**FAMILIES["segformer"], **values}, default=str)
            arguments = ModelArguments(model_type="segformer", config_overrides=tiny)
            model = new_model(arguments, Task(GI_TRACT, "multiclass"), 64, 0)
    except Refused:
        return "clear error"
    for key, value in values.items():
        assert json.loads(json.dumps(getattr(model.config, key))) == json.loads(json.dumps(value)), key
    return "right result"


# -- Cards ------------------------------------------------------------------------------------------------------------

MARKUP = st.sampled_from(
    ["<script>alert(1)</script>", "](http://a.example)", "![x](y)", "`", "```", "\n---\n", "\n", "{{ 7 * 7 }}", "{% raw %}",
     " | a |", "**", "# ", "\\", "&lt;", "'", '"', '"); import os; os.remove("', "!!python/object:os.system", ": ", "<!--",
     "UW-Madison", "Süd", "\x1b[31m", "\x00", "../..", "$x$", "~~", "_x_", "me/model", "2026", "no", "- ", "\u2028", "*"]
)  # fmt: skip
TEXTS = st.lists(MARKUP, min_size=1, max_size=4).map("".join)
# Title of the dataset, name of the GPU, name of the encoder, output folder, licence, repository; None: the usual one.
CARDS = st.tuples(*[st.one_of(st.none(), TEXTS)] * 3, *[st.one_of(st.none(), st.none(), st.none(), TEXTS)] * 3)


def parse_card(text: str) -> tuple[dict[str, Any], list[str], str]:
    """Read a card as a Hub does: its front matter, the structure of its page, and what one sees there."""
    from huggingface_hub import ModelCard
    from markdown_it import MarkdownIt

    card = ModelCard(text, ignore_metadata_errors=True)
    tokens = MarkdownIt("commonmark").enable(["table", "strikethrough"]).parse(card.text)
    structure, shown = [], []
    for token in tokens:
        for part in token.children or [token]:
            structure.append(f"{part.type} {sorted(part.attrs)}")
            shown.append(part.content)
    return card.data.to_dict(), structure, " ".join(" ".join(shown).split())


@cache
def usual_card() -> tuple[dict[str, Any], list[str], str]:
    """The card of a run with the usual names."""
    return parse_card(make_card_of({}, "run", "other"))


def make_card_of(changes: dict[str, Any], repo_id: str, license_name: str) -> str:
    """Write the card of a run with some other facts."""
    from dataclasses import replace

    from gi_segmentation.publishing.eval_results import SEED_SCORE
    from gi_segmentation.publishing.model_card import make_card, score_names
    from tests.support.runs import FACTS

    scores = dict.fromkeys([*score_names(GI_TRACT), SEED_SCORE], 0.5)
    scored = replace(FACTS, base_model="me/encoder", scores=scores, intervals=dict.fromkeys(scores))
    return make_card(replace(scored, **changes), repo_id, license_name)


def check_card(case: tuple[str | None, ...]) -> Outcome:
    """Names are refused, or the card has the same structure as with usual names, and shows them as they are."""
    from gi_segmentation.command_line import parse_arguments

    title, device, encoder, folder, license_name, repo_id = case
    given = {"dataset_title": title, "license": license_name, "hub_model_id": repo_id}
    words = [f"--{name}={value}" for name, value in given.items() if value is not None]
    try:
        with clear_errors():
            _, data_args, run_args = parse_arguments([*words, "--output_dir", f"{scratch()}/{folder or 'run'}"])
    except Refused:
        assert folder or license_name or repo_id, "usual names were refused"
        return "clear error"
    changes = {"dataset_title": data_args.dataset_title if title else None, "device": device, "base_model": encoder}
    name = run_args.hub_model_id or Path(run_args.output_dir).resolve().name
    text = make_card_of({key: value for key, value in changes.items() if value}, name, run_args.license)
    front, structure, shown = parse_card(text)
    usual = usual_card()
    if license_name is None:
        assert structure == usual[1], "a name changed the page"
    assert front["model-index"][0]["name"] == name.split("/")[-1] and front["license"] == run_args.license
    dataset = front["model-index"][0]["results"][0]["dataset"]
    assert dataset["name"].startswith(data_args.dataset_title if title else "Phantom")
    assert all(" ".join(value.split()).replace("\0", "\ufffd") in shown for value in (title, device) if value), (
        "a name is not shown as it is"
    )
    # The lines of Python on the card load the model by this very name, whatever is in it.
    code = re.findall(r"```python\n(.*?)```", text, re.DOTALL)[0]
    calls = [node for node in ast.walk(ast.parse(code)) if isinstance(node, ast.Call)]
    named = [ast.literal_eval(call.args[0]) for call in calls if ast.unparse(call.func).endswith(".from_pretrained")]
    assert named == [name, name]
    return "right result"


# -- Checkpoints ------------------------------------------------------------------------------------------------------


@cache
def checkpoint() -> dict[str, bytes]:
    """The files of a tiny checkpoint."""
    from tests.support.models import save_model

    folder = save_model(scratch() / "original", "segformer", seed=0)
    return {path.name: path.read_bytes() for path in folder.iterdir()}


JSON_KEYS = st.sampled_from(
    ["model_type", "architectures", "id2label", "label2id", "hidden_sizes", "depths", "slice_context", "postprocessing",
     "num_attention_heads", "sr_ratios", "strides", "patch_sizes", "auto_map", "dtype", "transformers_version", "size",
     "image_mean", "image_std", "image_processor_type", "hidden_act", "num_channels", "num_labels", "rescale_factor",
     "quantization_config", "decoder_hidden_size", "mlp_ratios", "layer_norm_eps", "num_encoder_blocks", "do_resize",
     "torch_dtype", "name_or_path", "_name_or_path", "is_composition", "backbone_config", "problem_type"]
)  # fmt: skip
JSON_VALUES = st.recursive(
    st.one_of(SMALL, st.text(max_size=5), st.sampled_from(["segformer", "bert", "AutoModel", 60_000, 1e308, -1, "../.."])),
    lambda inner: st.one_of(st.lists(inner, max_size=4), st.dictionaries(st.sampled_from(
        ["height", "width", "0", "1", "stomach", "shortest_edge", "min_volume_ml"]), inner, max_size=3)),
    max_leaves=6,
)  # fmt: skip
FILES = st.sampled_from(["config.json", "preprocessor_config.json"])
CHECKPOINTS = st.one_of(
    st.tuples(FILES, edits(b'0123456789{}[],:"\n .eE-\\u\xff\x00')),
    st.tuples(FILES, st.dictionaries(JSON_KEYS, JSON_VALUES, min_size=1, max_size=2)),
)


def check_checkpoint(case: tuple[str, Any]) -> Outcome:
    """A checkpoint with damaged JSON is refused, or predicts masks of the slice's shape."""
    from gi_segmentation.formats.inputs import InputScan
    from gi_segmentation.inference.arguments import Computation
    from gi_segmentation.inference.batches import PredictionSettings
    from gi_segmentation.inference.members import find_postprocessing, load_members
    from gi_segmentation.inference.scans import predict_scans

    name, change = case
    folder = scratch() / "checkpoint"
    folder.mkdir(exist_ok=True)
    for file, data in checkpoint().items():
        (folder / file).write_bytes(data)
    original = checkpoint()[name]
    damaged = (
        json.dumps({**json.loads(original), **change}).encode()
        if isinstance(change, dict)
        else apply_edits(original, change)
    )
    (folder / name).write_bytes(damaged)
    one = find_slices(scratch() / "kaggle" / "train")[0][0]
    try:
        with clear_errors():
            members = load_members([str(folder)], None, Computation("cpu"))
            postprocessing, _ = find_postprocessing(members)
            settings = PredictionSettings(num_workers=0, postprocessing=postprocessing)
            ((_, predicted),) = predict_scans(members, [InputScan(one.scan, [one])], settings)
            if isinstance(predicted, InputError):
                raise predicted
    except Refused:
        assert damaged != original, "an unchanged checkpoint was refused"
        return "clear error"
    (masks,) = predicted.slice_masks
    assert masks.shape == (len(GI_TRACT), one.height, one.width) and masks.dtype == bool
    if damaged == original:
        assert np.array_equal(masks, original_masks()), "other masks of the same checkpoint"
    return "right result"


@cache
def original_masks() -> np.ndarray:
    """The masks that the checkpoint predicts with plain `transformers`, as the model card shows it."""
    import torch
    from transformers import AutoImageProcessor, AutoModelForSemanticSegmentation

    folder = scratch() / "original"
    one = find_slices(scratch() / "kaggle" / "train")[0][0]
    processor = AutoImageProcessor.from_pretrained(folder)
    model = AutoModelForSemanticSegmentation.from_pretrained(folder).eval()
    raw = torch.from_numpy(np.array(Image.open(one.path)).astype("float32"))
    image = (raw / (raw + raw.mean().clamp(min=1))).expand(1, 3, -1, -1)
    image = torch.nn.functional.interpolate(image, (64, 64), mode="bilinear", antialias=True)
    pixels = processor(image.mul(65535).round() / 65535, do_resize=False, do_rescale=False, return_tensors="pt")
    with torch.no_grad():
        mask = processor.post_process_semantic_segmentation(model(**pixels), target_sizes=[raw.shape[-2:]])[0]
    return np.stack([(mask == label).numpy() for label in range(1, 1 + len(GI_TRACT))])


# -- The state of a training ------------------------------------------------------------------------------------------


@cache
def real_state() -> bytes:
    """A `trainer_state.json` as `Trainer` writes it."""
    from transformers import TrainerState

    stopping = {"args": {}, "attributes": {"early_stopping_patience_counter": 1}}
    history = [{"step": 3, "loss": 0.5}, {"step": 3, "eval_loss": 0.4, "eval_dice": 0.5}]
    state = TrainerState(global_step=3, max_steps=6, log_history=history, best_global_step=3, best_metric=0.5)
    state.stateful_callbacks = {"EarlyStoppingCallback": stopping}  # type: ignore[assignment]
    state.save_to_json(str(scratch() / "state.json"))
    return (scratch() / "state.json").read_bytes()


STATE_KEYS = st.sampled_from(
    ["global_step", "log_history", "stateful_callbacks", "best_model_checkpoint", "max_steps"]
)
STATES = st.one_of(
    edits(b'0123456789{}[],:"\n .eE-\\u\xff\x00'), st.dictionaries(STATE_KEYS, JSON_VALUES, min_size=1, max_size=2)
)


def check_state(change: Any) -> Outcome:
    """A damaged state of a checkpoint is refused or the checkpoint removed, or its step is that of the file."""
    from gi_segmentation.training.checkpoints import STATE_FILE, find_last_checkpoint, is_over, read_state, seal

    folder = scratch() / "run" / "checkpoint-3"
    folder.mkdir(parents=True, exist_ok=True)
    original = real_state()
    damaged = (
        json.dumps({**json.loads(original), **change}).encode()
        if isinstance(change, dict)
        else apply_edits(original, change)
    )
    (folder / STATE_FILE).write_bytes(damaged)
    # With the right checksums, the damage must be found by reading.
    seal(folder)
    try:
        with clear_errors():
            found = find_last_checkpoint(folder.parent)
            if found is None:
                raise Refused
            state = read_state(found)
            over = is_over(state, 3, 2)
    except Refused:
        assert damaged != original, "an unchanged state was refused"
        return "clear error"
    assert state.global_step == json.loads(damaged)["global_step"] and over == (state.global_step >= 3 or over)
    return "right result"


TARGETS = {
    "encodings": Target(ENCODINGS, check_rle, 0.28),
    "train.csv": Target(CSV_EDITS, check_csv, 0.15),
    "submissions": Target(st.tuples(st.booleans(), CSV_EDITS), check_submission, 0.15),
    "slice PNGs": Target(PNG_CASES, check_png, 0.15),
    "paths of slices": Target(PATHS, check_name, 0.1),
    "recipes": Target(YAMLS, check_recipe, 0.08),
    "config_overrides": Target(OVERRIDES, check_overrides, 0.04),
    "names on cards": Target(CARDS, check_card, 0.02),
    "checkpoints' JSON": Target(CHECKPOINTS, check_checkpoint, 0.01),
    "trainer_state.json": Target(STATES, check_state, 0.05),
}
