"""Will it load there? A quantized folder, or a plan before anything is quantized, judged by a target's rules."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from ..api import DEFAULT_FORMAT
from ..checkpoint import ModelFolder, folder_config, resolve_model
from ..config import Override, QuantConfig
from ..content import open_content
from ..discovery import find_adapter
from ..errors import ConfigError, suggest
from ..exporter import LayerSpec, refusals
from ..model import skeleton
from ..plan import plan_linears, specs_of
from ..plugins import Plugins, installed
from ..streaming import FolderWeights
from ..target import Finding, Subject, Target


def check(
    model: str | Path,
    target: str,
    *,
    format: str | None = None,
    bits: int = 4,
    group_size: int = 128,
    sym: bool = True,
    act_order: bool = False,
    overrides: Sequence[Override | str | Mapping[str, Any]] = (),
    plugins: Plugins | None = None,
    **options: Any,
) -> list[Finding]:
    """Ask a target whether it loads a quantized folder, or would load what a plan for a float model gives.

    model: a quantized folder; or a float one, with the plan's format, grid and overrides as for `qcore.quantize`, act_order for
    desc_act without static groups. options: the target's own (`tensor_parallel=2`).

    Returns findings: those of level "refuses" say that it will not load, and by which rule.

    Example: `qcore.check("model-gptq", "vllm", tensor_parallel=2)`
    """
    plugins = plugins or installed()
    chosen: Target = plugins.get("target", target)
    for name in options:
        if name not in chosen.options:
            raise ConfigError(f"target {target!r} has no option {name!r}. {suggest(name, chosen.options)}")
    folder = resolve_model(str(model), plugins)
    config = folder_config(folder)
    if config.get("quantization_config"):
        exporter, content = open_content(folder, plugins)
        subject = Subject(exporter.name, config, content.layers, weight=content.weight)
    else:
        grid = QuantConfig.parse({"bits": bits, "group_size": group_size, "sym": sym}, "check")
        layers = planned(ModelFolder(folder), grid, overrides, act_order, plugins)
        exporter = plugins.get("format", format or DEFAULT_FORMAT)
        subject = Subject(exporter.name, config, layers)
        refused = [
            Finding("refuses", "format", f"format {exporter.name!r}: {reason}", (layer.name,) if layer else ())
            for layer, reason in refusals(exporter, layers, config)
        ]
        if refused:
            return refused
    return chosen.check(replace(subject, options={**chosen.options, **options}))


def planned(
    folder: ModelFolder, grid: QuantConfig, overrides: Sequence[Any], act_order: bool, plugins: Plugins
) -> dict[str, LayerSpec]:
    """The linears that quantizing a float folder would give, by their shapes alone."""
    network = skeleton(folder)
    adapter = find_adapter(network, FolderWeights(network, folder), plugins, torch.device("cpu"))
    return specs_of(network, plan_linears(network, adapter, grid, overrides), act_order)
