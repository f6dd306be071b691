"""GPT-NeoX (Pythia, dolly-v2, stablelm-base-alpha): q, k and v fused, attention and MLP side by side or not."""

from qcore import ModelAdapter, hookimpl

GPT_NEOX = ModelAdapter(
    name="gpt_neox", model_types=("gpt_neox",), blocks="gpt_neox.layers",
    before_blocks=("gpt_neox.embed_in", "gpt_neox.rotary_emb"), after_blocks=("gpt_neox.final_layer_norm",),
    linear_groups=(("attention.query_key_value",), ("attention.dense",), ("mlp.dense_h_to_4h",),
                   ("mlp.dense_4h_to_h",)))  # fmt: skip


@hookimpl
def qcore_model_adapters():
    return [GPT_NEOX]
