"""Round to nearest: each group gets a grid, each weight its nearest code. The baseline, and what needs no data.

With activation weighting the scale search counts a column's error by the mean square of its input, the
importance-matrix search of llama.cpp and of AutoRound's "opt-rtn".
"""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor

from qcore import Algorithm, BlockContext, ModelError, Options, QuantConfig, QuantizedWeight, grid, hookimpl

#: rows rounded together: what is worked with on the way is small beside a weight
ROWS = 1024


def find_grid(
    w: Tensor, config: QuantConfig, method: str, importance: Tensor | None, check: bool = True
) -> tuple[Tensor, Tensor]:
    """Return (scale, zero) [out] of a group w [out, g]; importance [g]: the weight of each column's error in the search.

    Without `check` it is the caller who looks whether scales are finite.
    """
    if method == "minmax":
        return grid.minmax_grid(w, config.bits, config.sym, check=check)
    return grid.search_grid(w, config.bits, config.sym, importance, check=check)


def group_grids(
    W: Tensor, config: QuantConfig, method: str, importance: Tensor | None = None
) -> tuple[Tensor, Tensor, Tensor]:
    """Return scales, zeros float32 [out, groups] and g_idx [in] for W [out, in], groups of consecutive columns.

    importance: [in], the weight of each column's error in the search.
    """
    columns = W.shape[1]
    size = columns if config.group_size == -1 else config.group_size
    groups = [slice(start, start + size) for start in range(0, columns, size)]
    found = [
        find_grid(W[:, g], config, method, None if importance is None else importance[g], check=False) for g in groups
    ]
    scales, zeros = (torch.stack(each, 1) for each in zip(*found, strict=True))
    grid.check_scales(scales)
    return scales, zeros, grid.group_index(columns, config.group_size, W.device)


def round_to_nearest(
    W: Tensor, config: QuantConfig, method: str, importance: Tensor | None = None, bias: Tensor | None = None
) -> QuantizedWeight:
    """Return W [out, in] rounded to its grids."""
    W = W.float()
    scales, zeros, g_idx = group_grids(W, config, method, importance)
    codes = torch.empty(W.shape, dtype=torch.uint8, device=W.device)
    for rows, w, s, z in zip(*(each.split(ROWS) for each in (codes, W, scales, zeros)), strict=True):
        rows.copy_(grid.quantize(w, grid.spread(s, g_idx), grid.spread(z, g_idx), config.bits))
    return QuantizedWeight(codes, scales.to(torch.float16), zeros.to(torch.int32), g_idx, config, bias)


class Power:
    """The sum of squared inputs [in] over calibration tokens."""

    def __init__(self, columns: int, device: torch.device) -> None:
        self.sum = torch.zeros(columns, device=device)

    def add(self, x: Tensor) -> None:
        """Add the tokens of x [tokens, in]."""
        self.sum += x.float().square().sum(0)

    def tensors(self) -> list[Tensor]:
        """Return what adds up over batches."""
        return [self.sum]


class Rtn(Algorithm):
    """Round to nearest."""

    class Params(Options):
        """grid: "mse" searches the scale with the least square error; "minmax" covers every weight.
        activation_weighting: weigh the search by calibration inputs (needs calibration, only with "mse").
        """

        grid: Literal["minmax", "mse"] = "mse"
        activation_weighting: bool = False

    params: Params
    name = "rtn"
    description = "round to nearest; min/max or searched scales; no calibration needed"
    needs_calibration = False
    shares_calibration = True

    @property
    def uses_calibration(self) -> bool:
        """Only to weigh the search."""
        return self.params.activation_weighting and self.params.grid == "mse"

    def quantize_block(self, block: BlockContext) -> dict[str, QuantizedWeight]:
        """Round every linear of the block."""
        power: dict[str, Tensor] = {}  # by the first linear of each group
        if self.uses_calibration:
            firsts = [group[0] for group in block.groups]
            totals = block.accumulate(firsts, lambda name: Power(block.linears[name].weight.shape[1], block.device))
            power = {name: total.sum for name, total in totals.items() if bool(total.sum.any())}
            for name, square in power.items():
                if not bool(torch.isfinite(square).all()):
                    raise ModelError(f"the inputs of {name} hold NaN or Inf; its activations overflow.")
        results = {}
        for group in block.groups:
            for name in group:
                linear = block.linears[name]
                weight = round_to_nearest(
                    linear.weight, linear.config, self.params.grid, power.get(group[0]), linear.bias
                )
                W, difference = linear.weight.float(), weight.dequantize()
                error = difference.sub_(W).norm() / W.norm().clamp_min(1e-30)
                block.record(name, error=float(error))
                results[name] = weight
        return results


@hookimpl
def qcore_algorithms() -> list[type[Algorithm]]:
    return [Rtn]
