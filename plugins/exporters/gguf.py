"""GGUF, as llama.cpp reads it: quantized linears in its own block types, names, metadata and tokenizer (docs/formats.md).

A folder holds `model.gguf`, which is all llama.cpp needs, and beside it the config and the tokenizer, from which qcore and
transformers build the model again. Symmetric grids go into Q4_0, Q5_0 and Q8_0, others of up to 5 bits into Q4_1 and Q5_1;
groups of several blocks repeat their scale. The field `qcore.layers` keeps widths and group sizes, so that what is read
back is bit for bit what was saved.
"""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
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
    grid,
    hookimpl,
    read_json,
)
from qcore.checkpoint import TensorInfo
from qcore.files import check_inside, disk_errors, write_json
from qcore.saving import PROVENANCE, carry_files, compare, read_provenance, refuse

from . import gguf_file, gguf_tokenizer
from .gguf_file import BLOCK, BY_NUMBER, FLOATS, GgufFile

FILE = "model.gguf"
LAYERS = "qcore.layers"
DTYPES = {"float16": torch.float16, "bfloat16": torch.bfloat16, "float32": torch.float32}
NUMBERS = {dtype: number for number, dtype in FLOATS.items()}

_OUTSIDE = {"model.embed_tokens": "token_embd", "model.norm": "output_norm", "lm_head": "output"}
_BLOCK = {
    "input_layernorm": "attn_norm",
    "self_attn.q_proj": "attn_q",
    "self_attn.k_proj": "attn_k",
    "self_attn.v_proj": "attn_v",
    "self_attn.o_proj": "attn_output",
    "post_attention_layernorm": "ffn_norm",
    "mlp.gate_proj": "ffn_gate",
    "mlp.up_proj": "ffn_up",
    "mlp.down_proj": "ffn_down",
}


@dataclass(frozen=True)
class Architecture:
    """How llama.cpp calls a family of models, and whether it wants the rows of q and k in its own order (rotary pairs)."""

    name: str
    permuted: bool = False
    more: Mapping[str, str] = field(default_factory=dict)

    def gguf_name(self, name: str) -> str | None:
        """blk.0.attn_q.weight for model.layers.0.self_attn.q_proj.weight."""
        module, _, part = name.rpartition(".")
        if module in _OUTSIDE:
            return f"{_OUTSIDE[module]}.{part}"
        pieces = module.split(".", 3)
        if len(pieces) == 4 and pieces[:2] == ["model", "layers"] and pieces[2].isdecimal():
            found = {**_BLOCK, **self.more}.get(pieces[3])
            return f"blk.{pieces[2]}.{found}.{part}" if found else None
        return None

    def model_name(self, name: str) -> str | None:
        """The other way."""
        module, _, part = name.rpartition(".")
        outside = {theirs: ours for ours, theirs in _OUTSIDE.items()}
        if module in outside:
            return f"{outside[module]}.{part}"
        pieces = module.split(".")
        inside = {theirs: ours for ours, theirs in {**_BLOCK, **self.more}.items()}
        if len(pieces) == 3 and pieces[0] == "blk" and pieces[1].isdecimal() and pieces[2] in inside:
            return f"model.layers.{pieces[1]}.{inside[pieces[2]]}.{part}"
        return None


LLAMA = Architecture("llama", permuted=True)
QWEN3 = Architecture("qwen3", more={"self_attn.q_norm": "attn_q_norm", "self_attn.k_norm": "attn_k_norm"})
#: by transformers' model_type
ARCHITECTURES = {"llama": LLAMA, "mistral": LLAMA, "qwen2": Architecture("qwen2"), "qwen3": QWEN3}


class Gguf(Exporter):
    """GGUF in the block types that hold integer grids exactly."""

    name = "gguf"
    description = "GGUF for llama.cpp: Q4_0, Q4_1, Q5_0, Q5_1, Q8_0 (llama, mistral, qwen2, qwen3)"
    weight_files = (FILE,)

    def why_not(self, layer: LayerSpec) -> str | None:
        """Whole blocks of 32, groups of whole blocks, a type for the grid."""
        config = layer.config
        if layer.act_order:
            return "act-order, which GGUF has not"
        if layer.in_features % BLOCK:
            return f"in_features {layer.in_features} is no multiple of {BLOCK}"
        if config.group_size != -1 and config.group_size % BLOCK:
            return f"groups of {config.group_size} are no whole blocks of {BLOCK}"
        if gguf_file.type_for(config.bits, config.sym) is None:
            return f"{config.bits} bits with zero points; the types with an offset have up to 5"
        return None

    def why_not_model(self, config: Mapping[str, Any]) -> str | None:
        """An architecture and rotary embeddings that are known here."""
        kind = str(config.get("model_type"))
        if kind not in ARCHITECTURES:
            return f"model_type {kind!r}; qcore writes {', '.join(ARCHITECTURES)} as GGUF"
        rope = _rope(config).get("rope_type", "default")
        return None if rope in ("default", "linear", "llama3") else f"rotary embeddings of type {rope!r}"

    def why_not_exact(self, weight: QuantizedWeight) -> str | None:
        """float16 scales, and zero points that their offsets give back."""
        half = weight.scales.half()
        if not torch.equal(half.to(weight.scales.dtype), weight.scales):
            return f"its scales are float16, which does not hold all of these ({weight.scales.dtype})"
        if not weight.sym:
            back = gguf_file.zeros_from(half, gguf_file.offsets(half, weight.zeros))
            if not torch.equal(back, weight.zeros):
                return "its float16 offsets do not give these zero points back"
        return None

    def save(self, content: Content, folder: Path) -> None:
        """Write the file and what belongs beside it, then read every weight back."""
        refuse(self, content)
        with disk_errors(f"writing {folder / FILE}"):
            _write(content, folder / FILE, self)
        quantization = {"quant_method": self.name, "file": FILE}
        write_json(folder / "config.json", {**content.config, "quantization_config": quantization})
        write_json(folder / PROVENANCE, dict(content.provenance))
        carry_files(content, folder)

        def halved(name: str) -> QuantizedWeight:
            weight = content.weight(name)
            return replace(weight, scales=weight.scales.half())

        compare(replace(content, weight=halved), self.open(folder), folder)

    def detects(self, folder: Path, config: Mapping[str, Any]) -> bool:
        """By quant_method."""
        quantization = config.get("quantization_config")
        return isinstance(quantization, dict) and quantization.get("quant_method") == self.name

    def open(self, folder: Path) -> Content:
        """See Exporter."""
        files = GgufFolder(folder)
        return Content(
            config={key: value for key, value in files.config.items() if key != "quantization_config"},
            layers=files.layers,
            weight=files.weight,
            tensors=files.floats,
            tensor=files.tensor,
            provenance=read_provenance(folder),
            files=files.carried_files(),
            source=files,
        )


class GgufFolder(ModelFolder):
    """A folder with config.json and one GGUF file, seen under the model's own names.

    layers: the quantized linears. floats: names of the other tensors, which are read in the config's dtype.
    """

    def __init__(self, path: Path) -> None:
        self.path, self.config = path, read_json(path / "config.json")
        quantization = self.config.get("quantization_config")
        named = quantization.get("file", FILE) if isinstance(quantization, dict) else FILE
        if not isinstance(named, str) or Path(named).name != named or not (path / named).is_file():
            raise CheckpointError(f"{path}: config.json names {named!r}, which is no file in the folder.")
        check_inside(path / named, path)
        kind = self.config.get("model_type")
        if not isinstance(kind, str) or kind not in ARCHITECTURES:
            raise CheckpointError(f"{path}: model_type {kind!r}; qcore reads GGUF of {', '.join(ARCHITECTURES)}.")
        self.architecture = ARCHITECTURES[kind]
        with disk_errors(f"reading {path / named}"):
            self.file = GgufFile(path / named)
        self.dtype = DTYPES.get(str(self.config.get("dtype", self.config.get("torch_dtype"))), torch.float16)
        self.names = self._names()
        kept = self._kept()
        self.layers = {
            layer: self._layer(layer, entry, kept.get(layer))
            for name, theirs in self.names.items()
            if (entry := self.file.tensors[theirs]).kind in BY_NUMBER and (layer := name.removesuffix(".weight"))
        }
        biases = {f"{layer}.bias" for layer in self.layers}
        self.floats = [
            name
            for name, theirs in self.names.items()
            if self.file.tensors[theirs].kind in FLOATS and name not in biases
        ]
        self.tensors = {name: self._tensor_info(theirs) for name, theirs in self.names.items()}
        if not self.layers:
            raise CheckpointError(f"{self.file.path} has no linear in a type that qcore reads.")

    def _names(self) -> dict[str, str]:
        """The model's name of each tensor -> the file's."""
        names = {}
        for theirs in self.file.tensors:
            ours = self.architecture.model_name(theirs)
            if ours is None and theirs != "rope_freqs.weight":  # which the config says in other words
                raise CheckpointError(f"{self.file.path}: tensor {theirs!r} is unknown in {self.architecture.name}.")
            if ours is not None:
                names[ours] = theirs
        return names

    def _kept(self) -> dict[str, QuantConfig]:
        """The grids that qcore noted, by linear."""
        text = self.file.fields.get(LAYERS, "[]")
        try:
            entries = json.loads(text)
            return {
                name: QuantConfig.parse(config, f"{self.file.path}: {LAYERS}")
                for config, names in entries
                for name in names
            }
        except (TypeError, ValueError, AttributeError, RecursionError, ConfigError) as error:
            raise CheckpointError(f"{self.file.path}: field {LAYERS} cannot be read: {error}") from None

    def _layer(self, name: str, entry: gguf_file.Entry, kept: QuantConfig | None) -> LayerSpec:
        kind = BY_NUMBER[entry.kind]
        if len(entry.shape) != 2:
            raise CheckpointError(f"{self.file.path}: layer {name}: shape {list(entry.shape)}, expected a matrix.")
        config = kept or QuantConfig(bits=kind.bits, group_size=BLOCK, sym=not kind.offset)
        fits = config.sym != kind.offset and config.bits <= kind.bits
        if not fits or (config.group_size != -1 and config.group_size % BLOCK):
            raise CheckpointError(f"{self.file.path}: layer {name}: {LAYERS} says {config}, its type is {kind.name}.")
        return LayerSpec(name, config, entry.shape[1], entry.shape[0])

    def _tensor_info(self, theirs: str) -> TensorInfo:
        entry = self.file.tensors[theirs]
        if entry.kind in BY_NUMBER:
            return TensorInfo(self.file.path.name, torch.uint8, (entry.size,))
        return TensorInfo(self.file.path.name, self._float_dtype(entry), entry.shape)

    def _float_dtype(self, entry: gguf_file.Entry) -> torch.dtype:
        """Vectors are written as float32 whatever they were; they take the model's dtype again."""
        return self.dtype if len(entry.shape) == 1 else FLOATS[entry.kind]

    def read(self, names: Iterable[str]) -> Iterator[tuple[str, Tensor]]:
        """See ModelFolder."""
        for name in names:
            if name not in self.names:
                raise CheckpointError(f"{self.path} has no tensor {name}.")
            theirs = self.names[name]
            entry = self.file.tensors[theirs]
            with disk_errors(f"reading {self.file.path}"):
                tensor = self.file.floats(theirs).to(self._float_dtype(entry))
            yield name, self._order(name, tensor, _as_model_has)

    def weight(self, name: str) -> QuantizedWeight:
        """A quantized linear."""
        theirs, layer = self.names[f"{name}.weight"], self.layers[name]
        kind, config = BY_NUMBER[self.file.tensors[theirs].kind], layer.config
        with disk_errors(f"reading {self.file.path}"):
            blocks = self._order(name, self.file.bytes_of(theirs), _as_model_has)
        codes, scales, low = gguf_file.decode(kind, blocks)
        shift = 0 if kind.offset else grid.symmetric_zero(kind.bits) - grid.symmetric_zero(config.bits)
        step = scales.shape[1] if config.group_size == -1 else config.group_size // BLOCK
        first = torch.arange(scales.shape[1]) // step * step
        if not torch.equal(scales[:, first], scales) or not torch.equal(low[:, first], low):
            raise CheckpointError(f"{self.path}: layer {name}: blocks of one group differ in scale; {LAYERS} is wrong.")
        scales, low = scales[:, ::step].contiguous(), low[:, ::step]
        zeros = gguf_file.zeros_from(scales, low) if kind.offset else torch.full_like(scales, 0).to(torch.int32)
        if not kind.offset:
            zeros += grid.symmetric_zero(config.bits)
        if shift and bool((codes < shift).any()):
            raise CheckpointError(
                f"{self.path}: layer {name}: a code lies outside {config.bits} bits; {LAYERS} is wrong."
            )
        bias = self.tensor(f"{name}.bias") if f"{name}.bias" in self.names else None
        g_idx = grid.group_index(layer.in_features, config.group_size)
        try:
            return QuantizedWeight(codes - shift, scales, zeros, g_idx, config, bias)
        except CheckpointError as error:
            raise CheckpointError(f"{self.path}: layer {name}: {error}") from None

    def _order(self, name: str, rows: Tensor, how: Callable[[Tensor, int], Tensor]) -> Tensor:
        heads = _heads(self.architecture, self.config, name)
        if heads and rows.shape[0] % (2 * heads):
            raise CheckpointError(f"{self.path}: {name} has {rows.shape[0]} rows for {heads} heads.")
        return how(rows, heads) if heads else rows

    def size(self) -> int:
        """See ModelFolder."""
        return self.file.path.stat().st_size


def _heads(architecture: Architecture, config: Mapping[str, Any], name: str) -> int:
    """How many heads the rows of a tensor or layer belong to, where llama.cpp wants them in another order; else 0."""
    if not architecture.permuted or "self_attn" not in name:
        return 0
    heads = config.get("num_attention_heads")
    if ".k_proj" in name:
        heads = config.get("num_key_value_heads") or heads
    if ".q_proj" not in name and ".k_proj" not in name:
        return 0
    if not isinstance(heads, int) or heads < 1:
        raise CheckpointError(f"config.json has {heads!r} attention heads.")
    return heads


def _as_llama_has(rows: Tensor, heads: int) -> Tensor:
    """Rows of each head from halves (i, i + d/2) to pairs (2i, 2i + 1)."""
    return rows.reshape(heads, 2, -1, *rows.shape[1:]).transpose(1, 2).reshape(rows.shape)


def _as_model_has(rows: Tensor, heads: int) -> Tensor:
    """The other way."""
    return rows.reshape(heads, -1, 2, *rows.shape[1:]).transpose(1, 2).reshape(rows.shape)


def _write(content: Content, path: Path, exporter: Gguf) -> None:
    """Stream a model into a file: first all names, shapes and types, then the bytes, one tensor at a time."""
    gguf = _library()
    architecture = ARCHITECTURES[content.config["model_type"]]
    writer = gguf.GGUFWriter(path, architecture.name)
    usual = Counter(gguf_file.type_for(each.config.bits, each.config.sym) for each in content.layers.values())
    _describe(writer, content.config, usual.most_common(1)[0][0].file_type)  # type: ignore[union-attr]
    gguf_tokenizer.describe(writer, content)
    by_grid: dict[QuantConfig, list[str]] = {}
    for name, layer in content.layers.items():
        by_grid.setdefault(layer.config, []).append(name)
    writer.add_string(LAYERS, json.dumps([[config.model_dump(), names] for config, names in by_grid.items()]))
    pieces = [*_pieces(content, architecture, exporter)]
    for piece in pieces:
        writer.add_tensor_info(piece.name, piece.shape, piece.dtype, piece.size, piece.raw)
    writer.write_header_to_file(path)
    writer.write_kv_data_to_file()
    writer.write_ti_data_to_file()
    for piece in pieces:
        writer.write_tensor_data(piece.make())
    writer.close()


@dataclass(frozen=True)
class _Piece:
    """A tensor to be written: what the header says, and how to make its bytes."""

    name: str
    shape: tuple[int, ...]
    dtype: Any
    size: int
    raw: int
    make: Callable[[], np.ndarray]


def _pieces(content: Content, architecture: Architecture, exporter: Gguf) -> Iterator[_Piece]:
    config = content.config

    def order(name: str, rows: Tensor) -> Tensor:
        heads = _heads(architecture, config, name)
        return _as_llama_has(rows, heads) if heads else rows

    def named(name: str) -> str:
        found = architecture.gguf_name(name)
        if found is None:
            raise CheckpointError(f"format {exporter.name!r} has no name for {name} in {architecture.name}.")
        return found

    def blocks(name: str) -> np.ndarray:
        weight = content.weight(name)
        reason = exporter.why_not_exact(weight)
        if reason:
            raise CheckpointError(f"format {exporter.name!r} cannot hold {name}: {reason}.")
        kind = gguf_file.type_for(weight.bits, weight.sym)
        assert kind is not None
        made = gguf_file.encode(kind, *gguf_file.into_type(kind, weight))
        return order(name, torch.from_numpy(made)).contiguous().numpy()

    def floats(name: str, tensor: Tensor) -> _Piece:
        kept = tensor.float() if tensor.ndim == 1 or tensor.dtype not in NUMBERS else tensor
        made = order(name, kept).contiguous().view(torch.uint8).numpy()
        return _Piece(named(name), made.shape, made.dtype, made.nbytes, NUMBERS[kept.dtype], lambda: made)

    for name, layer in content.layers.items():
        kind = gguf_file.type_for(layer.config.bits, layer.config.sym)
        assert kind is not None
        shape = (layer.out_features, layer.in_features // BLOCK * kind.size)
        size = shape[0] * shape[1]
        yield _Piece(
            named(f"{name}.weight"), shape, np.dtype(np.uint8), size, kind.number, lambda name=name: blocks(name)
        )
        bias = content.weight(name).bias
        if bias is not None:
            yield floats(f"{name}.bias", bias)
    for name in content.tensors:
        yield floats(name, content.tensor(name))
    factors = _rope_factors(config)
    if factors is not None:
        made = factors.view(torch.uint8).numpy()
        yield _Piece("rope_freqs.weight", made.shape, made.dtype, made.nbytes, 0, lambda: made)


def _library() -> Any:
    try:
        import gguf
    except ImportError:
        raise ConfigError("writing GGUF needs the gguf package: pip install 'qcore[gguf]'") from None
    return gguf


def _rope(config: Mapping[str, Any]) -> dict[str, Any]:
    """transformers keeps rotary embeddings under rope_parameters, before version 5 under rope_scaling and rope_theta."""
    found = dict(config.get("rope_parameters") or config.get("rope_scaling") or {})
    found.setdefault("rope_type", found.get("type", "default"))
    found.setdefault("rope_theta", config.get("rope_theta", 10000.0))
    return found


def _head_dim(config: Mapping[str, Any]) -> int:
    return int(config.get("head_dim") or config["hidden_size"] // config["num_attention_heads"])


def _describe(writer: Any, config: Mapping[str, Any], file_type: int) -> None:
    """The sizes llama.cpp needs to build the model."""
    heads = config["num_attention_heads"]
    rope = _rope(config)
    writer.add_file_type(file_type)
    writer.add_quantization_version(2)
    writer.add_block_count(config["num_hidden_layers"])
    writer.add_context_length(config["max_position_embeddings"])
    writer.add_embedding_length(config["hidden_size"])
    writer.add_feed_forward_length(config["intermediate_size"])
    writer.add_head_count(heads)
    writer.add_head_count_kv(config.get("num_key_value_heads") or heads)
    writer.add_layer_norm_rms_eps(config["rms_norm_eps"])
    writer.add_vocab_size(config["vocab_size"])
    writer.add_rope_dimension_count(_head_dim(config))
    writer.add_rope_freq_base(rope["rope_theta"])
    if _head_dim(config) * heads != config["hidden_size"]:
        writer.add_key_length(_head_dim(config))
        writer.add_value_length(_head_dim(config))
    if rope["rope_type"] == "linear":
        writer.add_string(f"{writer.arch}.rope.scaling.type", "linear")
        writer.add_float32(f"{writer.arch}.rope.scaling.factor", rope["factor"])


def _rope_factors(config: Mapping[str, Any]) -> Tensor | None:
    """Llama 3.1's stretch of each rotary frequency, which llama.cpp divides by; None for plain rotary embeddings."""
    rope = _rope(config)
    if rope["rope_type"] != "llama3":
        return None
    dim = _head_dim(config)
    wavelength = 2 * torch.pi * rope["rope_theta"] ** (torch.arange(0, dim, 2) / dim)  # float32 [dim/2]
    low, high = rope["low_freq_factor"], rope["high_freq_factor"]
    length, factor = rope["original_max_position_embeddings"], rope["factor"]
    smooth = ((length / wavelength - low) / (high - low)).clamp(0, 1)
    return 1 / ((1 - smooth) / factor + smooth)


@hookimpl
def qcore_exporters() -> list[Exporter]:
    return [Gguf()]
