"""CPU seconds and peak memory of quantizing the demo model with GPTQ at 4 bits, in a fresh process.

    python benchmarks/cost.py --tokens tokens.npy [--peers peers/]

Peers' figures are those their runners wrote (benchmarks/peers/README.md); imports are not counted on either side.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
from pathlib import Path

RUN = """
import json, resource, sys, time, torch, numpy
import qcore, transformers
from qcore.plugins import installed
installed()
tokens = list(torch.from_numpy(numpy.load(sys.argv[1])))
def cpu():
    usage = resource.getrusage(resource.RUSAGE_SELF)
    return usage.ru_utime + usage.ru_stime
start, wall = cpu(), time.perf_counter()
qcore.quantize("demo", "gptq", bits=4, group_size=64, calibration=tokens, samples=len(tokens),
               seqlen=len(tokens[0]), output=sys.argv[2], device="cpu")
peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
print(json.dumps([cpu() - start, time.perf_counter() - wall, peak]))
"""

if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tokens", type=Path, required=True)
    parser.add_argument("--peers", type=Path)
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as scratch:
        command = [sys.executable, "-c", RUN, str(arguments.tokens), f"{scratch}/out"]
        printed = subprocess.run(command, check=True, capture_output=True, text=True).stdout
    cpu, wall, peak = json.loads(printed.splitlines()[-1])
    print(f"qcore gptq: {cpu:.0f} CPU-s, {wall:.0f} s, peak {peak:.0f} MiB")
    for result in sorted(arguments.peers.glob("*/result.json")) if arguments.peers else []:
        run = json.loads(result.read_text())
        if run["bits"] == 4 and run["sym"]:
            print(
                f"{run['peer']} {run['version']}: {run['cpu_seconds']:.0f} CPU-s, {run['wall_seconds']:.0f} s, peak {run['peak_rss_mb']:.0f} MiB"
            )
