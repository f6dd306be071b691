"""Baichuan 7B (rotary) and 13B (alibi) (remote code): q, k and v fused as W_pack."""

from qcore import ModelAdapter, hookimpl

BAICHUAN = ModelAdapter(
    name="baichuan", model_types=("baichuan",), blocks="model.layers",
    before_blocks=("model.embed_tokens",), after_blocks=("model.norm",),
    linear_groups=(("self_attn.W_pack",), ("self_attn.o_proj",), ("mlp.gate_proj", "mlp.up_proj"),
                   ("mlp.down_proj",)))  # fmt: skip


@hookimpl
def qcore_model_adapters():
    return [BAICHUAN]
