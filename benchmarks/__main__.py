"""Run benchmarks, and write their tables into benchmarks/README.md.

The file has a marker with the command of each table: `<!-- table: NAME FLAGS -->` runs `python -m benchmarks.NAME
FLAGS`. What it prints takes the place of the lines up to `<!-- end -->`. Tables with a marker `<!-- long table: ...`
take many minutes, and are written only if they are named.
"""

import argparse
import os
import platform
import re
import shlex
import subprocess
import sys
import time
from datetime import UTC, datetime
from pathlib import Path
from typing import TextIO, cast

README = Path(__file__).with_name("README.md")
MARKER = re.compile(r"<!-- (?P<long>long )?table: (?P<command>.+?) -->\n(?P<table>.*?)<!-- end -->", re.DOTALL)


def describe_machine() -> str:
    """Return the processor, the GPU if there is one, and the release of PyTorch."""
    import torch

    # Linux has no other place with the name of the processor.
    found = re.search(r"model name\s*: (.*)", Path("/proc/cpuinfo").read_text()) if os.name == "posix" else None
    processor = found[1] if found else platform.processor()
    gpu = torch.cuda.get_device_name() if torch.cuda.is_available() else "no GPU"
    return f"{os.cpu_count()} cores ({processor}), {gpu}, PyTorch {torch.__version__}"


def tables_of(output: str) -> str:
    """Return the tables of an output, with an empty line between two of them.

    Example:
        >>> tables_of("Loading ...\\n| a |\\n|---|\\n| 1 |\\ndone\\n| b |\\n")
        '| a |\\n|---|\\n| 1 |\\n\\n| b |\\n'
    """
    return "\n\n".join(re.findall(r"^\|.*(?:\n\|.*)*", output, flags=re.MULTILINE)) + "\n"


def write_table(text: str, command: str, table: str) -> str:
    """Return the text of the file with a new table after the marker of a command."""

    def replace(found: re.Match) -> str:
        if found["command"] != command:
            return found[0]
        return f"<!-- {found['long'] or ''}table: {command} -->\n{table}<!-- end -->"

    return MARKER.sub(replace, text)


def main() -> None:
    """Run the benchmarks one after the other. The file is written after each one."""
    found = [(bool(marker["long"]), marker["command"]) for marker in MARKER.finditer(README.read_text("utf-8"))]
    names = sorted({command.split()[0] for _, command in found})
    parser = argparse.ArgumentParser("python -m benchmarks", description=__doc__)
    parser.add_argument("names", nargs="*", metavar="NAME", help=f"some of: {', '.join(names)}; none: all short ones")
    chosen = parser.parse_args().names
    if unknown := set(chosen) - set(names):
        parser.error(f"no marker for {', '.join(sorted(unknown))} in {README}; there are {', '.join(names)}")
    failed = []
    for long, command in found:
        if command.split()[0] not in chosen and (chosen or long):
            continue
        print(f"{command} ...", flush=True)
        name, *flags = shlex.split(command)
        started = time.monotonic()
        command_line = [sys.executable, "-m", f"benchmarks.{name}", *flags]
        lines = []
        with subprocess.Popen(command_line, stdout=subprocess.PIPE, text=True) as running:
            for line in cast(TextIO, running.stdout):
                # A table appears row by row, because a benchmark may take minutes.
                print(line, end="", flush=True)
                lines.append(line)
        seconds = time.monotonic() - started
        print(f"{seconds:.0f} s\n", flush=True)
        if running.returncode:
            failed.append(command)
            continue
        day = datetime.now(UTC).date()
        remark = f"\nMeasured on {day} in {seconds:.0f} s: {describe_machine()}.\n"
        # The file is read again, because somebody may have edited it in the meantime.
        README.write_text(write_table(README.read_text("utf-8"), command, tables_of("".join(lines)) + remark), "utf-8")
    if failed:
        sys.exit(f"failed, and their tables are the old ones: {'; '.join(failed)}")


if __name__ == "__main__":
    main()
