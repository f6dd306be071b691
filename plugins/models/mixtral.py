"""Mixtral: a router in each block, experts with a gate (w1), an up (w3) and a down (w2) projection."""

from qcore import ModelAdapter, hookimpl

MIXTRAL = ModelAdapter(
    name="mixtral", model_types=("mixtral",), blocks="model.layers",
    before_blocks=("model.embed_tokens", "model.rotary_emb"), after_blocks=("model.norm",),
    linear_groups=(("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj"), ("self_attn.o_proj",),
                   ("mlp.experts.*.w1", "mlp.experts.*.w3"), ("mlp.experts.*.w2",)))  # fmt: skip


@hookimpl
def qcore_model_adapters():
    return [MIXTRAL]
