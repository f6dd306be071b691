"""A plain Hugging Face checkpoint: every weight multiplied out, in the model's own dtype, for tools that read no other.

It is written and not read as a quantized model: once multiplied out, it is one like any other.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from qcore import (
    CheckpointError,
    Content,
    Exporter,
    FolderExporter,
    LayerSpec,
    QuantizedWeight,
    hookimpl,
    transposed_linears,
)

DTYPES = {"float16": torch.float16, "bfloat16": torch.bfloat16, "float32": torch.float32}


class HfDequantized(FolderExporter):
    """A float checkpoint. dtype and transposed (the names of Conv1D weights) go by the model when something is saved."""

    name = "hf-dequantized"
    description = "a plain float checkpoint, every weight multiplied out; written, not read"

    def __init__(self, dtype: torch.dtype = torch.float16, transposed: frozenset[str] = frozenset()) -> None:
        self.dtype, self.transposed = dtype, transposed

    def why_not(self, layer: LayerSpec) -> str | None:
        """Holds every grid."""
        return None

    def save(self, content: Content, folder: Path) -> None:
        """See FolderExporter."""
        chosen = type(self)(_dtype(content.config), transposed_linears(content.config, content.layers))
        chosen.shard_bytes = self.shard_bytes
        super(HfDequantized, chosen).save(content, folder)

    def encode(self, name: str, weight: QuantizedWeight) -> dict[str, Tensor]:
        """Return the weight as transformers keeps it: Conv1D has it transposed."""
        dense = weight.dequantize(self.dtype)
        if not bool(torch.isfinite(dense).all()):
            raise CheckpointError(f"{name} holds weights beyond what {self.dtype} does.")
        return {f"{name}.weight": dense.t().contiguous() if name in self.transposed else dense}

    def config(self, content: Content) -> dict[str, Any]:
        """The model's config and nothing else."""
        return dict(content.config)


def _dtype(config: Mapping[str, Any]) -> torch.dtype:
    """The dtype the model's config names, else float16."""
    return DTYPES.get(str(config.get("dtype", config.get("torch_dtype"))), torch.float16)


@hookimpl
def qcore_exporters() -> list[Exporter]:
    return [HfDequantized()]
