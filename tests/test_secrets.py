"""Secrets: no message has a token, and nothing that could carry one into a file is accepted.

tests/test_pipeline.py searches everything that a training and a publication leave behind for the token.
"""

import re
from pathlib import Path

import pytest
from huggingface_hub import HfApi

from gi_segmentation.command_line import parse_arguments
from gi_segmentation.errors import InputError, describe_cause, exit_on_input_error
from loopback_hub import LoopbackHub

TOKEN = "hf_madeUpForATest"


def test_a_token_as_a_flag_is_refused_without_showing_it() -> None:
    with pytest.raises(InputError, match="HF_TOKEN") as caught:
        parse_arguments(["--hub_token", TOKEN])
    assert TOKEN not in str(caught.value)


@pytest.mark.parametrize(
    ("name", "value", "expected"),
    [
        # What a word processor has for a line break, and for a dash.
        ("HF_TOKEN", f"{TOKEN}\x0b{TOKEN}", r"HF_TOKEN: .* character 18 of 35 "),
        ("HUGGING_FACE_HUB_TOKEN", f"{TOKEN}–{TOKEN}", "HUGGING_FACE_HUB_TOKEN: .* character 18 of 35 "),
        ("HF_ENDPOINT", f"https://me:{TOKEN}@hub.example", "HF_ENDPOINT: .* without a user and a password"),
    ],
    ids=["control character", "not ASCII", "password in the address"],
)
def test_a_secret_that_would_end_in_a_message_is_refused(
    name: str, value: str, expected: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv(name, value)
    with pytest.raises(SystemExit), exit_on_input_error():
        pytest.fail("the command started")
    (line,) = capsys.readouterr().err.splitlines()
    assert re.search(expected, line) and TOKEN not in line


def test_the_client_would_show_such_a_token(hub: LoopbackHub, monkeypatch: pytest.MonkeyPatch) -> None:
    # The reason for the check above. If the client hides the token one day, this test can go.
    monkeypatch.setenv("HF_TOKEN", f"{TOKEN}\x0b{TOKEN}")
    with pytest.raises(Exception, match=TOKEN):
        HfApi(endpoint=hub.endpoint).whoami()


@pytest.mark.parametrize("stored", ["HF_TOKEN", "file"])
def test_a_hub_that_repeats_the_token_does_not_bring_it_into_a_message(
    stored: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    if stored == "file":
        # Where `hf auth login` puts it.
        (tmp_path / "token").write_text(TOKEN + "\n")
        monkeypatch.setattr("huggingface_hub.constants.HF_TOKEN_PATH", str(tmp_path / "token"))
    else:
        monkeypatch.setenv("HF_TOKEN", TOKEN)
    answer = OSError(f"401 Client Error: {TOKEN} is not valid")
    assert describe_cause(answer) == "401 Client Error: <token> is not valid"
    with pytest.raises(SystemExit), exit_on_input_error():
        raise InputError(f"--dataset_name me/gi_tract: {answer}")
    assert capsys.readouterr().err == "error: --dataset_name me/gi_tract: 401 Client Error: <token> is not valid\n"
