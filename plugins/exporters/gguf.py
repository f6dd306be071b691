"""GGUF, as llama.cpp reads it: quantized linears in its own block types, names, metadata and tokenizer (docs/formats.md).

A folder holds `model.gguf`, which is all llama.cpp needs, and beside it the config and the tokenizer, from which qcore and
transformers build the model again. Symmetric grids go into Q4_0, Q5_0 and Q8_0, others of up to 5 bits into Q4_1 and Q5_1;
groups of several blocks repeat their scale. The field `qcore.layers` keeps widths and group sizes, so that what is read
back is bit for bit what was saved.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Iterator, Mapping
from pathlib import Path
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
    hookimpl,
    read_json,
)
from qcore.checkpoint import TensorInfo
from qcore.files import check_inside, disk_errors, write_json
from qcore.saving import PROVENANCE, carry_files, compare_names, read_provenance, refuse

from . import gguf_blocks, gguf_write
from .gguf_blocks import BLOCK, BY_NUMBER
from .gguf_file import FLOATS, Entry, GgufFile
from .gguf_names import ARCHITECTURES, as_model_has, heads_of, rope_of
from .gguf_write import LAYERS

FILE = "model.gguf"
DTYPES = {"float16": torch.float16, "bfloat16": torch.bfloat16, "float32": torch.float32}


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
        if gguf_blocks.type_for(config.bits, config.sym) is None:
            return f"{config.bits} bits with zero points; the types with an offset have up to 5"
        return None

    def why_not_model(self, config: Mapping[str, Any]) -> str | None:
        """An architecture and rotary embeddings that are known here."""
        kind = str(config.get("model_type"))
        if kind not in ARCHITECTURES:
            return f"model_type {kind!r}; qcore writes {', '.join(ARCHITECTURES)} as GGUF"
        rope = rope_of(config).get("rope_type", "default")
        return None if rope in ("default", "linear", "llama3") else f"rotary embeddings of type {rope!r}"

    def why_not_exact(self, weight: QuantizedWeight) -> str | None:
        """float16 scales, and zero points that their offsets give back."""
        half = weight.scales.half()
        if not torch.equal(half.to(weight.scales.dtype), weight.scales):
            return f"its scales are float16, which does not hold all of these ({weight.scales.dtype})"
        if not weight.sym:
            back = gguf_blocks.zeros_from(half, gguf_blocks.offsets(half, weight.zeros))
            if not torch.equal(back, weight.zeros):
                return "its float16 offsets do not give these zero points back"
        return None

    def save(self, content: Content, folder: Path) -> None:
        """Write the file, proving each tensor, and what belongs beside it; open it in the end."""
        refuse(self, content)
        with disk_errors(f"writing {folder / FILE}"):
            gguf_write.write(content, folder / FILE, self)
        quantization = {"quant_method": self.name, "file": FILE}
        write_json(folder / "config.json", {**content.config, "quantization_config": quantization})
        write_json(folder / PROVENANCE, dict(content.provenance))
        carry_files(content, folder)
        compare_names(content, self.open(folder), folder)

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

    def _layer(self, name: str, entry: Entry, kept: QuantConfig | None) -> LayerSpec:
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

    def _float_dtype(self, entry: Entry) -> torch.dtype:
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
            yield name, self._order(name, tensor, as_model_has)

    def weight(self, name: str) -> QuantizedWeight:
        """A quantized linear."""
        theirs, layer = self.names[f"{name}.weight"], self.layers[name]
        kind, config = BY_NUMBER[self.file.tensors[theirs].kind], layer.config
        with disk_errors(f"reading {self.file.path}"):
            blocks = self._order(name, self.file.bytes_of(theirs), as_model_has)
        bias = self.tensor(f"{name}.bias") if f"{name}.bias" in self.names else None
        try:
            return gguf_blocks.weight_of(kind, blocks, config, bias)
        except CheckpointError as error:
            raise CheckpointError(f"{self.path}: layer {name}: {error} (field {LAYERS})") from None

    def _order(self, name: str, rows: Tensor, how: Callable[[Tensor, int], Tensor]) -> Tensor:
        heads = heads_of(self.architecture, self.config, name)
        if heads and rows.shape[0] % (2 * heads):
            raise CheckpointError(f"{self.path}: {name} has {rows.shape[0]} rows for {heads} heads.")
        return how(rows, heads) if heads else rows

    def size(self) -> int:
        """See ModelFolder."""
        return self.file.path.stat().st_size


@hookimpl
def qcore_exporters() -> list[Exporter]:
    return [Gguf()]
