"""Say which program and which checkpoints made a prediction. DICOM files carry it."""

import hashlib
from dataclasses import dataclass
from pathlib import Path

from gi_segmentation import __version__
from gi_segmentation.files import is_hidden

NAME = "gi-segmentation"
# The name of a series with the organs of Kaggle's data.
TITLE = "Stomach and bowels, predicted"


@dataclass(frozen=True)
class Algorithm:
    """What made a prediction.

    Attributes:
        commits: Name of each checkpoint, and its commit on the Hub; for a folder, a fingerprint of its weights.
    """

    commits: dict[str, str]

    @property
    def version(self) -> str:
        """The version of this package, and the commit of the first checkpoint: at most 64 characters, as DICOM has it.

        Example:
            >>> Algorithm({"a": "ffff", "b": "eeee"}).version.removeprefix(__version__)
            ', ffff and 1 more'
        """
        commit, *others = self.commits.values()
        return f"{__version__}, {commit[:40]}" + (f" and {len(others)} more" if others else "")

    def describe(self) -> str:
        """Return a line with all checkpoints and their commits.

        Example:
            >>> Algorithm({"name/model": "ffff"}).describe().removeprefix(f"{NAME} {__version__}")
            ': name/model (ffff)'
        """
        return f"{NAME} {__version__}: " + ", ".join(f"{name} ({commit})" for name, commit in self.commits.items())


def hash_weights(folder: Path) -> str:
    """Return a fingerprint of the weights in a folder; `unknown` if there are none."""
    paths = sorted(path for path in folder.glob("*.safetensors") if not is_hidden(path))
    digest = hashlib.sha256()
    for path in paths:
        # The weights may have gigabytes, so they are not read at once. The lambda makes one digest of all files.
        with path.open("rb") as file:
            hashlib.file_digest(file, lambda: digest)
    return f"sha256 {digest.hexdigest()[:16]}" if paths else "unknown"
