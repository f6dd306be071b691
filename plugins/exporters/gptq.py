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

import torch
from torch import Tensor

from qcore import (
    CheckpointError,
    ConfigError,
    Content,
    Exporter,
    LayerSpec,
    ModelFolder,
    QuantConfig,
    QuantizedWeight,
    TensorExporter,
    grid,
    hookimpl,
    packing,
    read_json,
)

BITS = (2, 3, 4, 8)
SIDE_FILE = "quantize_config.json"
SYNONYMS = {"w_bit": "bits", "q_group_size": "group_size"}
SUFFIXES = ("qweight", "qzeros", "scales")


class Gptq(TensorExporter):
    """GPTQ v1 (`checkpoint_format: gptq`)."""

    name = "gptq"
    description = "GPTQ v1, read by AutoGPTQ, GPTQModel, vLLM, SGLang and transformers"
    zero_offset = 1  # what is taken off a zero point before it is stored

    def why_not(self, layer: LayerSpec) -> str | None:
        """Whole words of 32 bits along both sides, and a width the readers know."""
        bits = layer.config.bits
        if bits not in BITS:
            return f"{bits} bits; the format's readers know {', '.join(map(str, BITS))}"
        for side, size in (("in_features", layer.in_features), ("out_features", layer.out_features)):
            if size * bits % 32:
                return f"{side} {size} x {bits} bits is no whole number of 32-bit words"
        return None

    def encode(self, name: str, weight: QuantizedWeight) -> dict[str, Tensor]:
        """Pack a weight. Raises CheckpointError for zero points this version cannot hold."""
        low, high = self.zero_offset, weight.config.maxq
        zeros = weight.zeros
        if zeros.is_floating_point() or bool(((zeros < low) | (zeros > high)).any()):
            found = f"{float(zeros.min()):g} to {float(zeros.max()):g}"
            raise CheckpointError(
                f"format {self.name!r} holds integer zero points {low} to {high}; {name} has {found}."
            )
        stored = (zeros - self.zero_offset).t().contiguous()
        return {
            f"{name}.qweight": packing.pack(weight.codes, weight.bits).t().contiguous(),
            f"{name}.qzeros": packing.pack(stored, weight.bits),
            f"{name}.scales": weight.scales.t().contiguous(),
            f"{name}.g_idx": weight.g_idx,
        }

    def quantization_config(self, content: Content) -> dict[str, Any]:
        """The keys AutoGPTQ and GPTQModel wrote; layers that differ from the rest stand under `dynamic`."""
        configs = Counter(layer.config for layer in content.layers.values())
        base = configs.most_common(1)[0][0]
        params = content.provenance.get("params", {})
        dynamic: dict[str, dict[str, Any]] = {}
        for name, layer in content.layers.items():
            if layer.config != base:
                dynamic[f"+:^{re.escape(name)}$"] = layer.config.model_dump()
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
        if not isinstance(quantization, dict) or quantization.get("quant_method") != "gptq":
            return False
        return str(quantization.get("checkpoint_format", "gptq")) == self.name

    def read_quantization(self, folder: ModelFolder) -> dict[str, Any]:
        """Return bits, group_size, sym, desc_act and dynamic, with synonyms resolved."""
        found = folder.config.get("quantization_config") or read_json(folder.path / SIDE_FILE)
        if not isinstance(found, dict):
            raise CheckpointError(f"{folder.path}: quantization_config is no object.")
        quantization = {SYNONYMS.get(key, key): value for key, value in found.items()}
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
        try:
            fields = {field: quantization[field] for field in QuantConfig.FIELDS if field in quantization}
            quantization["base"] = QuantConfig.parse(fields, f"{folder.path}: quantization_config")
        except ConfigError as error:
            raise CheckpointError(str(error)) from None
        if not isinstance(quantization.get("dynamic") or {}, dict):
            raise CheckpointError(f"{folder.path}: quantization_config.dynamic is no object.")
        return quantization

    def layers_in(self, folder: ModelFolder, quantization: Mapping[str, Any]) -> dict[str, LayerSpec]:
        """Every linear with a qweight (or with qzeros, so that a missing qweight is noticed), its shapes checked."""
        layers = {}
        for key in folder.tensors:
            name, _, part = key.rpartition(".")
            if part in ("qweight", "qzeros") and name not in layers:
                layers[name] = _layer(folder, name, _config_of(name, quantization, folder))
        if not layers:
            raise CheckpointError(f"{folder.path} says quant_method gptq but holds no *.qweight.")
        stray = [name for name in layers if f"{name}.weight" in folder.tensors]
        if stray:
            raise CheckpointError(f"{folder.path}: {stray[0]} is there quantized and in float ({stray[0]}.weight).")
        return layers

    def decode(
        self, layer: LayerSpec, tensors: Mapping[str, Tensor], quantization: Mapping[str, Any]
    ) -> QuantizedWeight:
        """Unpack a weight; which zero-point convention the file really follows is settled by its own zeros."""
        config = layer.config
        stored = packing.unpack(tensors["qzeros"], config.bits, layer.out_features)  # uint8 [G, N]
        offset, _ = _zero_offset(stored, config, self.zero_offset)
        g_idx = tensors.get("g_idx")
        if g_idx is None:
            g_idx = grid.group_index(layer.in_features, config.group_size)
        return QuantizedWeight(
            codes=packing.unpack(tensors["qweight"].t().contiguous(), config.bits, layer.in_features).contiguous(),
            scales=tensors["scales"].t().contiguous(),
            zeros=(stored.to(torch.int32) + offset).t().contiguous(),
            g_idx=g_idx,
            config=config,
            bias=tensors.get("bias"),
        )

    def notes(
        self, folder: ModelFolder, layers: Mapping[str, LayerSpec], quantization: Mapping[str, Any]
    ) -> tuple[str, ...]:
        """Say so when the first symmetric layer shows that the file follows the other zero-point convention."""
        for name, layer in layers.items():
            if layer.config.sym:
                stored = packing.unpack(folder.tensor(f"{name}.qzeros"), layer.config.bits, layer.out_features)
                return _zero_offset(stored, layer.config, self.zero_offset)[1]
        return ()


class GptqV2(Gptq):
    """GPTQ v2 (`checkpoint_format: gptq_v2`): the same tensors, zero points stored as they are."""

    name = "gptq_v2"
    description = "GPTQ v2 (true zero points), read by GPTQModel and newer vLLM"
    zero_offset = 0


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
            known = {field: changes[field] for field in QuantConfig.FIELDS if field in changes}
            try:
                return QuantConfig.parse({**base.model_dump(), **known}, f"{folder.path}: dynamic rule {rule!r}")
            except ConfigError as error:
                raise CheckpointError(str(error)) from None
    return base


def _layer(folder: ModelFolder, name: str, config: QuantConfig) -> LayerSpec:
    """Check a layer's tensors against each other and return its spec."""

    def expect(holds: bool, problem: str) -> None:
        if not holds:
            raise CheckpointError(f"{folder.path}: layer {name}: {problem}.")

    missing = [part for part in SUFFIXES if f"{name}.{part}" not in folder.tensors]
    expect(not missing, f"no {', '.join(missing)}")
    qweight, qzeros, scales = (folder.tensors[f"{name}.{part}"] for part in SUFFIXES)
    g_idx = folder.tensors.get(f"{name}.g_idx")
    for part, info in (("qweight", qweight), ("qzeros", qzeros), ("g_idx", g_idx)):
        expect(info is None or info.dtype == torch.int32, f"{part} is {info and info.dtype}, expected int32")
    expect(scales.dtype.is_floating_point, f"scales are {scales.dtype}, expected a floating point type")
    expect(
        len(qweight.shape) == 2 and min(qweight.shape) > 0,
        f"qweight has shape {list(qweight.shape)}, expected [K*bits/32, N]",
    )
    rows, out = qweight.shape
    columns, rest = divmod(rows * 32, config.bits)
    expect(rest == 0, f"{rows} rows of qweight are no whole number of {config.bits}-bit codes; bits is wrong")
    groups = grid.num_groups(columns, config.group_size)
    words = packing.words_for(out, config.bits)
    expect(scales.shape == (groups, out), f"scales are {list(scales.shape)}, expected [{groups}, {out}] for {config}")
    expect(
        qzeros.shape == (groups, words), f"qzeros are {list(qzeros.shape)}, expected [{groups}, {words}] for {config}"
    )
    expect(
        g_idx is None or g_idx.shape == (columns,),
        f"g_idx is {list(g_idx.shape) if g_idx else None}, expected [{columns}]",
    )
    act_order = False
    if g_idx is not None:
        act_order = not torch.equal(folder.tensor(f"{name}.g_idx"), grid.group_index(columns, config.group_size))
    return LayerSpec(name, config, columns, out, act_order)


def _zero_offset(stored: Tensor, config: QuantConfig, declared: int) -> tuple[int, tuple[str, ...]]:
    """Return the offset to add to stored zeros, and a note when the file contradicts its label.

    A symmetric layer tells: its zero is 2**(bits-1), so v1 stores one less. An asymmetric one does not, and its label is
    believed.
    """
    if not config.sym:
        return declared, ()
    middle = grid.symmetric_zero(config.bits)
    value = int(stored.flatten()[0])
    if bool((stored == value).all()) and middle - value in (0, 1):
        found = middle - value
        if found != declared:
            labels = ("gptq_v2", "gptq")
            return found, (
                f"labelled {labels[declared]}, but its zero points are stored as {labels[found]} does; read as such",
            )
        return found, ()
    raise CheckpointError(
        f"sym is true, but the stored zero points ({int(stored.min())} to {int(stored.max())}) are not those of a "
        f"symmetric grid ({middle - 1} in v1, {middle} in v2)"
    )


@hookimpl
def qcore_exporters() -> list[Exporter]:
    return [Gptq(), GptqV2()]
