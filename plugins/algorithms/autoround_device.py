"""What AutoRound needs to know of a device: precisions, products of 8-bit floats, equal bits in equal runs, copies beside the work."""

from __future__ import annotations

import contextlib
import importlib.util
import math
import os
from collections.abc import Iterator, Sequence
from functools import cache
from typing import Any

import torch
from torch import Tensor, nn

from qcore import BlockContext

# ---- precision -------------------------------------------------------------------------------------------------------


def has_bfloat16(device: torch.device) -> bool:
    """Whether a device multiplies bfloat16 natively: of GPUs most, of CPUs some."""
    if device.type == "cuda":
        return torch.cuda.is_bf16_supported(including_emulation=False)
    native = getattr(torch.cpu, "_is_avx512_bf16_supported", None)
    return device.type == "cpu" and native is not None and native()


def precision(block: BlockContext, amp: bool) -> tuple[torch.dtype, contextlib.AbstractContextManager[Any]]:
    """Return the dtype of the block's inputs and weights, and the context its forward runs in."""
    own = next(iter(block.linears.values())).weight.dtype
    if not amp:
        return torch.float32, contextlib.nullcontext()
    if own != torch.float32 or not has_bfloat16(block.device):
        return own, contextlib.nullcontext()
    return own, torch.autocast(block.device.type, torch.bfloat16)


@contextlib.contextmanager
def reproducible(device: torch.device) -> Iterator[None]:
    """Let gradients on a GPU be the same bits every time, where that can be had: attention's are summed in no fixed order else."""
    if not can_reproduce(device):
        yield
        return
    before = torch.are_deterministic_algorithms_enabled(), torch.is_deterministic_algorithms_warn_only_enabled()
    filled = torch.utils.deterministic.fill_uninitialized_memory
    try:
        torch.utils.deterministic.fill_uninitialized_memory = False
        torch.use_deterministic_algorithms(True)
        yield
    finally:
        torch.use_deterministic_algorithms(before[0], warn_only=before[1])
        torch.utils.deterministic.fill_uninitialized_memory = filled


@cache
def can_reproduce(device: torch.device) -> bool:
    """Whether torch's deterministic mode works here. cuBLAS must have been told before the process first multiplied on a GPU."""
    if device.type != "cuda":
        return False  # nothing to be done: a CPU's results are the same bits already
    os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
    before = torch.are_deterministic_algorithms_enabled(), torch.is_deterministic_algorithms_warn_only_enabled()
    try:
        torch.use_deterministic_algorithms(True)
        x = torch.ones(16, 16, device=device)
        return bool((x @ x).sum() > 0)
    except RuntimeError:
        return False
    finally:
        torch.use_deterministic_algorithms(before[0], warn_only=before[1])


@contextlib.contextmanager
def full_precision(module: nn.Module) -> Iterator[None]:
    """Let a block of a half type hold its parameters in float32 for a while."""
    own = [(parameter, parameter.data) for parameter in module.parameters()]
    try:
        for parameter, data in own:
            parameter.data = data.float()
        yield
    finally:
        for parameter, data in own:
            parameter.data = data


def cast(value: Any, dtype: torch.dtype) -> Any:
    """Convert the floating tensors of a nested value."""
    if isinstance(value, Tensor):
        return value.to(dtype) if value.is_floating_point() else value
    if isinstance(value, (list, tuple)):
        return type(value)(cast(item, dtype) for item in value)
    return {key: cast(item, dtype) for key, item in value.items()} if isinstance(value, dict) else value


def without_determinism(device: torch.device) -> str:
    """What a report says where equal runs may differ."""
    if device.type != "cuda" or can_reproduce(device):
        return ""
    return "equal runs may differ: set CUBLAS_WORKSPACE_CONFIG=:4096:8 before the process first multiplies on the GPU"


# ---- rough gradients -------------------------------------------------------------------------------------------------

# A product whose gradient of the weight is a product of shorter numbers: 8-bit floats for those of 16, bfloat16 for float32. SignSGD
# takes no more than its sign, and it sums over many tokens, whose rounding goes either way. What flows on to other linears is not rounded.
# These are ops of their own: what torch.compile need not look into it compiles sooner, and what linears share is rounded once.
_LIBRARY = torch.library.Library("qcore", "FRAGMENT")
_TAGS = (torch.Tag.pt2_compliant_tag,)


def _linear(x: Tensor, weight: Tensor) -> Tensor:
    return nn.functional.linear(x, weight)


def _e4m3(x: Tensor) -> tuple[Tensor, Tensor]:
    """Return x [..., in] as e4m3 [in, tokens], scaled to its largest value, and what a 1 of that is worth, float32 []."""
    largest = torch.linalg.vector_norm(x, math.inf, dtype=torch.float32).clamp_(min=1e-12)
    return columns8(x, 448 / largest, torch.float8_e4m3fn), largest / 448


def _e5m2(x: Tensor) -> Tensor:
    """Return x [..., out] as e5m2 [out, tokens], whose range is float16's."""
    return columns8(x, None, torch.float8_e5m2)


def _turned(x: Tensor, dtype: torch.dtype) -> Tensor:
    """The fake of a tensor [..., columns] as 8-bit floats [columns, tokens]."""
    return x.new_empty((x.shape[-1], x.numel() // x.shape[-1]), dtype=dtype)


for schema, function, fake in (
    ("linear(Tensor x, Tensor weight) -> Tensor", _linear, lambda x, weight: x.new_empty((*x.shape[:-1], len(weight)))),
    ("e4m3(Tensor x) -> (Tensor, Tensor)", _e4m3, lambda x: (_turned(x, torch.float8_e4m3fn), x.new_empty((), dtype=torch.float32))),
    ("e5m2(Tensor x) -> Tensor", _e5m2, lambda x: _turned(x, torch.float8_e5m2)),
):  # fmt: skip
    _LIBRARY.define(f"autoround_{schema}", tags=_TAGS)
    _name = f"autoround_{schema.partition('(')[0]}"
    _LIBRARY.impl(_name, function, "CompositeExplicitAutograd")
    torch.library.register_fake(f"qcore::{_name}", fake, lib=_LIBRARY)


def columns8(x: Tensor, factor: Tensor | None, dtype: torch.dtype) -> Tensor:
    """Return x [..., columns] times a factor [] as 8-bit floats [columns, tokens]; what is too large becomes the largest."""
    rows = x.reshape(-1, x.shape[-1])
    if x.is_cuda and importlib.util.find_spec("triton"):
        from . import autoround_triton  # which imports triton

        return autoround_triton.columns8(rows, factor, dtype)
    turned = rows.t().float() if factor is None else rows.t().float() * factor
    return turned.clamp(-torch.finfo(dtype).max, torch.finfo(dtype).max).to(dtype).contiguous()


def gradient8(grad: Tensor, x: Tensor) -> Tensor:
    """Return grad' @ x [out, in] as a product of 8-bit floats, from grad [..., out] and x [..., in]."""
    X, unit = torch.ops.qcore.autoround_e4m3(x)
    Y = torch.ops.qcore.autoround_e5m2(grad)
    return torch._scaled_mm(Y, X.t(), scale_a=torch.ones_like(unit), scale_b=unit, out_dtype=grad.dtype)


def gradient16(grad: Tensor, x: Tensor) -> Tensor:
    """Return grad' @ x [out, in] as a product of bfloat16, from grad [..., out] and x [..., in]."""
    rows = [each.reshape(-1, each.shape[-1]).bfloat16() for each in (grad, x)]
    return (rows[0].t() @ rows[1]).to(grad.dtype)


def _backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, Tensor]:
    x, weight = ctx.saved_tensors
    rough = gradient16 if grad.dtype == torch.float32 else gradient8
    return grad @ weight if ctx.needs_input_grad[0] else None, rough(grad, x)


torch.library.register_autograd(
    "qcore::autoround_linear",
    _backward,
    setup_context=lambda ctx, inputs, output: ctx.save_for_backward(*inputs),
    lib=_LIBRARY,
)


class RoughLinear(nn.Linear):
    """A linear whose weight's gradient is rough; modules take on this class for a while, so that one compilation serves all blocks."""

    def forward(self, input: Tensor) -> Tensor:
        output: Tensor = torch.ops.qcore.autoround_linear(input, self.weight)
        return output if self.bias is None else output + self.bias


@contextlib.contextmanager
def rough_gradients(modules: Sequence[nn.Module]) -> Iterator[None]:
    """Let linears be RoughLinear within."""
    own = [type(module) for module in modules]
    try:
        for module in modules:
            module.__class__ = RoughLinear
        yield
    finally:
        for module, kind in zip(modules, own, strict=True):
            module.__class__ = kind


def rehearse(modules: Sequence[nn.Module], dtype: torch.dtype) -> None:
    """Let what rough gradients run be compiled, if there are such."""
    for module in modules[:1]:
        x = torch.ones(256, 512, dtype=dtype, device=next(module.parameters()).device)
        (gradient16 if dtype == torch.float32 else gradient8)(x, x)


def rough_type(device: torch.device) -> str | None:
    """What a device multiplies faster than the type blocks are computed in: a GPU 8-bit floats, a CPU bfloat16; None: nothing."""
    if device.type == "cuda":
        return "float8" if torch.version.hip is None and torch.cuda.get_device_capability(device) >= (8, 9) else None
    return "bfloat16" if has_bfloat16(device) else None


def can_be_rough(module: nn.Module, dtype: torch.dtype, tokens: int, device: torch.device) -> bool:
    """Whether a linear's gradient can be: it is plain and, on a GPU, of a half type, all sides multiples of 16."""
    if type(module) is not nn.Linear or rough_type(device) is None:
        return False
    if device.type == "cpu":
        return dtype == torch.float32
    return dtype != torch.float32 and all(size % 16 == 0 for size in (tokens, *module.weight.shape))


# ---- copies ----------------------------------------------------------------------------------------------------------


def beside(items: Iterator[Any], device: torch.device) -> Iterator[Any]:
    """Yield what copies things to a GPU, the copies on a stream of their own.

    The host is most of a step ahead of the GPU, so the copies for a step run beside the one before it.
    """
    side = torch.cuda.Stream(device)
    while True:
        with torch.cuda.stream(side):
            item = next(items)
        current = torch.cuda.current_stream(device)
        current.wait_stream(side)
        for x in tensors_in(item):
            x.record_stream(current)
        yield item
        del item


def tensors_in(value: Any) -> Iterator[Tensor]:
    """Yield the GPU tensors of a nested value."""
    if isinstance(value, Tensor):
        if value.is_cuda:
            yield value
    elif isinstance(value, (list, tuple, dict)):
        for item in value.values() if isinstance(value, dict) else value:
            yield from tensors_in(item)
