"""Write the sample scans of the web page: `python -m app.make_samples FOLDER`."""

import shutil
import sys
import tempfile
from pathlib import Path

import nibabel

from dataset_builder.phantom import write_phantom
from dataset_builder.series import read_first_scan, write_series

NUM_SLICES = 16
# Another seed than that of the demo, so no model of the demo has seen these patients.
SEED = 7
# Fewer grey levels make smaller files. The noise of the phantom is larger than this step.
STEP = 20


def write_samples(folder: Path) -> None:
    """Write a phantom as a NIfTI file, and another one as a zip with a DICOM series."""
    with tempfile.TemporaryDirectory() as temporary:
        kaggle, series = Path(temporary) / "kaggle", Path(temporary) / "series"
        write_phantom(kaggle, num_cases=4, days_per_case=1, slices_per_scan=NUM_SLICES, seed=SEED, num_proc=1)
        # The two smallest scans.
        scans = sorted(kaggle.rglob("scans"), key=lambda folder: sum(path.stat().st_size for path in folder.iterdir()))
        for scan, name in zip(scans, ("nifti", "dicom"), strict=False):
            voxels, affine = read_first_scan(scan)
            coarse = voxels // STEP
            if name == "nifti":
                nibabel.save(nibabel.Nifti1Image(coarse, affine), folder / "phantom_NIfTI.nii.gz")
            else:
                write_series(series, coarse, affine)
                shutil.make_archive(str(folder / "phantom_DICOM"), "zip", series)


if __name__ == "__main__":
    write_samples(Path(sys.argv[1]))
