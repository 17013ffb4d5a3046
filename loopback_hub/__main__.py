"""Command line of the loopback Hub: serve until SIGINT or SIGTERM, or run one command and stop."""

import argparse
import os
import signal
import subprocess
import sys
import threading
from pathlib import Path

from loopback_hub import LoopbackHub


def parse_arguments() -> argparse.Namespace:
    """Return the options. argparse itself gives everything after `--` to `command`."""
    parser = argparse.ArgumentParser(
        prog="python -m loopback_hub",
        usage="%(prog)s --root DIR [--port N] [--verbose] [-- COMMAND ...]",
        description="A Hub server on 127.0.0.1 for tests and rehearsals, never for a network.",
    )
    parser.add_argument("--root", required=True, type=Path, help="folder of the repositories")
    parser.add_argument("--port", type=int, default=0, help="port to listen on (default: a free one)")
    parser.add_argument("--verbose", action="store_true", help="log each request to stderr")
    parser.add_argument("command", nargs="*", help="run this with the server's HF_ENDPOINT and HF_TOKEN, then stop")
    return parser.parse_args()


def run_with_hub(hub: LoopbackHub, command: list[str]) -> int:
    """Run a command against the server, and return its exit status as a shell would."""
    process = subprocess.Popen(command, env={**os.environ, **hub.environment()})
    # Control-C in a terminal reaches the command too, and the server must outlive it. SIGTERM reaches only the server.
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, lambda *_: process.terminate())
    code = process.wait()
    # A command that signal 9 ended has the code -9 in Python, and 137 in a shell.
    return code if code >= 0 else 128 - code


def main() -> int:
    """Run the command line, and return the exit status."""
    options, stop = parse_arguments(), threading.Event()
    # A program that reads the line below may send a signal at once.
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, lambda *_: stop.set())
    try:
        with LoopbackHub(options.root, options.port, options.verbose) as hub:
            print(f"Loopback Hub on {hub.endpoint}, storage in {options.root}", flush=True)
            return run_with_hub(hub, options.command) if options.command else int(not stop.wait())
    except (RuntimeError, OSError) as error:
        print(f"loopback_hub: {error}", file=sys.stderr)
        return 1


if __name__ == "__main__":
    sys.exit(main())
