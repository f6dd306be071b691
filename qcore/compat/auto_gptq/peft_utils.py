"""AutoGPTQ's names for adapters: `get_gptq_peft_model`, `GPTQLoraConfig`, `GPTQAdaLoraConfig`.

The two configs are peft's own, looked up when they are asked for: importing this module does not need peft.
"""

from __future__ import annotations

from typing import Any

from torch import nn

from ...errors import ConfigError
from ...linear import QuantLinear
from .. import peft as adapters

_CONFIGS = {"GPTQLoraConfig": "LoraConfig", "GPTQAdaLoraConfig": "AdaLoraConfig"}


def __getattr__(name: str) -> Any:
    if name in _CONFIGS:
        return getattr(adapters.peft_library(), _CONFIGS[name])
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def get_gptq_peft_model(
    model: Any,
    peft_config: Any = None,
    model_id: Any = None,
    adapter_name: str = "default",
    auto_find_all_linears: bool = True,
    train_mode: bool = False,
) -> Any:
    """Wrap a quantized model with a new adapter (train_mode, peft_config) or with a saved one (model_id).

    auto_find_all_linears: a new LoRA or AdaLoRA adapts every quantized linear, whatever peft_config names.
    """
    inner = model.model if hasattr(model, "quantize_config") else model
    if train_mode and peft_config is None:
        raise ConfigError("get_gptq_peft_model: train_mode=True needs a peft_config.")
    if not train_mode and model_id is None:
        raise ConfigError("get_gptq_peft_model: train_mode=False needs model_id, the folder or hub name of an adapter.")
    if not train_mode:
        return adapters.load_peft_model(inner, model_id, adapter_name=adapter_name)
    if auto_find_all_linears and isinstance(peft_config, adapters.peft_library().LoraConfig):  # AdaLoRA's config is one
        peft_config.target_modules = find_all_linear_names(inner)
    return adapters.get_peft_model(inner, peft_config, adapter_name)


def find_all_linear_names(model: nn.Module) -> list[str]:
    """The last parts of the names of all quantized linears."""
    return sorted({name.rpartition(".")[2] for name, m in model.named_modules() if isinstance(m, QuantLinear)})


__all__ = ["find_all_linear_names", "get_gptq_peft_model"]
