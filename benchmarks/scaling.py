"""Seconds a block with 1, 2, … processes, and whether a deterministic run gives the same bytes with each number.

    python benchmarks/scaling.py                                        # Llama-2-7B shape, 3 blocks, 1 and 2 GPUs
    python benchmarks/scaling.py --processes 1 2 4 8 --blocks 4
    python benchmarks/scaling.py --device cpu --shape tiny --samples 8 --seqlen 64

Every run is one of torchrun's on this machine, from folder to folder, of a model of random weights. A block's time runs from the
moment its weights are fetched to the moment the next block's are; speed-ups are of the median block without the first, which compiles
and allocates. The variant `parts` lets GPUs finish each part before the next begins, as gptq_speed.py does.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import subprocess
import sys
import tempfile
import time
from itertools import pairwise
from pathlib import Path
from statistics import median
from typing import Any

import torch
from gptq_speed import SHAPES, Watch, make_model

import qcore
from qcore import ranks
from qcore.cli import parse_options


def work(arguments: argparse.Namespace) -> None:
    """One process of a run; the first prints the figures."""
    generator = torch.Generator().manual_seed(0)
    tokens = list(torch.randint(0, 32000, (arguments.samples, arguments.seqlen), generator=generator))
    with ranks.connect(arguments.device):
        group = ranks.Ranks()
        gpu = torch.cuda.is_available() and arguments.device != "cpu"
        watch = Watch(
            torch.device("cuda", torch.cuda.current_device()) if gpu else torch.device("cpu"), arguments.parts
        )
        watch.install()
        start = time.perf_counter()
        qcore.quantize(arguments.folder / "model", "gptq", calibration=tokens, samples=arguments.samples, seqlen=arguments.seqlen,
                       output=arguments.output, deterministic=arguments.deterministic, device=arguments.device,
                       batch_size=arguments.batch_size, **parse_options(tuple(arguments.options)))  # fmt: skip
        whole = time.perf_counter() - start
        peaks = group.gather(round(torch.cuda.max_memory_allocated() / 2**30, 2) if gpu else None)
    if group.rank == 0:
        figures: dict[str, Any] = {
            "block s": [round(b - a, 3) for a, b in pairwise(watch.fetched)],
            "until block 0": round(watch.fetched[0] - start, 2),
            "whole s": round(whole, 2),
        }
        if arguments.parts:
            figures["parts s a block"] = {part: round(s / len(watch.fetched), 4) for part, s in watch.seconds.items()}
        print("FIGURES", json.dumps({**figures, "peak GiB by rank": peaks}), flush=True)


def digest(folder: Path) -> str:
    """sha256 over a folder's files."""
    hasher = hashlib.sha256()
    for file in sorted(folder.iterdir()):
        hasher.update(file.name.encode() + hashlib.sha256(file.read_bytes()).digest())
    return hasher.hexdigest()


#: what is run with each number of processes, and options of the command
VARIANTS = {
    "as-it-is": [],
    "deterministic": ["--deterministic"],
    "not-sequential": ["--set", "true_sequential=false"],
    "parts": ["--parts"],
}


def launch(arguments: argparse.Namespace, folder: Path, processes: int, variant: str) -> dict[str, Any]:
    """Start a run of several processes and return what it printed."""
    output = folder / f"out-{processes}-{variant}"
    options = ["--folder", folder, "--output", output, *VARIANTS[variant]]
    options += ["--samples", arguments.samples, "--seqlen", arguments.seqlen, "--device", arguments.device]
    options += ["--batch-size", arguments.batch_size]
    command = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", processes, __file__, *options]
    done = subprocess.run([sys.executable, *map(str, command)], capture_output=True, text=True)
    lines = [line for line in done.stdout.splitlines() if line.startswith("FIGURES ")]
    if done.returncode or not lines:
        return {"failed": done.returncode, "said": done.stderr[-3000:]}
    return {**json.loads(lines[0].removeprefix("FIGURES ")), "digest": digest(output)[:16]}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--processes", type=int, nargs="+", default=[1, 2])
    parser.add_argument("--device", default="auto")
    parser.add_argument("--shape", choices=SHAPES, default="7b")
    parser.add_argument("--blocks", type=int, default=4)
    parser.add_argument("--variants", nargs="+", choices=VARIANTS, default=list(VARIANTS)[:3])
    parser.add_argument("--samples", type=int, default=128)
    parser.add_argument("--seqlen", type=int, default=2048)
    parser.add_argument("--batch-size", type=int, default=8)
    parser.add_argument("--scratch", type=Path, help="where the models go")
    parser.add_argument("--deterministic", action="store_true", help=argparse.SUPPRESS)
    parser.add_argument("--parts", action="store_true", help=argparse.SUPPRESS)
    parser.add_argument("--set", dest="options", action="append", default=[], help=argparse.SUPPRESS)
    parser.add_argument("--folder", type=Path, help=argparse.SUPPRESS)
    parser.add_argument("--output", type=Path, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.folder:
        work(arguments)
        return
    place = torch.device("cuda" if arguments.device == "auto" and torch.cuda.is_available() else "cpu")
    with tempfile.TemporaryDirectory(dir=arguments.scratch) as scratch:
        size = make_model(Path(scratch) / "model", arguments.shape, arguments.blocks, place, arguments.seqlen)
        if place.type == "cuda":
            torch.cuda.empty_cache()
        print(
            f"{arguments.shape}: {arguments.blocks} blocks of {size:.2f} GiB, {arguments.samples} x {arguments.seqlen} tokens",
            flush=True,
        )
        for variant in arguments.variants:
            found = {}
            for count in arguments.processes:
                found[count] = launch(arguments, Path(scratch), count, variant)
                print(json.dumps({"processes": count, "variant": variant, **found[count]}), flush=True)
            later = {
                count: median(figures["block s"][1:]) for count, figures in found.items() if figures.get("block s")
            }
            print(
                "speed-up:", {count: round(next(iter(later.values())) / s, 2) for count, s in later.items()}, flush=True
            )
            if variant == "deterministic":
                print("same bytes:", len({figures.get("digest", count) for count, figures in found.items()}) == 1)


if __name__ == "__main__":
    main()
