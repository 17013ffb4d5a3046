"""Look the packages of requirements.lock up in a database of known vulnerabilities: `python -m tests.support.audit`.

The exit status is 1 if there is one. Where the database cannot be reached, a line says so, and the status is 0.
"""

import json
import subprocess
import sys
from pathlib import Path

from tests.support.processes import ROOT

LOCK = ROOT / "requirements.lock"
# Seconds for one answer, and for all of them.
ANSWER_S, ALL_S = 5, 60
# What pip-audit prints if its database does not answer.
UNREACHABLE = ("Could not connect", "ConnectionError", "timed out", "Max retries")


def audit(lock: Path, options: list[str]) -> tuple[int, str]:
    """Ask the database OSV.

    Args:
        lock: Versions of packages, in pip's form.
        options: More options for pip-audit.

    Returns:
        The exit status, and the lines for the terminal.
    """
    command = [
        *(sys.executable, "-m", "pip_audit", "--requirement", str(lock), "--disable-pip", "--no-deps"),
        *("--vulnerability-service", "osv", "--timeout", str(ANSWER_S), "--format", "json"),
        *("--progress-spinner", "off", *options),
    ]
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=ALL_S, check=False)
    except subprocess.TimeoutExpired:
        return 0, f"audit: the database did not answer within {ALL_S} s, so the dependencies were not audited"
    if not done.stdout.strip():
        if any(sign in done.stderr for sign in UNREACHABLE):
            return 0, "audit: the database cannot be reached, so the dependencies were not audited"
        return 1, f"audit: pip-audit failed:\n{done.stderr[-2000:]}"
    # A package that the database does not know has a reason for its absence in place of a version.
    packages = [package for package in json.loads(done.stdout)["dependencies"] if "skip_reason" not in package]
    found = [
        f"audit: {package['name']} {package['version']} has {vulnerability['id']}, corrected in "
        f"{', '.join(vulnerability['fix_versions']) or 'no release'}"
        for package in packages
        for vulnerability in package.get("vulns", [])
    ]
    if found:
        return 1, "\n".join([*found, "audit: raise these versions in setup.cfg, then run `make lock`"])
    return 0, f"audit: no known vulnerability in {len(packages)} packages"


if __name__ == "__main__":
    status, lines = audit(LOCK, sys.argv[1:])
    print(lines)
    sys.exit(status)
