"""qcore: quantize large language models to 2 to 8 bits; every algorithm, model, kernel and format is a plugin.

Names are imported when they are first used, so that `import qcore` stays fast and does not import torch.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

__version__ = "0.1.0"

_HOMES = {
    "adapter": ("ModelAdapter",),
    "algorithm": ("Algorithm", "BlockContext", "Linear", "NoParams", "Task", "Total"),
    "api": ("evaluate", "inspect", "load", "quantize", "report", "save"),
    "backend": ("Backend", "MatmulSpec", "speed_at"),
    "calibration": ("CalibrationDataset", "CalibrationRequest"),
    "tools.checking": ("check",),
    "checkpoint": ("ModelFolder",),
    "config": ("Options", "Override", "QuantConfig"),
    "tools.conversion": ("convert",),
    "errors": (
        "BackendError",
        "CalibrationError",
        "CheckpointError",
        "ConfigError",
        "EvaluationError",
        "ModelError",
        "PluginError",
        "QcoreError",
        "RunError",
    ),
    "evaluation": ("EvalTask",),
    "exporter": ("Content", "Exporter", "LayerSpec"),
    "files": ("read_json",),
    "hookspecs": ("PLUGIN_API_VERSION", "hookimpl"),
    "tools.hub": ("push_to_hub",),
    "linear": ("QuantLinear",),
    "model": ("quiet_transformers", "transposed_linears"),
    "saving": ("FolderExporter", "TensorExporter"),
    "tools.native": ("use_in_transformers",),
    "target": ("Finding", "Subject", "Target"),
    "weight": ("QuantizedWeight",),
}
_HOME_OF = {name: home for home, names in _HOMES.items() for name in names}

__all__ = ["__version__", *sorted(_HOME_OF)]

if TYPE_CHECKING:
    from . import grid as grid
    from . import packing as packing
    from . import testing as testing
    from .adapter import ModelAdapter as ModelAdapter
    from .algorithm import Algorithm as Algorithm
    from .algorithm import BlockContext as BlockContext
    from .algorithm import Linear as Linear
    from .algorithm import NoParams as NoParams
    from .algorithm import Task as Task
    from .algorithm import Total as Total
    from .api import evaluate as evaluate
    from .api import inspect as inspect
    from .api import load as load
    from .api import quantize as quantize
    from .api import report as report
    from .api import save as save
    from .backend import Backend as Backend
    from .backend import MatmulSpec as MatmulSpec
    from .backend import speed_at as speed_at
    from .calibration import CalibrationDataset as CalibrationDataset
    from .calibration import CalibrationRequest as CalibrationRequest
    from .checkpoint import ModelFolder as ModelFolder
    from .config import Options as Options
    from .config import Override as Override
    from .config import QuantConfig as QuantConfig
    from .errors import BackendError as BackendError
    from .errors import CalibrationError as CalibrationError
    from .errors import CheckpointError as CheckpointError
    from .errors import ConfigError as ConfigError
    from .errors import EvaluationError as EvaluationError
    from .errors import ModelError as ModelError
    from .errors import PluginError as PluginError
    from .errors import QcoreError as QcoreError
    from .errors import RunError as RunError
    from .evaluation import EvalTask as EvalTask
    from .exporter import Content as Content
    from .exporter import Exporter as Exporter
    from .exporter import LayerSpec as LayerSpec
    from .files import read_json as read_json
    from .hookspecs import PLUGIN_API_VERSION as PLUGIN_API_VERSION
    from .hookspecs import hookimpl as hookimpl
    from .linear import QuantLinear as QuantLinear
    from .model import quiet_transformers as quiet_transformers
    from .model import transposed_linears as transposed_linears
    from .saving import FolderExporter as FolderExporter
    from .saving import TensorExporter as TensorExporter
    from .target import Finding as Finding
    from .target import Subject as Subject
    from .target import Target as Target
    from .tools.checking import check as check
    from .tools.conversion import convert as convert
    from .tools.hub import push_to_hub as push_to_hub
    from .tools.native import use_in_transformers as use_in_transformers
    from .weight import QuantizedWeight as QuantizedWeight


_MODULES = ("grid", "packing", "testing")  # modules that are public as such


def __getattr__(name: str) -> Any:
    if name in _HOME_OF:
        return getattr(importlib.import_module(f".{_HOME_OF[name]}", __name__), name)
    if name in _MODULES:
        return importlib.import_module(f".{name}", __name__)
    raise AttributeError(f"module 'qcore' has no attribute {name!r}")


def __dir__() -> list[str]:
    return __all__
