"""QuantizedWeight, the canonical form of a quantized linear.

Algorithms produce it, formats read and write it, backends pack from it. Packing, zero-point offsets, transposes
and interleavings are nobody's business but the format's or the backend's.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np
import torch
from torch import Tensor

from . import grid
from .config import QuantConfig
from .errors import CheckpointError
from .packing import pack, unpack, words_for

_TENSORS = ("scales", "zeros", "g_idx", "bias")
#: elements dequantized together: what it takes on the way is several times as much in float32
AT_ONCE = 2**26


@dataclass(frozen=True, eq=False)
class QuantizedWeight:
    """W [out_features, in_features] ~ scales[:, g_idx] * (codes - zeros[:, g_idx]).

    codes: uint8 [out, in], values in [0, 2**bits).
    scales: floating point [out, groups]; may be negative.
    zeros: int32 [out, groups], or floating point where a format has it so.
    g_idx: int32 [in], the group of each input column.
    config: bits, group_size, sym. sym promises that every zero is 2**(bits-1).
    bias: floating point [out], or None.

    Raises CheckpointError when shapes, dtypes or values contradict each other. Values are looked at on the host: those
    that an accelerator still computes when they come there, as all do on the way to a file.
    """

    codes: Tensor
    scales: Tensor
    zeros: Tensor
    g_idx: Tensor
    config: QuantConfig
    bias: Tensor | None = None

    def __post_init__(self) -> None:
        self._expect(self.codes.ndim == 2, f"codes must be a matrix, found shape {tuple(self.codes.shape)}")
        out, columns = self.codes.shape
        groups = grid.num_groups(columns, self.config.group_size)
        for name in ("scales", "zeros"):
            shape = tuple(getattr(self, name).shape)
            self._expect(shape == (out, groups), f"{name} must be [{out}, {groups}], found {list(shape)}")
        self._expect(
            tuple(self.g_idx.shape) == (columns,), f"g_idx must be [{columns}], found {list(self.g_idx.shape)}"
        )
        self._expect(self.codes.dtype == torch.uint8, f"codes must be uint8, found {self.codes.dtype}")
        self._expect(self.g_idx.dtype == torch.int32, f"g_idx must be int32, found {self.g_idx.dtype}")
        self._expect(self.scales.is_floating_point(), f"scales must be floating point, found {self.scales.dtype}")
        zeros_ok = self.zeros.dtype == torch.int32 or self.zeros.is_floating_point()
        self._expect(zeros_ok, f"zeros must be int32 or floating point, found {self.zeros.dtype}")
        if self.bias is not None:
            self._expect(tuple(self.bias.shape) == (out,), f"bias must be [{out}], found {list(self.bias.shape)}")
        self._expect(out > 0 and columns > 0, f"a weight of shape [{out}, {columns}] is empty")
        if self.codes.device.type == "cpu":
            self._check_values(groups)

    def _check_values(self, groups: int) -> None:
        if self.config.bits < 8:
            top = int(self.codes.max())
            self._expect(top <= self.config.maxq, f"code {top} is beyond {self.config.maxq} ({self.config.bits} bits)")
        low, high = int(self.g_idx.min()), int(self.g_idx.max())
        self._expect(low >= 0 and high < groups, f"g_idx spans {low} to {high}, expected 0 to {groups - 1}")
        self._expect(bool(torch.isfinite(self.scales).all()), "scales hold NaN or Inf")
        if self.config.sym:
            middle = grid.symmetric_zero(self.config.bits)
            self._expect(bool((self.zeros == middle).all()), f"sym promises zeros of {middle}, found others")

    def _expect(self, holds: bool, problem: str) -> None:
        if not holds:
            raise CheckpointError(f"not a quantized weight: {problem}.")

    @property
    def out_features(self) -> int:
        return int(self.codes.shape[0])

    @property
    def in_features(self) -> int:
        return int(self.codes.shape[1])

    @property
    def bits(self) -> int:
        return self.config.bits

    @property
    def group_size(self) -> int:
        return self.config.group_size

    @property
    def sym(self) -> bool:
        return self.config.sym

    @property
    def act_order(self) -> bool:
        """Whether columns lie in groups out of sequence (desc_act), so that g_idx must be looked up."""
        plain = grid.group_index(self.in_features, self.group_size, self.g_idx.device)
        return not torch.equal(self.g_idx, plain)

    def dequantize(self, dtype: torch.dtype = torch.float32) -> Tensor:
        """Return the weight [out, in]: computed in float32, then cast, some rows at a time where there are many."""
        step = max(1, AT_ONCE // self.in_features)
        if len(self.codes) <= step:
            return self._rows(slice(None)).to(dtype)
        weight = torch.empty(self.codes.shape, dtype=dtype, device=self.codes.device)
        for start in range(0, len(weight), step):
            rows = slice(start, start + step)
            weight[rows] = self._rows(rows)
        return weight

    def _rows(self, rows: slice) -> Tensor:
        scales = grid.spread(self.scales[rows].float(), self.g_idx)
        zeros = grid.spread(self.zeros[rows].float(), self.g_idx)
        return grid.dequantize(self.codes[rows].float(), scales, zeros)

    def to(self, device: torch.device | str) -> QuantizedWeight:
        """Return the same weight with its tensors on `device`."""
        moved = {name: value.to(device) for name in _TENSORS if (value := getattr(self, name)) is not None}
        return replace(self, codes=self.codes.to(device), **moved)

    @classmethod
    def stacked(cls, weights: Sequence[QuantizedWeight]) -> QuantizedWeight | None:
        """Return one weight with the outputs of several linears of one input in turn, without bias; None where grids differ."""
        first = weights[0]
        for other in weights[1:]:
            same_kinds = (other.config, other.scales.dtype, other.zeros.dtype, other.in_features) == (
                first.config, first.scales.dtype, first.zeros.dtype, first.in_features,
            )  # fmt: skip
            if not same_kinds or not torch.equal(other.g_idx, first.g_idx):
                return None
        codes, scales, zeros = (
            torch.cat([getattr(weight, name) for weight in weights]) for name in ("codes", "scales", "zeros")
        )
        return replace(first, codes=codes, scales=scales, zeros=zeros, bias=None)

    def equal(self, other: QuantizedWeight) -> bool:
        """Whether both are the same bit for bit, dtypes included."""
        return self.difference(other) is None

    def difference(self, other: QuantizedWeight) -> str | None:
        """Name the first part in which the two differ, or None."""
        if self.config != other.config:
            return f"config ({self.config} against {other.config})"
        for name in ("codes", *_TENSORS):
            mine, theirs = getattr(self, name), getattr(other, name)
            if (mine is None) != (theirs is None):
                return name
            if mine is not None and (mine.dtype != theirs.dtype or not _same(mine, theirs.to(mine.device))):
                return name
        return None

    def to_tensors(self, device: torch.device | str = "cpu") -> dict[str, Tensor]:
        """Return a compact exact form (codes packed along the input), for journals on the host; there it raises like the
        constructor.
        """
        if self.codes.device.type != "cpu" and torch.device(device).type == "cpu":
            self._check_values(self.scales.shape[1])
        tensors = {name: value for name in _TENSORS if (value := getattr(self, name)) is not None}
        return {name: value.to(device) for name, value in {"codes": pack(self.codes, self.bits), **tensors}.items()}

    @classmethod
    def from_tensors(cls, tensors: dict[str, Tensor], config: QuantConfig) -> QuantizedWeight:
        """Read back what `to_tensors` made."""
        columns = tensors["g_idx"].shape[0]
        if tensors["codes"].shape[-1] != words_for(columns, config.bits):
            raise CheckpointError(f"not a quantized weight: {tensors['codes'].shape[-1]} words for {columns} columns.")
        codes = unpack(tensors["codes"], config.bits, columns)
        return cls(codes, tensors["scales"], tensors["zeros"], tensors["g_idx"], config, tensors.get("bias"))


def _same(one: Tensor, other: Tensor) -> bool:
    """torch.equal; bytes in the host's memory eight at a time, in a tenth of the time."""
    alike = one.dtype == torch.uint8 and one.shape == other.shape and one.device.type == "cpu"
    if not alike or one.shape[-1] % 8 or not (one.is_contiguous() and other.is_contiguous()):
        return torch.equal(one, other)
    return np.array_equal(one.numpy().view(np.uint64), other.numpy().view(np.uint64))
