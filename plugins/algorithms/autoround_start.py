"""Where AutoRound's tuning starts: the paper's min/max grids, grids searched with activations in mind, or GPTQ's solution."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from qcore import BlockContext, Linear, ModelError, QuantConfig, grid

from .gptq import Gptq, Hessian, column_order, dampen_, float_target, permuted, solve, solver_for
from .rtn import group_grids


@dataclass
class Start:
    """W [out, in] float32, the weights that V is added to; their grids' scales and zeros [out, groups]."""

    W: Tensor
    scales: Tensor
    zeros: Tensor
    note: str = ""


def covering_start(W: Tensor, config: QuantConfig) -> Start:
    """The paper's start: grids that cover each group; a symmetric one has the extreme weight on its lowest code."""
    scales, zeros, g_idx = group_grids(W, config, "minmax")
    if config.sym:
        ends = W.new_zeros(2, *scales.shape)  # lowest and highest of each group, 0 included
        for end, reduce in zip(ends, ("amin", "amax"), strict=True):
            end.scatter_reduce_(1, g_idx.long().expand(len(W), -1), W, reduce)
        extreme = torch.where(ends[1] > -ends[0], ends[1], ends[0])
        extreme = torch.where(extreme == 0, -torch.ones_like(extreme), extreme)
        scales = grid.store_scale(-extreme / grid.symmetric_zero(config.bits), torch.float16)
    return Start(W, scales, zeros)


def searched_start(W: Tensor, config: QuantConfig, importance: Tensor | None, note: str = "") -> Start:
    """Grids of least error in W, each column weighed by `importance` [in], the mean square of its input."""
    scales, zeros, _ = group_grids(W, config, "mse", importance)
    return Start(W, scales, zeros, note)


def gptq_start(W: Tensor, H: Tensor, C: Tensor | None, config: QuantConfig, recipe: Gptq.Params) -> Start | None:
    """GPTQ's solution as a start: its grids and, as W, the compensated weights that it rounded; None where it has none.

    With V = 0 these round to GPTQ's codes, which rounding W itself cannot reach. They follow from the codes: GPTQ's scaled errors E
    satisfy W - Q = E U, and a column was Q + E diag(U) when its turn came. With U = inv(R), H = RR', E = (W - Q) R.
    """
    target = W if C is None else float_target(W, H, C, recipe.float_targets, recipe.damp_percent)
    found = solve(target, H, config, recipe, solver_for(recipe.solver, W.device)[1])
    if found is None:
        return None
    size = W.shape[1] if config.group_size == -1 else config.group_size
    perm = column_order(H.diagonal(), size, recipe.order)
    reversed_H = dampen_(permuted(H, perm.flip(0)), found.damp_percent, recipe.shrink)
    R = torch.linalg.cholesky(reversed_H).flip(0, 1)  # upper: rows and columns reversed, factored, reversed back
    Q = grid.dequantize(found.codes, grid.spread(found.scales, found.g_idx), grid.spread(found.zeros, found.g_idx))
    inside = ((target - Q)[:, perm] @ R).div_(R.diagonal())  # [out, in], what rounding took from each column
    return Start(Q + inside[:, perm.argsort()], found.scales, found.zeros)


def find_starts(
    block: BlockContext, start: str, recipe: Gptq.Params, tuned: bool
) -> tuple[dict[str, Start], Sequence[Tensor]]:
    """Return the start of every linear, and the targets of tuning (nothing without any).

    The inputs that a start is fitted to are those of the pass that gives the targets, the float model's: another pass over the
    calibration would show the quantized stream's, and tuning, which sees those, makes the difference small.
    """
    hessians: dict[str, Hessian] = {}
    paired = start == "gptq" and recipe.float_targets > 0

    def visit(name: str, X: Tensor, X_float: Tensor | None = None) -> None:
        if name not in hessians:
            hessians[name] = Hessian(X.shape[1], X.device, paired)
        hessians[name].add(X, X_float)

    names = [group[0] for group in block.groups] if start != "rtn" else []
    if names and (paired or not tuned):
        block.observe(names, visit, paired=paired)
        names = []
    targets = block.float_outputs(names, visit) if tuned else []
    if start == "rtn":
        return {
            name: covering_start(linear.weight.float(), linear.config) for name, linear in block.linears.items()
        }, targets
    starts: dict[str, Start] = {}
    for group in block.groups:
        hessian = hessians.pop(group[0], None)
        starts |= _starts_of_group([block.linears[name] for name in group], hessian, start, recipe)
    return starts, targets


def _starts_of_group(
    linears: Sequence[Linear], hessian: Hessian | None, start: str, recipe: Gptq.Params
) -> dict[str, Start]:
    """Return the starts of linears that share an input: GPTQ solves those of one config stacked."""
    if hessian is None or not hessian.tokens:
        note = "no calibration token reached it"
        return {each.name: searched_start(each.weight.float(), each.config, None, note) for each in linears}
    H, C = hessian.finish()
    if not bool(torch.isfinite(H).all()):
        raise ModelError(f"the inputs of {linears[0].name} hold NaN or Inf: its activations overflow.")
    starts: dict[str, Start] = {}
    for config in dict.fromkeys(linear.config for linear in linears):
        members = [linear for linear in linears if linear.config == config]
        W = torch.cat([linear.weight.float() for linear in members])
        found = gptq_start(W, H, C, config, recipe) if start == "gptq" else searched_start(W, config, H.diagonal())
        if found is None:
            found = searched_start(
                W, config, H.diagonal(), "its Hessian cannot be factorized: searched grids are the start"
            )
        sizes = [len(linear.weight) for linear in members]
        parts = zip(found.W.split(sizes), found.scales.split(sizes), found.zeros.split(sizes), strict=True)
        starts |= {linear.name: Start(*part, found.note) for linear, part in zip(members, parts, strict=True)}
    return starts
