"""MOSS (remote code): CodeGen's block."""

from qcore import ModelAdapter, hookimpl

MOSS = ModelAdapter(
    name="moss", model_types=("moss",), blocks="transformer.h",
    before_blocks=("transformer.wte",), after_blocks=("transformer.ln_f",),
    linear_groups=(("attn.qkv_proj", "mlp.fc_in"), ("attn.out_proj",), ("mlp.fc_out",)))  # fmt: skip


@hookimpl
def qcore_model_adapters():
    return [MOSS]
