"""The blocks of GGUF: 32 consecutive inputs of one output with a scale (docs/formats.md).

Q4_0, Q5_0 and Q8_0 are symmetric, x = d * (q - 2**(b-1)); Q4_1 and Q5_1 have an offset, x = d * q + m. d and m are float16.
Compiled (csrc/cpu/blocks.c) where the library is there, torch's operations elsewhere: the same bits.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from qcore import CheckpointError, QuantConfig, QuantizedWeight, grid, packing

from .. import cpu_library
from ..cpu_library import CPU

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


def encode(kind: BlockType, codes: Tensor, scales: Tensor, zeros: Tensor) -> Tensor:
    """Codes uint8 [N, K] of the type's own grid, scales float16 [N, K/32] and zeros [N, K/32] -> blocks uint8 [N, bytes]."""
    low = offsets(scales, zeros).contiguous() if kind.offset else None
    if not cpu_library.serves(codes):
        return _encode(kind, codes, scales, low)
    codes, scales = codes.contiguous(), scales.contiguous()
    packed = packing.roomy([len(codes), scales.shape[1] * kind.size], torch.uint8)
    CPU.call(
        cpu_library.load(), "qc_pack_blocks", kind.bits, scales.numel(), codes.data_ptr(), scales.data_ptr(),
        None if low is None else low.data_ptr(), packed.data_ptr(),
    )  # fmt: skip
    return packed


def decode(kind: BlockType, blocks: Tensor) -> tuple[Tensor, Tensor, Tensor | None]:
    """Blocks uint8 [N, bytes] -> codes uint8 [N, K], scales float16 [N, K/32], offsets float16 [N, K/32] (None without)."""
    if not cpu_library.serves(blocks):
        return _decode(kind, blocks)
    blocks = blocks.contiguous()
    rows, count = len(blocks), blocks.shape[1] // kind.size
    codes = packing.roomy([rows, count * BLOCK], torch.uint8)
    scales = torch.empty(rows, count, dtype=torch.float16)
    low = torch.empty_like(scales) if kind.offset else None
    CPU.call(
        cpu_library.load(), "qc_unpack_blocks", kind.bits, scales.numel(), blocks.data_ptr(), codes.data_ptr(), scales.data_ptr(),
        None if low is None else low.data_ptr(),
    )  # fmt: skip
    return codes, scales, low


def _encode(kind: BlockType, codes: Tensor, scales: Tensor, low: Tensor | None) -> Tensor:
    rows, blocks = scales.shape
    parts = [half.contiguous().view(torch.uint8).reshape(rows, blocks, 2) for half in (scales, low) if half is not None]
    codes = codes.reshape(rows, blocks, BLOCK)
    if kind.bits == 8:
        parts.append(codes ^ 0x80)  # minus 128, as int8
    else:
        if kind.bits == 5:
            high = (codes >> 4).reshape(rows, blocks, 4, 8)
            parts.append((high << torch.arange(8, dtype=torch.uint8)).sum(-1, dtype=torch.uint8))
        nibbles = codes & 15
        parts.append(nibbles[..., :16] | nibbles[..., 16:] << 4)
    return torch.cat(parts, -1).flatten(1)


def _decode(kind: BlockType, blocks: Tensor) -> tuple[Tensor, Tensor, Tensor | None]:
    parts = blocks.reshape(blocks.shape[0], -1, kind.size)
    scales = parts[..., :2].contiguous().view(torch.float16)[..., 0]
    low = parts[..., 2:4].contiguous().view(torch.float16)[..., 0] if kind.offset else None
    start = 4 if kind.offset else 2
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


def type_for(bits: int, sym: bool) -> BlockType | None:
    """The smallest type that holds a grid: one without an offset for symmetric grids, one with for others."""
    fits = [each for each in TYPES if each.offset != sym and each.bits >= bits]
    return min(fits, key=lambda each: each.size, default=None)


def into_type(kind: BlockType, weight: QuantizedWeight) -> tuple[Tensor, Tensor, Tensor]:
    """A weight's codes, scales and zeros in a type's own grid, scales and zeros per block; its groups lie in order.

    A narrower symmetric grid is moved to the middle of the wider one; what it stands for stays the same.
    """
    count, step = weight.in_features // BLOCK, _blocks_in_group(weight.config, weight.in_features)
    shift = _shift(kind, weight.config)
    codes = weight.codes + shift if shift else weight.codes
    return codes, _for_each_block(weight.scales.half(), step, count), _for_each_block(weight.zeros, step, count)


def weight_of(kind: BlockType, blocks: Tensor, config: QuantConfig, bias: Tensor | None = None) -> QuantizedWeight:
    """The weight in a type's blocks uint8 [N, bytes], on the grid that was noted for it.

    Raises CheckpointError when the blocks are not of such a grid.
    """
    codes, scales, low = decode(kind, blocks)
    columns, count = codes.shape[1], scales.shape[1]
    step, shift = _blocks_in_group(config, columns), _shift(kind, config)
    scale = scales[:, ::step].contiguous()
    offset = None if low is None else low[:, ::step].contiguous()
    for whole, part in ((scales, scale), (low, offset)):
        if whole is not None and part is not None and not torch.equal(_for_each_block(part, step, count), whole):
            raise CheckpointError("blocks of one group differ in scale; the note of the grid is wrong.")
    middle = grid.symmetric_zero(config.bits)
    zeros = torch.full(scale.shape, middle, dtype=torch.int32) if offset is None else zeros_from(scale, offset)
    if shift and bool((codes < shift).any()):
        raise CheckpointError(f"a code lies outside {config.bits} bits; the note of the grid is wrong.")
    g_idx = grid.group_index(columns, config.group_size)
    return QuantizedWeight(codes - shift if shift else codes, scale, zeros, g_idx, config, bias)


def _blocks_in_group(config: QuantConfig, columns: int) -> int:
    return (columns if config.group_size == -1 else config.group_size) // BLOCK


def _shift(kind: BlockType, config: QuantConfig) -> int:
    """How far a symmetric grid's codes move into the middle of the type's."""
    return 0 if kind.offset else grid.symmetric_zero(kind.bits) - grid.symmetric_zero(config.bits)


def _for_each_block(values: Tensor, step: int, count: int) -> Tensor:
    """Values of groups [N, G] -> of blocks [N, count]."""
    return values.repeat_interleave(step, 1)[:, :count].contiguous() if step > 1 else values
