"""The second kind of plugin: a model adapter says where a family of models keeps its blocks and linears.

A declaration, not a class to inherit from. `discovery.py` makes one by looking at a model that nobody declared.
"""

from __future__ import annotations

import fnmatch
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from .errors import ModelError, name_list

if TYPE_CHECKING:
    from torch import nn


@dataclass(frozen=True)
class ModelAdapter:
    """Where the decoder blocks are, and which linears share an input, in the order they run.

    name: the adapter's own name. model_types: the `config.model_type`s it serves.
    blocks: dotted name of the list of decoder blocks. linear_groups: names inside a block; each group shares one
    input; groups stand in order of use; `*` matches one part of a name; a name that a block lacks is skipped, so that
    one declaration can serve blocks that differ. before_blocks, after_blocks: modules that run before the first and
    after the last block (what must be in memory to start). Empty: everything outside the blocks.
    keep_float: linears that are not quantized (routers), named as in linear_groups.
    """

    name: str
    model_types: tuple[str, ...]
    blocks: str
    linear_groups: tuple[tuple[str, ...], ...]
    before_blocks: tuple[str, ...] = ()
    after_blocks: tuple[str, ...] = ()
    keep_float: tuple[str, ...] = ()
    notes: tuple[str, ...] = field(default=(), compare=False)  # what `discover_adapter` assumed

    def find_blocks(self, model: nn.Module) -> list[tuple[str, nn.Module]]:
        """Return (dotted name, module) of each decoder block, in order.

        Raises ModelError when the model has no such list.
        """
        from torch import nn

        try:
            blocks = model.get_submodule(self.blocks)
        except AttributeError:
            blocks = None
        if not isinstance(blocks, nn.ModuleList) or len(blocks) == 0:
            raise ModelError(
                f"adapter {self.name!r} expects decoder blocks at {self.blocks!r}; {type(model).__name__} has none there. "
                "Use another adapter, or none for the generic one."
            )
        return [(f"{self.blocks}.{index}", block) for index, block in enumerate(blocks)]

    def groups_in(self, block: nn.Module) -> list[tuple[str, ...]]:
        """Return the groups of linears this block really has, as names inside the block, in the order they run.

        Raises ModelError when a linear of the block is in no group, or a group matches nothing at all.
        """
        return [group for stage in self.stages_in(block) for group in stage]

    def stages_in(self, block: nn.Module) -> list[list[tuple[str, ...]]]:
        """Return the same groups, those that run side by side (one per value of `*`: experts) in one list.

        Raises ModelError as `groups_in` does.
        """
        present = linears_in(block)
        stages = [expanded for patterns in self.linear_groups if (expanded := _expand(patterns, present))]
        named = {name for stage in stages for group in stage for name in group}
        missed = [name for name in present if name not in named and not self.keeps_float(name)]
        if missed or not stages:
            raise ModelError(
                f"adapter {self.name!r} covers {name_list(sorted(named))} but the block has the linears "
                f"{name_list(present, 20)}. Add the missing ones ({name_list(missed, 4)}) to linear_groups."
            )
        return stages

    def keeps_float(self, name: str) -> bool:
        """Whether a linear (named inside its block) is one that is never quantized."""
        return any(_stars(pattern, name) is not None for pattern in self.keep_float)


def _expand(patterns: Sequence[str], present: Sequence[str]) -> list[tuple[str, ...]]:
    """Give the names a group matches. With `*`, one group per value of the starred part (experts do not share)."""
    found: dict[tuple[str, ...], list[str]] = {}
    for pattern in patterns:
        for name in present:
            stars = _stars(pattern, name)
            if stars is not None:
                found.setdefault(stars, []).append(name)
    return [tuple(names) for names in found.values()]


def _stars(pattern: str, name: str) -> tuple[str, ...] | None:
    """What the starred parts of a pattern stand for in a name, or None when it does not match."""
    parts, pieces = pattern.split("."), name.split(".")
    if len(pieces) != len(parts) or not all(map(fnmatch.fnmatchcase, pieces, parts)):
        return None
    return tuple(piece for piece, part in zip(pieces, parts, strict=True) if "*" in part)


def is_linear(module: nn.Module) -> bool:
    """Whether a module is a linear qcore quantizes: nn.Linear or transformers' Conv1D, subclasses included."""
    from torch import nn
    from transformers.pytorch_utils import Conv1D

    return isinstance(module, (nn.Linear, Conv1D))


def linears_in(block: nn.Module) -> list[str]:
    """Names of the linears in a block, in module order."""
    return [name for name, module in block.named_modules() if is_linear(module)]
