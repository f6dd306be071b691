"""QuantLinear, the one nn.Module that every backend runs behind, and small tools on linears."""

from __future__ import annotations

from collections.abc import Callable, Iterable

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
    ) -> None:
        super().__init__()
        self.in_features, self.out_features = weight.in_features, weight.out_features
        self.config: QuantConfig = weight.config
        self.weight_source = weight_source
        self.bias = None if weight.bias is None else nn.Parameter(weight.bias.to(device, dtype), requires_grad=False)
        self.spec = MatmulSpec(
            weight.config, weight.in_features, weight.out_features, weight.act_order, dtype, torch.device(device)
        )
        self.backend = choose(backends, self.spec, wanted)
        buffers = self.backend.prepare(weight, self.spec)
        self._names = tuple(buffers)
        for name, value in buffers.items():
            # not persistent: a backend's layout is nobody's file format; qcore.save writes real ones
            self.register_buffer(name, value, persistent=False)

    def forward(self, x: Tensor) -> Tensor:
        y = self.backend.matmul(x, {name: getattr(self, name) for name in self._names}, self.spec)
        return y if self.bias is None else y + self.bias

    def extra_repr(self) -> str:
        return f"{self.in_features} -> {self.out_features}, {self.config}, backend={self.backend.name}"


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
