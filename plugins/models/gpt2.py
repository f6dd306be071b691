"""GPT-2 (LaMini-GPT): Conv1D linears, q, k and v fused."""

from qcore import ModelAdapter, hookimpl

GPT2 = ModelAdapter(
    name="gpt2", model_types=("gpt2",), blocks="transformer.h",
    before_blocks=("transformer.wte", "transformer.wpe"), after_blocks=("transformer.ln_f",),
    linear_groups=(("attn.c_attn",), ("attn.c_proj",), ("mlp.c_fc",), ("mlp.c_proj",)))  # fmt: skip


@hookimpl
def qcore_model_adapters():
    return [GPT2]
