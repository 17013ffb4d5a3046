"""Check and decode Kaggle's slice images: PNGs of 16 bits."""

import io
import struct
import zlib
from pathlib import Path

import numpy as np
from PIL import Image, UnidentifiedImageError

from gi_segmentation.errors import one_line
from gi_segmentation.formats.kaggle.names import KaggleDataError, SliceFile

# A slice of an MR scanner has at most 1024 x 1024 pixels. A file of a few kilobytes can claim thousands of times as
# many, which would fill the memory.
MAX_PIXELS = 2048 * 2048
PNG_START = b"\x89PNG\r\n\x1a\n"
# The last chunk of every PNG: length, name and checksum. Pillow reads a file without this chunk and gives no error, so
# a download that stopped too early would not be noticed.
PNG_END = b"\0\0\0\0IEND\xaeB`\x82"


def is_whole_slice(data: bytes, width: int, height: int) -> bool:
    """Tell, without decoding the pixels, whether a file is a whole slice image.

    The checksum of each chunk shows that the file is as it was written. This takes a twentieth of the time that
    decoding takes.

    Args:
        data: Bytes of the file.
        width: Expected width in pixels.
        height: Expected height in pixels.

    Returns:
        True if it is a 16-bit grayscale PNG of this size without any chunks but header, the mark of a phantom, pixels
        and end, and all checksums are right. False says nothing: it may be another kind of image, for example an
        interlaced one.

    Source: https://www.w3.org/TR/png-3/, sections 5.3 (chunks) and 11.2.1 (header).
    """
    # `check_image` gives an error for an image without pixels or of an absurd size, which a name may state too.
    if not 0 < width * height <= MAX_PIXELS:
        return False
    # Length, name, size, bits of a pixel, and zeros for: grayscale, the usual compression and filters, not interlaced.
    if not data.startswith(PNG_START + struct.pack(">I4sIIB4x", 13, b"IHDR", width, height, 16)):
        return False
    view, names, place = memoryview(data), [], len(PNG_START)
    while place < len(data):
        # A chunk has the length of its data (4 bytes), a name (4), the data, and the checksum of name and data (4).
        end = place + 8 + int.from_bytes(view[place : place + 4])
        if zlib.crc32(view[place + 4 : end]) != int.from_bytes(view[end : end + 4]):
            return False
        names.append(bytes(view[place + 4 : place + 8]))
        place = end + 4
    # The mark of `data.synthetic` is one text before the pixels.
    pixels = names[2:-1] if names[1:2] == [b"tEXt"] else names[1:-1]
    return names[0] == b"IHDR" and set(pixels) == {b"IDAT"} and data.endswith(PNG_END)


def from_end_chunk(data: bytes) -> bytes:
    """Return the bytes of a PNG from its first chunk `IEND` on; nothing if there is none."""
    # Each chunk has its length in 4 bytes, its name in 4 bytes, its content, and a checksum of 4 bytes.
    place = 8
    while place < len(data) and data[place + 4 : place + 8] != b"IEND":
        place += 12 + int.from_bytes(data[place : place + 4])
    return data[place:]


def check_image(data: bytes, name: object, width: int, height: int) -> None:
    """Check that bytes are a whole slice image of a size.

    Args:
        data: Bytes of the image.
        name: Path or id of the slice, for messages.
        width: Expected width in pixels.
        height: Expected height in pixels.

    Raises:
        KaggleDataError: If the image is not a whole 16-bit grayscale PNG, or has another size.
    """
    if is_whole_slice(data, width, height):
        return
    try:
        # With `formats`, another kind of image with the name of a PNG is an error.
        with Image.open(io.BytesIO(data), formats=["PNG"]) as image:
            if image.width * image.height > MAX_PIXELS:
                raise OSError(f"its header claims {image.width}x{image.height} pixels, more than a slice has")
            # `open` reads the header only. `load` decodes the pixels, and so finds a file that was cut off.
            image.load()
        if from_end_chunk(data) != PNG_END:
            raise OSError("its end is missing, or something follows it")
        # `load` does not look at the checksums of the pixels. `verify` does, and it needs an image of its own.
        with Image.open(io.BytesIO(data), formats=["PNG"]) as unread:
            unread.verify()
    # For a broken chunk Pillow raises SyntaxError or ValueError. For a header with an absurd size, which would fill
    # the memory, it raises DecompressionBombError.
    except (OSError, SyntaxError, ValueError, Image.DecompressionBombError) as error:
        reason = "no PNG header" if isinstance(error, UnidentifiedImageError) else one_line(error)
        raise KaggleDataError([f"{name}: not a whole PNG ({reason}); download it again"]) from error
    # 16 bits: older releases of Pillow call the mode `I`, newer ones `I;16`. In an image of 8 bits, which other tools
    # write, most of the intensities are lost.
    if image.mode not in ("I;16", "I"):
        raise KaggleDataError([f"{name}: expected 16-bit grayscale, got mode {image.mode}; use the original file"])
    if image.size != (width, height):
        raise KaggleDataError(
            [f"{name}: its name says {width}x{height}, "
             f"the image has {image.size[0]}x{image.size[1]}; correct the name"]
        )  # fmt: skip


def decode_image(data: bytes, name: object, width: int, height: int) -> np.ndarray:
    """Check and decode a slice image; arguments as `check_image`.

    Every reader of pixels must come here. Pillow alone leaves the checksums out: one wrong bit in the last chunk gives
    other pixels, without an error.

    Returns:
        Raw intensities, uint16, shape `(height, width)`.

    Raises:
        KaggleDataError: As `check_image`, or if the pixels cannot be decoded.
    """
    check_image(data, name, width, height)
    try:
        # `np.array` keeps all 16 bits. `convert("RGB")`, as in many examples, would clip every intensity above 255.
        with Image.open(io.BytesIO(data), formats=["PNG"]) as image:
            return np.array(image)
    except (OSError, SyntaxError, ValueError) as error:
        # The pixels of a faulty program may have right checksums.
        raise KaggleDataError([f"{name}: its pixels cannot be decoded ({one_line(error)})"]) from error


def read_file(path: Path) -> bytes:
    """Return the bytes of a file.

    Raises:
        KaggleDataError: If it cannot be read.
    """
    try:
        return path.read_bytes()
    except OSError as error:
        raise KaggleDataError([f"{path}: not readable ({one_line(error)}); download it again"]) from error


def read_slice(slice_file: SliceFile) -> bytes:
    """Read the PNG of a slice, and check that it is a whole image of the size in its name.

    Returns:
        The bytes of the file, unchanged.

    Raises:
        KaggleDataError: If the file is not a whole 16-bit grayscale PNG, or has another size than its name says.
    """
    # The file is read once. The bytes that pass the checks are the bytes that the dataset stores.
    data = read_file(slice_file.path)
    check_image(data, slice_file.path, slice_file.width, slice_file.height)
    return data
