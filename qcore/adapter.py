"""The second kind of plugin: a model adapter says where a family of models keeps its blocks and linears.

A declaration, not a class to inherit from. `discover` makes one by looking at a model that nobody declared.
"""

from __future__ import annotations

import fnmatch
import re
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

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
    notes: tuple[str, ...] = field(default=(), compare=False)  # what `discover` assumed

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


def find_block_list(model: nn.Module) -> str:
    """Return the dotted name of the model's decoder blocks: the ModuleList with the most weights in linears.

    All of its modules must hold linears. A model of several towers (vision, text) is searched in its text decoder.

    Raises ModelError, saying what was looked for.
    """
    from torch import nn

    best: tuple[int, str] | None = None
    decoder = text_decoder(model)
    for name, module in model.named_modules():
        if not isinstance(module, nn.ModuleList) or len(module) == 0 or not f"{name}.".startswith(decoder):
            continue
        sizes = [sum(linear_size(sub) for sub in block.modules() if is_linear(sub)) for block in module]
        if all(sizes) and (best is None or sum(sizes) > best[0]):
            best = (sum(sizes), name)
    if best is None:
        raise ModelError(
            f"{type(model).__name__} has no decoder blocks: looked for an nn.ModuleList all of whose modules hold "
            "nn.Linear or Conv1D. Declare a ModelAdapter for it (docs/plugins.md)."
        )
    return best[1]


def text_decoder(model: nn.Module) -> str:
    """The prefix of the names inside a model's text decoder, as the model itself tells it; empty for all of it."""
    from torch import nn

    decoder = getattr(model, "get_decoder", lambda: None)()
    if isinstance(decoder, nn.Linear):  # ModernBERT calls its output head so
        return ""
    return next((f"{name}." for name, module in model.named_modules() if module is decoder and name), "")


def linear_size(module: nn.Module) -> int:
    """Number of weights of a linear."""
    weight: Any = module.weight
    return int(weight.numel())


def discover(model: nn.Module, order_of_use: Callable[[str], Sequence[Sequence[Sequence[str]]]]) -> ModelAdapter:
    """Make an adapter for a model nobody declared.

    order_of_use: runs one forward pass and returns, for each kind of block in the list of the given name, the groups of
    linears that received the very same input, in the order they ran (blocks.py watches it). One that did not run as a
    linear (Mamba reads the weights of its dt_proj, Llama 4's router also chooses) stays in float.
    """
    blocks = find_block_list(model)
    groups = _merge(
        [[tuple(dict.fromkeys(map(_any_expert, group))) for group in kind] for kind in order_of_use(blocks)]
    )
    inside = [linears_in(block) for block in model.get_submodule(blocks).children()]
    routers = tuple(dict.fromkeys(name for present in inside for name in present if _is_router(name, present)))
    ran = {name for group in groups for name in group}
    unused = tuple(dict.fromkeys(name for present in inside for name in map(_any_expert, present) if name not in ran))
    kept = [group for each in groups if (group := tuple(name for name in each if name not in routers))]
    return ModelAdapter(
        name="generic",
        model_types=(),
        blocks=blocks,
        linear_groups=tuple(kept),
        keep_float=(*routers, *unused),
        notes=tuple(_assumed(model, blocks, kept, routers, unused)),
    )


def _assumed(
    model: nn.Module, blocks: str, groups: Sequence[Sequence[str]], routers: Sequence[str], unused: Sequence[str]
) -> Iterator[str]:
    """Say what the generic adapter took for what."""
    yield f"took {blocks!r} for the decoder blocks"
    yield f"saw {sum(map(len, groups))} linears with {len(groups)} distinct inputs"
    decoder = text_decoder(model)
    head = getattr(model, "get_output_embeddings", lambda: None)()
    named = [(name, module) for name, module in model.named_modules() if is_linear(module) and module is not head]
    beside = sum(linear_size(module) for name, module in named if not name.startswith(decoder))
    if beside:
        yield f"quantizes the language model, {decoder[:-1]!r}, only; {beside:,} weights of other parts stay in float"
    if routers:
        yield f"took {name_list(routers)} for routers, which stay in float"
    if unused:
        yield f"did not see {name_list(unused)} used as plain linears; they stay in float"
    parameters = [*model.get_submodule(blocks).named_parameters(blocks)]
    fused = {name: parameter.numel() for name, parameter in parameters if parameter.ndim > 2}
    if fused:
        yield f"leaves {sum(fused.values()):,} weights in float that are in no linear ({name_list(fused, 2)})"


def _merge(kinds: Sequence[Sequence[tuple[str, ...]]]) -> list[tuple[str, ...]]:
    """Make one list of groups that is right for every kind of block: names share a group where no kind shows otherwise."""
    merged: list[tuple[str, ...]] = []
    for group in (group for kind in kinds for group in kind):
        covered = {name for known in merged for name in known}
        merged.append(tuple(name for name in group if name not in covered))
    for kind in kinds:
        number = {name: index for index, group in enumerate(kind) for name in reversed(group)}
        split = [{number.get(name): None for name in group} for group in merged]
        merged = [
            tuple(name for name in group if number.get(name) == wanted)
            for group, inputs in zip(merged, split, strict=True)
            for wanted in inputs
        ]
    return merged


def _any_expert(name: str) -> str:
    """Put `*` for the number of an expert: mlp.experts.3.up_proj -> mlp.experts.*.up_proj."""
    return re.sub(r"(?<=experts\.)\d+(?=\.)", "*", name)


def _is_router(name: str, present: Sequence[str]) -> bool:
    """Whether a linear stands right beside experts, itself or in a module of its own: what routes to them or weighs a
    shared one.
    """
    if ".experts." in f".{name}":
        return False
    parent = name.rpartition(".")[0]
    alone = sum(other.startswith(f"{parent}.") for other in present) == 1
    homes = (parent, parent.rpartition(".")[0]) if alone and parent else (parent,)
    return any(other.startswith(f"{home}.experts.".lstrip(".")) for other in present for home in homes)
