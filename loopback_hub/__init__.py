"""Loopback Hub: a Hub server on 127.0.0.1, for tests and for rehearsing a publication. README.md says what it serves.

In: the requests of the clients. Out: repositories in a folder.
"""

import fcntl
import threading
from pathlib import Path

from loopback_hub.cards import check_card
from loopback_hub.faults import Fault, Faults
from loopback_hub.server import Server
from loopback_hub.storage import Storage

__all__ = ["Fault", "LoopbackHub", "check_card"]


class LoopbackHub:
    """A server in a thread of this process, from the start of a `with` block to its end.

    Args:
        root: Folder of the repositories; it is made if it does not exist. A new server on it serves what an earlier
            one stored.
        port: Port to listen on; 0 takes a free one.
        verbose: Whether to log each request to stderr.

    Attributes:
        endpoint: The server's address, for HF_ENDPOINT.
        faults: What goes wrong on purpose; nothing at the start.

    Raises:
        RuntimeError: If another server uses the folder.
        OSError: If the port is taken.
    """

    def __init__(self, root: str | Path, port: int = 0, verbose: bool = False) -> None:
        self.root, self.port, self.verbose = Path(root).resolve(), port, verbose
        self.endpoint, self.faults = "", Faults()

    def __enter__(self) -> "LoopbackHub":
        self.root.mkdir(parents=True, exist_ok=True)
        # The lock in `Storage` holds within one process only. This one ends with the process, even if it is killed.
        self._lock = (self.root / ".lock").open("w")
        try:
            fcntl.flock(self._lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            self._lock.close()
            message = f"expected a free folder, but a loopback Hub serves {self.root}: stop it or take another one"
            raise RuntimeError(message) from None
        self._server = Server(Storage(self.root), self.port, self.verbose, self.faults)
        # The thread looks every 0.05 seconds whether it should stop.
        threading.Thread(target=self._server.serve_forever, args=(0.05,), name="loopback-hub", daemon=True).start()
        self.endpoint = f"http://127.0.0.1:{self._server.server_address[1]}"
        return self

    def __exit__(self, *_: object) -> None:
        self._server.shutdown()
        self._server.server_close()
        self._lock.close()

    def environment(self, token: str = "loopback-token") -> dict[str, str]:
        """Return the variables that lead the clients of another process to this server.

        The clients read them when they are imported, so the process must start with them.

        Args:
            token: Value of HF_TOKEN; `invalid` is refused.
        """
        return {
            "HF_ENDPOINT": self.endpoint,
            "HF_TOKEN": token,
            "HF_HUB_OFFLINE": "0",
            # The clients upload large files by Xet or by the LFS protocol. This server has LFS only.
            "HF_HUB_DISABLE_XET": "1",
            # Otherwise `load_dataset` also calls a counter on the internet.
            "HF_UPDATE_DOWNLOAD_COUNTS": "0",
        }
