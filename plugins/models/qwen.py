"""Qwen, the first one (remote code): q, k and v fused, the gate is w2."""

from qcore import ModelAdapter, hookimpl

QWEN = ModelAdapter(
    name="qwen", model_types=("qwen",), blocks="transformer.h",
    before_blocks=("transformer.wte", "transformer.rotary_emb"), after_blocks=("transformer.ln_f",),
    linear_groups=(("attn.c_attn",), ("attn.c_proj",), ("mlp.w1", "mlp.w2"), ("mlp.c_proj",)))  # fmt: skip


@hookimpl
def qcore_model_adapters():
    return [QWEN]
