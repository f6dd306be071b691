"""GPT-BigCode (StarCoder, SantaCoder): GPT-2's names, plain linears, one key and value head for all."""

from qcore import ModelAdapter, hookimpl

GPT_BIGCODE = ModelAdapter(
    name="gpt_bigcode", model_types=("gpt_bigcode",), blocks="transformer.h",
    before_blocks=("transformer.wte", "transformer.wpe"), after_blocks=("transformer.ln_f",),
    linear_groups=(("attn.c_attn",), ("attn.c_proj",), ("mlp.c_fc",), ("mlp.c_proj",)))  # fmt: skip


@hookimpl
def qcore_model_adapters():
    return [GPT_BIGCODE]
