"""In: a tree of DICOM files of any hospital. Out: series on a grid; and masks as SEG and RTSTRUCT of a series."""
