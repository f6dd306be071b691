"""ChatGLM2 and ChatGLM3 (remote code): q, k and v fused, gate and up fused, hidden states [length, batch, hidden]."""

from qcore import ModelAdapter, hookimpl

CHATGLM = ModelAdapter(
    name="chatglm", model_types=("chatglm",), blocks="transformer.encoder.layers",
    before_blocks=("transformer.embedding", "transformer.rotary_pos_emb"),
    after_blocks=("transformer.encoder.final_layernorm", "transformer.output_layer"),
    linear_groups=(("self_attention.query_key_value",), ("self_attention.dense",), ("mlp.dense_h_to_4h",),
                   ("mlp.dense_4h_to_h",)))  # fmt: skip


@hookimpl
def qcore_model_adapters():
    return [CHATGLM]
