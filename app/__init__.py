"""In: a checkpoint, and scans that a visitor drops. Out: a web page with the slices, the organs and the files."""
