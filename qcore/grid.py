"""Grids: choosing scales and zeros, codes from weights and back.

Pure functions of tensors and the reference for every kernel. Notation as in the GPTQ paper (arXiv 2210.17323):
w ~ scale * (code - zero), code in [0, maxq], maxq = 2**bits - 1. Two rules hold for every grid chosen here:

- the scale is rounded to its storage dtype before a code is chosen, so the error an algorithm compensates is
  the error on disk;
- zero stays within [1, maxq]. Formats that store zero - 1 cannot hold 0 safely (docs/formats.md), and a grid
  that every format can hold costs nothing measurable.
"""

from __future__ import annotations

import torch
from torch import Tensor

from .errors import ModelError


def num_groups(in_features: int, group_size: int) -> int:
    """Groups in a row; the last one may be shorter. -1 means one."""
    return 1 if group_size == -1 else -(-in_features // group_size)


def group_index(in_features: int, group_size: int, device: torch.device | str = "cpu") -> Tensor:
    """Return g_idx int32 [in_features]: the group of each column when groups are consecutive."""
    columns = torch.arange(in_features, dtype=torch.int32, device=device)
    whole = group_size == -1 or group_size >= in_features  # a size from a file may be beyond int32
    return torch.zeros_like(columns) if whole else columns // group_size


def symmetric_zero(bits: int) -> int:
    """The zero point of a symmetric grid, 2**(bits-1)."""
    return 1 << (bits - 1)


def store_scale(scale: Tensor, dtype: torch.dtype, check: bool = True) -> Tensor:
    """Round a float32 scale to what `dtype` stores, still float32; never to zero.

    Raises ModelError when the scale is not finite in `dtype` (weights beyond its range). Looking makes the host wait for
    a GPU: who finds many grids passes check=False and calls `check_scales` on all of them.
    """
    tiny = torch.finfo(dtype).smallest_normal * torch.finfo(dtype).eps  # the smallest number above zero
    safe = torch.where(scale.abs() < tiny, torch.where(scale < 0, -tiny, tiny).to(scale.dtype), scale)
    stored = safe.to(dtype).to(scale.dtype)
    if check:
        check_scales(stored, dtype)
    return stored


def check_scales(scales: Tensor, dtype: torch.dtype = torch.float16) -> None:
    """Raise ModelError when scales rounded to `dtype` are not all finite."""
    if not bool(torch.isfinite(scales).all()):
        raise ModelError(f"the weights need a scale of more than {dtype} holds ({torch.finfo(dtype).max:g}).")


def minmax_grid(
    w: Tensor, bits: int, sym: bool, scale_dtype: torch.dtype = torch.float16, check: bool = True
) -> tuple[Tensor, Tensor]:
    """Return (scale, zero), float32 [...], for groups w [..., g]: the smallest grid that covers the group and 0."""
    maxq = 2**bits - 1
    low = w.amin(-1).clamp(max=0)
    high = w.amax(-1).clamp(min=0)
    if sym:
        scale = torch.maximum(-low, high) * (2 / maxq)
        scale = store_scale(torch.where(scale == 0, torch.ones_like(scale), scale), scale_dtype, check)
        return scale, torch.full_like(scale, symmetric_zero(bits))
    scale = (high - low) / maxq
    scale = store_scale(torch.where(scale == 0, torch.ones_like(scale), scale), scale_dtype, check)
    return scale, torch.round(-low / scale).clamp(1, maxq)


#: what `search_grid` tries: ranges from LOW to HIGH times the full one, then the best one's neighbours so many times
POINTS, LOW, HIGH, REFINE = 6, 0.5, 1.1, 2


def search_grid(
    w: Tensor,
    bits: int,
    sym: bool,
    importance: Tensor | None = None,
    scale_dtype: torch.dtype = torch.float16,
    check: bool = True,
) -> tuple[Tensor, Tensor]:
    """Return (scale, zero), float32 [rows], of the least sum(importance * (w - grid(w))**2) over each group.

    w: [rows, g]. importance: [g], None for all ones. Tried are POINTS ranges from LOW to HIGH times the full one,
    then REFINE times the two beside the best at half the distance, then the line that fits the codes found. A
    range only proposes codes: with the codes held, the scale they are judged with is the best one, in closed form. What
    comes out is never worse than the covering grid of `minmax_grid`.

    The symmetric range is full: scale = -extreme / 2**(bits-1), so that the largest weight lands on the one code that
    only one sign has (as in AutoRound and llama.cpp's Q4_0). The scale may therefore be negative.
    """
    maxq = 2**bits - 1
    weights = torch.ones_like(w[0]) if importance is None else importance / importance.mean().clamp(min=1e-30)
    weights = weights.clamp(min=1e-6)  # a column that hardly fires still keeps its weights within reach
    least, most = w.amin(-1).clamp(max=0), w.amax(-1).clamp(min=0)
    if sym:
        extreme = torch.where(most > -least, most, least)
        full = torch.where(extreme == 0, torch.ones_like(extreme), -extreme / symmetric_zero(bits))
        middle = torch.full_like(full, symmetric_zero(bits))
    else:
        full = torch.where(most > least, (most - least) / maxq, torch.ones_like(most))
        middle = torch.round(-least / full).clamp(1, maxq)
    v = w / full[:, None]  # from here on in units of the full range's step
    gain, ratio, scale, zero = torch.zeros_like(full), torch.ones_like(full), torch.ones_like(full), middle
    levels, scratch = torch.empty_like(v), torch.empty_like(v)

    def offer(r: Tensor | float, z: Tensor) -> None:
        """Take the codes of step r and zero z where, at their best scale, they leave less error."""
        nonlocal gain, ratio, scale, zero
        torch.div(v, r if isinstance(r, float) else r[:, None], out=levels).round_()
        if sym:
            levels.clamp_(-symmetric_zero(bits), symmetric_zero(bits) - 1)
        else:
            torch.maximum(levels, -z[:, None], out=levels)
            torch.minimum(levels, (maxq - z)[:, None], out=levels)
        product = torch.mul(v, levels, out=scratch) @ weights
        square = (levels.square_() @ weights).clamp(min=1e-12)
        found = product.square() / square  # how far below sum(weights * v**2) the error falls
        better = found > gain
        gain, scale = torch.where(better, found, gain), torch.where(better, product / square, scale)
        ratio, zero = torch.where(better, r, ratio), torch.where(better, z, zero)

    step = (HIGH - LOW) / (POINTS - 1)
    few_levels = bits <= 3  # where zero falls, and which side has one level more, weighs: all are tried
    for i in range(POINTS):
        for sign in (1, -1) if sym and few_levels else (1,):
            for shift in (0, -1, 1) if not sym and few_levels else (0,):
                offer(sign * (LOW + i * step), (middle + shift).clamp(1, maxq) if shift else middle)
    for _ in range(REFINE):
        step /= 2
        around, at = ratio, zero
        offer(around - step, at)
        offer(around + step, at)
    codes = quantize(v, scale[:, None], zero[:, None], bits)
    offer(*((scale, zero) if sym else _fit_line(v, codes, weights, scale, zero, maxq)))
    scale = store_scale(full * scale, scale_dtype, check)
    covering, covering_zero = minmax_grid(w, bits, sym, scale_dtype, check)
    worse = grid_loss(w, scale, zero, bits, weights) > grid_loss(w, covering, covering_zero, bits, weights)
    return torch.where(worse, covering, scale), torch.where(worse, covering_zero, zero)


def _fit_line(
    w: Tensor, codes: Tensor, weights: Tensor, scale: Tensor, zero: Tensor, maxq: int
) -> tuple[Tensor, Tensor]:
    """Return (scale, zero) of the weighted least-squares line w ~ a * code + b, where it rises; else what was."""
    total = weights.sum()
    mean_code, mean_w = codes @ weights / total, w @ weights / total
    centred = codes - mean_code[:, None]
    slope = (centred * w) @ weights / (centred.square() @ weights).clamp(min=1e-12)
    rises = slope > 0
    slope = torch.where(rises, slope, scale)
    return slope, torch.where(rises, torch.round(mean_code - mean_w / slope).clamp(1, maxq), zero)


def grid_loss(w: Tensor, scale: Tensor, zero: Tensor, bits: int, weights: Tensor) -> Tensor:
    """Return sum(weights * (w - grid(w))**2) over each group, [rows], for w [rows, g] and weights [g]."""
    error = torch.div(w, scale[:, None]).round_().add_(zero[:, None]).clamp_(0, 2**bits - 1)
    error.sub_(zero[:, None]).mul_(scale[:, None]).sub_(w)
    return error.square_() @ weights


def quantize(w: Tensor, scale: Tensor, zero: Tensor, bits: int) -> Tensor:
    """Return the nearest codes as float, same shape as w; scale and zero broadcast against it."""
    return torch.round(w / scale + zero).clamp_(0, 2**bits - 1)


def dequantize(codes: Tensor, scale: Tensor, zero: Tensor) -> Tensor:
    """Return scale * (codes - zero); scale and zero broadcast against codes."""
    return scale * (codes - zero)


def spread(per_group: Tensor, g_idx: Tensor) -> Tensor:
    """Give each column its group's value: [out, groups] -> [out, in]."""
    return per_group.index_select(1, g_idx.long())
