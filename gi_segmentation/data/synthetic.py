"""The mark of synthetic slices. It tells whether a slice shows a real patient.

`dataset_builder phantom` writes the mark into each PNG, and every later step keeps the bytes of the file. A phantom as
a DICOM series has it as its comment (ImageComments), from which `dataset_builder convert` takes it. So a folder or a
dataset with synthetic and real slices is never taken for a synthetic one. A slice without the mark counts as a
patient's.
"""

import struct
import zlib

# The signature of a PNG (8 bytes) and its header (25 bytes). The mark is a chunk of text after them.
MARK_PLACE = 33
SOURCE = "gi-segmentation phantom"
TEXT = b"tEXtSource\0" + SOURCE.encode()
# A chunk has the length of its data (4 bytes), a name (4), the data, and the checksum of name and data (4).
MARK = struct.pack(">I", len(TEXT) - 4) + TEXT + struct.pack(">I", zlib.crc32(TEXT))


def mark_synthetic(png: bytes) -> bytes:
    """Return a PNG with the mark. Its pixels stay as they are.

    Source: https://www.w3.org/TR/png-3/, section 11.3.3 (`Source` is the device that made the image).
    """
    return png[:MARK_PLACE] + MARK + png[MARK_PLACE:]


def is_synthetic(png: bytes) -> bool:
    """Tell whether a PNG has the mark.

    Example:
        >>> is_synthetic(mark_synthetic(bytes(50))), is_synthetic(bytes(50))
        (True, False)
    """
    return png[MARK_PLACE : MARK_PLACE + len(MARK)] == MARK
