"""Codes to 32-bit words and back, any width from 1 to 8 bits.

One layout: the dense little-endian stream. Code j of a row occupies bits [bits*j, bits*j + bits) of the row's
words, so widths that do not divide 32 cross word boundaries. It is the stream GPTQ checkpoints hold (docs/formats.md).
"""

from __future__ import annotations

import contextlib
import math
import mmap
import weakref
from collections.abc import Callable, Iterator, Sequence

import torch
from torch import Tensor

_PAGE = 2**21  # of the large kind


def words_for(count: int, bits: int) -> int:
    """Words needed for `count` codes."""
    return -(-count * bits // 32)


def pack(codes: Tensor, bits: int) -> Tensor:
    """Pack integer codes [..., n] along the last dimension into int32 [..., ceil(n*bits/32)]; unused bits are 0.

    >>> pack(torch.tensor([1, 2, 3], dtype=torch.uint8), 4)
    tensor([801], dtype=torch.int32)
    """
    count = codes.shape[-1]
    blocks = _blocks(codes.to(torch.uint8), 32 // math.gcd(bits, 32))  # whole words, and whole eights where they matter
    rows, each = blocks.shape[:-2], blocks.shape[-2] * blocks.shape[-1]
    stream = _in_pieces(_join, blocks, bits, 8, bits).reshape(*rows, each * bits // 8)
    return stream.view(torch.int32)[..., : words_for(count, bits)]


def unpack(words: Tensor, bits: int, count: int) -> Tensor:
    """Return the first `count` codes of int32 words [..., w] as uint8 [..., count].

    >>> unpack(torch.tensor([801], dtype=torch.int32), 4, 3)
    tensor([1, 2, 3], dtype=torch.uint8)
    """
    blocks = _blocks(words, bits // math.gcd(bits, 32))
    rows, each = blocks.shape[:-2], blocks.shape[-2] * blocks.shape[-1]
    plain = blocks if blocks.stride(-1) == 1 else blocks.clone(memory_format=torch.contiguous_format)
    codes = _in_pieces(_split, plain.contiguous().view(torch.uint8), bits, bits, 8)
    return codes.reshape(*rows, each * 32 // bits)[..., :count]


def _in_pieces(
    work: Callable[[Tensor, int, Tensor], None], source: Tensor, bits: int, taken: int, given: int
) -> Tensor:
    """Apply `work` to a tensor of bytes, flat, `taken` bytes becoming `given`; on a CPU in pieces that its cache holds."""
    flat = source.contiguous().flatten()
    if flat.storage_offset() % 8:  # it is looked at as wider integers, which must be aligned
        flat = flat.clone()
    if bits == 8:
        return flat
    result = roomy([len(flat) // taken * given], torch.uint8, flat.device)
    piece = taken * 2**15 if flat.device.type == "cpu" else max(1, len(flat))
    for start in range(0, len(flat), piece):
        end = min(start + piece, len(flat))
        work(flat[start:end], bits, result[start // taken * given : end // taken * given])
    return result


def _join(codes: Tensor, bits: int, out: Tensor) -> None:
    """Codes, a byte each, to the stream of their bits: uint8 [n] -> uint8 [n * bits / 8]."""
    if 8 % bits == 0:  # whole codes per byte: those of one byte, seen as one integer, slide together
        seen = codes.view(_INTEGERS[8 // bits])
        joined = seen >> (8 - bits)
        for slot in range(2, 8 // bits):
            joined |= seen >> (8 - bits) * slot
        joined |= seen
        out.copy_(joined)
        return
    eights = codes.view(torch.int64)  # eight codes: pairs, fours and then all slide together
    for width, low, high in _stages(bits):
        eights = (eights & low) | (eights >> width) & high
    out.view(-1, bits).copy_(eights.view(torch.uint8).view(-1, 8)[:, :bits])


def _split(stream: Tensor, bits: int, out: Tensor) -> None:
    """The other way: uint8 [n * bits / 8] -> uint8 [n]."""
    if 8 % bits == 0:
        wide = out.view(_INTEGERS[8 // bits]).copy_(stream)
        parts = [wide << (8 - bits) * slot for slot in range(1, 8 // bits)]
        for part in parts:
            wide |= part
        out &= 2**bits - 1
        return
    eights = torch.zeros(len(stream) // bits, 8, dtype=torch.uint8, device=stream.device)
    eights[:, :bits] = stream.view(-1, bits)
    whole = eights.view(torch.int64)
    for width, low, high in reversed(_stages(bits)):
        whole = (whole & low) | (whole & high) << width
    out.copy_(whole.view(torch.uint8).flatten())


_INTEGERS = {2: torch.int16, 4: torch.int32, 8: torch.int64}


def _stages(bits: int) -> list[tuple[int, int, int]]:
    """How eight codes in a 64-bit integer slide together: (distance, mask of what stays, mask of what has moved), thrice."""
    found = []
    for codes in (1, 2, 4):  # joined so far; they lie in fields of 8 * codes bits
        pairs = range(0, 64, 16 * codes)
        low = sum(2 ** (bits * codes) - 1 << start for start in pairs)
        found.append(((8 - bits) * codes, low, low << bits * codes))
    return found


def _blocks(values: Tensor, size: int) -> Tensor:
    """Cut the last dimension into blocks, the last one filled up with zeros: [..., n] -> [..., ceil(n/size), size]."""
    missing = -values.shape[-1] % size
    padded = torch.nn.functional.pad(values, (0, missing)) if missing else values
    return padded.reshape(*values.shape[:-1], -1, size)


_spare: list[mmap.mmap] | None = None


@contextlib.contextmanager
def recycling() -> Iterator[None]:
    """While the block runs, large tensors of `roomy` take the memory of those that have gone, until it ends.

    New memory comes as thousands of small pages, filled with zeros, which takes several times as long as packing what goes there (18 ms for 45 MB).
    """
    global _spare
    before, _spare = _spare, [] if _spare is None else _spare
    try:
        yield
    finally:
        _spare = before


def roomy(shape: Sequence[int], dtype: torch.dtype, device: torch.device | str = "cpu") -> Tensor:
    """Return an empty tensor; a large one in the host's memory is recycled (`recycling`) and may come in pages of 2 MB."""
    size = math.prod(shape) * dtype.itemsize
    if size < _PAGE or torch.device(device).type != "cpu":
        return torch.empty(tuple(shape), dtype=dtype, device=device)
    spare = _spare
    area = _taken(spare or [], size) or _new_area(size)
    view = memoryview(area)
    if spare is not None:
        weakref.finalize(view, spare.append, area).atexit = False  # torch lets go of it with the last tensor there
    return torch.frombuffer(view, dtype=torch.uint8, count=size).view(dtype).reshape(tuple(shape))


def _taken(spare: list[mmap.mmap], size: int) -> mmap.mmap | None:
    """The smallest spare piece of memory that is large enough, and not far too large."""
    for area in sorted((area for area in list(spare) if size <= len(area) <= 2 * size + _PAGE), key=len):
        with contextlib.suppress(ValueError):  # another thread was faster
            spare.remove(area)
            return area
    return None


def _new_area(size: int) -> mmap.mmap:
    area = mmap.mmap(-1, -(-size // _PAGE) * _PAGE, access=mmap.ACCESS_COPY)  # private to the process
    if hasattr(mmap, "MADV_HUGEPAGE"):
        with contextlib.suppress(OSError):  # it is advice, and a kernel may know no such pages
            area.madvise(mmap.MADV_HUGEPAGE)
    return area
