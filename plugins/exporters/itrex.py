"""What auto-round 0.1 to 0.9 exported for Intel CPUs (`format="itrex"`), as intel-extension-for-transformers reads it.

GPTQ's rows with zero - 1 and without g_idx; scales in the dtype that the config names; a bias for every linear, of zeros where
the model has none. Its packing puts 32 // bits codes in a word and leaves the rest of a word empty, which is GPTQ's own at 2, 4 and
8 bits, the widths written here. A zero point of 0 is stored as a field of ones. The config calls itself gptq
(auto-round v0.1 and v0.9, auto_round/export/export_to_itrex).
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from qcore import (
    CheckpointError,
    Content,
    Exporter,
    LayerSpec,
    ModelFolder,
    QuantizedWeight,
    TensorExporter,
    hookimpl,
)

from .layouts import Rows, grid_of, itrex, layers_of, why_not_one_grid, zeros_beyond

LAYOUT = Rows(1, g_idx=False)
BITS, GROUP_SIZES = (2, 4, 8), (-1, 32, 128)
SCALES = {"fp32": torch.float32, "fp16": torch.float16, "bf16": torch.bfloat16}
SIDE_FILE = "quantize_config.json"


class Itrex(TensorExporter):
    """auto-round's layout for intel-extension-for-transformers."""

    name = "itrex"
    description = "auto-round 0.1 to 0.9's export for Intel CPUs, read by intel-extension-for-transformers"

    def why_not(self, layer: LayerSpec) -> str | None:
        """Widths and group sizes that its config allows, whole words."""
        config = layer.config
        if config.bits not in BITS:
            return f"{config.bits} bits; qcore writes {', '.join(map(str, BITS))}, whose codes fill whole words"
        if config.group_size not in GROUP_SIZES:
            return f"groups of {config.group_size}; its config allows {', '.join(map(str, GROUP_SIZES))}"
        return LAYOUT.why_not(layer)

    def why_not_together(self, layers: Sequence[LayerSpec]) -> str | None:
        """The config has one grid for all."""
        return why_not_one_grid(layers)

    def why_not_exact(self, weight: QuantizedWeight) -> str | None:
        """Integer zero points that can be stored; 0 is a field of ones."""
        found = zeros_beyond(weight, 0, weight.config.maxq)
        return found and f"it holds integer zero points 0 to {weight.config.maxq}, found {found}"

    def encode(self, name: str, weight: QuantizedWeight) -> dict[str, Tensor]:
        """See TensorExporter; a zero point of 0 becomes a field of ones."""
        wrapped = torch.where(weight.zeros == 0, weight.config.maxq + 1, weight.zeros)
        return LAYOUT.encode(name, replace(weight, zeros=wrapped))

    def quantization_config(self, content: Content) -> dict[str, Any]:
        """The keys auto-round wrote; how it tuned is not known here and left out."""
        configs = Counter(layer.config for layer in content.layers.values())
        scales = content.weight(next(iter(content.layers))).scales.dtype
        return {
            **configs.most_common(1)[0][0].model_dump(),
            "scale_dtype": {dtype: name for name, dtype in SCALES.items()}.get(scales, "fp32"),
            "quant_method": "gptq",
            "desc_act": False,
            "true_sequential": False,
            "damp_percent": 0.01,
            "model_name_or_path": None,
            "model_file_base_name": "model",
        }

    def extra_files(self, content: Content) -> dict[str, Any]:
        """The config stands in a file of its own too."""
        return {SIDE_FILE: self.quantization_config(content)}

    def detects(self, folder: Path, config: Mapping[str, Any]) -> bool:
        """By the dtype of scales under quant_method gptq."""
        quantization = config.get("quantization_config")
        return isinstance(quantization, dict) and itrex(quantization)

    def read_quantization(self, folder: ModelFolder) -> dict[str, Any]:
        """Return the config with its grid under "base"."""
        found = super().read_quantization(folder)
        missing = [key for key in ("bits", "group_size") if key not in found]
        if missing:
            raise CheckpointError(f"{folder.path}: quantization_config has no {' and no '.join(missing)}.")
        base = grid_of(found, f"{folder.path}: quantization_config")
        if base.bits not in BITS:
            raise CheckpointError(
                f"{folder.path}: quantization_config has {base.bits} bits; qcore reads itrex at {BITS}."
            )
        return {**found, "base": base}

    def layers_in(self, folder: ModelFolder, quantization: Mapping[str, Any]) -> dict[str, LayerSpec]:
        """See TensorExporter."""
        return layers_of(folder, lambda name: (LAYOUT, quantization["base"]), "gptq (itrex)")

    def decode(
        self, layer: LayerSpec, tensors: Mapping[str, Tensor], quantization: Mapping[str, Any]
    ) -> QuantizedWeight:
        """See TensorExporter."""
        found = LAYOUT.decode(layer, tensors)
        return replace(found, zeros=torch.where(found.zeros > layer.config.maxq, 0, found.zeros))


@hookimpl
def qcore_exporters() -> list[Exporter]:
    return [Itrex()]
