"""Tokens per second of greedy generation: quantized folders beside the float model, with 1 and 4 beams.

    python benchmarks/generation_speed.py OUT [OUT2 …] --float MODEL [--new-tokens 512] [--num-beams 1 4]
    python benchmarks/generation_speed.py OUT --float MODEL --device-map auto      # spread over all GPUs

Every model generates exactly --new-tokens tokens from a prompt of --prompt-tokens, batch 1, twice: once to warm up (2 tokens) and
--repeat times by the clock, of which the fastest counts. The float model is computed in --dtype (float16 on a GPU).
"""

from __future__ import annotations

import argparse
import gc
from collections.abc import Callable
from typing import Any

import torch

import qcore
from qcore.api import open_any, pick_device
from qcore.checkpoint import resolve_model
from qcore.plugins import installed
from qcore.tools.reporting import tokens_per_second


def open_float(model: str, options: argparse.Namespace) -> Any:
    """The float model in the wanted dtype, on one device or spread."""
    if options.device_map is None:
        network, _ = open_any(model, options.device)
        return network if options.dtype is None else network.to(getattr(torch, options.dtype))
    from transformers import AutoModelForCausalLM

    folder = resolve_model(model, installed())
    dtype = getattr(torch, options.dtype or "float16")
    return AutoModelForCausalLM.from_pretrained(folder, dtype=dtype, device_map=options.device_map).eval()


def open_quantized(folder: str, options: argparse.Namespace) -> Any:
    """A quantized folder on one device or spread, with the backend asked for."""
    dtype = getattr(torch, options.dtype) if options.dtype else None
    settings = {"backend": options.backend, "device": options.device, "dtype": dtype}
    return qcore.load(folder, device_map=options.device_map, **settings)


def report(name: str, open_model: Callable[[], Any], options: argparse.Namespace) -> None:
    """One line: the model, and tokens/s for each number of beams."""
    model = open_model()
    cells = []
    for beams in options.num_beams:
        runs = [
            tokens_per_second(model, options.new_tokens, options.prompt_tokens, beams) for _ in range(options.repeat)
        ]
        cells.append(f"{max(runs):14.1f}")
    print(f"{name:40}{''.join(cells)}", flush=True)
    del model
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folders", nargs="*", help="quantized folders")
    parser.add_argument("--float", dest="float_model", metavar="MODEL")
    parser.add_argument("--new-tokens", "--max_new_tokens", type=int, default=512)
    parser.add_argument("--prompt-tokens", type=int, default=16)
    parser.add_argument("--num-beams", "--num_beams", type=int, nargs="+", default=[1, 4])
    parser.add_argument("--repeat", type=int, default=1)
    parser.add_argument("--backend", default="auto")
    parser.add_argument("--device", default="auto")
    parser.add_argument("--device-map", help="auto spreads over all GPUs")
    parser.add_argument("--dtype", help="of activations: float16, bfloat16, float32; by default the model's own")
    options = parser.parse_args()
    place = pick_device(options.device)
    where = f"{torch.cuda.device_count()} x {torch.cuda.get_device_name()}" if place.type == "cuda" else "CPU"
    print(f"{where}, {options.new_tokens} new tokens, batch 1, tokens/s by number of beams (b)")
    print(f"{'':40}{''.join(f'{beams:>12} b' for beams in options.num_beams)}")
    if options.float_model:
        report(f"{options.float_model} (float)", lambda: open_float(options.float_model, options), options)
    for folder in options.folders:
        report(folder, lambda folder=folder: open_quantized(folder, options), options)


if __name__ == "__main__":
    main()
