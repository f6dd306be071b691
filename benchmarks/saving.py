"""Saving, converting and reading in MB/s beside plain safetensors of the same bytes, in one run.

    python benchmarks/saving.py [--layers 8] [--rounds 3]

The model is a stack of 4096 x 11008 linears at 4 bits, group 128, drawn at random. MB are those of the folder written. Every writer
flushes to disk. `save` verifies what it wrote by reading it back; the plain writer does not.
"""

from __future__ import annotations

import argparse
import shutil
import statistics
import tempfile
import time
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file

import qcore
from qcore import Content, LayerSpec, QuantConfig
from qcore.checkpoint import _sync, complete_folder
from qcore.plugins import installed
from qcore.testing import random_weight

FORMATS = ("gptq", "awq", "autoround", "compressed-tensors")


def content_of(layers: int) -> Content:
    """A model in memory, codes packed as after quantizing; weights are unpacked when they are asked for."""
    config = QuantConfig(bits=4, group_size=128)
    packed = {f"model.layers.{n}.mlp.down_proj": random_weight(4096, 11008, config, seed=n) for n in range(layers)}
    specs = {name: LayerSpec(name, config, 11008, 4096) for name in packed}
    return Content({"model_type": "llama"}, specs, packed.__getitem__, (), {}.__getitem__)


def timed(work, rounds: int) -> float:
    """Median seconds."""
    times = []
    for _ in range(rounds):
        started = time.perf_counter()
        work()
        times.append(time.perf_counter() - started)
    return statistics.median(times)


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--layers", type=int, default=8)
    parser.add_argument("--rounds", type=int, default=3)
    args = parser.parse_args()
    content = content_of(args.layers)
    with tempfile.TemporaryDirectory() as scratch:
        home = Path(scratch)

        def save(name: str) -> None:
            shutil.rmtree(home / name, ignore_errors=True)
            with complete_folder(home / name) as draft:
                installed().get("format", name).save(content, draft)

        def convert(name: str) -> None:
            shutil.rmtree(home / "out", ignore_errors=True)
            qcore.convert(home / "gptq" if name != "gptq" else home / "awq", home / "out", name)

        def plain(tensors: dict[str, torch.Tensor]) -> None:
            save_file(tensors, home / "plain.safetensors")
            _sync(home / "plain.safetensors")

        def read(name: str) -> None:
            opened = installed().get("format", name).open(home / name)
            for layer in opened.layers:
                opened.weight(layer)

        print(f"{'format':20}{'MB':>7}{'plain':>8}{'save':>8}{'convert':>9}{'file read':>11}{'load':>8}   MB/s")
        rows = {name: timed(lambda name=name: save(name), args.rounds) for name in FORMATS}
        for name, saving in rows.items():
            file = home / name / "model.safetensors"
            size = file.stat().st_size / 1e6
            tensors = load_file(file)
            figures = [
                size / timed(lambda tensors=tensors: plain(tensors), args.rounds),
                size / saving,
                size / timed(lambda name=name: convert(name), args.rounds),
                size / timed(lambda file=file: file.read_bytes(), args.rounds),
                size / timed(lambda name=name: read(name), args.rounds),
            ]
            print(
                f"{name:20}{size:7.0f}{figures[0]:8.0f}{figures[1]:8.0f}{figures[2]:9.0f}{figures[3]:11.0f}{figures[4]:8.0f}"
            )


if __name__ == "__main__":
    main()
