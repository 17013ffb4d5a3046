"""A damaged image is an error; a whole one keeps its bytes."""

from pathlib import Path

import cv2
import numpy as np
import pytest
from PIL import Image
from PIL.PngImagePlugin import PngInfo

from dataset_builder.verify import verify
from gi_segmentation.formats.kaggle.folder import find_slices
from gi_segmentation.formats.kaggle.images import read_slice
from gi_segmentation.formats.kaggle.names import KaggleDataError, parse_slice_path


def first_image(folder: Path) -> Path:
    return find_slices(folder)[0][0].path


def test_each_damage_to_a_png_header_raises_our_own_error(kaggle_copy: Path, tmp_path: Path) -> None:
    slice_file = parse_slice_path(first_image(kaggle_copy))._replace(path=tmp_path / "slice.png")
    data = first_image(kaggle_copy).read_bytes()
    rng = np.random.default_rng(0)
    # The first 60 bytes are the signature, the header and the start of the data. Pillow answers a wrong byte there
    # with many kinds of exceptions.
    for place in range(60):
        damaged = bytearray(data)
        damaged[place] ^= rng.integers(1, 256)
        slice_file.path.write_bytes(damaged)
        with pytest.raises(KaggleDataError, match=r"slice\.png: "):
            read_slice(slice_file)


def test_one_wrong_bit_anywhere_in_an_image_is_a_problem(kaggle_copy: Path) -> None:
    slice_file = parse_slice_path(first_image(kaggle_copy))
    data = slice_file.path.read_bytes()
    # The last places are the checksum of the pixels and the last chunk. Pillow looks at neither.
    for place in [*range(0, len(data), 997), *range(len(data) - 20, len(data))]:
        for bit in (0, 7):
            damaged = bytearray(data)
            damaged[place] ^= 1 << bit
            slice_file.path.write_bytes(damaged)
            with pytest.raises(KaggleDataError, match=r"\.png: "):
                read_slice(slice_file)


def test_a_wrong_checksum_of_the_pixels_says_so(kaggle_copy: Path) -> None:
    path = first_image(kaggle_copy)
    data = bytearray(path.read_bytes())
    # Before the last chunk (12 bytes) stands the checksum of the last chunk with pixels.
    data[-13] ^= 1
    path.write_bytes(data)
    (problem,) = verify(kaggle_copy, num_proc=1).problems
    assert problem.startswith(f"{path}: not a whole PNG (broken PNG file") and "IDAT" in problem


@pytest.mark.parametrize("kind", ["text", "two images", "one and a half", "bytes behind the end"])
def test_images_with_more_than_pixels_are_decoded(kind: str, kaggle_copy: Path) -> None:
    slice_file = parse_slice_path(first_image(kaggle_copy))
    data = slice_file.path.read_bytes()
    if kind == "text":
        text = PngInfo()
        text.add_text("made by", "a scanner")
        Image.open(slice_file.path).save(slice_file.path, pnginfo=text)
        whole = slice_file.path.read_bytes()
        assert read_slice(slice_file) == whole
        slice_file.path.write_bytes(whole.replace(b"a scanner", b"a scammer"))
    else:
        more = {"two images": data, "one and a half": data[:-1], "bytes behind the end": b"\0"}
        slice_file.path.write_bytes(data + more[kind])
    with pytest.raises(KaggleDataError, match="not a whole PNG"):
        read_slice(slice_file)


def test_an_image_of_absurd_size_is_a_problem(kaggle_copy: Path) -> None:
    path = first_image(kaggle_copy)
    ok, data = cv2.imencode(".png", np.zeros((20_000, 20_000), np.uint8), [cv2.IMWRITE_PNG_BILEVEL, 1])
    assert ok
    path.write_bytes(data.tobytes())
    (problem,) = verify(kaggle_copy, num_proc=1).problems
    assert problem.startswith(f"{path}: not a whole PNG (Image size")
