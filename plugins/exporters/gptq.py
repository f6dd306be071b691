"""The GPTQ checkpoint format, v1 and v2, as AutoGPTQ, GPTQModel, vLLM and transformers read it (docs/formats.md).

For a linear of K inputs and N outputs, b bits and G groups: qweight int32 [K*b/32, N], codes packed along K;
qzeros int32 [G, N*b/32], zero points packed along N; scales [G, N]; g_idx int32 [K]. v1 stores zero - 1, v2 the zero
itself. A v1 file never holds zero = 0: the -1 it would store spills into its neighbours in most readers.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Mapping
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
    read_json,
)

from .layouts import Rows, grid_of, itrex, layers_of, note_of_zeros, raise_zeros, zeros_beyond

BITS = (2, 3, 4, 8)
SIDE_FILE = "quantize_config.json"
#: linears that vLLM makes one of, for which it looks in `dynamic` under the name of the whole
FUSED = {"qkv_proj": ("q_proj", "k_proj", "v_proj"), "gate_up_proj": ("gate_proj", "up_proj")}
SYNONYMS = {"w_bit": "bits", "q_group_size": "group_size"}


class Gptq(TensorExporter):
    """GPTQ v1 (`checkpoint_format: gptq`)."""

    name = "gptq"
    description = "GPTQ v1, read by AutoGPTQ, GPTQModel, vLLM, SGLang and transformers"
    quant_methods = ("gptq",)
    zero_offset = 1  # what is taken off a zero point before it is stored

    @property
    def layout(self) -> Rows:
        return Rows(self.zero_offset)

    def why_not(self, layer: LayerSpec) -> str | None:
        """Whole words of 32 bits along both sides, and a width the readers know."""
        if layer.config.bits not in BITS:
            return f"{layer.config.bits} bits; the format's readers know {', '.join(map(str, BITS))}"
        return self.layout.why_not(layer)

    def why_not_exact(self, weight: QuantizedWeight) -> str | None:
        """Integer zero points that can be stored."""
        low, high = self.layout.zeros_held(weight.config)
        found = zeros_beyond(weight, low, high)
        return found and f"it holds integer zero points {low} to {high}, found {found}"

    def nearest(self, weight: QuantizedWeight) -> QuantizedWeight | None:
        """Groups whose zero point is 0 get 1: their codes rise by one, and only the highest code falls short."""
        return raise_zeros(weight, self.zero_offset)

    def encode(self, name: str, weight: QuantizedWeight) -> dict[str, Tensor]:
        """See TensorExporter."""
        return self.layout.encode(name, weight)

    def quantization_config(self, content: Content) -> dict[str, Any]:
        """The keys AutoGPTQ and GPTQModel wrote; layers that differ from the rest stand under `dynamic`."""
        configs = Counter(layer.config for layer in content.layers.values())
        base = configs.most_common(1)[0][0]
        params = content.provenance.get("params", {})
        dynamic: dict[str, dict[str, Any]] = {}
        for name, layer in content.layers.items():
            if layer.config != base:
                dynamic[f"+:^{re.escape(name)}$"] = layer.config.model_dump()
        for name, grid in _fused(content.layers).items():
            if grid != base:
                dynamic[f"+:^{re.escape(name)}$"] = grid.model_dump()
        for name in content.provenance.get("skipped", []):
            dynamic[f"-:^{re.escape(name)}$"] = {}
        config = {
            **base.model_dump(),
            "desc_act": any(layer.act_order for layer in content.layers.values()),
            "static_groups": bool(params.get("static_groups", False)),
            "true_sequential": bool(params.get("true_sequential", True)),
            "damp_percent": params.get("damp_percent", 0.01),
            "quant_method": "gptq",
            "checkpoint_format": self.name,
            "format": self.name,
            "pack_dtype": "int32",
            "lm_head": "lm_head" in content.layers,
        }
        return {**config, "dynamic": dynamic} if dynamic else config

    def extra_files(self, content: Content) -> dict[str, Any]:
        """AutoGPTQ looks for its own file first."""
        return {
            SIDE_FILE: {
                **self.quantization_config(content),
                "model_name_or_path": None,
                "model_file_base_name": "model",
            }
        }

    def detects(self, folder: Any, config: Mapping[str, Any]) -> bool:
        """By quant_method and checkpoint_format; old AutoGPTQ folders have only quantize_config.json."""
        quantization = config.get("quantization_config")
        if quantization is None and (folder / SIDE_FILE).is_file():
            return self.name == "gptq"
        if not isinstance(quantization, dict) or quantization.get("quant_method") != "gptq" or itrex(quantization):
            return False
        version = quantization.get("checkpoint_format", "gptq")
        return version == self.name or (
            self.name == "gptq" and version != "gptq_v2"
        )  # v1 says what it thinks of others

    def read_quantization(self, folder: ModelFolder) -> dict[str, Any]:
        """Return bits, group_size, sym, desc_act and dynamic, with synonyms resolved."""
        found = folder.config.get("quantization_config") or read_json(folder.path / SIDE_FILE)
        if not isinstance(found, dict):
            raise CheckpointError(f"{folder.path}: quantization_config is no object.")
        quantization = {SYNONYMS.get(key, key): value for key, value in found.items()}
        version = quantization.get("checkpoint_format", self.name)
        if version != self.name:
            raise CheckpointError(
                f"{folder.path}: quantization_config.checkpoint_format is {version!r}; qcore reads gptq and gptq_v2. "
                "The program that wrote it can save the model as gptq."
            )
        if (folder.path / SIDE_FILE).is_file():
            beside = {SYNONYMS.get(key, key): value for key, value in read_json(folder.path / SIDE_FILE).items()}
            for field in QuantConfig.FIELDS:
                if field in beside and field in quantization and beside[field] != quantization[field]:
                    raise CheckpointError(
                        f"{folder.path}: {field} is {quantization[field]!r} in config.json and {beside[field]!r} in {SIDE_FILE}; "
                        "one of them is wrong. Mend or remove it."
                    )
        missing = [key for key in ("bits", "group_size") if key not in quantization]
        if missing:
            raise CheckpointError(f"{folder.path}: quantization_config has no {' and no '.join(missing)}.")
        quantization["base"] = grid_of(quantization, f"{folder.path}: quantization_config")
        if not isinstance(quantization.get("dynamic") or {}, dict):
            raise CheckpointError(f"{folder.path}: quantization_config.dynamic is no object.")
        return quantization

    def layers_in(self, folder: ModelFolder, quantization: Mapping[str, Any]) -> dict[str, LayerSpec]:
        """See TensorExporter."""
        return layers_of(folder, lambda name: (Rows(self.zero_offset), _config_of(name, quantization, folder)), "gptq")

    def decode(
        self, layer: LayerSpec, tensors: Mapping[str, Tensor], quantization: Mapping[str, Any]
    ) -> QuantizedWeight:
        """See TensorExporter."""
        return Rows(self.zero_offset, wraps=self.zero_offset == 1 and _by_gptqmodel(quantization)).decode(
            layer, tensors
        )

    def notes(
        self, folder: ModelFolder, layers: Mapping[str, LayerSpec], quantization: Mapping[str, Any]
    ) -> tuple[str, ...]:
        """Say so when the file follows the other zero-point convention than it says."""
        return note_of_zeros(folder, layers, self.zero_offset)


class GptqV2(Gptq):
    """GPTQ v2 (`checkpoint_format: gptq_v2`): the same tensors, zero points stored as they are."""

    name = "gptq_v2"
    description = "GPTQ v2 (true zero points), read by GPTQModel and newer vLLM"
    zero_offset = 0


def _fused(layers: Mapping[str, LayerSpec]) -> dict[str, QuantConfig]:
    """The name vLLM gives linears of one grid that it fuses -> their grid."""
    found = {}
    for whole, (first, *others) in FUSED.items():
        for name, layer in layers.items():
            parent, _, last = name.rpartition(".")
            parts = [layers.get(f"{parent}.{other}") for other in others]
            if last == first and all(part is not None and part.config == layer.config for part in parts):
                found[f"{parent}.{whole}"] = layer.config
    return found


def _by_gptqmodel(quantization: Mapping[str, Any]) -> bool:
    """Whether GPTQModel wrote a folder, which it notes under meta."""
    meta = quantization.get("meta")
    makers = meta.get("quantizer") if isinstance(meta, dict) else None
    return any("gptqmodel" in str(maker) for maker in (makers if isinstance(makers, list) else [makers]))


def _config_of(name: str, quantization: Mapping[str, Any], folder: ModelFolder) -> QuantConfig:
    """The base config with the first matching rule of `dynamic`, as GPTQModel applies it."""
    base: QuantConfig = quantization["base"]
    for rule, changes in (quantization.get("dynamic") or {}).items():
        try:
            hit = re.match(re.sub("^[-+]:", "", rule), name)
        except re.error as error:
            raise CheckpointError(f"{folder.path}: dynamic rule {rule!r} is no regular expression: {error}.") from None
        if hit and rule.startswith("-:"):
            raise CheckpointError(f"{folder.path}: dynamic rule {rule!r} leaves {name} in float, but it is quantized.")
        if hit and isinstance(changes, dict):
            return grid_of(changes, f"{folder.path}: dynamic rule {rule!r}", base)
    return base


@hookimpl
def qcore_exporters() -> list[Exporter]:
    return [Gptq(), GptqV2()]
