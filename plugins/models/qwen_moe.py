"""Qwen2-MoE (a shared expert behind a gate) and Qwen3-MoE; blocks without experts may stand between."""

from qcore import ModelAdapter, hookimpl

MLP = ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj"), ("self_attn.o_proj",), \
      ("mlp.gate_proj", "mlp.up_proj"), ("mlp.down_proj",)  # fmt: skip
SHARED = ("mlp.shared_expert.gate_proj", "mlp.shared_expert.up_proj"), ("mlp.shared_expert.down_proj",)
EXPERTS = ("mlp.experts.*.gate_proj", "mlp.experts.*.up_proj"), ("mlp.experts.*.down_proj",)
AROUND = {"before_blocks": ("model.embed_tokens", "model.rotary_emb"), "after_blocks": ("model.norm",)}


@hookimpl
def qcore_model_adapters():
    return [ModelAdapter("qwen2_moe", ("qwen2_moe",), "model.layers", MLP + SHARED + EXPERTS, **AROUND,
                         keep_float=("mlp.shared_expert_gate",)),
            ModelAdapter("qwen3_moe", ("qwen3_moe",), "model.layers", MLP + EXPERTS, **AROUND)]  # fmt: skip
