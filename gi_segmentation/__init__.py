"""Segment stomach, small bowel and large bowel on MR slices with Hugging Face models.

The packages `data`, `models`, `training`, `scoring`, `inference` and `publishing` are the stages of the pipeline. The
docstring of each says what goes in and what comes out. docs/design.md says which of them may import which.
"""

__version__ = "0.1.0"
