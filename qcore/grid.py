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
    return torch.zeros_like(columns) if group_size == -1 else columns // group_size


def symmetric_zero(bits: int) -> int:
    """The zero point of a symmetric grid, 2**(bits-1)."""
    return 1 << (bits - 1)


def store_scale(scale: Tensor, dtype: torch.dtype) -> Tensor:
    """Round a float32 scale to what `dtype` stores, still float32; never to zero.

    Raises ModelError when the scale is not finite in `dtype` (weights beyond its range).
    """
    tiny = torch.finfo(dtype).smallest_normal * torch.finfo(dtype).eps  # the smallest number above zero
    safe = torch.where(scale.abs() < tiny, torch.where(scale < 0, -tiny, tiny).to(scale.dtype), scale)
    stored = safe.to(dtype).to(scale.dtype)
    if not bool(torch.isfinite(stored).all()):
        raise ModelError(f"the weights need a scale of {float(scale.abs().max()):.3g}, more than {dtype} holds.")
    return stored


def minmax_grid(w: Tensor, bits: int, sym: bool, scale_dtype: torch.dtype = torch.float16) -> tuple[Tensor, Tensor]:
    """Return (scale, zero), float32 [...], for groups w [..., g]: the smallest grid that covers the group and 0."""
    maxq = 2**bits - 1
    low = w.amin(-1).clamp(max=0)
    high = w.amax(-1).clamp(min=0)
    if sym:
        scale = torch.maximum(-low, high) * (2 / maxq)
        scale = store_scale(torch.where(scale == 0, torch.ones_like(scale), scale), scale_dtype)
        return scale, torch.full_like(scale, symmetric_zero(bits))
    scale = (high - low) / maxq
    scale = store_scale(torch.where(scale == 0, torch.ones_like(scale), scale), scale_dtype)
    return scale, torch.round(-low / scale).clamp(1, maxq)


def search_grid(
    w: Tensor,
    bits: int,
    sym: bool,
    importance: Tensor | None = None,
    scale_dtype: torch.dtype = torch.float16,
    points: int = 20,
    low: float = 0.5,
    high: float = 1.1,
    refine: int = 1,
) -> tuple[Tensor, Tensor]:
    """Return (scale, zero), float32 [rows], of the least sum(importance * (w - grid(w))**2) over each group.

    w: [rows, g]. importance: [g], None for all ones. Tried are `points` ranges from `low` to `high` times the full
    one, then `refine` closed-form steps: with the codes held, the best scale (and zero) is a weighted line fit. A
    candidate only ever replaces a worse one; the covering grid of `minmax_grid` is the first.

    The symmetric range is full: scale = -extreme / 2**(bits-1), so that the largest weight lands on the one code that
    only one sign has (as in AutoRound and llama.cpp's Q4_0). The scale may therefore be negative.
    """
    maxq = 2**bits - 1
    weights = torch.ones_like(w[0]) if importance is None else importance / importance.mean().clamp(min=1e-30)
    weights = weights.clamp(min=1e-6)  # a column that hardly fires still keeps its weights within reach
    scale, zero = minmax_grid(w, bits, sym, scale_dtype)
    best = grid_loss(w, scale, zero, bits, weights)

    def offer(s: Tensor, z: Tensor) -> None:
        nonlocal best, scale, zero
        s = store_scale(s, scale_dtype)
        loss = grid_loss(w, s, z, bits, weights)
        better = loss < best
        best, scale, zero = torch.where(better, loss, best), torch.where(better, s, scale), torch.where(better, z, zero)

    # low + i * step rather than linspace: the same floats on every device
    ratios = [low + (high - low) * i / max(points - 1, 1) for i in range(points)]
    least, most = w.amin(-1).clamp(max=0), w.amax(-1).clamp(min=0)
    if sym:
        extreme = torch.where(most > -least, most, least)
        full = torch.where(extreme == 0, torch.ones_like(extreme), -extreme / symmetric_zero(bits))
        for ratio in ratios:
            offer(full * ratio, zero)
            if bits <= 3:  # few levels: which side has the extra one weighs, so both are tried
                offer(full * -ratio, zero)
    else:
        span = torch.where(most > least, (most - least) / maxq, torch.ones_like(most))
        for ratio in ratios:
            exact = torch.round(-least * ratio / store_scale(span * ratio, scale_dtype))
            for shift in (0, -1, 1) if bits <= 3 else (0,):  # few levels: where zero falls weighs
                offer(span * ratio, (exact + shift).clamp(1, maxq))
    for _ in range(refine):
        if not sym:
            offer(*_fit_line(w, quantize(w, scale[:, None], zero[:, None], bits), weights, scale, zero, maxq))
        centred = quantize(w, scale[:, None], zero[:, None], bits) - zero[:, None]
        fitted = (centred * w) @ weights / (centred.square() @ weights).clamp(min=1e-12)
        offer(torch.where(fitted == 0, scale, fitted), zero)
    return scale, zero


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
