"""qcore's GPTQ beside GPTQModel's: the same random weights and tokens, 4 bits, group 128, one after the other on this machine.

    python benchmarks/gptq_beside.py --shape 7b --blocks 3                       # 128 x 2048 tokens on the GPU
    python benchmarks/gptq_beside.py --peer-python peers/gptqmodel/bin/python    # GPTQModel in an environment of its own
    python benchmarks/gptq_beside.py --device cpu --shape tiny --samples 8 --seqlen 64

Each is a process of its own. A block's time is from the end of one block to the end of the next (qcore: from one's fetch to the
next's), so the first, which compiles and allocates, does not count. GPTQModel gets its defaults, and the batch sizes named.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from itertools import pairwise
from pathlib import Path
from typing import Any

import torch


def tokens(samples: int, seqlen: int) -> torch.Tensor:
    return torch.randint(0, 32000, (samples, seqlen), generator=torch.Generator().manual_seed(0))


def gptqmodel(folder: Path, settings: dict[str, Any]) -> dict[str, Any]:
    """GPTQModel's figures. Saving is not timed."""
    from gptqmodel import GPTQModel, QuantizeConfig
    from gptqmodel import __version__ as version

    device = torch.device(settings["device"])
    samples = [{"input_ids": row, "attention_mask": torch.ones_like(row)} for row in tokens(settings["samples"], settings["seqlen"])]  # fmt: skip
    ends: list[float] = []

    def layer_complete(layer_idx: int, submodule_finalized: bool) -> None:
        if not submodule_finalized:
            ends.append(time.perf_counter())

    config = QuantizeConfig(bits=4, group_size=128, sym=True)
    if device.type == "cpu":
        config.device = "cpu"
    model = GPTQModel.load(str(folder), config)
    model.layer_callback = layer_complete
    start = time.perf_counter()
    model.quantize(samples, batch_size=settings["batch_size"])
    whole = time.perf_counter() - start
    return {"version": version, **_figures(whole, start, ends, device)}


def qcore_(folder: Path, settings: dict[str, Any]) -> dict[str, Any]:
    """qcore's figures, saving and verifying included in the whole."""
    import qcore
    from qcore import run

    device = torch.device(settings["device"])
    fetched: list[float] = []
    original = run._block_at

    def block_at(*inputs: Any) -> Any:
        fetched.append(time.perf_counter())
        return original(*inputs)

    run._block_at = block_at
    start = time.perf_counter()
    qcore.quantize(folder, "gptq", bits=4, group_size=128, calibration=list(tokens(settings["samples"], settings["seqlen"])),
                   samples=settings["samples"], seqlen=settings["seqlen"], device=device,
                   output=folder.with_name("out"), fresh=True)  # fmt: skip
    whole = time.perf_counter() - start
    return {"version": qcore.__version__, **_figures(whole, start, fetched, device)}


def add_tokenizer(folder: Path) -> None:
    """Give a folder the least that passes for a tokenizer: GPTQModel does not open one without."""
    from tokenizers import Tokenizer, models
    from transformers import PreTrainedTokenizerFast

    words = Tokenizer(models.WordLevel({"<s>": 0, "</s>": 1, "<unk>": 2}, unk_token="<unk>"))
    names = {"bos_token": "<s>", "eos_token": "</s>", "unk_token": "<unk>", "pad_token": "</s>"}
    PreTrainedTokenizerFast(tokenizer_object=words, **names).save_pretrained(folder)


def _figures(whole: float, start: float, marks: list[float], device: torch.device) -> dict[str, Any]:
    steps = [round(b - a, 3) for a, b in pairwise(marks)]
    found: dict[str, Any] = {"whole s": round(whole, 2), "until the first mark": round(marks[0] - start, 2)}
    found["block s"] = steps
    if device.type == "cuda":
        found["peak GiB"] = round(torch.cuda.max_memory_allocated(device) / 2**30, 2)
    return found


JOBS = {"qcore": qcore_, "gptqmodel": gptqmodel}


def apart(python: str, job: str, folder: Path, settings: dict[str, Any]) -> dict[str, Any]:
    """Do a job in a process of its own and return its figures."""
    command = [python, __file__, "--job", job, "--settings", json.dumps({**settings, "folder": str(folder)})]
    done = subprocess.run(command, capture_output=True, text=True, env={**os.environ, "PYTHONUNBUFFERED": "1"})
    lines = [line for line in done.stdout.splitlines() if line.startswith("FIGURES ")]
    if done.returncode or not lines:
        return {"failed": done.returncode, "said": (done.stdout + done.stderr)[-2000:]}
    return dict(json.loads(lines[-1].removeprefix("FIGURES ")))


def later(found: dict[str, Any]) -> float:
    """Seconds of a block after the first."""
    return statistics.median(found["block s"][1:] or found["block s"])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--shape", default="7b", help="of gptq_speed.py")
    parser.add_argument("--blocks", type=int, default=3)
    parser.add_argument("--samples", type=int, default=128)
    parser.add_argument("--seqlen", type=int, default=2048)
    parser.add_argument("--batch-size", type=int, nargs="+", default=[1], help="of GPTQModel, whose default is 1")
    parser.add_argument("--peer-python", default=sys.executable, help="an interpreter that has gptqmodel")
    parser.add_argument("--scratch", type=Path, help="where the models go")
    parser.add_argument("--job", choices=JOBS, help=argparse.SUPPRESS)
    parser.add_argument("--settings", type=json.loads, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.job:
        found = JOBS[arguments.job](Path(arguments.settings["folder"]), arguments.settings)
        print("FIGURES", json.dumps(found), flush=True)
        return
    from gptq_speed import make_model

    with tempfile.TemporaryDirectory(dir=arguments.scratch) as scratch:
        folder = Path(scratch) / "model"
        make_model(folder, arguments.shape, arguments.blocks, torch.device(arguments.device), arguments.seqlen)
        add_tokenizer(folder)
        if arguments.device != "cpu":
            torch.cuda.empty_cache()
        settings = {key: getattr(arguments, key) for key in ("device", "samples", "seqlen")}
        ours = apart(sys.executable, "qcore", folder, settings)
        print(json.dumps({"qcore": ours}), flush=True)
        for size in arguments.batch_size:
            peer = apart(arguments.peer_python, "gptqmodel", folder, {**settings, "batch_size": size})
            print(json.dumps({"gptqmodel": peer, "batch_size": size}), flush=True)
            if "block s" in ours and "block s" in peer:
                print(f"a block: {later(ours):.3f} s, {later(peer):.3f} s: {later(peer) / later(ours):.2f} times", flush=True)  # fmt: skip


if __name__ == "__main__":
    main()
