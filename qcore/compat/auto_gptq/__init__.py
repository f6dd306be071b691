"""AutoGPTQ's names over qcore: `from qcore.compat.auto_gptq import AutoGPTQForCausalLM, BaseQuantizeConfig`."""

from .modeling import AutoGPTQForCausalLM, BaseGPTQForCausalLM, BaseQuantizeConfig
from .peft_utils import get_gptq_peft_model

__all__ = ["AutoGPTQForCausalLM", "BaseGPTQForCausalLM", "BaseQuantizeConfig", "get_gptq_peft_model"]
