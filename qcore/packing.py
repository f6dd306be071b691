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
    if 8 % bits == 0:
        joined = _blocks(codes, 32 // bits).flatten(-2).contiguous()
        width = bits
        while width < 8:  # two neighbours are one number of 16 bits; the second moves down beside the first
            pair = joined.view(torch.int16)
            joined = (pair | pair >> (8 - width)).to(torch.uint8)
            width *= 2
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
    if 8 % bits == 0:
        split = words.contiguous().view(torch.uint8)
        width = 8
        while width > bits:  # as in `pack`, backwards
            width //= 2
            pair = split.to(torch.int16)
            split = (pair | pair << (8 - width)).bitwise_and_((2**width - 1) * 0x0101).view(torch.uint8)
        return split[..., :count]
    period, mask = 32 // math.gcd(bits, 32), 2**bits - 1
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
