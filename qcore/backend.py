"""The third kind of plugin: a kernel backend packs a QuantizedWeight into its own layout and multiplies."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar

from .config import QuantConfig
from .errors import BackendError

if TYPE_CHECKING:
    import torch
    from torch import Tensor

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


class Backend(ABC):
    """Base of every backend plugin.

    `matmul` must be a `torch.library` op (or made of them) with a fake implementation and a gradient for x, so that
    torch.compile(fullgraph=True), CUDA graphs and adapter training work. `prepare` must not keep references
    to the weight it is given.
    """

    name: ClassVar[str]
    description: ClassVar[str] = ""
    rank: ClassVar[int]  # among usable backends the highest rank is taken by "auto"

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

    @abstractmethod
    def prepare(self, weight: QuantizedWeight, spec: MatmulSpec) -> dict[str, Tensor]:
        """Return the buffers `matmul` needs, on spec.device."""

    @abstractmethod
    def matmul(self, x: Tensor, buffers: dict[str, Tensor], spec: MatmulSpec) -> Tensor:
        """Return x @ W.T, [..., out_features], for x [..., in_features]; no bias."""


def choose(backends: Iterable[Backend], spec: MatmulSpec, wanted: str = "auto") -> Backend:
    """Return the backend of the highest rank that can serve the layer, or the wanted one.

    Raises BackendError with one reason per backend.
    """
    reasons = []
    for backend in sorted(backends, key=lambda each: (-each.rank, each.name)):
        if wanted not in ("auto", backend.name):
            continue
        reason = backend.unavailable() or backend.why_not(spec)
        if reason is None:
            return backend
        reasons.append(f"{backend.name}: {reason}")
    layer = f"{spec.in_features} -> {spec.out_features}, {spec.config}, {spec.dtype} on {spec.device}"
    raise BackendError(f"no backend can serve the layer {layer}:\n  " + "\n  ".join(reasons or ["none installed"]))
