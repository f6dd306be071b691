"""A backend's product and its gradient as ops of torch: with fake implementations, so that they compile, and autograd.

Library.define rather than custom_op, whose wrapper takes several microseconds a call: longer than a small product, and a decode takes six.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from qcore import BackendError

_LIBRARY = torch.library.Library("qcore", "FRAGMENT")


def define_product(
    name: str, arguments: str, product: Callable[..., Tensor], transposed: Callable[..., Tensor]
) -> None:
    """Make two functions the ops qcore::NAME(x, …), x [..., in] to [..., out], and qcore::NAME_transposed(grad, …), its gradient.

    qcore::NAME_out(x, …, out=) is the first, written to a tensor that is given.

    arguments: their schema after the first, tensors before numbers; the last two are in_features and out_features.
    """
    for op, first, function, width in ((name, "x", product, -1), (f"{name}_transposed", "grad", transposed, -2)):
        _LIBRARY.define(f"{op}(Tensor {first}, {arguments}) -> Tensor", tags=(torch.Tag.pt2_compliant_tag,))
        _LIBRARY.impl(op, function, "CompositeExplicitAutograd")
        torch.library.register_fake(f"qcore::{op}", _shaped(width), lib=_LIBRARY)
    _LIBRARY.define(f"{name}_out(Tensor x, {arguments}, *, Tensor(a!) out) -> Tensor(a!)")
    _LIBRARY.impl(f"{name}_out", _written(product), "CompositeExplicitAutograd")

    def save(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
        held = inputs[1:]
        tensors = [each for each in held if isinstance(each, Tensor)]
        ctx.save_for_backward(*tensors)
        ctx.numbers = held[len(tensors) :]

    def backward(ctx: Any, grad: Tensor) -> tuple[Any, ...]:
        held = (*ctx.saved_tensors, *ctx.numbers)
        return getattr(torch.ops.qcore, f"{name}_transposed")(grad, *held), *[None] * len(held)

    torch.library.register_autograd(f"qcore::{name}", backward, setup_context=save, lib=_LIBRARY)


def _written(product: Callable[..., Tensor]) -> Callable[..., Tensor]:
    """The product written to a tensor that is given."""

    def write(*arguments: Any, out: Tensor) -> Tensor:
        return out.copy_(product(*arguments))

    return write


def _shaped(width: int) -> Callable[..., Tensor]:
    """The fake of an op whose result has, in the place of its last size, the argument number `width`."""

    def fake(x: Tensor, *arguments: Any) -> Tensor:
        return x.new_empty((*x.shape[:-1], arguments[width]))

    return fake


def on_its_gpu(backend: str, first: str, function: Callable[..., Tensor]) -> Callable[..., Tensor]:
    """Return the function run with the GPU of its first argument as the current one."""

    def on_its_device(x: Tensor, *arguments: Any) -> Tensor:
        if not x.is_cuda:
            raise BackendError(f"{backend}: {first} is on {x.device}; this layer was prepared for a CUDA GPU.")
        if x.get_device() == torch.cuda.current_device():
            return function(x, *arguments)
        with torch.cuda.device(x.get_device()):
            return function(x, *arguments)

    return on_its_device
