"""Tokens per second of greedy generation on a CPU: transformers with float weights, qcore, and llama.cpp, one after the other in one run.

    python benchmarks/generation_cpu.py OUT [--threads 2] [--new-tokens 128] [--llamacpp VENV/bin/python --gguf FILE.gguf]

OUT is a quantized folder. --llamacpp: a Python with xllamacpp, for benchmarks/peers/run_llamacpp_speed.py. Rows without `fast` are
transformers' own loop. The fastest of --repeat runs counts, the prompt's time included for qcore and transformers.
"""

from __future__ import annotations

import argparse
import json
import subprocess
from functools import partial
from pathlib import Path
from typing import Any

import torch

from qcore import load
from qcore.tools import bench


def openers(folder: str, rows: str) -> list[tuple[str, Any]]:
    """What is compared, in the order of `rows`."""
    float32, bfloat16 = torch.float32, torch.bfloat16
    known = {
        "fp32": ("float32 weights", partial(load, folder, backend=bench.FloatBackend(float32), dtype=float32)),
        "bf16": ("bfloat16 weights", partial(load, folder, backend=bench.FloatBackend(bfloat16), dtype=bfloat16)),
        "eager": ("qcore", partial(load, folder, dtype=float32)),
        "fast-fp32-weights": ("float32 weights, fast", partial(load, folder, backend=bench.FloatBackend(float32), dtype=float32, fast=True)),
        "fast": ("qcore, fast", partial(load, folder, dtype=float32, fast=True)),
        "fast-bf16": ("qcore, fast, bfloat16", partial(load, folder, dtype=bfloat16, fast=True)),
    }  # fmt: skip
    return [known[row] for row in rows.split(",")]


def llamacpp(options: argparse.Namespace) -> dict[str, float]:
    """What run_llamacpp_speed.py finds with the same settings."""
    command = [options.llamacpp, str(Path(__file__).parent / "peers/run_llamacpp_speed.py"), str(options.gguf)]
    for name in ("new-tokens", "prompt-tokens", "threads", "repeat"):
        command += [f"--{name}", str(getattr(options, name.replace("-", "_")))]
    done = subprocess.run(command, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True, check=True)
    found: dict[str, float] = json.loads(done.stdout.splitlines()[-1])
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder")
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--new-tokens", type=int, default=128)
    parser.add_argument("--prompt-tokens", type=int, default=16)
    parser.add_argument("--repeat", type=int, default=3)
    parser.add_argument("--rows", default="fp32,bf16,eager,fast,fast-bf16")
    parser.add_argument("--llamacpp", metavar="PYTHON")
    parser.add_argument("--gguf", type=Path, help="llama.cpp's file of the model")
    parser.add_argument("--json", type=Path, help="write the figures here too")
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    print(
        f"{options.threads} threads, {options.new_tokens} tokens after {options.prompt_tokens}, torch {torch.__version__}"
    )
    print(f"{'':28}{'tokens/s':>10}{'first token, ms':>18}{'loaded in, s':>14}")
    found: dict[str, Any] = {}
    settings = {"new_tokens": options.new_tokens, "prompt_tokens": options.prompt_tokens, "repeat": options.repeat}
    for speed in bench.generation(openers(options.folder, options.rows), **settings):
        found[speed.model] = vars(speed)
        numbers = f"{speed.tokens_per_second:>10.1f}{speed.first_token_seconds * 1e3:>18.1f}{speed.load_seconds:>14.2f}"
        print(f"{speed.model:28}{numbers}", flush=True)
    if options.llamacpp:
        peer = found["llama.cpp"] = llamacpp(options)
        print(
            f"{'llama.cpp, ' + options.gguf.name[-16:]:28}{peer['tokens_per_second']:>10.1f}{peer['first_token_ms']:>18.1f}"
        )
    if options.json:
        options.json.write_text(
            json.dumps({"threads": options.threads, "torch": torch.__version__, "rows": found}, indent=1)
        )


if __name__ == "__main__":
    main()
