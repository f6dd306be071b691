"""compressed-tensors, format pack-quantized, as llm-compressor writes it and vLLM and transformers read it (docs/formats.md).

For a linear of K inputs and N outputs: weight_packed int32 [N, ceil(K*b/32)], codes packed along K; weight_scale [N, G];
weight_zero_point int32 [ceil(N*b/32), G], packed along N, for asymmetric grids; weight_shape int64 [2]. What is packed is a
signed number plus 2**(b-1), which is the code and the zero point as they are. Versions before the dense packing filled a
word with 32 // b codes; files from then are read. Act-order (`weight_g_idx`) is read too, but not written: the library
has removed it.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
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
    grid,
    hookimpl,
    packing,
)

from . import codes
from .layouts import float_linears, grid_of, matches, zeros_beyond

METHOD = "compressed-tensors"
FORMAT = "pack-quantized"


class CompressedTensors(TensorExporter):
    """compressed-tensors, pack-quantized."""

    name = METHOD
    description = "compressed-tensors pack-quantized, read by vLLM, SGLang and transformers"
    quant_methods = (METHOD,)

    def why_not(self, layer: LayerSpec) -> str | None:
        """Whole groups, no act-order."""
        size = layer.config.group_size
        if size != -1 and layer.in_features % size:
            return f"groups of {size} do not divide in_features {layer.in_features}"
        return "act-order, which compressed-tensors has removed" if layer.act_order else None

    def why_not_exact(self, weight: QuantizedWeight) -> str | None:
        """Integer zero points that can be stored."""
        found = zeros_beyond(weight, 0, weight.config.maxq)
        return found and f"it holds integer zero points 0 to {weight.config.maxq}, found {found}"

    def encode(self, name: str, weight: QuantizedWeight) -> dict[str, Tensor]:
        """See TensorExporter."""
        tensors = {
            f"{name}.weight_packed": codes.pack(weight.codes, weight.bits, "along"),
            f"{name}.weight_scale": weight.scales,
            f"{name}.weight_shape": torch.tensor(weight.codes.shape),
        }
        if not weight.sym:
            zeros = packing.pack(weight.zeros.t().contiguous(), weight.bits)
            tensors[f"{name}.weight_zero_point"] = zeros.t().contiguous()
        return tensors

    def quantization_config(self, content: Content) -> dict[str, Any]:
        """One group per grid: the most frequent one targets all linears, the others name theirs."""
        by_grid: dict[QuantConfig, list[str]] = {}
        for name, layer in content.layers.items():
            by_grid.setdefault(layer.config, []).append(name)
        ranked = sorted(by_grid.items(), key=lambda item: -len(item[1]))
        groups = {
            f"group_{number}": {
                "targets": names if number else ["Linear"],
                "weights": _weights(config),
                "input_activations": None,
                "output_activations": None,
                "format": FORMAT,
            }
            for number, (config, names) in enumerate(ranked)
        }
        return {
            "quant_method": METHOD,
            "format": FORMAT,
            "quantization_status": "compressed",
            "global_compression_ratio": None,
            "kv_cache_scheme": None,
            "ignore": float_linears(content),
            "config_groups": groups,
        }

    def read_quantization(self, folder: ModelFolder) -> dict[str, Any]:
        """Return the config, its groups checked."""
        found = super().read_quantization(folder)
        where = f"{folder.path}: quantization_config"
        groups = found.get("config_groups")
        if not isinstance(groups, dict) or not all(isinstance(group, dict) for group in groups.values()):
            raise CheckpointError(f"{where}.config_groups is no object of objects.")
        for name, group in groups.items():
            targets = group.get("targets")
            if not isinstance(targets, list) or not all(isinstance(target, str) for target in targets):
                raise CheckpointError(f"{where}.config_groups.{name}.targets is no list of names.")
            kind = group.get("format") or found.get("format")
            if kind != FORMAT:
                raise CheckpointError(f"{where}.config_groups.{name} has format {kind!r}; qcore reads {FORMAT}.")
        if not groups:
            raise CheckpointError(f"{where}.config_groups is empty.")
        return found

    def layers_in(self, folder: ModelFolder, quantization: Mapping[str, Any]) -> dict[str, LayerSpec]:
        """Every linear with a weight_packed (or a weight_scale, so that a missing one is noticed)."""
        layers: dict[str, LayerSpec] = {}
        for key in folder.tensors:
            name, _, part = key.rpartition(".")
            if part in ("weight_packed", "weight_scale") and name not in layers:
                layers[name] = _layer(folder, name, _config_of(name, quantization, folder))
        if not layers:
            raise CheckpointError(f"{folder.path} says quant_method {METHOD} but holds no *.weight_packed.")
        stray = [name for name in layers if f"{name}.weight" in folder.tensors]
        if stray:
            raise CheckpointError(f"{folder.path}: {stray[0]} is there quantized and in float ({stray[0]}.weight).")
        return layers

    def decode(
        self, layer: LayerSpec, tensors: Mapping[str, Tensor], quantization: Mapping[str, Any]
    ) -> QuantizedWeight:
        """See TensorExporter."""
        config, out = layer.config, layer.out_features
        zeros = torch.full(tensors["weight_scale"].shape, grid.symmetric_zero(config.bits), dtype=torch.int32)
        stored = tensors.get("weight_zero_point")
        if not config.sym and stored is not None:
            if stored.dtype == torch.int8:  # as versions before the packed zero points have it
                zeros = stored.to(torch.int32) + grid.symmetric_zero(config.bits)
            else:
                zeros = _unpack(stored.t().contiguous(), config.bits, out).t().to(torch.int32).contiguous()
        g_idx = tensors.get("weight_g_idx")
        return QuantizedWeight(
            codes=_unpack(tensors["weight_packed"], config.bits, layer.in_features).contiguous(),
            scales=tensors["weight_scale"],
            zeros=zeros,
            g_idx=grid.group_index(layer.in_features, config.group_size) if g_idx is None else g_idx.to(torch.int32),
            config=config,
            bias=tensors.get("bias"),
        )


def _weights(config: QuantConfig) -> dict[str, Any]:
    whole = config.group_size == -1
    return {
        "num_bits": config.bits,
        "type": "int",
        "symmetric": config.sym,
        "strategy": "channel" if whole else "group",
        "group_size": None if whole else config.group_size,
        "dynamic": False,
        "actorder": None,
        "block_structure": None,
        "observer": "minmax",
        "observer_kwargs": {},
    }


def _config_of(name: str, quantization: Mapping[str, Any], folder: ModelFolder) -> QuantConfig:
    """The grid of the first group that names the layer, by name or pattern, else of the first that targets a class."""
    where = f"{folder.path}: quantization_config.config_groups"
    groups = quantization["config_groups"]

    def named(target: str) -> bool:
        pattern = target.removeprefix("re:")
        return target == name if pattern == target else matches(f"^(?:{pattern})", name, where)

    chosen = [key for key, group in groups.items() if any(named(target) for target in group["targets"])]
    chosen += [key for key, group in groups.items() if any(target.isidentifier() for target in group["targets"])]
    if not chosen:
        raise CheckpointError(f"{where}: no group targets {name}, but it is quantized.")
    where = f"{where}.{chosen[0]}"
    weights = groups[chosen[0]].get("weights")
    if not isinstance(weights, dict):
        raise CheckpointError(f"{where}.weights is no object.")
    if groups[chosen[0]].get("input_activations") is not None or weights.get("type", "int") != "int":
        raise CheckpointError(f"{where} quantizes activations or to floats; qcore reads integer weights alone.")
    size = {"group": weights.get("group_size"), "channel": -1}.get(weights.get("strategy"))
    if size is None:
        raise CheckpointError(
            f"{where}: strategy {weights.get('strategy')!r}, expected group (with its size) or channel."
        )
    values = {"bits": weights.get("num_bits"), "group_size": size, "sym": weights.get("symmetric", True)}
    return grid_of(values, f"{where}.weights")


def _layer(folder: ModelFolder, name: str, config: QuantConfig) -> LayerSpec:
    """Check a layer's tensors against each other and return its spec."""

    def expect(holds: bool, problem: str) -> None:
        if not holds:
            raise CheckpointError(f"{folder.path}: layer {name}: {problem}.")

    needed = ("weight_packed", "weight_scale", "weight_shape", *(() if config.sym else ("weight_zero_point",)))
    missing = [part for part in needed if f"{name}.{part}" not in folder.tensors]
    expect(not missing, f"no {', '.join(missing)}")
    packed, scale, shape = (folder.tensors[f"{name}.{part}"] for part in needed[:3])
    expect(shape.dtype in (torch.int64, torch.int32) and shape.shape == (2,), "weight_shape is no pair of integers")
    expect(packed.dtype == torch.int32, f"weight_packed is {packed.dtype}, expected int32")
    expect(scale.dtype.is_floating_point, f"weight_scale is {scale.dtype}, expected a floating point type")
    out, columns = (int(size) for size in folder.tensor(f"{name}.weight_shape"))
    expect(out > 0 and columns > 0, f"weight_shape is [{out}, {columns}]")
    widths = {packing.words_for(columns, config.bits), _padded_words(columns, config.bits)}
    fits = len(packed.shape) == 2 and packed.shape[0] == out and packed.shape[1] in widths
    expect(fits, f"weight_packed is {list(packed.shape)}, expected [{out}, {min(widths)}] for {config}")
    groups = grid.num_groups(columns, config.group_size)
    expect(
        scale.shape == (out, groups), f"weight_scale is {list(scale.shape)}, expected [{out}, {groups}] for {config}"
    )
    zero = None if config.sym else folder.tensors[f"{name}.weight_zero_point"]
    if zero is not None:
        words = packing.words_for(out, config.bits), _padded_words(out, config.bits)
        fits = len(zero.shape) == 2 and zero.shape[1] == groups and zero.shape[0] in words
        fits = (fits and zero.dtype == torch.int32) or (zero.dtype == torch.int8 and zero.shape == (out, groups))
        expect(fits, f"weight_zero_point is {zero.dtype} {list(zero.shape)}, expected int32 [{words[0]}, {groups}]")
    g_idx = folder.tensors.get(f"{name}.weight_g_idx")
    if g_idx is None:
        return LayerSpec(name, config, columns, out)
    fits = g_idx.shape == (columns,) and g_idx.dtype in (torch.int32, torch.int64)
    expect(fits, f"weight_g_idx is {g_idx.dtype} {list(g_idx.shape)}, expected int32 [{columns}]")
    plain = grid.group_index(columns, config.group_size)
    return LayerSpec(name, config, columns, out, not torch.equal(folder.tensor(f"{name}.weight_g_idx").int(), plain))


def _padded_words(count: int, bits: int) -> int:
    """Words of the older packing, which does not cross word boundaries."""
    return -(-count // (32 // bits))


def _unpack(words: Tensor, bits: int, count: int) -> Tensor:
    """int32 [rows, words] -> uint8 [rows, count], by whichever of the two packings the number of words tells."""
    if words.shape[1] == packing.words_for(count, bits):
        return codes.unpack(words, bits, "along", len(words), count)
    shifts = torch.arange(32 // bits, dtype=torch.int32) * bits
    return (words[..., None] >> shifts & 2**bits - 1).to(torch.uint8).flatten(1)[:, :count]


@hookimpl
def qcore_exporters() -> list[Exporter]:
    return [CompressedTensors()]
