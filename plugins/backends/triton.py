"""Fused dequantize-matmul in Triton: 2, 3, 4 and 8 bits on NVIDIA GPUs, without a compiler or a build.

The kernels are in triton_kernels.py, imported only when a layer is prepared. Up to FUSED_MAX tokens a product reads packed
weights alone; beyond, the weight is made once per product and cuBLAS multiplies, which measured faster (docs/backends.md).
"""

from __future__ import annotations

import contextlib
import importlib.util
import itertools
import os
from functools import cache
from math import gcd
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from qcore import Backend, BackendError, MatmulSpec, QuantizedWeight, grid, hookimpl, speed_at

from . import triton_configs
from .columns import layout, packed_group_size
from .triton_configs import Config

DTYPES = (torch.float16, torch.bfloat16)
WIDTHS = (2, 3, 4, 8)
ALIGN = 128  # outputs are padded to it: no kernel masks its reads of weights
FUSED_MAX = 64
MAX_PADDING = 2.0  # groups that padding would make larger than by this are refused: they would save no memory


def fitting(config: Config, bits: int, sub: int, limit: float) -> Config:
    """The same, with fewer loads in flight and then fewer tokens a program until it needs no more shared memory than that.

    A stage holds the inputs and words of a tile. 3 bits have the largest tiles, AMD the least memory.

    >>> fitting(Config(64, 128, 4, 2, 264), 3, 32, 227 * 1024).stages
    1
    """
    words, codes = _shape(bits)
    while config.stages * sub * (2 * codes * config.block_m + 4 * words * config.block_n) > limit:
        if config.stages > 1:
            config = config._replace(stages=config.stages - 1)
        elif config.block_m > 16:
            config = config._replace(block_m=config.block_m // 2)
        else:
            return config  # the smallest there is; the GPU itself says whether it is too large
    return config


@cache
def _shared_memory(device: torch.device) -> float:
    """Bytes of shared memory a program can have."""
    if device.type != "cuda":
        return float("inf")
    properties = torch.cuda.get_device_properties(device)
    return float(getattr(properties, "shared_memory_per_block_optin", properties.shared_memory_per_block))


def interpreted() -> bool:
    """Whether Triton runs kernels in its interpreter, on the CPU."""
    return os.environ.get("TRITON_INTERPRET") == "1"


@cache
def _kernels() -> Any:
    from . import triton_kernels

    return triton_kernels


# ---- the layout ------------------------------------------------------------------------------------------------------


def _shape(bits: int) -> tuple[int, int]:
    """(words, codes) of a lane of a tile: the shortest run of whole words that holds whole codes."""
    shared = gcd(bits, 32)
    return bits // shared, 32 // shared


def lanes(bits: int, columns: int) -> int:
    """Lanes of a tile, 32 or 16: the fewer where the padding at the end of a row would otherwise pass an eighth.

    >>> lanes(4, 4096), lanes(4, 576)
    (32, 16)
    """
    codes = _shape(bits)[1]
    return 32 if -columns % (32 * codes) <= columns // 8 else 16


def pack_tiles(codes: Tensor, bits: int, sub: int) -> Tensor:
    """Return int32 [tiles, words, sub, outputs] for uint8 codes [outputs, columns]; see triton_kernels.py. Padding is 0."""
    words, per_lane = _shape(bits)
    padded = F.pad(codes, (0, -codes.shape[1] % (sub * per_lane), 0, -codes.shape[0] % ALIGN))
    # [outputs, tiles, codes, sub] -> [tiles, codes, sub, outputs]
    tiles = padded.unflatten(1, (-1, per_lane, sub)).permute(1, 2, 3, 0).to(torch.int64)
    stream = torch.zeros(tiles.shape[0], words, *tiles.shape[2:], dtype=torch.int64, device=codes.device)
    for j in range(per_lane):
        word, shift = divmod(j * bits, 32)
        stream[:, word] |= tiles[:, j] << shift
        if shift + bits > 32:
            stream[:, word + 1] |= tiles[:, j] >> (32 - shift)
    stream &= 0xFFFFFFFF
    return torch.where(stream >= 1 << 31, stream - (1 << 32), stream).to(torch.int32).contiguous()


# ---- the ops ---------------------------------------------------------------------------------------------------------


def _launch_sizes(bits: int, group_size: int, columns: int) -> tuple[int, int, int, int]:
    """(words, codes, sub, group size the kernels divide by)."""
    return *_shape(bits), lanes(bits, columns), columns if group_size == -1 else group_size


def _run(bits: int, sub: int, group_size: int, groups: int) -> int:
    """Codes of a lane in a row that share a group: of the whole lane, or of its halves where a lane is one word.

    >>> _run(4, 32, 128, 32), _run(4, 16, 32, 18), _run(3, 32, 96, 10)
    (4, 2, 1)
    """
    words, codes = _shape(bits)
    most = codes if words > 1 else codes // 2
    return most if groups == 1 else gcd(group_size // sub, most)


def _check(
    x: Tensor, width: int, words: Tensor, scales: Tensor, zeros: Tensor, bits: int, columns: int, outputs: int
) -> None:
    """Raise BackendError unless the tensors are what prepare made, and x [..., width] fits them."""
    per_word, codes = _shape(bits)
    sub = lanes(bits, columns)
    expected = (-(-columns // (sub * codes)), per_word, sub, outputs + -outputs % ALIGN)
    if x.dtype not in DTYPES or not x.ndim or x.shape[-1] != width:
        raise BackendError(f"triton: x is {x.dtype} {list(x.shape)}, expected float16 or bfloat16 [..., {width}].")
    if tuple(words.shape) != expected or words.dtype != torch.int32 or not words.is_contiguous():
        raise BackendError(f"triton: words are {words.dtype} {list(words.shape)}, expected int32 {list(expected)}.")
    if not (x.device == words.device == scales.device == zeros.device):
        raise BackendError(f"triton: x is on {x.device}, the layer on {words.device}.")
    if scales.shape[1] != expected[3] or not scales.is_contiguous() or not zeros.is_contiguous():
        raise BackendError(f"triton: scales are {list(scales.shape)}, expected [groups, {expected[3]}].")


def _weight(words, scales, zeros, bits, group_size, columns, outputs, dtype) -> Tensor:  # type: ignore[no-untyped-def]
    """Return the weight [columns, outputs]."""
    per_word, codes, sub, size = _launch_sizes(bits, group_size, columns)
    weight = torch.empty(columns, outputs, dtype=dtype, device=words.device)
    block = 64
    _kernels().dequantize[(-(-outputs // block), words.shape[0])](
        words, scales, zeros, weight, outputs, columns, words.shape[3], size,
        BITS=bits, WORDS=per_word, CODES=codes, SUB=sub, ZERO=-1 if zeros.numel() else grid.symmetric_zero(bits),
        BLOCK_N=block, num_warps=4,
    )  # fmt: skip
    return weight


def _fused(rows, words, scales, zeros, arrived, bits, group_size, columns, outputs, config=None) -> Tensor:  # type: ignore[no-untyped-def]
    """Return rows [m, columns] @ W.T [m, outputs] by the fused kernel, with a Config or the one that is known for such products."""
    m = rows.shape[0]
    per_word, codes, sub, size = _launch_sizes(bits, group_size, columns)
    config = config or triton_configs.config_for(m, columns * outputs, bits, words.device)
    config = fitting(config, bits, sub, _shared_memory(words.device))
    across, tiles = -(-outputs // config.block_n), words.shape[0]
    down = -(-m // config.block_m)
    split = max(1, min(tiles, config.programs // (across * down), 16))
    y = torch.empty(m, outputs, dtype=rows.dtype, device=rows.device)
    sums = torch.empty(split if split > 1 else 0, m, outputs, dtype=torch.float32, device=rows.device)
    _kernels().matmul[(across, split, down)](
        rows, words, scales, zeros, y, sums, arrived, m, outputs, columns, tiles, rows.stride(0), words.shape[3], size,
        BITS=bits, WORDS=per_word, CODES=codes, SUB=sub, ZERO=-1 if zeros.numel() else grid.symmetric_zero(bits),
        RUN=_run(bits, sub, size, scales.shape[0]),
        BLOCK_M=config.block_m, BLOCK_N=config.block_n, SPLIT=split > 1, num_warps=config.warps, num_stages=config.stages,
    )  # fmt: skip
    return y


def _gathered(rows: Tensor, perm: Tensor) -> Tensor:
    """Rows in the order of packed columns, zero where there is none."""
    return F.pad(rows, (0, 1)).index_select(1, perm) if perm.numel() else rows


def _on_its_device(x: Tensor) -> Any:
    return torch.cuda.device(x.get_device()) if x.is_cuda else contextlib.nullcontext()


@torch.library.custom_op("qcore::triton_matmul", mutates_args=())
def triton_matmul(
    x: Tensor, words: Tensor, scales: Tensor, zeros: Tensor, perm: Tensor, arrived: Tensor,
    bits: int, group_size: int, in_features: int, out_features: int,
) -> Tensor:  # fmt: skip
    """Return x [..., in] @ W.T as [..., out]. perm int64 [packed columns], or empty; arrived: zero before and after."""
    columns = perm.numel() or in_features
    _check(x, in_features, words, scales, zeros, bits, columns, out_features)
    rows = x.reshape(-1, in_features)
    if not rows.shape[0]:
        return x.new_empty(*x.shape[:-1], out_features)
    rows = _gathered(rows, perm)
    rows = rows if rows.stride(1) == 1 else rows.contiguous()
    with _on_its_device(x):
        if rows.shape[0] <= FUSED_MAX:
            y = _fused(rows, words, scales, zeros, arrived, bits, group_size, columns, out_features)
        else:
            y = rows @ _weight(words, scales, zeros, bits, group_size, columns, out_features, x.dtype)
    return y.view(*x.shape[:-1], out_features)


@triton_matmul.register_fake
def _(x, words, scales, zeros, perm, arrived, bits, group_size, in_features, out_features) -> Tensor:  # type: ignore[no-untyped-def]
    return x.new_empty(*x.shape[:-1], out_features)


@torch.library.custom_op("qcore::triton_matmul_transposed", mutates_args=())
def triton_matmul_transposed(
    grad: Tensor, words: Tensor, scales: Tensor, zeros: Tensor, perm: Tensor,
    bits: int, group_size: int, in_features: int, out_features: int,
) -> Tensor:  # fmt: skip
    """Return grad [..., out] @ W as [..., in]: the gradient of x."""
    columns = perm.numel() or in_features
    _check(grad, out_features, words, scales, zeros, bits, columns, out_features)
    rows = grad.reshape(-1, out_features)
    with _on_its_device(grad):
        packed = rows @ _weight(words, scales, zeros, bits, group_size, columns, out_features, grad.dtype).t()
    if perm.numel():
        spread = packed.new_zeros(packed.shape[0], in_features + 1)  # the last takes what padding columns give
        packed = spread.index_add_(1, perm, packed)[:, :-1]
    return packed.reshape(*grad.shape[:-1], in_features)


@triton_matmul_transposed.register_fake
def _(grad, words, scales, zeros, perm, bits, group_size, in_features, out_features) -> Tensor:  # type: ignore[no-untyped-def]
    return grad.new_empty(*grad.shape[:-1], in_features)


def _save(ctx, inputs, output) -> None:  # type: ignore[no-untyped-def]
    _, words, scales, zeros, perm, _, *ctx.numbers = inputs
    ctx.save_for_backward(words, scales, zeros, perm)


def _backward(ctx, grad: Tensor):  # type: ignore[no-untyped-def]
    return triton_matmul_transposed(grad, *ctx.saved_tensors, *ctx.numbers), *[None] * 9


triton_matmul.register_autograd(_backward, setup_context=_save)


# ---- the backends ----------------------------------------------------------------------------------------------------


#: times as fast as fp16 torch.matmul by (bits, act-order) and tokens: 4096 -> 11008, group 128, on an H200
SPEEDS: dict[tuple[int, bool], dict[int, float]] = {
    (4, False): {1: 1.40, 16: 1.32, 32: 1.16, 64: 0.67, 128: 0.40, 256: 0.50, 1024: 0.76},
    (4, True): {1: 0.94, 16: 0.90, 64: 0.52, 256: 0.42},
    (8, False): {1: 1.16, 16: 1.11, 64: 0.60, 256: 0.38},
}
MEASURED_ON = (9, 0)  # the compute capability


class TritonBackend(Backend):
    """Serves fp16 and bf16 activations wherever Triton compiles for the GPU."""

    name = "triton"
    description = "Triton kernels: 2, 3, 4, 8 bits, fp16 and bf16, NVIDIA GPUs; nothing to build"
    rank = 50
    hip = False

    def unavailable(self) -> str | None:
        """No Triton, or no GPU of this kind."""
        if importlib.util.find_spec("triton") is None:
            return "the package triton is not installed; pip install triton (Linux)"
        if interpreted():
            return None
        if bool(torch.version.hip) != self.hip:
            return f"needs an {'AMD' if self.hip else 'NVIDIA'} GPU and a torch built for it"
        return None if torch.cuda.is_available() else "torch finds no GPU here"

    def why_not(self, spec: MatmulSpec) -> str | None:
        """Other devices, dtypes and widths; groups so small that padding them saves nothing."""
        bits, group_size = spec.config.bits, spec.config.group_size
        if spec.device.type != ("cpu" if interpreted() else "cuda"):
            return f"serves GPUs, not {spec.device}"
        if interpreted() and spec.dtype == torch.bfloat16:
            return "Triton's interpreter multiplies bfloat16 wrongly"
        if spec.dtype not in DTYPES:
            return f"serves float16 and bfloat16 activations, not {spec.dtype}"
        if bits not in WIDTHS:
            return f"serves 2, 3, 4 and 8 bits, not {bits}"
        width = packed_group_size(group_size, spec.in_features)
        if width > MAX_PADDING * group_size > 0:
            return f"pads groups of {group_size} columns to {width}, which saves no memory; serves groups from 16"
        if spec.in_features * spec.out_features * bits >= 2**34:
            return f"serves weights of up to 2 GiB packed, this one has {spec.out_features} x {spec.in_features}"
        return None

    def speed(self, spec: MatmulSpec) -> float | None:
        """As measured on Hopper, where the kind of layer was."""
        measured = SPEEDS.get((spec.config.bits, spec.act_order))
        here = not self.hip and not interpreted() and torch.cuda.get_device_capability(spec.device) == MEASURED_ON
        return speed_at(measured, spec.tokens) if measured and here else None

    def prepare(self, weight: QuantizedWeight, spec: MatmulSpec) -> dict[str, Tensor]:
        """Lay codes out in tiles; scales and zeros [groups, outputs], scales in float32 for bfloat16 activations.

        Raises BackendError for scales float16 cannot hold.
        """
        bits, device = spec.config.bits, spec.device
        perm, _, groups = layout(weight.g_idx.cpu(), spec.config.group_size)
        codes = weight.codes.to(device)
        if perm is not None:
            perm = torch.where(perm < 0, spec.in_features, perm).to(device, torch.int64)
            codes = F.pad(codes, (0, 1)).index_select(1, perm)
        scales = weight.scales.to(torch.float16 if spec.dtype == torch.float16 else torch.float32)
        if not bool((scales.isfinite() & ((scales != 0) | (weight.scales == 0))).all()):
            raise BackendError(f"triton: float16 cannot hold scales up to {float(weight.scales.abs().max()):.3g}.")

        def side(values: Tensor) -> Tensor:
            chosen = values.index_select(1, groups.to(values.device)).t().to(device)
            return F.pad(chosen, (0, -chosen.shape[1] % ALIGN)).contiguous()

        asymmetric = not spec.config.sym
        zeros = (
            side(weight.zeros.to(torch.float16)) if asymmetric else torch.empty(0, dtype=torch.float16, device=device)
        )
        # one counter for each output tile of a fused product, zero between products
        arrived = torch.zeros(-(-FUSED_MAX // 16) * -(-weight.out_features // 16), dtype=torch.int32, device=device)
        buffers = {
            "words": pack_tiles(codes, bits, lanes(bits, codes.shape[1])),
            "scales": side(scales),
            "zeros": zeros,
            "perm": torch.empty(0, dtype=torch.int64, device=device) if perm is None else perm,
            "arrived": arrived,
        }
        if triton_configs.is_needed(spec.tokens, bits, arrived.device):
            _search(buffers, spec, codes.shape[1])
        return buffers

    def matmul(self, x: Tensor, buffers: dict[str, Tensor], spec: MatmulSpec) -> Tensor:
        """Multiply; within autocast x takes the dtype of the layer, as torch's own linears have it."""
        if torch.is_autocast_enabled("cuda"):
            x = x.to(spec.dtype)
        config, b = spec.config, buffers
        y: Tensor = torch.ops.qcore.triton_matmul(
            x, b["words"], b["scales"], b["zeros"], b["perm"], b["arrived"], config.bits,
            packed_group_size(config.group_size, spec.in_features), spec.in_features, spec.out_features,
        )  # fmt: skip
        return y


def _search(buffers: dict[str, Tensor], spec: MatmulSpec, columns: int) -> None:
    """Find the configuration for such products here, on copies of a weight that together do not fit the GPU's cache."""
    words, scales, zeros, arrived = (buffers[name] for name in ("words", "scales", "zeros", "arrived"))
    cache_size = torch.cuda.get_device_properties(spec.device).L2_cache_size
    copies = [words] + [words.clone() for _ in range(min(15, 2 * cache_size // words.nbytes))]
    x = torch.randn(spec.tokens, columns, device=spec.device).to(spec.dtype)
    numbers = (
        spec.config.bits,
        packed_group_size(spec.config.group_size, spec.in_features),
        columns,
        spec.out_features,
    )
    turn = itertools.cycle(copies)

    def run(config: Config) -> None:
        _fused(x, next(turn), scales, zeros, arrived, *numbers, config)

    with _on_its_device(x):
        triton_configs.search(spec.tokens, spec.config.bits, words.device, run)


@hookimpl
def qcore_backends() -> list[Backend]:
    return [TritonBackend()]
