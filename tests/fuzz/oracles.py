"""Slow decoders, written from the specifications, without any code of the package. None stands for a refusal."""

import struct
import zlib

import numpy as np

DIGITS = set("0123456789")


def decode_rle(text: str, height: int, width: int) -> np.ndarray | None:
    """Mark the pixels of each run, one by one."""
    words = text.split()
    if len(words) % 2 or not all(set(word) <= DIGITS and len(word) <= 18 for word in words):
        return None
    mask = [False] * (height * width)
    for start, length in zip(map(int, words[::2]), map(int, words[1::2]), strict=True):
        if start < 1 or length < 1 or start + length - 1 > len(mask):
            return None
        for pixel in range(start - 1, start - 1 + length):
            if mask[pixel]:
                return None
            mask[pixel] = True
    return np.array(mask, dtype=bool).reshape(height, width)


def read_csv(data: bytes) -> list[list[str]] | None:
    """Read a CSV by RFC 4180, one character at a time. Lines end with \\r, \\n or both; a blank line is an empty list."""
    try:
        text = data.decode("utf-8-sig")
    except UnicodeDecodeError:
        return None
    rows: list[list[str]] = []
    row: list[str] = []
    value, place, at_start = "", 0, True
    while place < len(text):
        letter = text[place]
        if letter == '"' and at_start:
            # A quoted value ends at a quote that is not doubled.
            place += 1
            while True:
                end = text.find('"', place)
                if end < 0:
                    return None
                value += text[place:end]
                place = end + 1
                if text[place : place + 1] != '"':
                    break
                value, place = value + '"', place + 1
            if text[place : place + 1] not in ("", ",", "\r", "\n"):
                return None
            at_start = False
            continue
        place += 1
        if letter == ",":
            row, value, at_start = [*row, value], "", True
        elif letter in "\r\n":
            place += text[place - 1 : place + 1] == "\r\n"
            rows.append([*row, value] if row or value or not at_start else [])
            row, value, at_start = [], "", True
        else:
            value, at_start = value + letter, False
    if row or value or not at_start:
        rows.append([*row, value])
    return rows


def decode_png(data: bytes) -> np.ndarray | None:
    """Decode a 16-bit grayscale PNG by the W3C's specification, with all checksums of its chunks."""
    if data[:8] != b"\x89PNG\r\n\x1a\n":
        return None
    place, header, pixels, ended = 8, b"", b"", False
    while place < len(data):
        if ended or place + 12 > len(data):
            return None
        (length,) = struct.unpack(">I", data[place : place + 4])
        body = data[place + 4 : place + 8 + length]
        if data[place + 8 + length : place + 12 + length] != struct.pack(">I", zlib.crc32(body)):
            return None
        name = body[:4]
        if (name == b"IHDR") != (place == 8):
            return None
        header = body[4:] if name == b"IHDR" else header
        pixels += body[4:] if name == b"IDAT" else b""
        ended = name == b"IEND"
        place += 12 + length
    if not ended or len(header) != 13:
        return None
    width, height, bits, kind, compression, filters, interlaced = struct.unpack(">IIBBBBB", header)
    if (bits, kind, compression, filters, interlaced) != (16, 0, 0, 0, 0) or not 0 < width * height <= 2048 * 2048:
        return None
    line = 1 + 2 * width
    try:
        raw = zlib.decompressobj().decompress(pixels, line * height)
    except zlib.error:
        return None
    if len(raw) < line * height:
        return None
    before = bytearray(2 * width)
    rows = []
    for start in range(0, line * height, line):
        before = unfilter(raw[start], bytearray(raw[start + 1 : start + line]), before)
        if not before:
            return None
        rows.append(np.frombuffer(bytes(before), ">u2"))
    return np.stack(rows).astype(np.uint16)


def unfilter(kind: int, row: bytearray, above: bytearray) -> bytearray:
    """Undo the filter of a row of a PNG; return no bytes for an unknown filter."""
    if kind > 4:
        return bytearray()
    for index in range(len(row)):
        left, corner = (row[index - 2], above[index - 2]) if index > 1 else (0, 0)
        up = above[index]
        nearest = min((left, up, corner), key=lambda one: abs(left + up - corner - one))
        row[index] = (row[index] + (0, left, up, (left + up) // 2, nearest)[kind]) % 256
    return row
