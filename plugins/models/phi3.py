"""Phi-3 and Phi-4: q, k and v fused, gate and up fused."""

from qcore import ModelAdapter, hookimpl

PHI3 = ModelAdapter(
    name="phi3", model_types=("phi3",), blocks="model.layers",
    before_blocks=("model.embed_tokens", "model.rotary_emb"), after_blocks=("model.norm",),
    linear_groups=(("self_attn.qkv_proj",), ("self_attn.o_proj",), ("mlp.gate_up_proj",),
                   ("mlp.down_proj",)))  # fmt: skip


@hookimpl
def qcore_model_adapters():
    return [PHI3]
