"""AutoGPTQ's names over qcore: `from qcore.compat.auto_gptq import AutoGPTQForCausalLM, BaseQuantizeConfig`."""

from .modeling import AutoGPTQForCausalLM, BaseGPTQForCausalLM, BaseQuantizeConfig

__all__ = ["AutoGPTQForCausalLM", "BaseGPTQForCausalLM", "BaseQuantizeConfig"]
