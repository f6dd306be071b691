"""The plan of a run: what happens to each linear of a model, checked before any work is done."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import nn

from .adapter import ModelAdapter
from .algorithm import Algorithm
from .calibration import Calibration
from .checkpoint import ModelFolder
from .config import Override, QuantConfig, resolve
from .discovery import find_adapter, find_block_list
from .errors import ConfigError, ModelError
from .exporter import Exporter, LayerSpec, refusals
from .linear import QuantLinear
from .memory import plan_room
from .model import compute_dtype, model_dtype, refuse_encoder_decoder, stored_dtype
from .plugins import Plugins
from .ranks import Ranks
from .streaming import Weights


def nobody(hook: str, **facts: Any) -> None:
    """In the place of the plugins on processes other than the first: one run has one course of events."""


class Job:
    """Everything a run needs, checked: what happens to each linear of a model, on which device, with how much memory.

    tokens: how many the calibration will have, which is set afterwards. limit: bytes of the device's memory to use, or None.
    """

    def __init__(
        self,
        model: nn.Module,
        weights: Weights,
        folder: ModelFolder | None,
        label: str,
        algorithm: Algorithm,
        config: QuantConfig,
        plugins: Plugins,
        *,
        overrides: Sequence[Override | str | Mapping[str, Any]],
        tokens: int,
        seqlen: int,
        batch_size: int | None,
        limit: int | None,
        seed: int,
        device: torch.device,
        adapter: str | ModelAdapter | None,
        ranks: Ranks,
    ) -> None:
        self.model, self.weights, self.label = model, weights, label  # label: the model, as the user called it
        if isinstance(overrides, (str, Mapping)) or not isinstance(overrides, Iterable):
            raise ConfigError(f"overrides={overrides!r}: expected a list of them.")
        self.algorithm, self.config, self.seed, self.device, self.ranks = algorithm, config, seed, device, ranks
        self.calibration: Calibration | None = None
        self.adapter = find_adapter(model, weights, plugins, device, adapter)
        self.blocks = self.adapter.find_blocks(model)
        #: by full name, in model order; None stays in float
        self.linears = plan_linears(model, self.adapter, config, overrides)
        self.dtype = compute_dtype(stored_dtype(folder) if folder else model_dtype(model), device)  # of the computation
        kept, widths = tokens * (1 + algorithm.float_stream), _widths(model, self.linears)
        room = ranks.first(lambda: plan_room(device, limit, kept, seqlen, *widths, self.dtype.itemsize))

        def batch_of(processes: int) -> int:
            algorithm.processes = processes
            return batch_size or algorithm.batch_size or room.batch_size

        #: sequences per forward pass if it were one process: a journal is any number's
        self.batch_size_alone = batch_of(1)
        self.room = replace(room, batch_size=batch_of(1 if ranks.deterministic else ranks.size))
        #: tells plugins of the run, by a hook's name and facts
        self.tell: Callable[..., object] = plugins.call if ranks.rank == 0 else nobody

    @property
    def batch_size(self) -> int:
        """Sequences per forward pass."""
        return self.room.batch_size

    def specs(self) -> dict[str, LayerSpec]:
        """What a format is asked about before any work is done."""
        return specs_of(self.model, self.linears)

    def describe(self) -> dict[str, Any]:
        """The settled facts of the run, as they stand in reports and in the output's provenance."""
        return {
            "model": self.label,
            "model_type": str(getattr(getattr(self.model, "config", None), "model_type", "")),
            "adapter": self.adapter.name,
            "assumed": list(self.adapter.notes),
            "algorithm": self.algorithm.name,
            "params": self.algorithm.params.model_dump(mode="json"),
            "facts": self.algorithm.facts(self.device),
            "config": self.config.model_dump(),
            "seed": self.seed,
            "calibration": self.calibration.report if self.calibration else None,
            "skipped": [name for name, config in self.linears.items() if config is None],
        }


def _widths(model: nn.Module, linears: Iterable[str]) -> tuple[int, int]:
    """The width of hidden states and that of the widest linear's output."""
    widest = max((shape_of(model.get_submodule(name))[0] for name in linears), default=0)
    hidden = getattr(model.config, "hidden_size", None)
    return (hidden if isinstance(hidden, int) else widest), widest


def shape_of(linear: nn.Module) -> tuple[int, int]:
    """[out, in] of a linear that may be on the meta device."""
    weight = linear.weight
    assert isinstance(weight, torch.Tensor)
    rows, columns = weight.shape
    return (rows, columns) if isinstance(linear, nn.Linear) else (columns, rows)


def specs_of(
    model: nn.Module, linears: Mapping[str, QuantConfig | None], act_order: bool = False
) -> dict[str, LayerSpec]:
    """Return the specs of the linears that a plan quantizes."""
    specs = {}
    for name, config in linears.items():
        if config is not None:
            out, columns = shape_of(model.get_submodule(name))
            specs[name] = LayerSpec(name, config, columns, out, act_order)
    return specs


def plan_linears(
    model: nn.Module,
    adapter: ModelAdapter,
    config: QuantConfig,
    overrides: Sequence[Override | str | Mapping[str, Any]],
) -> dict[str, QuantConfig | None]:
    """Give each linear of each block its config, in order of use."""
    names = [
        f"{block_name}.{short}"
        for block_name, block in adapter.find_blocks(model)
        for group in adapter.groups_in(block)
        for short in group
    ]
    return resolve(names, config, [Override.of(each) for each in overrides])


def check_model(model: nn.Module, folder: ModelFolder | None) -> None:
    """Refuse a model that is quantized already."""
    quantization = getattr(getattr(model, "config", None), "quantization_config", None)
    quantization = quantization or (folder.config.get("quantization_config") if folder else None)
    if quantization:
        method = quantization.get("quant_method") if isinstance(quantization, dict) else type(quantization).__name__
        raise ModelError(f"the model is quantized already ({method}). Start from the float model.")
    if any(isinstance(module, QuantLinear) for module in model.modules()):
        raise ModelError("the model is quantized already (it has QuantLinears). Start from the float model.")
    refuse_encoder_decoder(getattr(model, "config", None), type(model).__name__)
    find_block_list(model)


def check_format(job: Job, exporter: Exporter) -> None:
    """Refuse, before any work, what the wanted format cannot hold."""
    specs = job.specs()
    if not specs:
        raise ConfigError("overrides keep every linear in float: there is nothing to quantize.")
    config = getattr(job.model, "config", None)
    described = config.to_dict() if hasattr(config, "to_dict") else {}  # type: ignore[union-attr]
    for spec, reason in refusals(exporter, specs, described):
        if spec is None:
            raise ConfigError(f"format {exporter.name!r} cannot hold this plan: {reason}. Choose another format.")
        raise ConfigError(
            f"format {exporter.name!r} cannot hold {spec.name} ({spec.out_features}x{spec.in_features}, "
            f"{spec.config}): {reason}. Change it with an override (or skip it), or choose another format."
        )
