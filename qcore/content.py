"""Quantized models as the neutral stream that formats read and write: from memory, and from a folder of any format."""

from __future__ import annotations

import tempfile
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from .checkpoint import ModelFolder, folder_config
from .errors import CheckpointError, ModelError, suggest
from .exporter import Content, Exporter, LayerSpec
from .journal import provenance, renamed
from .linear import QuantLinear
from .model import save_own_code
from .plugins import Plugins, installed
from .streaming import Names, match_keys
from .weight import QuantizedWeight


@dataclass
class Info:
    """What qcore knows of a model it made or loaded; kept as `model.qcore_info`."""

    report: dict[str, Any] = field(default_factory=dict)
    tokenizer: Any | None = None
    files: Mapping[str, Path] = field(default_factory=dict)
    config: Mapping[str, Any] | None = None  # config.json of the folder it came from
    dtypes: Mapping[str, torch.dtype] = field(default_factory=dict)  # what that folder stores each tensor as
    #: its tensors that the model does not know
    strangers: Mapping[str, Callable[[], Tensor]] = field(default_factory=dict)


def tell_model(model: nn.Module, info: Info) -> None:
    """Let a model that was quantized or loaded know it, and refuse transformers' own way to save it."""
    model.qcore_info = info  # type: ignore[assignment]
    if hasattr(model, "save_pretrained"):
        model.save_pretrained = _save_pretrained  # type: ignore[assignment]


def _save_pretrained(*_: Any, **__: Any) -> None:
    raise ModelError(
        "save_pretrained would leave the quantized weights out: use qcore.save(model, folder, format=...), or for an adapter the "
        "save_pretrained of peft's model."
    )


def info_of(
    model: nn.Module,
    tokenizer: Any,
    folder: ModelFolder | None,
    floats: Iterable[str] = (),
    report: dict[str, Any] | None = None,
) -> Info:
    """Return what to keep of a model and the folder it came from; floats: its tensors, if of no parameter to be saved as well."""
    if folder is None:
        return Info(report or {}, tokenizer)
    keys = match_keys(model, folder.tensors, partial=True)
    dtypes = {name: folder.tensors[key].dtype for name, key in keys.items()}
    known = {*keys.values(), *(getattr(model, "all_tied_weights_keys", None) or ())}
    strangers = {key: partial(folder.tensor, key) for key in floats if key not in known}
    return Info(report or {}, tokenizer, folder.carried_files(), folder.config, dtypes, strangers)


@contextmanager
def content_of(model: nn.Module, tokenizer: Any = None) -> Iterator[Content]:
    """A quantized model in memory as the neutral stream that formats write."""
    if not isinstance(model, nn.Module):
        raise ModelError(f"expected a model with quantized linears, got {model!r:.80}.")
    names = Names(model)
    linears = {
        names.layer_on_disk(name): (name, module)
        for name, module in model.named_modules()
        if isinstance(module, QuantLinear)
    }
    if not linears:
        raise ModelError(f"{type(model).__name__} has no quantized linears. Quantize it first: qcore.quantize(model).")
    info: Info = getattr(model, "qcore_info", None) or Info({})
    tied = set(getattr(model, "all_tied_weights_keys", None) or {})
    quantized = {name for name, _ in linears.values()}
    state = {
        names.on_disk(name): (name, tensor)
        for name, tensor in model.state_dict().items()
        if name not in tied and name.rpartition(".")[0] not in quantized
    }

    def weight(key: str) -> QuantizedWeight:
        name, module = linears[key]
        exact: QuantizedWeight = module.weight_source()
        stored = info.dtypes.get(f"{name}.bias")  # a CPU computes half types in float32; they are saved as they were
        return exact if exact.bias is None or stored is None else replace(exact, bias=exact.bias.to(stored))

    def tensor(key: str) -> Tensor:
        if key in info.strangers:
            return info.strangers[key]()
        name, value = state[key]
        assert isinstance(value, Tensor)
        return value.to(info.dtypes.get(name, value.dtype))

    description = {k: v for k, v in info.report.items() if k != "layers"}
    config = dict(info.config or model.config.to_dict())  # type: ignore[union-attr, operator]
    config.pop("quantization_config", None)
    config["architectures"] = config.get("architectures") or [type(model).__name__]
    with tempfile.TemporaryDirectory() as scratch:
        files = dict(info.files)
        tokenizer = tokenizer or (None if files else info.tokenizer)
        if tokenizer is not None:
            tokenizer.save_pretrained(scratch)
        if getattr(model, "_auto_class", None) and not any(name.endswith(".py") for name in files):
            config |= save_own_code(model, Path(scratch))
        if getattr(model, "generation_config", None) is not None and "generation_config.json" not in files:
            model.generation_config.save_pretrained(scratch)  # type: ignore[operator, union-attr]
        files |= {file.name: file for file in sorted(Path(scratch).iterdir()) if file.is_file()}
        yield Content(
            config=config,
            layers={
                key: LayerSpec(key, module.config, module.in_features, module.out_features, module.spec.act_order)
                for key, (_, module) in linears.items()
            },
            weight=weight,
            tensors=[*state, *info.strangers],
            tensor=tensor,
            provenance=provenance(*renamed(description, info.report.get("layers", []), names.layer_on_disk)),
            files=files,
        )


def open_content(folder: Path, plugins: Plugins | None = None) -> tuple[Exporter, Content]:
    """Find out a quantized folder's format and open it as a stream.

    Raises CheckpointError when it is not quantized, or no installed format reads it.
    """
    plugins = plugins or installed()
    config = folder_config(folder)
    exporters: dict[str, Exporter] = plugins.usable("format")
    for exporter in exporters.values():
        if exporter.detects(folder, config):
            return exporter, exporter.open(folder)
    quantization = config.get("quantization_config")
    if not quantization:
        raise CheckpointError(f"{folder} is not quantized; open it with transformers, or quantize it first.")
    method = quantization.get("quant_method") if isinstance(quantization, dict) else quantization
    raise CheckpointError(
        f"{folder} says quant_method {method!r}, which no installed format reads: {suggest(str(method), exporters)}"
    )


def plain_record(layer: LayerSpec) -> dict[str, Any]:
    shape = [layer.out_features, layer.in_features]
    return {
        "name": layer.name,
        "shape": shape,
        **layer.config.model_dump(),
        "act_order": layer.act_order,
        "error": None,
    }
