"""MPT: alibi, q, k and v fused."""

from qcore import ModelAdapter, hookimpl

MPT = ModelAdapter(
    name="mpt", model_types=("mpt",), blocks="transformer.blocks",
    before_blocks=("transformer.wte",), after_blocks=("transformer.norm_f",),
    linear_groups=(("attn.Wqkv",), ("attn.out_proj",), ("ffn.up_proj",), ("ffn.down_proj",)))  # fmt: skip


@hookimpl
def qcore_model_adapters():
    return [MPT]
