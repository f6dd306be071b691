"""Blocks as wide as Llama-2-70B's, quantized from disk to disk: seconds and peak memory of each, which should be the same.

    python benchmarks/streaming.py                                   # 6 blocks, rtn, no calibration, on the CPU
    python benchmarks/streaming.py --algo gptq --samples 64 --seqlen 2048 --device cuda --blocks 4
    python benchmarks/streaming.py --intermediate 8192 --blocks 12   # lighter blocks, more of them
    python benchmarks/streaming.py --sparse --blocks 80              # weights of zeros that take no room on the disk

The folder is written shard by shard, one a block, so that making it takes no more memory than a tensor. A block's peak is the
process's highest resident size (and, on a GPU, what torch had allocated) while it was worked on.
"""

from __future__ import annotations

import argparse
import json
import tempfile
import time
from pathlib import Path
from typing import Any

import torch
from transformers import LlamaConfig

import qcore
from qcore import run
from qcore.cli import parse_options
from qcore.tools.probe import _peak, _reset_peaks


def write_shard(path: Path, tensors: dict[str, tuple[int, ...]], sparse: bool) -> None:
    """Write a safetensors file of float16 tensors, drawn one by one, or all holes."""
    header: dict[str, Any] = {}
    end = 0
    for name, shape in tensors.items():
        start, end = end, end + 2 * torch.Size(shape).numel()
        header[name] = {"dtype": "F16", "shape": list(shape), "data_offsets": [start, end]}
    encoded = json.dumps(header).encode()
    encoded += b" " * (-len(encoded) % 8)
    with path.open("wb") as file:
        file.write(len(encoded).to_bytes(8, "little") + encoded)
        for shape in tensors.values():
            if not sparse or len(shape) == 1:
                drawn = (
                    torch.ones(shape)
                    if len(shape) == 1
                    else torch.empty(shape, dtype=torch.float16).uniform_(-0.02, 0.02)
                )
                file.write(drawn.half().numpy().data)
            else:
                file.seek(2 * torch.Size(shape).numel(), 1)
        file.truncate(8 + len(encoded) + end)


def make_model(folder: Path, arguments: argparse.Namespace) -> float:
    """Write a Llama of random blocks; return the GiB of its weight files."""
    hidden, inner, kv = arguments.hidden, arguments.intermediate, arguments.hidden // 8
    config = LlamaConfig(hidden_size=hidden, intermediate_size=inner, num_hidden_layers=arguments.blocks, num_attention_heads=64,
                         num_key_value_heads=8, vocab_size=1000, max_position_embeddings=4096, dtype="float16")  # fmt: skip
    config.architectures = ["LlamaForCausalLM"]
    folder.mkdir()
    config.save_pretrained(folder)
    shards = [
        {"model.embed_tokens.weight": (1000, hidden), "model.norm.weight": (hidden,), "lm_head.weight": (1000, hidden)}
    ]
    for index in range(arguments.blocks):
        sides = {"self_attn.q_proj": (hidden, hidden), "self_attn.k_proj": (kv, hidden), "self_attn.v_proj": (kv, hidden),
                 "self_attn.o_proj": (hidden, hidden), "mlp.gate_proj": (inner, hidden), "mlp.up_proj": (inner, hidden),
                 "mlp.down_proj": (hidden, inner), "input_layernorm": (hidden,), "post_attention_layernorm": (hidden,)}  # fmt: skip
        shards.append({f"model.layers.{index}.{name}.weight": shape for name, shape in sides.items()})
    weight_map = {}
    for number, tensors in enumerate(shards):
        file = f"model-{number:05d}.safetensors"
        write_shard(folder / file, tensors, arguments.sparse and number > 0)
        weight_map |= dict.fromkeys(tensors, file)
    (folder / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))
    return sum(file.stat().st_size for file in folder.glob("*.safetensors")) / 2**30


def tell(index: int, seconds: float, host: int, gpu: int) -> None:
    """Print a block's figures."""
    on_gpu = f", {gpu / 2**30:6.2f} GiB GPU" if gpu else ""
    print(f"block {index:3}: {seconds:7.1f} s, peak {host / 2**30:6.2f} GiB host{on_gpu}", flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--blocks", type=int, default=6)
    parser.add_argument("--hidden", type=int, default=8192)
    parser.add_argument("--intermediate", type=int, default=28672)
    parser.add_argument("--algo", default="rtn")
    parser.add_argument(
        "--set", dest="options", action="append", default=[], help="an option of the algorithm; rtn: grid=minmax"
    )
    parser.add_argument("--samples", type=int, default=8)
    parser.add_argument("--seqlen", type=int, default=128)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--sparse", action="store_true")
    parser.add_argument("--scratch", type=Path, help="where the models go")
    arguments = parser.parse_args()
    options = parse_options(tuple(arguments.options)) or ({"grid": "minmax"} if arguments.algo == "rtn" else {})
    place = torch.device(arguments.device)
    marks: list[tuple[float, int, int]] = []
    original = run._block_at

    def block_at(*inputs: Any) -> Any:
        gpu = torch.cuda.max_memory_allocated(place) if place.type == "cuda" else 0
        marks.append((time.perf_counter(), _peak(), gpu))
        if len(marks) > 1:
            tell(len(marks) - 2, marks[-1][0] - marks[-2][0], *marks[-1][1:])
        _reset_peaks(place)
        return original(*inputs)

    run._block_at = block_at
    with tempfile.TemporaryDirectory(dir=arguments.scratch) as scratch:
        size = make_model(Path(scratch) / "model", arguments)
        print(
            f"{arguments.blocks} blocks, {size:.2f} GiB of weights, {arguments.algo} {options} on {place}", flush=True
        )
        tokens = list(
            torch.randint(0, 1000, (arguments.samples, arguments.seqlen), generator=torch.Generator().manual_seed(0))
        )
        start = time.perf_counter()
        qcore.quantize(f"{scratch}/model", arguments.algo, calibration=tokens, samples=arguments.samples, seqlen=arguments.seqlen,
                       device=arguments.device, output=f"{scratch}/out", **options)  # fmt: skip
        whole = time.perf_counter() - start
    print(f"whole: {whole:.1f} s; peak while the output was written {_peak() / 2**30:.2f} GiB")


if __name__ == "__main__":
    main()
