"""Kill a run with SIGKILL at random moments until it is done; compare its bytes with those of a run never killed.

    python benchmarks/kill_test.py --kills 30

Kills fall anywhere: at start-up, while calibrating, inside a block, while the journal or the output is written.
"""

from __future__ import annotations

import argparse
import filecmp
import random
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from memory_depth import make_model

RUN = """
import sys, torch, qcore
torch.set_num_threads(1)
tokens = [torch.randint(0, 1000, (128,), generator=torch.Generator().manual_seed(i)) for i in range(8)]
qcore.quantize(sys.argv[1], "gptq", bits=4, group_size=64, calibration=tokens, output=sys.argv[2], device="cpu")
"""


def start(model: Path, output: Path) -> subprocess.Popen[bytes]:
    """Start a run."""
    return subprocess.Popen([sys.executable, "-c", RUN, str(model), str(output)], stderr=subprocess.PIPE)


def equal_folders(one: Path, other: Path) -> bool:
    """Whether two folders hold the same files with the same bytes."""
    names = sorted(file.name for file in one.iterdir())
    if names != sorted(file.name for file in other.iterdir()):
        return False
    return filecmp.cmpfiles(one, other, names, shallow=False)[0] == names


def main() -> None:
    """Repeat whole runs until enough kills have landed."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--kills", type=int, default=30)
    parser.add_argument("--seed", type=int, default=0)
    arguments = parser.parse_args()
    chance = random.Random(arguments.seed)
    with tempfile.TemporaryDirectory() as scratch:
        folder = Path(scratch)
        make_model(folder / "model", 12, 256)
        begun = time.perf_counter()
        assert start(folder / "model", folder / "whole").wait() == 0
        whole = time.perf_counter() - begun
        kills = runs = identical = 0
        while kills < arguments.kills:
            output = folder / f"run-{runs}"
            while True:
                process = start(folder / "model", output)
                try:
                    process.wait(timeout=chance.uniform(0.2, 1.0) * whole)
                except subprocess.TimeoutExpired:
                    process.send_signal(signal.SIGKILL)
                    process.wait()
                    kills += 1
                    if output.exists():  # killed after the rename: it must be complete
                        break
                    continue
                assert process.returncode == 0, process.stderr and process.stderr.read().decode()
                break
            runs += 1
            identical += equal_folders(folder / "whole", output)
        print(f"a run takes {whole:.1f} s; {kills} kills over {runs} runs: {identical} of {runs} byte-identical")


if __name__ == "__main__":
    main()
