"""BLOOM: alibi, q, k and v fused, a norm behind the embeddings."""

from qcore import ModelAdapter, hookimpl

BLOOM = ModelAdapter(
    name="bloom", model_types=("bloom",), blocks="transformer.h",
    before_blocks=("transformer.word_embeddings", "transformer.word_embeddings_layernorm"),
    after_blocks=("transformer.ln_f",),
    linear_groups=(("self_attention.query_key_value",), ("self_attention.dense",), ("mlp.dense_h_to_4h",),
                   ("mlp.dense_4h_to_h",)))  # fmt: skip


@hookimpl
def qcore_model_adapters():
    return [BLOOM]
