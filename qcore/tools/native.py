"""transformers' own `from_pretrained`, with qcore reading the quantized folder and its backends running it.

transformers has no entry point for this, so one call asks for it: `qcore.use_in_transformers()`. It replaces what transformers
would do for the `quant_method`s of the installed formats; nothing is replaced before it is called.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

from torch import nn
from transformers.quantizers.auto import AUTO_QUANTIZATION_CONFIG_MAPPING, AUTO_QUANTIZER_MAPPING
from transformers.quantizers.base import HfQuantizer
from transformers.utils.quantization_config import QuantizationConfigMixin

from ..api import backends_for
from ..content import info_of, open_content
from ..errors import CheckpointError
from ..experts import unfuse
from ..exporter import Content
from ..linear import QuantLinear, replace_module
from ..loading import Placement, take_out
from ..model import load_tokenizer
from ..plugins import Plugins, installed


def use_in_transformers(
    methods: Sequence[str] | None = None, *, backend: str = "auto", plugins: Plugins | None = None
) -> list[str]:
    """Let `AutoModelForCausalLM.from_pretrained` open quantized folders through qcore, for the rest of the process.

    methods: the `quant_method`s meant (None: those of all installed formats that can be read). backend: a backend's name, or
    "auto". Neither gptqmodel nor optimum nor any other package that transformers would ask for is needed.

    Returns the methods now served.

    Example: `qcore.use_in_transformers(); model = AutoModelForCausalLM.from_pretrained("model-gptq")`
    """
    chosen = plugins or installed()
    known = {method for exporter in chosen.usable("format").values() for method in exporter.quant_methods}
    missing = set(methods or ()) - known
    if missing:
        raise CheckpointError(
            f"no installed format has quant_method {sorted(missing)[0]!r}. Known: {', '.join(sorted(known))}."
        )
    served = sorted(known if methods is None else methods)

    class Quantizer(QcoreQuantizer):
        offered, wanted = chosen, backend

    for method in served:
        AUTO_QUANTIZATION_CONFIG_MAPPING[method] = QcoreQuantizationConfig
        AUTO_QUANTIZER_MAPPING[method] = Quantizer
    return served


class QcoreQuantizationConfig(QuantizationConfigMixin):  # type: ignore[misc]
    """A folder's quantization_config as it is."""

    def __init__(self, **values: Any) -> None:
        self.values = values
        self.quant_method = values.get("quant_method")

    @classmethod
    def from_dict(cls, config_dict: Mapping[str, Any], return_unused_kwargs: bool = False, **kwargs: Any) -> Any:
        """See QuantizationConfigMixin."""
        config = cls(**config_dict)
        return (config, kwargs) if return_unused_kwargs else config

    def to_dict(self) -> dict[str, Any]:
        """See QuantizationConfigMixin."""
        return dict(self.values)


class QcoreQuantizer(HfQuantizer):  # type: ignore[misc]
    """Takes the quantized linears out before transformers loads the rest, and puts QuantLinears in afterwards."""

    offered: Plugins
    wanted: str
    content: Content
    folder: Path
    layers: dict[str, str]  # name in the model -> name on disk

    def _process_model_before_weight_loading(
        self, model: nn.Module, checkpoint_files: Sequence[str] | None = None, **kwargs: Any
    ) -> nn.Module:
        if not checkpoint_files:
            raise CheckpointError("qcore opens quantized models from folders, not from state dicts.")
        self.folder = Path(checkpoint_files[0]).parent
        _, self.content = open_content(self.folder, self.offered)
        self.layers = take_out(unfuse(model), self.content, self.folder)
        ignored = set(getattr(model, "_keys_to_ignore_on_load_unexpected", None) or ())
        model._keys_to_ignore_on_load_unexpected = ignored | {  # type: ignore[assignment]
            rf"^{re.escape(name)}\." for name in self.layers
        }
        return model

    def _process_model_after_weight_loading(self, model: nn.Module, **kwargs: Any) -> nn.Module:
        parameter = next(each for each in model.parameters() if each.is_floating_point())
        places = Placement(getattr(model, "hf_device_map", None) or {"": parameter.device})
        backends, wanted = backends_for(self.wanted, self.offered)
        for name, key in self.layers.items():
            place, source = places(name), partial(self.content.weight, key)
            linear = QuantLinear(source().to(place), backends.values(), place, parameter.dtype, source, wanted)
            replace_module(model, name, linear)
        report, tokenizer = dict(self.content.provenance), load_tokenizer(self.folder)
        model.qcore_info = info_of(model, tokenizer, self.content.source, report=report)  # type: ignore[assignment]
        return model

    def is_serializable(self) -> bool:
        """qcore.save writes real formats; transformers' save_pretrained would write a backend's buffers."""
        return False

    @property
    def is_trainable(self) -> bool:
        """Adapters can be trained on it."""
        return True
