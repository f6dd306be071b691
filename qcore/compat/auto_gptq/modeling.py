"""AutoGPTQForCausalLM, BaseQuantizeConfig, and the base class that a model of one's own is declared with."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, ClassVar

import torch
from torch import nn

from ... import api
from ...adapter import ModelAdapter
from ...errors import CheckpointError, ConfigError, ModelError
from ...files import read_json
from ..common import logger, pick_device, save_again, without_effect

SIDE_FILE = "quantize_config.json"

#: options of AutoGPTQ that choose among its own kernels or file layouts, and why qcore needs none of them
_ONE_KERNEL_INTERFACE = "the best kernel for each layer is chosen by itself"
_NO_EFFECT = {
    "use_triton": _ONE_KERNEL_INTERFACE, "use_cuda_fp16": _ONE_KERNEL_INTERFACE, "use_marlin": _ONE_KERNEL_INTERFACE,
    "use_tritonv2": _ONE_KERNEL_INTERFACE, "use_qigen": _ONE_KERNEL_INTERFACE, "disable_exllama": _ONE_KERNEL_INTERFACE,
    "disable_exllamav2": _ONE_KERNEL_INTERFACE, "inject_fused_attention": _ONE_KERNEL_INTERFACE,
    "inject_fused_mlp": _ONE_KERNEL_INTERFACE, "warmup_triton": _ONE_KERNEL_INTERFACE, "autotune_warmup_after_quantized":
    _ONE_KERNEL_INTERFACE, "trainable": "every backend has a gradient", "strict": "every tensor is checked",
    "model_basename": "the files in the folder are found by their content", "low_cpu_mem_usage": "loading streams anyway",
    "use_safetensors": "qcore reads and writes safetensors only", "cache_examples_on_gpu": "memory is used as there is",
    "max_memory": "device_map spreads a model", "full_cpu_offload": "the model is on the CPU until it is quantized", "quantize_config": "the folder says how it was quantized",
    "safetensors_metadata": "the provenance stands in qcore.json", "use_fast": "a tokenizer is no part of this",
    **dict.fromkeys(
        ("cache_dir", "force_download", "proxies", "resume_download", "local_files_only", "use_auth_token", "subfolder"),
        "huggingface_hub's own settings hold: HF_HOME, HF_TOKEN, HF_HUB_OFFLINE",
    ),
}  # fmt: skip


@dataclass
class BaseQuantizeConfig:
    """How to quantize, under AutoGPTQ's names and with its defaults.

    damp_percent: 0.01 was AutoGPTQ's default. None takes qcore's own, measured to be better (docs/algorithms/gptq.md).
    """

    bits: int = 4
    group_size: int = -1
    damp_percent: float | None = None
    desc_act: bool = True
    static_groups: bool = False
    sym: bool = True
    true_sequential: bool = True
    model_name_or_path: str | None = None
    model_file_base_name: str | None = None

    def to_dict(self) -> dict[str, Any]:
        """The fields by name."""
        return asdict(self)

    def save_pretrained(self, save_dir: str | Path, **_: Any) -> None:
        """Write quantize_config.json into a folder."""
        Path(save_dir, SIDE_FILE).write_text(json.dumps(self.to_dict(), indent=2), encoding="utf-8")

    @classmethod
    def from_pretrained(cls, save_dir: str | Path, **_: Any) -> BaseQuantizeConfig:
        """Read quantize_config.json, or config.json's quantization_config, of a folder."""
        side, config = Path(save_dir, SIDE_FILE), Path(save_dir, "config.json")
        found = read_json(side) if side.is_file() else read_json(config).get("quantization_config")
        if not isinstance(found, Mapping):
            raise CheckpointError(f"{save_dir} has neither {SIDE_FILE} nor a quantization_config in config.json.")
        return cls(**{name: found[name] for name in cls.__dataclass_fields__ if name in found})


class BaseGPTQForCausalLM(nn.Module):
    """A causal language model with AutoGPTQ's methods; everything else is asked of the transformers model inside (`.model`).

    Subclass it to declare where a model keeps its linears. layers_block_name: the list of decoder blocks.
    inside_layer_modules: linears of a block, those with a shared input together, in the order they run.
    outside_layer_modules: what else there is; qcore finds that by itself.
    """

    layers_block_name: ClassVar[str | None] = None
    inside_layer_modules: ClassVar[Sequence[Sequence[str]] | None] = None
    outside_layer_modules: ClassVar[Sequence[str] | None] = None
    lm_head_name: ClassVar[str] = "lm_head"

    def __init__(self, model: nn.Module, quantized: bool, quantize_config: BaseQuantizeConfig, tokenizer: Any = None):
        super().__init__()
        self.model, self.quantized, self.quantize_config = model, quantized, quantize_config
        self._tokenizer = tokenizer
        self._saved_in: Path | None = None

    @classmethod
    def from_pretrained(
        cls,
        pretrained_model_name_or_path: str | Path,
        quantize_config: BaseQuantizeConfig,
        trust_remote_code: bool = False,
        torch_dtype: torch.dtype | str | None = None,
        **others: Any,
    ) -> BaseGPTQForCausalLM:
        """Open a float model in host memory, to be quantized. torch_dtype: None or "auto" keeps the model's own."""
        without_effect("from_pretrained", others, _NO_EFFECT)
        model, tokenizer = api.open_any(pretrained_model_name_or_path, "cpu", trust_remote_code)
        dtype = _dtype(torch_dtype)
        return cls(model if dtype is None else model.to(dtype), False, quantize_config, tokenizer)

    @classmethod
    def from_quantized(
        cls,
        model_name_or_path: str | Path | None = None,
        device: Any = None,
        device_map: Any = None,
        trust_remote_code: bool = False,
        save_dir: str | Path | None = None,
        torch_dtype: torch.dtype | str | None = None,
        revision: str | None = None,
        **others: Any,
    ) -> BaseGPTQForCausalLM:
        """Open a quantized folder or hub repository on a device, in any format qcore reads."""
        without_effect("from_quantized", others, _NO_EFFECT)
        folder = model_name_or_path or save_dir
        if folder is None:
            raise ConfigError("from_quantized needs model_name_or_path: the folder or hub name of a quantized model.")
        model = api.load(
            folder, device=pick_device(device), device_map=device_map, trust_remote_code=trust_remote_code,
            dtype=_dtype(torch_dtype), revision=revision,
        )  # fmt: skip
        first = next(iter(model.qcore_info.report["layers"]))
        config = BaseQuantizeConfig(first["bits"], first["group_size"], sym=first["sym"], desc_act=first["act_order"])
        opened = cls(model, True, config, model.qcore_info.tokenizer)
        opened._saved_in = Path(folder) if Path(folder).is_dir() else None
        return opened

    @classmethod
    def adapter(cls) -> ModelAdapter | None:
        """The declaration of a subclass as a model adapter; None where nothing is declared."""
        if cls.layers_block_name is None or cls.inside_layer_modules is None:
            return None
        groups = tuple(tuple(group) for group in cls.inside_layer_modules)
        return ModelAdapter(cls.__name__, (), cls.layers_block_name, groups)

    def quantize(self, examples: Sequence[Mapping[str, Any]], batch_size: int = 1, **others: Any) -> None:
        """Quantize by GPTQ. examples: mappings of input_ids and attention_mask, as a tokenizer returns them."""
        without_effect("quantize", others, _NO_EFFECT)
        if self.quantized:
            raise ModelError("the model is quantized already. Start from the float model: from_pretrained.")
        strange = {key for example in examples for key in example} - {"input_ids", "attention_mask", "token_type_ids"}
        if strange:
            raise ConfigError(f"examples have {sorted(strange)}; expected only input_ids and attention_mask.")
        config = self.quantize_config
        params: dict[str, Any] = {} if config.damp_percent is None else {"damp_percent": config.damp_percent}
        sequences = [_tokens(example) for example in examples]
        api.quantize(
            self.model, "gptq", bits=config.bits, group_size=config.group_size, sym=config.sym, desc_act=config.desc_act,
            static_groups=config.static_groups, true_sequential=config.true_sequential, **params, calibration=sequences,
            samples=max(1, len(sequences)), seqlen=max([2, *(len(each["input_ids"]) for each in sequences)]),
            batch_size=batch_size, tokenizer=self._tokenizer, adapter=self.adapter(),
        )  # fmt: skip
        self.quantized = True

    def save_quantized(self, save_dir: str | Path, use_safetensors: bool = True, **others: Any) -> None:
        """Write the quantized model as a folder of the GPTQ format, in place of an earlier one of qcore's."""
        without_effect("save_quantized", others, _NO_EFFECT)
        if not use_safetensors:
            logger.warning("use_safetensors=False: qcore writes safetensors only, and does so now.")
        self._saved_in = save_again(self.model, save_dir, "gptq", self._tokenizer)

    def save_pretrained(self, save_dir: str | Path, **others: Any) -> None:
        """The same as save_quantized."""
        self.save_quantized(save_dir, **others)

    def push_to_hub(
        self,
        repo_id: str,
        save_dir: str | Path | None = None,
        use_safetensors: bool = True,
        commit_message: str = "Upload of a quantized model",
        use_auth_token: bool | str | None = None,
        private: bool | None = None,
        token: bool | str | None = None,
        create_pr: bool = False,
        **others: Any,
    ) -> None:
        """Upload a folder to the Hugging Face hub: save_dir, saved into now, or else what was saved last."""
        without_effect("push_to_hub", others, _NO_EFFECT)
        from huggingface_hub import HfApi

        if save_dir is not None:
            self.save_quantized(save_dir, use_safetensors)
        if self._saved_in is None:
            raise ConfigError("push_to_hub: nothing is saved yet. Call save_quantized first, or give save_dir.")
        hub = HfApi(token=token if token is not None else use_auth_token)
        repo = hub.create_repo(repo_id=repo_id, private=private, exist_ok=True, repo_type="model")
        hub.upload_folder(
            repo_id=repo.repo_id, folder_path=str(self._saved_in), commit_message=commit_message, create_pr=create_pr
        )

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """The transformers model's own."""
        return self.model(*args, **kwargs)

    def generate(self, **kwargs: Any) -> Any:
        """The transformers model's own, without gradients."""
        with torch.no_grad():
            return self.model.generate(**kwargs)  # type: ignore[operator]

    def warmup_triton(self, enabled: bool = True) -> None:
        """Nothing to do: kernels are tuned when they first run."""

    def enable_trainable_mode(self, enabled: bool = True) -> None:
        """Nothing to do: every backend that has a gradient has it always."""

    disable_trainable_mode = enable_trainable_mode

    @property
    def device(self) -> torch.device:
        """Where the model's inputs go."""
        embeddings: Any = self.model.get_input_embeddings()  # type: ignore[operator]
        device: torch.device = embeddings.weight.device
        return device

    def __getattr__(self, name: str) -> Any:
        try:
            return super().__getattr__(name)
        except AttributeError:
            return getattr(super().__getattr__("model"), name)


class AutoGPTQForCausalLM:
    """Opens any causal language model: from_pretrained to quantize it, from_quantized to run it."""

    from_pretrained = BaseGPTQForCausalLM.from_pretrained
    from_quantized = BaseGPTQForCausalLM.from_quantized

    def __init__(self) -> None:
        raise ModelError("use AutoGPTQForCausalLM.from_pretrained or AutoGPTQForCausalLM.from_quantized.")


def _dtype(given: torch.dtype | str | None) -> torch.dtype | None:
    """torch_dtype as transformers takes it; None for the model's own."""
    if given is None or isinstance(given, torch.dtype):
        return given
    found = getattr(torch, given, None)
    if given != "auto" and not isinstance(found, torch.dtype):
        raise ConfigError(f"torch_dtype={given!r}: expected a torch dtype, its name, or 'auto'.")
    return found if isinstance(found, torch.dtype) else None


def _tokens(example: Mapping[str, Any]) -> dict[str, Any]:
    """One example without the batch dimension that tokenizers may leave around it."""
    return {name: torch.as_tensor(value).reshape(-1) for name, value in example.items() if name != "token_type_ids"}
