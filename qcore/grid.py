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
    tiny = torch.finfo(dtype).smallest_normal
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
    steps: int = 40,
    shrink: float = 0.8,
    norm: float = 2.0,
) -> tuple[Tensor, Tensor]:
    """Return (scale, zero), float32 [...], that minimise sum(importance * |w - grid(w)|**norm) over each group.

    w: [..., g]. importance: broadcastable to w, None for all ones. Candidates shrink the covering grid by up to
    `shrink` in `steps` steps. The symmetric search tries the scale as -extreme / 2**(bits-1), so that the largest
    weight lands on the one code that only one sign has (the full range of AutoRound and of llama.cpp's Q4_0):
    the scale may be negative. The covering grid of `minmax_grid` is always among the candidates.
    """
    maxq = 2**bits - 1
    low, high = w.amin(-1).clamp(max=0), w.amax(-1).clamp(min=0)
    best_scale, best_zero = minmax_grid(w, bits, sym, scale_dtype)
    best_loss = grid_loss(w, best_scale, best_zero, bits, importance, norm)
    if sym:
        extreme = torch.where(high > -low, high, low)
        full = -extreme / symmetric_zero(bits)
    for step in range(steps):
        ratio = 1 - shrink * step / steps
        if sym:
            scale = store_scale(torch.where(full == 0, torch.ones_like(full), full * ratio), scale_dtype)
            candidates = [(scale, best_zero)]
        else:
            scale = (high - low) * (ratio / maxq)
            scale = store_scale(torch.where(scale == 0, torch.ones_like(scale), scale), scale_dtype)
            exact = -low * ratio / scale
            candidates = [(scale, (torch.round(exact) + shift).clamp(1, maxq)) for shift in _zero_shifts(bits)]
        for scale, zero in candidates:
            loss = grid_loss(w, scale, zero, bits, importance, norm)
            better = loss < best_loss
            best_loss = torch.where(better, loss, best_loss)
            best_scale = torch.where(better, scale, best_scale)
            best_zero = torch.where(better, zero, best_zero)
    return best_scale, best_zero


def _zero_shifts(bits: int) -> tuple[int, ...]:
    """Zero points beside the rounded one are worth trying where a step is coarse."""
    return (-1, 0, 1) if bits <= 3 else (0,)


def grid_loss(
    w: Tensor, scale: Tensor, zero: Tensor, bits: int, importance: Tensor | None = None, norm: float = 2.0
) -> Tensor:
    """Return sum over the group of importance * |w - grid(w)|**norm, [...], for w [..., g]."""
    error = dequantize(quantize(w, scale[..., None], zero[..., None], bits), scale[..., None], zero[..., None]) - w
    error = error.square() if norm == 2.0 else error.abs().pow(norm)
    return (error if importance is None else error * importance).sum(-1)


def quantize(w: Tensor, scale: Tensor, zero: Tensor, bits: int) -> Tensor:
    """Return the nearest codes as float, same shape as w; scale and zero broadcast against it."""
    return torch.round(w / scale + zero).clamp_(0, 2**bits - 1)


def dequantize(codes: Tensor, scale: Tensor, zero: Tensor) -> Tensor:
    """Return scale * (codes - zero); scale and zero broadcast against codes."""
    return scale * (codes - zero)


def spread(per_group: Tensor, g_idx: Tensor) -> Tensor:
    """Give each column its group's value: [out, groups] -> [out, in]."""
    return per_group.index_select(1, g_idx.long())
