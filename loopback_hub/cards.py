"""Checks of a card: the YAML at the top of README.md, which search and the dataset viewer of a Hub read.

The rules follow the documentation of the real Hub: https://huggingface.co/docs/hub/model-cards, and datasets-cards and
spaces-config-reference in the same place. They cover the fields that this project writes, and are not complete.
"""

import re
from collections.abc import Iterator, Mapping
from typing import Any

import yaml

# The YAML must be the first thing in the file. A later line `---` is a rule across the page.
FRONT_MATTER = re.compile(r"\A\s*---\r?\n(.*?)\r?\n---[ \t]*(?:\r?\n|\Z)", re.DOTALL)
STRING_FIELDS = ("pipeline_tag", "library_name", "license_name", "pretty_name")
LIST_FIELDS = ("language", "license", "base_model", "datasets", "metrics", "task_categories", "size_categories")
SPACE_SDKS = ("gradio", "docker", "static")
# Source: https://huggingface.co/docs/hub/repositories-licenses
LICENSES = """
afl-3.0 agpl-3.0 apache-2.0 apple-amlr apple-ascl artistic-2.0 bigcode-openrail-m bigscience-bloom-rail-1.0
bigscience-openrail-m bsd bsd-2-clause bsd-3-clause bsd-3-clause-clear bsl-1.0 c-uda cc cc-by-2.0 cc-by-2.5 cc-by-3.0
cc-by-4.0 cc-by-nc-2.0 cc-by-nc-3.0 cc-by-nc-4.0 cc-by-nc-nd-3.0 cc-by-nc-nd-4.0 cc-by-nc-sa-2.0 cc-by-nc-sa-3.0
cc-by-nc-sa-4.0 cc-by-nd-4.0 cc-by-sa-3.0 cc-by-sa-4.0 cc0-1.0 cdla-permissive-1.0 cdla-permissive-2.0
cdla-sharing-1.0 creativeml-openrail-m deepfloyd-if-license ecl-2.0 epl-1.0 epl-2.0 etalab-2.0 eupl-1.1 eupl-1.2
gemma gfdl gpl gpl-2.0 gpl-3.0 h-research intel-research isc lgpl lgpl-2.1 lgpl-3.0 lgpl-lr llama2 llama3 llama3.1
llama3.2 llama3.3 llama4 lppl-1.3c mit mpl-2.0 ms-pl ncsa odbl odc-by ofl-1.1 openrail openrail++ osl-3.0 other pddl
postgresql unknown unlicense wtfpl zlib
"""


def check_card(content: str, kind: str) -> tuple[list[str], list[str]]:
    """Return the errors and the warnings for a README.md.

    Args:
        content: The whole text.
        kind: `model`, `dataset` or `space`.

    Returns:
        Messages. The Hub refuses a card with errors, and accepts one with warnings.

    Example:
        >>> check_card("---\\ntags: one\\n---\\n", "model")
        (['"tags" must be a list of strings, got \\'one\\''], [])
    """
    try:
        card = parse_front_matter(content)
    except yaml.YAMLError as error:
        return [f"the front matter is not valid YAML: {error}"], []
    # Without a card there is nothing to check. The Hub accepts that, and shows a warning to the author.
    if card is None:
        return [], ["empty or missing yaml metadata in repo card"]
    if not isinstance(card, dict):
        return [f"the front matter must be a mapping of keys to values, got {type(card).__name__}"], []
    errors = [*check_fields(card), *check_model_index(card.get("model-index"))]
    # In the card of a model these fields have no meaning.
    if kind == "dataset":
        errors += check_configs(card)
    if kind == "space":
        errors += check_space(card)
    warnings = []
    # A license that the list does not have is called `other`, and its name stands in another field.
    if card.get("license") == "other" and not card.get("license_name"):
        warnings.append('"license_name" should name the license when "license" is "other"')
    return errors, warnings


def parse_front_matter(content: str) -> Any:
    """Return the YAML between the two lines `---`, or None. Raises yaml.YAMLError if it is not valid."""
    match = FRONT_MATTER.match(content)
    return yaml.safe_load(match[1]) if match else None


def as_list(value: Any) -> list[Any]:
    """Return the values of a field that may have one value, several or none."""
    if value is None:
        return []
    return value if isinstance(value, list) else [value]


def check_fields(card: Mapping[str, Any]) -> Iterator[str]:
    """Yield the errors in the plain fields of a card."""
    for key in LIST_FIELDS:
        if not all(isinstance(item, str) for item in as_list(card.get(key))):
            # YAML 1.1 reads a bare `no`, the code of Norwegian, as False.
            yield f'"{key}" must be a string or a list of strings, got {card[key]!r} (quote a bare `no`)'
    for key in STRING_FIELDS:
        if not isinstance(card.get(key), str | None):
            yield f'"{key}" must be a string, got {card[key]!r}'
    tags = card.get("tags")
    if tags is not None and (isinstance(tags, str) or not all(isinstance(tag, str) for tag in as_list(tags))):
        yield f'"tags" must be a list of strings, got {tags!r}'
    for name in as_list(card.get("license")):
        if name not in LICENSES.split():
            yield f'"license" must be one of the Hub\'s identifiers (apache-2.0, mit, other, ...), got {name!r}'


def check_keys(item: Any, where: str, **types: type | tuple[type, ...]) -> list[str]:
    """Return the errors for keys that a mapping lacks, or that have a wrong type. `where` is its place in the card."""
    if not isinstance(item, dict):
        return [f'"{where}" must be a mapping, got {item!r}']
    errors = []
    for key, wanted in types.items():
        value = item.get(key)
        # In Python True is an int, but as a score it is a mistake.
        if not isinstance(value, wanted) or isinstance(value, bool):
            names = " or ".join(kind.__name__ for kind in (wanted if isinstance(wanted, tuple) else (wanted,)))
            errors.append(f'"{where}.{key}" is required as {names}, got {value!r}')
    return errors


def check_model_index(index: Any) -> Iterator[str]:
    """Yield the errors in `model-index`, the scores of a model: models have results, and results have metrics."""
    if index is None:
        return
    if not isinstance(index, list) or not index:
        yield f'"model-index" must be a non-empty list, got {index!r}'
        return
    for i, model in enumerate(index):
        errors = check_keys(model, f"model-index[{i}]", name=str, results=list)
        yield from errors
        # The inner levels can be read only if the outer ones are right.
        for j, result in enumerate([] if errors else model["results"]):
            yield from check_result(result, f"model-index[{i}].results[{j}]")


def check_result(result: Any, where: str) -> list[str]:
    """Return the errors in one result of a `model-index`."""
    # A score means something only with the task and the dataset that it was measured on.
    if errors := check_keys(result, where, task=dict, dataset=dict, metrics=list):
        return errors
    errors = check_keys(result["task"], f"{where}.task", type=str)
    errors += check_keys(result["dataset"], f"{where}.dataset", name=str, type=str)
    for k, metric in enumerate(result["metrics"]):
        errors += check_keys(metric, f"{where}.metrics[{k}]", type=str, value=(int, float, str))
    return errors


def check_configs(card: Mapping[str, Any]) -> Iterator[str]:
    """Yield the errors in `dataset_info` and in `configs`, which tells `load_dataset` the files of each split."""
    info, configs = card.get("dataset_info"), card.get("configs")
    if not isinstance(info, dict | list | None):
        yield f'"dataset_info" must be a mapping or a list of mappings, got {info!r}'
    if configs is not None and not isinstance(configs, list):
        yield f'"configs" must be a list of mappings, got {configs!r}'
        return
    for i, config in enumerate(as_list(configs)):
        errors = check_keys(config, f"configs[{i}]", config_name=str, data_files=(str, list))
        yield from errors
        # `data_files` is one pattern for all files, a list of patterns, or a list of splits with their patterns.
        for j, item in enumerate([] if errors else as_list(config["data_files"])):
            if not isinstance(item, str):
                yield from check_keys(item, f"configs[{i}].data_files[{j}]", split=str, path=(str, list))


def check_space(card: Mapping[str, Any]) -> Iterator[str]:
    """Yield the errors in the fields from which a Space is built and started."""
    if card.get("sdk") not in SPACE_SDKS:
        yield f'"sdk" must be one of {", ".join(SPACE_SDKS)}, got {card.get("sdk")!r}'
    # YAML reads a bare 3.10 as the number 3.1.
    for key in ("title", "sdk_version", "python_version", "app_file", "short_description"):
        if not isinstance(card.get(key), str | None):
            yield f'"{key}" must be a string, got {card[key]!r} (quote a version)'


def card_tags(card: Mapping[str, Any], kind: str) -> list[str]:
    """Return the tags that the Hub derives from the fields of a card; `kind` is `models`, `datasets` or `spaces`.

    Example:
        >>> card_tags({"license": "mit", "tags": ["medical"], "language": "en"}, "models")
        ['medical', 'license:mit', 'en']
    """
    # `Trainer.create_model_card` reads the license of the base model from its tag, not from its card.
    prefixes = {"library_name": "", "tags": "", "pipeline_tag": "", "license": "license:", "base_model": "base_model:"}
    prefixes |= {"task_categories": "task_categories:", "size_categories": "size_categories:", "datasets": "dataset:"}
    prefixes |= {"language": "" if kind == "models" else "language:"}
    return [f"{prefix}{value}" for key, prefix in prefixes.items() for value in as_list(card.get(key))]
