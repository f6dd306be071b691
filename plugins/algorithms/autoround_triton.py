"""AutoRound's step on GPUs, in Triton: `signed_step` of autoround.py and the next quantized weight, in one pass over memory.

A group's range factors depend on all of its weights and on nothing else, so a program takes some groups whole:

    row 0   | group 0 | group 1 | ...      programs take R groups each, counted along the rows,
    row 1   | group n | ...                as a tile [R, C], C >= group_size

It reads W, V and the gradient, moves V, alpha and beta, and writes the weight that follows from them. Divisions round like
torch's and nothing is fused, so that codes frozen by torch are those that were tuned. Also here: rounding to 8-bit floats, turned.
Importing this imports triton.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

TILE = 2048  # weights of a program, where a group is not longer


@triton.jit
def _round(x):
    """To nearest, ties to even, for |x| < 2^22: adding 1.5 * 2^23 leaves no room for a fraction."""
    return (x + 12582912.0) - 12582912.0


@triton.jit
def _between(x, low, high):
    return tl.minimum(tl.maximum(x, low), high)


@triton.jit
def _sign(x):
    return tl.where(x > 0, 1.0, tl.where(x < 0, -1.0, 0.0))


@triton.jit
def _grid(low, high, alpha, beta, maxq, middle, SYM: tl.constexpr):
    """`ranged_grid` of autoround.py: s and z."""
    if SYM:
        s = tl.div_rn(beta * (high - low), maxq + tl.zeros_like(low))
    else:
        s = tl.div_rn(beta * high - alpha * low, maxq + tl.zeros_like(low))
    size = _between(tl.abs(s), 5.960464477539063e-08, 65504.0)
    s = tl.where(s < 0, -size, size).to(tl.float16).to(tl.float32)
    if SYM:
        z = tl.zeros_like(s) + middle
    else:
        z = _between(_round(_between(tl.div_rn(-alpha * low, s), -4e6, 4e6)), 1.0, maxq)
    return s, z


@triton.jit
def _levels(ratio, V, z, maxq):
    """`rounded` of autoround.py: the levels, and the same before clipping. Beyond 2^22 all are clipped alike."""
    free = _round(_between(ratio + V, -4e6, 4e6))
    return _between(free, -z[:, None], (maxq - z)[:, None]), free


@triton.jit
def step_kernel(W, V, G, Q, low, high, alpha, beta, groups_in_all, groups, size, columns, ldw, lr, minmax_lr, maxq, middle,
                SYM: tl.constexpr, MINMAX: tl.constexpr, C: tl.constexpr, R: tl.constexpr):  # fmt: skip
    """Program i takes the i-th R groups. W, V: [out, groups, size]; G, Q: [out, columns]; the others: [out, groups]."""
    n = tl.program_id(0) * R + tl.arange(0, R)
    live = n < groups_in_all
    row, first = (n // groups).to(tl.int64), (n % groups) * size
    c = tl.arange(0, C)
    inside = live[:, None] & (c < size)[None, :] & (first[:, None] + c[None, :] < columns)
    own = (row * ldw + first)[:, None] + c[None, :]
    shared = (row * columns + first)[:, None] + c[None, :]
    w = tl.load(W + own, mask=inside, other=0.0).to(tl.float32)
    v = tl.load(V + own, mask=inside, other=0.0).to(tl.float32)
    g = tl.load(G + shared, mask=inside, other=0.0).to(tl.float32)
    bottom, top = tl.load(low + n, mask=live, other=-1.0), tl.load(high + n, mask=live, other=1.0)
    a, b = tl.load(alpha + n, mask=live, other=1.0), tl.load(beta + n, mask=live, other=1.0)
    s, z = _grid(bottom, top, a, b, maxq, middle, SYM)
    ratio = tl.div_rn(w, s[:, None] + tl.zeros_like(w))
    level, free = _levels(ratio, v, z, maxq)
    passed = tl.where(level == free, g, 0.0)
    v = _between(v - _sign(passed * s[:, None]) * lr, -0.5, 0.5)
    tl.store(V + own, v.to(V.dtype.element_ty), mask=inside)
    v = v.to(V.dtype.element_ty).to(tl.float32)
    if MINMAX:
        grad_s = tl.sum(level * g - passed * ratio, 1)
        if SYM:
            b -= _sign(grad_s * (top - bottom)) * minmax_lr
        else:
            grad_z = s * tl.sum(passed - g, 1)
            through_s = grad_s + grad_z * a * bottom / (s * s)
            towards_a = _sign((-through_s / maxq - grad_z / s) * bottom)
            b -= _sign(through_s / maxq * top) * minmax_lr
            a = _between(a - towards_a * minmax_lr, 0.0, 2.0)
            tl.store(alpha + n, a, mask=live)
        b = _between(b, 0.0, 2.0)
        tl.store(beta + n, b, mask=live)
        s, z = _grid(bottom, top, a, b, maxq, middle, SYM)
        ratio = tl.div_rn(w, s[:, None] + tl.zeros_like(w))
    level, _ = _levels(ratio, v, z, maxq)
    tl.store(Q + shared, (level * s[:, None]).to(Q.dtype.element_ty), mask=inside)


def step(
    W: Tensor,
    V: Tensor,
    ranges: tuple[Tensor, Tensor, Tensor, Tensor],
    G: Tensor,
    Q: Tensor,
    lr: float,
    minmax_lr: float | None,
    bits: int,
    sym: bool,
) -> None:
    """Take one step in place and write the weight that follows to Q.

    W, V: [out, groups, g], any float dtype. ranges: low, high, alpha, beta, float32 [out, groups, 1]. G: [out, in], the gradient
    of the quantized weight. Q: [out, in], in any float dtype. minmax_lr None: ranges stay.
    """
    out, groups, size = W.shape
    C = triton.next_power_of_2(size)
    R = max(1, TILE // C)
    step_kernel[(triton.cdiv(out * groups, R),)](
        W, V, G.contiguous(), Q, *ranges, out * groups, groups, size, G.shape[1], groups * size, lr, minmax_lr or 0.0,
        float(2**bits - 1), float(2 ** (bits - 1)), SYM=sym, MINMAX=minmax_lr is not None, C=C, R=R,
        num_warps=min(16, max(4, R * C // 512)), enable_fp_fusion=False,
    )  # fmt: skip


# ---- 8-bit floats ----------------------------------------------------------------------------------------------------


@triton.jit
def columns8_kernel(X, factor, Y, rows, columns, top, SCALED: tl.constexpr, R: tl.constexpr, C: tl.constexpr):
    """Program (i, j) turns the tile [R, C] at row i * R, column j * C. X: [rows, columns]; factor: []; Y: [columns, rows]."""
    r = tl.program_id(0) * R + tl.arange(0, R)
    c = tl.program_id(1) * C + tl.arange(0, C)
    inside = (r < rows)[:, None] & (c < columns)[None, :]
    x = tl.load(X + r.to(tl.int64)[:, None] * columns + c[None, :], mask=inside, other=0.0).to(tl.float32)
    if SCALED:
        x *= tl.load(factor)
    x = _between(x, -top, top).to(Y.dtype.element_ty)
    tl.store(Y + c.to(tl.int64)[:, None] * rows + r[None, :], tl.trans(x), mask=tl.trans(inside))


def columns8(x: Tensor, factor: Tensor | None, dtype: torch.dtype) -> Tensor:
    """`columns8` of autoround_device.py, in one pass: x [rows, columns] to [columns, rows]."""
    x = x.contiguous()
    rows, columns = x.shape
    Y = torch.empty(columns, rows, dtype=dtype, device=x.device)
    R, C = 128, 64
    columns8_kernel[(triton.cdiv(rows, R), triton.cdiv(columns, C))](
        x, x if factor is None else factor, Y, rows, columns, torch.finfo(dtype).max, SCALED=factor is not None, R=R, C=C,
        num_warps=4,
    )  # fmt: skip
    return Y
