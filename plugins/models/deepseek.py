"""DeepSeek V2 and V3: latent attention (q and kv through a narrow pass), dense first blocks, shared experts."""

from qcore import ModelAdapter, hookimpl

DEEPSEEK = ModelAdapter(
    name="deepseek", model_types=("deepseek_v2", "deepseek_v3"), blocks="model.layers",
    before_blocks=("model.embed_tokens", "model.rotary_emb"), after_blocks=("model.norm",),
    linear_groups=(("self_attn.q_proj", "self_attn.q_a_proj", "self_attn.kv_a_proj_with_mqa"),
                   ("self_attn.q_b_proj",), ("self_attn.kv_b_proj",), ("self_attn.o_proj",),
                   ("mlp.gate_proj", "mlp.up_proj"), ("mlp.down_proj",),
                   ("mlp.experts.*.gate_proj", "mlp.experts.*.up_proj"), ("mlp.experts.*.down_proj",),
                   ("mlp.shared_experts.gate_proj", "mlp.shared_experts.up_proj"),
                   ("mlp.shared_experts.down_proj",)))  # fmt: skip


@hookimpl
def qcore_model_adapters():
    return [DEEPSEEK]
