"""QuantLinear, the one nn.Module that every backend runs behind, and small tools on linears."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence

import torch
from torch import Tensor, nn

from .backend import Backend, MatmulSpec, choose
from .config import QuantConfig
from .errors import ModelError
from .weight import QuantizedWeight


class QuantLinear(nn.Module):
    """A linear layer whose weight is quantized: y = x @ W.T + bias, x [..., in_features].

    weight_source gives the exact QuantizedWeight again whenever the model is saved, whatever layout the backend
    keeps; it reads from disk or from a compact copy, so nothing is held twice on the device.
    """

    def __init__(
        self,
        weight: QuantizedWeight,
        backends: Iterable[Backend],
        device: torch.device,
        dtype: torch.dtype,
        weight_source: Callable[[], QuantizedWeight],
        wanted: str = "auto",
        tokens: int = 1,
    ) -> None:
        super().__init__()
        self.in_features, self.out_features = weight.in_features, weight.out_features
        self.config: QuantConfig = weight.config
        self.weight_source = weight_source
        self.bias = None if weight.bias is None else nn.Parameter(weight.bias.to(device, dtype), requires_grad=False)
        self.spec = MatmulSpec.of(weight, dtype, torch.device(device), tokens)
        self.backend = choose(backends, self.spec, wanted)
        buffers = self.backend.prepare(weight, self.spec)
        self._names = tuple(buffers)
        for name, value in buffers.items():
            # not persistent: a backend's layout is nobody's file format; qcore.save writes real ones
            self.register_buffer(name, value, persistent=False)

    def forward(self, x: Tensor) -> Tensor:
        y = self.backend.matmul(x, {name: getattr(self, name) for name in self._names}, self.spec)
        return y if self.bias is None else y + self.bias

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> QuantLinear:
        """Move, but do not change the types of, what a backend keeps: `model.half()` is about activations."""
        kept = {name: getattr(self, name) for name in self._names}
        super()._apply(fn, recurse)  # type: ignore[no-untyped-call]
        for name, value in kept.items():
            moved = getattr(self, name)
            setattr(self, name, moved if moved.dtype == value.dtype else value.to(moved.device))
        return self

    def extra_repr(self) -> str:
        return f"{self.in_features} -> {self.out_features}, {self.config}, backend={self.backend.name}"


def quant_linears(
    weights: Sequence[QuantizedWeight],
    sources: Sequence[Callable[[], QuantizedWeight]],
    backends: Iterable[Backend],
    device: torch.device,
    dtype: torch.dtype,
    wanted: str = "auto",
    tokens: int = 1,
) -> list[QuantLinear]:
    """Return a QuantLinear for each weight of linears that share their input; one product serves all whose grids allow it."""
    whole = QuantizedWeight.stacked(weights) if len(weights) > 1 else None
    if whole is None:
        pairs = zip(weights, sources, strict=True)
        return [QuantLinear(weight, backends, device, dtype, source, wanted, tokens) for weight, source in pairs]
    spec = MatmulSpec.of(whole, dtype, device, tokens)
    backend = choose(backends, spec, wanted)
    product = _SharedProduct(backend, spec, [weight.out_features for weight in weights])
    buffers = backend.prepare(whole, spec)
    return [
        QuantLinear(weight, [_Part(product, index, buffers)], device, dtype, source)
        for index, (weight, source) in enumerate(zip(weights, sources, strict=True))
    ]


class _SharedProduct:
    """The product of several linears of one input: the first that is called computes it, the others take their part.

    The input is known by identity; one that was changed in place, or needs a gradient now, is another. Whatever the order of
    calls, every result is that of a product of its own.
    """

    def __init__(self, backend: Backend, spec: MatmulSpec, sizes: list[int]) -> None:
        self.backend, self.spec, self.sizes = backend, spec, sizes
        self.x: Tensor | None = None
        self.state: tuple[int, bool] = (0, False)
        self.parts: list[Tensor | None] = []

    def part(self, index: int, x: Tensor, buffers: dict[str, Tensor]) -> Tensor:
        untracked = torch.compiler.is_compiling() or x.is_inference()
        state = (0 if untracked else x._version, x.requires_grad and torch.is_grad_enabled())
        if x is not self.x or state != self.state or self.parts[index] is None:
            self.x, self.state = x, state
            self.parts = list(torch.split(self.backend.matmul(x, buffers, self.spec), self.sizes, -1))
        y = self.parts[index]
        assert y is not None
        self.parts[index] = None
        if all(part is None for part in self.parts):
            self.x = None
        return y


class _Part(Backend):
    """The backend of one of several linears that are multiplied as one; all of them hold the same buffers."""

    rank = 0

    def __init__(self, product: _SharedProduct, index: int, buffers: dict[str, Tensor]) -> None:
        self.name = product.backend.name  # type: ignore[misc]
        self.product, self.index, self.buffers = product, index, buffers

    def why_not(self, spec: MatmulSpec) -> str | None:
        return None

    def prepare(self, weight: QuantizedWeight, spec: MatmulSpec) -> dict[str, Tensor]:
        return self.buffers

    def matmul(self, x: Tensor, buffers: dict[str, Tensor], spec: MatmulSpec) -> Tensor:
        return self.product.part(self.index, x, buffers)


def weight_of(module: nn.Module) -> Tensor:
    """Return a linear's weight as [out, in], a view: Conv1D keeps it transposed."""
    weight = module.weight
    if not isinstance(weight, Tensor):
        raise ModelError(f"{type(module).__name__} has no weight tensor.")
    return weight if isinstance(module, nn.Linear) else weight.t()


def set_weight(module: nn.Module, weight: Tensor) -> None:
    """Point a linear at another weight [out, in], in the module's own layout; the old tensor is left alone."""
    layout = weight if isinstance(module, nn.Linear) else weight.t()
    module.weight = nn.Parameter(layout, requires_grad=False)


def replace_module(model: nn.Module, name: str, module: nn.Module) -> None:
    """Put a module in the place of the one with this dotted name."""
    parent, _, child = name.rpartition(".")
    setattr(model.get_submodule(parent), child, module)
