"""What a block does, found out by watching it run: the generic adapter's eyes."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn

from .adapter import ModelAdapter, discover, is_linear
from .capture import capture_inputs, first_output, own, watching
from .errors import ModelError
from .experts import Experts
from .linear import weight_of
from .model import Weights, compute_dtype, model_dtype, vocabulary
from .plugins import Plugins


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
    """Watch one short forward pass through every kind of block the model has."""
    dtype = compute_dtype(model_dtype(model), device)

    def look(blocks_name: str) -> list[list[tuple[str, ...]]]:
        blocks = list(model.get_submodule(blocks_name).children())
        ids = torch.arange(8).reshape(1, 8) % vocabulary(model)
        captured = capture_inputs(model, weights, blocks_name, (), blocks, [(ids, None)], device, dtype)
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

    return discover(model, look)


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
