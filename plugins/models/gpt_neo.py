"""GPT-Neo: global and local (windowed) attention in turns."""

from qcore import ModelAdapter, hookimpl

GPT_NEO = ModelAdapter(
    name="gpt_neo", model_types=("gpt_neo",), blocks="transformer.h",
    before_blocks=("transformer.wte", "transformer.wpe"), after_blocks=("transformer.ln_f",),
    linear_groups=(("attn.attention.q_proj", "attn.attention.k_proj", "attn.attention.v_proj"),
                   ("attn.attention.out_proj",), ("mlp.c_fc",), ("mlp.c_proj",)))  # fmt: skip


@hookimpl
def qcore_model_adapters():
    return [GPT_NEO]
