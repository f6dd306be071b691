"""How kernel backends lay columns out so that every group starts at a multiple of 32, whatever the g_idx."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from qcore import grid

UNIT = 32  # packed groups start at multiples of this


class Layout(NamedTuple):
    """How columns lie packed."""

    perm: Tensor | None  # int32 [k]: packed column c holds column perm[c], nothing where that is -1; None: in order
    group_size: int  # of packed columns: a multiple of 32, or -1
    groups: Tensor  # int64 [packed groups]: whose scales and zeros each takes


def packed_group_size(group_size: int, columns: int) -> int:
    """The group size of packed columns: -1 for a single group, else rounded up to a multiple of 32.

    >>> packed_group_size(48, 96), packed_group_size(128, 96)
    (64, -1)
    """
    return -1 if group_size == -1 or group_size >= columns else -(-group_size // UNIT) * UNIT


def layout(g_idx: Tensor, group_size: int) -> Layout:
    """Return how columns of any g_idx [in] are packed so that each group starts at a multiple of 32.

    Columns are sorted by group. A group of more columns than group_size, which a file may have, is packed as several.
    """
    columns, width = g_idx.shape[0], packed_group_size(group_size, g_idx.shape[0])
    groups = grid.num_groups(columns, group_size)
    if width == -1:
        return Layout(None, -1, torch.zeros(1, dtype=torch.int64))
    if width == group_size and torch.equal(g_idx, grid.group_index(columns, group_size, g_idx.device)):
        return Layout(None, width, torch.arange(groups))
    order = torch.argsort(g_idx, stable=True)  # [in]
    sorted_groups = g_idx[order].long()
    counts = torch.bincount(g_idx, minlength=groups)  # [groups]
    slots = -(-counts // width)  # [groups], packed groups of each
    first_column, first_slot = counts.cumsum(0) - counts, slots.cumsum(0) - slots
    place = first_slot[sorted_groups] * width + torch.arange(columns) - first_column[sorted_groups]  # [in]
    k = -(-(int(place[-1]) + 1) // 8) * 8  # rows of gathered x are 16-byte aligned
    perm = torch.full((k,), -1, dtype=torch.int32)
    perm[place] = order.int()
    return Layout(perm, width, torch.repeat_interleave(torch.arange(groups), slots))
