"""gpt-oss: experts in every block, interleaved gate and up, biases everywhere, windows in every other block."""

from qcore import ModelAdapter, hookimpl

GPT_OSS = ModelAdapter(
    name="gpt_oss", model_types=("gpt_oss",), blocks="model.layers",
    before_blocks=("model.embed_tokens", "model.rotary_emb"), after_blocks=("model.norm",),
    linear_groups=(("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj"), ("self_attn.o_proj",),
                   ("mlp.experts.*.gate_proj", "mlp.experts.*.up_proj"), ("mlp.experts.*.down_proj",)))  # fmt: skip


@hookimpl
def qcore_model_adapters():
    return [GPT_OSS]
