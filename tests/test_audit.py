"""The audit of the locked packages: a vulnerability fails and is named, and a database out of reach is no failure."""

import json
import threading
import time
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest

from tests.support import audit

ADVISORY = {
    "id": "GHSA-made-up",
    "published": "2026-01-01T00:00:00Z",
    "modified": "2026-01-01T00:00:00Z",
    "affected": [
        {
            "package": {"ecosystem": "PyPI", "name": "jinja2"},
            "ranges": [{"type": "ECOSYSTEM", "events": [{"introduced": "0"}, {"fixed": "2.1"}]}],
        }
    ],
}


class Database(BaseHTTPRequestHandler):
    """Answers like OSV: `jinja2` has a vulnerability, and for `slow` there is no answer."""

    def do_POST(self) -> None:
        name = json.loads(self.rfile.read(int(self.headers["Content-Length"])))["package"]["name"]
        if name == "slow":
            time.sleep(30)
        body = json.dumps({"vulns": [ADVISORY]} if name == "jinja2" else {}).encode()
        self.send_response(200)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    def log_message(self, *_: object) -> None:
        pass


@pytest.fixture(scope="module")
def database() -> Iterator[str]:
    with ThreadingHTTPServer(("127.0.0.1", 0), Database) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        yield f"http://127.0.0.1:{server.server_address[1]}/"
        server.shutdown()


@pytest.mark.parametrize(
    ("packages", "status", "expected"),
    [
        ("jinja2==2.0 numpy==2.4.6", 1, "audit: jinja2 2.0 has GHSA-made-up, corrected in 2.1\n"),
        ("numpy==2.4.6 pandas==3.1.1", 0, "audit: no known vulnerability in 2 packages"),
        ("slow==1", 0, "audit: the database did not answer within 2 s, so the dependencies were not audited"),
        ("numpy", 1, "audit: pip-audit failed:"),
    ],
    ids=["vulnerable", "clean", "silent", "not pinned"],
)
def test_a_vulnerability_fails_and_is_named(
    packages: str, status: int, expected: str, database: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    if packages == "slow==1":
        monkeypatch.setattr(audit, "ALL_S", 2)
    lock = tmp_path / "requirements.lock"
    lock.write_text("\n".join(packages.split()) + "\n")
    found, lines = audit.audit(lock, ["--osv-url", database])
    assert (found, lines[: len(expected)]) == (status, expected)


def test_a_database_out_of_reach_is_no_failure(tmp_path: Path) -> None:
    (tmp_path / "requirements.lock").write_text("numpy==2.4.6\n")
    # Nobody listens on this port.
    found = audit.audit(tmp_path / "requirements.lock", ["--osv-url", "http://127.0.0.1:9/"])
    assert found == (0, "audit: the database cannot be reached, so the dependencies were not audited")


def test_the_lock_file_has_all_packages_but_pytorch_with_hashes_and_no_address() -> None:
    text = audit.LOCK.read_text(encoding="utf-8")
    entries = [entry for entry in text.replace("\\\n", "").splitlines() if not entry.lstrip().startswith("#")]
    assert len(entries) > 100 and all("==" in entry and "--hash=sha256:" in entry for entry in entries)
    assert not [entry for entry in entries if entry.startswith(("torch==", "nvidia-"))]
    assert not [word for word in ("://", "file:", "--index", "--find-links") if word in text]
