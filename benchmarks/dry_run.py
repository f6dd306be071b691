"""What `qcore quantize --dry-run` foretells beside what then happens: seconds, GPU and host memory, bytes on disk.

    python benchmarks/dry_run.py demo                                   # SmolLM2-135M, on the CPU or the GPU that is there
    python benchmarks/dry_run.py FOLDER --algo autoround --set iters=20 --samples 16 --seqlen 256
    python benchmarks/dry_run.py --shape 7b --blocks 3                  # Llama-2-7B blocks of random weights

Plan and run are processes of their own, so that each has its own peak. The run gets random token ids: a plan does not count what
making a calibration takes. Goal: memory within 15 %, time within 30 %.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import torch

KEYS = ("bits", "group_size", "samples", "seqlen", "device", "format")


def plan(settings: dict[str, Any]) -> dict[str, Any]:
    """The plan's figures."""
    from qcore.tools.explain import explain

    start = time.perf_counter()
    found = explain(settings.pop("model"), settings.pop("algo"), output=settings.pop("output"), probe=True, **settings)
    took = time.perf_counter() - start
    return {
        "took": took,
        "disk": found["disk"]["output"],
        **{key: found[key] for key in MEASURED if key != "disk"},
        "parts": found["parts"],
    }


def real(settings: dict[str, Any]) -> dict[str, Any]:
    """What a run takes."""
    import qcore
    from qcore.tools.probe import _peak

    tokens = list(
        torch.randint(0, 300, (settings["samples"], settings["seqlen"]), generator=torch.Generator().manual_seed(1))
    )
    start = time.perf_counter()
    output = qcore.quantize(settings.pop("model"), settings.pop("algo"), calibration=tokens, **settings)
    seconds = time.perf_counter() - start
    gpu = torch.cuda.max_memory_allocated() if torch.cuda.is_available() and settings["device"] != "cpu" else 0
    disk = sum(file.stat().st_size for file in output.iterdir() if file.suffix in (".safetensors", ".gguf"))
    return {"seconds": seconds, "gpu_memory": gpu, "host_memory": _peak(), "disk": disk}


MEASURED = {"seconds": 0.30, "gpu_memory": 0.15, "host_memory": 0.15, "disk": 0.0}


def apart(job: str, settings: dict[str, Any]) -> dict[str, Any]:
    """Do a job in a process of its own."""
    command = [sys.executable, __file__, "--job", job, "--settings", json.dumps(settings, default=str)]
    done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode:
        raise SystemExit(done.stderr[-3000:])
    return dict(json.loads(done.stdout.splitlines()[-1]))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", nargs="?")
    parser.add_argument("--shape", help="of gptq_speed.py, in place of a model")
    parser.add_argument("--blocks", type=int, default=3)
    parser.add_argument("--algo", default="gptq")
    parser.add_argument("--format", default="gptq")
    parser.add_argument("--bits", type=int, default=4)
    parser.add_argument("--group-size", type=int, default=64)
    parser.add_argument("--samples", type=int, default=128)
    parser.add_argument("--seqlen", type=int, default=512)
    parser.add_argument("--device", default="auto")
    parser.add_argument("--set", dest="options", action="append", default=[])
    parser.add_argument("--scratch", type=Path, help="where folders go")
    parser.add_argument("--job", help=argparse.SUPPRESS)
    parser.add_argument("--settings", type=json.loads, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.job:
        print(json.dumps({"plan": plan, "real": real}[arguments.job](arguments.settings)))
        return
    from qcore.cli import parse_options

    with tempfile.TemporaryDirectory(dir=arguments.scratch) as scratch:
        model = arguments.model
        if arguments.shape:
            from gptq_speed import make_model

            device = "cuda" if torch.cuda.is_available() and arguments.device != "cpu" else "cpu"
            model = Path(scratch) / "model"
            make_model(model, arguments.shape, arguments.blocks, torch.device(device), arguments.seqlen)
        settings = {key: getattr(arguments, key) for key in KEYS} | parse_options(tuple(arguments.options))
        settings |= {"model": model, "algo": arguments.algo, "output": f"{scratch}/out"}
        foretold = apart("plan", settings)
        happened = apart("real", settings)
    print(f"{model} {arguments.algo} {arguments.samples} x {arguments.seqlen}: the plan took {foretold['took']:.1f} s")
    print("parts:", {name: round(seconds, 2) for name, seconds in foretold["parts"].items()})
    for name, goal in MEASURED.items():
        told, was = foretold[name], happened[name]
        if was:
            off = told / was - 1
            print(
                f"{name:12} plan {told:16,.2f}  run {was:16,.2f}  {off:+.1%}{'' if abs(off) <= goal else '  beyond the goal'}"
            )


if __name__ == "__main__":
    main()
