"""GPTQ's inner loop on GPUs, in Triton: the same function as `quantize_columns` of gptq.py.

Rows are independent once the factor is known. A program takes a few rows and all columns of a block, which stay in registers
from the first column to the last:

    columns of the block   | program 0 | program 1 | ...      a tile [columns, rows], rows contiguous in memory
    |                      |           |           |
    v  one after another   |           |           |

Where a group begins its grid is searched on the tile as it stands. Groups that do not lie within one block, and those of static
grids, are searched from memory by a kernel of their own. Importing this imports triton.
"""

from __future__ import annotations

import hashlib
from functools import cache
from pathlib import Path

import torch
import triton
import triton.language as tl
from torch import Tensor

from qcore import BackendError, QuantConfig

ROWS, WARPS = 8, 1  # of a program at up to 128 columns: 32 registers of a tile in each thread, and sums need no barrier
CHUNK = 128  # columns of a long group looked at together
SEARCH = {"none": 0, "minmax": 1, "mse": 2}

# ---- small things ----------------------------------------------------------------------------------------------------


@triton.jit
def _round(x):
    """To nearest, ties to even, for |x| < 2^22: adding 1.5 * 2^23 leaves no room for a fraction."""
    return (x + 12582912.0) - 12582912.0


@triton.jit
def _between(x, low, high):
    return tl.minimum(tl.maximum(x, low), high)


@triton.jit
def _half(scale):
    """Round to what float16 stores, never to zero."""
    tiny: tl.constexpr = 5.960464477539063e-08
    safe = tl.where(tl.abs(scale) < tiny, tl.where(scale < 0, -tiny, tiny), scale)
    return safe.to(tl.float16).to(tl.float32)


@triton.jit
def _take(W, importance, start, stop, r, rows, ldw, C: tl.constexpr):
    """Columns [start, start + C) of W and their importance; zero from `stop` on."""
    c = start + tl.arange(0, C)
    inside = c < stop
    where = W + c.to(tl.int64)[:, None] * ldw + r[None, :]
    tile = tl.load(where, mask=inside[:, None] & (r < rows)[None, :], other=0.0)
    return tile, tl.load(importance + c, mask=inside, other=0.0), inside


# ---- what a search asks of the columns of a group: of a tile, or (LONG) of memory, chunk by chunk ------------------------
#
# A tile's columns outside the group hold zeros and weigh nothing. `mean` is that of the importance over the group.


@triton.jit
def _weights(importance, inside, mean):
    return tl.where(inside, tl.maximum(importance / mean, 1e-6), 0.0)


@triton.jit
def _range(tile, W, importance, first, last, r, rows, ldw, LONG: tl.constexpr, C: tl.constexpr, R: tl.constexpr):
    """The smallest and the largest weight of each row, 0 included, and the mean importance."""
    if LONG:
        low, high, total = tl.zeros([R], tl.float32), tl.zeros([R], tl.float32), tl.sum(tl.zeros([C], tl.float32))
        for start in range(first, last, C):
            chunk, some, _ = _take(W, importance, start, last, r, rows, ldw, C)
            low, high = tl.minimum(low, tl.min(chunk, 0)), tl.maximum(high, tl.max(chunk, 0))
            total += tl.sum(some)
    else:
        low, high = tl.minimum(tl.min(tile, 0), 0.0), tl.maximum(tl.max(tile, 0), 0.0)
        total = tl.sum(importance)
    return low, high, tl.maximum(total / (last - first), 1e-30)


@triton.jit
def _levels_of(tile, weight, per_step, low, high, unit):
    """Weighted sums over a tile: of w * level and of level^2; w in units of the full range's step."""
    level = _round(_between(tile * per_step[None, :], low[None, :], high[None, :]))
    weighed = level * weight[:, None]
    return tl.sum(tile * unit[None, :] * weighed, 0), tl.sum(level * weighed, 0)


@triton.jit
def _levels(tile, weight, per_step, low, high, unit, W, importance, mean, first, last, r, rows, ldw,
            LONG: tl.constexpr, C: tl.constexpr, R: tl.constexpr):  # fmt: skip
    if LONG:
        product, square = tl.zeros([R], tl.float32), tl.zeros([R], tl.float32)
        for start in range(first, last, C):
            chunk, some, inside = _take(W, importance, start, last, r, rows, ldw, C)
            products, squares = _levels_of(chunk, _weights(some, inside, mean), per_step, low, high, unit)
            product += products
            square += squares
    else:
        product, square = _levels_of(tile, weight, per_step, low, high, unit)
    return product, square


@triton.jit
def _line_of(tile, weight, per_step, zero, unit, maxq, mean_code):
    """Weighted sums over a tile: of weights, codes, w, (code - mean) * w and (code - mean)^2."""
    v = tile * unit[None, :]
    code = _round(_between(tile * per_step[None, :] + zero[None, :], 0.0, maxq))
    centred = code - mean_code[None, :]
    w = weight[:, None]
    return tl.sum(code * w, 0), tl.sum(v * w, 0), tl.sum(centred * v * w, 0), tl.sum(centred * centred * w, 0)


@triton.jit
def _line(tile, weight, per_step, zero, unit, maxq, mean_code, W, importance, mean, first, last, r, rows, ldw,
          LONG: tl.constexpr, C: tl.constexpr, R: tl.constexpr):  # fmt: skip
    if LONG:
        codes, values = tl.zeros([R], tl.float32), tl.zeros([R], tl.float32)
        products, squares = tl.zeros([R], tl.float32), tl.zeros([R], tl.float32)
        total = tl.sum(tl.zeros([C], tl.float32))
        for start in range(first, last, C):
            chunk, some, inside = _take(W, importance, start, last, r, rows, ldw, C)
            weight = _weights(some, inside, mean)
            a, b, c, d = _line_of(chunk, weight, per_step, zero, unit, maxq, mean_code)
            codes += a
            values += b
            products += c
            squares += d
            total += tl.sum(weight)
    else:
        codes, values, products, squares = _line_of(tile, weight, per_step, zero, unit, maxq, mean_code)
        total = tl.sum(weight)
    return codes / total, values / total, products, squares


@triton.jit
def _loss_of(tile, weight, scale, zero, maxq):
    level = _round(_between(tile * (1.0 / scale)[None, :], -zero[None, :], maxq - zero[None, :]))
    error = level * scale[None, :] - tile
    return tl.sum(error * error * weight[:, None], 0)


@triton.jit
def _loss(tile, weight, scale, zero, maxq, W, importance, mean, first, last, r, rows, ldw,
          LONG: tl.constexpr, C: tl.constexpr, R: tl.constexpr):  # fmt: skip
    if LONG:
        loss = tl.zeros([R], tl.float32)
        for start in range(first, last, C):
            chunk, some, inside = _take(W, importance, start, last, r, rows, ldw, C)
            loss += _loss_of(chunk, _weights(some, inside, mean), scale, zero, maxq)
    else:
        loss = _loss_of(tile, weight, scale, zero, maxq)
    return loss


# ---- grids: see qcore/grid.py for what each step is there for --------------------------------------------------------


@triton.jit
def _cover(low, high, maxq, middle, SYM: tl.constexpr):
    """The smallest grid that covers the weights and 0."""
    if SYM:
        scale = tl.maximum(-low, high) * (2.0 / maxq)
    else:
        scale = (high - low) / maxq
    scale = _half(tl.where(scale == 0, 1.0, scale))
    if SYM:
        zero = tl.zeros_like(scale) + middle
    else:
        zero = _round(_between(-low / scale, 1.0, maxq))
    return scale, zero


@triton.jit
def _search(tile, some, W, importance, first, last, r, rows, ldw, maxq, middle,
            SYM: tl.constexpr, MSE: tl.constexpr, FEW: tl.constexpr, LONG: tl.constexpr, C: tl.constexpr, R: tl.constexpr):  # fmt: skip
    """The grid of the group at columns [first, last): the covering one, or (MSE) the one of least weighted error.

    tile: what it looks at, zero outside the group; some: the importance there. With LONG both are placeholders.
    """
    low, high, mean = _range(tile, W, some if not LONG else importance, first, last, r, rows, ldw, LONG, C, R)
    covering, covering_zero = _cover(low, high, maxq, middle, SYM)
    if not MSE:
        return covering, covering_zero
    weight = tl.where(some > 0, tl.maximum(some / mean, 1e-6), 0.0)
    if SYM:
        extreme = tl.where(high > -low, high, low)
        full = tl.where(extreme == 0, 1.0, -extreme / middle)
        at_start = tl.zeros_like(full) + middle
        VARIANTS: tl.constexpr = 2 if FEW else 1  # both signs
    else:
        full = tl.where(high > low, (high - low) / maxq, 1.0)
        at_start = _round(_between(-low / full, 1.0, maxq))
        VARIANTS: tl.constexpr = 3 if FEW else 1  # three zeros
    POINTS: tl.constexpr = 6
    unit = 1.0 / full
    gain, ratio = tl.zeros_like(full), tl.zeros_like(full) + 1.0
    best, zero = ratio, at_start
    around, at = ratio, zero
    # 6 ranges, then two near the best at half the distance, twice, then the line that fits the codes found
    for offer in range(POINTS * VARIANTS + 5):
        if offer < POINTS * VARIANTS:
            point = 0.5 + 0.12 * (offer // VARIANTS)
            variant = offer % VARIANTS
            if SYM:
                step = tl.zeros_like(full) + tl.where(variant == 0, point, -point)
                z = at_start
            else:
                step = tl.zeros_like(full) + point
                shift = tl.where(variant == 0, 0.0, tl.where(variant == 1, -1.0, 1.0))
                z = _between(at_start + shift, 1.0, maxq)
        elif offer < POINTS * VARIANTS + 4:
            turn = offer - POINTS * VARIANTS
            # where, not if: a name that only an if gives another name's value is not carried to the next round of the loop
            around = tl.where(turn % 2 == 0, ratio, around)
            at = tl.where(turn % 2 == 0, zero, at)
            distance = tl.where(turn < 2, 0.06, 0.03)
            step = around + tl.where(turn % 2 == 0, -distance, distance)
            z = at
        elif SYM:
            step, z = best, zero
        else:
            per_step = unit / best
            mean_code, mean_w, _, _ = _line(tile, weight, per_step, zero, unit, maxq, tl.zeros_like(full),
                                            W, importance, mean, first, last, r, rows, ldw, LONG, C, R)  # fmt: skip
            _, _, products, squares = _line(tile, weight, per_step, zero, unit, maxq, mean_code,
                                            W, importance, mean, first, last, r, rows, ldw, LONG, C, R)  # fmt: skip
            slope = products / tl.maximum(squares, 1e-12)
            step = tl.where(slope > 0, slope, best)
            z = tl.where(slope > 0, _round(_between(mean_code - mean_w / step, 1.0, maxq)), zero)
        if SYM:
            bottom, top = tl.zeros_like(z) - middle, tl.zeros_like(z) + (middle - 1)
        else:
            bottom, top = -z, maxq - z
        product, square = _levels(tile, weight, unit / step, bottom, top, unit,
                                  W, importance, mean, first, last, r, rows, ldw, LONG, C, R)  # fmt: skip
        square = tl.maximum(square, 1e-12)
        found = product * product / square  # how far below sum(weight * w^2) the error falls
        better = found > gain
        gain = tl.where(better, found, gain)
        best = tl.where(better, product / square, best)
        ratio = tl.where(better, step, ratio)
        zero = tl.where(better, z, zero)
    scale = _half(full * best)
    loss = _loss(tile, weight, scale, zero, maxq, W, importance, mean, first, last, r, rows, ldw, LONG, C, R)
    least = _loss(
        tile, weight, covering, covering_zero, maxq, W, importance, mean, first, last, r, rows, ldw, LONG, C, R
    )
    return tl.where(loss > least, covering, scale), tl.where(loss > least, covering_zero, zero)


@triton.jit
def grids_kernel(W, importance, group_of, scales, zeros, rows, reach, size, ldw, ldg, maxq, middle,
                 SYM: tl.constexpr, MSE: tl.constexpr, FEW: tl.constexpr, C: tl.constexpr, R: tl.constexpr):  # fmt: skip
    """Program (i, j) finds the grids of the i-th R rows in the j-th group of `size` columns."""
    r = tl.program_id(0) * R + tl.arange(0, R)
    first = tl.program_id(1) * size
    last = tl.minimum(first + size, reach)
    nothing, none = tl.zeros([C, R], tl.float32), tl.zeros([C], tl.float32)
    scale, zero = _search(
        nothing, none, W, importance, first, last, r, rows, ldw, maxq, middle, SYM, MSE, FEW, True, C, R
    )
    group = tl.load(group_of + first).to(tl.int64)
    tl.store(scales + group * ldg + r, scale, mask=r < rows)
    tl.store(zeros + group * ldg + r, zero, mask=r < rows)


@triton.jit
def columns_kernel(W, U, importance, group_of, scales, zeros, codes, Err, rows, columns, size, ldw, ldu, ldg, ldc, lde,
                   maxq, middle, SYM: tl.constexpr, SEARCH: tl.constexpr, FEW: tl.constexpr,
                   C: tl.constexpr, R: tl.constexpr):  # fmt: skip
    """Program i quantizes the i-th R rows of a block; with SEARCH it finds the grid where a group begins."""
    r = tl.program_id(0) * R + tl.arange(0, R)
    c = tl.arange(0, C)
    live = r < rows
    tile, some, _ = _take(W, importance, 0, columns, r, rows, ldw, C)
    scale, zero = tl.zeros([R], tl.float32) + 1.0, tl.zeros([R], tl.float32)
    row, diagonal = tl.load(U + c, mask=c < columns, other=0.0), tl.load(U)  # of U at i, read one step ahead
    code_at, err_at = codes + r, Err + r
    for i in range(0, columns):
        next_row = U + tl.minimum(i + 1, columns - 1) * ldu
        row_ahead = tl.load(next_row + c, mask=c < columns, other=0.0)
        diagonal_ahead = tl.load(next_row + tl.minimum(i + 1, columns - 1))
        if SEARCH > 0:
            if i % size == 0:
                last = tl.minimum(i + size, columns)
                inside = (c >= i) & (c < last)
                scale, zero = _search(tl.where(inside[:, None], tile, 0.0), tl.where(inside, some, 0.0), W, importance, i,
                                      last, r, rows, ldw, maxq, middle, SYM, SEARCH == 2, FEW, False, C, R)  # fmt: skip
                group = tl.load(group_of + i).to(tl.int64)
                tl.store(scales + group * ldg + r, scale, mask=live)
                tl.store(zeros + group * ldg + r, zero, mask=live)
        else:
            group = tl.load(group_of + i).to(tl.int64)
            scale = tl.load(scales + group * ldg + r, mask=live, other=1.0)
            zero = tl.load(zeros + group * ldg + r, mask=live, other=0.0)
        w = tl.sum(tl.where((c == i)[:, None], tile, 0.0), 0) + scale * zero
        code = _round(_between(w * (1.0 / scale), 0.0, maxq))
        err = (w - scale * code) / diagonal
        tl.store(code_at, code.to(tl.uint8), mask=live)
        tl.store(err_at, err, mask=live)
        code_at += ldc
        err_at += lde
        tile -= row[:, None] * err[None, :]  # U is upper: its row holds zeros for the columns that are done
        row, diagonal = row_ahead, diagonal_ahead


# ---- the binding -----------------------------------------------------------------------------------------------------


def quantize_columns(
    W: Tensor,
    U: Tensor,
    importance: Tensor,
    group_of: Tensor,
    scales: Tensor,
    zeros: Tensor,
    codes: Tensor,
    Err: Tensor,
    size: int,
    config: QuantConfig,
    search: str,
) -> None:
    """Quantize columns and find grids; see `quantize_columns` in gptq.py. W is left as it is."""
    for name, tensor in {"W": W, "U": U, "scales": scales, "zeros": zeros, "Err": Err}.items():
        if tensor.dtype != torch.float32 or tensor.stride(-1) != 1:
            raise BackendError(
                f"the Triton GPTQ solver needs {name} as float32, rows contiguous; found {tensor.dtype}, strides "
                f"{list(tensor.stride())}."
            )
    importance, group_of = importance.contiguous(), group_of.contiguous()
    columns, (reach, rows) = len(codes), W.shape
    maxq, middle = float(config.maxq), float(2 ** (config.bits - 1))
    few, mse = config.bits <= 3, search == "mse"
    if search != "none" and (columns == 0 or size > columns):
        groups = -(-reach // size) if columns == 0 else 1
        grids_kernel[(triton.cdiv(rows, ROWS), groups)](
            W, importance, group_of, scales, zeros, rows, reach, size, W.stride(0), scales.stride(0), maxq, middle,
            SYM=config.sym, MSE=mse, FEW=few, C=CHUNK, R=ROWS,
            num_warps=WARPS, enable_fp_fusion=True,
        )  # fmt: skip
        search = "none"
    if columns:
        C = triton.next_power_of_2(max(columns, 16))
        R = max(1, ROWS * 128 // max(C, 128))
        columns_kernel[(triton.cdiv(rows, R),)](
            W, U, importance, group_of, scales, zeros, codes, Err, rows, columns, size, W.stride(0), U.stride(0),
            scales.stride(0), codes.stride(0), Err.stride(0), maxq, middle,
            SYM=config.sym, SEARCH=SEARCH[search], FEW=few, C=C, R=R,
            num_warps=WARPS, enable_fp_fusion=True,
        )  # fmt: skip


@cache
def label() -> str:
    """What tells one version's results from another's: triton's, and the hash of this file."""
    return f"triton {triton.__version__} {hashlib.sha256(Path(__file__).read_bytes()).hexdigest()[:16]}"
