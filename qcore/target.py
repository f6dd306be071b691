"""Targets: programs that load what qcore writes, and the rules by which they do.

The core names none. A plugin offers a `Target`, whose rules cite where they come from; `check` asks one about a folder, or about
a plan before anything is quantized.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, ClassVar, Literal

from .exporter import LayerSpec

if TYPE_CHECKING:
    from .weight import QuantizedWeight

Level = Literal["refuses", "warns", "kernel"]


@dataclass(frozen=True)
class Subject:
    """What is judged.

    format: the format's name. config: config.json, with `quantization_config` for a folder and without for a plan.
    layers: the quantized linears. options: of the target's own, such as tensor_parallel or device.
    weight: reads a quantized linear of a folder; None for a plan.
    """

    format: str
    config: Mapping[str, Any]
    layers: Mapping[str, LayerSpec]
    options: Mapping[str, Any] = field(default_factory=dict)
    weight: Callable[[str], QuantizedWeight] | None = None

    @property
    def quantization(self) -> Mapping[str, Any]:
        """The folder's quantization_config; empty for a plan."""
        found = self.config.get("quantization_config")
        return found if isinstance(found, Mapping) else {}

    def where(self, fits: Callable[[LayerSpec], bool]) -> tuple[str, ...]:
        """Names of the layers for which something holds."""
        return tuple(name for name, layer in self.layers.items() if fits(layer))

    def shards(self, parts: Sequence[str]) -> Iterable[tuple[LayerSpec, ...]]:
        """Groups of layers with one parent that an engine fuses into one (q_proj, k_proj, v_proj)."""
        parents: dict[str, list[LayerSpec]] = {}
        for name, layer in self.layers.items():
            parent, _, last = name.rpartition(".")
            if last in parts:
                parents.setdefault(parent, []).append(layer)
        return [tuple(group) for group in parents.values()]


@dataclass(frozen=True)
class Finding:
    """One outcome: the target refuses, warns (slower, or differently than meant), or says which kernel it will use.

    rule: a short name. layers: those concerned; empty for the whole model. source: where the rule comes from.
    """

    level: Level
    rule: str
    message: str
    layers: tuple[str, ...] = ()
    source: str = ""


class Target(ABC):
    """Base of every target plugin. An instance keeps nothing."""

    name: ClassVar[str]
    description: ClassVar[str] = ""
    #: names of the options it understands, with their defaults
    options: ClassVar[Mapping[str, Any]] = {}

    @abstractmethod
    def check(self, subject: Subject) -> list[Finding]:
        """Return what speaks against loading it, and what will run it."""

    def how_to_load(self, format: str) -> str | None:
        """A few lines of code that load a folder `{folder}` of a format, for model cards; None when it cannot."""
        return None
