"""Small models of every architecture: what each `model_type`'s config needs to be tiny, traps included.

Sides are multiples of 32, so that formats hold them at every width. Windows are shorter than the sequences of the tests.
"""

from __future__ import annotations

import json
import shutil
import tempfile
from pathlib import Path
from typing import Any

import torch

from qcore.testing import tiny_transformer

COMMON = {
    "vocab_size": 320, "hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 2, "num_attention_heads": 4,
    "max_position_embeddings": 64, "pad_token_id": 0, "bos_token_id": 0, "eos_token_id": 1,
}  # fmt: skip
GROUPED = {"num_key_value_heads": 2}
GPT = {"n_embd": 64, "n_layer": 2, "n_head": 4, "n_positions": 64, "n_inner": 96}
GEMMA = {**GROUPED, "head_dim": 16, "sliding_window": 8}

#: "model_type" or "model_type/variant" -> its config beyond COMMON
DENSE: dict[str, dict[str, Any]] = {
    "bloom": {"n_layer": 2, "n_head": 4},
    "codegen": {**GPT, "rotary_dim": 8},
    "falcon": {"ffn_hidden_size": 96},
    "falcon/40b": {"new_decoder_architecture": True, "num_kv_heads": 2, "ffn_hidden_size": 96},
    "falcon/rw": {"parallel_attn": False, "multi_query": False, "alibi": True, "bias": True, "ffn_hidden_size": 96},
    "gemma": {**GROUPED, "head_dim": 16},
    "gemma2": {**GEMMA, "query_pre_attn_scalar": 16, "final_logit_softcapping": 1.0, "attn_logit_softcapping": 2.0},
    "gemma3_text": {**GEMMA, "layer_types": ["sliding_attention", "full_attention"]},
    "gpt2": GPT,
    "gpt_bigcode": GPT,
    "gpt_bigcode/heads": {**GPT, "multi_query": False},
    "gpt_neo": {"num_layers": 2, "num_heads": 4, "attention_types": [[["global", "local"], 1]], "window_size": 8},
    "gpt_neox": {},
    "gpt_neox/serial": {"use_parallel_residual": False, "tie_word_embeddings": True},
    "gptj": {**GPT, "rotary_dim": 8},
    "granite": {**GROUPED, "embedding_multiplier": 12.0, "residual_multiplier": 0.22, "logits_scaling": 8.0},
    "llama": GROUPED,
    "llama/tied": {**GROUPED, "tie_word_embeddings": True, "attention_bias": True, "mlp_bias": True},
    "mistral": {**GROUPED, "sliding_window": 8},
    "mpt": {"d_model": 64, "n_heads": 4, "n_layers": 2, "expansion_ratio": 2, "max_seq_len": 64},
    "olmo": {**GROUPED, "clip_qkv": 0.05},
    "olmo2": GROUPED,
    "olmo3": {**GROUPED, "sliding_window": 8, "layer_types": ["sliding_attention", "full_attention"]},
    "opt": {"ffn_dim": 96, "word_embed_proj_dim": 64},
    "opt/350m": {"ffn_dim": 96, "word_embed_proj_dim": 32, "do_layer_norm_before": False},
    "phi": {},
    "phi3": {**GROUPED, "sliding_window": 8},
    "qwen2": GROUPED,
    "qwen2/windows": {**GROUPED, "use_sliding_window": True, "sliding_window": 8, "max_window_layers": 1},
    "qwen3": {**GROUPED, "head_dim": 16},
    "smollm3": {**GROUPED, "no_rope_layers": [1, 0], "use_sliding_window": False},
    "stablelm": {"num_key_value_heads": 4, "partial_rotary_factor": 0.25},
    "stablelm/parallel": {**GROUPED, "use_parallel_residual": True, "qk_layernorm": True, "use_qkv_bias": True},
}
EXPERTS = {
    **GROUPED, "num_experts": 4, "num_local_experts": 4, "n_routed_experts": 4, "num_experts_per_tok": 2,
    "moe_intermediate_size": 32,
}  # fmt: skip
LATENT = {
    "kv_lora_rank": 32, "qk_rope_head_dim": 8, "qk_nope_head_dim": 8, "v_head_dim": 16, "n_shared_experts": 1,
    "first_k_dense_replace": 1, "n_group": 2, "topk_group": 1, "num_key_value_heads": 4,
}  # fmt: skip
HYBRID = {
    "layer_types": ["linear_attention", "full_attention"], "linear_num_key_heads": 2, "linear_num_value_heads": 4,
    "linear_key_head_dim": 16, "linear_value_head_dim": 16,
}  # fmt: skip
SPARSE: dict[str, dict[str, Any]] = {
    "deepseek_v2": {**EXPERTS, **LATENT, "q_lora_rank": 32},
    "deepseek_v2/lite": {**EXPERTS, **LATENT, "q_lora_rank": None, "topk_method": "group_limited_greedy"},
    "deepseek_v3": {**EXPERTS, **LATENT, "q_lora_rank": 32},
    "gpt_oss": {**EXPERTS, "head_dim": 16, "sliding_window": 8},
    "mixtral": EXPERTS,
    "qwen2_moe": {**EXPERTS, "shared_expert_intermediate_size": 64, "mlp_only_layers": [0]},
    "qwen3_moe": {**EXPERTS, "head_dim": 16, "mlp_only_layers": [0]},
}
#: nobody declares these: the generic adapter serves them
UNDECLARED: dict[str, dict[str, Any]] = {
    "cohere": GROUPED,
    "cohere2": {**GROUPED, "sliding_window": 8, "layer_types": ["sliding_attention", "full_attention"]},
    "glm4": {**GROUPED, "head_dim": 16},
    "glm4_moe": {**EXPERTS, "head_dim": 16, "n_shared_experts": 1, "first_k_dense_replace": 1, "n_group": 1},
    "granitemoe": EXPERTS,
    "hunyuan_v1_moe": {**EXPERTS, "head_dim": 16},  # its router is a linear in a module of its own
    "jamba": {  # Mamba, whose code reads the weights of dt_proj, and attention, dense and sparse
        **EXPERTS,
        "attn_layer_period": 2,
        "attn_layer_offset": 1,
        "expert_layer_period": 2,
        "expert_layer_offset": 1,
        "use_mamba_kernels": False,
    },
    "lfm2": {**GROUPED, "layer_types": ["conv", "full_attention"]},
    "llama4_text": {
        **EXPERTS,
        "head_dim": 16,
        "intermediate_size_mlp": 96,
    },  # its router also chooses; experts in float
    "nemotron": GROUPED,
    "olmoe": EXPERTS,
    "persimmon": {},
    "phimoe": EXPERTS,
    "qwen3_next": {
        **EXPERTS,
        **HYBRID,
        "head_dim": 16,
        "shared_expert_intermediate_size": 32,
        "mlp_only_layers": [0],
    },
    "starcoder2": {**GROUPED, "sliding_window": 8},
    "xglm": {"d_model": 64, "num_layers": 2, "attention_heads": 4, "ffn_dim": 96},
}
REFINED_WEB = {
    "vocab_size": 320, "hidden_size": 64, "n_layer": 2, "n_head": 4, "ffn_hidden_size": 96, "bos_token_id": 0,
    "eos_token_id": 1,
}  # fmt: skip
#: models whose code comes with them: name -> file in remote/, config class, model class, what the config adds
REMOTE: dict[str, tuple[str, str, str, dict[str, Any]]] = {
    "moss": ("moss", "MossConfig", "MossForCausalLM", {}),
    "baichuan-7b": ("baichuan", "BaichuanConfig", "BaichuanForCausalLM", {}),
    "baichuan-13b": ("baichuan", "BaichuanConfig", "BaichuanForCausalLM", {"alibi": True}),
    "qwen": ("qwen", "QWenConfig", "QWenLMHeadModel", {}),
    "chatglm3": ("chatglm", "ChatGLMConfig", "ChatGLMForConditionalGeneration", {}),
    "RefinedWebModel": ("RW", "RWConfig", "RWForCausalLM", REFINED_WEB),
    "RefinedWeb": ("RW", "RW40bConfig", "RW40bForCausalLM", {
        **REFINED_WEB, "new_decoder_architecture": True, "num_kv_heads": 2,
    }),
}  # fmt: skip
#: algorithm -> options that make it quick
#: in float32 on every CPU: the error of bfloat16 is as large as that of 8 bits
ALGORITHMS: dict[str, dict[str, Any]] = {"gptq": {}, "autoround": {"iters": 3, "bs": 4, "amp": False}}
ZOO = {**DENSE, **SPARSE, **UNDECLARED}


def build(name: str, **changes: Any) -> Any:
    """A small random-weight model of the zoo, or of any model type by its plain sizes; the same one every time."""
    model_type = name.partition("/")[0]
    model = tiny_transformer(model_type, **{**COMMON, **ZOO.get(name, GROUPED), "dropout": 0.0, **changes})
    enliven(model)
    model.generation_config.eos_token_id = None  # greedy text of random weights: let it run on
    return model


@torch.no_grad()
def enliven(model: Any) -> None:
    """Give a fresh model weights that matter: transformers' own are so small that a block adds next to nothing.

    Matrices keep the size of what passes through them, vectors (biases, norms, sinks) move off their 0 or 1.
    """
    generator = torch.Generator().manual_seed(0)
    embeddings = model.get_input_embeddings().weight
    for parameter in model.parameters():
        noise = torch.randn(parameter.shape, generator=generator)
        if parameter.ndim == 1:
            parameter.add_(0.1 * noise)
        else:
            parameter.copy_(noise * (0.5 if parameter is embeddings else parameter.shape[-1] ** -0.5))


def fresh(name: str, scratch: Path) -> Any:
    """A model of the zoo or of REMOTE; the same one every time. scratch: a folder in which code may be kept."""
    return write_repository(name, Path(tempfile.mkdtemp(dir=scratch)) / "repository") if name in REMOTE else build(name)


def write_repository(name: str, folder: Path) -> Any:
    """Write a folder with the code of a REMOTE model, as a hub repository has it, and return the model saved in it."""
    from transformers import AutoConfig, AutoModelForCausalLM

    file, config_class, model_class, config = REMOTE[name]
    module = f"modeling_{file}"
    folder.mkdir(parents=True)
    shutil.copy(Path(__file__).parent / "remote" / f"{module}.py", folder)
    auto_map = {"AutoConfig": f"{module}.{config_class}", "AutoModelForCausalLM": f"{module}.{model_class}"}
    (folder / "config.json").write_text(json.dumps({"architectures": [model_class], "auto_map": auto_map, **config}))
    settled = AutoConfig.from_pretrained(folder, trust_remote_code=True)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = AutoModelForCausalLM.from_config(settled, trust_remote_code=True)
    enliven(model)
    model.save_pretrained(folder)
    assert "auto_map" in json.loads((folder / "config.json").read_text())
    return model.eval()
