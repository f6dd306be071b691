"""Seconds a block and peak GPU memory of AutoRound, on Llama-2-7B-shaped blocks with random weights.

    python benchmarks/autoround_speed.py                            # 2 blocks, 200 iterations, batch 8, 128 x 2048 tokens
    python benchmarks/autoround_speed.py low_gpu_mem_usage=true     # further options of the algorithm
    python benchmarks/autoround_speed.py --device cpu --hidden 256 --samples 8 --seqlen 64 iters=4

Each block's time is all in: its start, tuning, and sending both streams on. The first includes compiling and, apart from that, is
counted from the capture of its inputs.
"""

from __future__ import annotations

import argparse
import time
from typing import Any

import torch

import qcore
from qcore.cli import parse_options
from qcore.plugins import Plugins
from qcore.testing import tiny_transformer


class Watch:
    """Notes when the run starts and when each block is done."""

    def __init__(self, device: torch.device) -> None:
        self.device, self.times = device, [0.0]

    def now(self) -> float:
        """Return the time when the device has caught up."""
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)
        return time.perf_counter()

    @qcore.hookimpl
    def qcore_run_started(self) -> None:
        self.times = [self.now()]

    @qcore.hookimpl
    def qcore_block_finished(self, index: int, records: list[dict[str, Any]]) -> None:
        self.times.append(self.now())
        loss = {record["name"].rpartition(".")[2]: record.get("loss") for record in records[-1:]}
        print(
            f"block {index}: {self.times[-1] - self.times[-2]:.2f} s {records[-1].get('note', '')} loss {loss}",
            flush=True,
        )


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
    parser.add_argument("options", nargs="*", help="of the algorithm: name=value")
    arguments = parser.parse_args()
    device = torch.device(arguments.device)
    hidden = arguments.hidden
    model = tiny_transformer(
        "llama", hidden_size=hidden, intermediate_size=round(hidden * 2.6875), num_hidden_layers=arguments.blocks,
        num_attention_heads=hidden // 128, num_key_value_heads=hidden // 128, vocab_size=4096,
        max_position_embeddings=arguments.seqlen,
    ).to(torch.float16 if device.type == "cuda" else torch.float32)  # fmt: skip
    generator = torch.Generator().manual_seed(0)
    tokens = list(torch.randint(0, 4096, (arguments.samples, arguments.seqlen), generator=generator))
    watch, plugins = Watch(device), Plugins()
    plugins.manager.register(watch)
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
    qcore.quantize(
        model, arguments.algo, bits=arguments.bits, group_size=128, calibration=tokens, samples=arguments.samples,
        seqlen=arguments.seqlen, device=device, plugins=plugins, **parse_options(tuple(arguments.options)),
    )  # fmt: skip
    if device.type == "cuda":
        print(f"peak {torch.cuda.max_memory_allocated(device) / 2**30:.2f} GiB allocated, "
              f"{torch.cuda.max_memory_reserved(device) / 2**30:.2f} GiB reserved")  # fmt: skip


if __name__ == "__main__":
    main()
