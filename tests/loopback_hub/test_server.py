"""What the clients do not show: bare requests, crash safety, the end of the server, and the command line."""

import hashlib
import http.client
import json
import os
import signal
import subprocess
import sys
import urllib.error
import urllib.parse
import urllib.request
from pathlib import Path

import pytest
from huggingface_hub import HfApi

from loopback_hub import LoopbackHub
from loopback_hub.storage import replacing
from tests.support.processes import ROOT

TOKEN = {"Authorization": "Bearer any", "Content-Type": "application/json"}
COMMAND = [sys.executable, "-m", "loopback_hub"]


def send(
    url: str, method: str = "GET", data: bytes | None = None, headers: dict[str, str] | None = None
) -> tuple[int, bytes, dict[str, str]]:
    """Send a request that no client would send, and return status, body and headers."""
    request = urllib.request.Request(url, data=data, method=method, headers=headers or {})
    try:
        with urllib.request.urlopen(request, timeout=20) as answer:
            return answer.status, answer.read(), dict(answer.headers)
    except urllib.error.HTTPError as error:
        return error.code, error.read(), dict(error.headers)


def test_ranges(hub: LoopbackHub) -> None:
    data = os.urandom(100_000)
    api = HfApi(endpoint=hub.endpoint, token="any")
    api.create_repo("ns/r", repo_type="dataset")
    api.upload_file(path_or_fileobj=data, path_in_repo="d/a.bin", repo_id="ns/r", repo_type="dataset")
    url = f"{hub.endpoint}/datasets/ns/r/resolve/main/d/a.bin"
    for header, piece, total in (
        ("bytes=10-19", data[10:20], "bytes 10-19/100000"),
        ("bytes=99990-", data[99990:], "bytes 99990-99999/100000"),
        ("bytes=-5", data[-5:], "bytes 99995-99999/100000"),
        ("bytes=99999-200000", data[-1:], "bytes 99999-99999/100000"),
    ):
        status, body, headers = send(url, headers={"Range": header})
        assert (status, body, headers["Content-Range"]) == (206, piece, total), header
    status, _, headers = send(url, headers={"Range": "bytes=100000-"})
    assert (status, headers["Content-Range"]) == (416, "bytes */100000")
    status, body, headers = send(url, "HEAD")
    assert (status, body, headers["Content-Length"]) == (200, b"", "100000")
    assert headers["ETag"] == f'"{hashlib.sha256(data).hexdigest()}"'


def test_what_no_client_sends_is_refused(hub: LoopbackHub, tmp_path: Path) -> None:
    base = hub.endpoint
    create = json.dumps({"name": "r", "organization": "ns"}).encode()
    assert send(f"{base}/api/repos/create", "POST", create, TOKEN)[0] == 200
    status, body, _ = send(f"{base}/api/nowhere")
    assert status == 404 and "GET /api/nowhere" in json.loads(body)["error"]

    climbing = json.dumps({"name": "..", "organization": ".."}).encode()
    assert send(f"{base}/api/repos/create", "POST", climbing, TOKEN)[0] == 400
    for path in ("../out", "/out", "a/../../out", ".git/config", "a\\b", ""):
        file = {"key": "file", "value": {"path": path, "content": "eA=="}}
        lines = [{"key": "header", "value": {"summary": "s"}}, file]
        data = "\n".join(map(json.dumps, lines)).encode()
        assert send(f"{base}/api/models/ns/r/commit/main", "POST", data, TOKEN)[0] == 400, path
    for path in ("..%2F..%2Frepo.json", "%2e%2e/repo.json"):
        assert send(f"{base}/ns/r/resolve/main/{path}")[0] == 404, path

    oid = hashlib.sha256(b"right").hexdigest()
    batch = json.dumps({"operation": "upload", "objects": [{"oid": oid, "size": 5}]}).encode()
    assert send(f"{base}/ns/r.git/info/lfs/objects/batch", "POST", batch)[0] == 401
    _, body, _ = send(f"{base}/ns/r.git/info/lfs/objects/batch", "POST", batch, TOKEN)
    href = json.loads(body)["objects"][0]["actions"]["upload"]["href"]
    for wrong in (b"wrong", b"righ", b"right!"):
        assert send(href, "PUT", wrong)[0] == 422
    # Only the head of a request with a chunked body. The server answers without reading the body and closes the
    # connection, so a client that is still sending might see a broken pipe instead of the answer.
    address = urllib.parse.urlsplit(href)
    connection = http.client.HTTPConnection(str(address.hostname), address.port, timeout=10)
    connection.putrequest("PUT", f"{address.path}?{address.query}" if address.query else address.path)
    connection.putheader("Transfer-Encoding", "chunked")
    connection.endheaders()
    assert connection.getresponse().status == 411
    connection.close()
    _, body, _ = send(f"{base}/ns/r.git/info/lfs/objects/batch", "POST", batch, TOKEN)
    assert "actions" in json.loads(body)["objects"][0], "nothing is stored yet"
    assert send(href, "PUT", b"right")[0] == 200
    _, body, _ = send(f"{base}/ns/r.git/info/lfs/objects/batch", "POST", batch, TOKEN)
    assert "actions" not in json.loads(body)["objects"][0], "the file is here"
    assert not [path for path in tmp_path.rglob("*") if path.name.startswith((".new-", "out"))]


def test_an_interrupted_write_leaves_the_old_file(tmp_path: Path) -> None:
    target = tmp_path / "repo.json"
    target.write_text("old")
    with pytest.raises(KeyboardInterrupt), replacing(target) as file:
        file.write(b"half of the new")
        raise KeyboardInterrupt
    assert (target.read_text(), list(tmp_path.iterdir())) == ("old", [target])


def test_a_stopped_server_answers_no_more(tmp_path: Path) -> None:
    with LoopbackHub(tmp_path) as hub:
        kept_open = http.client.HTTPConnection(hub.endpoint.removeprefix("http://"), timeout=20)
        kept_open.request("GET", "/api/whoami-v2", headers=TOKEN)
        assert kept_open.getresponse().read()
    with pytest.raises((ConnectionError, http.client.HTTPException)):
        kept_open.request("GET", "/api/whoami-v2", headers=TOKEN)
        kept_open.getresponse()
    with pytest.raises(urllib.error.URLError):
        send(f"{hub.endpoint}/api/whoami-v2")


def test_command_line_runs_a_command_with_the_server(tmp_path: Path) -> None:
    check = "import os, sys; sys.exit(7 if os.environ['HF_HUB_DISABLE_XET'] == '1' and os.environ['HF_TOKEN'] else 1)"
    command = [*COMMAND, "--root", str(tmp_path), "--", sys.executable, "-c", check]
    result = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=30)
    assert result.returncode == 7, result.stderr
    assert result.stdout.startswith("Loopback Hub on http://127.0.0.1:") and result.stdout.count("\n") == 1


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_command_line_serves_until_a_signal(tmp_path: Path, number: signal.Signals) -> None:
    command = [*COMMAND, "--root", str(tmp_path)]
    with subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None and process.stderr is not None
        endpoint = process.stdout.readline().split()[3].rstrip(",")
        status, body, _ = send(f"{endpoint}/api/whoami-v2", headers={"Authorization": "Bearer any"})
        assert (status, json.loads(body)["name"]) == (200, "loopback")
        process.send_signal(number)
        assert process.wait(timeout=10) == 0
        assert (process.stdout.read(), process.stderr.read()) == ("", "")
