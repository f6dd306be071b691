"""Every hook a plugin can implement. Read this first when writing one.

A plugin is a module (or any object) named by an entry point of the group `qcore`:

    [project.entry-points.qcore]
    mine = "my_package.my_module"

with functions marked `@qcore.hookimpl`. The hooks that offer something return a list and do no work: they are called once, when
plugins are first needed, and what they return is kept. A module may set
`PLUGIN_API_VERSION = 1` to state which version of this page it was written for.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pluggy

if TYPE_CHECKING:
    from .adapter import ModelAdapter
    from .algorithm import Algorithm
    from .backend import Backend
    from .calibration import CalibrationDataset
    from .evaluation import EvalTask
    from .exporter import Exporter
    from .target import Target

PLUGIN_API_VERSION = 1

hookspec = pluggy.HookspecMarker("qcore")
hookimpl = pluggy.HookimplMarker("qcore")


@hookspec
def qcore_algorithms() -> list[type[Algorithm]]:  # type: ignore[empty-body]
    """Offer algorithms, as classes; an instance is made, with the options given, for each run."""


@hookspec
def qcore_model_adapters() -> list[ModelAdapter]:  # type: ignore[empty-body]
    """Offer model adapters; `model_types` decides which one serves a model that is opened."""


@hookspec
def qcore_backends() -> list[Backend]:  # type: ignore[empty-body]
    """Offer kernel backends, as instances; each quantized layer is built on the best that can serve it."""


@hookspec
def qcore_exporters() -> list[Exporter]:  # type: ignore[empty-body]
    """Offer formats, as instances: what models are saved in, loaded from and converted to."""


@hookspec
def qcore_calibration_datasets() -> list[CalibrationDataset]:  # type: ignore[empty-body]
    """Offer named sources of calibration text or tokens, as instances."""


@hookspec
def qcore_eval_tasks() -> list[EvalTask]:  # type: ignore[empty-body]
    """Offer evaluation tasks, as instances: what `qcore.evaluate(task=…)` and `qcore eval --task` measure a model by."""


@hookspec
def qcore_targets() -> list[Target]:  # type: ignore[empty-body]
    """Offer programs that load quantized models, as instances. Called when `qcore check` names one."""


@hookspec(firstresult=True)
def qcore_resolve_model(model: str, cache: Path) -> Path | None:
    """Turn a model's name into a local Hugging Face folder, or return None to leave it to others.

    Called for every model given as a string, before it is taken for a folder or a hub name. `cache` is a folder
    in which results may be kept; write into it atomically.
    """


@hookspec
def qcore_model_accelerated(model: Any) -> None:
    """A model is being made fast (`qcore.load(…, fast=True)`), before its step is compiled.

    Return nothing; put in place what makes one token for each row against a static cache faster, its attention for one.
    """


@hookspec
def qcore_run_started(plan: Mapping[str, Any]) -> None:
    """A run starts. `plan` has model, algorithm, config, blocks (how many), linears (how many), resumed_at."""


@hookspec
def qcore_block_finished(index: int, records: list[dict[str, Any]]) -> None:
    """A block is quantized. `records` has one dict per linear: name, bits, group_size, error, seconds, note."""


@hookspec
def qcore_run_finished(report: Mapping[str, Any]) -> None:
    """A run ended well. `report` is what `qcore.report` returns."""
