"""GPT-J: attention and MLP side by side on one norm, so that q, k, v and fc_in share an input."""

from qcore import ModelAdapter, hookimpl

GPTJ = ModelAdapter(
    name="gptj", model_types=("gptj",), blocks="transformer.h",
    before_blocks=("transformer.wte",), after_blocks=("transformer.ln_f",),
    linear_groups=(("attn.q_proj", "attn.k_proj", "attn.v_proj", "mlp.fc_in"), ("attn.out_proj",),
                   ("mlp.fc_out",)))  # fmt: skip


@hookimpl
def qcore_model_adapters():
    return [GPTJ]
