"""CodeGen: GPT-J's block with q, k and v fused."""

from qcore import ModelAdapter, hookimpl

CODEGEN = ModelAdapter(
    name="codegen", model_types=("codegen",), blocks="transformer.h",
    before_blocks=("transformer.wte",), after_blocks=("transformer.ln_f",),
    linear_groups=(("attn.qkv_proj", "mlp.fc_in"), ("attn.out_proj",), ("mlp.fc_out",)))  # fmt: skip


@hookimpl
def qcore_model_adapters():
    return [CODEGEN]
