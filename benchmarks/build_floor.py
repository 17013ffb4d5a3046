"""The least work that a build of `gi_tract` could do. `benchmarks.build_speed` compares a real build with it.

For each slice of a Kaggle folder it reads the PNG's bytes, paints the run-length encodings into a label map, encodes
the map as a PNG, and writes a row with the columns of `gi_tract`. It has no checks, splits, counts or card, and shares
no code with the build.
"""

import csv
import io
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from PIL import Image

ORGANS = ("large_bowel", "small_bowel", "stomach")
PNG = pa.struct([("bytes", pa.binary()), ("path", pa.string())])
SCHEMA = pa.schema(
    [
        ("id", pa.string()),
        ("image", PNG),
        ("annotation", PNG),
        ("segmentation", pa.struct([(organ, pa.string()) for organ in ORGANS])),
        ("case", pa.int32()),
        ("day", pa.int32()),
        ("slice", pa.int32()),
        ("scan", pa.string()),
        ("fold", pa.int32()),
        ("height", pa.int32()),
        ("width", pa.int32()),
        ("pixel_spacing", pa.list_(pa.float64(), 2)),
    ]
)
PALETTE = [0, 0, 0, 255, 0, 0, 0, 255, 0, 0, 0, 255]


def encode_labels(organs: dict[str, str], height: int, width: int) -> bytes:
    """Paint the organs of a slice, and encode the label map as a palette PNG."""
    labels = np.zeros(height * width, dtype=np.uint8)
    for label_id, organ in enumerate(ORGANS, start=1):
        numbers = list(map(int, organs[organ].split()))
        for start, length in zip(numbers[0::2], numbers[1::2], strict=True):
            labels[start - 1 : start - 1 + length] = label_id
    image = Image.fromarray(labels.reshape(height, width))
    image.putpalette(PALETTE)
    buffer = io.BytesIO()
    # The compression of the build, so that both sides write as many bytes.
    image.save(buffer, format="PNG", compress_level=1)
    return buffer.getvalue()


def slice_row(path: Path, annotations: dict[str, dict[str, str]]) -> dict[str, Any]:
    """Return the row of a slice."""
    scan = path.parent.parent.name
    case, day = scan.removeprefix("case").split("_day")
    _, number, width, height, column_mm, row_mm = path.stem.split("_")
    slice_id = f"{scan}_slice_{number}"
    organs = annotations[slice_id]
    return {
        "id": slice_id,
        "image": {"bytes": path.read_bytes(), "path": None},
        "annotation": {"bytes": encode_labels(organs, int(height), int(width)), "path": None},
        "segmentation": organs,
        "case": int(case),
        "day": int(day),
        "slice": int(number),
        "scan": scan,
        "fold": 0,
        "height": int(height),
        "width": int(width),
        "pixel_spacing": [float(row_mm), float(column_mm)],
    }


def main(kaggle_dir: Path, output: Path) -> None:
    """Write the training slices of a Kaggle folder to one Parquet file."""
    annotations: dict[str, dict[str, str]] = {}
    with (kaggle_dir / "train.csv").open(newline="") as file:
        for row in csv.DictReader(file):
            annotations.setdefault(row["id"], {})[row["class"]] = row["segmentation"]
    paths = sorted(kaggle_dir.glob("train/*/*/scans/*.png"))
    with pq.ParquetWriter(output, SCHEMA, compression="none", use_dictionary=False) as writer:
        # Small groups of rows, as in the build: larger ones take more time, for memory that must be cleared first.
        for start in range(0, len(paths), 32):
            rows = [slice_row(path, annotations) for path in paths[start : start + 32]]
            writer.write_table(pa.Table.from_pylist(rows, SCHEMA))


if __name__ == "__main__":
    main(Path(sys.argv[1]), Path(sys.argv[2]))
