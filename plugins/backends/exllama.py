"""Decode in the manner of ExLlama: 4 bits and float16 on the ordinary cores of NVIDIA GPUs, for one to four tokens.

The kernel is csrc/exllama. Act-order costs nothing but a gather: the weight's columns are sorted by group once, when a layer
is loaded, and x is gathered on its way into shared memory. Beyond FUSED_MAX tokens the weight is made and torch multiplies.
`auto` prefers the backend `cuda`, whose tensor cores do as well at one token and better from there on; docs/exllama.md measures both.
"""

from __future__ import annotations

import ctypes
from collections.abc import Callable
from functools import cache

import torch
from torch import Tensor
from torch.nn import functional as F

from qcore import Backend, BackendError, MatmulSpec, QuantizedWeight, hookimpl, speed_at

from ..native import Native
from . import cuda_library as builds
from .columns import layout, packed_group_size
from .ops import define_product, on_its_gpu

TILE, UNIT, MOST_TOKENS = 128, 32, 8  # outputs of a block, columns of a unit, tokens of a block
FUSED_MAX = 32
MAX_PADDING = 2.0  # groups that padding would make larger than by this are refused: they would save no memory

EXLLAMA = Native(
    name="exllama",
    abi=1,  # QC_EXLLAMA_ABI
    flags=builds.FLAGS,
    functions={
        "qc_abi_version": (ctypes.c_int, ""),
        "qc_error_string": (ctypes.c_char_p, "code"),
        "qc_exl_partial": (ctypes.c_int64, "m# n# k#"),
        "qc_exl_pack": (ctypes.c_int, "n# columns# k# codes* perm* packed* stream*"),
        "qc_exl_dequantize": (
            ctypes.c_int,
            "n# columns# k# group_size# packed* scales* zeros* perm* w* ldw# stream*",
        ),
        "qc_exl_matmul": (
            ctypes.c_int,
            "m# n# columns# k# group_size# x* ldx# packed* scales* zeros* perm* y* ldy# partial* partial_size# arrived* counters#"
            " stream*",
        ),
    },
)


@cache
def load() -> ctypes.CDLL:
    """Return the library, loaded once; raises BackendError saying how to get it."""
    return EXLLAMA.open(builds.find(builds.capabilities(), EXLLAMA))


def _call(function: str, *arguments: int | None) -> None:
    EXLLAMA.call(load(), function, *arguments)


@cache
def _partial(device: int, m: int, n: int, k: int) -> int:
    """Floats in which blocks leave their sums; the device is asked, so it is part of the key."""
    found: int = load().qc_exl_partial(m, n, k)
    if found < 0:
        raise BackendError(f"exllama: {load().qc_error_string(-found).decode()}, for {m} tokens, {n} x {k}.")
    return found


# ---- the ops -------------------------------------------------------------------------------------------------------

_ARGUMENTS = (
    "Tensor packed, Tensor scales, Tensor zeros, Tensor perm, Tensor arrived, int group_size, int in_features,"
    " int out_features"
)


def _check(x: Tensor, width: int, packed: Tensor, scales: Tensor, zeros: Tensor, perm: Tensor, arrived: Tensor,
           group_size: int, k: int, n: int) -> None:  # fmt: skip
    """Raise BackendError unless the tensors are what prepare made, and x [..., width] fits them."""
    held = (packed, scales, zeros, perm, arrived)
    if x.dtype != torch.float16 or not x.ndim or x.shape[-1] != width:
        raise BackendError(f"exllama: x is {x.dtype} {list(x.shape)}, expected float16 [..., {width}].")
    if any(each.device != x.device for each in held):
        raise BackendError(f"exllama: x is on {x.device}, the layer on {packed.device}.")
    padded, groups = n + -n % TILE, 1 if group_size == -1 else -(-k // group_size)
    expected = ((-(-k // UNIT) * 4, padded), (groups, padded), (groups, padded) if zeros.numel() else (0,))
    if (tuple(packed.shape), tuple(scales.shape), tuple(zeros.shape)) != expected:
        raise BackendError(
            f"exllama: packed {list(packed.shape)}, scales {list(scales.shape)} and zeros {list(zeros.shape)} are not those of {n} x {k}."
        )
    if [each.dtype for each in held] != [torch.int32, torch.float16, torch.float16, torch.int32, torch.int32]:
        raise BackendError(f"exllama: the layer holds {[each.dtype for each in held]}; prepare makes others.")
    if not all(each.is_contiguous() for each in held):
        raise BackendError("exllama: packed, scales, zeros, perm and arrived must be contiguous.")


def _pointer(tensor: Tensor) -> int | None:
    return tensor.data_ptr() if tensor.numel() else None


def _weight(packed, scales, zeros, perm, group_size, in_features, out_features) -> Tensor:  # type: ignore[no-untyped-def]
    """Return the weight [in, out] in its own order."""
    weight = torch.empty(in_features, out_features, dtype=torch.float16, device=packed.device)
    _call(
        "qc_exl_dequantize", out_features, in_features, perm.numel() or in_features, group_size, packed.data_ptr(),
        scales.data_ptr(), _pointer(zeros), _pointer(perm), weight.data_ptr(), out_features,
        torch.cuda.current_stream().cuda_stream,
    )  # fmt: skip
    return weight


def _matmul(x, packed, scales, zeros, perm, arrived, group_size, in_features, out_features) -> Tensor:  # type: ignore[no-untyped-def]
    """Return x [..., in] @ W.T as [..., out]."""
    k = perm.numel() or in_features
    _check(x, in_features, packed, scales, zeros, perm, arrived, group_size, k, out_features)
    rows = x.reshape(-1, in_features)
    m = rows.shape[0]
    if m > FUSED_MAX:
        weight = _weight(packed, scales, zeros, perm, group_size, in_features, out_features)
        return torch.matmul(rows, weight).view(*x.shape[:-1], out_features)
    y = torch.empty((*x.shape[:-1], out_features), dtype=x.dtype, device=x.device)
    if m == 0:
        return y
    if (in_features > 1 and rows.stride(1) != 1) or (m > 1 and rows.stride(0) < in_features):
        rows = rows.contiguous()
    size = _partial(x.get_device(), m, out_features, k)
    partial = torch.empty(size, dtype=torch.float32, device=x.device)
    _call(
        "qc_exl_matmul", m, out_features, in_features, k, group_size, rows.data_ptr(), rows.stride(0) if m > 1 else in_features,
        packed.data_ptr(), scales.data_ptr(), _pointer(zeros), _pointer(perm), y.data_ptr(), out_features,
        _pointer(partial), size, arrived.data_ptr(), arrived.numel(), torch.cuda.current_stream().cuda_stream,
    )  # fmt: skip
    return y


def _matmul_transposed(grad, packed, scales, zeros, perm, arrived, group_size, in_features, out_features) -> Tensor:  # type: ignore[no-untyped-def]
    """Return grad [..., out] @ W as [..., in]: the gradient of x."""
    k = perm.numel() or in_features
    _check(grad, out_features, packed, scales, zeros, perm, arrived, group_size, k, out_features)
    weight = _weight(packed, scales, zeros, perm, group_size, in_features, out_features)
    return torch.matmul(grad.reshape(-1, out_features), weight.t()).view(*grad.shape[:-1], in_features)


define_product(
    "exllama_matmul", _ARGUMENTS, on_its_gpu("exllama", "x", _matmul), on_its_gpu("exllama", "grad", _matmul_transposed)
)


# ---- the backend ---------------------------------------------------------------------------------------------------


#: times as fast as fp16 torch.matmul by tokens: 4096 -> 11008, 4 bits in order, group 128, on an H200
SPEEDS = {1: 1.77, 2: 1.45, 4: 0.81, 8: 0.51, 16: 0.30, 32: 0.16}
MEASURED_ON = (9, 0)  # the compute capability


class ExllamaBackend(Backend):
    """Serves 4 bits and float16 on NVIDIA GPUs from sm_80."""

    name = "exllama"
    description = "decode-first kernel: 4 bits, fp16, half2 arithmetic; NVIDIA GPUs from sm_80"
    rank = 40  # below triton, which is faster from a few tokens on

    def unavailable(self) -> str | None:
        """No GPU, only older ones, or no library for those there are."""
        if torch.version.hip or not torch.cuda.is_available():
            return "needs an NVIDIA GPU and a torch built for CUDA"
        if not builds.capabilities():
            return f"needs a GPU of sm_80 or later, not {torch.cuda.get_device_name()}"
        try:
            load()
        except BackendError as error:
            return str(error)
        return None

    def build(self, report: Callable[[str], None]) -> str:
        """Compile csrc/exllama for the GPUs here, or for the architectures in QCORE_CUDA_ARCH, and keep the library in the cache."""
        return str(builds.build(report, EXLLAMA))

    def why_not(self, spec: MatmulSpec) -> str | None:
        """Other devices, dtypes and widths; groups so small that padding them saves nothing."""
        group_size = spec.config.group_size
        if spec.device.type != "cuda":
            return f"serves CUDA GPUs, not {spec.device}"
        if spec.dtype != torch.float16:
            return f"serves float16 activations, not {spec.dtype}"
        if spec.config.bits != 4:
            return f"serves 4 bits, not {spec.config.bits}"
        if torch.cuda.get_device_capability(spec.device) < builds.OLDEST:
            return f"needs sm_80 or later, {spec.device} is older"
        width = packed_group_size(group_size, spec.in_features)
        if width > MAX_PADDING * group_size > 0:
            return f"pads groups of {group_size} columns to {width}, which saves no memory; serves groups from 16"
        if spec.out_features > 1 << 24 or spec.in_features > 1 << 19:
            return f"serves weights up to 2^24 x 2^19, this one has {spec.out_features} x {spec.in_features}"
        return None

    def speed(self, spec: MatmulSpec) -> float | None:
        """As measured on Hopper, for columns in order."""
        here = torch.cuda.get_device_capability(spec.device) == MEASURED_ON
        return speed_at(SPEEDS, spec.tokens) if here and not spec.act_order else None

    def prepare(self, weight: QuantizedWeight, spec: MatmulSpec) -> dict[str, Tensor]:
        """Sort columns by group and lay codes, scales and zeros out as the kernel reads them.

        Raises BackendError for scales float16 cannot hold, and zeros that are no integers of the grid.
        """
        n, columns, device = weight.out_features, weight.in_features, spec.device
        perm, _, groups = layout(weight.g_idx.cpu(), spec.config.group_size)
        perm = torch.empty(0, dtype=torch.int32) if perm is None else perm
        k, padded = perm.numel() or columns, n + -n % TILE
        scales, zeros = _grid(weight)

        def side(values: Tensor) -> Tensor:  # [out, groups] -> [packed groups, padded out]
            chosen = values.cpu().index_select(1, groups).t()
            return F.pad(chosen, (0, padded - n)).contiguous().to(device)

        with torch.cuda.device(device):
            codes, perm = weight.codes.to(device).contiguous(), perm.to(device)
            packed = torch.empty(-(-k // UNIT) * 4, padded, dtype=torch.int32, device=device)
            _call(
                "qc_exl_pack", n, columns, k, codes.data_ptr(), _pointer(perm), packed.data_ptr(),
                torch.cuda.current_stream().cuda_stream,
            )  # fmt: skip
            # one for each tile of outputs and block of tokens, zero between products
            arrived = torch.zeros(padded // TILE * (FUSED_MAX // MOST_TOKENS), dtype=torch.int32, device=device)
        empty = torch.empty(0, dtype=torch.float16, device=device)
        return {
            "packed": packed,
            "scales": side(scales),
            "zeros": empty if zeros is None else side(zeros),
            "perm": perm,
            "arrived": arrived,
        }

    def matmul(self, x: Tensor, buffers: dict[str, Tensor], spec: MatmulSpec) -> Tensor:
        """Multiply; within autocast x becomes float16."""
        if torch.is_autocast_enabled("cuda"):
            x = x.to(torch.float16)
        b = buffers
        y: Tensor = torch.ops.qcore.exllama_matmul(
            x, b["packed"], b["scales"], b["zeros"], b["perm"], b["arrived"],
            packed_group_size(spec.config.group_size, spec.in_features), spec.in_features, spec.out_features,
        )  # fmt: skip
        return y


def _grid(weight: QuantizedWeight) -> tuple[Tensor, Tensor | None]:
    """Return scales and zeros as float16, None for a symmetric grid."""
    scales = weight.scales.half()
    lost = ~(scales.isfinite() & ((scales != 0) | (weight.scales == 0)))
    zeros = weight.zeros.float()
    reason = None
    if bool(lost.any()):
        reason = f"float16 cannot hold its scales ({weight.scales.dtype}, up to {float(weight.scales.abs().max()):.3g})"
    elif not bool(((zeros == zeros.round()) & (zeros >= 0) & (zeros <= 16)).all()):
        reason = "its zeros are no whole numbers from 0 to 16"
    if reason:
        layer = f"{weight.in_features} -> {weight.out_features}, {weight.config}"
        raise BackendError(f"exllama cannot serve the layer {layer}: {reason}. Load it with backend='torch_reference'.")
    return scales, None if weight.sym else zeros.half()


@hookimpl
def qcore_backends() -> list[Backend]:
    return [ExllamaBackend()]
