"""What bought what in qcore's AutoRound: one change at a time from the defaults, KL on held-out text.

    python benchmarks/autoround_ablation.py --models MODEL … --calibration calib.txt --text eval.txt --out ablation.json

Every row is a fresh quantization at group size 64 with the same calibration windows. GPTQ and RTN stand beside it.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any

import torch
from measuring import Bench, Clock, table, weights_of

import qcore

CHANGES: dict[str, dict[str, Any]] = {
    "default (start gptq, minmax_lr = lr / 20)": {},
    "start weighted": {"start": "weighted"},
    "start rtn, minmax_lr = lr (the paper's)": {"start": "rtn"},
    "start gptq, minmax_lr = lr": {"minmax_lr": "lr"},
    "no minmax tuning": {"enable_minmax_tuning": False},
    "no tuning": {"iters": 0, "start": "gptq"},
    "half the lr": {"lr": 0.5},
    "twice the lr": {"lr": 2.0},
    "float_targets 0.5 in GPTQ's start": {"float_targets": 0.5},
    "shrink 0.4 in GPTQ's start": {"shrink": 0.4},
    "computed in float32 (amp off)": {"amp": False},
    "float inputs (use_quant_input off)": {"use_quant_input": False},
    "last parameters (checks=0)": {"checks": 0},
    "outliers 0.001 left out": {"outliers": 0.001},
    "four times the batch": {"gradient_accumulate_steps": 4},
    "two blocks together": {"n_blocks": 2},
    "layer_lr: half in what closes the MLP": {"layer_lr": {"down_proj": 0.5, "dense_4h_to_h": 0.5}},
    "layer_lr: twice in what closes the MLP": {"layer_lr": {"down_proj": 2.0, "dense_4h_to_h": 2.0}},
    "mixed bits: first and last block one more, two middle ones one less": {"mixed": "ends"},
    "mixed bits: values and what closes the MLP one more": {
        "mixed": ("v_proj", "query_key_value", "down_proj", "dense_4h_to_h")
    },
}
COLUMNS = ["model", "grid", "change", "bits", "kl_text", "ppl_text", "cpu_seconds"]


def mixed(kind: str | tuple[str, ...], bits: int, names: list[str], depth: int) -> list[str]:
    """Return the overrides of mixed bits for a model with these linears; nothing falls below 2 bits."""
    ends = [f"*.{block}.*:bits={bits + 1}" for block in (0, depth - 1)]
    if kind == "ends":
        return ends + [f"*.{block}.*:bits={max(2, bits - 1)}" for block in ((depth - 1) // 2, depth // 2)]
    return [f"*.{last}:bits={bits + 1}" for last in kind if any(name.endswith(f".{last}") for name in names)]


def mean_bits(model: Any) -> float:
    """Bits a quantized weight has on average, scales and zeros not counted."""
    weights = [module.weight_source() for module in model.modules() if isinstance(module, qcore.QuantLinear)]
    return sum(w.bits * w.codes.numel() for w in weights) / sum(w.codes.numel() for w in weights)


def main() -> None:
    """Run the changes and print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--models", nargs="+", required=True)
    parser.add_argument("--calibration", required=True, help="a text file or a dataset's name")
    parser.add_argument("--text", type=Path, required=True)
    parser.add_argument("--windows", type=int, default=24)
    parser.add_argument("--grids", nargs="+", default=["4s", "3a", "2a"], help="bits and s(ymmetric) or a(symmetric)")
    parser.add_argument("--iters", type=int, default=50)
    parser.add_argument("--bs", type=int, default=2)
    parser.add_argument("--samples", type=int, default=64)
    parser.add_argument("--seqlen", type=int, default=256)
    parser.add_argument("--only", nargs="+", help="words: changes that hold one of them")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--out", type=Path, required=True)
    arguments = parser.parse_args()
    rows: list[dict[str, Any]] = []
    for label in arguments.models:
        bench = Bench.open(label, {"text": arguments.text}, arguments.windows, arguments.device)

        def run(
            grid: str, change: str, algorithm: str, /, label: str = label, bench: Bench = bench, **options: Any
        ) -> None:
            if "mixed" in options:
                names = [name for name, module in bench.model.named_modules() if isinstance(module, torch.nn.Linear)]
                options["overrides"] = mixed(
                    options.pop("mixed"), int(grid[0]), names, bench.model.config.num_hidden_layers
                )
            with Clock() as clock:
                model = qcore.quantize(
                    str(bench.folder), algorithm, bits=int(grid[0]), sym=grid[1] == "s", group_size=64,
                    calibration=arguments.calibration, samples=arguments.samples, seqlen=arguments.seqlen,
                    device=arguments.device, **options,
                )  # fmt: skip
            row = {
                "model": Path(label).name,
                "grid": grid,
                "change": change,
                "bits": mean_bits(model),
                "cpu_seconds": clock.cpu,
            }
            rows.append({**row, **bench.measure(weights_of(model))})
            print(table(rows[-1:], COLUMNS).splitlines()[-1], flush=True)
            arguments.out.write_text(json.dumps(rows, indent=1))

        for grid in arguments.grids:
            run(grid, "RTN, searched scales", "rtn", grid="mse")
            run(grid, "GPTQ", "gptq")
            for change, options in CHANGES.items():
                if arguments.only is None or any(word in change for word in arguments.only):
                    step = 1 / arguments.iters
                    options = {"iters": arguments.iters, "bs": arguments.bs, **options}
                    options |= {"lr": options["lr"] * step} if "lr" in options else {}
                    options |= {"minmax_lr": step} if options.get("minmax_lr") == "lr" else {}
                    run(grid, change, "autoround", **options)
    print(table(rows, COLUMNS))


if __name__ == "__main__":
    main()
