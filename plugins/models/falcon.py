"""Falcon: 7B (attention and MLP share a norm), 40B (a norm each), RW (one after the other, alibi)."""

from qcore import ModelAdapter, hookimpl

FALCON = ModelAdapter(
    name="falcon", model_types=("falcon", "RefinedWeb", "RefinedWebModel"), blocks="transformer.h",
    before_blocks=(), after_blocks=("transformer.ln_f",),  # RW has its rotary embeddings elsewhere
    linear_groups=(("self_attention.query_key_value",), ("self_attention.dense",), ("mlp.dense_h_to_4h",),
                   ("mlp.dense_4h_to_h",)))  # fmt: skip


@hookimpl
def qcore_model_adapters():
    return [FALCON]
