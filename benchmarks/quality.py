"""Perplexity and KL divergence of qcore's algorithms beside peers', on one model, with the same calibration tokens.

    python benchmarks/tokens.py --out tokens.npy                       # 32 x 512 tokens of pydoc topics
    python benchmarks/peers/run_gptqmodel.py … --out peers/gptqmodel-4-sym   # see benchmarks/peers/README.md
    python benchmarks/quality.py --texts texts/ --tokens tokens.npy --peers peers/ --out quality.json

Every row is a fresh quantization of the demo model at group size 64, the head kept in float. Evaluation is in float32.
Peers' rows are read from the exactly dequantized weights their runners wrote.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path

from measuring import Bench, Clock, table, token_file, weights_of
from safetensors.torch import load_file

import qcore
from qcore.cli import parse_options

COLUMNS = ["method", "bits", "sym", "ppl_near", "ppl_far", "kl_near", "kl_far", "cpu_seconds"]


def main() -> None:
    """Run the methods wanted, add the peers found, print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="demo")
    parser.add_argument(
        "--texts", type=Path, required=True, help="folder with near.txt and far.txt (benchmarks/texts.py)"
    )
    parser.add_argument("--tokens", type=Path, required=True, help=".npy of calibration token ids [samples, seqlen]")
    parser.add_argument("--windows", type=int, default=64)
    parser.add_argument("--device", default="cpu", help="where to quantize and evaluate")
    parser.add_argument("--bits", type=int, nargs="+", default=[4, 3, 2])
    parser.add_argument("--algorithms", nargs="+", default=["rtn", "gptq"],
                        help="names, each with options: 'rtn grid=mse'")  # fmt: skip
    parser.add_argument("--peers", type=Path, help="folder of peer runs")
    parser.add_argument("--out", type=Path, required=True)
    arguments = parser.parse_args()
    texts = {name: arguments.texts / f"{name}.txt" for name in ("near", "far")}
    bench = Bench.open(arguments.model, texts, arguments.windows, arguments.device)
    tokens = token_file(arguments.tokens)
    rows = [{"method": "float", "bits": 32, "sym": "", **bench.measure({})}]
    for bits in arguments.bits:
        for sym in (True, False):
            for algorithm in arguments.algorithms:
                with Clock() as clock:
                    name, *options = algorithm.split()
                    model = qcore.quantize(
                        str(bench.folder), name, bits=bits, group_size=64, sym=sym, calibration=tokens,
                        samples=len(tokens), seqlen=len(tokens[0]), device=arguments.device,
                        **parse_options(tuple(options)),
                    )  # fmt: skip
                row = {"method": f"qcore {algorithm}", "bits": bits, "sym": sym, "cpu_seconds": clock.cpu}
                rows.append({**row, **bench.measure(weights_of(model))})
                print(table(rows[-1:], COLUMNS).splitlines()[-1], flush=True)
                arguments.out.write_text(json.dumps(rows, indent=1))
    for result in sorted(arguments.peers.glob("*/result.json")) if arguments.peers else []:
        run = json.loads(result.read_text())
        row = {"method": f"{run['peer']} {run['version']}", "bits": run["bits"], "sym": run["sym"]}
        measured = bench.measure(load_file(result.parent / "dequantized.safetensors"))
        rows.append({**row, "cpu_seconds": run["cpu_seconds"], **measured})
    arguments.out.write_text(json.dumps(rows, indent=1))
    print(table(sorted(rows, key=lambda row: (-row["bits"], row["sym"] is not True)), COLUMNS))


if __name__ == "__main__":
    main()
