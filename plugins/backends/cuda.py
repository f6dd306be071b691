"""Our own CUDA kernels: 2, 3, 4 and 8 bits in fp16 and bf16, on NVIDIA GPUs from sm_80, wgmma on Hopper.

The kernels and their measurements are in csrc/cuda. This file turns a QuantizedWeight into their layout and binds them as
torch ops. It compiles nothing by itself: `qcore build-kernels` does.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import cache

import torch
from torch import Tensor

from qcore import Backend, BackendError, MatmulSpec, QuantizedWeight, grid, hookimpl, speed_at

from . import cuda_library as native
from .columns import layout, packed_group_size
from .ops import define_product, on_its_gpu

DTYPES = {torch.float16: 0, torch.bfloat16: 1}  # as the C ABI numbers them
WIDTHS = (2, 3, 4, 8)
MAX_ROWS, MAX_COLUMNS = 1 << 24, 1 << 20  # of a weight: the limits of the C ABI
MAX_PADDING = 2.0  # groups that padding would make larger than by this are refused: they would save no memory

AUTO, WGMMA = 0, 3  # values of qc_matmul's `kernel`
DECODE_MAX = 8  # tokens up to which every kernel that AUTO takes does without a workspace
NARROW_MAX = 32  # tokens that 2 and 3 bits are compiled for; beyond, the weight is made and torch multiplies
# Where there is no wgmma: tokens up to which the mma.sync kernels are used. Beyond, making the weight for torch to multiply
# was faster (csrc/cuda/README.md: 67 against 98 µs at 256, about equal at 128; measured on an H200, others may differ).
TILE_MAX = 128

SPARES = 2  # workspaces kept ready: for the stream that a graph is warmed up on, and the one it is captured on


@cache
def _sizes(bits: int, n: int, k: int, group_size: int, asym: bool) -> tuple[int, int]:
    """Bytes of packed and numbers of meta, as qc_packed_bytes and qc_meta_bytes have them."""
    tiles, groups = -(-n // 16), 1 if group_size == -1 else -(-k // group_size)
    return tiles * -(-k // 64) * 128 * bits, tiles * groups * (32 if asym else 16)


# ---- workspaces ----------------------------------------------------------------------------------------------------

_workspaces: dict[tuple[int, int], Tensor] = {}  # (device, stream) -> its own
_spare: dict[int, list[Tensor]] = {}  # device -> zeroed ones that no stream has yet


def _new_workspace(device: int) -> Tensor:
    size = native.load().qc_workspace_bytes()
    if size < 0:
        raise BackendError(f"cuda: the kernels cannot run on cuda:{device}: it is older than sm_80 or does not answer.")
    return torch.zeros(size, dtype=torch.uint8, device=f"cuda:{device}")


def _reserve(device: int) -> None:
    """Have workspaces for the current stream and for streams to come, which may be capturing a graph when they ask."""
    key = (device, torch.cuda.current_stream().cuda_stream)
    spare = _spare.setdefault(device, [])
    if key not in _workspaces or len(spare) < SPARES:
        if key not in _workspaces:
            _workspaces[key] = _new_workspace(device)
        spare.extend(_new_workspace(device) for _ in range(SPARES - len(spare)))
        torch.cuda.current_stream().synchronize()  # another stream uses the spare ones


def _workspace(device: int, stream: int) -> Tensor:
    found = _workspaces.get((device, stream))
    if found is None:
        spare = _spare.get(device)
        if not spare and torch.cuda.is_current_stream_capturing():
            return _new_workspace(device)  # the graph's own memory, zeroed by every replay: right, if slower
        # a spare one first: what is allocated now may be in the private pool of a graph that is being warmed up
        found = _workspaces[device, stream] = spare.pop() if spare else _new_workspace(device)
    return found


# ---- the ops -------------------------------------------------------------------------------------------------------

_ARGUMENTS = (
    "Tensor packed, Tensor meta, Tensor perm, int bits, int group_size, bool asym, int in_features, int out_features"
)


def _check(
    x: Tensor, width: int, packed: Tensor, meta: Tensor, perm: Tensor, bits: int, n: int, k: int, group_size: int, asym: bool
) -> None:  # fmt: skip
    """Raise BackendError unless the tensors are what prepare made, and x [..., width] fits them."""
    if x.dtype not in DTYPES or x.dtype != meta.dtype:
        raise BackendError(f"cuda: x is {x.dtype}, the layer {meta.dtype}; expected both float16 or both bfloat16.")
    if not x.ndim or x.shape[-1] != width:
        raise BackendError(f"cuda: x has the shape {list(x.shape)}, expected [..., {width}].")
    if not (x.device == packed.device == meta.device == perm.device):
        raise BackendError(f"cuda: x is on {x.device}, the layer on {packed.device}, {meta.device} and {perm.device}.")
    found, expected = (packed.numel(), meta.numel()), _sizes(bits, n, k, group_size, asym)
    if found != expected:
        raise BackendError(f"cuda: packed and meta have {found} elements; {n} x {k} at {bits} bits has {expected}.")
    if packed.dtype != torch.uint8 or perm.dtype != torch.int32:
        raise BackendError(f"cuda: packed is {packed.dtype} and perm {perm.dtype}, expected uint8 and int32.")
    if not (packed.is_contiguous() and meta.is_contiguous() and perm.is_contiguous()):
        raise BackendError("cuda: packed, meta and perm must be contiguous.")


def _pointer(perm: Tensor) -> int | None:
    return perm.data_ptr() if perm.numel() else None


def _dequantize(packed, meta, perm, bits, group_size, asym, in_features, out_features) -> Tensor:  # type: ignore[no-untyped-def]
    """Return the weight [out, in] in its own order."""
    weight = torch.empty(out_features, in_features, dtype=meta.dtype, device=meta.device)
    native.call(
        "qc_dequantize", bits, DTYPES[meta.dtype], out_features, in_features, perm.numel() or in_features, group_size, asym,
        packed.data_ptr(), meta.data_ptr(), _pointer(perm), weight.data_ptr(), in_features,
        torch.cuda.current_stream().cuda_stream,
    )  # fmt: skip
    return weight


def _rows_for_kernel(rows: Tensor, perm: Tensor, stream: int) -> tuple[Tensor, int]:
    """Return rows [m, packed columns] as the kernels read them, and their stride: in the order of perm, aligned to 16 bytes."""
    m, columns = rows.shape
    if (columns > 1 and rows.stride(1) != 1) or (m > 1 and rows.stride(0) < columns):
        rows = rows.contiguous()
    stride = rows.stride(0) if m > 1 else -(-columns // 8) * 8  # a single row has any
    if not perm.numel() and rows.data_ptr() % 16 == 0 and stride % 8 == 0:
        return rows, stride
    width = perm.numel() or -(-columns // 8) * 8
    gathered = torch.empty(m, width, dtype=rows.dtype, device=rows.device)
    native.call(
        "qc_gather", DTYPES[rows.dtype], m, columns, width, rows.data_ptr(), stride, _pointer(perm), gathered.data_ptr(), stream
    )  # fmt: skip
    return gathered, width


_without_wgmma: set[int] = set()  # devices that refused it: not Hopper, or not in this build


def _matmul(x, packed, meta, perm, bits, group_size, asym, in_features, out_features) -> Tensor:  # type: ignore[no-untyped-def]
    """Return x [..., in] @ W.T as [..., out]."""
    k = perm.numel() or in_features
    _check(x, in_features, packed, meta, perm, bits, out_features, k, group_size, asym)
    rows = x.reshape(-1, in_features)
    m, device = rows.shape[0], x.get_device()
    if (m > NARROW_MAX and bits < 4) or (m > TILE_MAX and device in _without_wgmma):
        weight = _dequantize(packed, meta, perm, bits, group_size, asym, in_features, out_features)
        return torch.matmul(rows, weight.t()).view(*x.shape[:-1], out_features)
    y = torch.empty((*x.shape[:-1], out_features), dtype=x.dtype, device=x.device)
    if m == 0:
        return y
    stream = torch.cuda.current_stream().cuda_stream
    rows, stride = _rows_for_kernel(rows, perm, stream)
    kernel, workspace, size = (WGMMA if m > TILE_MAX else AUTO), None, 0
    if m > DECODE_MAX and bits >= 4:
        buffer = _workspace(device, stream)
        workspace, size = buffer.data_ptr(), buffer.numel()
    status = native.call(
        "qc_matmul", bits, DTYPES[x.dtype], m, out_features, k, group_size, asym, rows.data_ptr(), stride,
        packed.data_ptr(), meta.data_ptr(), None, y.data_ptr(), out_features, workspace, size, kernel, 0, stream,
        accept=native.BAD_VARIANT if kernel == WGMMA else 0,
    )  # fmt: skip
    if status == native.BAD_VARIANT:
        _without_wgmma.add(device)
        return _matmul(x, packed, meta, perm, bits, group_size, asym, in_features, out_features)
    return y


def _matmul_transposed(grad, packed, meta, perm, bits, group_size, asym, in_features, out_features) -> Tensor:  # type: ignore[no-untyped-def]
    """Return grad [..., out] @ W as [..., in]: the gradient of x."""
    k = perm.numel() or in_features
    _check(grad, out_features, packed, meta, perm, bits, out_features, k, group_size, asym)
    weight = _dequantize(packed, meta, perm, bits, group_size, asym, in_features, out_features)
    return torch.matmul(grad.reshape(-1, out_features), weight).view(*grad.shape[:-1], in_features)


define_product(
    "cuda_matmul", _ARGUMENTS, on_its_gpu("cuda", "x", _matmul), on_its_gpu("cuda", "grad", _matmul_transposed)
)


# ---- the backend ---------------------------------------------------------------------------------------------------


#: times as fast as fp16 torch.matmul by (bits, act-order) and tokens: 4096 -> 11008, group 128, on an H200
SPEEDS: dict[tuple[int, bool], dict[int, float]] = {
    (4, False): {1: 2.31, 4: 2.36, 8: 2.26, 16: 1.60, 32: 1.61, 64: 1.43, 128: 1.09, 256: 0.93, 1024: 0.93},
    (4, True): {1: 1.96, 16: 1.46, 64: 1.24, 256: 0.83},
    (8, False): {1: 1.52, 16: 1.18, 64: 1.16, 256: 0.83, 1024: 0.90},
    (3, False): {1: 1.67, 16: 1.44, 32: 0.96, 64: 0.45, 256: 0.55, 1024: 0.85},
}
MEASURED_ON = (9, 0)  # the compute capability


class CudaBackend(Backend):
    """Serves fp16 and bf16 activations on NVIDIA GPUs from sm_80."""

    name = "cuda"
    description = "our CUDA kernels: 2, 3, 4, 8 bits, fp16 and bf16, NVIDIA GPUs from sm_80"
    rank = 100

    def unavailable(self) -> str | None:
        """No GPU, only older ones, or no library for those there are."""
        if torch.version.hip:
            return "needs an NVIDIA GPU; this torch is built for AMD"
        if not torch.cuda.is_available():
            built = f"built for CUDA {torch.version.cuda}" if torch.version.cuda else "built without CUDA"
            return f"no CUDA GPU is found by this torch, which is {built}"
        if not native.capabilities():
            major, minor = torch.cuda.get_device_capability()
            return f"needs a GPU of sm_80 or later, {torch.cuda.get_device_name()} is sm_{major}{minor}"
        try:
            native.load()
        except BackendError as error:
            return str(error)
        return None

    def build(self, report: Callable[[str], None]) -> str:
        """Compile csrc/cuda for the GPUs here, or for the architectures in QCORE_CUDA_ARCH, and keep the library in the cache."""
        return str(native.build(report))

    def why_not(self, spec: MatmulSpec) -> str | None:
        """Other devices, dtypes and widths; sizes beyond the kernels'; groups so small that padding them saves nothing."""
        bits, group_size = spec.config.bits, spec.config.group_size
        if spec.device.type != "cuda":
            return f"serves CUDA GPUs, not {spec.device}"
        if spec.dtype not in DTYPES:
            return f"serves float16 and bfloat16 activations, not {spec.dtype}"
        if bits not in WIDTHS:
            return f"serves 2, 3, 4 and 8 bits, not {bits}"
        if (found := torch.cuda.get_device_capability(spec.device)) < native.OLDEST:
            return f"needs sm_80 or later, {spec.device} is sm_{found[0]}{found[1]}"
        width = packed_group_size(group_size, spec.in_features)
        if width > MAX_PADDING * group_size > 0:
            return f"pads groups of {group_size} columns to {width}, which saves no memory; serves groups from 16"
        columns = spec.in_features if width == -1 else grid.num_groups(spec.in_features, group_size) * width
        if spec.out_features > MAX_ROWS or columns > MAX_COLUMNS:
            return f"serves up to {MAX_ROWS} x {MAX_COLUMNS} weights, this one takes {spec.out_features} x {columns}"
        return None

    def speed(self, spec: MatmulSpec) -> float | None:
        """As measured on Hopper, where the kind of layer was."""
        measured = SPEEDS.get((spec.config.bits, spec.act_order))
        here = torch.cuda.get_device_capability(spec.device) == MEASURED_ON
        return speed_at(measured, spec.tokens) if measured and here else None

    def prepare(self, weight: QuantizedWeight, spec: MatmulSpec) -> dict[str, Tensor]:
        """Lay codes, scales and zeros out as the kernels read them.

        Returns packed uint8, meta (scales and zeros in the activations' dtype) and perm int32, empty where columns are in
        order. Raises BackendError for scales that dtype cannot hold, and zeros that are no integers of the grid.
        """
        bits, n, columns = spec.config.bits, weight.out_features, weight.in_features
        perm, group_size, groups = layout(weight.g_idx.cpu(), spec.config.group_size)
        k = columns if perm is None else perm.shape[0]
        if k > MAX_COLUMNS:
            raise _refusal(spec, f"its columns take {k} when packed by group, at most {MAX_COLUMNS} are served")
        scales, zeros = _checked_meta(weight, spec)
        with torch.cuda.device(spec.device):
            device, stream = spec.device, torch.cuda.current_stream().cuda_stream
            packed_size, meta_size = _sizes(bits, n, k, group_size, not spec.config.sym)
            packed = torch.empty(packed_size, dtype=torch.uint8, device=device)
            meta = torch.empty(meta_size, dtype=spec.dtype, device=device)
            perm = torch.empty(0, dtype=torch.int32, device=device) if perm is None else perm.to(device)
            codes = weight.codes.to(device).contiguous()
            native.call(
                "qc_repack", bits, n, columns, k, codes.data_ptr(), _pointer(perm), packed.data_ptr(), stream
            )  # fmt: skip
            scales = scales.to(device).index_select(1, groups.to(device)).contiguous()
            if zeros is not None:
                zeros = zeros.to(device).index_select(1, groups.to(device)).contiguous()
            native.call(
                "qc_pack_meta", bits, DTYPES[spec.dtype], n, len(groups), scales.data_ptr(),
                None if zeros is None else zeros.data_ptr(), meta.data_ptr(), stream,
            )  # fmt: skip
            if bits >= 4:
                _reserve(torch.cuda.current_device())
        return {"packed": packed, "meta": meta, "perm": perm}

    def matmul(self, x: Tensor, buffers: dict[str, Tensor], spec: MatmulSpec) -> Tensor:
        """Multiply; within autocast x takes the dtype of the layer, as torch's own linears have it."""
        if torch.is_autocast_enabled("cuda"):
            x = x.to(buffers["meta"].dtype)
        config = spec.config
        y: Tensor = torch.ops.qcore.cuda_matmul(
            x, buffers["packed"], buffers["meta"], buffers["perm"], config.bits,
            packed_group_size(config.group_size, spec.in_features), not config.sym, spec.in_features, spec.out_features,
        )  # fmt: skip
        return y


def _checked_meta(weight: QuantizedWeight, spec: MatmulSpec) -> tuple[Tensor, Tensor | None]:
    """Return scales in the activations' dtype and zeros, None for a symmetric grid."""
    scales = weight.scales.to(spec.dtype)
    if not bool((scales.isfinite() & ((scales != 0) | (weight.scales == 0))).all()):
        largest = float(weight.scales.abs().max())
        raise _refusal(spec, f"{spec.dtype} cannot hold its scales ({weight.scales.dtype}, up to {largest:.3g})")
    if spec.config.sym:
        return scales, None
    if weight.zeros.is_floating_point():
        raise _refusal(spec, "its zeros are floating point, only integers are served")
    low, high = (int(each) for each in weight.zeros.aminmax())
    if low < 0 or high > 1 << spec.config.bits:
        raise _refusal(spec, f"its zeros span {low} to {high}, served are 0 to {1 << spec.config.bits}")
    return scales, weight.zeros


def _refusal(spec: MatmulSpec, reason: str) -> BackendError:
    layer = f"{spec.in_features} -> {spec.out_features}, {spec.config}"
    return BackendError(f"cuda cannot serve the layer {layer}: {reason}. Load it with backend='torch_reference'.")


@hookimpl
def qcore_backends() -> list[Backend]:
    return [CudaBackend()]
