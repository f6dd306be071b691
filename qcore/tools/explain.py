"""What a run would do with a model, told before it starts: blocks, groups of linears, what stays in float, what it takes."""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import nn

from .. import grid
from ..adapter import ModelAdapter, is_linear
from ..algorithm import Algorithm
from ..api import DEFAULT_ALGORITHM, _algorithm, open_unquantized, pick_device
from ..checkpoint import ModelFolder, ShardWriter
from ..config import LEAST_MEMORY, Override, QuantConfig, RunSizes, parse_bytes
from ..discovery import _any_expert
from ..experts import Experts
from ..exporter import Exporter
from ..files import check_output, local_path
from ..model import longest, stored_dtype
from ..plan import Job, check_format, shape_of
from ..plugins import Plugins, installed
from ..ranks import Ranks
from ..saving import FolderExporter
from ..streaming import FolderWeights, Names, get_tensor
from ..weight import QuantizedWeight
from .probe import probe as try_out


def explain(
    model: str | Path,
    algo: str | Algorithm = DEFAULT_ALGORITHM,
    *,
    bits: int = 4,
    group_size: int = 128,
    sym: bool = True,
    overrides: Sequence[Override | str | Mapping[str, Any]] = (),
    samples: int = 128,
    seqlen: int = 2048,
    batch_size: int | None = None,
    max_memory: int | str | None = None,
    seed: int = 0,
    adapter: str | ModelAdapter | None = None,
    device: str | torch.device = "auto",
    output: str | Path | None = None,
    format: str | None = None,
    probe: bool = False,
    trust_remote_code: bool = False,
    plugins: Plugins | None = None,
    **params: Any,
) -> dict[str, Any]:
    """Return what `quantize` would do with a float model; no weights are read, but for a block or two by the generic adapter.

    {"model_type", "adapter", "assumed", "algorithm", "blocks": how many, "kinds": [{"blocks": indices, "groups": …}], "grids":
    [{"grid", "linears", "weights"}], "quantized", "float": [{"what", "weights", "why"}], "size", "size_quantized", "memory",
    "seconds_forward"}, the last two being the least it takes.

    format: adds "disk": {"output", "exact", "journal"}, bytes of the weight files and of the finished blocks kept until then.
    probe: try one block of each kind (see probe.py), which adds "seconds", "parts", "gpu_memory", "host_memory", "batches".

    Raises what `quantize` would raise for the model.
    """
    started = time.perf_counter()
    plugins, place = plugins or installed(), pick_device(device)
    config = QuantConfig.parse({"bits": bits, "group_size": group_size, "sym": sym}, "explain")
    sizes = RunSizes.parse({"samples": samples, "seqlen": seqlen, "batch_size": batch_size, "seed": seed}, "explain")
    samples, seqlen, batch_size, seed = sizes.samples, sizes.seqlen, sizes.batch_size, sizes.seed
    algorithm = _algorithm(plugins, algo, params)
    target = None if output is None else local_path(output, "output")
    if target is not None:
        check_output(target)
    network, folder = open_unquantized(str(model), True, place, trust_remote_code, None, plugins)
    assert folder is not None
    seqlen = min(seqlen, longest(network) or seqlen)
    job = Job(
        network, FolderWeights(network, folder), folder, str(model), algorithm, config, plugins, overrides=overrides,
        tokens=samples * seqlen, seqlen=seqlen, batch_size=batch_size, limit=parse_bytes(max_memory, "max_memory", LEAST_MEMORY), seed=seed, device=place,
        adapter=adapter, ranks=Ranks.alone(),
    )  # fmt: skip
    plan = _static(job, folder, samples * seqlen)
    if format is not None:
        exporter: Exporter = plugins.get("format", format)
        check_format(job, exporter)
        plan["disk"] = _disk(job, folder, exporter)
        if probe:
            opened = time.perf_counter() - started
            scratch = None if target is None else target.resolve().parent
            tried = try_out(job, folder, exporter, samples, seqlen, scratch if scratch and scratch.is_dir() else None)
            plan |= {**tried, "seconds": opened + tried["seconds"], "parts": {"open": opened, **tried["parts"]}}
    return plan


def _static(job: Job, folder: ModelFolder, tokens: int) -> dict[str, Any]:
    """What the config and the headers of the files tell."""
    network, linears = job.model, job.linears
    shapes = {name: shape_of(network.get_submodule(name)) for name in linears}
    quantized = sum(out * columns for name, (out, columns) in shapes.items() if linears[name] is not None)
    total = sum(parameter.numel() for parameter in network.parameters())
    code_bytes = sum(_quantized_bytes(*shapes[name], each) for name, each in linears.items() if each is not None)
    grids: dict[str, dict[str, Any]] = {}
    for name, each in linears.items():
        if each is not None:
            entry = grids.setdefault(str(each), {"grid": str(each), "linears": 0, "weights": 0})
            entry["linears"] += 1
            entry["weights"] += shapes[name][0] * shapes[name][1]
    return {
        "model_type": str(network.config.model_type),  # type: ignore[union-attr]
        "adapter": job.adapter.name,
        "assumed": list(job.adapter.notes),
        "algorithm": job.algorithm.name,
        "blocks": len(job.blocks),
        "kinds": _kinds(network, job.adapter),
        "grids": list(grids.values()),
        "quantized": quantized,
        "float": _kept_float(network, job.adapter, linears),
        "size": folder.size(),
        "size_quantized": code_bytes + (total - quantized) * stored_dtype(folder).itemsize,
        **_cost(network, job.adapter, tokens, job.device, job.dtype),
    }


def _disk(job: Job, folder: ModelFolder, exporter: Exporter) -> dict[str, Any]:
    """Bytes of the weight files, and of the journal that is there until they are."""
    assert isinstance(job.weights, FolderWeights)
    names = Names(job.model)
    kinds = {name: _kind(job, name, config) for name, config in job.linears.items() if config is not None}
    floats = {names.on_disk(n): _bytes_of(job, n) for n in job.weights.keys if n.rpartition(".")[0] not in kinds}
    for stray in set(folder.tensors) - set(job.weights.keys.values()):
        floats[stray] = folder.tensors[stray].nbytes
    blanks = {kind: _blank(*kind) for kind in dict.fromkeys(kinds.values())}
    kept = {kind: _sizes(blank.to_tensors()) for kind, blank in blanks.items()}
    journal = sum(sum(kept[kind].values()) for kind in kinds.values())
    if not isinstance(exporter, FolderExporter):
        codes = sum(_quantized_bytes(*kind[:2], kind[2]) for kind in kinds.values())
        return {"output": codes + sum(floats.values()), "exact": False, "journal": journal}
    encoded = {kind: _sizes(exporter.encode("", blank)) for kind, blank in blanks.items()}
    biases = {kind: _sizes({"bias": blank.bias} if blank.bias is not None else {}) for kind, blank in blanks.items()}
    sizes = [size for kind in kinds.values() for size in (*encoded[kind].values(), *biases[kind].values())]
    expected = [*(f"{names.layer_on_disk(name)}.{n}" for name in kinds for n in range(6)), *floats]
    return {
        "output": _shard_bytes(exporter, expected, [*sizes, *floats.values()]),
        "exact": type(exporter).save is FolderExporter.save,  # others choose by the values how they write
        "journal": journal,
    }


_Kind = tuple[int, int, QuantConfig, torch.dtype | None]


def _kind(job: Job, name: str, config: QuantConfig) -> _Kind:
    """What decides the size of a linear: [out, in], its grid, and the dtype of its bias or None."""
    linear = job.model.get_submodule(name)
    bias = None if getattr(linear, "bias", None) is None else job.weights.dtype_of(f"{name}.bias")
    return *shape_of(linear), config, bias


def _blank(out: int, columns: int, config: QuantConfig, bias: torch.dtype | None) -> QuantizedWeight:
    """A weight of a kind, all zero."""
    groups = grid.num_groups(columns, config.group_size)
    codes, scales = torch.zeros(out, columns, dtype=torch.uint8), torch.ones(out, groups, dtype=torch.float16)
    zeros = torch.full((out, groups), grid.symmetric_zero(config.bits), dtype=torch.int32)
    g_idx = grid.group_index(columns, config.group_size)
    return QuantizedWeight(codes, scales, zeros, g_idx, config, None if bias is None else torch.zeros(out, dtype=bias))


def _sizes(tensors: Mapping[str, torch.Tensor]) -> dict[str, int]:
    return {name: tensor.nbytes for name, tensor in tensors.items()}


def _bytes_of(job: Job, name: str) -> int:
    return get_tensor(job.model, name).numel() * job.weights.dtype_of(name).itemsize


def _shard_bytes(exporter: FolderExporter, expected: Sequence[str], sizes: Sequence[int]) -> int:
    """Bytes of the shards that tensors of these sizes fill one after another, with their headers."""
    shards, filled = 1, 0
    for size in sizes:
        if filled and filled + size > exporter.shard_bytes:
            shards, filled = shards + 1, 0
        filled += size
    return sum(sizes) + shards * (8 + ShardWriter(Path(), expected).room)


def _quantized_bytes(out: int, columns: int, config: QuantConfig) -> int:
    """Codes, and per group a scale of 16 bits and a zero point."""
    return out * (columns * config.bits + grid.num_groups(columns, config.group_size) * (16 + config.bits)) // 8


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
