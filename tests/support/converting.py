"""Scans with labels as NIfTI files, and the Kaggle folder that `convert` makes of them."""

import json
import re
import zlib
from pathlib import Path

import nibabel
import numpy as np
from PIL import Image

from dataset_builder.__main__ import main
from gi_segmentation.formats.kaggle.folder import find_slices
from gi_segmentation.rle import decode

SHAPE = (12, 10, 6)


def draw(rng: np.random.Generator) -> tuple[np.ndarray, np.ndarray]:
    """A scan with noise and with three labels, one of them with a hole and an island: int16, `SHAPE`."""
    voxels = rng.integers(0, 1200, SHAPE).astype(np.int16)
    labels = np.zeros(SHAPE, dtype=np.uint8)
    labels[2:7, 2:8, 1:5], labels[4, 4, 2:4], labels[9, 8, 3] = 1, 0, 1
    labels[7:10, 1:4, 2], labels[0:2, 8:10, 0:6] = 2, 3
    return voxels, labels


def write(path: Path, voxels: np.ndarray, affine: np.ndarray) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    image = nibabel.Nifti1Image(voxels, affine)
    image.header.set_xyzt_units("mm")
    image.set_qform(affine, 1)
    image.header["descrip"] = b"Meier Anna 9.876"
    nibabel.save(image, path)
    return path


def axial(spacing: tuple[float, float, float] = (1.5, 1.25, 3.0)) -> np.ndarray:
    return np.diag([-spacing[0], -spacing[1], spacing[2], 1.0])


def nnunet(folder: Path, cases: dict[str, tuple[np.ndarray, np.ndarray]], labels: object = None) -> Path:
    """Write an nnU-Net dataset."""
    for name, (voxels, label_map) in cases.items():
        write(folder / "imagesTr" / f"{name}_0000.nii.gz", voxels, axial())
        write(folder / "labelsTr" / f"{name}.nii.gz", label_map, axial())
    names = {"background": 0, "stomach": 1, "duodenum": 2, "liver": 3} if labels is None else labels
    (folder / "dataset.json").write_text(json.dumps({"labels": names, "channel_names": {"0": "T2"}}))
    return folder


def convert(folder: Path, output_dir: Path, *flags: str) -> int:
    return main(["convert", "--input", str(folder), "--output_dir", str(output_dir), "--num_proc", "1", *flags])


def read_scan(output_dir: Path, name: str) -> tuple[np.ndarray, dict[str, np.ndarray]]:
    """Read the slices of a scan and the masks of its organs: shape `(slices, rows, columns)`."""
    slices = [one for one in find_slices(output_dir / "train")[0] if one.scan == name]
    pixels = np.stack([np.array(Image.open(one.path)) for one in slices])
    rles: dict[str, list[str]] = {}
    for line in (output_dir / "train.csv").read_text().splitlines()[1:]:
        slice_id, organ, rle = line.split(",")
        if slice_id.startswith(f"{name}_slice_"):
            rles.setdefault(organ, []).append(rle)
    height, width = pixels.shape[1:]
    return pixels, {organ: np.stack([decode(rle, height, width) for rle in own]) for organ, own in rles.items()}


def find_name(output_dir: Path, patient: str) -> str:
    """Return the name of the first scan of a patient in the output."""
    patients = json.loads(Path(f"{output_dir}.key.json").read_text())["patients"]
    (case,) = [entry["case"] for name, entry in patients.items() if patient in name]
    return f"case{case}_day0"


def all_bytes(folder: Path) -> bytes:
    """Return all names and contents below a folder, with the compressed parts of the PNGs unpacked."""
    parts = [str(path.relative_to(folder)).encode() for path in sorted(folder.rglob("*"))]
    for path in (one for one in sorted(folder.rglob("*")) if one.is_file()):
        data = path.read_bytes()
        parts.append(data)
        if path.suffix == ".png":
            start = data.index(b"IDAT")
            chunks = re.findall(rb"(?s)(....)IDAT", data)
            parts.append(zlib.decompress(data[start + 4 : start + 4 + int.from_bytes(chunks[0])]))
    return b"\n".join(parts)
