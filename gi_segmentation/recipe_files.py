"""Read recipes: YAML files that anybody may have written."""

import difflib
import json
import re
from pathlib import Path
from typing import Any

import yaml

from gi_segmentation.errors import InputError, one_line

# The parser of YAML takes minutes for some thousand brackets inside each other. A recipe has a few.
MAX_BRACKETS = 200


def nearest(name: str, known: list[str]) -> str:
    """Return the end of an error message about an unknown name: the known name that is most similar."""
    matches = difflib.get_close_matches(name, known, n=1)
    return f"; did you mean {matches[0]}?" if matches else "; --help lists every flag"


def load_yaml(text: str) -> Any:
    """Read YAML that anybody may have written.

    Raises:
        ValueError: If it is not valid, is nested too deeply, or has aliases.
    """
    # A few lines of aliases to aliases stand for more values than any memory holds.
    try:
        if text.count("[") + text.count("{") > MAX_BRACKETS:
            raise ValueError(f"expected at most {MAX_BRACKETS} brackets")
        if any(isinstance(token, yaml.AliasToken) for token in yaml.scan(text, Loader=yaml.SafeLoader)):
            raise ValueError("aliases like *name are not allowed")
        return yaml.safe_load(text)
    # A wrong date is a ValueError already. Too many brackets inside each other end the recursion of the parser.
    except (yaml.YAMLError, RecursionError) as error:
        raise ValueError(one_line(error)) from error


def read_recipe(path: Path, known: list[str]) -> list[str]:
    """Read a recipe and return it as command-line words.

    Args:
        path: A YAML file. Its keys are flags without the leading dashes.
        known: All flags, without the leading dashes.

    Raises:
        InputError: If the file cannot be read, is not a mapping, or has an unknown key or a key without a value.
    """
    try:
        recipe = load_yaml(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise InputError(f"--config {path}: not a readable YAML file ({one_line(error)})") from error
    if not isinstance(recipe, dict):
        raise InputError(f"--config {path}: expected lines of `flag: value`, got {type(recipe).__name__}")
    words: list[str] = []
    for key, value in recipe.items():
        if key not in known:
            raise InputError(f"--config {path}: unknown key {key!r}{nearest(str(key), known)}")
        if value is None:
            raise InputError(f"--config {path}: {key} has no value; give it one or remove the line")
        values = value if isinstance(value, list) else [value]
        texts = [json.dumps(item, default=str) if isinstance(item, dict) else str(item) for item in values]
        # Such a value would become a flag of its own, for example one that publishes the model.
        if flags := [text for text in texts if re.match(r"--|-[^\d.]", text)]:
            raise InputError(
                f"--config {path}: {key} has the value {flags[0][:40]!r}, which looks like a flag; change it"
            )
        words += [f"--{key}", *texts]
    return words
