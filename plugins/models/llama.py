"""Llama and the families that share its block."""

from qcore import ModelAdapter, hookimpl

LLAMA = ModelAdapter(
    name="llama", model_types=("llama",), blocks="model.layers",
    before_blocks=("model.embed_tokens", "model.rotary_emb"), after_blocks=("model.norm",),
    linear_groups=(("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj"), ("self_attn.o_proj",),
                   ("mlp.gate_proj", "mlp.up_proj"), ("mlp.down_proj",)))  # fmt: skip


@hookimpl
def qcore_model_adapters():
    return [LLAMA]
