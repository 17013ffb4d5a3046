"""Faults on purpose: which requests the server answers wrongly, how, and how often."""

import re
import threading
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import Literal


@dataclass
class Fault:
    """What goes wrong with some requests.

    Attributes:
        method: Method of the requests.
        path: Regular expression that is searched in their path.
        status: Answer with this status, and do nothing else.
        action: `reset`: break the connection after half of the request's body. `cut`: do what was asked, and break the
            connection after half of the answer. `page`: answer with an HTML page, as a proxy does. `damage`: send a
            file with another first byte.
        headers: Further headers of the answer with `status`.
        delay_s: Seconds to wait before anything else.
        times: How many requests it hits; `math.inf`: all of them.

    Example:
        >>> Fault("POST", "/commit/", status=500, times=2).hits("POST", "/api/models/me/model/commit/main")
        True
    """

    method: str
    path: str
    status: int | None = None
    action: Literal["reset", "cut", "page", "damage"] | None = None
    headers: Mapping[str, str] = field(default_factory=dict)
    delay_s: float = 0
    times: float = 1

    def hits(self, method: str, path: str) -> bool:
        """Return whether a request has this fault."""
        return self.times > 0 and method == self.method and re.search(self.path, path) is not None


class Faults:
    """The faults of a server. A test may set them while a client runs.

    Attributes:
        count: How many requests had a fault so far.
    """

    def __init__(self) -> None:
        self.count = 0
        self._lock = threading.Lock()
        self._faults: list[Fault] = []

    def set(self, faults: Iterable[Fault] = ()) -> None:
        """Put these faults in the place of the earlier ones."""
        with self._lock:
            self._faults = list(faults)

    def take(self, method: str, path: str) -> Fault | None:
        """Return the first fault that a request has, and count it; None if the request has none."""
        with self._lock:
            for fault in self._faults:
                if fault.hits(method, path):
                    fault.times -= 1
                    self.count += 1
                    return fault
        return None
