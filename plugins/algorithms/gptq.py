"""GPTQ: one column after another, the error of each spread over the columns still to come (arXiv 2210.17323).

Letters as in the paper: W [out, in] the weight, X [tokens, in] the inputs, H [in, in] = X'X / tokens the Hessian of the
layer-wise squared error, U the upper Cholesky factor of its inverse, Err the scaled errors. What differs from common
implementations, and the ablation that decided each default, is in docs/algorithms/gptq.md. Not here: forward
passes, devices, files.
"""

from __future__ import annotations

import importlib.util
import logging
import os
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import cache, partial
from typing import Any, Literal

import torch
from pydantic import Field
from torch import Tensor

from qcore import (
    Algorithm,
    BlockContext,
    ConfigError,
    ModelError,
    Options,
    QuantConfig,
    QuantizedWeight,
    Task,
    grid,
    hookimpl,
)

from .. import cpu_library
from . import gptq_native
from .rtn import find_grid, round_to_nearest

#: Hessians gathered in one replay; a layer of many experts takes several
HESSIAN_BYTES = 4 * 10**9
#: elements of a weight whose error is found together
AT_ONCE = 2**26
#: a larger Hessian leaves a GPU for the host while its factor, as large, is there
HOST_BYTES = 2**30

# ---- the Hessian -----------------------------------------------------------------------------------------------------


class Hessian:
    """Accumulates X'X [in, in] in float32 over batches, and, for float targets, X_float'X.

    X'X is symmetric, so only panels on and right of the diagonal are computed. Inputs of 16 bits go to a GPU's tensor cores
    as they are: their products are exact in float32, and so are the sums kept.
    """

    PANEL = 256  # columns; narrower panels save more of the lower half, wider ones multiply faster
    PANELS = 4  # of tensor cores, which want large products

    def __init__(self, columns: int, device: torch.device, with_cross: bool = False) -> None:
        self.sum = torch.zeros(columns, columns, device=device)
        self.cross = torch.zeros(columns, columns, device=device) if with_cross else None
        self.tokens = torch.zeros((), dtype=torch.int64)  # on the host, which counts ahead of a GPU

    def add(self, X: Tensor, X_float: Tensor | None = None) -> None:
        """Add the tokens of X [tokens, in]; X_float are the same tokens in the float model."""
        columns = X.shape[1]
        panel = max(self.PANEL, -(-columns // self.PANELS)) if on_tensor_cores(X) else self.PANEL
        X = X if on_tensor_cores(X) else X.float()
        for start in range(0, columns, panel):
            stop = min(start + panel, columns)
            add_product(self.sum[start:stop, start:], X[:, start:stop].t(), X[:, start:])
            if self.cross is not None and X_float is not None:
                add_product(self.cross[start:stop], X_float[:, start:stop].to(X.dtype).t(), X)
        self.tokens += X.shape[0]

    def tensors(self) -> list[Tensor]:
        """Return what adds up over batches."""
        return [self.sum, self.tokens] if self.cross is None else [self.sum, self.tokens, self.cross]

    def finish(self) -> tuple[Tensor, Tensor | None]:
        """Return H = X'X / tokens and C = X_float'X / tokens (or None), in the memory of the sums, which are gone."""
        H, C, tokens = self.sum, self.cross, max(1, int(self.tokens))
        self.sum, self.cross = H.new_empty(0), None  # who holds this object does not hold their memory
        for start in range(0, len(H), self.PANEL):
            stop = min(start + self.PANEL, len(H))
            H[start:stop, start:stop].triu_().add_(H[start:stop, start:stop].triu(1).t())
            H[stop:, start:stop] = H[start:stop, stop:].t()
        return H.div_(tokens), None if C is None else C.div_(tokens)


def on_tensor_cores(X: Tensor) -> bool:
    """Whether products of X with float32 sums run on a GPU's tensor cores, without rounding X first."""
    return X.is_cuda and X.dtype in (torch.float16, torch.bfloat16) and hasattr(torch.ops.aten.mm, "dtype")


def add_product(total: Tensor, A: Tensor, B: Tensor) -> None:
    """Add A @ B to total, float32 [m, n]. A [m, k], B [k, n]: float32, or 16 bits where `on_tensor_cores`."""
    if A.dtype == torch.float32:
        total.addmm_(A, B)
    else:
        total.add_(torch.mm(A, B, out_dtype=torch.float32))  # type: ignore[call-overload]


def dampen_(H: Tensor, damp_percent: float, shrink: float) -> Tensor:
    """Add damp_percent * mean(diag H) * I + shrink * diag(H) to H, in place.

    The first term is the paper's and keeps weak directions from being trusted. The second takes every correlation down by
    1 / (1 + shrink), those of strong columns too, on which the first has no effect: it is what helps on text
    unlike the calibration's. A column that never fired ends up alone on the diagonal: its weights are kept and rounded plainly.
    """
    diagonal = H.diagonal()
    mean = diagonal.mean()
    mean = torch.where(mean > 0, mean, torch.ones_like(mean))  # nothing fired at all
    diagonal.mul_(1 + shrink).add_(damp_percent * mean)
    return H


def inverse_factor(H: Tensor, perm: Tensor, damp_percent: float, shrink: float) -> tuple[Tensor, float] | None:
    """Return (U [in, in], damp_percent used) as `try_factor` finds U, the damping raised tenfold for as long as it fails."""
    for damp in dampings(damp_percent):
        U, good = try_factor(H, perm, damp, shrink)
        if bool(good):
            return U, damp
    return None


def dampings(damp_percent: float) -> Iterator[float]:
    """What to try one after another until H can be factorized."""
    while damp_percent <= 1e4:
        yield damp_percent
        damp_percent *= 10


def try_factor(H: Tensor, perm: Tensor, damp_percent: float, shrink: float) -> tuple[Tensor, Tensor]:
    """Return U [in, in] upper with U'U = inverse of the damped H[perm][:, perm], and whether it is that (bool []).

    One factorization: with rows and columns reversed, H = LL'; reversed back, L is an upper R with H = RR', and
    U = inv(R). It is made in the memory of one copy of H, on perm's device. The host does not wait.
    """
    A = dampen_(permuted(H, perm.flip(0)), damp_percent, shrink)
    failed = invert_factor_(A, LEAF_OF_GPU if A.is_cuda else LEAF_OF_CPU)
    U = turn_(A)
    return U, (failed == 0) & torch.isfinite(U.sum())  # one element that is not finite spoils the sum


def ask(value: Tensor) -> Callable[[], bool]:
    """Start reading a bool [] and return what waits for it: on a GPU only for work that was given to it before."""
    if not value.is_cuda:
        return lambda: bool(value)
    copied, host = torch.cuda.Event(), torch.empty((), dtype=torch.bool, pin_memory=True)
    host.copy_(value, non_blocking=True)
    copied.record()

    def wait() -> bool:
        copied.synchronize()
        return bool(host)

    return wait


def permuted(H: Tensor, perm: Tensor, panel: int = 256) -> Tensor:
    """Return H[perm][:, perm] [n, n] on perm's device, with no second copy of it on the way."""
    if H.device == perm.device:
        A = H.index_select(0, perm)
    else:
        A = H.to(perm.device, non_blocking=True)
        for columns in A.split(panel, dim=1):
            columns.copy_(columns.index_select(0, perm))
    for rows in A.split(panel):
        rows.copy_(rows.index_select(1, perm))
    return A


LEAF = 128  # rows of a triangle that is solved rather than halved
#: rows that LAPACK factorizes on a CPU and on a GPU: beyond, matrix products are faster or take less room
LEAF_OF_CPU, LEAF_OF_GPU = 256, 4096


def invert_factor_(A: Tensor, leaf: int) -> Tensor:
    """Replace a symmetric A [n, n] = LL' by inv(L); return int32 [], 0 unless there is no L. leaf: rows done at once.

    Only what is on and below the diagonal is read. Beside A it takes room for a leaf, or for an eighth of A.
    """
    if len(A) <= leaf:
        L, failed = torch.linalg.cholesky_ex(A)
        invert_lower_(A.copy_(L))
        return failed
    half = -(-len(A) // (2 * leaf)) * leaf
    first, B, last = A[:half, :half], A[half:, :half], A[half:, half:]
    failed = invert_factor_(first, leaf)
    width = -(-half // STRIPS)
    for start in reversed(range(0, half, width)):  # B = B first', the block of L
        stop = start + width
        B[:, start:stop] = B[:, :stop] @ first[start:stop, :stop].t()
    for start in range(0, len(last), width):
        stop = start + width
        last[start:stop, :stop].addmm_(B[start:stop], B[:stop].t(), alpha=-1)
    failed = failed + invert_factor_(last, leaf)
    A[:half, half:] = 0
    _join_(A, half)
    return failed


def invert_lower_(L: Tensor) -> Tensor:
    """Invert a lower triangular L [n, n] in place, from small blocks on its diagonal to ever larger ones.

    Nearly all of it is matrix products; those of one size run together while they are small.
    """
    n = len(L)
    eye = torch.eye(min(LEAF, n), dtype=L.dtype, device=L.device)
    whole = n // LEAF
    if whole:
        leaves = _squares(L, 0, 0, LEAF, LEAF, whole)
        leaves.copy_(torch.linalg.solve_triangular(leaves, eye, upper=False))
    if n % LEAF:
        rest = L[whole * LEAF :, whole * LEAF :]
        rest.copy_(torch.linalg.solve_triangular(rest, eye[: len(rest), : len(rest)], upper=False))
    size = LEAF
    while size < n:
        pairs = n // (2 * size) if size <= 8 * LEAF else 0
        if pairs:
            A, B, D = (_squares(L, *corner, size, 2 * size, pairs) for corner in ((0, 0), (size, 0), (size, size)))
            B.copy_((D @ B).neg_() @ A)
        for start in range(pairs * 2 * size, n - size, 2 * size):
            _join_(L[start : start + 2 * size, start : start + 2 * size], size)
        size *= 2
    return L


def _squares(L: Tensor, row: int, column: int, size: int, step: int, count: int) -> Tensor:
    """Return a view [count, size, size] of L: the square at (row, column), and those `step` further down and right each."""
    down, right = L.stride()
    begin = L.storage_offset() + row * down + column * right
    return L.as_strided((count, size, size), (step * (down + right), down, right), begin)


STRIPS = 4  # of a product with a triangle, which leave out most of its zeros


def _join_(L: Tensor, half: int) -> Tensor:
    """Invert a lower triangular L [n, n] in place whose two blocks of `half` and the rest on the diagonal are inverted already."""
    A, B, D = L[:half, :half], L[half:, :half], L[half:, half:]
    width = -(-half // STRIPS)
    for start in reversed(range(0, len(D), width)):  # B = -D B, the last rows first: they need all others as they were
        stop = start + width
        B[start:stop] = (D[start:stop, :stop] @ B[:stop]).neg_()
    for start in range(0, half, width):  # B = B A
        stop = start + width
        B[:, start:stop] = B[:, start:] @ A[start:, start:stop]
    return L


def turn_(A: Tensor, panel: int = 256) -> Tensor:
    """Reverse the order of rows and of columns [n, n], in place."""
    n = len(A)
    for start in range(0, n // 2, panel):
        stop = min(start + panel, n // 2)
        above, below = A[start:stop], A[n - stop : n - start]
        kept = above.flip(0, 1)
        above.copy_(below.flip(0, 1))
        below.copy_(kept)
    if n % 2:
        A[n // 2] = A[n // 2].flip(0)
    return A


def float_target(W: Tensor, H: Tensor, C: Tensor, share: float, damp_percent: float) -> Tensor:
    """Return the weight to aim at so that outputs approach the float model's: W + share * W (C - H) inv(H + damping).

    At share 1 it minimises |W X_float - Q X|^2 + damping * |W - Q|^2, GPTAQ's objective (arXiv 2504.02692) in closed
    form. Half the way is better than all of it: a full step also fits what is particular to the calibration text.
    """
    H, C = H.to(W.device), C.to(W.device)
    L, failed = torch.linalg.cholesky_ex(dampen_(H.clone(), damp_percent, 0.0))
    if int(failed):
        return W  # no correction is always a valid target
    return W + share * torch.cholesky_solve((W @ (C - H)).t(), L).t()


# ---- the order of columns --------------------------------------------------------------------------------------------


def column_order(diagonal: Tensor, size: int, order: str) -> Tensor:
    """Return perm [in]: column perm[i] is the i-th to be quantized. diagonal: diag H; size: columns in a group.

    "none": as they stand. "act": by falling diagonal. "group": groups kept whole, the strongest first, and strong columns
    first inside each (arXiv 2505.14638); a shorter last group stays last.
    """
    columns = len(diagonal)
    if order == "none":
        return torch.arange(columns, device=diagonal.device)
    if order == "act":
        return diagonal.argsort(descending=True, stable=True)
    whole = columns // size * size
    blocks = diagonal[:whole].view(-1, size)  # [groups, size]
    inside = blocks.argsort(dim=1, descending=True, stable=True)
    strongest = blocks.amax(1).argsort(descending=True, stable=True)
    first = torch.arange(0, whole, size, device=diagonal.device)[:, None]
    tail = diagonal[whole:].argsort(descending=True, stable=True) + whole
    return torch.cat([(inside + first)[strongest].reshape(-1), tail])


# ---- the solver ------------------------------------------------------------------------------------------------------


@dataclass
class Solution:
    """codes uint8 [out, in] and float scales, zeros [out, groups], columns where they were; g_idx int32 [in]."""

    codes: Tensor
    scales: Tensor
    zeros: Tensor
    g_idx: Tensor
    damp_percent: float


#: A solver's inner loop: `quantize_columns` below is the reference for what each of them does.
Columns = Callable[[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, int, QuantConfig, str], None]


def solve(
    W: Tensor, H: Tensor, config: QuantConfig, params: Gptq.Params, quantize: Columns | None = None, check: bool = True
) -> Solution | None:
    """Quantize W [out, in] so that tr((W - Q) H (W - Q)') is small; None when H cannot be factorized. H may be on the host.

    Group grids are found from the live weights, as compensated so far, when a group's first column comes up; with
    static_groups beforehand, from W itself. The grid search weighs a column by 1/U_jj^2: what an error there costs after
    the later columns have made up for it. Without `check` it is the caller who looks whether scales are finite.

    A GPU has all of the work before the host asks whether the factor was good, and is still at it when the answer comes.
    """
    size = W.shape[1] if config.group_size == -1 else config.group_size
    perm = column_order(H.diagonal().to(W.device), size, "act" if params.desc_act else params.order)
    for damp_percent in dampings(params.damp_percent):
        U, good = try_factor(H, perm, damp_percent, params.shrink)
        answer = ask(good)
        if not W.is_cuda and not answer():
            continue
        solution = solve_with(W, U, perm, config, params, quantize or quantize_columns)
        if answer():
            if check:
                grid.check_scales(solution.scales)
            solution.damp_percent = damp_percent
            return solution
    return None


def solve_with(
    W: Tensor, U: Tensor, perm: Tensor, config: QuantConfig, params: Gptq.Params, quantize: Columns
) -> Solution:
    """Quantize W [out, in] with the factor U [in, in] of H[perm][:, perm]; see `solve`."""
    rows, columns = W.shape
    size = columns if config.group_size == -1 else config.group_size
    inverse = perm.argsort()
    plain = grid.group_index(columns, config.group_size, W.device)
    visited = plain if params.desc_act and not params.static_groups else plain[perm]  # group of the i-th column
    importance = U.diagonal().square().reciprocal()  # [in], in the order of visit
    groups = grid.num_groups(columns, config.group_size)
    scales = U.new_ones(groups, rows)  # groups and columns come first here: rows are contiguous
    zeros = U.new_ones(groups, rows)
    codes = U.new_empty(columns, rows, dtype=torch.uint8)
    panels = _panels(columns, size, params.block_size)
    Err = U.new_empty(max(panel[-1][1] - panel[0][0] for panel in panels), rows)
    if params.static_groups:
        Wt = W.t().to(U.dtype).contiguous()
        quantize(
            Wt, U[:0, :0], importance[inverse], plain, scales, zeros, codes[:0], Err[:0], size, config, params.grid
        )
    Wt = W.t().index_select(0, perm).to(U.dtype)  # [in, out], live: compensated as columns are done
    for panel in panels:
        begin, end = panel[0][0], panel[-1][1]
        for start, stop in panel:
            search = params.grid if start % size == 0 and not params.static_groups else "none"
            reach = (
                min(start + size, columns) if search != "none" and size > stop - start else stop
            )  # all of a long group
            here, err = slice(start, reach), Err[start - begin : stop - begin]
            quantize(
                Wt[here], U[start:stop, start:stop], importance[here], visited[here], scales, zeros, codes[start:stop], err,
                size, config, search,
            )  # fmt: skip
            Wt[stop:end].addmm_(U[start:stop, stop:end].t(), err, alpha=-1)
        Wt[end:].addmm_(U[begin:end, end:].t(), Err[: end - begin], alpha=-1)
    g_idx = visited[inverse].to(torch.int32).contiguous()
    return Solution(codes[inverse].t(), scales.t(), zeros.t(), g_idx, params.damp_percent)


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
    """Quantize the first columns of W, as many as `codes` has, and find the grids of the groups that begin there.

    W: [reach, out], live, left in any state; it reaches beyond the columns to quantize where their group does. U: [columns,
    columns], their own part of the factor. importance, group_of: [reach]. scales, zeros: [groups, out]. codes: uint8 [columns,
    out]. Err: [columns, out], gets the scaled errors. size: columns in a group; with `search` ("minmax" or "mse", not "none") groups
    begin at its multiples. Without columns only grids are found, those of all of W.
    """
    columns, reach = len(codes), len(W)
    piece = W.new_empty(min(size, max(columns, 1)), W.shape[1])  # codes as float
    for first in range(0, columns or reach, size):
        last = min(first + size, columns)
        if search != "none":
            here = slice(first, min(first + size, reach))
            found = find_grid(W[here].t().contiguous(), config, search, importance[here], check=False)
            for grids, values in zip((scales, zeros), found, strict=True):
                grids.index_copy_(0, group_of[first : first + 1].long(), values[None])
        if first >= columns:
            continue
        grids = group_of[first:last].long()
        q = piece[: last - first]
        err = _solve_piece(W[first:last], U[first:last, first:last], scales[grids], zeros[grids], config.maxq, q)
        W[last:columns].addmm_(U[first:last, last:].t(), err, alpha=-1)
        Err[first:last] = err
        codes[first:last] = q


def _solve_piece(W: Tensor, U: Tensor, scales: Tensor, zeros: Tensor, maxq: int, codes: Tensor) -> Tensor:
    """Fill `codes` for the columns of W one by one, compensating inside the piece; return the scaled errors.

    W, codes, scales, zeros and what is returned: [columns, out]; U: [columns, columns]. With scale * zero added to W once,
    a code is W / scale and stands for scale * code: five operations a column.
    """
    W = torch.addcmul(W, scales, zeros)
    Err = torch.empty_like(W)
    inverse_scales, negative_scales = scales.reciprocal(), -scales
    D = U / U.diagonal()[:, None]
    for i in range(len(W)):
        torch.mul(W[i], inverse_scales[i], out=codes[i]).round_().clamp_(0, maxq)
        torch.addcmul(W[i], negative_scales[i], codes[i], out=Err[i])
        W[i + 1 :].addr_(D[i, i + 1 :], Err[i], alpha=-1)
    return Err.div_(U.diagonal()[:, None])


def solver_for(wanted: str, device: torch.device) -> tuple[str, Columns]:
    """Return the inner loop for a device and its label: the one that is wanted, for "auto" the fastest that can run.

    Results of one label are the same bits on the same device; those of different labels differ where a tie falls the other
    way. Raises ConfigError when the wanted one cannot run.
    """
    name = wanted if wanted != "auto" else {"cpu": "native", "cuda": "triton"}.get(device.type, "torch")
    if name == "torch":
        return "torch", quantize_columns
    reason = gptq_native.why_not(device) if name == "native" else _why_not_triton(device)
    if reason is None:
        if name == "native":
            return gptq_native.label(), gptq_native.quantize_columns
        from . import gptq_triton  # which imports triton

        return gptq_triton.label(), gptq_triton.quantize_columns
    if wanted == name:
        raise ConfigError(f"gptq: solver={wanted!r} cannot run here: {reason}. Use solver='auto'.")
    _say_once(f"gptq: {reason}. Until then torch solves, several times slower.")
    return "torch", quantize_columns


def _why_not_triton(device: torch.device) -> str | None:
    """Why the Triton solver cannot run on a device, or None. The interpreter runs it anywhere (TRITON_INTERPRET=1)."""
    if importlib.util.find_spec("triton") is None:
        return "triton is not installed; it comes with torch for CUDA, or: pip install triton"
    interpreted = os.environ.get("TRITON_INTERPRET") == "1"
    return None if device.type == "cuda" or interpreted else f"it needs a GPU, not {device}"


@cache
def _say_once(message: str) -> None:
    logging.getLogger("qcore").warning(message)


def _spans(columns: int, size: int, block_size: int) -> list[tuple[int, int]]:
    """Cut the columns into lazy blocks of whole groups, or of parts of one group.

    Columns behind a block are updated when it ends. A block that ends inside a group other than the one it began in would
    let that group's grid be found from weights that still lack the block's updates.
    """
    step = max(1, block_size // size) * size
    spans = []
    for start in range(0, columns, step):
        end = min(start + step, columns)
        inner = step if size <= block_size else block_size
        spans += [(i, min(i + inner, end)) for i in range(start, end, inner)]
    return spans


PANEL = 4  # blocks between two updates of all columns behind: fewer passes over them, each a larger product


def _panels(columns: int, size: int, block_size: int) -> list[list[tuple[int, int]]]:
    """Cut the columns into panels of blocks. A panel ends where a group does or lies within one, as blocks do."""
    runs: dict[int, list[tuple[int, int]]] = {}
    for start, stop in _spans(columns, size, block_size):
        runs.setdefault(start // size if size > block_size else 0, []).append((start, stop))
    return [run[i : i + PANEL] for run in runs.values() for i in range(0, len(run), PANEL)]


def relative_error(W: Tensor, Q: Tensor, H: Tensor) -> Tensor:
    """Return |(W - Q) X| / |W X| over the calibration tokens, from H alone; float32 []. W may be of any dtype."""
    lost, whole = Q.new_zeros(()), Q.new_zeros(())
    step = max(1, AT_ONCE // W.shape[1])
    for w, q in zip(W.split(step), Q.split(step), strict=True):
        w = w.to(Q.dtype)
        lost += energy(w - q, H)
        whole += energy(w, H)
    return (lost.clamp(min=0) / whole.clamp(min=1e-30)).sqrt()


def energy(W: Tensor, H: Tensor) -> Tensor:
    """Return tr(W H W') for a symmetric H: what lies below a panel of its diagonal counts twice, above it is not read."""
    panel = max(256, -(-len(H) // 8))
    total = W.new_zeros(())
    for start in range(0, len(H), panel):
        stop = start + panel
        product = roughly(W[:, stop:], H[stop:, start:stop]).mul_(2)
        product += roughly(W[:, start:stop], H[start:stop, start:stop])
        total += product.mul_(W[:, start:stop]).sum()
    return total


def roughly(A: Tensor, B: Tensor) -> Tensor:
    """A @ B, on a GPU from inputs rounded to bfloat16: for sums of very many of its elements."""
    if A.is_cuda and A.dtype == torch.float32 and on_tensor_cores(rounded := A.bfloat16()):
        return torch.mm(rounded, B.bfloat16(), out_dtype=torch.float32)  # type: ignore[call-overload, no-any-return]
    return A @ B


# ---- the algorithm ---------------------------------------------------------------------------------------------------


class Gptq(Algorithm):
    """GPTQ with grids from the live weights, shared Hessians, and an order of columns that costs nothing at run time."""

    class Params(Options):
        """The options of GPTQ.

        desc_act: quantize columns by falling diag(H) and form the groups in that order, so that kernels must look up g_idx.
        static_groups: find all group grids beforehand, so that with desc_act groups stay where they are.
        order: the order without desc_act: "group" (strong groups first, strong columns first inside; no cost at
            run time) or "none".
        true_sequential: linears see those that run before them quantized already.
        damp_percent: share of H's mean diagonal added to its diagonal; raised tenfold while the factorization fails.
        shrink: share of its own diagonal added to H's diagonal; guards against overfitting the calibration text.
        float_targets: how far to aim at the float model's outputs rather than the float weights', 0 to 1. 0.5 is best
            and costs about twice the time and memory.
        grid: "mse", a scale search weighted by what errors cost, or "minmax".
        block_size: columns between two updates of the columns behind them.
        solver: what runs the loop over columns: "auto", the fastest that can; "native", compiled for the CPU; "triton", compiled for
            the GPU; or "torch", the reference of the others.
        """

        desc_act: bool = False
        static_groups: bool = False
        order: Literal["group", "none"] = "group"
        true_sequential: bool = True
        damp_percent: float = Field(0.1, gt=0, le=10)
        shrink: float = Field(0.1, ge=0, le=10)
        float_targets: float = Field(0.0, ge=0, le=1)
        grid: Literal["minmax", "mse"] = "mse"
        block_size: int = Field(128, ge=1)
        solver: Literal["auto", "native", "triton", "torch"] = "auto"

    params: Params
    name = "gptq"
    description = "GPTQ: error-compensated rounding with a calibrated Hessian"
    shares_calibration = True

    @property
    def float_stream(self) -> bool:
        """Only to aim at the float model's outputs."""
        return self.params.float_targets > 0

    def facts(self, device: torch.device) -> dict[str, Any]:
        """Which solver runs: where ties fall differs between them."""
        return {"solver_used": solver_for(self.params.solver, device)[0]}

    @classmethod
    def build(cls, report: Callable[[str], None]) -> str:
        """Compile the CPU's solver."""
        return str(cpu_library.build(report))

    def quantize_block(self, block: BlockContext) -> dict[str, QuantizedWeight]:
        """Quantize the groups of linears that share an input, in the order they run."""
        results: dict[str, QuantizedWeight] = {}
        checks = Checks()
        for groups in self._rounds(block):
            hessians = self._hessians(block, [group[0] for group in groups])
            found = block.spread(self._tasks(block, groups, hessians, checks))
            for name, weight in found.items():
                block.replace(name, weight)
            results |= found
        checks.settle()
        return results

    def _rounds(self, block: BlockContext) -> Iterator[list[tuple[str, ...]]]:
        """Yield the groups to observe in one replay: those that run side by side, or all of them, as memory allows."""
        for stage in block.stages if self.params.true_sequential else [block.groups]:
            groups: list[tuple[str, ...]] = []
            size = 0
            for group in stage:
                hessian = 4 * block.linears[group[0]].weight.shape[1] ** 2
                if groups and size + hessian > HESSIAN_BYTES:
                    yield groups
                    groups, size = [], 0
                groups.append(group)
                size += hessian
            yield groups

    def _hessians(self, block: BlockContext, names: Sequence[str]) -> dict[str, Hessian]:
        """Return H of each named linear, from one replay."""

        def make(name: str) -> Hessian:
            return Hessian(block.linears[name].weight.shape[1], block.device, self.float_stream)

        return block.accumulate(names, make, paired=self.float_stream)

    def _tasks(
        self, block: BlockContext, groups: Sequence[tuple[str, ...]], hessians: dict[str, Hessian], checks: Checks
    ) -> list[Task]:
        """Cut the work into what can be done side by side: linears that share H and a config are solved stacked, unless that
        leaves processes of the run without work. Takes the hessians over, so that each goes when it was used.
        """
        units = [
            (group, [name for name in group if block.linears[name].config == config])
            for group in groups
            for config in dict.fromkeys(block.linears[name].config for name in group)
        ]
        if len(units) < block.workers:
            units = [(group, [name]) for group, names in units for name in names]
        inputs = {group: cache(partial(self._inputs, group, hessians.pop(group[0]), checks)) for group in groups}
        tasks = []
        for group, names in units:
            rows = sum(len(block.linears[name].weight) for name in names)
            columns = block.linears[names[0]].weight.shape[1]
            work = partial(self._quantize_stacked, block, names, inputs[group], checks)
            tasks.append(Task(names, columns**2 * (rows + columns), work))
        return tasks

    def _inputs(self, group: tuple[str, ...], hessian: Hessian, checks: Checks) -> tuple[Tensor, Tensor | None] | None:
        """Return H and C of what linears get, or None when no token reached them."""
        if not int(hessian.tokens):
            return None
        H, C = hessian.finish()
        checks.settle()  # of groups before this one: a GPU is done with them
        checks.add(torch.isfinite(H.diagonal()).all(), partial(_refuse_inputs, group[0]))
        return _aside(H), None if C is None else _aside(C)

    def _quantize_stacked(
        self,
        block: BlockContext,
        names: Sequence[str],
        inputs: Callable[[], tuple[Tensor, Tensor | None] | None],
        checks: Checks,
    ) -> dict[str, QuantizedWeight]:
        """Quantize linears that share H and a config."""
        found = inputs()
        if found is None:
            return {name: self._plain(block, name, "no calibration token reached it") for name in names}
        H, C = found
        config = block.linears[names[0]].config
        weights = [block.linears[name].weight for name in names]
        W = torch.cat(weights) if len(names) > 1 else weights[0]
        if C is not None:
            W = float_target(W.float(), H, C, self.params.float_targets, self.params.damp_percent)
        _, quantize = solver_for(self.params.solver, W.device)
        solution = solve(W, H, config, self.params, quantize, check=False)
        del W
        H = H.to(block.device)
        if solution is None:
            checks.settle()
            return {name: self._plain(block, name, "its Hessian cannot be factorized", H) for name in names}
        checks.add(torch.isfinite(solution.scales).all(), partial(grid.check_scales, solution.scales))
        results: dict[str, QuantizedWeight] = {}
        start = 0
        for name in names:
            linear = block.linears[name]
            rows = slice(start, start + len(linear.weight))
            start = rows.stop
            results[name] = QuantizedWeight(
                codes=solution.codes[rows].contiguous(),
                scales=solution.scales[rows].to(torch.float16).contiguous(),
                zeros=solution.zeros[rows].to(torch.int32).contiguous(),
                g_idx=solution.g_idx,
                config=config,
                bias=linear.bias,
            )
            block.record(name, error=relative_error(linear.weight, results[name].dequantize(), H))
            if solution.damp_percent != self.params.damp_percent:
                block.record(name, note=f"damp_percent raised to {solution.damp_percent:g}")
        return results

    def _plain(self, block: BlockContext, name: str, why: str, H: Tensor | None = None) -> QuantizedWeight:
        """Round one linear to nearest and say why."""
        linear = block.linears[name]
        importance = None if H is None else H.diagonal().to(block.device)
        weight = round_to_nearest(linear.weight, linear.config, "mse", importance, linear.bias)
        error = None if H is None else relative_error(linear.weight, weight.dequantize(), H)
        block.record(name, error=error, note=f"rounded to nearest: {why}")
        return weight


class Checks:
    """Conditions looked at once a GPU has long computed them, so that it never waits for the host; on a CPU at once."""

    def __init__(self) -> None:
        self.open: list[tuple[Callable[[], bool], Callable[[], None]]] = []

    def add(self, holds: Tensor, refuse: Callable[[], None]) -> None:
        """Note a condition, bool [], and what raises the error if it does not hold."""
        self.open.append((ask(holds), refuse))
        if not holds.is_cuda:
            self.settle()

    def settle(self) -> None:
        """Raise the first error there is."""
        for holds, refuse in self.open:
            if not holds():
                refuse()
        self.open.clear()


def _aside(H: Tensor) -> Tensor:
    """Return a Hessian, moved to the host when it is large and on a GPU, in memory from which that fetches by itself."""
    if not H.is_cuda or H.numel() * H.element_size() <= HOST_BYTES:
        return H
    return torch.empty(H.shape, dtype=H.dtype, pin_memory=True).copy_(H)


def _refuse_inputs(name: str) -> None:
    raise ModelError(f"the inputs of {name} hold NaN or Inf: its activations overflow.")


@hookimpl
def qcore_algorithms() -> list[type[Algorithm]]:
    return [Gptq]
