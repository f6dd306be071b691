"""What a run would do with a model, told before it starts: blocks, groups of linears, what stays in float, what it takes."""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import nn

from ..adapter import ModelAdapter, _any_expert, is_linear
from ..api import pick_device
from ..checkpoint import ModelFolder, resolve_model
from ..config import Override, QuantConfig
from ..experts import Experts
from ..model import FolderWeights, compute_dtype, skeleton, stored_dtype
from ..plugins import Plugins, installed
from ..run import check_model, find_adapter, plan_linears, shape_of


def explain(
    model: str | Path,
    *,
    bits: int = 4,
    group_size: int = 128,
    overrides: Sequence[Override | str | Mapping[str, Any]] = (),
    samples: int = 128,
    seqlen: int = 2048,
    adapter: str | None = None,
    device: str | torch.device = "auto",
    trust_remote_code: bool = False,
    plugins: Plugins | None = None,
) -> dict[str, Any]:
    """Return what `quantize` would do with a float model; no weights are read, but for a block or two by the generic adapter.

    {"model_type", "adapter", "assumed", "blocks": how many, "kinds": [{"blocks": indices, "groups": …}], "quantized",
    "float": [{"what", "weights", "why"}], "size", "size_quantized", "memory", "seconds_forward"}

    Raises what `quantize` would raise for the model.
    """
    plugins, place = plugins or installed(), pick_device(device)
    folder = ModelFolder(resolve_model(str(model), plugins))
    if folder.config.get("quantization_config"):
        check_model(nn.Module(), folder)
    config = QuantConfig.parse({"bits": bits, "group_size": group_size}, "explain")
    network = skeleton(folder, trust_remote_code)
    check_model(network, folder)
    chosen = find_adapter(network, FolderWeights(network, folder), plugins, place, adapter)
    linears = plan_linears(network, chosen, config, [Override.of(each) for each in overrides])
    shapes = {name: shape_of(network.get_submodule(name)) for name in linears}
    quantized = sum(out * columns for name, (out, columns) in shapes.items() if linears[name] is not None)
    dtype = compute_dtype(stored_dtype(folder), place)
    total = sum(parameter.numel() for parameter in network.parameters())
    code_bytes = sum(_quantized_bytes(*shapes[name], each) for name, each in linears.items() if each is not None)
    return {
        "model_type": str(network.config.model_type),  # type: ignore[union-attr]
        "adapter": chosen.name,
        "assumed": list(chosen.notes),
        "blocks": len(chosen.find_blocks(network)),
        "kinds": _kinds(network, chosen),
        "quantized": quantized,
        "float": _kept_float(network, chosen, linears),
        "size": folder.size(),
        "size_quantized": code_bytes + (total - quantized) * stored_dtype(folder).itemsize,
        **_cost(network, chosen, samples * seqlen, place, dtype),
    }


def _quantized_bytes(out: int, columns: int, config: QuantConfig) -> int:
    """Codes, and per group a scale of 16 bits and a zero point."""
    groups = 1 if config.group_size == -1 else -(-columns // config.group_size)
    return out * (columns * config.bits + groups * (16 + config.bits)) // 8


def _kinds(model: nn.Module, adapter: ModelAdapter) -> list[dict[str, Any]]:
    """Blocks with the same groups of the same shapes, in one entry; experts alike are shown once, with their number."""
    kinds: dict[str, dict[str, Any]] = {}
    for index, (_, block) in enumerate(adapter.find_blocks(model)):
        groups = []
        for stage in adapter.stages_in(block):
            names = stage[0] if len(stage) == 1 else [_any_expert(name) for name in stage[0]]
            shapes = [list(shape_of(block.get_submodule(name))) for name in stage[0]]
            members = [{"linear": name, "shape": shape} for name, shape in zip(names, shapes, strict=True)]
            groups.append({"linears": members, "times": len(stage)})
        kinds.setdefault(repr(groups), {"blocks": [], "groups": groups})["blocks"].append(index)
    return list(kinds.values())


def _kept_float(
    model: nn.Module, adapter: ModelAdapter, linears: dict[str, QuantConfig | None]
) -> list[dict[str, Any]]:
    """What is not quantized, by reason."""
    reasons: dict[str, list[tuple[str, int]]] = {}
    for name, parameter in model.named_parameters():
        owner, _, part = name.rpartition(".")
        if linears.get(owner) is None or part != "weight":
            why = _why_float(model, adapter, linears, owner, part)
            reasons.setdefault(why, []).append((name, parameter.numel()))
    return [
        {"why": why, "tensors": len(found), "weights": sum(size for _, size in found), "example": found[0][0]}
        for why, found in reasons.items()
    ]


def _why_float(
    model: nn.Module, adapter: ModelAdapter, linears: dict[str, QuantConfig | None], owner: str, part: str
) -> str:
    """Why a parameter, called `part` in the module `owner`, stays in float."""
    block, found, inside = owner.partition(f"{adapter.blocks}.")
    short, module = inside.partition(".")[2], model.get_submodule(owner)
    if block or not found:
        return "outside the decoder blocks (embeddings, output head, other towers)"
    if owner in linears:
        return "biases" if part == "bias" else "skipped by an override"
    if isinstance(getattr(model.get_submodule(owner.rpartition(".")[0]), "experts", None), Experts):
        return "routers: few weights that decide much"
    if is_linear(module):
        return "linears that the adapter keeps in float" if adapter.keeps_float(short) else "linears in no group"
    if isinstance(module, (nn.Conv1d, nn.Conv2d)):
        return "convolutions"
    fused = getattr(module, part).ndim > 2
    return "fused in a way that is not known here" if fused else "norms and other small parameters"


def _cost(
    model: nn.Module, adapter: ModelAdapter, tokens: int, device: torch.device, dtype: torch.dtype
) -> dict[str, Any]:
    """The least memory and time of a streamed run: the largest block and the hidden states, twice; one forward pass of the
    linears at this machine's speed, each token with the experts it takes. What the algorithm does comes on top.
    """
    width = int(getattr(model.config, "hidden_size", 0) or 0)
    largest, work = 0, 0.0
    for _, block in adapter.find_blocks(model):
        largest = max(largest, sum(parameter.numel() for parameter in block.parameters()))
        active = sum(_active(model, block, stage) for stage in adapter.stages_in(block))
        work += 2.0 * active * tokens
    return {
        "memory": largest * dtype.itemsize + 2 * tokens * width * dtype.itemsize,
        "seconds_forward": work / _speed(device, dtype),
    }


def _active(model: nn.Module, block: nn.Module, stage: Sequence[Sequence[str]]) -> float:
    """Weights of a stage that a token meets."""
    sizes = [
        sum(out * columns for out, columns in (shape_of(block.get_submodule(n)) for n in group)) for group in stage
    ]
    chosen = int(getattr(model.config, "num_experts_per_tok", 0) or len(stage)) if len(stage) > 1 else 1
    return sum(sizes) / len(sizes) * min(chosen, len(sizes))


def _speed(device: torch.device, dtype: torch.dtype) -> float:
    """Multiply-adds times two per second of a matrix product here."""
    a, b = torch.ones(256, 1024, device=device, dtype=dtype), torch.ones(1024, 1024, device=device, dtype=dtype)
    best = float("inf")
    for _ in range(4):
        started = time.perf_counter()
        float((a @ b)[0, 0])  # reading a number waits for the device
        best = min(best, time.perf_counter() - started)
    return 2.0 * 256 * 1024 * 1024 / best
