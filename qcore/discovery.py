"""The generic adapter: where a model that nobody declared keeps its blocks, and what they do, found out by watching them run."""

from __future__ import annotations

import contextlib
import re
from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from .adapter import ModelAdapter, is_linear, linears_in
from .capture import capture_inputs, first_output, own, watching
from .errors import ModelError, name_list
from .experts import Experts
from .linear import weight_of
from .model import compute_dtype, model_dtype, vocabulary
from .plugins import Plugins
from .streaming import Weights


def find_adapter(
    model: nn.Module,
    weights: Weights,
    plugins: Plugins,
    device: torch.device,
    wanted: str | ModelAdapter | None = None,
) -> ModelAdapter:
    """Return the adapter given, the one by name, the one declared for the model's type, or one made by looking (the generic adapter)."""
    if isinstance(wanted, ModelAdapter):
        return wanted
    if wanted == "generic":
        return discover_adapter(model, weights, device)
    if wanted is not None:
        chosen: ModelAdapter = plugins.get("model", wanted)
        return chosen
    declared: ModelAdapter | None = plugins.adapter_for(str(getattr(model.config, "model_type", "")))
    return declared or discover_adapter(model, weights, device)


def discover_adapter(model: nn.Module, weights: Weights, device: torch.device) -> ModelAdapter:
    """Make an adapter for a model nobody declared.

    A linear that did not run as one (Mamba reads the weights of its dt_proj, Llama 4's router also chooses) stays in float.
    """
    blocks = find_block_list(model)
    kinds = watch_kinds(model, blocks, weights, device)
    groups = _merge([[tuple(dict.fromkeys(map(_any_expert, group))) for group in kind] for kind in kinds])
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


def watch_kinds(
    model: nn.Module, blocks_name: str, weights: Weights, device: torch.device
) -> list[list[tuple[str, ...]]]:
    """Watch one short forward pass through every kind of block; return for each its groups, see `order_of_use`."""
    dtype = compute_dtype(model_dtype(model), device)
    blocks = list(model.get_submodule(blocks_name).children())
    ids = torch.arange(8).reshape(1, 8) % vocabulary(model)
    place = ModelAdapter("generic", (), blocks_name, ())
    captured = capture_inputs(model, weights, place, [(ids, None)], device, dtype)
    kinds: dict[tuple[str, ...], list[tuple[str, ...]]] = {}
    for index, block in enumerate(blocks):
        kind = tuple(name for name, _ in block.named_modules())
        if kind in kinds:
            continue
        name = f"{blocks_name}.{index}"
        weights.bring(name, device, dtype)
        kwargs = own(captured.kwargs[index][0], device)
        check_causal(block, captured.stream.hidden[0].to(device), kwargs, type(model).__name__)
        with all_experts(block):
            kinds[kind] = order_of_use(block, captured.stream.hidden[0].to(device), kwargs)
        weights.let_go(name)
    return list(kinds.values())


def find_block_list(model: nn.Module) -> str:
    """Return the dotted name of the model's decoder blocks: the ModuleList with the most weights in linears.

    All of its modules must hold linears. A model of several towers (vision, text) is searched in its text decoder.

    Raises ModelError, saying what was looked for.
    """
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
    decoder = getattr(model, "get_decoder", lambda: None)()
    if isinstance(decoder, nn.Linear):  # ModernBERT calls its output head so
        return ""
    return next((f"{name}." for name, module in model.named_modules() if module is decoder and name), "")


def linear_size(module: nn.Module) -> int:
    """Number of weights of a linear."""
    weight: Any = module.weight
    return int(weight.numel())


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


def order_of_use(module: nn.Module, hidden: Tensor, kwargs: dict[str, Any]) -> list[tuple[str, ...]]:
    """Run one block and return the groups of its linears that got the very same input tensor, in the order they ran.

    Linears that did not run, as linears, are left out.
    """
    groups: dict[int, list[str]] = {}
    for name, number in inputs_of(module, hidden, kwargs).items():
        groups.setdefault(number, []).append(name)
    return [tuple(names) for names in groups.values()]


@torch.no_grad()
def inputs_of(module: nn.Module, hidden: Tensor, kwargs: dict[str, Any]) -> dict[str, int]:
    """Run one block and number the inputs of its linears, which stand in the order they ran; equal numbers: one tensor.

    A linear that computes more or less than its product (a router that also chooses) counts as not run.
    """
    inputs: list[tuple[Tensor, int]] = []
    numbers: dict[str, int] = {}
    linears = {name: linear for name, linear in module.named_modules() if is_linear(linear)}

    def note(name: str, args: tuple[Any, ...], output: Any) -> None:
        x = args[0]
        if not _is_product(linears[name], x, output):
            return
        for number, (known, version) in enumerate(inputs):
            same = known.data_ptr() == x.data_ptr() and known.numel() == x.numel() and version == x._version
            if same and known.shape[-1] == x.shape[-1]:
                numbers.setdefault(name, number)
                return
        inputs.append((x, x._version))  # holding x keeps its memory from being reused under another input
        numbers.setdefault(name, len(inputs) - 1)

    with watching(linears, note, after=True):
        module(hidden, **kwargs)
    return numbers


def _is_product(linear: Any, x: Tensor, output: Any) -> bool:
    expected = nn.functional.linear(x, weight_of(linear), linear.bias)
    same_shape = isinstance(output, Tensor) and output.shape == expected.shape
    return same_shape and float((output - expected).float().norm()) <= 1e-2 * float(expected.float().norm())


@torch.no_grad()
def check_causal(module: nn.Module, hidden: Tensor, kwargs: dict[str, Any], model: str) -> None:
    """Raise ModelError when what a block makes of the first tokens depends on the last one. hidden: one sequence."""

    def by_token(x: Tensor) -> Tensor:  # from [1, length, …], [length, 1, …] or [length, hidden]
        return x.flatten(0, 1) if x.ndim > 2 else x

    changed = hidden.clone()
    by_token(changed)[-1].neg_()
    first, second = (first_output(module(x, **kwargs)) for x in (hidden.clone(), changed))
    earlier = [by_token(x)[:-1].float() for x in (first, second)]
    if float((earlier[0] - earlier[1]).norm()) > 1e-2 * float(earlier[0].norm()):
        raise ModelError(
            f"{model} is no causal language model: in its block {type(module).__name__} earlier tokens see later ones. "
            "qcore quantizes causal ones; if this is a decoder run as an encoder, look for is_decoder in its config."
        )


@contextlib.contextmanager
def all_experts(module: nn.Module) -> Iterator[None]:
    """Within it every expert runs, on every token."""
    found = [experts for experts in module.modules() if isinstance(experts, Experts)]
    for experts in found:
        experts.widened.update(range(len(experts)))
    try:
        yield
    finally:
        for experts in found:
            experts.widened.clear()
