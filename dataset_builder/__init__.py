"""Turn the UW-Madison GI Tract data of Kaggle into a `datasets` dataset.

Importing this package teaches `datasets.load_dataset` the name "gi_tract":
`load_dataset("gi_tract", data_dir=KAGGLE_DIR)`.
"""

import sys


def _is_the_program() -> bool:
    """Return whether this import is the first step of `python -m dataset_builder`.

    Python imports the package before the package's `__main__`. During that time, `sys.argv[0]` is "-m", and the other
    items of `sys.argv` are the words after the module's name. So the name stands right before these words in
    `sys.orig_argv`, perhaps joined to `-m`. In any other program, `sys.argv[0]` is something else or the name differs.
    """
    module = sys.orig_argv[-len(sys.argv) :][:1] if sys.argv[:1] == ["-m"] else []
    return module in ([__name__], [f"-m{__name__}"])


# The program builds the dataset itself and never loads it by its name. Without the registration, which imports
# `datasets`, its `--help` answers at once.
if not _is_the_program():
    from dataset_builder.gi_tract import register

    register()
