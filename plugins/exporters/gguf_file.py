"""The container GGUF: reading one from anywhere with every count and offset checked (docs/formats.md)."""

from __future__ import annotations

import struct
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

import torch
from torch import Tensor

from qcore import CheckpointError, packing
from qcore.checkpoint import filled

from .gguf_blocks import BLOCK, BY_NUMBER, TYPES

FLOATS = {0: torch.float32, 1: torch.float16, 30: torch.bfloat16}

_SCALARS = {0: "B", 1: "b", 2: "H", 3: "h", 4: "I", 5: "i", 6: "f", 7: "?", 10: "Q", 11: "q", 12: "d"}
_STRING, _ARRAY = 8, 9


@dataclass(frozen=True)
class Entry:
    """A tensor of a file: torch's shape, the number of its type, where its bytes are."""

    shape: tuple[int, ...]
    kind: int
    start: int
    size: int


class GgufFile:
    """A GGUF file, version 2 or 3, little-endian: `fields` and `tensors`.

    Raises CheckpointError for anything that does not fit into the file or that qcore does not read.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self._left = path.stat().st_size
        self.fields: dict[str, Any] = {}
        self.tensors: dict[str, Entry] = {}
        with path.open("rb") as handle:
            self._handle: BinaryIO = handle
            try:
                self._parse()
            except (UnicodeDecodeError, struct.error) as error:
                raise self._wrong(f"damaged header ({error})") from None

    def _wrong(self, problem: str) -> CheckpointError:
        return CheckpointError(f"{self.path}: {problem}.")

    def _parse(self) -> None:
        size = self._left
        magic = self._take(4)
        if magic != b"GGUF":
            raise self._wrong(f"starts with {magic!r}, a GGUF file starts with b'GGUF'")
        version, tensors, fields = self._number("I"), self._number("Q"), self._number("Q")
        if version not in (2, 3):
            raise self._wrong(f"GGUF version {version}; qcore reads 2 and 3, little-endian")
        self._fits(fields, 13, "fields")
        for _ in range(fields):
            name = self._string()
            if name in self.fields:
                raise self._wrong(f"field {name!r} is there twice")
            self.fields[name] = self._value(self._number("I"))
        self._fits(tensors, 24, "tensors")
        infos = [self._info() for _ in range(tensors)]
        alignment = self.fields.get("general.alignment", 32)
        if not isinstance(alignment, int) or not 0 < alignment <= 2**16 or alignment & (alignment - 1):
            raise self._wrong(f"general.alignment is {alignment!r}, expected a power of two")
        start = -(-(size - self._left) // alignment) * alignment
        for name, shape, kind, offset in infos:
            if offset % alignment:
                raise self._wrong(f"tensor {name!r} is not aligned to {alignment}")
            self._place(name, shape, kind, start + offset, size)

    def _info(self) -> tuple[str, tuple[int, ...], int, int]:
        name, count = self._string(), self._number("I")
        if not 1 <= count <= 4:
            raise self._wrong(f"tensor {name!r} has {count} dimensions")
        shape = tuple(reversed([self._number("Q") for _ in range(count)]))
        return name, shape, self._number("I"), self._number("Q")

    def _place(self, name: str, shape: tuple[int, ...], kind: int, start: int, end: int) -> None:
        count = 1
        for side in shape:
            count *= side
        if kind in BY_NUMBER:
            if shape[-1] % BLOCK:
                raise self._wrong(f"tensor {name!r} has rows of {shape[-1]}, no whole blocks of {BLOCK}")
            size = count // BLOCK * BY_NUMBER[kind].size
        elif kind in FLOATS:
            size = count * FLOATS[kind].itemsize
        else:
            known = ", ".join(["F32", "F16", "BF16", *(each.name for each in TYPES)])
            raise self._wrong(f"tensor {name!r} has type {kind}; qcore reads {known}")
        if name in self.tensors:
            raise self._wrong(f"tensor {name!r} is there twice")
        if count == 0 or start + size > end:
            raise self._wrong(f"tensor {name!r} of {list(shape)} at {start} is empty or leaves the file of {end} bytes")
        self.tensors[name] = Entry(shape, kind, start, size)

    def _take(self, count: int) -> bytes:
        if count > self._left:
            raise self._wrong(f"ends where {count} more bytes should be")
        self._left -= count
        return self._handle.read(count)

    def _number(self, code: str) -> Any:
        return struct.unpack(f"<{code}", self._take(struct.calcsize(code)))[0]

    def _string(self) -> str:
        return self._take(self._number("Q")).decode("utf-8")

    def _fits(self, count: int, least: int, what: str) -> None:
        if count * least > self._left:
            raise self._wrong(f"{count} {what} do not fit into the file")

    def _value(self, kind: int, depth: int = 0) -> Any:
        if kind in _SCALARS:
            return self._number(_SCALARS[kind])
        if kind == _STRING:
            return self._string()
        if kind != _ARRAY or depth > 2:
            raise self._wrong(f"a field has type {kind}, nested {depth} deep")
        inner, count = self._number("I"), self._number("Q")
        if inner in _SCALARS:
            width = struct.calcsize(_SCALARS[inner])
            self._fits(count, width, "numbers")
            return list(struct.unpack(f"<{count}{_SCALARS[inner]}", self._take(count * width)))
        self._fits(count, 8, "items")
        return [self._value(inner, depth + 1) for _ in range(count)]

    def bytes_of(self, name: str) -> Tensor:
        """A tensor's bytes, uint8 [rows, bytes of a row]; a vector is one row."""
        entry = self.tensors[name]
        rows = entry.shape[0] if len(entry.shape) > 1 else 1
        with self.path.open("rb", buffering=0) as handle:
            return filled(packing.roomy([rows, entry.size // rows], torch.uint8), handle, entry.start, name)

    def floats(self, name: str) -> Tensor:
        """A tensor that is not quantized."""
        entry = self.tensors[name]
        return self.bytes_of(name).flatten().view(FLOATS[entry.kind]).reshape(entry.shape)
