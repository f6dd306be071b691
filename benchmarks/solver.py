"""GPTQ's solver alone, from W and H to codes: the torch reference beside the compiled solvers of this machine.

    python benchmarks/solver.py [--device cuda] [--shapes 4096x4096,4096x11008,11008x4096] [--bits 4 --group-size 128]

Shapes are K x N: inputs x outputs. Times are medians in milliseconds, of the whole (factorization included) and of its parts:
`factor`, `updates` of the columns behind each block (matrix products both), and `columns`: grid search and loop over columns,
what the compiled solvers replace. Beside them: the share of codes that equal those of the first row, and the loss
tr((W - Q) H (W - Q)') over that of the first row. Where a tie falls the other way a row goes on differently: codes may differ,
losses may not.

On a CPU the first two rows, `plain64` and `plain32`, are the paper's algorithm written down column by column in float64 and float32,
its factor from three steps (Cholesky, inverse, Cholesky). The threads are torch's (OMP_NUM_THREADS); --cpu-time counts CPU time,
for a machine with other work. With --tile 8x1,16x2 the Triton kernel's rows of a program x warps are tried in turn.
"""

from __future__ import annotations

import argparse
import json
import statistics
import time
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

import torch
from qcore_plugins.algorithms import gptq
from qcore_plugins.algorithms.rtn import find_grid
from torch import Tensor

from qcore import QuantConfig, grid


def problem(K: int, N: int, device: torch.device) -> tuple[Tensor, Tensor]:
    """Return W [N, K] and H [K, K] of inputs that move together, some strong and some weak."""
    generator = torch.Generator(device).manual_seed(0)
    W = torch.randn(N, K, device=device, generator=generator) * 0.02
    H = torch.zeros(K, K, device=device)
    mixing = torch.randn(K, 64, device=device, generator=generator)
    strength = torch.logspace(-1, 1, K, device=device)
    for _ in range(8):
        common = torch.randn(K // 4, 64, device=device, generator=generator) @ mixing.t() / 8
        X = (common + torch.randn(K // 4, K, device=device, generator=generator)) * strength
        H.addmm_(X.t(), X, alpha=1 / (2 * K))
    return W, H


class Clock:
    """Milliseconds of calls, once the device has nothing left to do."""

    def __init__(self, device: torch.device, repeats: int, cpu_time: bool) -> None:
        self.device, self.repeats = device, repeats
        self.now = time.process_time if cpu_time else time.perf_counter

    def once(self, call: Callable[[], Any]) -> float:
        self._synchronize()
        start = self.now()
        call()
        self._synchronize()
        return 1e3 * (self.now() - start)

    def median(self, call: Callable[[], Any]) -> float:
        """The median time of a call that has run once before."""
        call()
        return statistics.median(self.once(call) for _ in range(self.repeats))

    def inside(self, solve: Callable[[gptq.Columns], Any], quantize: gptq.Columns) -> float:
        """The median time that a solver spends in its inner loop."""
        spent = [0.0]

        def timed(*inputs: Any) -> None:
            spent[-1] += self.once(lambda: quantize(*inputs))

        for _ in range(self.repeats):
            solve(timed)
            spent.append(0.0)
        return statistics.median(spent[:-1])

    def _synchronize(self) -> None:
        if self.device.type == "cuda":
            torch.cuda.synchronize()


def chain(H: Tensor, perm: Tensor, params: gptq.Gptq.Params) -> Tensor:
    """The factor as the paper has it: the upper Cholesky factor of the inverse."""
    A = gptq.dampen_(H[perm][:, perm], params.damp_percent, params.shrink)
    return torch.linalg.cholesky(torch.cholesky_inverse(torch.linalg.cholesky(A)), upper=True)


def plain(W: Tensor, H: Tensor, config: QuantConfig, params: gptq.Gptq.Params) -> gptq.Solution:
    """The paper's algorithm for groups kept whole, in the dtype of W [out, in] and H."""
    (rows, columns), size = W.shape, config.group_size
    perm = gptq.column_order(H.diagonal(), size, params.order)
    U, inverse = chain(H, perm, params), perm.argsort()
    group_of = grid.group_index(columns, size, W.device)[perm].long()
    W, codes = W[:, perm], torch.empty(rows, columns, dtype=torch.uint8, device=W.device)
    scales = W.new_ones(rows, grid.num_groups(columns, size))
    zeros, importance = torch.ones_like(scales), U.diagonal().square().reciprocal()
    for first in range(0, columns, params.block_size):
        last = min(first + params.block_size, columns)
        live, Err = W[:, first:last].clone(), W.new_empty(rows, last - first)
        for i, j in enumerate(range(first, last)):
            if j % size == 0:
                group = find_grid(live[:, i : i + size].contiguous(), config, params.grid, importance[j : j + size])
                scales[:, group_of[j]], zeros[:, group_of[j]] = group[0], group[1]
            scale, zero = scales[:, group_of[j]], zeros[:, group_of[j]]
            code = (live[:, i] / scale + zero).round().clamp(0, config.maxq)
            Err[:, i] = (live[:, i] - scale * (code - zero)) / U[j, j]
            live[:, i:] -= Err[:, i, None] @ U[j, None, j:last]
            codes[:, j] = code
        W[:, last:] -= Err @ U[first:last, last:]
    return gptq.Solution(codes[:, inverse], scales.float(), zeros.float(), group_of[inverse].int(), params.damp_percent)


def updates(W: Tensor, H: Tensor, config: QuantConfig, params: gptq.Gptq.Params) -> None:
    """The products that update the columns behind each block and panel, with any numbers."""
    Wt = W.t().contiguous()
    size = len(Wt) if config.group_size == -1 else config.group_size
    for panel in gptq._panels(len(Wt), size, params.block_size):
        begin, end = panel[0][0], panel[-1][1]
        for start, stop in panel:
            Wt[stop:end].addmm_(H[start:stop, stop:end].t(), Wt[start:stop], alpha=-1)
        Wt[end:].addmm_(H[begin:end, end:].t(), Wt[begin:end], alpha=-1)


def loss(W: Tensor, H: Tensor, solution: gptq.Solution) -> float:
    E = W - solution.scales[:, solution.g_idx.long()] * (
        solution.codes.float() - solution.zeros[:, solution.g_idx.long()]
    )
    return float(((E @ H) * E).double().sum())


def solvers(wanted: str, device: torch.device, tiles: str | None, alone: bool) -> Iterator[tuple[str, gptq.Columns]]:
    """The reference, unless alone, and what is wanted or what `auto` takes here, once for each tile."""
    if not alone:
        yield "torch", gptq.quantize_columns
    label, found = gptq.solver_for(wanted, device)
    for tile in (tiles or "").split(","):
        if tile:
            from qcore_plugins.algorithms import gptq_triton

            gptq_triton.ROWS, gptq_triton.WARPS = map(int, tile.split("x"))
        if label != "torch":
            yield f"{label.split()[0]} {tile}".strip(), found


def measure(K: int, N: int, arguments: argparse.Namespace) -> list[dict[str, Any]]:
    """One row per solver."""
    device, params = torch.device(arguments.device), gptq.Gptq.Params(**json.loads(arguments.params))
    config = QuantConfig(bits=arguments.bits, group_size=arguments.group_size, sym=not arguments.asym)
    W, H = problem(K, N, device)
    perm = torch.randperm(K, device=device)
    clock = Clock(device, arguments.repeats, arguments.cpu_time)
    factor = clock.median(lambda: gptq.inverse_factor(H, perm, params.damp_percent, params.shrink))
    products = clock.median(lambda: updates(W, H, config, params))
    rows, reference = [], None
    for dtype in (torch.float64, torch.float32) if device.type == "cpu" and not arguments.alone else ():
        w, h = W.to(dtype), H.to(dtype)
        paper = partial(plain, w, h, config, params)
        solution = paper()
        reference = reference or solution
        row: dict[str, Any] = {
            "shape": f"{K}x{N}",
            "solver": f"plain{8 * dtype.itemsize}",
            "whole": clock.median(paper),
        }
        row |= {
            "factor": clock.median(partial(chain, h, perm, params)),
            "updates": clock.median(partial(updates, w, h, config, params)),
        }
        row["columns"] = row["whole"] - row["factor"] - row["updates"]
        rows.append(row | compared(solution, reference, W, H))
    for name, quantize in solvers(arguments.solver, device, arguments.tile, arguments.alone):

        def solve(quantize: gptq.Columns = quantize) -> gptq.Solution:
            solution = gptq.solve(W, H, config, params, quantize)
            assert solution is not None
            return solution

        solution = solve()
        reference = reference or solution
        row = {"shape": f"{K}x{N}", "solver": name, "whole": clock.median(solve), "factor": factor, "updates": products}
        row["columns"] = clock.inside(solve, quantize)
        rows.append(row | compared(solution, reference, W, H))
    return rows


def compared(found: gptq.Solution, reference: gptq.Solution, W: Tensor, H: Tensor) -> dict[str, float]:
    same = float((found.codes == reference.codes).float().mean())
    return {"codes equal": same, "loss ratio": loss(W, H, found) / loss(W, H, reference)}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--shapes", help="K x N, separated by commas; 2048x2048 on a CPU")
    parser.add_argument("--solver", default="auto")
    parser.add_argument("--alone", action="store_true", help="without the reference, which takes seconds")
    parser.add_argument("--tile", help="rows x warps of the Triton kernel, separated by commas")
    parser.add_argument("--bits", type=int, default=4)
    parser.add_argument("--group-size", type=int, default=128)
    parser.add_argument("--asym", action="store_true")
    parser.add_argument("--params", default="{}", help="more options of the algorithm, as JSON")
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--cpu-time", action="store_true")
    parser.add_argument("--json", type=Path, help="write the figures here too")
    arguments = parser.parse_args()
    default = "2048x2048" if arguments.device == "cpu" else "4096x4096,4096x11008,11008x4096"
    where = torch.cuda.get_device_name() if arguments.device != "cpu" else f"CPU, {torch.get_num_threads()} threads"
    print(f"{where}, torch {torch.__version__}, {arguments.bits} bits, group {arguments.group_size}; milliseconds")
    rows: list[dict[str, Any]] = []
    for shape in (arguments.shapes or default).split(","):
        K, N = map(int, shape.split("x"))
        rows += (measured := measure(K, N, arguments))
        for row in measured:
            cells = (f"{key} {value:.6f}" if key in ("codes equal", "loss ratio") else f"{key} {value:.1f}" for key, value in list(row.items())[2:])  # fmt: skip
            print(f"{row['shape']:12} {row['solver']:12} {'  '.join(cells)}", flush=True)
    if arguments.json:
        arguments.json.write_text(json.dumps(rows, indent=1))


if __name__ == "__main__":
    main()
