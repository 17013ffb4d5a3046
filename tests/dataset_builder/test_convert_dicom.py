"""`convert`: DICOM series with structure sets and segmentations become a Kaggle folder."""

from pathlib import Path

import numpy as np
import pytest
from pydicom import dcmread
from pydicom.uid import generate_uid

from dataset_builder.series import write_series
from gi_segmentation.formats.dicom.rtstruct import write_rtstruct
from gi_segmentation.formats.dicom.seg import write_dicom_seg
from gi_segmentation.formats.kaggle.label_file import read_label_file
from gi_segmentation.formats.volumes import Volume
from gi_segmentation.labels import LabelSet
from tests.dataset_builder.test_convert import all_bytes, convert, find_name, read_scan
from tests.support.dicom import edit, read_series
from tests.support.round_trips import ALGORITHM
