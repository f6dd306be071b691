"""AWQ's GEMM format, as AutoAWQ, vLLM, SGLang and transformers read it (docs/formats.md).

4 bits, codes packed along the outputs, true zero points, no act-order; one grid for the whole model. Symmetric weights are
written with their zero point of 8 and `zero_point: true`: readers that take `zero_point: false` differ in what they
make of it (vLLM issue 7517). The key `sym`, which they ignore, lets qcore know again.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

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
    read_json,
)

from .layouts import Columns, float_linears, grid_of, layers_of, why_not_one_grid, zeros_beyond

LAYOUT = Columns()
SIDE_FILE = "quant_config.json"  # where old AutoAWQ keeps its config
SYNONYMS = {"w_bit": "bits", "q_group_size": "group_size"}


class Awq(TensorExporter):
    """AWQ, version gemm."""

    name = "awq"
    description = "AWQ GEMM, 4 bits, read by AutoAWQ, GPTQModel, vLLM, SGLang and transformers"
    quant_methods = ("awq",)

    def why_not(self, layer: LayerSpec) -> str | None:
        """See Columns."""
        return LAYOUT.why_not(layer)

    def why_not_together(self, layers: Sequence[LayerSpec]) -> str | None:
        """The config has one grid for all."""
        return why_not_one_grid(layers)

    def why_not_exact(self, weight: QuantizedWeight) -> str | None:
        """Integer zero points that can be stored."""
        found = zeros_beyond(weight, 0, 15)
        return found and f"it holds integer zero points 0 to 15, found {found}"

    def encode(self, name: str, weight: QuantizedWeight) -> dict[str, Tensor]:
        """See TensorExporter."""
        return LAYOUT.encode(name, weight)

    def quantization_config(self, content: Content) -> dict[str, Any]:
        """The keys AutoAWQ writes; linears in float stand under modules_to_not_convert."""
        config = next(iter(content.layers.values())).config
        return {
            "quant_method": "awq",
            "bits": 4,
            "group_size": config.group_size,
            "zero_point": True,
            "version": "gemm",
            "sym": config.sym,
            "modules_to_not_convert": float_linears(content),
        }

    def detects(self, folder: Any, config: Mapping[str, Any]) -> bool:
        """By quant_method; old AutoAWQ folders have only quant_config.json."""
        quantization = config.get("quantization_config")
        if quantization is None:
            return (folder / SIDE_FILE).is_file()
        return isinstance(quantization, dict) and quantization.get("quant_method") == "awq"

    def read_quantization(self, folder: ModelFolder) -> dict[str, Any]:
        """Return the config with synonyms resolved and its grid under "base"."""
        found = folder.config.get("quantization_config") or read_json(folder.path / SIDE_FILE)
        if not isinstance(found, dict):
            raise CheckpointError(f"{folder.path}: quantization_config is no object.")
        values = {SYNONYMS.get(key, key): value for key, value in found.items()}
        version = str(values.get("version", values.get("format", "gemm"))).lower()
        if version != "gemm":
            raise CheckpointError(
                f"{folder.path}: quantization_config.version is {version!r}; qcore reads AWQ's gemm. "
                "AutoAWQ can save the model as gemm."
            )
        if "group_size" not in values:
            raise CheckpointError(f"{folder.path}: quantization_config has no group_size.")
        values.setdefault("sym", values.get("zero_point") is False)
        return {**values, "base": grid_of(values, f"{folder.path}: quantization_config")}

    def layers_in(self, folder: ModelFolder, quantization: Mapping[str, Any]) -> dict[str, LayerSpec]:
        """See TensorExporter."""
        return layers_of(folder, lambda name: (LAYOUT, quantization["base"]), "awq")

    def decode(
        self, layer: LayerSpec, tensors: Mapping[str, Tensor], quantization: Mapping[str, Any]
    ) -> QuantizedWeight:
        """See TensorExporter."""
        return LAYOUT.decode(layer, tensors)


@hookimpl
def qcore_exporters() -> list[Exporter]:
    return [Awq()]
