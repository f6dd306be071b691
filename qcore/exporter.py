"""The fourth kind of plugin: an exporter maps one on-disk format to the canonical form and back.

`Content` is the neutral, streamed view of a quantized model. A format that can be read yields one, a format that can be
written consumes one, and so any readable checkpoint converts to any format that can hold it.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar

from .config import QuantConfig

if TYPE_CHECKING:
    from torch import Tensor

    from .checkpoint import ModelFolder
    from .weight import QuantizedWeight


@dataclass(frozen=True)
class LayerSpec:
    """What a format must know about a linear to say whether it can hold it."""

    name: str
    config: QuantConfig
    in_features: int
    out_features: int
    act_order: bool = False


@dataclass(frozen=True)
class Content:
    """A quantized model as a stream: nothing is read before it is asked for.

    config: the model's config.json without `quantization_config`.
    layers: the quantized linears, in order. weight: name -> QuantizedWeight.
    tensors: names of all other tensors, in order. tensor: name -> Tensor.
    provenance: how it was quantized (algorithm, parameters, calibration, per-layer records); free of times.
    files: small files to carry along (tokenizer, generation config, chat template), name in the folder -> path.
    notes: what a reader should be told about the source (a mislabelled zero-point convention, say).
    source: the model folder it was opened from, which knows dtypes and sizes; None for a model in memory.
    """

    config: Mapping[str, Any]
    layers: Mapping[str, LayerSpec]
    weight: Callable[[str], QuantizedWeight]
    tensors: Sequence[str]
    tensor: Callable[[str], Tensor]
    provenance: Mapping[str, Any] = field(default_factory=dict)
    files: Mapping[str, Path] = field(default_factory=dict)
    notes: tuple[str, ...] = ()
    source: ModelFolder | None = None


class Exporter(ABC):
    """Base of every exporter plugin. Formats kept in safetensors subclass `qcore.TensorExporter` instead."""

    name: ClassVar[str]
    description: ClassVar[str] = ""
    #: what stands as `quant_method` in the config of its folders, for transformers
    quant_methods: ClassVar[tuple[str, ...]] = ()
    #: weight files of its folders that are not *.safetensors, to be fetched from a hub
    weight_files: ClassVar[tuple[str, ...]] = ()

    @abstractmethod
    def why_not(self, layer: LayerSpec) -> str | None:
        """Why this format cannot hold a linear of such a shape and grid exactly, or None."""

    def why_not_together(self, layers: Sequence[LayerSpec]) -> str | None:
        """Why it cannot hold these linears in one model (one grid for all, say), or None."""
        return None

    def why_not_model(self, config: Mapping[str, Any]) -> str | None:
        """Why it cannot hold a model with this config.json, or None."""
        return None

    def why_not_exact(self, weight: QuantizedWeight) -> str | None:
        """Why it cannot hold the values of a weight whose spec it can hold, or None."""
        return None

    def nearest(self, weight: QuantizedWeight) -> QuantizedWeight | None:
        """The nearest weight it can hold, for a conversion allowed to lose; None leaves it to be rounded again."""
        return None

    @abstractmethod
    def save(self, content: Content, folder: Path) -> None:
        """Write a complete model into an existing empty folder."""

    def detects(self, folder: Path, config: Mapping[str, Any]) -> bool:
        """Whether a folder with this config.json is of this format. Formats that cannot be read say False."""
        return False

    def open(self, folder: Path) -> Content:
        """Open a folder of this format.

        Raises CheckpointError when files and config contradict each other.
        """
        raise NotImplementedError(f"format {self.name!r} cannot be read")


def refusals(
    exporter: Exporter, layers: Mapping[str, LayerSpec], config: Mapping[str, Any]
) -> Iterator[tuple[LayerSpec | None, str]]:
    """Yield each linear that a format cannot hold and why, then None and why it cannot hold such a model of them all."""
    for layer in layers.values():
        if reason := exporter.why_not(layer):
            yield layer, reason
    if reason := exporter.why_not_model(config) or exporter.why_not_together(list(layers.values())):
        yield None, reason
