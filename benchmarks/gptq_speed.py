"""Seconds a block, peak memory and where the time goes: GPTQ from folder to folder on Llama-shaped blocks of random weights.

    python benchmarks/gptq_speed.py                                   # Llama-2-7B, 4 blocks, 128 x 2048 tokens, 4 bits, group 128
    python benchmarks/gptq_speed.py --shape 70b --blocks 4 --samples 64
    python benchmarks/gptq_speed.py --parts --kernels 20              # two more runs: each part waited for; the GPU's kernels
    python benchmarks/gptq_speed.py max_memory=4GiB --then max_memory=6GiB   # another run of the same model
    python benchmarks/gptq_speed.py --device cpu --shape tiny --samples 8 --seqlen 64 true_sequential=false

A block's time runs from the moment its weights are fetched to the moment the next block's are. `--parts` makes the GPU finish
each part before the next begins, so that its sum is above the time of an ordinary run; what is on the background thread
(packing, writing) stands apart. `--kernels` says how long the GPU had nothing to do in the blocks after the first: neither a
kernel nor a copy ran. Further arguments are options of qcore.quantize.
"""

from __future__ import annotations

import argparse
import json
import shutil
import tempfile
import time
from collections import defaultdict
from collections.abc import Callable, Sequence
from itertools import pairwise
from pathlib import Path
from typing import Any

import torch
from qcore_plugins.algorithms import gptq
from transformers import LlamaConfig, LlamaForCausalLM

import qcore
from qcore import blocks, ranks, run, streaming
from qcore.cli import parse_options
from qcore.journal import Journal
from qcore.tools.probe import _peak, _reset_peaks
from qcore.weight import QuantizedWeight

#: hidden, intermediate, heads, key-value heads
SHAPES = {"7b": (4096, 11008, 32, 32), "70b": (8192, 28672, 64, 8), "tiny": (256, 512, 4, 2)}


def make_model(folder: Path, shape: str, depth: int, device: torch.device, seqlen: int) -> float:
    """Save a model of `depth` random blocks; return the GiB of one."""
    hidden, intermediate, heads, kv_heads = SHAPES[shape]
    torch.manual_seed(0)
    config = LlamaConfig(hidden_size=hidden, intermediate_size=intermediate, num_hidden_layers=depth, num_attention_heads=heads,
                         num_key_value_heads=kv_heads, vocab_size=32000, max_position_embeddings=seqlen, dtype="float16")  # fmt: skip
    with torch.device(device):
        made = LlamaForCausalLM(config).half()
    made.save_pretrained(folder, max_shard_size="2GB")
    return sum(2 * p.numel() for p in made.model.layers[0].parameters()) / 2**30


class Watch:
    """When each block's weights are fetched, and the seconds of parts: of each call without those it calls in turn."""

    def __init__(self, device: torch.device, parts: bool) -> None:
        self.device, self.parts = device, parts
        self.fetched: list[float] = []
        self.seconds: dict[str, float] = defaultdict(float)
        self._inner: list[float] = []

    def now(self) -> float:
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)
        return time.perf_counter()

    def install(self) -> Callable[[], None]:
        """Wrap what is timed; return what undoes it."""
        kept = [(owner, name, getattr(owner, name)) for owner, name, _ in TIMED] + [(run, "_block_at", run._block_at)]

        def block_at(*inputs: Any, original: Any = run._block_at) -> Any:
            self.fetched.append(time.perf_counter())
            if self.device.type == "cuda":
                torch.cuda._sleep(1)  # a kernel by whose name `idle` finds where a block begins
            return original(*inputs)

        run._block_at = block_at
        for owner, name, part in TIMED if self.parts else TIMED[-1:]:
            timed = self.aside(getattr(owner, name), part) if part == ASIDE else self.timed(getattr(owner, name), part)
            setattr(owner, name, timed)

        def undo() -> None:
            for owner, name, value in kept:
                setattr(owner, name, value)

        return undo

    def timed(self, call: Callable[..., Any], part: str) -> Callable[..., Any]:
        def wrapped(*inputs: Any, **more: Any) -> Any:
            start = self.now()
            self._inner.append(0.0)
            try:
                return call(*inputs, **more)
            finally:
                spent = self.now() - start
                self.seconds[part] += spent - self._inner.pop()
                if self._inner:
                    self._inner[-1] += spent

        return wrapped

    def aside(self, call: Callable[..., Any], part: str) -> Callable[..., Any]:
        def wrapped(*inputs: Any, **more: Any) -> Any:
            start = time.perf_counter()
            try:
                return call(*inputs, **more)
            finally:
                self.seconds[part] += time.perf_counter() - start

        return wrapped


ASIDE = "pack and write (background)"
TIMED = [
    (blocks.Block, "forward", "forward"),
    (gptq.Hessian, "add", "Hessians"),
    (gptq.Hessian, "finish", "Hessians"),
    (gptq, "try_factor", "factorization"),
    (gptq, "solve_with", "solve"),
    (gptq, "relative_error", "error of the report"),
    (QuantizedWeight, "dequantize", "dequantize"),
    (streaming.FolderWeights, "bring", "fetch weights"),
    (blocks.Block, "observe", "walk"),
    (blocks.Block, "advance", "walk"),
    (run, "_quantize", "quantize, the rest"),
    *((ranks.Ranks, name, "communication") for name in ("sum", "send", "gather")),
    (Journal, "write_block", ASIDE),
]


def once(folder: Path, arguments: argparse.Namespace, options: Sequence[str], parts: bool = False) -> dict[str, Any]:
    """Quantize the folder and return figures."""
    device = torch.device(arguments.device)
    generator = torch.Generator().manual_seed(0)
    tokens = list(torch.randint(0, 32000, (arguments.samples, arguments.seqlen), generator=generator))
    watch, output = Watch(device, parts), folder.with_name("out")
    shutil.rmtree(output, ignore_errors=True)
    if device.type == "cuda":
        torch.cuda.empty_cache()
    _reset_peaks(device)
    undo, start = watch.install(), watch.now()
    try:
        qcore.quantize(folder, "gptq", bits=arguments.bits, group_size=128, calibration=tokens, samples=arguments.samples,
                       seqlen=arguments.seqlen, device=device, output=output, fresh=True, **parse_options(tuple(options)))  # fmt: skip
    finally:
        undo()
    whole = watch.now() - start
    steps = [round(b - a, 3) for a, b in pairwise(watch.fetched)]
    found: dict[str, Any] = {
        "whole s": round(whole, 2),
        "until block 0": round(watch.fetched[0] - start, 2),
        "block s": steps,
    }
    found["host peak GiB"] = round(_peak() / 2**30, 2)
    if device.type == "cuda":
        found["peak GiB"] = round(torch.cuda.max_memory_allocated(device) / 2**30, 2)
        found["reserved GiB"] = round(torch.cuda.max_memory_reserved(device) / 2**30, 2)
    found["parts s a block"] = {part: round(s / arguments.blocks, 4) for part, s in watch.seconds.items()}
    return found


def kernels(folder: Path, arguments: argparse.Namespace) -> list[str]:
    """The GPU's busiest kernels over a run, and how long it had nothing to do."""
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA]) as profile:
        found = once(folder, arguments, arguments.options)
    rows = sorted(profile.key_averages(), key=lambda row: -row.self_device_time_total)
    lines = [f"{idle(profile):.4f} s a block without work, blocks {found['block s']}"]
    return lines + [f"{row.self_device_time_total / 1e3 / arguments.blocks:9.2f} ms a block {row.count:6} x {row.key[:110]}"
                    for row in rows[: arguments.kernels]]  # fmt: skip


def idle(profile: torch.profiler.profile) -> float:
    """Seconds a block, the first left out, in which the GPU ran nothing."""
    on_gpu = [event for event in profile.events() if event.device_type == torch.autograd.DeviceType.CUDA]
    ranges = sorted((event.time_range.start, event.time_range.end, event.name) for event in on_gpu)
    begins = [start for start, _, name in ranges if "spin_kernel" in name][1:]
    free, until = 0.0, begins[0]
    for start, end, _ in ranges:
        if begins[0] <= start < begins[-1]:
            free += max(0.0, start - until)
            until = max(until, end)
    return free / 1e6 / (len(begins) - 1)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--shape", choices=SHAPES, default="7b")
    parser.add_argument("--blocks", type=int, default=4)
    parser.add_argument("--samples", type=int, default=128)
    parser.add_argument("--seqlen", type=int, default=2048)
    parser.add_argument("--bits", type=int, default=4)
    parser.add_argument("--parts", action="store_true")
    parser.add_argument("--kernels", type=int, default=0)
    parser.add_argument("--scratch", type=Path, help="where the models go")
    parser.add_argument("--then", action="append", default=[], help="options of one more run, in one string")
    parser.add_argument("options", nargs="*", help="of qcore.quantize: name=value")
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory(dir=arguments.scratch) as scratch:
        folder = Path(scratch) / "model"
        size = make_model(folder, arguments.shape, arguments.blocks, torch.device(arguments.device), arguments.seqlen)
        print(f"{arguments.shape}: {arguments.blocks} blocks of {size:.2f} GiB", flush=True)
        for options in (arguments.options, *(each.split() for each in arguments.then)):
            print(*options, json.dumps(once(folder, arguments, options)), flush=True)
        if arguments.parts:
            print(json.dumps(once(folder, arguments, arguments.options, parts=True)), flush=True)
        if arguments.kernels:
            print("\n".join(kernels(folder, arguments)), flush=True)


if __name__ == "__main__":
    main()
