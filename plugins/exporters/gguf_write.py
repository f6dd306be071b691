"""Writing a GGUF file: the header first, then one tensor at a time, each read from the file again and proved."""

from __future__ import annotations

import contextlib
import json
import math
from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from qcore import CheckpointError, ConfigError, Content, Exporter, QuantConfig
from qcore.checkpoint import filled
from qcore.files import Flusher
from qcore.packing import recycling, roomy
from qcore.saving import exact_weight, expect_same, in_order

from . import gguf_blocks, gguf_tokenizer
from .gguf_blocks import BLOCK
from .gguf_file import FLOATS
from .gguf_names import ARCHITECTURES, Architecture, as_llama_has, as_model_has, heads_of, rope_of

LAYERS = "qcore.layers"  # the field that keeps widths and group sizes
NUMBERS = {dtype: number for number, dtype in FLOATS.items()}

#: bytes as they stand in the file -> in what they differ from what was meant, or None
Proof = Callable[[Tensor], "str | None"]


@dataclass(frozen=True)
class Piece:
    """A tensor to be written: its name here and in the file, the shape of its bytes, its type, how to make them and their proof."""

    name: str
    theirs: str
    shape: tuple[int, ...]
    kind: int
    make: Callable[[], tuple[Tensor, Proof]]


def write(content: Content, path: Path, exporter: Exporter) -> None:
    """Stream a model into a file; raises CheckpointError when a tensor cannot be held or reads back differently."""
    gguf = _library()
    architecture = ARCHITECTURES[content.config["model_type"]]
    writer = gguf.GGUFWriter(path, architecture.name)
    usual = Counter(gguf_blocks.type_for(each.config.bits, each.config.sym) for each in content.layers.values())
    _describe(writer, content.config, usual.most_common(1)[0][0].file_type)  # type: ignore[union-attr]
    gguf_tokenizer.describe(writer, content)
    by_grid: dict[QuantConfig, list[str]] = {}
    for name, layer in content.layers.items():
        by_grid.setdefault(layer.config, []).append(name)
    writer.add_string(LAYERS, json.dumps([[config.model_dump(), names] for config, names in by_grid.items()]))
    pieces = [*_linears(content, architecture, exporter), *_floats(content, architecture)]
    for piece in pieces:
        writer.add_tensor_info(piece.theirs, piece.shape, np.dtype(np.uint8), math.prod(piece.shape), piece.kind)
    writer.write_header_to_file(path)
    writer.write_kv_data_to_file()
    writer.write_ti_data_to_file()
    file, disk = writer.fout[0], Flusher()

    def written() -> Iterator[Callable[[], tuple[str, str | None]]]:
        for piece, (made, proof) in in_order(lambda piece: (piece, piece.make()), pieces):
            writer.write_padding(file, file.tell())
            start = file.tell()
            writer.write_tensor_data(made.numpy())
            file.flush()
            disk.nudge(file)
            yield partial(_proved, piece, path, start, proof)

    try:
        with recycling():
            for name, difference in in_order(lambda proof: proof(), written()):
                expect_same(path.parent, name, difference)
        disk.wait()
    finally:
        with contextlib.suppress(OSError):  # said above, or not what went wrong
            disk.settle()
        writer.close()


def _proved(piece: Piece, path: Path, start: int, proof: Proof) -> tuple[str, str | None]:
    with path.open("rb", buffering=0) as file:
        return piece.name, proof(filled(roomy(piece.shape, torch.uint8), file, start, piece.name))


def _same(given: Tensor, found: Tensor) -> str | None:
    return None if torch.equal(given, found) else "value"


def _named(architecture: Architecture, name: str) -> str:
    found = architecture.gguf_name(name)
    if found is None:
        raise CheckpointError(f"format 'gguf' has no name for {name} in {architecture.name}.")
    return found


def _linears(content: Content, architecture: Architecture, exporter: Exporter) -> Iterator[Piece]:
    def blocks(name: str, heads: int) -> tuple[Tensor, Proof]:
        weight = exact_weight(exporter, content, name)
        kind = gguf_blocks.type_for(weight.bits, weight.sym)
        assert kind is not None
        made = gguf_blocks.encode(kind, *gguf_blocks.into_type(kind, weight))

        def proof(found: Tensor) -> str | None:
            rows = as_model_has(found, heads) if heads else found
            again = gguf_blocks.weight_of(kind, rows, weight.config)
            return replace(weight, scales=weight.scales.half(), bias=None).difference(again)

        return (as_llama_has(made, heads) if heads else made).contiguous(), proof

    for name, layer in content.layers.items():
        kind = gguf_blocks.type_for(layer.config.bits, layer.config.sym)
        assert kind is not None
        heads = heads_of(architecture, content.config, name)
        shape = (layer.out_features, layer.in_features // BLOCK * kind.size)
        theirs = _named(architecture, f"{name}.weight")
        yield Piece(name, theirs, shape, kind.number, partial(blocks, name, heads))
        if _has_bias(content, name):
            yield _float(content, architecture, f"{name}.bias", partial(_bias, content, name))


def _has_bias(content: Content, name: str) -> bool:
    """Whether a linear has a bias: a folder's headers tell, a model in memory has it at hand."""
    if content.source is not None:
        return f"{name}.bias" in content.source.tensors
    return content.weight(name).bias is not None


def _bias(content: Content, name: str) -> Tensor:
    bias = content.weight(name).bias
    assert bias is not None
    return bias


def _floats(content: Content, architecture: Architecture) -> Iterator[Piece]:
    for name in content.tensors:
        yield _float(content, architecture, name, partial(content.tensor, name))
    factors = _rope_factors(content.config)
    if factors is not None:
        made = factors.view(torch.uint8)
        yield Piece(
            "rope_freqs",
            "rope_freqs.weight",
            tuple(made.shape),
            NUMBERS[factors.dtype],
            lambda: (made, partial(_same, made)),
        )


def _float(content: Content, architecture: Architecture, name: str, read: Callable[[], Tensor]) -> Piece:
    """A tensor that is not quantized: vectors as float32, others as they are where the format has their type."""
    known = content.source.tensors.get(name) if content.source is not None else None
    first = known if known is not None and known.dtype in NUMBERS else read()
    dtype = torch.float32 if len(first.shape) == 1 or first.dtype not in NUMBERS else first.dtype
    shape = (*first.shape[:-1], first.shape[-1] * dtype.itemsize)
    heads = heads_of(architecture, content.config, name)

    def make() -> tuple[Tensor, Proof]:
        kept = read().to(dtype)
        made = (as_llama_has(kept, heads) if heads else kept).contiguous().view(torch.uint8)
        return made, partial(_same, made)

    return Piece(name, _named(architecture, name), shape, NUMBERS[dtype], make)


def _library() -> Any:
    try:
        import gguf
    except ImportError:
        raise ConfigError("writing GGUF needs the gguf package: pip install 'qcore[gguf]'") from None
    return gguf


def _head_dim(config: Mapping[str, Any]) -> int:
    return int(config.get("head_dim") or config["hidden_size"] // config["num_attention_heads"])


def _describe(writer: Any, config: Mapping[str, Any], file_type: int) -> None:
    """The sizes llama.cpp needs to build the model."""
    heads = config["num_attention_heads"]
    rope = rope_of(config)
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
    rope = rope_of(config)
    if rope["rope_type"] != "llama3":
        return None
    dim = _head_dim(config)
    wavelength = 2 * torch.pi * rope["rope_theta"] ** (torch.arange(0, dim, 2) / dim)  # float32 [dim/2]
    low, high = rope["low_freq_factor"], rope["high_freq_factor"]
    length, factor = rope["original_max_position_embeddings"], rope["factor"]
    smooth = ((length / wavelength - low) / (high - low)).clamp(0, 1)
    return 1 / ((1 - smooth) / factor + smooth)
