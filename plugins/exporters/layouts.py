"""What several formats share: the two packed layouts of a linear, rules for names, and small checks (docs/formats.md).

`Rows` is GPTQ's layout, codes packed down the inputs; `Columns` is AWQ's, codes packed along the outputs. A format
is a layout, a config and its own rules; no format imports another.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, replace
from typing import Any, Protocol

import torch
from torch import Tensor

from qcore import (
    CheckpointError,
    ConfigError,
    Content,
    LayerSpec,
    ModelFolder,
    QuantConfig,
    QuantizedWeight,
    grid,
    packing,
)

from . import codes

SUFFIXES = ("qweight", "qzeros", "scales")

_EMBEDDING = re.compile(r"(\w*embed(ding)?s?(_tokens|_positions|_in)?|wte|wpe|word_embeddings\w*)$")
_HEADS = ("lm_head", "embed_out", "output")
_BLOCK = re.compile(r"(.+?)\.\d+\.")


class Layout(Protocol):
    """A way to keep one linear as the tensors qweight, qzeros and scales."""

    def why_not(self, layer: LayerSpec) -> str | None:
        """Why a linear of this shape and grid does not fit."""

    def zeros_held(self, config: QuantConfig) -> tuple[int, int]:
        """The smallest and the largest zero point."""

    def encode(self, name: str, weight: QuantizedWeight) -> dict[str, Tensor]:
        """Return full tensor name -> tensor."""

    def spec(self, folder: ModelFolder, name: str, config: QuantConfig) -> LayerSpec:
        """Check a layer's tensors against each other and the config."""

    def decode(self, layer: LayerSpec, tensors: Mapping[str, Tensor]) -> QuantizedWeight:
        """Return the weight."""


@dataclass(frozen=True)
class Rows:
    """GPTQ's layout: qweight [K*b/32, N], qzeros [G, N*b/32], scales [G, N], and g_idx [K] where it is kept.

    zero_offset: what is taken off a zero point before it is stored, 1 in v1. A file that stores zero - 1 never holds
    zero = 0: the -1 spills into its neighbours in most readers.
    wraps: the file is GPTQModel's, which does write zero = 0 so: it takes one off each field of a whole word at once, letting
    borrows run, and puts it back the same way (fields that cross words wrap one by one).
    """

    zero_offset: int
    g_idx: bool = True
    wraps: bool = False

    def why_not(self, layer: LayerSpec) -> str | None:
        """Whole words of 32 bits along both sides."""
        for side, size in (("in_features", layer.in_features), ("out_features", layer.out_features)):
            if size * layer.config.bits % 32:
                return f"{side} {size} x {layer.config.bits} bits is no whole number of 32-bit words"
        if layer.act_order and not self.g_idx:
            return "act-order needs g_idx, which this format has not"
        return None

    def zeros_held(self, config: QuantConfig) -> tuple[int, int]:
        """See Layout."""
        return self.zero_offset, config.maxq

    def encode(self, name: str, weight: QuantizedWeight) -> dict[str, Tensor]:
        """See Layout."""
        stored = (weight.zeros - self.zero_offset).t().contiguous()
        tensors = {
            f"{name}.qweight": codes.pack(weight.codes, weight.bits, "down"),
            f"{name}.qzeros": packing.pack(stored, weight.bits),
            f"{name}.scales": weight.scales.t().contiguous(),
        }
        return {**tensors, f"{name}.g_idx": weight.g_idx} if self.g_idx else tensors

    def spec(self, folder: ModelFolder, name: str, config: QuantConfig) -> LayerSpec:
        """See Layout."""
        expect = _expecting(folder, name)
        qweight, qzeros, scales = _packed_tensors(folder, name, "[K*bits/32, N]")
        g_idx = folder.tensors.get(f"{name}.g_idx")
        expect(g_idx is None or g_idx.dtype == torch.int32, f"g_idx is {g_idx and g_idx.dtype}, expected int32")
        rows, out = qweight.shape
        columns, rest = divmod(rows * 32, config.bits)
        expect(rest == 0, f"{rows} rows of qweight are no whole number of {config.bits}-bit codes; bits is wrong")
        groups = grid.num_groups(columns, config.group_size)
        words = packing.words_for(out, config.bits)
        expect(
            scales.shape == (groups, out), f"scales are {list(scales.shape)}, expected [{groups}, {out}] for {config}"
        )
        found = list(qzeros.shape)
        expect(found == [groups, words], f"qzeros are {found}, expected [{groups}, {words}] for {config}")
        found = list(g_idx.shape) if g_idx else None
        expect(g_idx is None or found == [columns], f"g_idx is {found}, expected [{columns}]")
        act_order = False
        if g_idx is not None:
            act_order = not torch.equal(folder.tensor(f"{name}.g_idx"), grid.group_index(columns, config.group_size))
        return LayerSpec(name, config, columns, out, act_order)

    def decode(self, layer: LayerSpec, tensors: Mapping[str, Tensor]) -> QuantizedWeight:
        """Unpack a weight; which zero-point convention the file really follows is settled by its own zeros."""
        config = layer.config
        stored = packing.unpack(tensors["qzeros"], config.bits, layer.out_features)  # uint8 [G, N]
        offset, _ = zero_offset(stored, config, self.zero_offset)
        zeros = stored.to(torch.int32) + offset
        if self.wraps and not config.sym:
            zeros = _put_back(tensors["qzeros"], config.bits, layer.out_features).to(torch.int32)
        g_idx = tensors.get("g_idx")
        if g_idx is None:
            g_idx = grid.group_index(layer.in_features, config.group_size)
        return QuantizedWeight(
            codes=codes.unpack(tensors["qweight"], config.bits, "down", layer.out_features, layer.in_features),
            scales=tensors["scales"].t().contiguous(),
            zeros=zeros.t().contiguous(),
            g_idx=g_idx,
            config=config,
            bias=tensors.get("bias"),
        )


def _put_back(words: Tensor, bits: int, count: int) -> Tensor:
    """Zero points of a v1 file in which borrows ran, uint8 [G, N]."""
    if 32 % bits:
        return packing.unpack(words, bits, count) + 1 & 2**bits - 1
    ones = sum(1 << shift for shift in range(0, 32, bits))
    restored = (words.to(torch.int64) + ones) & 0xFFFFFFFF
    return packing.unpack(torch.where(restored >= 2**31, restored - 2**32, restored).to(torch.int32), bits, count)


@dataclass(frozen=True)
class Columns:
    """AWQ's GEMM layout, 4 bits: qweight [K, N/8] and qzeros [G, N/8], eight outputs to a word; scales [G, N]."""

    def why_not(self, layer: LayerSpec) -> str | None:
        """4 bits, whole words along the outputs, whole groups, no g_idx."""
        if layer.config.bits != 4:
            return f"{layer.config.bits} bits; this layout has 4"
        if layer.out_features % 8:
            return f"out_features {layer.out_features} is no multiple of 8"
        if layer.config.group_size != -1 and layer.in_features % layer.config.group_size:
            return f"groups of {layer.config.group_size} do not divide in_features {layer.in_features}"
        return "act-order needs g_idx, which this format has not" if layer.act_order else None

    def zeros_held(self, config: QuantConfig) -> tuple[int, int]:
        """See Layout."""
        return 0, config.maxq

    def encode(self, name: str, weight: QuantizedWeight) -> dict[str, Tensor]:
        """See Layout."""
        return {
            f"{name}.qweight": codes.pack(weight.codes, 4, "interleaved"),
            f"{name}.qzeros": codes.pack(weight.zeros.to(torch.uint8), 4, "interleaved"),
            f"{name}.scales": weight.scales.t().contiguous(),
        }

    def spec(self, folder: ModelFolder, name: str, config: QuantConfig) -> LayerSpec:
        """See Layout."""
        expect = _expecting(folder, name)
        expect(config.bits == 4, f"{config.bits} bits, expected 4")
        qweight, qzeros, scales = _packed_tensors(folder, name, "[K, N/8]")
        columns, out = qweight.shape[0], 8 * qweight.shape[1]
        whole = config.group_size == -1 or columns % config.group_size == 0
        expect(whole, f"qweight has {columns} rows, which groups of {config.group_size} do not divide")
        groups = grid.num_groups(columns, config.group_size)
        found = list(scales.shape)
        expect(found == [groups, out], f"scales are {found}, expected [{groups}, {out}] for {config}")
        found = list(qzeros.shape)
        expect(found == [groups, out // 8], f"qzeros are {found}, expected [{groups}, {out // 8}] for {config}")
        return LayerSpec(name, config, columns, out)

    def decode(self, layer: LayerSpec, tensors: Mapping[str, Tensor]) -> QuantizedWeight:
        """See Layout."""
        out, groups = layer.out_features, tensors["scales"].shape[0]
        return QuantizedWeight(
            codes=codes.unpack(tensors["qweight"], 4, "interleaved", out, layer.in_features),
            scales=tensors["scales"].t().contiguous(),
            zeros=codes.unpack(tensors["qzeros"], 4, "interleaved", out, groups).to(torch.int32),
            g_idx=grid.group_index(layer.in_features, layer.config.group_size),
            config=layer.config,
            bias=tensors.get("bias"),
        )


def _expecting(folder: ModelFolder, name: str) -> Callable[[bool, str], None]:
    def expect(holds: bool, problem: str) -> None:
        if not holds:
            raise CheckpointError(f"{folder.path}: layer {name}: {problem}.")

    return expect


def _packed_tensors(folder: ModelFolder, name: str, shape: str) -> list[Any]:
    """TensorInfo of qweight, qzeros and scales, their dtypes and qweight's being a matrix checked."""
    expect = _expecting(folder, name)
    missing = [part for part in SUFFIXES if f"{name}.{part}" not in folder.tensors]
    expect(not missing, f"no {', '.join(missing)}")
    qweight, qzeros, scales = found = [folder.tensors[f"{name}.{part}"] for part in SUFFIXES]
    for part, info in (("qweight", qweight), ("qzeros", qzeros)):
        expect(info.dtype == torch.int32, f"{part} is {info.dtype}, expected int32")
    expect(scales.dtype.is_floating_point, f"scales are {scales.dtype}, expected a floating point type")
    matrix = len(qweight.shape) == 2 and min(qweight.shape) > 0
    expect(matrix, f"qweight has shape {list(qweight.shape)}, expected {shape}")
    return found


def zero_offset(stored: Tensor, config: QuantConfig, declared: int) -> tuple[int, tuple[str, ...]]:
    """Return the offset to add to zeros stored in rows, and a note when the file contradicts its label.

    A symmetric layer tells: its zero is 2**(bits-1), so v1 stores one less. An asymmetric one does not, and its label is
    believed.
    """
    if not config.sym:
        return declared, ()
    middle = grid.symmetric_zero(config.bits)
    value = int(stored.flatten()[0])
    if bool((stored == value).all()) and middle - value in (0, 1):
        found = middle - value
        if found == declared:
            return found, ()
        labels = ("gptq_v2", "gptq")
        return found, (
            f"labelled {labels[declared]}, but its zero points are stored as {labels[found]} does; read as such",
        )
    raise CheckpointError(
        f"sym is true, but the stored zero points ({int(stored.min())} to {int(stored.max())}) are not those of a "
        f"symmetric grid ({middle - 1} in v1, {middle} in v2)"
    )


def note_of_zeros(folder: ModelFolder, layers: Mapping[str, LayerSpec], declared: int) -> tuple[str, ...]:
    """Say so when the first symmetric layer shows that the file follows the other zero-point convention."""
    for name, layer in layers.items():
        if layer.config.sym:
            stored = packing.unpack(folder.tensor(f"{name}.qzeros"), layer.config.bits, layer.out_features)
            return zero_offset(stored, layer.config, declared)[1]
    return ()


def itrex(quantization: Mapping[str, Any]) -> bool:
    """Whether a config is one of auto-round's exports for Intel CPUs, which call themselves gptq and name a dtype of scales."""
    return quantization.get("quant_method") == "gptq" and "scale_dtype" in quantization


def why_not_one_grid(layers: Iterable[LayerSpec]) -> str | None:
    """Why a format whose config has one grid for all cannot hold these linears, or None."""
    grids = sorted({str(layer.config) for layer in layers})
    return f"it has one grid for all linears, found {' and '.join(grids)}" if len(grids) > 1 else None


def zeros_beyond(weight: QuantizedWeight, low: int, high: int) -> str | None:
    """The zero points found, in words, when they are not integers from low to high."""
    zeros = weight.zeros
    if zeros.is_floating_point() or bool(((zeros < low) | (zeros > high)).any()):
        kind = "" if not zeros.is_floating_point() else " (floating)"
        return f"{float(zeros.min()):g} to {float(zeros.max()):g}{kind}"
    return None


def raise_zeros(weight: QuantizedWeight, low: int) -> QuantizedWeight | None:
    """The same weight with no zero point below `low`, codes raised along and clipped; None for floating zero points."""
    if weight.zeros.is_floating_point() or bool((weight.zeros > weight.config.maxq).any()):
        return None
    lift = (low - weight.zeros).clamp(min=0)  # [out, groups]
    codes = (weight.codes.int() + grid.spread(lift, weight.g_idx)).clamp(max=weight.config.maxq)
    return replace(weight, codes=codes.to(torch.uint8), zeros=weight.zeros + lift)


def layers_of(
    folder: ModelFolder, layout: Callable[[str], tuple[Layout, QuantConfig]], label: str
) -> dict[str, LayerSpec]:
    """Every linear with a qweight (or with qzeros, so that a missing qweight is noticed), its shapes checked."""
    layers: dict[str, LayerSpec] = {}
    for key in folder.tensors:
        name, _, part = key.rpartition(".")
        if part in ("qweight", "qzeros") and name not in layers:
            how, config = layout(name)
            layers[name] = how.spec(folder, name, config)
    if not layers:
        raise CheckpointError(f"{folder.path} says quant_method {label} but holds no *.qweight.")
    stray = [name for name in layers if f"{name}.weight" in folder.tensors]
    if stray:
        raise CheckpointError(f"{folder.path}: {stray[0]} is there quantized and in float ({stray[0]}.weight).")
    return layers


def grid_of(values: Mapping[str, Any], what: str, base: QuantConfig | None = None) -> QuantConfig:
    """Build a QuantConfig from those of a config's keys that belong to it, over a base.

    Raises CheckpointError, since the values come from a file.
    """
    known = {field: values[field] for field in QuantConfig.FIELDS if field in values}
    try:
        return QuantConfig.parse({**(base.model_dump() if base else {}), **known}, what)
    except ConfigError as error:
        raise CheckpointError(str(error)) from None


def matches(pattern: str, name: str, what: str) -> bool:
    """Whether a regular expression from a file is found in a name."""
    try:
        return re.search(pattern, name) is not None
    except re.error as error:
        raise CheckpointError(f"{what}: {pattern!r} is no regular expression: {error}.") from None


def float_linears(content: Content) -> list[str]:
    """Names of the linears a model keeps in float, so that a config can name them: 2-D weights that embed nothing.

    The output head is among them even when it is tied and has no tensor of its own.
    """
    found = [] if any(name in _HEADS for name in content.layers) else ["lm_head"]
    for key in content.tensors:
        name, _, part = key.rpartition(".")
        last = name.rpartition(".")[2]
        if part != "weight" or name in found or _EMBEDDING.fullmatch(last):
            continue
        if last in _HEADS or content.tensor(key).ndim == 2:
            found.append(name)
    return found


def block_lists(names: Iterable[str]) -> list[str]:
    """The module lists that layers stand in ("model.layers"), in order of appearance."""
    return list(dict.fromkeys(found.group(1) for name in names if (found := _BLOCK.match(name))))
