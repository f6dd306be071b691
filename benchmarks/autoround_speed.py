"""Seconds a block, where they go, and peak GPU memory of AutoRound, on Llama-2-7B-shaped blocks with random weights.

    python benchmarks/autoround_speed.py                            # 2 blocks, 200 iterations, batch 8, 128 x 2048 tokens
    python benchmarks/autoround_speed.py low_gpu_mem_usage=true     # further options of the algorithm
    python benchmarks/autoround_speed.py --twice iters=20           # also: whether two equal runs give equal bits
    python benchmarks/autoround_speed.py --device cpu --hidden 256 --samples 8 --seqlen 64 iters=4

Each block's time is all in: bringing its weights, its start, tuning, and sending both streams on. The first includes compiling and,
apart from that, is counted from the capture of its inputs. Parts are timed with the GPU brought to a stop before and after each,
which costs next to nothing here; steps are not stopped one by one.
"""

from __future__ import annotations

import argparse
import functools
import time
from collections import defaultdict
from typing import Any

import torch

import qcore
from qcore import blocks, streaming
from qcore.cli import parse_options
from qcore.plugins import Plugins, installed
from qcore.testing import tiny_transformer


class Watch:
    """Notes when the run starts, when each block is done, and how long each part of the work took by itself."""

    def __init__(self, device: torch.device) -> None:
        self.device, self.times = device, [0.0]
        self.parts: dict[str, float] = defaultdict(float)
        self.running: list[str] = []
        self.since = 0.0

    def now(self) -> float:
        """Return the time when the device has caught up."""
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)
        return time.perf_counter()

    def switch(self) -> None:
        """Book the time since the last switch on the part that was running."""
        now = self.now()
        self.parts[self.running[-1] if self.running else "rest"] += now - self.since
        self.since = now

    def part(self, owner: Any, method: str, name: str) -> None:
        """Time a method, but not what it calls that is timed under a name of its own."""
        inside = ("targets",)  # what sends a stream on, called from there, is part of it
        original = getattr(owner, method)

        @functools.wraps(original)
        def timed(*args: Any, **kwargs: Any) -> Any:
            self.switch()
            self.running.append(self.running[-1] if self.running and self.running[-1] in inside else name)
            try:
                return original(*args, **kwargs)
            finally:
                self.switch()
                self.running.pop()

        setattr(owner, method, timed)

    @qcore.hookimpl
    def qcore_run_started(self) -> None:
        self.since = self.now()
        self.times = [self.since]

    @qcore.hookimpl
    def qcore_block_finished(self, index: int, records: list[dict[str, Any]]) -> None:
        self.switch()
        self.times.append(self.since)
        parts = ", ".join(f"{name} {seconds:.2f}" for name, seconds in self.parts.items() if seconds > 0.005)
        facts = records[-1]
        print(f"block {index}: {self.times[-1] - self.times[-2]:.2f} s ({parts}) {facts.get('note', '')}"
              f" loss {facts.get('loss_before')} -> {facts.get('loss')}", flush=True)  # fmt: skip
        self.parts.clear()


def parts() -> list[tuple[Any, str, str]]:
    """The parts of the work: whose method each is, and its name here."""
    tuning = __import__(installed().get("algorithm", "autoround").__module__, fromlist=["Tuning"])
    return [
        (streaming.ModuleWeights, "bring", "bring"),
        (blocks.Block, "float_outputs", "targets"),
        (tuning, "find_starts", "start"),
        (tuning.Tuning, "run", "steps"),
        (tuning.Tuning, "judge", "checks"),
        (tuning.Tuning, "_frozen", "freeze"),
        (tuning.AutoRound, "quantize_block", "results"),
        (blocks.Block, "replace", "send on"),
        (blocks.Block, "advance", "send on"),
    ]


def main() -> None:
    """Build the model, tune it, print times and peaks."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--blocks", type=int, default=2)
    parser.add_argument("--hidden", type=int, default=4096)
    parser.add_argument("--samples", type=int, default=128)
    parser.add_argument("--seqlen", type=int, default=2048)
    parser.add_argument("--bits", type=int, default=4)
    parser.add_argument("--algo", default="autoround")
    parser.add_argument("--twice", action="store_true", help="run a second time and compare the bits")
    parser.add_argument("options", nargs="*", help="of the algorithm: name=value")
    arguments = parser.parse_args()
    device = torch.device(arguments.device)
    hidden = arguments.hidden
    generator = torch.Generator().manual_seed(0)
    tokens = list(torch.randint(0, 4096, (arguments.samples, arguments.seqlen), generator=generator))
    watch, plugins = Watch(device), Plugins()
    plugins.manager.register(watch)
    for owner, method, name in parts():
        watch.part(owner, method, name)

    def run() -> list[torch.Tensor]:
        """Quantize a fresh model; return what its linears hold."""
        float_model = tiny_transformer(
            "llama", hidden_size=hidden, intermediate_size=round(hidden * 2.6875), num_hidden_layers=arguments.blocks,
            num_attention_heads=hidden // 128, num_key_value_heads=hidden // 128, vocab_size=4096,
            max_position_embeddings=arguments.seqlen,
        ).to(torch.float16 if device.type == "cuda" else torch.float32)  # fmt: skip
        if device.type == "cuda":
            torch.cuda.reset_peak_memory_stats(device)
        done = qcore.quantize(
            float_model, arguments.algo, bits=arguments.bits, group_size=128, calibration=tokens, samples=arguments.samples,
            seqlen=arguments.seqlen, device=device, plugins=plugins, **parse_options(tuple(arguments.options)),
        )  # fmt: skip
        if device.type == "cuda":
            print(f"peak {torch.cuda.max_memory_allocated(device) / 2**30:.2f} GiB allocated, "
                  f"{torch.cuda.max_memory_reserved(device) / 2**30:.2f} GiB reserved; "
                  f"{qcore.report(done)['facts']}", flush=True)  # fmt: skip
        return [m.weight_source().codes for m in done.modules() if hasattr(m, "weight_source")]

    first = run()
    if arguments.twice:
        same = all(torch.equal(a, b) for a, b in zip(first, run(), strict=True))
        print(f"two equal runs gave {'equal' if same else 'different'} codes")


if __name__ == "__main__":
    main()
