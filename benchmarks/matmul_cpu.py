"""Products of one linear on a CPU: qcore's kernels, torch's columns and llama.cpp's kernels in one run, milliseconds.

    python benchmarks/matmul_cpu.py [--shape 4096x11008] [--tokens 1,2,4] [--threads 2] [--llamacpp VENV/bin/python] [--json FILE]

Weights are rotated through --copies, so that none is still in the caches; the fastest of many runs counts. --llamacpp: a Python with
xllamacpp, for benchmarks/peers/run_ggml.py. --cpu-time measures CPU time of one thread instead of wall time of --threads: what to
read on a machine that others use too.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from qcore import MatmulSpec, QuantConfig
from qcore.plugins import installed
from qcore.testing import random_weight

GROUP = 128
Product = Callable[[Tensor], Tensor]  # x [m, K] -> [m, N]


def dense(dtype: torch.dtype, K: int, N: int, copies: int) -> list[Product]:
    weights = [(torch.randn(N, K) * 0.02).to(dtype) for _ in range(max(2, copies // 3))]
    return [lambda x, W=W: F.linear(x, W) for W in weights]


def int4pack(K: int, N: int, copies: int) -> list[Product]:
    """torch's own: bfloat16 x, a scale and a zero for each group."""
    packed = torch._convert_weight_to_int4pack_for_cpu(torch.randint(0, 16, (N, K), dtype=torch.int32), 1)
    meta = torch.randn(K // GROUP, N, 2, dtype=torch.bfloat16)
    held = [(packed.clone(), meta.clone()) for _ in range(copies)]
    return [lambda x, p=p, s=s: torch._weight_int4pack_mm_for_cpu(x, p, GROUP, s) for p, s in held]


def ours(bits: int, dtype: torch.dtype, K: int, N: int, copies: int) -> list[Product]:
    """The backend as a QuantLinear calls it."""
    backend = installed().get("backend", "cpu")
    config = QuantConfig(bits=bits, group_size=GROUP)
    spec = MatmulSpec(config, K, N, False, dtype, torch.device("cpu"))
    if reason := backend.unavailable() or backend.why_not(spec):
        raise SystemExit(f"cpu: {reason}")
    first = backend.prepare(random_weight(N, K, config), spec)
    held = [first] + [{name: t.clone() for name, t in first.items()} for _ in range(copies - 1)]
    return [lambda x, b=b: backend.matmul(x, b, spec) for b in held]


def milliseconds(products: list[Product], x: Tensor, seconds: float, clock: Callable[[], float]) -> float:
    """The fastest of the runs that fit into some seconds; a run is one product."""
    times: list[float] = []
    products[0](x)
    until = time.perf_counter() + seconds
    while time.perf_counter() < until or len(times) < 3 * len(products):
        start = clock()
        products[len(times) % len(products)](x)
        times.append(clock() - start)
    return 1e3 * min(times)


@torch.inference_mode()
def measure(arguments: argparse.Namespace) -> dict[str, list[float]]:
    """kind -> one figure per number of tokens."""
    K, N = map(int, arguments.shape.split("x"))
    clock = time.thread_time if arguments.cpu_time else time.perf_counter
    float32, bfloat16, float16 = torch.float32, torch.bfloat16, torch.float16
    kinds: dict[str, tuple[torch.dtype, Callable[[], list[Product]]]] = {
        "torch float32": (float32, lambda: dense(float32, K, N, arguments.copies)),
        "torch bfloat16": (bfloat16, lambda: dense(bfloat16, K, N, arguments.copies)),
        "torch float16": (float16, lambda: dense(float16, K, N, arguments.copies)),
        "torch int4pack, bfloat16": (bfloat16, lambda: int4pack(K, N, arguments.copies)),
    }
    for bits in map(int, arguments.bits.split(",")):
        for dtype in (float32, bfloat16, float16):
            kinds[f"cpu {bits} bits, {str(dtype).removeprefix('torch.')}"] = (
                dtype,
                lambda bits=bits, dtype=dtype: ours(bits, dtype, K, N, arguments.copies),
            )
    found = {}
    for kind, (dtype, make) in kinds.items():
        products = make()
        found[kind] = [
            milliseconds(products, torch.randn(int(m), K).to(dtype), arguments.seconds, clock)
            for m in arguments.tokens.split(",")
        ]
        show(kind, found[kind])
    return found


def llamacpp(arguments: argparse.Namespace) -> dict[str, Any]:
    """What run_ggml.py finds with the same settings."""
    command = [arguments.llamacpp, str(Path(__file__).parent / "peers/run_ggml.py")]
    for name in ("shape", "tokens", "threads", "copies", "seconds"):
        command += [f"--{name}", str(getattr(arguments, name))]
    done = subprocess.run(
        [*command, *(["--cpu-time"] if arguments.cpu_time else [])], capture_output=True, text=True, check=True
    )
    found: dict[str, Any] = json.loads(done.stdout)
    for kind, row in found.items():
        show(f"llama.cpp {kind} ({row['megabytes']:.1f} MB)", row["milliseconds"])
    return found


def show(kind: str, times: list[float]) -> None:
    print(f"{kind:36}" + "".join(f"{each:>9.2f}" for each in times), flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shape", default="4096x11008", help="K x N")
    parser.add_argument("--tokens", default="1,2,4,8,16,32,64,128", help="numbers of rows of x")
    parser.add_argument("--bits", default="4")
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--copies", type=int, default=6)
    parser.add_argument("--seconds", type=float, default=1.0, help="for each figure")
    parser.add_argument("--cpu-time", action="store_true", help="CPU time of one thread")
    parser.add_argument("--llamacpp", metavar="PYTHON")
    parser.add_argument("--json", type=Path, help="write the figures here too")
    arguments = parser.parse_args()
    arguments.threads = 1 if arguments.cpu_time else arguments.threads
    torch.set_num_threads(arguments.threads)
    clock = "CPU time" if arguments.cpu_time else "wall time"
    print(f"{arguments.shape}, {arguments.threads} threads, {clock} in ms, torch {torch.__version__}; tokens =")
    print(" " * 36 + "".join(f"{m:>9}" for m in arguments.tokens.split(",")))
    found: dict[str, Any] = dict(measure(arguments))
    if arguments.llamacpp:
        found["llama.cpp"] = llamacpp(arguments)
    if arguments.json:
        arguments.json.write_text(
            json.dumps({**vars(arguments), "json": str(arguments.json), "milliseconds": found}, indent=1)
        )


if __name__ == "__main__":
    main()
