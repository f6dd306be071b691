"""The reference backend in plain torch: right everywhere, fast nowhere.

Any device and dtype, any bits and group size, act-order. Weights stay packed (dense little-endian stream along the
input) and are dequantized for each call, in float32, then cast to the activation's dtype.
"""

from __future__ import annotations

import torch
from torch import Tensor

from qcore import Backend, MatmulSpec, QuantizedWeight, grid, hookimpl, packing


def dequantize(
    words: Tensor, scales: Tensor, zeros: Tensor, g_idx: Tensor, bits: int, group_size: int, dtype: torch.dtype
) -> Tensor:
    """Return the weight [out, in] from words int32 [out, ceil(in*bits/32)]; group_size 0 means look up g_idx [in]."""
    columns = g_idx.shape[0]
    codes = packing.unpack(words, bits, columns)  # uint8 [out, in]
    if group_size == 0:
        weight = codes.float().sub_(grid.spread(zeros.float(), g_idx)).mul_(grid.spread(scales.float(), g_idx))
    else:  # in place, as memory traffic is all there is to it; blocks is [out, groups, group_size]
        blocks = codes.unflatten(1, (-1, group_size)).float()
        weight = blocks.sub_(zeros.float()[..., None]).mul_(scales.float()[..., None]).flatten(1)
    return weight.to(dtype)


@torch.library.custom_op("qcore::reference_matmul", mutates_args=())
def reference_matmul(
    x: Tensor, words: Tensor, scales: Tensor, zeros: Tensor, g_idx: Tensor, bits: int, group_size: int
) -> Tensor:
    """Return x [..., in] @ W.T as [..., out]."""
    return x @ dequantize(words, scales, zeros, g_idx, bits, group_size, x.dtype).t()


@reference_matmul.register_fake
def _(x: Tensor, words: Tensor, scales: Tensor, zeros: Tensor, g_idx: Tensor, bits: int, group_size: int) -> Tensor:
    return x.new_empty(*x.shape[:-1], words.shape[0])


@torch.library.custom_op("qcore::reference_matmul_transposed", mutates_args=())
def reference_matmul_transposed(
    grad: Tensor, words: Tensor, scales: Tensor, zeros: Tensor, g_idx: Tensor, bits: int, group_size: int
) -> Tensor:
    """Return grad [..., out] @ W as [..., in]: the gradient of x."""
    return grad @ dequantize(words, scales, zeros, g_idx, bits, group_size, grad.dtype)


@reference_matmul_transposed.register_fake
def _(grad: Tensor, words: Tensor, scales: Tensor, zeros: Tensor, g_idx: Tensor, bits: int, group_size: int) -> Tensor:
    return grad.new_empty(*grad.shape[:-1], g_idx.shape[0])


def _save(ctx, inputs, output) -> None:  # type: ignore[no-untyped-def]
    _, *tensors, bits, group_size = inputs
    ctx.save_for_backward(*tensors)
    ctx.bits, ctx.group_size = bits, group_size


def _backward(ctx, grad: Tensor):  # type: ignore[no-untyped-def]
    grad_x = reference_matmul_transposed(grad, *ctx.saved_tensors, ctx.bits, ctx.group_size)
    return grad_x, None, None, None, None, None, None


reference_matmul.register_autograd(_backward, setup_context=_save)


class TorchReference(Backend):
    """Serves every layer; `auto` takes it when nothing faster can."""

    name = "torch_reference"
    description = "plain torch: any device, dtype, bits and group size; slow"
    rank = 0

    def why_not(self, spec: MatmulSpec) -> str | None:
        """It serves everything."""
        return None

    def prepare(self, weight: QuantizedWeight, spec: MatmulSpec) -> dict[str, Tensor]:
        """Pack the codes; scales and zeros stay as they are."""
        buffers = {
            "words": packing.pack(weight.codes, weight.bits),
            "scales": weight.scales,
            "zeros": weight.zeros,
            "g_idx": weight.g_idx,
        }
        return {name: value.to(spec.device, copy=True) for name, value in buffers.items()}

    def matmul(self, x: Tensor, buffers: dict[str, Tensor], spec: MatmulSpec) -> Tensor:
        """Dequantize and multiply."""
        group_size = spec.in_features if spec.config.group_size == -1 else spec.config.group_size
        plain = not spec.act_order and spec.in_features % group_size == 0
        b = buffers
        y: Tensor = torch.ops.qcore.reference_matmul(
            x, b["words"], b["scales"], b["zeros"], b["g_idx"], spec.config.bits, group_size if plain else 0
        )
        return y


@hookimpl
def qcore_backends() -> list[Backend]:
    return [TorchReference()]
