"""Saving, converting and reading in MB/s beside plain safetensors of the same bytes, in one run.

    python benchmarks/saving.py [--layers 32] [--rounds 3]

The model is a stack of 4096 x 11008 linears at 4 bits, group 128, drawn at random. MB are those of the folder written. Every writer
flushes to disk. `save` packs, and `save` and `convert` prove every linear from the file; the plain writer writes what is packed.
`file read` is the folder's bytes from the page cache, `load` their codes, scales and zero points. Rounds of the plain
writer and of ours alternate, since other programs may be at work; the best round of each counts. CPU is seconds of all threads for a GB.
"""

from __future__ import annotations

import argparse
import shutil
import tempfile
from collections.abc import Callable
from pathlib import Path

import torch
from measuring import Clock
from safetensors.torch import load_file, save_file

import qcore
from qcore import Content, LayerSpec, QuantConfig
from qcore.files import complete_folder, sync
from qcore.plugins import installed
from qcore.testing import random_weight

FORMATS = ("gptq", "awq", "autoround", "compressed-tensors", "gguf")
CONFIG = {
    "model_type": "llama", "hidden_size": 4096, "intermediate_size": 11008, "num_attention_heads": 32, "vocab_size": 32000,
    "max_position_embeddings": 4096, "rms_norm_eps": 1e-5, "dtype": "float16",
}  # fmt: skip


def content_of(layers: int) -> Content:
    """A model in memory; eight weights in turn, so that it takes less of it."""
    config = QuantConfig(bits=4, group_size=128)
    drawn = [random_weight(4096, 11008, config, seed=seed) for seed in range(min(8, layers))]
    packed = {f"model.layers.{n}.mlp.down_proj": drawn[n % len(drawn)] for n in range(layers)}
    specs = {name: LayerSpec(name, config, 11008, 4096) for name in packed}
    return Content({**CONFIG, "num_hidden_layers": layers}, specs, packed.__getitem__, (), {}.__getitem__)


def best(works: dict[str, Callable[[], object]], rounds: int) -> dict[str, tuple[float, float]]:
    """The least wall and CPU seconds of each piece of work, in turns."""
    found: dict[str, list[Clock]] = {name: [] for name in works}
    for _ in range(rounds):
        for name, work in works.items():
            with Clock() as meter:
                work()
            found[name].append(meter)
    return {name: (min(m.wall for m in meters), min(m.cpu for m in meters)) for name, meters in found.items()}


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--layers", type=int, default=32)
    parser.add_argument("--rounds", type=int, default=3)
    args = parser.parse_args()
    content = content_of(args.layers)
    print(f"{'format':20}{'MB':>6}  MB/s:{'plain':>7}{'save':>7}{'convert':>9}{'file read':>11}{'load':>7}"
          f"   save/plain  convert/plain   CPU-s per GB:{'plain':>7}{'save':>7}{'convert':>9}{'load':>7}")  # fmt: skip
    with tempfile.TemporaryDirectory() as scratch:
        home = Path(scratch)

        def save(name: str) -> None:
            shutil.rmtree(home / name, ignore_errors=True)
            with complete_folder(home / name) as draft:
                installed().get("format", name).save(content, draft)

        def convert(name: str) -> None:
            shutil.rmtree(home / "out", ignore_errors=True)
            qcore.convert(home / ("gptq" if name != "gptq" else "awq"), home / "out", name)

        def read(name: str) -> None:
            opened = installed().get("format", name).open(home / name)
            for layer in opened.layers:
                opened.weight(layer)

        for name in FORMATS[:2]:
            save(name)
        for name in FORMATS:
            save(name)
            file = max((home / name).iterdir(), key=lambda file: file.stat().st_size)
            size = file.stat().st_size / 1e6
            stored = (
                load_file(file)
                if file.suffix == ".safetensors"
                else {"bytes": torch.from_file(str(file), size=file.stat().st_size, dtype=torch.uint8)}
            )
            tensors = {key: tensor.clone() for key, tensor in stored.items()}  # saving takes the file away

            def plain(tensors=tensors) -> None:
                save_file(tensors, home / "plain.safetensors")
                sync(home / "plain.safetensors")

            found = best({
                "plain": plain, "save": lambda name=name: save(name), "convert": lambda name=name: convert(name),
                "file": lambda file=file: file.read_bytes(), "load": lambda name=name: read(name),
            }, args.rounds)  # fmt: skip
            speed = {work: size / wall for work, (wall, _) in found.items()}
            cpu = {work: seconds / size * 1000 for work, (_, seconds) in found.items()}
            print(f"{name:20}{size:6.0f}       {speed['plain']:7.0f}{speed['save']:7.0f}{speed['convert']:9.0f}{speed['file']:11.0f}{speed['load']:7.0f}"
                  f"   {speed['save'] / speed['plain']:10.2f}  {speed['convert'] / speed['plain']:13.2f}"
                  f"                 {cpu['plain']:7.2f}{cpu['save']:7.2f}{cpu['convert']:9.2f}{cpu['load']:7.2f}", flush=True)  # fmt: skip


if __name__ == "__main__":
    main()
