"""Break the core of the product on purpose, and see that a test notices: `python -m tests.support.mutations`.

Each mutation replaces one piece of text in a copy of the repository, where the tests of the modules named here then
run. It is noticed if one of them fails. A table is printed, and the exit status is 1 if a mutation is not noticed.
"""

import os
import re
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import NamedTuple

from tests.support.processes import ROOT, TEST_DATA


class Mutation(NamedTuple):
    """A mistake.

    Attributes:
        name: What is wrong.
        path: The file, below `gi_segmentation`, or below the root where it starts with `./`.
        old: The text that is replaced. The file has it once.
        new: The text that replaces it.
        tests: The words for pytest that say which tests run.
    """

    name: str
    path: str
    old: str
    new: str
    tests: str


TRAINER, MASKS = "tests/training/test_trainer.py", "gi_segmentation/models/masks.py tests/models/test_masks.py"
MUTATIONS = [
    Mutation("organs in another order", "models/masks.py", "torch.arange(1, organs + 1, dtype=torch.uint8, device=device)", "torch.tensor([2, 1, 3], dtype=torch.uint8)", MASKS),
    Mutation("organs swapped in a label map", "formats/nifti.py", "enumerate(masks, start", "enumerate(masks[::-1], start", "tests/formats/test_nifti.py"),
    Mutation("an encoding off by one", "rle.py", "np.stack([starts + 1, ends", "np.stack([starts, ends", "tests/test_rle.py"),
    Mutation("a patient in both splits of a build", "./dataset_builder/gi_tract.py", "if scan.fold != config.fold]", "]", "tests/dataset_builder/test_build.py"),
    Mutation("a patient in both splits of a training", "data/slices.py", "keys.index[~held_back]", "keys.index", "tests/data/test_folds.py"),
    Mutation("an unknown organ counts as absent in Dice", "training/losses.py", "probabilities = probabilities * known[:, :, None, None]", "pass", "tests/training/test_losses.py -k Unknown"),
    Mutation("an unknown organ is no background", "training/losses.py", "belongs = ~F.pad(known, (1, 0), value=False)", "belongs = F.pad(torch.zeros_like(known), (1, 0), value=True)", "tests/training/test_losses.py -k Unknown"),
    Mutation("averaged weights not scored", "training/trainer.py", "with exchanged_weights(self.model, self.average), without_auxiliary_head(self.model):\n            return", "with without_auxiliary_head(self.model):\n            return", f"{TRAINER} -k averaged"),
    Mutation("averaged weights not saved", "training/trainer.py", "with exchanged_weights(self.model, self.average), without_auxiliary_head(self.model):\n            if", "with without_auxiliary_head(self.model):\n            if", f"{TRAINER} -k averaged"),
    Mutation("the worst checkpoint published", "arguments.py", "greater_is_better: bool | None = field(default=True", "greater_is_better: bool | None = field(default=False", f"{TRAINER} -k best"),
    Mutation("left and right exchanged in NIfTI", "formats/nifti.py", "image = nibabel.Nifti1Image(voxels,", "image = nibabel.Nifti1Image(voxels[::-1],", "tests/formats/test_nifti.py"),
    Mutation("left and right exchanged in DICOM", "formats/dicom/pixels.py", "return voxels.transpose(2, 1, 0)", "return voxels.transpose(2, 1, 0)[::-1]", "tests/formats/dicom/test_files.py -k orientation"),
    Mutation("spacings of rows and columns exchanged", "formats/kaggle/names.py", "(row_spacing, column_spacing))", "(column_spacing, row_spacing))", "gi_segmentation/formats/kaggle tests/dataset_builder/test_build.py tests/formats/kaggle"),
    Mutation("a distance with two axes exchanged", "scoring/surface.py", "((steps * spacing) ** 2)", "((steps * np.asarray(spacing)[[0, 2, 1]]) ** 2)", "tests/scoring/test_surface.py"),
    Mutation("two empty masks have a Dice of 1", "scoring/dice.py", "if total else math.nan\n\n\ndef sum", "if total else 1.0\n\n\ndef sum", "gi_segmentation/scoring/dice.py tests/scoring/test_dice.py"),
    Mutation("an unknown organ is scored as empty", "scoring/scans.py", "for organ in organs if organ in unknown)", "for organ in ())", "tests/scoring/test_scans.py -k Unknown"),
    Mutation("a prediction of another grid is scored", "scoring/common_grid.py", "order, flipped = align(grid, one.volume)", "order, flipped = (0, 1, 2), ()", "tests/scoring/test_referee.py -k orientation"),
    Mutation("a probability of 0.5 is inside", "models/masks.py", "label_mode) > 0.5", "label_mode) >= 0.5", MASKS),
    Mutation("masks resized in place of logits", "models/masks.py", 'mode="bilinear", align_corners=False', 'mode="nearest"', f"{MASKS} tests/test_predict.py"),
    Mutation("scans of one process counted twice", "training/evaluation.py", "gather_object(self.scorer.take())", "(lambda own: gather_object(own) + own)(self.scorer.take())", "tests/training/test_accelerate.py -k losses"),
]  # fmt: skip


def apply(mutation: Mutation, tree: Path) -> None:
    """Change the file of a mutation in a copy of the repository.

    Raises:
        ValueError: If the file does not have the text once. Then the product has changed, and so must this list.
    """
    path = tree / (mutation.path if mutation.path.startswith("./") else f"gi_segmentation/{mutation.path}")
    text = path.read_text(encoding="utf-8")
    if text.count(mutation.old) != 1:
        raise ValueError(f"{mutation.name}: expected {mutation.old!r} once in {mutation.path}")
    path.write_text(text.replace(mutation.old, mutation.new), encoding="utf-8")


def find_failed(mutation: Mutation) -> list[str]:
    """Return the tests that fail with a mutation, without their parameters."""
    with tempfile.TemporaryDirectory() as scratch:
        tree = Path(scratch) / "tree"
        shutil.copytree(ROOT, tree, ignore=shutil.ignore_patterns(".*", "demo", "runs"))
        apply(mutation, tree)
        words = [sys.executable, "-m", "pytest", "-q", "-n", "0", "-p", "no:cacheprovider", *mutation.tests.split()]
        # The copy comes before the installed package.
        env = {**os.environ, "PYTHONPATH": str(tree), "GI_SEGMENTATION_TEST_DATA": str(TEST_DATA)}
        done = subprocess.run(words, cwd=tree, env=env, capture_output=True, text=True, check=False)
        failed = re.findall(r"^(?:FAILED|ERROR) ([^\[\s]+)", done.stdout, re.M)
        assert failed or done.returncode == 0, done.stdout + done.stderr
        return list(dict.fromkeys(failed))


def main(names: list[str]) -> int:
    """Try the mutations whose name has one of the words, or all of them."""
    unnoticed = 0
    print("| mistake | file | tests that notice it |\n|---|---|---|", flush=True)
    for mutation in MUTATIONS:
        if names and not any(name in mutation.name for name in names):
            continue
        failed = find_failed(mutation)
        unnoticed += not failed
        print(f"| {mutation.name} | `{mutation.path}` | {', '.join(failed) or 'NONE'} |", flush=True)
    return bool(unnoticed)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
