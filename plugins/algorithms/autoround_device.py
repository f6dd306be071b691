"""What AutoRound needs to know of a device: precisions, products of 8-bit floats, equal bits in equal runs, copies beside the work."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterator, Sequence
from functools import cache
from typing import Any

import torch
from torch import Tensor, nn

from qcore import BlockContext

# ---- precision -------------------------------------------------------------------------------------------------------


def has_bfloat16(device: torch.device) -> bool:
    """Whether a device multiplies bfloat16 natively. CPUs are left in float32: few do, and results should not depend on which."""
    return device.type == "cuda" and torch.cuda.is_bf16_supported(including_emulation=False)


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


# ---- gradients in 8 bits ---------------------------------------------------------------------------------------------

# A product whose gradient of the weight is one product of 8-bit floats: SignSGD takes no more than its sign, and it sums over
# thousands of tokens, whose rounding goes either way. What flows on to other linears is not rounded. An op of its own, for
# torch.compile takes long to see through an autograd.Function, and looks at seven of them in a block.
_LIBRARY = torch.library.Library("qcore", "FRAGMENT")
_LIBRARY.define("autoround_linear8(Tensor x, Tensor weight) -> Tensor", tags=(torch.Tag.pt2_compliant_tag,))
_LIBRARY.impl("autoround_linear8", nn.functional.linear, "CompositeExplicitAutograd")


@torch.library.register_fake("qcore::autoround_linear8", lib=_LIBRARY)
def _linear8_shape(x: Tensor, weight: Tensor) -> Tensor:
    return x.new_empty((*x.shape[:-1], len(weight)))


def gradient8(grad: Tensor, x: Tensor) -> Tensor:
    """Return grad' @ x [out, in] from grad [..., out] as e5m2, which has float16's range, and x [..., in] as e4m3, scaled to its largest value."""
    x, grad = x.reshape(-1, x.shape[-1]), grad.reshape(-1, grad.shape[-1])
    largest = x.abs().amax().float().clamp(min=1e-12)
    X = (x.t() * (448 / largest)).clamp(-448, 448).to(torch.float8_e4m3fn).contiguous()  # [in, tokens]
    Y = grad.t().clamp(-57344, 57344).to(torch.float8_e5m2).contiguous()  # [out, tokens]
    one = torch.ones_like(largest)
    return torch._scaled_mm(Y, X.t(), scale_a=one, scale_b=largest / 448, out_dtype=grad.dtype)


def _linear8_backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, Tensor]:
    x, weight = ctx.saved_tensors
    return grad @ weight if ctx.needs_input_grad[0] else None, gradient8(grad, x)


torch.library.register_autograd(
    "qcore::autoround_linear8",
    _linear8_backward,
    setup_context=lambda ctx, inputs, output: ctx.save_for_backward(*inputs),
    lib=_LIBRARY,
)


class Linear8(nn.Linear):
    """A linear with `gradient8`; modules take on this class for a while, so that one compilation serves all blocks."""

    def forward(self, input: Tensor) -> Tensor:
        output: Tensor = torch.ops.qcore.autoround_linear8(input, self.weight)
        return output if self.bias is None else output + self.bias


@contextlib.contextmanager
def gradients_in_8_bits(modules: Sequence[nn.Module]) -> Iterator[None]:
    """Let linears be Linear8 within."""
    own = [type(module) for module in modules]
    try:
        for module in modules:
            module.__class__ = Linear8
        yield
    finally:
        for module, kind in zip(modules, own, strict=True):
            module.__class__ = kind


def has_float8(device: torch.device) -> bool:
    """Whether a device multiplies 8-bit floats."""
    return device.type == "cuda" and torch.version.hip is None and torch.cuda.get_device_capability(device) >= (8, 9)


def fits_float8(module: nn.Module, tokens: int) -> bool:
    """Whether a linear's gradient can be a product of 8-bit floats: plain, of a half type, all sides multiples of 16."""
    half = type(module) is nn.Linear and module.weight.dtype in (torch.float16, torch.bfloat16)
    return half and all(size % 16 == 0 for size in (tokens, *module.weight.shape))


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
