"""The third kind of plugin: a kernel backend packs a QuantizedWeight into its own layout and multiplies."""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar

from .config import QuantConfig
from .errors import BackendError

if TYPE_CHECKING:
    import torch
    from torch import Tensor

    from .exporter import LayerSpec
    from .weight import QuantizedWeight


@dataclass(frozen=True)
class MatmulSpec:
    """Everything the choice of a backend may depend on. Nothing else does."""

    config: QuantConfig
    in_features: int
    out_features: int
    act_order: bool
    dtype: torch.dtype  # of the activations
    device: torch.device
    tokens: int = 1  # that most products will have: 1 for generation

    @classmethod
    def of(
        cls, layer: LayerSpec | QuantizedWeight, dtype: torch.dtype, device: torch.device, tokens: int = 1
    ) -> MatmulSpec:
        """Return the spec of products by a linear, on a device."""
        return cls(layer.config, layer.in_features, layer.out_features, layer.act_order, dtype, device, tokens)


class Backend(ABC):
    """Base of every backend plugin.

    `matmul` must be a `torch.library` op (or made of them) with a fake implementation and a gradient for x, so that
    torch.compile(fullgraph=True), CUDA graphs and adapter training work. `prepare` must not keep references
    to the weight it is given.
    """

    name: ClassVar[str]
    description: ClassVar[str] = ""
    rank: ClassVar[int]  # among usable backends "auto" takes the highest rank, unless measured speeds say otherwise

    def unavailable(self) -> str | None:
        """Why this backend cannot run on this machine at all (missing library, device), or None."""
        return None

    def build(self, report: Callable[[str], None]) -> str:
        """Build native code for this machine, telling `report` of each step, and return what was built.

        `qcore build-kernels` calls it on backends that override it. The others have no native code and raise BackendError.
        """
        raise BackendError(f"backend {self.name!r} has no native code to build.")

    @abstractmethod
    def why_not(self, spec: MatmulSpec) -> str | None:
        """Why this backend cannot serve a layer, or None. Called only if `unavailable()` is None."""

    def speed(self, spec: MatmulSpec) -> float | None:
        """How many times as fast as the float product it was measured for such a layer on such a device; None if it was not."""
        return None

    @abstractmethod
    def prepare(self, weight: QuantizedWeight, spec: MatmulSpec) -> dict[str, Tensor]:
        """Return the buffers `matmul` needs, on spec.device."""

    @abstractmethod
    def matmul(self, x: Tensor, buffers: dict[str, Tensor], spec: MatmulSpec) -> Tensor:
        """Return x @ W.T, [..., out_features], for x [..., in_features]; no bias."""

    def float_product(self, weight: Tensor) -> Callable[[Tensor], Tensor] | None:
        """Return a product by a float weight [out, in] that is faster than torch's for few tokens, or None.

        Fast generation gives it to linears that are not quantized, such as the head. The result differs from torch's only
        in the order of sums.
        """
        return None


@dataclass(frozen=True)
class Verdict:
    """What is said of a backend for a layer: why it cannot serve, or its measured speed, None where there is none."""

    backend: Backend
    reason: str | None
    speed: float | None = None


def judge(backends: Iterable[Backend], spec: MatmulSpec) -> list[Verdict]:
    """Return a verdict on each backend, the one to take first, those that cannot serve last.

    The highest rank leads. If its speed was measured, whatever was measured faster for this kind of layer goes before it.
    """
    verdicts = []
    for backend in sorted(backends, key=lambda each: (-each.rank, each.name)):
        reason = backend.unavailable() or backend.why_not(spec)
        verdicts.append(Verdict(backend, reason, None if reason else backend.speed(spec)))
    able, unable = ([each for each in verdicts if (each.reason is None) == fit] for fit in (True, False))
    if able and able[0].speed is not None:
        able.sort(key=lambda each: -(each.speed or 0.0))  # stable: equal speeds stay in the order of rank
    return able + unable


def choose(backends: Iterable[Backend], spec: MatmulSpec, wanted: str = "auto") -> Backend:
    """Return the best backend that can serve the layer, or the wanted one.

    Raises BackendError with one reason per backend.
    """
    verdicts = judge([each for each in backends if wanted in ("auto", each.name)], spec)
    if verdicts and verdicts[0].reason is None:
        return verdicts[0].backend
    reasons = [f"{each.backend.name}: {each.reason}" for each in verdicts]
    layer = f"{spec.in_features} -> {spec.out_features}, {spec.config}, {spec.dtype} on {spec.device}"
    raise BackendError(f"no backend can serve the layer {layer}:\n  " + "\n  ".join(reasons or ["none installed"]))


def speed_at(measured: Mapping[int, float], tokens: int) -> float:
    """Read a table of speeds by tokens: between two entries in proportion to the logarithm, beyond them the nearest.

    >>> speed_at({1: 4.0, 16: 2.0}, 4), speed_at({1: 4.0, 16: 2.0}, 64)
    (3.0, 2.0)
    """
    below = max((count for count in measured if count <= tokens), default=min(measured))
    above = min((count for count in measured if count >= tokens), default=max(measured))
    if below >= above:
        return measured[above]
    share = math.log(tokens / below) / math.log(above / below)
    return measured[below] + share * (measured[above] - measured[below])
