"""Model folders: streaming safetensors in and out, complete or absent, everything from a file validated.

`ModelFolder` reads, `ShardWriter` writes tensor by tensor, `complete_folder` makes an output appear by rename, and
`TensorExporter` is the base of formats kept in safetensors.
"""

from __future__ import annotations

import contextlib
import copy
import ctypes
import errno
import hashlib
import json
import os
import re
import shutil
from abc import abstractmethod
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

import numpy as np
import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from .errors import CheckpointError, ConfigError, ModelError, QcoreError, name_list
from .exporter import Content, Exporter, LayerSpec
from .packing import recycling, roomy
from .weight import QuantizedWeight

if TYPE_CHECKING:
    from .plugins import Plugins

K = TypeVar("K")
V = TypeVar("V")

DTYPES = {
    "F64": torch.float64,
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "I64": torch.int64,
    "I32": torch.int32,
    "I16": torch.int16,
    "I8": torch.int8,
    "U8": torch.uint8,
    "BOOL": torch.bool,
}
_NAMES = {dtype: name for name, dtype in DTYPES.items()}

#: the file in an output folder that says how it was made
PROVENANCE = "qcore.json"
INDEX = "model.safetensors.index.json"
SINGLE = "model.safetensors"
_CARRIED = re.compile(
    r"(tokenizer|special_tokens|added_tokens|vocab|merges|chat_template|generation_config|preprocessor|processor|spiece"
    r"|sentencepiece|LICENSE|NOTICE).*|.*\.(model|tiktoken|py)"
)


@contextlib.contextmanager
def disk_errors(doing: str) -> Iterator[None]:
    """Turn what the file system or safetensors says into a CheckpointError."""
    try:
        yield
    except SafetensorError as error:
        if f"os error {errno.ENOSPC}" in str(error):  # safetensors wraps what the system says when writing
            raise CheckpointError(f"{doing}: the disk is full. Free some space and run again.") from error
        raise CheckpointError(f"{doing}: not a valid safetensors file ({error}).") from error
    except OSError as error:
        if error.errno == errno.ENOSPC:
            raise CheckpointError(f"{doing}: the disk is full. Free some space and run again.") from error
        raise CheckpointError(f"{doing}: {error.strerror or error}.") from error


def write_atomic(path: Path, write: Callable[[Path], object]) -> None:
    """Let `write` make a neighbour file, flush it to disk, then rename it to `path`."""
    draft = path.with_name(f"{path.name}.tmp")
    with disk_errors(f"writing {path}"):
        try:
            write(draft)
            _sync(draft)
            os.replace(draft, path)
        except BaseException:
            draft.unlink(missing_ok=True)
            raise


def write_json(path: Path, value: Any, atomic: bool = True) -> None:
    """Write JSON, keys in the order given; atomic is not needed in a draft that appears as a whole."""
    text = json.dumps(value, indent=2, ensure_ascii=False) + "\n"
    if atomic:
        write_atomic(path, lambda draft: draft.write_text(text, encoding="utf-8"))
        return
    with disk_errors(f"writing {path}"):
        path.write_text(text, encoding="utf-8")


def read_json(path: Path) -> dict[str, Any]:
    """Read a JSON object.

    Raises CheckpointError when the file is missing, no JSON, or no object.
    """
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        raise CheckpointError(f"{path} cannot be read as JSON: {error}") from None
    if not isinstance(value, dict):
        raise CheckpointError(f"{path} holds a JSON {type(value).__name__}, expected an object.")
    return value


def _sync(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


@dataclass(frozen=True)
class TensorInfo:
    """Where a tensor is: file, dtype, shape, and where in the file its bytes begin."""

    file: str
    dtype: torch.dtype
    shape: tuple[int, ...]
    start: int = 0


def folder_config(path: Path) -> dict[str, Any]:
    """Return a model folder's config.json.

    Raises ModelError when there is none, CheckpointError when it cannot be read.
    """
    if not path.is_dir():
        raise ModelError(f"there is no folder {path}. Give a folder, a hub name or a model file.")
    if not (path / "config.json").is_file():
        raise ModelError(f"{path} has no config.json, so it is not a Hugging Face model folder.")
    check_inside(path / "config.json", path)
    return read_json(path / "config.json")


def check_inside(path: Path, folder: Path) -> None:
    """Refuse a link that leads out of a model folder; the hub's cache, whose files are links, counts as one with its blobs."""
    root = folder.resolve()
    if root.parent.name == "snapshots":
        root = root.parent.parent
    if not path.resolve().is_relative_to(root):
        raise CheckpointError(f"{path} is a link out of the folder, to {path.resolve()}. Copy the file if it is meant.")


class ModelFolder:
    """A Hugging Face model folder in safetensors, read tensor by tensor.

    Raises ModelError when there is no model to read (no folder, no config.json, pickle weights only) and
    CheckpointError when there is one but its files are damaged or contradict each other.
    """

    def __init__(self, path: Path) -> None:
        self.path, self.config = path, folder_config(path)
        self.tensors = self._index()

    @classmethod
    def unfinished(cls, path: Path) -> ModelFolder:
        """A folder whose config is written and whose weights are not: it has no tensors yet."""
        found = cls.__new__(cls)
        found.path, found.config, found.tensors = path, folder_config(path), {}
        return found

    def _files(self) -> list[str]:
        indexes = sorted(self.path.glob("*.safetensors.index.json"))  # AutoGPTQ calls its by the model's own base name
        index = self.path / INDEX if len(indexes) != 1 else indexes[0]
        if index.is_file():
            check_inside(index, self.path)
            weight_map = read_json(index).get("weight_map")
            if not isinstance(weight_map, dict) or not all(isinstance(f, str) for f in weight_map.values()):
                raise CheckpointError(f"{index} has no weight_map of strings.")
            return sorted(set(weight_map.values()))
        if (self.path / SINGLE).is_file():
            return [SINGLE]
        found = sorted(file.name for file in self.path.glob("*.safetensors"))
        if len(found) == 1:
            return found
        if found:
            raise CheckpointError(
                f"{self.path} has {len(found)} safetensors files and no {INDEX} to say what is in them."
            )
        pickles = sorted(file.name for file in self.path.iterdir() if file.suffix in (".bin", ".pt", ".pth", ".ckpt"))
        if pickles:
            raise ModelError(
                f"{self.path} has only pickle weights ({name_list(pickles, 3)}), which can run code when opened. "
                "Convert it once with transformers: save_pretrained(..., safe_serialization=True)."
            )
        raise ModelError(f"{self.path} has no *.safetensors weights.")

    def _index(self) -> dict[str, TensorInfo]:
        tensors: dict[str, TensorInfo] = {}
        for file in self._files():
            path = self.path / file
            if Path(file).name != file or file in ("", ".", ".."):
                raise CheckpointError(f"{self.path}: shard name {file!r} leaves the folder.")
            if not path.is_file():
                raise CheckpointError(f"{self.path}: shard {file} named by {INDEX} is missing.")
            check_inside(path, self.path)
            with disk_errors(f"reading {path}"), safe_open(path, "pt") as handle:  # which checks the header
                starts = _starts(path)
                for name in handle.keys():  # noqa: SIM118 (a handle is no dict)
                    if name in tensors:
                        raise CheckpointError(f"{self.path}: tensor {name} is in {tensors[name].file} and in {file}.")
                    view = handle.get_slice(name)
                    dtype = DTYPES.get(view.get_dtype())
                    if dtype is None:
                        raise CheckpointError(
                            f"{path}: tensor {name} has dtype {view.get_dtype()}, which is not supported."
                        )
                    tensors[name] = TensorInfo(file, dtype, tuple(view.get_shape()), starts[name])
        return tensors

    def read(self, names: Iterable[str], pinned: bool = False) -> Iterator[tuple[str, Tensor]]:
        """Yield (name, tensor) copies, opening each file once per call; nothing stays mapped afterwards.

        pinned: into memory from which a GPU fetches by itself.
        """
        by_file: dict[str, list[str]] = {}
        for name in names:
            if name not in self.tensors:
                raise CheckpointError(f"{self.path} has no tensor {name}.")
            by_file.setdefault(self.tensors[name].file, []).append(name)
        for file, wanted in by_file.items():
            with disk_errors(f"reading {self.path / file}"), (self.path / file).open("rb", buffering=0) as stream:
                for name in wanted:
                    info = self.tensors[name]
                    tensor = (
                        torch.empty(info.shape, dtype=info.dtype, pin_memory=True)
                        if pinned
                        else roomy(info.shape, info.dtype)
                    )
                    yield name, _filled(tensor, stream, info.start, name)

    def tensor(self, name: str) -> Tensor:
        """Read one tensor."""
        return next(self.read([name]))[1]

    def carried_files(self) -> dict[str, Path]:
        """Small files that belong to the model whatever its weights: tokenizer, templates, generation config, code."""
        found = {
            file.name: file for file in sorted(self.path.iterdir()) if file.is_file() and _CARRIED.fullmatch(file.name)
        }
        for file in found.values():
            check_inside(file, self.path)
        return found

    def size(self) -> int:
        """Bytes of all weight files."""
        return sum((self.path / file).stat().st_size for file in {info.file for info in self.tensors.values()})


def _starts(path: Path) -> dict[str, int]:
    """Where the bytes of each tensor begin in a safetensors file whose header has been checked."""
    with path.open("rb") as stream:
        size = int.from_bytes(stream.read(8), "little")
        header = json.loads(stream.read(size))
    return {name: 8 + size + entry["data_offsets"][0] for name, entry in header.items() if name != "__metadata__"}


def _filled(tensor: Tensor, stream: Any, start: int, name: str) -> Tensor:
    """Read a tensor's bytes from where they begin in a file straight to where they shall be."""
    left = memoryview(tensor.reshape(-1).view(torch.uint8).numpy())  # type: ignore[arg-type]
    stream.seek(start)
    while len(left):
        count = stream.readinto(left)
        if not count:
            raise CheckpointError(f"{stream.name} ends within tensor {name}. The file was cut short; get it anew.")
        left = left[count:]
    return tensor


class ShardWriter:
    """Writes tensors one by one into safetensors shards of at most `limit` bytes, then the index.

    A safetensors header stands before the data and lists every offset, so room for it is reserved and padded with
    the spaces the format allows; memory never holds more than one tensor. What is written goes to the disk while the next
    tensor is made.
    """

    HEADER_ROOM = 256  # bytes per tensor: name, dtype, shape, offsets

    def __init__(self, folder: Path, expected: Iterable[str], limit: int = 5 * 10**9) -> None:
        self.folder, self.limit = folder, limit
        room = 1024 + sum(self.HEADER_ROOM + len(name.encode()) for name in expected)
        self.room = -(-room // 8) * 8  # data starts on a multiple of 8, as safetensors' own writer has it
        self.shards: list[tuple[Path, dict[str, Any]]] = []
        self.total = 0
        self._file: Any = None
        self._written = 0
        self._flusher = ThreadPoolExecutor(1)
        self._flushing: Future[None] | None = None

    def add(self, name: str, tensor: Tensor) -> None:
        """Append a tensor; shapes, dtype and order are kept."""
        size = tensor.numel() * tensor.element_size()
        if self._file is None or (self._written and self._written + size > self.limit):
            self._finish_shard()
            path = self.folder / f"shard-{len(self.shards):05d}.part"
            with disk_errors(f"writing {path}"):
                self._file = path.open("wb")
                self._file.write(b" " * (8 + self.room))
            self.shards.append((path, {}))
            self._written = 0
        path, header = self.shards[-1]
        if tensor.dtype not in _NAMES:
            raise CheckpointError(f"tensor {name} has dtype {tensor.dtype}, which safetensors cannot hold here.")
        header[name] = {
            "dtype": _NAMES[tensor.dtype],
            "shape": list(tensor.shape),
            "data_offsets": [self._written, self._written + size],
        }
        data = _bytes_of(tensor)
        with disk_errors(f"writing {path}"):
            self._file.write(data)
            if self._flushing is None or self._flushing.done():
                self._flushed()
                self._file.flush()
                self._flushing = self._flusher.submit(os.fsync, self._file.fileno())
        self._written += size
        self.total += size

    def keep(self, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Append tensors and return them as they now stand in the file."""
        for name, tensor in tensors.items():
            self.add(name, tensor)
        with disk_errors(f"writing {self.folder}"):
            self._file.flush()
            return {name: self._stored(name, tensor.dtype, tensor.shape) for name, tensor in tensors.items()}

    def _stored(self, name: str, dtype: torch.dtype, shape: tuple[int, ...]) -> Tensor:
        path, header = next(shard for shard in reversed(self.shards) if name in shard[1])
        start = 8 + self.room + header[name]["data_offsets"][0]
        with path.open("rb", buffering=0) as file:
            return _filled(roomy(shape, dtype), file, start, name)

    def _flushed(self) -> None:
        """Wait for the disk, and raise what it has to say."""
        if self._flushing is not None:
            self._flushing.result()
            self._flushing = None

    def _finish_shard(self) -> None:
        if self._file is None:
            return
        path, header = self.shards[-1]
        encoded = json.dumps({"__metadata__": {"format": "pt"}, **header}, separators=(",", ":")).encode()
        if len(encoded) > self.room:
            raise CheckpointError(f"the header of {path} needs {len(encoded)} bytes, {self.room} were reserved.")
        with disk_errors(f"writing {path}"):
            self._flushed()
            self._file.seek(0)
            self._file.write(self.room.to_bytes(8, "little") + encoded)
            self._file.flush()
            self._flushing = self._flusher.submit(_sync_and_close, self._file)
        self._file = None

    def close(self) -> None:
        """Finish the last shard, give the files their names, write the index when there is more than one.

        They can be read now; `settle` waits until they are on the disk.
        """
        self._finish_shard()
        count = len(self.shards)
        weight_map = {}
        for number, (path, header) in enumerate(self.shards, 1):
            name = SINGLE if count == 1 else f"model-{number:05d}-of-{count:05d}.safetensors"
            os.replace(path, self.folder / name)
            weight_map.update(dict.fromkeys(header, name))
        if count > 1:
            index = {"metadata": {"total_size": self.total}, "weight_map": dict(sorted(weight_map.items()))}
            write_json(self.folder / INDEX, index)

    def settle(self) -> None:
        """Wait for the disk."""
        with disk_errors(f"writing {self.folder}"):
            self._flushed()
        self._flusher.shutdown()


def _sync_and_close(file: Any) -> None:
    with file:
        os.fsync(file.fileno())


@contextlib.contextmanager
def complete_folder(target: Path, scratch: Path | None = None) -> Iterator[Path]:
    """Give a draft folder that becomes `target` by rename when the block ends well, and vanishes when it does not.

    Raises CheckpointError when target exists and is not an empty folder, or cannot be made.
    """
    check_output(target)
    draft = scratch or target.with_name(f"{target.name}.writing")
    with disk_errors(f"making {draft}"):
        if draft.exists():
            shutil.rmtree(draft)
        draft.mkdir(parents=True)
    try:
        yield draft
        with disk_errors(f"finishing {target}"):
            for file in draft.iterdir():
                _sync(file)
            if target.exists():
                target.rmdir()
            os.replace(draft, target)
            _sync(target.parent)
    except BaseException:
        shutil.rmtree(draft, ignore_errors=True)
        raise


MANIFEST = "SHA256SUMS"


def write_manifest(folder: Path) -> None:
    """Write the sha256 of every file into SHA256SUMS, as `sha256sum -c` reads it."""
    files = sorted(file for file in folder.iterdir() if file.is_file() and file.name != MANIFEST)
    text = "".join(f"{_sha256(file)}  {file.name}\n" for file in files)
    write_atomic(folder / MANIFEST, lambda draft: draft.write_text(text, encoding="utf-8"))


def check_manifest(folder: Path) -> bool | None:
    """Whether a folder has a manifest that holds; None without one.

    Raises CheckpointError naming the first file that is missing or differs.
    """
    if not (folder / MANIFEST).is_file():
        return None
    with disk_errors(f"reading {folder / MANIFEST}"):
        lines = (folder / MANIFEST).read_bytes().decode("utf-8", "replace").splitlines()
    for line in lines:
        digest, _, name = line.partition("  ")
        if Path(name).name != name or not (folder / name).is_file():
            raise CheckpointError(f"{folder / MANIFEST} names {name!r}, which is no file in the folder.")
        if _sha256(folder / name) != digest:
            raise CheckpointError(f"{folder / name} is not the file that {MANIFEST} was written for.")
    return True


def _sha256(path: Path) -> str:
    hasher = hashlib.sha256()
    with disk_errors(f"reading {path}"), path.open("rb") as handle:
        while chunk := handle.read(2**20):
            hasher.update(chunk)
    return hasher.hexdigest()


def check_output(target: Path) -> None:
    """Refuse an output that exists with something in it, or whose parent cannot be written."""
    if target.exists() and (not target.is_dir() or any(target.iterdir())):
        raise CheckpointError(f"output {target} exists already. Choose another folder or remove it first.")
    with disk_errors(f"output {target} cannot be made"):
        target.parent.mkdir(parents=True, exist_ok=True)
        if not os.access(target.parent, os.W_OK):
            raise CheckpointError(f"output {target} cannot be made: {target.parent} is not writable.")


def refuse(exporter: Exporter, content: Content) -> None:
    """Raise CheckpointError when a format cannot hold the linears of a model, going by their specs."""
    for layer in content.layers.values():
        reason = exporter.why_not(layer)
        if reason:
            raise CheckpointError(f"format {exporter.name!r} cannot hold {layer.name}: {reason}.")
    layers = list(content.layers.values())
    reason = exporter.why_not_model(content.config) or exporter.why_not_together(layers)
    if reason:
        raise CheckpointError(f"format {exporter.name!r} cannot hold this model: {reason}.")


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


def _bytes_of(tensor: Tensor) -> memoryview:
    return tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy().data


def compare(content: Content, again: Content, folder: Path) -> None:
    """Raise CheckpointError unless what was read back holds the same linears, bit for bit, and the same other tensors."""
    compare_names(content, again, folder)
    for name in content.layers:
        _expect_same(folder, name, content.weight(name).difference(again.weight(name)))


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


def _expect_same(folder: Path, name: str, difference: str | None) -> None:
    if difference:
        raise CheckpointError(f"{folder}: {name} reads back with a different {difference}; nothing was kept.")


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
            weight = content.weight(layer.name)
            reason = self.why_not_exact(weight)
            if reason:
                raise CheckpointError(f"format {self.name!r} cannot hold {layer.name}: {reason}.")
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
                _expect_same(folder, name, difference)
        writer.close()
        write_json(folder / PROVENANCE, dict(content.provenance), atomic=False)
        carry_files(content, folder)
        self.verify(content, folder)
        writer.settle()


def _proof(
    layer: LayerSpec, weight: QuantizedWeight, kept: Mapping[str, Tensor], reader: Reader
) -> tuple[str, str | None]:
    """A linear's name, and in what it differs from what its tensors in a file decode to."""
    found = reader(layer, {key.removeprefix(f"{layer.name}."): tensor for key, tensor in kept.items()})
    return layer.name, weight.difference(found)


def _same_bytes(given: Mapping[str, Tensor], kept: Mapping[str, Tensor]) -> tuple[str, str | None]:
    """The name of the first tensor whose bytes in the file differ, if one does."""
    for name, tensor in given.items():
        if not np.array_equal(np.asarray(_bytes_of(tensor)), np.asarray(_bytes_of(kept[name]))):
            return name, "value"
    return "", None


def in_shards(exporter: Exporter, shard_bytes: int | None) -> Exporter:
    """The same format in files of at most `shard_bytes` (None: as it would itself).

    Raises ConfigError when it is no number of bytes or the format is one file.
    """
    if shard_bytes is None:
        return exporter
    if not isinstance(exporter, FolderExporter):
        raise ConfigError(f"format {exporter.name!r} is one file; shard_bytes does not apply.")
    if shard_bytes < 1:
        raise ConfigError(f"shard_bytes is {shard_bytes}, expected a number of bytes.")
    changed = copy.copy(exporter)
    changed.shard_bytes = shard_bytes
    return changed


def carry_files(content: Content, folder: Path) -> None:
    """Copy the small files that belong to a model into a folder."""
    with disk_errors(f"copying into {folder}"):
        for file, source in content.files.items():
            shutil.copyfile(source, folder / file)


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

        def weight(name: str) -> QuantizedWeight:
            keys = {key: suffix for suffix, key in parts[name].items()}
            tensors = {keys[key]: tensor for key, tensor in files.read(keys)}
            try:
                return self.decode(layers[name], tensors, quantization)
            except QcoreError as error:
                raise CheckpointError(f"{folder}: layer {name}: {error}") from error
            except KeyError as error:
                raise CheckpointError(f"{folder}: layer {name} has no tensor {error}.") from error

        return Content(
            config={key: value for key, value in files.config.items() if key != "quantization_config"},
            layers=layers,
            weight=weight,
            tensors=[name for name in files.tensors if name not in owned],
            tensor=files.tensor,
            provenance=read_provenance(folder),
            files=files.carried_files(),
            notes=self.notes(files, layers, quantization),
            source=files,
        )

    def read_quantization(self, folder: ModelFolder) -> dict[str, Any]:
        """Return the folder's quantization config; formats with side files override this."""
        quantization = folder.config.get("quantization_config")
        if not isinstance(quantization, dict):
            raise CheckpointError(f"{folder.path}/config.json has no quantization_config object.")
        return quantization


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


def _parts(layers: Iterable[str], folder: ModelFolder) -> dict[str, dict[str, str]]:
    """Tensors directly under each layer's name: layer -> suffix -> full name."""
    found: dict[str, dict[str, str]] = {name: {} for name in layers}
    for key in folder.tensors:
        name, _, suffix = key.rpartition(".")
        if name in found:
            found[name][suffix] = key
    return found


def resolve_model(model: str, plugins: Plugins, revision: str | None = None) -> Path:
    """Return the folder of a model given by folder, plugin name or hub name.

    Raises ModelError when it is none of them.
    """
    cache = Path(os.environ.get("QCORE_CACHE", Path.home() / ".cache" / "qcore"))
    for resolved in plugins.call("qcore_resolve_model", model=model, cache=cache):
        return Path(resolved)
    if Path(model).exists():
        return Path(model)
    if re.fullmatch(r"[\w.-]+/[\w.-]+", model) is None or model.startswith("."):
        raise ModelError(f"there is no folder {model}, and it is not a hub name like org/name.")
    import huggingface_hub
    from huggingface_hub.errors import HfHubHTTPError, HFValidationError, LocalEntryNotFoundError

    patterns = ["*.safetensors", "*.json", "*.model", "*.tiktoken", "*.txt", "*.jinja", "*.py", "LICENSE*"]
    patterns += [file for exporter in plugins.usable("format").values() for file in exporter.weight_files]
    try:
        return Path(huggingface_hub.snapshot_download(model, revision=revision, allow_patterns=patterns))
    except (HfHubHTTPError, HFValidationError, LocalEntryNotFoundError, OSError) as error:
        reason = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise ModelError(f"there is no folder {model}, and the hub gave no model of that name: {reason}") from None
