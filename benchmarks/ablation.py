"""What bought what in qcore's GPTQ: one change at a time, KL on both held-out texts, on the demo model at group size 64.

    python benchmarks/ablation.py --texts texts/ --tokens tokens.npy --tokens-large tokens-128.npy --out ablation.json

tokens.npy and tokens-128.npy: 32 and 128 sequences of 512 tokens (benchmarks/tokens.py).
"""

from __future__ import annotations

import argparse
import contextlib
import json
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from measuring import Bench, Clock, table, token_file, weights_of

import qcore
from qcore import grid

OPTIONS: dict[str, dict[str, Any]] = {
    "default": {},
    "order: as they stand": {"order": "none"},
    "order: desc_act (g_idx at run time)": {"desc_act": True},
    "order: desc_act, static_groups": {"desc_act": True, "static_groups": True},
    "group grids not live (static_groups)": {"static_groups": True},
    "damping 0.01, no shrink (AutoGPTQ)": {"damp_percent": 0.01, "shrink": 0.0},
    "damping 0.1, no shrink": {"shrink": 0.0},
    "damping 0.05, shrink 0.05": {"damp_percent": 0.05, "shrink": 0.05},
    "damping 0.2, shrink 0.2": {"damp_percent": 0.2, "shrink": 0.2},
    "damping 0.4, shrink 0.4": {"damp_percent": 0.4, "shrink": 0.4},
    "grid: min/max": {"grid": "minmax"},
    "float_targets 0.5": {"float_targets": 0.5},
    "float_targets 1": {"float_targets": 1.0},
    "not true_sequential": {"true_sequential": False},
    "all of the above off (textbook)": {
        "order": "none",
        "damp_percent": 0.01,
        "shrink": 0.0,
        "grid": "minmax",
        "true_sequential": False,
    },
}
COLUMNS = ["change", "bits", "sym", "kl_near", "kl_far", "ppl_near", "ppl_far", "cpu_seconds"]


@contextlib.contextmanager
def scales_rounded_last() -> Iterator[None]:
    """Let codes be chosen with unrounded scales, as most implementations do."""
    original = grid.store_scale
    grid.store_scale = lambda scale, dtype, check=True: scale  # type: ignore[assignment,misc]
    try:
        yield
    finally:
        grid.store_scale = original


def main() -> None:
    """Run the variants and print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="demo")
    parser.add_argument("--texts", type=Path, required=True)
    parser.add_argument("--tokens", type=Path, required=True)
    parser.add_argument("--tokens-large", type=Path, required=True)
    parser.add_argument("--windows", type=int, default=64)
    parser.add_argument("--grids", nargs="+", default=["4s", "3a", "2a"], help="bits and s(ymmetric) or a(symmetric)")
    parser.add_argument("--only", default="", help="Run the changes whose name this regular expression is found in.")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--out", type=Path, required=True)
    arguments = parser.parse_args()
    texts = {name: arguments.texts / f"{name}.txt" for name in ("near", "far")}
    bench = Bench.open(arguments.model, texts, arguments.windows, arguments.device)
    small = token_file(arguments.tokens)
    rows: list[dict[str, Any]] = []

    def run(change: str, calibration: Any, samples: int, bits: int, sym: bool, options: dict[str, Any]) -> None:
        with Clock() as clock:
            model = qcore.quantize(
                str(bench.folder), "gptq", bits=bits, group_size=64, sym=sym, calibration=calibration, samples=samples,
                seqlen=512, device=arguments.device, **options,
            )  # fmt: skip
        row = {"change": change, "bits": bits, "sym": sym, "cpu_seconds": clock.cpu}
        rows.append({**row, **bench.measure(weights_of(model))})
        print(table(rows[-1:], COLUMNS).splitlines()[-1], flush=True)
        arguments.out.write_text(json.dumps(rows, indent=1))

    sources = {  # calibration, samples
        "calibration: topics 128 x 512": (token_file(arguments.tokens_large), 128),
        "calibration: self 32 x 512": ("self", 32),
        "calibration: self 128 x 512": ("self", 128),
        "calibration: topics and self, 16 + 16 x 512": ("topics,self", 32),
        "calibration: topics and self, 64 + 64 x 512": ("topics,self", 128),
    }
    wanted = re.compile(arguments.only)
    for bits, sym in ((int(each[0]), each[1] == "s") for each in arguments.grids):
        for change, options in OPTIONS.items():
            if wanted.search(change):
                run(change, small, len(small), bits, sym, options)
        if wanted.search("scales rounded last"):
            with scales_rounded_last():  # the compiled solvers round by themselves
                run("scales rounded last", small, len(small), bits, sym, {"solver": "torch"})
        for change, (calibration, samples) in sources.items():
            if wanted.search(change):
                run(change, calibration, samples, bits, sym, {})
    print(table(rows, COLUMNS))


if __name__ == "__main__":
    main()
