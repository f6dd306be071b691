"""OPT, pre-norm and post-norm (350m, with project_in and project_out)."""

from qcore import ModelAdapter, hookimpl

OPT = ModelAdapter(
    name="opt", model_types=("opt",), blocks="model.decoder.layers",
    before_blocks=("model.decoder.embed_tokens", "model.decoder.embed_positions", "model.decoder.project_in"),
    after_blocks=("model.decoder.final_layer_norm", "model.decoder.project_out"),
    linear_groups=(("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj"), ("self_attn.out_proj",),
                   ("fc1",), ("fc2",)))  # fmt: skip


@hookimpl
def qcore_model_adapters():
    return [OPT]
