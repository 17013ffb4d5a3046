"""Write masks as a DICOM segmentation (SEG)."""

from pathlib import Path

import numpy as np

from gi_segmentation import __version__
from gi_segmentation.inference.algorithm import NAME, TITLE, Algorithm
from gi_segmentation.inference.dicom import ORGAN_CODES, DicomSeries, read_dataset
from gi_segmentation.inference.volumes import Volume
from gi_segmentation.schema import COLOURS, ORGANS


def write_dicom_seg(volume: Volume, masks: np.ndarray, path: Path, algorithm: Algorithm) -> None:
    """Write a segmentation with a segment per organ. It refers to the series, and shares its frame of reference.

    Args:
        volume: A DICOM series.
        masks: bool, shape `(organs, columns, rows, slices)`. Organs may overlap.
        path: File to write.
        algorithm: What made the masks.
    """
    import highdicom
    from pydicom.sr.codedict import codes
    from pydicom.uid import generate_uid

    series: DicomSeries = volume.origin
    # Highdicom expects the frames of an enhanced file in the order of the file.
    order = np.argsort([frame.number for frame in series.frames], kind="stable")
    identification = highdicom.AlgorithmIdentificationSequence(
        NAME, codes.DCM.ArtificialIntelligence, algorithm.version, parameters=algorithm.commits
    )
    segments = [
        highdicom.seg.SegmentDescription(
            number,
            organ,
            codes.SCT.Organ,
            highdicom.sr.CodedConcept(*ORGAN_CODES[organ]),
            highdicom.seg.SegmentAlgorithmTypeValues.AUTOMATIC,
            identification,
            display_color=highdicom.color.CIELabColor.from_rgb(*COLOURS[number]),
        )
        for number, organ in enumerate(ORGANS, start=1)
    ]
    segmentation = highdicom.seg.Segmentation(
        [read_dataset(file, stop_before_pixels=True) for file in series.paths],
        masks.transpose(3, 2, 1, 0)[order].astype(np.uint8),
        highdicom.seg.SegmentationTypeValues.BINARY,
        segments,
        series_instance_uid=generate_uid(),
        series_number=1,
        sop_instance_uid=generate_uid(),
        instance_number=1,
        manufacturer=NAME,
        manufacturer_model_name=NAME,
        software_versions=__version__,
        # The attribute is mandatory, and a program has no serial number.
        device_serial_number="0",
        content_label="SEGMENTATION",
        content_description=TITLE,
        series_description=TITLE,
    )
    segmentation.save_as(path)
