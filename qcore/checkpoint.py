"""Model folders: safetensors read and written tensor by tensor, everything from a file validated."""

from __future__ import annotations

import json
import math
import os
import re
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from safetensors import safe_open
from torch import Tensor

from .errors import CheckpointError, ModelError, first_line, name_list
from .files import Flusher, check_inside, disk_errors, local_path, read_json, write_json
from .packing import roomy

if TYPE_CHECKING:
    from .plugins import Plugins


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
INDEX = "model.safetensors.index.json"
SINGLE = "model.safetensors"
_CARRIED = re.compile(
    r"(tokenizer|special_tokens|added_tokens|vocab|merges|chat_template|generation_config|preprocessor|processor|spiece"
    r"|sentencepiece|LICENSE|NOTICE).*|.*\.(model|tiktoken|py)"
)


@dataclass(frozen=True)
class TensorInfo:
    """Where a tensor is: file, dtype, shape, and where in the file its bytes begin."""

    file: str
    dtype: torch.dtype
    shape: tuple[int, ...]
    start: int = 0

    @property
    def count(self) -> int:
        """How many elements it has."""
        return math.prod(self.shape)

    @property
    def nbytes(self) -> int:
        """How many bytes they take."""
        return self.count * self.dtype.itemsize


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
                    yield name, filled(tensor, stream, info.start, name)

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


def filled(tensor: Tensor, stream: Any, start: int, name: str) -> Tensor:
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
        self._disk = Flusher()

    def add(self, name: str, tensor: Tensor) -> None:
        """Append a tensor; shapes, dtype and order are kept."""
        size = tensor.nbytes
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
        data = bytes_of(tensor)
        with disk_errors(f"writing {path}"):
            self._file.write(data)
            self._disk.nudge(self._file)
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
            return filled(roomy(shape, dtype), file, start, name)

    def _finish_shard(self) -> None:
        if self._file is None:
            return
        path, header = self.shards[-1]
        encoded = json.dumps({"__metadata__": {"format": "pt"}, **header}, separators=(",", ":")).encode()
        if len(encoded) > self.room:
            raise CheckpointError(f"the header of {path} needs {len(encoded)} bytes, {self.room} were reserved.")
        with disk_errors(f"writing {path}"):
            self._disk.wait()
            self._file.seek(0)
            self._file.write(self.room.to_bytes(8, "little") + encoded)
            self._disk.close(self._file)
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
            self._disk.settle()


def bytes_of(tensor: Tensor) -> memoryview:
    return tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy().data


def resolve_model(model: str, plugins: Plugins, revision: str | None = None) -> Path:
    """Return the folder of a model given by folder, plugin name or hub name.

    Raises ModelError when it is none of them.
    """
    cache = Path(os.environ.get("QCORE_CACHE", Path.home() / ".cache" / "qcore"))
    for resolved in plugins.call("qcore_resolve_model", model=model, cache=cache):
        return Path(resolved)
    if (path := local_path(model, "model")).exists():
        return path
    if re.fullmatch(r"[\w.-]+/[\w.-]+", model) is None or model.startswith("."):
        raise ModelError(f"there is no folder {model}, and it is not a hub name like org/name.")
    import huggingface_hub
    from huggingface_hub.errors import HfHubHTTPError, HFValidationError, LocalEntryNotFoundError

    patterns = ["*.safetensors", "*.json", "*.model", "*.tiktoken", "*.txt", "*.jinja", "*.py", "LICENSE*"]
    patterns += [file for exporter in plugins.usable("format").values() for file in exporter.weight_files]
    try:
        return Path(huggingface_hub.snapshot_download(model, revision=revision, allow_patterns=patterns))
    except (HfHubHTTPError, HFValidationError, LocalEntryNotFoundError, OSError) as error:
        raise ModelError(
            f"there is no folder {model}, and the hub gave no model of that name: {first_line(error)}"
        ) from None
