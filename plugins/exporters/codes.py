"""Codes to the words of files and back, in the three layouts that formats have.

Compiled (csrc/cpu/codes.c) where the library is there, torch's operations elsewhere: the same bits, in three to five times
the time.
"""

from __future__ import annotations

import torch
from torch import Tensor

from qcore import CheckpointError, packing

from .. import cpu_library
from ..cpu_library import CPU

#: codes uint8 [N, K] -> int32: along [N, ceil(K*b/32)], down [K*b/32, N], interleaved [K, N/8] (4 bits); as QC_… numbers them
LAYOUTS = ("along", "down", "interleaved")
#: an interleaved word holds eight outputs; slot i (bits 4i to 4i+3) holds output ORDER[i]
ORDER = (0, 2, 4, 6, 1, 3, 5, 7)


def pack(codes: Tensor, bits: int, layout: str) -> Tensor:
    """Pack codes uint8 [N, K] into the words of a layout, int32."""
    out, columns = codes.shape
    if not cpu_library.serves(codes):
        return _pack(codes, bits, layout)
    codes = codes.contiguous()
    words = packing.roomy(_shape(bits, layout, out, columns), torch.int32)
    CPU.call(
        cpu_library.load(), "qc_pack_codes", bits, LAYOUTS.index(layout), out, columns, codes.data_ptr(), columns, words.data_ptr()
    )  # fmt: skip
    return words


def unpack(words: Tensor, bits: int, layout: str, out: int, columns: int) -> Tensor:
    """Return the codes that words hold, uint8 [out, columns].

    Raises CheckpointError when there are more or fewer words than that takes.
    """
    expected = _shape(bits, layout, out, columns)
    if tuple(words.shape) != expected or words.dtype != torch.int32:
        raise CheckpointError(f"packed codes are {words.dtype} {list(words.shape)}, expected int32 {list(expected)}.")
    if not cpu_library.serves(words):
        return _unpack(words, bits, layout, columns)
    words = words.contiguous()
    codes = packing.roomy((out, columns), torch.uint8)
    CPU.call(
        cpu_library.load(), "qc_unpack_codes", bits, LAYOUTS.index(layout), out, columns, words.data_ptr(), codes.data_ptr(), columns
    )  # fmt: skip
    return codes


def _shape(bits: int, layout: str, out: int, columns: int) -> tuple[int, int]:
    if layout == "along":
        return out, packing.words_for(columns, bits)
    return (columns * bits // 32, out) if layout == "down" else (columns, out // 8)


def _pack(codes: Tensor, bits: int, layout: str) -> Tensor:
    if layout == "interleaved":
        return packing.pack(codes.reshape(-1, 8, codes.shape[1])[:, ORDER].flatten(0, 1).t().contiguous(), bits)
    words = packing.pack(codes, bits)
    return words if layout == "along" else words.t().contiguous()


def _unpack(words: Tensor, bits: int, layout: str, columns: int) -> Tensor:
    if layout == "interleaved":
        slots = packing.unpack(words, bits, 8 * words.shape[1]).t().reshape(-1, 8, columns)  # [N/8, 8, K]
        return slots[:, torch.tensor(ORDER).argsort()].flatten(0, 1)
    return packing.unpack(words if layout == "along" else words.t().contiguous(), bits, columns).contiguous()
