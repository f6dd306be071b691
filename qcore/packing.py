"""Codes to 32-bit words and back, any width from 1 to 8 bits.

One layout: the dense little-endian stream. Code j of a row occupies bits [bits*j, bits*j + bits) of the row's
words, so widths that do not divide 32 cross word boundaries. It is the stream GPTQ checkpoints hold (docs/formats.md).
"""

from __future__ import annotations

import math

import torch
from torch import Tensor


def words_for(count: int, bits: int) -> int:
    """Words needed for `count` codes."""
    return -(-count * bits // 32)


def pack(codes: Tensor, bits: int) -> Tensor:
    """Pack integer codes [..., n] along the last dimension into int32 [..., ceil(n*bits/32)]; unused bits are 0.

    >>> pack(torch.tensor([1, 2, 3], dtype=torch.uint8), 4)
    tensor([801], dtype=torch.int32)
    """
    count = codes.shape[-1]
    codes = codes.to(torch.uint8)
    if 8 % bits == 0:  # whole codes per byte: shift within bytes, then look at four bytes as a word
        per_byte = 8 // bits
        padded = _blocks(codes, 4 * per_byte).reshape(*codes.shape[:-1], -1, per_byte)
        joined = padded[..., 0].clone(memory_format=torch.contiguous_format)
        for slot in range(1, per_byte):
            joined |= padded[..., slot] << (bits * slot)
        return joined.view(torch.int32)
    period = 32 // math.gcd(bits, 32)  # codes after which the pattern of word boundaries repeats
    words = period * bits // 32
    blocks = _blocks(codes, period)
    packed = torch.zeros(*blocks.shape[:-1], words, dtype=torch.int64, device=codes.device)
    for j in range(period):
        code = blocks[..., j].to(torch.int64)
        word, shift = divmod(bits * j, 32)
        packed[..., word] |= (code << shift) & 0xFFFFFFFF
        if shift + bits > 32:
            packed[..., word + 1] |= code >> (32 - shift)
    stream = packed.flatten(-2)[..., : words_for(count, bits)]
    return torch.where(stream >= 2**31, stream - 2**32, stream).to(torch.int32)


def unpack(words: Tensor, bits: int, count: int) -> Tensor:
    """Return the first `count` codes of int32 words [..., w] as uint8 [..., count].

    >>> unpack(torch.tensor([801], dtype=torch.int32), 4, 3)
    tensor([1, 2, 3], dtype=torch.uint8)
    """
    mask = 2**bits - 1
    if 8 % bits == 0:
        stream = words.contiguous().view(torch.uint8)
        if bits == 8:
            return stream[..., :count]
        per_byte = 8 // bits
        split = torch.empty(*stream.shape, per_byte, dtype=torch.uint8, device=words.device)
        for slot in range(per_byte):
            torch.bitwise_and(stream >> (bits * slot), mask, out=split[..., slot])
        return split.flatten(-2)[..., :count]
    period = 32 // math.gcd(bits, 32)
    per_block = period * bits // 32
    blocks = _blocks(words.to(torch.int64) & 0xFFFFFFFF, per_block)
    codes = torch.empty(*blocks.shape[:-1], period, dtype=torch.uint8, device=words.device)
    for j in range(period):
        word, shift = divmod(bits * j, 32)
        code = blocks[..., word] >> shift
        if shift + bits > 32:
            code = code | (blocks[..., word + 1] << (32 - shift))
        codes[..., j] = (code & mask).to(torch.uint8)
    return codes.flatten(-2)[..., :count]


def _blocks(values: Tensor, size: int) -> Tensor:
    """Cut the last dimension into blocks, the last one filled up with zeros: [..., n] -> [..., ceil(n/size), size]."""
    missing = -values.shape[-1] % size
    padded = torch.nn.functional.pad(values, (0, missing)) if missing else values
    return padded.reshape(*values.shape[:-1], -1, size)
