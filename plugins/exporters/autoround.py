"""auto-round's own format, with its mixed bits, as auto-round, vLLM, SGLang and transformers read it (docs/formats.md).

`packing_format` says which layout the tensors of the whole model have. qcore writes what auto-round itself would: symmetric
weights in GPTQ rows with zero - 1, asymmetric ones of 4 bits as AWQ does, any others in rows with true zero points.
There is no g_idx and so no act-order.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from torch import Tensor

from qcore import (
    CheckpointError,
    Content,
    Exporter,
    LayerSpec,
    ModelFolder,
    QuantConfig,
    QuantizedWeight,
    TensorExporter,
    hookimpl,
)

from .layouts import (
    Columns,
    Layout,
    Rows,
    block_lists,
    float_linears,
    grid_of,
    layers_of,
    matches,
    note_of_zeros,
    zeros_beyond,
)

METHODS = ("auto-round", "intel/auto-round")
V1, AWQ, TRUE = "auto_round:auto_gptq", "auto_round:auto_awq", "auto_round"
LAYOUTS: dict[str, Layout] = {V1: Rows(1, g_idx=False), AWQ: Columns(), TRUE: Rows(0, g_idx=False)}
_PLAIN_NAME = re.compile(r"[\w.]+")


class AutoRound(TensorExporter):
    """auto-round's format. packing: one of `LAYOUTS`; chosen by the layers when something is saved."""

    name = "autoround"
    description = "auto-round's own format, read by auto-round, vLLM, SGLang and transformers"
    quant_methods = METHODS

    def __init__(self, packing: str = TRUE) -> None:
        self.packing = packing

    def why_not(self, layer: LayerSpec) -> str | None:
        """Whole words of 32 bits along both sides, no act-order."""
        return LAYOUTS[packing_for([layer])].why_not(layer) and LAYOUTS[TRUE].why_not(layer)

    def why_not_exact(self, weight: QuantizedWeight) -> str | None:
        """Integer zero points that can be stored."""
        found = zeros_beyond(weight, 0, weight.config.maxq)
        return found and f"it holds integer zero points 0 to {weight.config.maxq}, found {found}"

    def save(self, content: Content, folder: Path) -> None:
        """See TensorExporter; the layout goes by the layers."""
        chosen = type(self)(packing_for(content.layers.values()))
        chosen.shard_bytes = self.shard_bytes
        super(AutoRound, chosen).save(content, folder)

    def encode(self, name: str, weight: QuantizedWeight) -> dict[str, Tensor]:
        """See TensorExporter."""
        return LAYOUTS[self.packing].encode(name, weight)

    def quantization_config(self, content: Content) -> dict[str, Any]:
        """The keys auto-round writes; layers that differ from the rest, 16 bits included, stand under `extra_config`."""
        configs = Counter(layer.config for layer in content.layers.values())
        base = configs.most_common(1)[0][0]
        blocks = block_lists(content.layers)
        extra: dict[str, dict[str, Any]] = {}
        for name, layer in content.layers.items():
            if layer.config != base or not name.startswith(tuple(f"{block}." for block in blocks)):
                extra[name] = {**layer.config.model_dump(), "data_type": "int"}
        for name in float_linears(content):
            if name.startswith(tuple(f"{block}." for block in blocks)):
                extra[name] = {"bits": 16, "data_type": "float"}
        config = {
            "quant_method": METHODS[0],
            **base.model_dump(),
            "data_type": "int",
            "packing_format": self.packing,
            "block_name_to_quantize": ",".join(blocks),
            "provider": "qcore",
        }
        return {**config, "extra_config": extra} if extra else config

    def detects(self, folder: Path, config: Mapping[str, Any]) -> bool:
        """By quant_method."""
        quantization = config.get("quantization_config")
        return isinstance(quantization, dict) and quantization.get("quant_method") in METHODS

    def read_quantization(self, folder: ModelFolder) -> dict[str, Any]:
        """Return the config with its layout under "layout" and its grid under "base"."""
        found = super().read_quantization(folder)
        where = f"{folder.path}: quantization_config"
        kind, weights = found.get("packing_format", found.get("backend", TRUE)), found.get("data_type", "int")
        if not isinstance(kind, str) or weights != "int" or found.get("act_bits", 16) not in (None, 16, 32):
            raise CheckpointError(
                f"{where} has packing_format {kind!r}, data_type {weights!r} and act_bits {found.get('act_bits')!r}; "
                "qcore reads integer weights with float activations."
            )
        if not isinstance(found.get("extra_config") or {}, dict):
            raise CheckpointError(f"{where}.extra_config is no object.")
        missing = [key for key in ("bits", "group_size") if key not in found]
        if missing:
            raise CheckpointError(f"{where} has no {' and no '.join(missing)}.")
        return {**found, "layout": _layout(kind, where), "base": grid_of(found, where)}

    def layers_in(self, folder: ModelFolder, quantization: Mapping[str, Any]) -> dict[str, LayerSpec]:
        """See TensorExporter."""
        layout = LAYOUTS[quantization["layout"]]
        return layers_of(folder, lambda name: (layout, _config_of(name, quantization, folder)), "auto-round")

    def decode(
        self, layer: LayerSpec, tensors: Mapping[str, Tensor], quantization: Mapping[str, Any]
    ) -> QuantizedWeight:
        """See TensorExporter."""
        return LAYOUTS[quantization["layout"]].decode(layer, tensors)

    def notes(
        self, folder: ModelFolder, layers: Mapping[str, LayerSpec], quantization: Mapping[str, Any]
    ) -> tuple[str, ...]:
        """Say so when the file follows the other zero-point convention than it says."""
        layout = LAYOUTS[quantization["layout"]]
        return note_of_zeros(folder, layers, layout.zero_offset) if isinstance(layout, Rows) else ()


def packing_for(layers: Iterable[LayerSpec]) -> str:
    """The layout auto-round would give a model with these layers."""
    grids = {(layer.config.bits, layer.config.sym) for layer in layers}
    if all(sym for _, sym in grids):
        return V1
    fits = all(LAYOUTS[AWQ].why_not(layer) is None for layer in layers)
    return AWQ if fits and grids == {(4, False)} else TRUE


def _layout(kind: str, where: str) -> str:
    """Sort the names that versions of auto-round gave their layouts ("autoround:exllamav2", "auto_round:gptqmodel")."""
    if "awq" in kind:
        return AWQ
    if "gptq" in kind and "gptqmodel" not in kind:
        return V1
    if kind.replace("autoround", "auto_round").split(":")[0] == "auto_round" and not kind.endswith(
        ("llm_compressor", "fp8", "fp8_static", "fake")
    ):
        return TRUE
    raise CheckpointError(f"{where}.packing_format is {kind!r}, which qcore does not read.")


def _config_of(name: str, quantization: Mapping[str, Any], folder: ModelFolder) -> QuantConfig:
    """The base grid with the entry of `extra_config` that names the layer, else the first pattern that matches."""
    base: QuantConfig = quantization["base"]
    where = f"{folder.path}: quantization_config.extra_config"
    entries = quantization.get("extra_config") or {}
    patterns = [key for key in entries if not _PLAIN_NAME.fullmatch(key)]
    key = name if name in entries else next((key for key in patterns if matches(key, name, where)), None)
    if key is None:
        return base
    changes = entries[key]
    if not isinstance(changes, dict):
        raise CheckpointError(f"{where}: {key!r} has {changes!r}, expected an object.")
    given = {field: value for field, value in changes.items() if value is not None}
    if given.get("bits") == 16:
        raise CheckpointError(f"{where}: {key!r} leaves {name} in float, but it is quantized.")
    return grid_of(given, f"{where}: {key!r}", base)


@hookimpl
def qcore_exporters() -> list[Exporter]:
    return [AutoRound()]
