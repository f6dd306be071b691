"""The container GGUF: reading one from anywhere with every count and offset checked, and the blocks inside (docs/formats.md).

A block holds 32 consecutive inputs of one output. Q4_0, Q5_0 and Q8_0 are symmetric, x = d * (q - 2**(b-1)); Q4_1 and Q5_1
have an offset, x = d * q + m. d and m are float16.
"""

from __future__ import annotations

import os
import struct
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
import torch
from torch import Tensor

from qcore import CheckpointError, QuantizedWeight, grid

BLOCK = 32


@dataclass(frozen=True)
class BlockType:
    """A quantized type: its number in the file, width of a code, whether it has an offset, bytes of a block."""

    name: str
    number: int
    bits: int
    offset: bool
    size: int
    file_type: int  # of a file that is mostly of this type


TYPES = (
    BlockType("Q4_0", 2, 4, False, 18, 2),
    BlockType("Q4_1", 3, 4, True, 20, 3),
    BlockType("Q5_0", 6, 5, False, 22, 8),
    BlockType("Q5_1", 7, 5, True, 24, 9),
    BlockType("Q8_0", 8, 8, False, 34, 7),
)
BY_NUMBER = {each.number: each for each in TYPES}
FLOATS = {0: torch.float32, 1: torch.float16, 30: torch.bfloat16}

_SCALARS = {0: "B", 1: "b", 2: "H", 3: "h", 4: "I", 5: "i", 6: "f", 7: "?", 10: "Q", 11: "q", 12: "d"}
_STRING, _ARRAY = 8, 9


def encode(kind: BlockType, codes: Tensor, scales: Tensor, zeros: Tensor) -> np.ndarray:
    """Codes uint8 [N, K] of the type's own grid, scales float16 [N, K/32] and zeros [N, K/32] -> blocks uint8 [N, bytes]."""
    rows, blocks = scales.shape
    parts = [scales.contiguous().view(torch.uint8).reshape(rows, blocks, 2)]
    if kind.offset:
        parts.append(offsets(scales, zeros).contiguous().view(torch.uint8).reshape(rows, blocks, 2))
    codes = codes.reshape(rows, blocks, BLOCK)
    if kind.bits == 8:
        parts.append(codes ^ 0x80)  # minus 128, as int8
    else:
        if kind.bits == 5:
            high = (codes >> 4).reshape(rows, blocks, 4, 8)
            parts.append((high << torch.arange(8, dtype=torch.uint8)).sum(-1, dtype=torch.uint8))
        low = codes & 15
        parts.append(low[..., :16] | low[..., 16:] << 4)
    found: np.ndarray = torch.cat(parts, -1).flatten(1).numpy()
    return found


def decode(kind: BlockType, blocks: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Blocks uint8 [N, bytes] -> codes uint8 [N, K], scales float16 [N, K/32], offsets float16 [N, K/32] (0 without)."""
    parts = blocks.reshape(blocks.shape[0], -1, kind.size)
    scales = parts[..., :2].contiguous().view(torch.float16)[..., 0]
    start = 2
    low = torch.zeros_like(scales)
    if kind.offset:
        low, start = parts[..., 2:4].contiguous().view(torch.float16)[..., 0], 4
    if kind.bits == 8:
        return (parts[..., start:] ^ 0x80).flatten(1), scales, low
    packed = parts[..., -16:]
    codes = torch.cat((packed & 15, packed >> 4), -1)
    if kind.bits == 5:
        high = parts[..., start : start + 4, None] >> torch.arange(8, dtype=torch.uint8) & 1
        codes = codes | high.flatten(-2) << 4
    return codes.flatten(1), scales, low


def offsets(scales: Tensor, zeros: Tensor) -> Tensor:
    """m = -d * z, rounded to float16."""
    return (-scales.float() * zeros.float()).half()


def zeros_from(scales: Tensor, low: Tensor) -> Tensor:
    """The zero points that offsets stand for: integers int32 where they give these very offsets, else -m/d, floating."""
    exact = -low.float() / torch.where(scales == 0, torch.ones_like(scales), scales).float()
    whole = exact.round()
    if bool((offsets(scales, whole) == low).all()) and bool((whole.abs() < 2**15).all()):
        return whole.to(torch.int32)
    return exact


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
        with self.path.open("rb") as handle:
            raw = bytearray(os.pread(handle.fileno(), entry.size, entry.start))
        if len(raw) != entry.size:
            raise self._wrong(f"tensor {name!r} is cut off")
        return torch.frombuffer(raw, dtype=torch.uint8).reshape(entry.shape[0] if len(entry.shape) > 1 else 1, -1)

    def floats(self, name: str) -> Tensor:
        """A tensor that is not quantized."""
        entry = self.tensors[name]
        return self.bytes_of(name).flatten().view(FLOATS[entry.kind]).reshape(entry.shape)


def type_for(bits: int, sym: bool) -> BlockType | None:
    """The smallest type that holds a grid: one without an offset for symmetric grids, one with for others."""
    fits = [each for each in TYPES if each.offset != sym and each.bits >= bits]
    return min(fits, key=lambda each: each.size, default=None)


def into_type(kind: BlockType, weight: QuantizedWeight) -> tuple[Tensor, Tensor, Tensor]:
    """A weight's codes, scales and zeros in a type's own grid, scales and zeros per block.

    A narrower symmetric grid is moved to the middle of the wider one; what it stands for stays the same.
    """
    blocks = weight.g_idx[::BLOCK].long()
    shift = 0 if kind.offset else grid.symmetric_zero(kind.bits) - grid.symmetric_zero(weight.bits)
    return weight.codes + shift, weight.scales.half()[:, blocks], weight.zeros[:, blocks]
