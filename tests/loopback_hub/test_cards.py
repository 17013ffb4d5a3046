"""The card checks name each fault, and the clients pass them on."""

import pytest
from huggingface_hub import DatasetCard, HfApi, ModelCard, constants

from loopback_hub import LoopbackHub, check_card

GOOD_CARD = """---
license: mit
model-index:
- name: m
  results:
  - task: {type: image-segmentation}
    dataset: {name: D, type: ns/d}
    metrics: [{type: dice, value: 0.5}]
---
# Model
"""


@pytest.mark.parametrize(
    ("kind", "front", "wanted"),
    [
        ("model", "license: apache", "license"),
        ("model", "tags: one", "tags"),
        ("model", "language: no", "language"),
        ("model", "pipeline_tag: [a]", "pipeline_tag"),
        ("model", "a: [", "not valid YAML"),
        ("model", "- a", "mapping"),
        ("model", "model-index: []", "model-index"),
        ("model", "model-index: [{results: []}]", "model-index[0].name"),
        ("model", "model-index: [{name: m, results: [{task: {type: t}, metrics: []}]}]", "results[0].dataset"),
        ("dataset", "dataset_info: a", "dataset_info"),
        ("dataset", "configs: {a: b}", "configs"),
        ("dataset", "configs: [{config_name: a}]", "configs[0].data_files"),
        ("dataset", "configs: [{config_name: a, data_files: [{split: x}]}]", "data_files[0].path"),
        ("space", "sdk: streamlit", "sdk"),
        ("space", "{sdk: gradio, python_version: 3.11}", "python_version"),
    ],
)
def test_each_card_fault_is_named(kind: str, front: str, wanted: str) -> None:
    errors, _ = check_card(f"---\n{front}\n---\n", kind)
    assert len(errors) == 1 and wanted in errors[0], errors


def test_the_clients_validate_cards(hub: LoopbackHub, monkeypatch: pytest.MonkeyPatch) -> None:
    # `validate` takes no endpoint, so the test changes the default.
    monkeypatch.setattr(constants, "ENDPOINT", hub.endpoint)
    ModelCard(GOOD_CARD).validate()
    DatasetCard("---\nlicense: other\nlicense_name: own\nconfigs: []\n---\n").validate()
    with pytest.raises(ValueError, match=r"metrics\[0\].value"):
        ModelCard(GOOD_CARD.replace("value: 0.5", "value: [0.5]")).validate()


def test_an_upload_of_a_faulty_card_is_refused(hub: LoopbackHub) -> None:
    api = HfApi(endpoint=hub.endpoint, token="any")
    api.create_repo("ns/r")
    for old, new in (("value: 0.5", "value: [0.5]"), ("type: dice, ", "")):
        card = GOOD_CARD.replace(old, new).encode()
        with pytest.raises(ValueError, match=r"Invalid metadata in README.md[\s\S]*metrics\[0\]"):
            api.upload_file(path_or_fileobj=card, path_in_repo="README.md", repo_id="ns/r")
    assert "README.md" not in api.list_repo_files("ns/r")
    with pytest.warns(UserWarning, match="license_name"):
        api.upload_file(path_or_fileobj=b"---\nlicense: other\n---\n", path_in_repo="README.md", repo_id="ns/r")
    with pytest.warns(UserWarning, match="empty or missing yaml"):
        api.upload_file(path_or_fileobj=b"# No front matter", path_in_repo="README.md", repo_id="ns/r")
