"""Our CPU kernels: 2 to 8 bits with float32, bfloat16 and float16 activations, AVX2, AVX-512 and plain C.

The kernels and their layout are in csrc/cpu (matmul.c); this file turns a QuantizedWeight into that layout and binds them as torch
ops. Codes are multiplied as the exact integers they are and summed in float32; how exact that is, docs/cpu.md says.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import cache

import torch
from torch import Tensor
from torch.nn import functional as F

from qcore import Backend, BackendError, MatmulSpec, QuantizedWeight, grid, hookimpl, packing

from .. import cpu_library
from .columns import layout, packed_group_size
from .ops import define_product

DTYPES = {torch.float32: 0, torch.bfloat16: 1, torch.float16: 2}  # as the C ABI numbers them
TILE, BLOCK = 16, 32  # outputs and columns that lie together
BEST = 0  # the instruction set: the best of this machine
FLOAT_BITS = {
    torch.float16: 16,
    torch.bfloat16: 17,
}  # "bits" of weights that are not quantized: QC_HALF_WEIGHT, QC_BFLOAT_WEIGHT
PIECE = 2**18  # elements of a float weight that are looked at together
MAX_PADDING = 2.0  # groups that padding would make larger than by this are refused: they would save no memory


@cache
def _sizes(bits: int, n: int, k: int, group_size: int, asym: bool) -> tuple[int, int]:
    """Bytes of packed and numbers of meta."""
    tiles, blocks = -(-n // TILE), -(-k // BLOCK)
    groups = 1 if group_size == -1 else -(-k // group_size)
    stored = bits if bits <= 4 else 16 if bits in FLOAT_BITS.values() else 8
    return tiles * blocks * 64 * stored, tiles * groups * TILE * (2 if asym else 1)


# ---- the ops -------------------------------------------------------------------------------------------------------

_ARGUMENTS = (
    "Tensor packed, Tensor meta, Tensor perm, int bits, int group_size, bool asym, int in_features, int out_features"
)


def _check(
    x: Tensor, width: int, packed: Tensor, meta: Tensor, perm: Tensor, bits: int, n: int, k: int, group_size: int, asym: bool
) -> None:  # fmt: skip
    """Raise BackendError unless the tensors are what prepare made, and x [..., width] fits them."""
    if x.dtype not in DTYPES:
        raise BackendError(f"cpu: x is {x.dtype}, expected float32, bfloat16 or float16.")
    if not x.ndim or x.shape[-1] != width:
        raise BackendError(f"cpu: x has the shape {list(x.shape)}, expected [..., {width}].")
    if not (x.is_cpu and packed.is_cpu and meta.is_cpu and perm.is_cpu):
        raise BackendError(f"cpu: x is on {x.device}, the layer on {packed.device}; expected the CPU for both.")
    found, expected = (packed.numel(), meta.numel()), _sizes(bits, n, k, group_size, asym)
    if found != expected:
        raise BackendError(f"cpu: packed and meta have {found} elements; {n} x {k} at {bits} bits has {expected}.")
    if packed.dtype != torch.uint8 or meta.dtype not in (torch.float32, torch.float16) or perm.dtype != torch.int32:
        raise BackendError(
            f"cpu: packed is {packed.dtype}, meta {meta.dtype} and perm {perm.dtype}, expected uint8, float32 or float16,"
            " and int32."
        )
    if not (packed.is_contiguous() and meta.is_contiguous() and perm.is_contiguous()):
        raise BackendError("cpu: packed, meta and perm must be contiguous.")


def _pointer(perm: Tensor) -> int | None:
    return perm.data_ptr() if perm.numel() else None


def _matmul(x, packed, meta, perm, bits, group_size, asym, in_features, out_features) -> Tensor:  # type: ignore[no-untyped-def]
    """Return x [..., in] @ W.T as [..., out]."""
    k = perm.numel() or in_features
    _check(x, in_features, packed, meta, perm, bits, out_features, k, group_size, asym)
    rows = x.reshape(-1, in_features)
    m = rows.shape[0]
    if (in_features > 1 and rows.stride(1) != 1) or (m > 1 and rows.stride(0) < in_features):
        rows = rows.contiguous()
    y = torch.empty((*x.shape[:-1], out_features), dtype=x.dtype)
    cpu_library.CPU.call(
        cpu_library.load(), "qc_cpu_matmul", bits, DTYPES[x.dtype], m, out_features, in_features, k, group_size, asym,
        meta.dtype == torch.float16, rows.data_ptr(), rows.stride(0) if m > 1 else in_features, packed.data_ptr(),
        meta.data_ptr(), _pointer(perm), y.data_ptr(), out_features, torch.get_num_threads(), BEST, cpu_library.openmp(),
    )  # fmt: skip
    return y


def _matmul_transposed(grad, packed, meta, perm, bits, group_size, asym, in_features, out_features) -> Tensor:  # type: ignore[no-untyped-def]
    """Return grad [..., out] @ W as [..., in]: the gradient of x."""
    k = perm.numel() or in_features
    _check(grad, out_features, packed, meta, perm, bits, out_features, k, group_size, asym)
    weight = torch.empty(out_features, in_features, dtype=grad.dtype)
    cpu_library.CPU.call(
        cpu_library.load(), "qc_cpu_dequantize", bits, DTYPES[grad.dtype], out_features, in_features, k, group_size, asym,
        meta.dtype == torch.float16, packed.data_ptr(), meta.data_ptr(), _pointer(perm), weight.data_ptr(), in_features,
        torch.get_num_threads(), cpu_library.openmp(),
    )  # fmt: skip
    return torch.matmul(grad.reshape(-1, out_features), weight).view(*grad.shape[:-1], in_features)


define_product("cpu_matmul", _ARGUMENTS, _matmul, _matmul_transposed)


# ---- the backend ---------------------------------------------------------------------------------------------------


class CpuBackend(Backend):
    """Serves float32, bfloat16 and float16 activations on CPUs."""

    name = "cpu"
    description = "our CPU kernels: 2 to 8 bits, AVX2, AVX-512 and plain C"
    rank = 80

    def unavailable(self) -> str | None:
        """No library."""
        return cpu_library.unavailable()

    def build(self, report: Callable[[str], None]) -> str:
        """Compile csrc/cpu and keep the library in the cache."""
        return str(cpu_library.build(report))

    def why_not(self, spec: MatmulSpec) -> str | None:
        """Other devices and dtypes; groups so small that padding them saves nothing."""
        group_size = spec.config.group_size
        if spec.device.type != "cpu":
            return f"serves CPUs, not {spec.device}"
        if spec.dtype not in DTYPES:
            return f"serves float32, bfloat16 and float16 activations, not {spec.dtype}"
        width = packed_group_size(group_size, spec.in_features)
        if width > MAX_PADDING * group_size > 0:
            return f"pads groups of {group_size} columns to {width}, which saves no memory; serves groups from 16"
        return None

    def prepare(self, weight: QuantizedWeight, spec: MatmulSpec) -> dict[str, Tensor]:
        """Lay codes, scales and zeros out as the kernels read them.

        Returns packed uint8, meta (scales and zeros, float16 where that holds them exactly and else float32) and perm int32,
        empty where columns are in order.
        """
        cpu_library.register()
        bits, n, columns = spec.config.bits, weight.out_features, weight.in_features
        perm, group_size, groups = layout(weight.g_idx.cpu(), spec.config.group_size)
        k = columns if perm is None else perm.shape[0]
        perm = torch.empty(0, dtype=torch.int32) if perm is None else perm.contiguous()
        packed = packing.roomy([_sizes(bits, n, k, group_size, not spec.config.sym)[0]], torch.uint8)
        _pack(bits, n, columns, k, weight.codes.cpu().contiguous(), perm, packed)
        return {"packed": packed, "meta": _meta(weight, groups), "perm": perm}

    def matmul(self, x: Tensor, buffers: dict[str, Tensor], spec: MatmulSpec) -> Tensor:
        """Multiply; within autocast x takes autocast's dtype, as with torch's own linears."""
        if torch.is_autocast_enabled("cpu"):
            x = x.to(torch.get_autocast_dtype("cpu"))
        if x.dtype not in DTYPES or x.shape[-1:] != (spec.in_features,):  # the op says less well what is wrong
            raise BackendError(
                f"cpu: x is {x.dtype} {list(x.shape)}, expected float32, bfloat16 or float16 [..., {spec.in_features}]."
            )
        config = spec.config
        y: Tensor = torch.ops.qcore.cpu_matmul(
            x, buffers["packed"], buffers["meta"], buffers["perm"], config.bits,
            packed_group_size(config.group_size, spec.in_features), not config.sym, spec.in_features, spec.out_features,
        )  # fmt: skip
        return y

    def float_product(self, weight: Tensor) -> Callable[[Tensor], Tensor] | None:
        """For weights that 16 bits hold exactly: half the bytes of float32, and a product that keeps up with memory."""
        if weight.device.type != "cpu" or weight.dtype not in DTYPES or self.unavailable():
            return None
        cpu_library.register()
        n, k = weight.shape
        halves = next((held for dtype in FLOAT_BITS if (held := _exactly(weight, dtype)) is not None), None)
        if halves is None:
            return None
        bits, perm = FLOAT_BITS[halves.dtype], torch.empty(0, dtype=torch.int32)
        packed_size, meta_size = _sizes(bits, n, k, -1, False)
        packed, ones = packing.roomy([packed_size], torch.uint8), torch.ones(meta_size, dtype=torch.float16)
        _pack(bits, n, k, k, halves, perm, packed)
        return lambda x: torch.ops.qcore.cpu_matmul(x, packed, ones, perm, bits, -1, False, k, n)


def _exactly(weight: Tensor, dtype: torch.dtype) -> Tensor | None:
    """Return a weight as another dtype where that holds it exactly; looked at piece by piece, as a cache holds."""
    held = packing.roomy(weight.shape, dtype)
    rows = max(1, PIECE // weight.shape[1])
    for target, part in zip(held.split(rows), weight.split(rows), strict=True):
        if not torch.equal(target.copy_(part).to(weight.dtype), part):
            return None
    return held


def _pack(bits: int, n: int, columns: int, k: int, codes: Tensor, perm: Tensor, packed: Tensor) -> None:
    """Lay out codes uint8 [n, columns], or a weight of 16 bits, into `packed`."""
    cpu_library.CPU.call(
        cpu_library.load(), "qc_cpu_pack", bits, n, columns, k, codes.data_ptr(), _pointer(perm), packed.data_ptr(),
        torch.get_num_threads(), cpu_library.openmp(),
    )  # fmt: skip


def _meta(weight: QuantizedWeight, groups: Tensor) -> Tensor:
    """Return [tiles, packed groups, 1 or 2, 16]: scales, and for an asymmetric grid zeros less the middle of the codes."""
    parts = [weight.scales.cpu().float()]
    if not weight.sym:
        parts.append(weight.zeros.cpu().float() - grid.symmetric_zero(weight.bits))
    values = torch.stack(parts).index_select(2, groups)  # [parts, out, packed groups]
    halves = values.half()
    values = halves if torch.equal(halves.float(), values) else values
    tiles = F.pad(values, (0, 0, 0, -weight.out_features % TILE)).unflatten(1, (-1, TILE))
    return tiles.permute(1, 3, 0, 2).contiguous()


@hookimpl
def qcore_backends() -> list[Backend]:
    return [CpuBackend()]
