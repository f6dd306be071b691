"""Tokens per second of greedy generation: quantized folders beside the float model, by 1 and 4 beams.

    python benchmarks/generation_speed.py OUT [OUT2 …] --reference fp16 [--new-tokens 512] [--num-beams 1 4]
    python benchmarks/generation_speed.py OUT --reference MODEL --device-map auto     # spread over all GPUs
    python benchmarks/generation_speed.py --shape llama-2-7b --bits 4 --reference fp16  # random weights, nothing to load

`qcore bench generate` for several models, or for a shape alone: every model generates exactly --new-tokens tokens after
--prompt-tokens, batch 1, once to warm up and --repeat times by the clock.
"""

from __future__ import annotations

import argparse
import json
from dataclasses import asdict
from functools import partial
from pathlib import Path

import torch

from qcore import QuantConfig
from qcore.api import pick_device
from qcore.tools import bench

#: settings of transformers configs
MODEL_SHAPES = {
    "llama-2-7b": {
        "model_type": "llama", "vocab_size": 32000, "hidden_size": 4096, "intermediate_size": 11008,
        "num_hidden_layers": 32, "num_attention_heads": 32, "num_key_value_heads": 32, "max_position_embeddings": 4096,
    },
}  # fmt: skip


def shape_openers(options: argparse.Namespace) -> list:
    """What --shape compares: the reference, then the backend, either of which may be fp16, bf16 or fp32: float weights."""
    config = QuantConfig(bits=options.bits, group_size=options.group_size)
    settings = {**MODEL_SHAPES[options.shape]}
    if options.layers:
        settings["num_hidden_layers"] = options.layers
    openers = []
    for name in filter(None, (options.reference, options.backend)):
        dtype = next((each for each, short in bench.SHORT_NAMES.items() if short == name), None)
        kind = {
            "backend": bench.FloatBackend(dtype) if dtype else name,
            "dtype": dtype or getattr(torch, options.dtype or "float16"),
        }
        opener = partial(bench.random_model, settings, config, device=options.device, fast=options.fast, **kind)
        openers.append((f"{options.shape}, {name if dtype else config}", opener))
    return openers


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folders", nargs="*", help="quantized folders")
    parser.add_argument("--shape", choices=MODEL_SHAPES, help="a model of random weights in place of folders")
    parser.add_argument("--layers", type=int, help="of --shape: decoder blocks, by default the model's")
    parser.add_argument("--bits", type=int, default=4, help="of --shape")
    parser.add_argument("--group-size", type=int, default=128, help="of --shape")
    parser.add_argument(
        "--reference", "--float", help="fp16, bf16, fp32: the first model with float weights; or another float model"
    )
    parser.add_argument("--new-tokens", "--max_new_tokens", type=int, default=512)
    parser.add_argument("--prompt-tokens", type=int, default=128)
    parser.add_argument("--num-beams", "--num_beams", type=int, nargs="+", default=[1, 4])
    parser.add_argument("--repeat", type=int, default=1)
    parser.add_argument("--backend", default="auto")
    parser.add_argument("--device", default="auto")
    parser.add_argument("--device-map", help="auto spreads over all GPUs")
    parser.add_argument("--dtype", help="of activations: float16, bfloat16, float32; by default the model's own")
    parser.add_argument("--no-fast", dest="fast", action="store_false", help="transformers' own loop, linear by linear")
    parser.add_argument("--json", type=Path, help="write the figures here too")
    options = parser.parse_args()
    facts = bench.device_facts(pick_device(options.device))
    openers = shape_openers(options) if options.shape else []
    for number, folder in enumerate(options.folders):
        dtype = getattr(torch, options.dtype) if options.dtype else None
        openers += bench.openers(
            folder, None if number else options.reference, backend=options.backend, device=options.device,
            device_map=options.device_map, dtype=dtype, fast=options.fast,
        )  # fmt: skip
    print(f"{facts}, {options.new_tokens} new tokens after {options.prompt_tokens}, batch 1")
    print(" | ".join(bench.SPEED_COLUMNS))
    found = []
    for speed in bench.generation(
        openers, new_tokens=options.new_tokens, prompt_tokens=options.prompt_tokens, num_beams=options.num_beams,
        repeat=options.repeat,
    ):  # fmt: skip
        found.append(asdict(speed))
        print(" | ".join(bench.speed_cells(speed)), flush=True)
        if options.json:
            options.json.write_text(
                json.dumps({**facts, "prompt_tokens": options.prompt_tokens, "speeds": found}, indent=1)
            )


if __name__ == "__main__":
    main()
