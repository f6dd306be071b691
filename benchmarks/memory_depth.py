"""Peak resident memory against depth: the same Llama block 6, 12 and 24 times, streamed from folder to folder.

    python benchmarks/memory_depth.py [--hidden 512] [--depths 6 12 24]
    python benchmarks/memory_depth.py --device cuda --hidden 4096 --depths 8 16 32      # and the GPU's memory

Each depth runs in a process of its own; the model's weights grow with depth, peak memory should not.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
from pathlib import Path

RUN = r"""
import re, sys, json, torch, qcore
tokens = [torch.randint(0, 1000, (256,), generator=torch.Generator().manual_seed(i)) for i in range(8)]
qcore.quantize(sys.argv[1], "gptq", bits=4, group_size=128, calibration=tokens, output=sys.argv[2], device=sys.argv[3])
# not ru_maxrss: a child begins with its parent's, which made the model
host = int(re.search(r"VmHWM:\s+(\d+)", open("/proc/self/status").read()).group(1)) / 1024
print(json.dumps([host, torch.cuda.max_memory_allocated() / 2**20 if sys.argv[3] != "cpu" else 0]))
"""


def make_model(folder: Path, depth: int, hidden: int, device: str) -> float:
    """Save a Llama of `depth` equal random blocks; return its size in MiB."""
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    config = LlamaConfig(hidden_size=hidden, intermediate_size=hidden * 11 // 4 // 128 * 128, num_hidden_layers=depth,
                         num_attention_heads=hidden // 64, num_key_value_heads=hidden // 64, vocab_size=1000,
                         dtype="float16")  # fmt: skip
    with torch.device(device):
        model = LlamaForCausalLM(config).half()
    for block in model.model.layers[1:]:
        block.load_state_dict(model.model.layers[0].state_dict())
    model.save_pretrained(folder, max_shard_size="100MB")
    return sum(file.stat().st_size for file in folder.glob("*.safetensors")) / 2**20


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--hidden", type=int, default=1024)
    parser.add_argument("--depths", type=int, nargs="+", default=[6, 12, 24])
    parser.add_argument("--device", default="cpu")
    arguments = parser.parse_args()
    for depth in arguments.depths:
        with tempfile.TemporaryDirectory() as scratch:
            size = make_model(Path(scratch) / "model", depth, arguments.hidden, arguments.device)
            command = [sys.executable, "-c", RUN, f"{scratch}/model", f"{scratch}/out", arguments.device]
            printed = subprocess.run(command, check=True, capture_output=True, text=True).stdout
            host, gpu = json.loads(printed.splitlines()[-1])
            on_gpu = f", on the GPU {gpu:7.0f} MiB" if gpu else ""
            print(f"{depth:3} blocks, {size:7.0f} MiB of weights: peak {host:7.0f} MiB{on_gpu}", flush=True)
