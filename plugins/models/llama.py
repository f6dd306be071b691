"""Llama and the families that share its block, norms, softcaps and windows aside."""

from qcore import ModelAdapter, hookimpl

LLAMA = ModelAdapter(
    name="llama", blocks="model.layers",
    model_types=("llama", "qwen2", "qwen3", "gemma", "gemma2", "gemma3_text", "granite", "olmo", "olmo2", "olmo3",
                 "smollm3", "stablelm"),
    before_blocks=("model.embed_tokens", "model.rotary_emb"), after_blocks=("model.norm",),
    linear_groups=(("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj"), ("self_attn.o_proj",),
                   ("mlp.gate_proj", "mlp.up_proj"), ("mlp.down_proj",)))  # fmt: skip


@hookimpl
def qcore_model_adapters():
    return [LLAMA]
