"""Phi-1, 1.5 and 2: attention and MLP side by side on one norm."""

from qcore import ModelAdapter, hookimpl

PHI = ModelAdapter(
    name="phi", model_types=("phi",), blocks="model.layers",
    before_blocks=("model.embed_tokens", "model.rotary_emb"), after_blocks=("model.final_layernorm",),
    linear_groups=(("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj", "mlp.fc1"), ("self_attn.dense",),
                   ("mlp.fc2",)))  # fmt: skip


@hookimpl
def qcore_model_adapters():
    return [PHI]
