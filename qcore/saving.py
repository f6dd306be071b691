"""Bases of the formats kept in safetensors. What they write of a linear is read from the file again and compared, bit for bit."""

from __future__ import annotations

import contextlib
import copy
import ctypes
import os
import shutil
from abc import abstractmethod
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from functools import partial
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
import torch
from torch import Tensor

from .checkpoint import ModelFolder, ShardWriter, bytes_of
from .config import parse_bytes
from .errors import CheckpointError, ConfigError, QcoreError, name_list
from .exporter import Content, Exporter, LayerSpec, refusals
from .files import disk_errors, read_json, write_json
from .packing import recycling
from .weight import QuantizedWeight

K = TypeVar("K")
V = TypeVar("V")
#: the file in an output folder that says how it was made
PROVENANCE = "qcore.json"
#: a linear's decoder: its spec and its tensors, by suffix -> its weight
Reader = Callable[[LayerSpec, Mapping[str, Tensor]], QuantizedWeight]


class FolderExporter(Exporter):
    """Base of formats that write each quantized linear as a few named tensors in safetensors.

    Saving streams and carries along every other tensor. What was written of a linear is read from the file, decoded and
    compared bit for bit while its weight is at hand; in the end the folder is opened (`verify`).
    """

    shard_bytes: int = 5 * 10**9

    @abstractmethod
    def encode(self, name: str, weight: QuantizedWeight) -> dict[str, Tensor]:
        """Return full tensor name -> tensor, bias left out. Called on several threads at once."""

    @abstractmethod
    def config(self, content: Content) -> dict[str, Any]:
        """Return the whole config.json."""

    def extra_files(self, content: Content) -> dict[str, Any]:
        """Further JSON files this format wants, name -> object."""
        return {}

    def reader(self, folder: Path) -> Reader | None:
        """How linears are decoded from a folder whose config is written; None if they never are, and bytes are compared."""
        return None

    def verify(self, content: Content, folder: Path) -> None:
        """Open what was written; raise CheckpointError when it is not what it should be."""
        found = set(ModelFolder(folder).tensors)
        missing = [name for name in content.tensors if name not in found]
        if missing:
            raise CheckpointError(f"{folder}: {name_list(missing)} not written.")

    def save(self, content: Content, folder: Path) -> None:
        """Write config, shards, carried files and provenance, and prove what was written."""
        refuse(self, content)
        for file, value in {"config.json": self.config(content), **self.extra_files(content)}.items():
            write_json(folder / file, value, atomic=False)
        expected = [*(f"{name}.{n}" for name in content.layers for n in range(6)), *content.tensors]
        writer = ShardWriter(folder, expected, self.shard_bytes)
        reader = self.reader(folder)

        def encoded(layer: LayerSpec) -> tuple[LayerSpec, QuantizedWeight, dict[str, Tensor]]:
            weight = exact_weight(self, content, layer.name)
            bias = {} if weight.bias is None else {f"{layer.name}.bias": weight.bias}
            return layer, weight, {**self.encode(layer.name, weight), **bias}

        def written() -> Iterator[Callable[[], tuple[str, str | None]]]:
            for layer, weight, tensors in in_order(encoded, content.layers.values()):
                kept = writer.keep(tensors)
                yield partial(_proof, layer, weight, kept, reader) if reader else partial(_same_bytes, tensors, kept)
            for name in content.tensors:
                tensors = {name: content.tensor(name)}
                yield partial(_same_bytes, tensors, writer.keep(tensors))

        with recycling():
            for name, difference in in_order(lambda proof: proof(), written()):
                expect_same(folder, name, difference)
        writer.close()
        write_json(folder / PROVENANCE, dict(content.provenance), atomic=False)
        carry_files(content, folder)
        self.verify(content, folder)
        writer.settle()


class TensorExporter(FolderExporter):
    """Base of formats that keep each quantized linear as a few named tensors in safetensors, both ways.

    Subclasses map one layer to tensors and back (`encode`, `decode`), say which layers a folder holds (`layers_in`)
    and write the config (`quantization_config`).
    """

    @abstractmethod
    def layers_in(self, folder: ModelFolder, quantization: Mapping[str, Any]) -> dict[str, LayerSpec]:
        """Return the quantized linears of a folder, checked against tensor names, dtypes and shapes."""

    @abstractmethod
    def decode(
        self, layer: LayerSpec, tensors: Mapping[str, Tensor], quantization: Mapping[str, Any]
    ) -> QuantizedWeight:
        """Return the weight of a layer from its tensors, keyed by their suffix ("qweight"), bias included."""

    @abstractmethod
    def quantization_config(self, content: Content) -> dict[str, Any]:
        """Return what stands in config.json under quantization_config."""

    def config(self, content: Content) -> dict[str, Any]:
        """See FolderExporter."""
        return {**content.config, "quantization_config": self.quantization_config(content)}

    def notes(
        self, folder: ModelFolder, layers: Mapping[str, LayerSpec], quantization: Mapping[str, Any]
    ) -> tuple[str, ...]:
        """What a reader should be told about this folder."""
        return ()

    def detects(self, folder: Path, config: Mapping[str, Any]) -> bool:
        """By `quant_method` being the format's name; formats with other marks override this."""
        quantization = config.get("quantization_config")
        return isinstance(quantization, dict) and quantization.get("quant_method") == self.name

    def reader(self, folder: Path) -> Reader:
        """See FolderExporter."""
        quantization = self.read_quantization(ModelFolder.unfinished(folder))
        return lambda layer, tensors: self.decode(layer, tensors, quantization)

    def verify(self, content: Content, folder: Path) -> None:
        """See FolderExporter."""
        compare_names(content, self.open(folder), folder)

    def open(self, folder: Path) -> Content:
        """Open a folder: headers are read and checked now, tensors when asked for."""
        files = ModelFolder(folder)
        quantization = self.read_quantization(files)
        layers = self.layers_in(files, quantization)
        parts = _parts(layers, files)
        owned = {key for keys in parts.values() for key in keys.values()}
        return Content(
            config={key: value for key, value in files.config.items() if key != "quantization_config"},
            layers=layers,
            weight=partial(self._weight, files, layers, parts, quantization),
            tensors=[name for name in files.tensors if name not in owned],
            tensor=files.tensor,
            provenance=read_provenance(folder),
            files=files.carried_files(),
            notes=self.notes(files, layers, quantization),
            source=files,
        )

    def _weight(
        self,
        files: ModelFolder,
        layers: Mapping[str, LayerSpec],
        parts: Mapping[str, Mapping[str, str]],
        quantization: Mapping[str, Any],
        name: str,
    ) -> QuantizedWeight:
        """Read and decode one linear."""
        keys = {key: suffix for suffix, key in parts[name].items()}
        tensors = {keys[key]: tensor for key, tensor in files.read(keys)}
        try:
            return self.decode(layers[name], tensors, quantization)
        except QcoreError as error:
            raise CheckpointError(f"{files.path}: layer {name}: {error}") from error
        except KeyError as error:
            raise CheckpointError(f"{files.path}: layer {name} has no tensor {error}.") from error

    def read_quantization(self, folder: ModelFolder) -> dict[str, Any]:
        """Return the folder's quantization config; formats with side files override this."""
        quantization = folder.config.get("quantization_config")
        if not isinstance(quantization, dict):
            raise CheckpointError(f"{folder.path}/config.json has no quantization_config object.")
        return quantization


def _parts(layers: Iterable[str], folder: ModelFolder) -> dict[str, dict[str, str]]:
    """Tensors directly under each layer's name: layer -> suffix -> full name."""
    found: dict[str, dict[str, str]] = {name: {} for name in layers}
    for key in folder.tensors:
        name, _, suffix = key.rpartition(".")
        if name in found:
            found[name][suffix] = key
    return found


def _proof(
    layer: LayerSpec, weight: QuantizedWeight, kept: Mapping[str, Tensor], reader: Reader
) -> tuple[str, str | None]:
    """A linear's name, and in what it differs from what its tensors in a file decode to."""
    found = reader(layer, {key.removeprefix(f"{layer.name}."): tensor for key, tensor in kept.items()})
    return layer.name, weight.difference(found)


def _same_bytes(given: Mapping[str, Tensor], kept: Mapping[str, Tensor]) -> tuple[str, str | None]:
    """The name of the first tensor whose bytes in the file differ, if one does."""
    for name, tensor in given.items():
        if not np.array_equal(np.asarray(bytes_of(tensor)), np.asarray(bytes_of(kept[name]))):
            return name, "value"
    return "", None


def refuse(exporter: Exporter, content: Content) -> None:
    """Raise CheckpointError when a format cannot hold the linears of a model, going by their specs."""
    for layer, reason in refusals(exporter, content.layers, content.config):
        what = layer.name if layer else "this model"
        raise CheckpointError(f"format {exporter.name!r} cannot hold {what}: {reason}.")


def compare_names(content: Content, again: Content, folder: Path) -> None:
    """Raise CheckpointError unless what was read back holds the same linears, by their grids and sizes, and other tensors."""
    for name in sorted(set(content.layers) ^ set(again.layers)):
        raise CheckpointError(f"{folder}: linear {name} is a stray one or missing when the folder is read back.")
    for name, layer in content.layers.items():
        found = again.layers[name]
        if (found.config, found.in_features, found.out_features) != (
            layer.config,
            layer.in_features,
            layer.out_features,
        ):
            raise CheckpointError(f"{folder}: {name} reads back as {found}, expected {layer}; nothing was kept.")
    if set(again.tensors) != set(content.tensors):
        strays = sorted(set(again.tensors) ^ set(content.tensors))
        raise CheckpointError(f"{folder}: stray or missing tensors: {name_list(strays)}.")


def expect_same(folder: Path, name: str, difference: str | None) -> None:
    """Raise CheckpointError when there is a difference between what was written and what stands in the file."""
    if difference:
        raise CheckpointError(f"{folder}: {name} reads back with a different {difference}; nothing was kept.")


def in_shards(exporter: Exporter, shard_bytes: int | str | None) -> Exporter:
    """The same format in files of at most `shard_bytes`, a number or a size such as "5GB" (None: as it would itself).

    Raises ConfigError when it is no number of bytes or the format is one file.
    """
    size = parse_bytes(shard_bytes, "shard_bytes")
    if size is None:
        return exporter
    if not isinstance(exporter, FolderExporter):
        raise ConfigError(f"format {exporter.name!r} is one file; shard_bytes does not apply.")
    changed = copy.copy(exporter)
    changed.shard_bytes = size
    return changed


class InexactError(CheckpointError):
    """A format cannot hold the values of a weight."""


def exact_weight(exporter: Exporter, content: Content, name: str) -> QuantizedWeight:
    """Return a linear's weight; raise InexactError when a format cannot hold its values."""
    weight = content.weight(name)
    reason = exporter.why_not_exact(weight)
    if reason:
        raise InexactError(f"format {exporter.name!r} cannot hold {name}: {reason}.")
    return weight


def in_order(work: Callable[[K], V], items: Iterable[K]) -> Iterator[V]:
    """Yield work(item) for each item, in their order, worked on by two threads two items ahead."""
    threads = min(2, os.cpu_count() or 1)
    with ThreadPoolExecutor(threads, initializer=_alone) as pool:
        waiting: deque[Future[V]] = deque()
        try:
            for item in items:
                waiting.append(pool.submit(work, item))
                if len(waiting) >= threads:
                    yield waiting.popleft().result()
            while waiting:
                yield waiting.popleft().result()
        finally:
            for each in waiting:
                each.cancel()


def _alone() -> None:
    """Let torch's operations on this thread run on it alone: threads of theirs for each of ours would wait for each other."""
    torch.get_num_threads()  # which sets the number that is changed next
    with contextlib.suppress(AttributeError, OSError):  # where torch has no OpenMP
        ctypes.CDLL(None).omp_set_num_threads(1)


def carry_files(content: Content, folder: Path) -> None:
    """Copy the small files that belong to a model into a folder."""
    with disk_errors(f"copying into {folder}"):
        for file, source in content.files.items():
            shutil.copyfile(source, folder / file)


def read_provenance(folder: Path) -> dict[str, Any]:
    """How a folder was made, as far as it says so."""
    provenance = read_json(folder / PROVENANCE) if (folder / PROVENANCE).is_file() else {}
    records = provenance.get("layers", [])
    if not isinstance(records, list) or not all(
        isinstance(record, dict) and isinstance(record.get("name"), str) for record in records
    ):
        raise CheckpointError(f"{folder / PROVENANCE}: layers is no list of objects with a name.")
    skipped = provenance.get("skipped", [])
    if not isinstance(skipped, list) or not all(isinstance(name, str) for name in skipped):
        raise CheckpointError(f"{folder / PROVENANCE}: skipped is no list of names.")
    return provenance
