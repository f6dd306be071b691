"""Mistral: where the blocks are, which linears share an input, and the order they run in."""

from qcore import ModelAdapter, hookimpl

PLUGIN_API_VERSION = 1

MISTRAL = ModelAdapter(
    name="mistral",
    model_types=("mistral",),
    blocks="model.layers",
    before_blocks=("model.embed_tokens", "model.rotary_emb"),
    after_blocks=("model.norm",),
    linear_groups=(
        ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj"),
        ("self_attn.o_proj",),
        ("mlp.gate_proj", "mlp.up_proj"),
        ("mlp.down_proj",),
    ),
)


@hookimpl
def qcore_model_adapters():
    return [MISTRAL]
