"""Seconds of `import qcore`, `qcore --help` and `qcore plugins`: median of several fresh processes."""

from __future__ import annotations

import statistics
import subprocess
import sys
import time

COMMANDS = {
    "python -c pass": [sys.executable, "-c", "pass"],
    "import qcore": [sys.executable, "-c", "import qcore"],
    "qcore --help": [sys.executable, "-m", "qcore", "--help"],
    "qcore plugins": [sys.executable, "-m", "qcore", "plugins"],
}


def seconds(command: list[str]) -> float:
    """Wall time of one run."""
    start = time.perf_counter()
    subprocess.run(command, check=True, capture_output=True)
    return time.perf_counter() - start


if __name__ == "__main__":
    for name, command in COMMANDS.items():
        seconds(command)  # warms the file cache
        print(f"{name:20}{statistics.median(seconds(command) for _ in range(9)):8.3f} s")
