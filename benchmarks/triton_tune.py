"""Find the configurations that the `triton` backend ships: every candidate on every shape, and the best by geometric mean.

    python benchmarks/triton_tune.py [--tokens 1,16,32,64] [--workers 8]

Candidates are compiled first, by several processes into Triton's cache, then timed one by one as `qcore bench matmul` does.
"""

from __future__ import annotations

import argparse
import itertools
import math
import subprocess
import sys
from functools import partial

import torch
from qcore_plugins.backends import triton_configs
from qcore_plugins.backends.triton_configs import Config

from qcore import MatmulSpec, QuantConfig
from qcore.plugins import installed
from qcore.tools import bench

GPU = torch.device("cuda")


def products(columns: int, out: int) -> list[bench.Product]:
    """Products of many weights of a shape, 4 bits, group 128."""
    spec = MatmulSpec(QuantConfig(bits=4, group_size=128), columns, out, False, torch.float16, GPU)
    return bench.packed_products(installed().get("backend", "triton"), spec)


def candidates(m: int) -> list[Config]:
    """Everything worth trying for m tokens."""
    rows = 16 if m <= 16 else 32 if m <= 32 else 64
    shapes = itertools.product((32, 64, 128), (2, 4, 8), (2, 3, 4))
    return [Config(rows, n, warps, stages, 0) for n, warps, stages in shapes if n * rows >= 256 * warps]


PROGRAMS = (264, 528, 1056, 2112)


def compile_share(tokens: list[int], share: int, of: int) -> None:
    """Compile every of-th candidate by running it once, on a small layer."""
    product = products(4096, 4096)[0]
    for m in tokens:
        x = torch.randn(m, 4096, device="cuda", dtype=torch.float16)
        for config in candidates(m)[share::of]:
            for programs in (1, 2112):  # alone and sharing output tiles
                triton_configs.config_for = lambda *_, c=config, p=programs: c._replace(programs=p)
                product(x)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tokens", default="1,16,32,64")
    parser.add_argument("--workers", type=int, default=8)
    parser.add_argument("--share", type=int, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    tokens = [int(each) for each in arguments.tokens.split(",")]
    if arguments.share is not None:
        return compile_share(tokens, arguments.share, arguments.workers)
    command = [sys.executable, __file__, "--tokens", arguments.tokens, "--workers", str(arguments.workers), "--share"]
    for process in [subprocess.Popen([*command, str(share)]) for share in range(arguments.workers)]:
        process.wait()
    for m in tokens:
        found: dict[Config, list[float]] = {}
        for K, N in bench.SHAPES:
            calls = products(K, N)
            x = torch.randn(m, K, device="cuda", dtype=torch.float16)
            for config, programs in itertools.product(candidates(m), PROGRAMS):
                chosen = config._replace(programs=programs)
                triton_configs.config_for = lambda *_, c=chosen: c
                found.setdefault(chosen, []).append(bench.microseconds([partial(p, x) for p in calls], GPU))
        mean = {config: math.exp(sum(map(math.log, times)) / len(times)) for config, times in found.items()}
        best = [min(times[i] for times in found.values()) for i in range(len(bench.SHAPES))]
        print(f"m = {m}: best each {[round(t, 1) for t in best]}")
        for config in sorted(mean, key=lambda c: mean[c])[:4]:
            print(f"  {config}: {[round(t, 1) for t in found[config]]}", flush=True)


if __name__ == "__main__":
    main()
