"""Products of one linear on a GPU: fp16 torch.matmul, torch's tinygemm (bf16) and qcore's backends, µs, 4 bits, group 128.

    python benchmarks/matmul.py [--json FILE] [--tokens 1,2,4] [--shapes 4096x4096] [--backends cuda,triton]

Each figure is the time of one product in a CUDA graph that goes through so many copies of the weight that none is still in
the L2 cache, the median of several replays: what a decoding model pays, without Python. Shapes are K x N. A copy of 1 GiB
gives the bandwidth to compare with (a copy reads and writes; reading alone is somewhat faster).
"""

from __future__ import annotations

import argparse
import json
import statistics
from collections.abc import Callable
from functools import partial
from pathlib import Path

import torch
from torch import Tensor

from qcore import MatmulSpec, QuantConfig
from qcore.plugins import installed
from qcore.testing import random_weight

SHAPES = "4096x4096,4096x11008,11008x4096,8192x28672"
TOKENS = "1,2,4,8,16,32,64,128,256,1024"
ROTATED = 300e6  # bytes of weights that a graph goes through; the L2 cache of an H200 has 50 MB
TINYGEMM_MAX = 64  # tokens; beyond, it takes milliseconds
REPLAYS = 9

Product = Callable[[Tensor], Tensor]  # x [m, K] -> [m, N]


def microseconds(calls: list[Callable[[], object]]) -> float:
    """Median time of one of these calls when a graph makes them all, in turn."""
    calls[0]()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        for call in calls:
            call()
    graph.replay()
    times = []
    for _ in range(REPLAYS):
        start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        start.record()
        graph.replay()
        end.record()
        torch.cuda.synchronize()
        times.append(start.elapsed_time(end) * 1e3 / len(calls))
    return statistics.median(times)


def copies(nbytes: float) -> int:
    return int(min(48, max(4, ROTATED // nbytes)))


def fp16(K: int, N: int) -> list[Product]:
    weights = [torch.randn(N, K, device="cuda", dtype=torch.float16) * 0.02 for _ in range(copies(2 * K * N))]
    return [lambda x, W=W: torch.matmul(x, W.t()) for W in weights]


def tinygemm(K: int, N: int) -> list[Product]:
    products = []
    for _ in range(copies(K * N / 2)):
        codes = torch.randint(0, 256, (N, K // 2), dtype=torch.uint8, device="cuda")
        packed = torch._convert_weight_to_int4pack(codes, 8)
        meta = torch.randn(K // 128, N, 2, device="cuda", dtype=torch.bfloat16)
        products.append(lambda x, p=packed, s=meta: torch._weight_int4pack_mm(x, p, 128, s))
    return products


def packed(name: str, K: int, N: int) -> list[Product]:
    """A backend as a QuantLinear calls it; one weight is packed, the others are copies of its buffers."""
    backend = installed().get("backend", name)
    config = QuantConfig(bits=4, group_size=128)
    spec = MatmulSpec(config, K, N, False, torch.float16, torch.device("cuda"))
    if reason := backend.unavailable() or backend.why_not(spec):
        raise SystemExit(f"{name}: {reason}")
    first = backend.prepare(random_weight(N, K, config), spec)
    held = [first] + [{name: t.clone() for name, t in first.items()} for _ in range(copies(K * N / 2) - 1)]
    return [lambda x, b=b: backend.matmul(x, b, spec) for b in held]


KINDS = {"fp16": (fp16, torch.float16, 1 << 30), "tinygemm": (tinygemm, torch.bfloat16, TINYGEMM_MAX)}


def check(product: Product, K: int, m: int) -> None:
    """The same input twice gives the same bits, and all of them are numbers: a benchmark of a broken kernel is none."""
    x = torch.randn(m, K, device="cuda", dtype=torch.float16)
    first = product(x)
    if not (torch.equal(first, product(x)) and bool(first.isfinite().all())):
        raise SystemExit(f"it is not repeatable or not finite at K={K}, m={m}")


def copy_bandwidth() -> float:
    """Bytes read and written per second, in TB/s."""
    source = torch.empty(1 << 30, dtype=torch.uint8, device="cuda").random_()
    target = torch.empty_like(source)
    return 2 * source.numel() / microseconds([lambda: target.copy_(source)] * 3) / 1e6


@torch.inference_mode()
def measure(
    shapes: list[tuple[int, int]], tokens: list[int], backends: list[str]
) -> dict[str, dict[str, list[float | None]]]:
    """shape -> kind -> one figure per number of tokens."""
    found: dict[str, dict[str, list[float | None]]] = {}
    for K, N in shapes:
        row = found[f"{K}x{N}"] = {}
        kinds = KINDS | {name: (partial(packed, name), torch.float16, 1 << 30) for name in backends}
        for kind, (make, dtype, most) in kinds.items():
            products = make(K, N)
            row[kind] = []
            for m in tokens:
                if m > most:
                    row[kind].append(None)
                    continue
                if kind in backends:
                    check(products[0], K, m)
                x = torch.randn(m, K, device="cuda", dtype=dtype)
                calls = [lambda p=p, x=x: p(x) for p in products] * max(1, 40 // len(products))
                row[kind].append(microseconds(calls))
            print(
                f"{K}x{N:<6} {kind:9}" + "".join(f"{'-' if t is None else format(t, '.1f'):>8}" for t in row[kind]),
                flush=True,
            )
            del products
            torch.cuda.empty_cache()
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shapes", default=SHAPES, help="K x N, separated by commas")
    parser.add_argument("--tokens", default=TOKENS, help="numbers of rows of x")
    parser.add_argument("--backends", default="cuda,triton")
    parser.add_argument("--json", type=Path, help="write the figures here too")
    arguments = parser.parse_args()
    shapes = [tuple(map(int, each.split("x"))) for each in arguments.shapes.split(",")]
    tokens = [int(each) for each in arguments.tokens.split(",")]
    facts = {"gpu": torch.cuda.get_device_name(), "torch": torch.__version__, "copy_TB_per_s": copy_bandwidth()}
    print(f"{facts['gpu']}, torch {facts['torch']}, copies at {facts['copy_TB_per_s']:.2f} TB/s; µs for m =")
    print(" " * 21 + "".join(f"{m:>8}" for m in tokens))
    found = measure(shapes, tokens, arguments.backends.split(","))
    if arguments.json:
        arguments.json.write_text(json.dumps({**facts, "tokens": tokens, "microseconds": found}, indent=1))


if __name__ == "__main__":
    main()
