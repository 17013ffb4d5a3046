"""Segment stomach, small bowel and large bowel on MR slices with Hugging Face models."""

__version__ = "0.1.0"
