"""GPTQ: one column at a time, the error of each spread over the columns still to come (arXiv 2210.17323).

Letters as in the paper: W [out, in] the weight, X the inputs [tokens, in], H = 2/T X'X the Hessian of the layer-wise
squared error, U the upper Cholesky factor of H's inverse. What differs from the common implementations, and why, is
in docs/algorithms/gptq.md, with the ablation that decided each default.
"""

from __future__ import annotations

from typing import Literal

import torch
from pydantic import Field
from torch import Tensor

from qcore import Algorithm, BlockContext, ModelError, Options, QuantConfig, QuantizedWeight, grid, hookimpl

from .rtn import group_grids, round_to_nearest


class Hessian:
    """Accumulates H [in, in] float32 over tokens, by blocks of columns: H is symmetric, so half is enough."""

    PANEL = 512

    def __init__(self, columns: int, device: torch.device) -> None:
        self.H = torch.zeros(columns, columns, dtype=torch.float32, device=device)
        self.tokens = 0

    def add(self, X: Tensor) -> None:
        """Add the tokens of X [tokens, in]."""
        X = X.float()
        columns = X.shape[1]
        for start in range(0, columns, self.PANEL):
            stop = min(start + self.PANEL, columns)
            self.H[start:stop, start:].addmm_(X[:, start:stop].t(), X[:, start:])
        self.tokens += X.shape[0]

    def finish(self) -> Tensor:
        """Return H = 2/T X'X, both halves."""
        upper = self.H.triu()
        return (upper + upper.triu(1).t()) * (2 / max(1, self.tokens))


def damped_factor(H: Tensor, damp_percent: float) -> tuple[Tensor, float] | None:
    """Return (U [in, in] upper with inverse(H + damping) = U'U, the share of damping used).

    The damping is a share of H's mean diagonal, raised tenfold until the factorization succeeds; None when even a
    hundred times the mean diagonal does not help.
    """
    mean = H.diagonal().mean()
    damp = damp_percent
    while damp <= 100:
        damped = H + torch.eye(len(H), device=H.device) * (damp * mean)
        L, failed = torch.linalg.cholesky_ex(damped)
        if not int(failed):
            U, failed = torch.linalg.cholesky_ex(torch.cholesky_inverse(L), upper=True)
            if not int(failed) and bool(torch.isfinite(U).all()):
                return U, damp
        damp = max(damp, 1e-3) * 10
    return None


def column_order(diagonal: Tensor, group_size: int, order: str) -> Tensor:
    """Return perm [in], the order in which columns are quantized.

    "none": as they stand. "desc_act" and "static": by falling diag(H). "group": whole groups by their largest
    diag(H), columns by falling diag(H) inside each (arXiv 2505.14638), so that groups stay where they are.
    """
    columns = len(diagonal)
    if order == "none":
        return torch.arange(columns, device=diagonal.device)
    if order in ("desc_act", "static") or group_size == -1:
        return torch.argsort(diagonal, descending=True, stable=True)
    parts = [
        start + torch.argsort(diagonal[start : start + group_size], descending=True, stable=True)
        for start in range(0, columns, group_size)
    ]
    tops = torch.stack([diagonal[part].max() for part in parts])
    if columns % group_size:
        tops[-1] = -1  # a shorter last group stays last, so that group boundaries stay multiples of group_size
    return torch.cat([parts[int(i)] for i in torch.argsort(tops, descending=True, stable=True)])


def solve(
    W: Tensor,
    U: Tensor,
    config: QuantConfig,
    perm: Tensor,
    g_idx: Tensor,
    importance: Tensor | None,
    method: str,
    block_size: int,
    static_grids: tuple[Tensor, Tensor] | None = None,
) -> tuple[Tensor, Tensor, Tensor]:
    """Quantize W [out, in], its columns (and U, g_idx, importance) already in the order of perm.

    Returns codes float [out, in], scales and zeros float32 [out, groups], columns still in that order. Grids are
    found from the live, compensated weights when a group's first column comes up, unless static_grids gives them.
    """
    rows, columns = W.shape
    size = columns if config.group_size == -1 else config.group_size
    span = size if size > block_size else block_size - block_size % size  # a group's columns must all be live
    W = W.clone()
    codes = torch.empty_like(W)
    groups = int(g_idx.max()) + 1
    scales = torch.ones(rows, groups, device=W.device) if static_grids is None else static_grids[0]
    zeros = torch.ones(rows, groups, device=W.device) if static_grids is None else static_grids[1]
    order = g_idx.tolist()
    for start in range(0, columns, span):
        stop = min(start + span, columns)
        W1 = W[:, start:stop].t().contiguous()  # [span, out]: a column of W is a contiguous row here
        Err = torch.empty_like(W1)
        U1 = U[start:stop, start:stop]
        for i in range(stop - start):
            column = start + i
            group = order[column]
            if static_grids is None and column % size == 0:
                end = min(i + size, stop - start)
                local = None if importance is None else importance[column : start + end]
                live = W1[i:end].t()
                if method == "minmax":
                    scale, zero = grid.minmax_grid(live, config.bits, config.sym)
                else:
                    scale, zero = grid.search_grid(live, config.bits, config.sym, local)
                scales[:, group], zeros[:, group] = scale, zero
            elif static_grids is not None:
                scale, zero = scales[:, group], zeros[:, group]
            q = grid.quantize(W1[i], scale, zero, config.bits)
            codes[:, column] = q
            Err[i] = (W1[i] - grid.dequantize(q, scale, zero)) / U1[i, i]
            W1[i + 1 :].addr_(U1[i, i + 1 :], Err[i], alpha=-1)
        W[:, stop:].addmm_(Err.t(), U[start:stop, stop:], alpha=-1)
    return codes, scales, zeros


class Gptq(Algorithm):
    """GPTQ with grids from the live weights, shared Hessians, and act-order that costs nothing at run time."""

    class Params(Options):
        """desc_act: quantize columns by falling diag(H), groups formed in that order (g_idx must be looked up at run time).
        static_groups: with desc_act, groups stay where they are and their grids are found beforehand.
        order: the order when desc_act is off: "group" (whole groups by importance; no run-time cost) or "none".
        true_sequential: linears that depend on others see those quantized already.
        damp_percent: share of H's mean diagonal added to its diagonal; raised when the factorization fails.
        grid: "minmax", or "mse", a scale search weighted by diag(H).
        block_size: columns between two updates of the columns behind them.
        """

        desc_act: bool = False
        static_groups: bool = False
        order: Literal["group", "none"] = "group"
        true_sequential: bool = True
        damp_percent: float = Field(0.05, gt=0, le=10)
        grid: Literal["minmax", "mse"] = "mse"
        block_size: int = Field(128, ge=1)

    params: Params
    name = "gptq"
    description = "GPTQ: error-compensated rounding with a calibrated Hessian"

    def quantize_block(self, block: BlockContext) -> dict[str, QuantizedWeight]:
        """Quantize group by group of linears that share an input."""
        results: dict[str, QuantizedWeight] = {}
        rounds = [[group] for group in block.groups] if self.params.true_sequential else [list(block.groups)]
        for groups in rounds:
            hessians: dict[str, Hessian] = {}

            def visit(name: str, X: Tensor, hessians: dict[str, Hessian] = hessians) -> None:
                if name not in hessians:
                    hessians[name] = Hessian(X.shape[1], X.device)
                hessians[name].add(X)

            block.observe([group[0] for group in groups], visit)
            for group in groups:
                H = hessians[group[0]].finish() if group[0] in hessians else None
                found = self._quantize_group(block, group, H)
                for name, weight in found.items():
                    block.replace(name, weight)
                results |= found
        return results

    def _quantize_group(
        self, block: BlockContext, group: tuple[str, ...], H: Tensor | None
    ) -> dict[str, QuantizedWeight]:
        """Quantize linears that share H with as few factorizations as their configs allow."""
        if H is not None and not bool(torch.isfinite(H).all()):
            raise ModelError(f"the inputs of {group[0]} hold NaN or Inf; its activations overflow.")
        results: dict[str, QuantizedWeight] = {}
        for config in dict.fromkeys(block.linears[name].config for name in group):
            names = [name for name in group if block.linears[name].config == config]
            W = torch.cat([block.linears[name].weight.float() for name in names])
            solved = None if H is None else self._solve(W, H, config)
            if solved is None:
                why = "no calibration tokens reached it" if H is None else "its Hessian could not be factorized"
                for name in names:
                    linear = block.linears[name]
                    results[name] = round_to_nearest(linear.weight, config, "mse", None, linear.bias)
                    block.record(name, error=None, note=f"rounded to nearest: {why}")
                continue
            codes, scales, zeros, g_idx, damp = solved
            sizes = [block.linears[name].weight.shape[0] for name in names]
            for name, c, s, z in zip(names, codes.split(sizes), scales.split(sizes), zeros.split(sizes), strict=True):
                linear = block.linears[name]
                weight = QuantizedWeight(
                    c.to(torch.uint8).contiguous(), s.to(torch.float16).contiguous(), z.to(torch.int32).contiguous(),
                    g_idx, config, linear.bias,
                )  # fmt: skip
                results[name] = weight
                assert H is not None
                block.record(name, error=relative_error(linear.weight.float(), weight, H))
                if damp != self.params.damp_percent:
                    block.record(name, note=f"damping raised to {damp:g} of the mean diagonal")
        return results

    def _solve(self, W: Tensor, H: Tensor, config: QuantConfig) -> tuple[Tensor, Tensor, Tensor, Tensor, float] | None:
        """Return codes, scales, zeros, g_idx in the original column order and the damping used, or None."""
        params = self.params
        diagonal = H.diagonal().clone()
        dead = diagonal == 0
        if bool(dead.any()):  # inputs that never fire: their weights are kept, rounded plainly
            H = H.clone()
            diagonal[dead] = diagonal[~dead].mean() if bool((~dead).any()) else 1.0
            H.diagonal().copy_(diagonal)
        order = ("static" if params.static_groups else "desc_act") if params.desc_act else params.order
        perm = column_order(diagonal, config.group_size, order)
        factor = damped_factor(H[perm][:, perm], params.damp_percent)
        if factor is None:
            return None
        U, damp = factor
        plain = grid.group_index(len(diagonal), config.group_size, W.device)
        importance = diagonal[perm]
        static = None
        if order == "static":
            scales, zeros, _ = group_grids(W, config, params.grid, diagonal)
            static = (scales, zeros)
        live_groups = plain if order in ("desc_act", "none") else plain[perm]
        codes, scales, zeros = solve(
            W[:, perm], U, config, perm, live_groups.long(), importance, params.grid, params.block_size, static
        )
        inverse = torch.argsort(perm)
        g_idx = plain[inverse].contiguous() if order == "desc_act" else plain
        return codes[:, inverse], scales, zeros, g_idx, damp


def relative_error(W: Tensor, weight: QuantizedWeight, H: Tensor) -> float:
    """Return |(W - Q) X| / |W X| over the calibration tokens."""
    difference = weight.dequantize() - W
    lost = ((difference @ H) * difference).sum().clamp_min(0)
    whole = ((W @ H) * W).sum().clamp_min(1e-30)
    return float((lost / whole).sqrt())


@hookimpl
def qcore_algorithms() -> list[type[Algorithm]]:
    return [Gptq]
