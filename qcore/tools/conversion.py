"""From one format to another without quantizing again: exact, or refused with the reasons, or lossy when asked for.

Everything streams: a layer is read, checked, written and forgotten. Exact means bit-identical codes, scales and zero points.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from .. import __version__, grid
from ..checkpoint import resolve_model
from ..config import QuantConfig
from ..content import open_content
from ..errors import CheckpointError, name_list
from ..exporter import Content, Exporter, LayerSpec
from ..files import check_output, complete_folder, local_path, write_manifest
from ..model import transposed_linears
from ..plugins import Plugins, installed
from ..saving import InexactError, in_shards
from ..weight import QuantizedWeight

GROUP_SIZES = (32, 64, 128, -1)  # what formats and kernels have in common


def convert(
    model: str | Path,
    output: str | Path,
    format: str,
    *,
    lossy: bool = False,
    manifest: bool = False,
    shard_bytes: int | str | None = None,
    revision: str | None = None,
    plugins: Plugins | None = None,
) -> Path:
    """Write a quantized folder or hub repository in another format; return the new folder.

    lossy: what the format cannot hold exactly is changed to the nearest it can, rounded again, or kept in float;
        `qcore.json` says which layers and by how much, under `converted`.
    manifest: write SHA256SUMS too. shard_bytes: the most a weight file holds (None: 5 GB).

    Raises CheckpointError naming the layers and why, when the format cannot hold them and `lossy` is not given.

    Example: `qcore.convert("model-gptq", "model-awq", "awq")`
    """
    plugins = plugins or installed()
    exporter = in_shards(plugins.get("format", format), shard_bytes)
    target = local_path(output, "output")
    check_output(target)
    source, content = open_content(resolve_model(str(model), plugins, revision), plugins)
    facts: dict[str, Any] = {"from": source.name, "model": str(model), "lossy": {}}
    content = replace(content, provenance={"qcore": __version__, **content.provenance, "converted": facts})
    refused = exporter.why_not_model(content.config)
    if refused:
        raise CheckpointError(f"format {format!r} cannot hold {model}: {refused}.")
    problems = unfit(exporter, content)
    if lossy:
        content = nearest(exporter, content, problems, facts["lossy"])
    elif problems:
        raise _refusal(exporter, problems)
    try:
        with complete_folder(target) as draft:
            exporter.save(content, draft)
            if manifest:
                write_manifest(draft)
    except InexactError:
        if lossy:
            raise
        inexact = {name: reason for name in content.layers if (reason := exporter.why_not_exact(content.weight(name)))}
        raise _refusal(exporter, inexact) from None
    return target


def unfit(exporter: Exporter, content: Content) -> dict[str, str]:
    """Linears that a format cannot hold by their shapes and grids, and why."""
    problems = {name: reason for name, layer in content.layers.items() if (reason := exporter.why_not(layer))}
    together = exporter.why_not_together([layer for name, layer in content.layers.items() if name not in problems])
    if together:
        usual = _usual(content.layers.values())
        problems |= {name: together for name, layer in content.layers.items() if layer.config != usual}
    return problems


def _refusal(exporter: Exporter, problems: Mapping[str, str]) -> CheckpointError:
    by_reason: dict[str, list[str]] = {}
    for name, reason in problems.items():
        by_reason.setdefault(reason, []).append(name)
    lines = [f"\n  {name_list(names, 4)}: {reason}" for reason, names in list(by_reason.items())[:8]]
    more = f"\n  and {len(by_reason) - 8} further reasons" if len(by_reason) > 8 else ""
    return CheckpointError(
        f"format {exporter.name!r} cannot hold {len(problems)} linears exactly:{''.join(lines)}{more}\n"
        "Choose another format, or allow the nearest it can hold with lossy=True (--lossy)."
    )


def nearest(exporter: Exporter, content: Content, unfit: Mapping[str, str], losses: dict[str, Any]) -> Content:
    """The stream of what a format can hold, as near as may be. `losses` is filled as weights go through: layer -> facts."""
    usual = _usual(layer for name, layer in content.layers.items() if name not in unfit)
    chosen = {name: _grid_for(exporter, content.layers[name], usual) for name in unfit}
    dense = [name for name, config in chosen.items() if config is None]
    conv = transposed_linears(content.config, dense) if dense else frozenset()

    def weight(name: str) -> QuantizedWeight:
        found = content.weight(name)
        config = chosen.get(name)
        if config is None and not exporter.why_not_exact(found):
            return found
        near = None if config else exporter.nearest(found)
        result = near or round_again(found, config or found.config)
        losses[name] = {"error": _distance(result, found), **result.config.model_dump()}
        return result

    def tensor(name: str) -> Tensor:
        layer, _, part = name.rpartition(".")
        if layer not in dense:
            return content.tensor(name)
        found = content.weight(layer)
        losses[layer] = {"error": 0.0, "kept": "float"}
        if part == "bias":
            assert found.bias is not None
            return found.bias
        whole = found.dequantize(found.scales.dtype)
        return whole.t().contiguous() if layer in conv else whole

    layers = {
        name: replace(layer, config=chosen[name] or layer.config, act_order=False) if name in chosen else layer
        for name, layer in content.layers.items()
        if name not in dense
    }
    floats = [f"{name}.weight" for name in dense]
    floats += [f"{name}.bias" for name in dense if content.weight(name).bias is not None]
    records = [record for record in content.provenance.get("layers", []) if record["name"] not in chosen]
    provenance = {**content.provenance, "layers": records} if "layers" in content.provenance else content.provenance
    return replace(
        content, layers=layers, weight=weight, tensors=[*content.tensors, *floats], tensor=tensor, provenance=provenance
    )


def _usual(layers: Any) -> QuantConfig | None:
    """The most frequent grid."""
    counts = Counter(layer.config for layer in layers)
    return counts.most_common(1)[0][0] if counts else None


def _grid_for(exporter: Exporter, layer: LayerSpec, usual: QuantConfig | None) -> QuantConfig | None:
    """The grid nearest to a layer's own that a format can hold beside the others, or None."""
    own = layer.config
    sizes = sorted({own.group_size, *GROUP_SIZES}, key=lambda size: (size != own.group_size, size == -1, size))
    widths = [*range(own.bits, 9), *range(own.bits - 1, 1, -1)]
    tried = [
        QuantConfig(bits=bits, group_size=size, sym=sym)
        for bits in widths
        for size in sizes
        for sym in (own.sym, not own.sym)
    ]
    for config in tried:
        spec = replace(layer, config=config, act_order=False)
        others = [] if usual is None else [replace(layer, name="", config=usual, act_order=False)]
        if exporter.why_not(spec) is None and exporter.why_not_together([spec, *others]) is None:
            return config
    return None


def round_again(weight: QuantizedWeight, config: QuantConfig) -> QuantizedWeight:
    """Round what a weight stands for onto another grid, in order of its columns."""
    W = weight.dequantize()  # [out, in]
    out, columns = W.shape
    size = columns if config.group_size == -1 else config.group_size
    codes = torch.empty_like(W, dtype=torch.uint8)
    groups = grid.num_groups(columns, config.group_size)
    scales, zeros = torch.empty(out, groups), torch.empty(out, groups)
    for group, start in enumerate(range(0, columns, size)):
        part = W[:, start : start + size]
        scale, zero = grid.search_grid(part, config.bits, config.sym)
        codes[:, start : start + size] = grid.quantize(part, scale[:, None], zero[:, None], config.bits).byte()
        scales[:, group], zeros[:, group] = scale, zero
    g_idx = grid.group_index(columns, config.group_size)
    return QuantizedWeight(codes, scales.half(), zeros.to(torch.int32), g_idx, config, weight.bias)


def _distance(result: QuantizedWeight, original: QuantizedWeight) -> float:
    """Relative error, in the Frobenius norm."""
    W = original.dequantize()
    return float((result.dequantize() - W).norm() / W.norm().clamp(min=1e-30))
