"""AutoRound 0.1's names over qcore: `from qcore.compat.auto_round import AutoRound`.

autoround = AutoRound(model, tokenizer, bits=4, group_size=128, sym=False)
autoround.quantize()
autoround.save_quantized("out")

Around its first release AutoRound changed the spelling of a few options; both spellings work here: `sym=False` and
`scheme="asym"`, `batch_size` and `bs`, `dataset` and `dataset_name`, `save_quantized(dir, format=)` and `export(dir, target=)`.

The model is opened again with `AutoModelForCausalLM` of this module, which is that of transformers with qcore reading quantized folders.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import transformers
from torch import nn

from .. import api
from ..config import Override
from ..errors import ConfigError, ModelError, name_list
from ..tools.native import use_in_transformers
from .common import pick_device, save_again, without_effect

_NO_EFFECT = {
    "sampler": "batches are drawn at random, by seed", "lr_scheduler": "the rate falls linearly to 0, as by default",
    "scale_dtype": "the format decides it",
    "dynamic_max_gap": "tuning never stops early", "use_triton": "the file is the same for every kernel",
    "inplace": "the model stays as it is", "quantization_config": "the folder says how it was quantized",
}  # fmt: skip

#: the earlier spellings of options, and the later ones
_SPELLINGS = {"bs": "batch_size", "dataset_name": "dataset", "not_use_mse": "not_use_best_mse"}

#: export targets of AutoRound 0.1 and the format of qcore that holds the same
TARGETS = {"auto_gptq": "gptq", "itrex": "gptq", "auto_round": "autoround"}


class AutoRound:
    """Quantize a model by AutoRound, with the options of its version 0.1.

    model: a transformers model. tokenizer: for text calibration; without one a dataloader must be given.
    sym: a symmetric grid; scheme="sym" or "asym" says the same. weight_config: options per linear,
        {name: {"bits": 8, "group_size": 32, "sym": True}}; 16 or more bits keep a linear in float.
    dataset: a calibration source of qcore's; None is qcore's default, which needs no network.
    dataset_split: which part of a data set of the hub's.
    dataloader: batches of token ids, or of mappings with input_ids.
    not_use_best_mse: keep the last step rather than the best.
    """

    def __init__(
        self,
        model: nn.Module,
        tokenizer: Any = None,
        bits: int = 4,
        group_size: int = 128,
        sym: bool = False,
        weight_config: Mapping[str, Mapping[str, Any]] | None = None,
        *,
        batch_size: int = 8,
        amp: bool = True,
        device: Any = None,
        dataloader: Iterable[Any] | None = None,
        dataset: str | None = None,
        dataset_split: str = "train",
        use_quant_input: bool = True,
        enable_minmax_tuning: bool = True,
        lr: float | None = None,
        minmax_lr: float | None = None,
        low_gpu_mem_usage: bool = True,
        iters: int = 200,
        seqlen: int = 2048,
        n_samples: int = 512,
        seed: int = 42,
        n_blocks: int = 1,
        gradient_accumulate_steps: int = 1,
        not_use_best_mse: bool = False,
        scheme: str | None = None,
        enable_full_range: bool = False,
        data_type: str = "int",
        **others: Any,
    ) -> None:
        earlier = {_SPELLINGS[name]: others.pop(name) for name in list(others) if name in _SPELLINGS}
        without_effect("AutoRound", others, _NO_EFFECT)
        if scheme is not None:
            sym = _is_symmetric(scheme, "scheme")
        if enable_full_range or data_type != "int":
            raise ConfigError(
                f"enable_full_range={enable_full_range}, data_type={data_type!r}: expected False and 'int', as in AutoRound 0.1."
            )
        if tokenizer is None and dataloader is None:
            raise ConfigError(
                "AutoRound calibrates on text, which needs a tokenizer; or give a dataloader of token ids."
            )
        source = earlier.get("dataset", dataset)
        if source is not None and "/" in source and not Path(source).exists():  # one of the hub's
            source = f"{source}@{dataset_split}"
        self.model, self.tokenizer, self.dataloader = model, tokenizer, dataloader
        self.settings: dict[str, Any] = {
            "bits": bits, "group_size": group_size, "sym": sym, "samples": n_samples, "seqlen": seqlen, "seed": seed,
            "device": pick_device(device), "calibration": source,
            "overrides": [_override(name, each) for name, each in (weight_config or {}).items()],
        }  # fmt: skip
        self.params: dict[str, Any] = {
            "iters": iters, "lr": lr, "minmax_lr": minmax_lr, "bs": earlier.get("batch_size", batch_size), "amp": amp,
            "n_blocks": n_blocks, "gradient_accumulate_steps": gradient_accumulate_steps,
            "low_gpu_mem_usage": low_gpu_mem_usage, "use_quant_input": use_quant_input,
            "enable_minmax_tuning": enable_minmax_tuning,
        }  # fmt: skip
        if earlier.get("not_use_best_mse", not_use_best_mse):
            self.params["checks"] = 0
        self.quantized = False

    def quantize(self) -> tuple[nn.Module, dict[str, dict[str, Any]]]:
        """Quantize the model in place; return it and how each linear was quantized."""
        settings = dict(self.settings)
        if self.dataloader is not None:
            settings["calibration"] = _sequences(self.dataloader)
        api.quantize(self.model, "autoround", tokenizer=self.tokenizer, **settings, **self.params)
        self.quantized = True
        layers = api.report(self.model)["layers"]
        return self.model, {layer["name"]: {key: v for key, v in layer.items() if key != "name"} for layer in layers}

    def export(self, output_dir: str | Path, target: str = "auto_gptq", **others: Any) -> Path:
        """Write the quantized model as a folder. target: "auto_gptq", or the name of any format of qcore's."""
        without_effect("export", others, _NO_EFFECT)
        if not self.quantized:
            raise ModelError("the model is not quantized yet: call quantize() first.")
        return save_again(self.model, output_dir, TARGETS.get(target, target), self.tokenizer)

    def save_quantized(self, output_dir: str | Path, format: str = "auto_gptq", **others: Any) -> Path:
        """The same as export, in its later spelling."""
        return self.export(output_dir, format, **others)


class AutoModelForCausalLM:
    """transformers' class of that name, with qcore reading and running what is quantized."""

    @classmethod
    def from_pretrained(
        cls, model: str | Path, *, quantization_config: Any = None, device: Any = None, **options: Any
    ) -> Any:
        """Open a folder or hub model; options go to transformers. What is quantized is seen from its config alone."""
        if quantization_config is not None:
            without_effect("from_pretrained", {"quantization_config": quantization_config}, _NO_EFFECT)
        use_in_transformers()
        opened = transformers.AutoModelForCausalLM.from_pretrained(model, **options)
        return opened if device is None else opened.to(pick_device(device))


@dataclass
class WeightOnlyQuantConfig:
    """Taken where scripts for intel-extension-for-transformers pass one; a folder knows itself how it was quantized."""

    bits: int = 4
    group_size: int = 128
    scheme: str = "sym"
    use_autoround: bool = False


def _is_symmetric(scheme: str, where: str) -> bool:
    if scheme not in ("sym", "asym"):
        raise ConfigError(f"{where}={scheme!r}: expected 'sym' or 'asym'.")
    return scheme == "sym"


def _override(name: str, given: Mapping[str, Any]) -> Override:
    """One entry of weight_config as an override."""
    known = {"bits", "group_size", "sym", "scheme", "data_type", "scale_dtype"}
    if not given.keys() <= known:
        raise ConfigError(
            f"weight_config[{name!r}] has {name_list(sorted(given.keys() - known))}; known: {name_list(sorted(known))}."
        )
    if given.get("bits", 0) >= 16 or given.get("data_type") in ("fp", "float"):
        return Override.parse({"pattern": name, "skip": True}, f"weight_config[{name!r}]")
    changes: dict[str, Any] = {key: given[key] for key in ("bits", "group_size", "sym") if key in given}
    if "scheme" in given:
        changes["sym"] = _is_symmetric(given["scheme"], f"weight_config[{name!r}]: scheme")
    return Override.parse({"pattern": name, **changes}, f"weight_config[{name!r}]")


def _sequences(dataloader: Iterable[Any]) -> list[Any]:
    """Batches of token ids [batch, length], or of mappings with input_ids, one sequence at a time."""
    found: list[Any] = []
    for batch in dataloader:
        masks = batch.get("attention_mask") if isinstance(batch, Mapping) else None
        rows = (
            batch["input_ids"]
            if isinstance(batch, Mapping)
            else batch[0]
            if isinstance(batch, (list, tuple))
            else batch
        )
        rows = rows[None] if rows.ndim == 1 else rows
        masks = [None] * len(rows) if masks is None else masks.reshape(rows.shape)
        found += [{"input_ids": row, "attention_mask": mask} for row, mask in zip(rows, masks, strict=True)]
    return found


__all__ = ["AutoModelForCausalLM", "AutoRound", "WeightOnlyQuantConfig"]
