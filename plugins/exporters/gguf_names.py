"""What llama.cpp calls a model's tensors, the order in which it wants their rows, and what a config says of positions."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from torch import Tensor

from qcore import CheckpointError

_OUTSIDE = {"model.embed_tokens": "token_embd", "model.norm": "output_norm", "lm_head": "output"}
_BLOCK = {
    "input_layernorm": "attn_norm",
    "self_attn.q_proj": "attn_q",
    "self_attn.k_proj": "attn_k",
    "self_attn.v_proj": "attn_v",
    "self_attn.o_proj": "attn_output",
    "post_attention_layernorm": "ffn_norm",
    "mlp.gate_proj": "ffn_gate",
    "mlp.up_proj": "ffn_up",
    "mlp.down_proj": "ffn_down",
}


@dataclass(frozen=True)
class Architecture:
    """How llama.cpp calls a family of models, and whether it wants the rows of q and k in its own order (rotary pairs)."""

    name: str
    permuted: bool = False
    more: Mapping[str, str] = field(default_factory=dict)

    def gguf_name(self, name: str) -> str | None:
        """blk.0.attn_q.weight for model.layers.0.self_attn.q_proj.weight."""
        module, _, part = name.rpartition(".")
        if module in _OUTSIDE:
            return f"{_OUTSIDE[module]}.{part}"
        pieces = module.split(".", 3)
        if len(pieces) == 4 and pieces[:2] == ["model", "layers"] and pieces[2].isdecimal():
            found = {**_BLOCK, **self.more}.get(pieces[3])
            return f"blk.{pieces[2]}.{found}.{part}" if found else None
        return None

    def model_name(self, name: str) -> str | None:
        """The other way."""
        module, _, part = name.rpartition(".")
        outside = {theirs: ours for ours, theirs in _OUTSIDE.items()}
        if module in outside:
            return f"{outside[module]}.{part}"
        pieces = module.split(".")
        inside = {theirs: ours for ours, theirs in {**_BLOCK, **self.more}.items()}
        if len(pieces) == 3 and pieces[0] == "blk" and pieces[1].isdecimal() and pieces[2] in inside:
            return f"model.layers.{pieces[1]}.{inside[pieces[2]]}.{part}"
        return None


LLAMA = Architecture("llama", permuted=True)
QWEN3 = Architecture("qwen3", more={"self_attn.q_norm": "attn_q_norm", "self_attn.k_norm": "attn_k_norm"})
#: by transformers' model_type
ARCHITECTURES = {"llama": LLAMA, "mistral": LLAMA, "qwen2": Architecture("qwen2"), "qwen3": QWEN3}


def rope_of(config: Mapping[str, Any]) -> dict[str, Any]:
    """transformers keeps rotary embeddings under rope_parameters, before version 5 under rope_scaling and rope_theta."""
    found = dict(config.get("rope_parameters") or config.get("rope_scaling") or {})
    found.setdefault("rope_type", found.get("type", "default"))
    found.setdefault("rope_theta", config.get("rope_theta", 10000.0))
    return found


def heads_of(architecture: Architecture, config: Mapping[str, Any], name: str) -> int:
    """How many heads the rows of a tensor or layer belong to, where llama.cpp wants them in another order; else 0."""
    if not architecture.permuted or "self_attn" not in name:
        return 0
    heads = config.get("num_attention_heads")
    if ".k_proj" in name:
        heads = config.get("num_key_value_heads") or heads
    if ".q_proj" not in name and ".k_proj" not in name:
        return 0
    if not isinstance(heads, int) or heads < 1:
        raise CheckpointError(f"config.json has {heads!r} attention heads.")
    return heads


def as_llama_has(rows: Tensor, heads: int) -> Tensor:
    """Rows of each head from halves (i, i + d/2) to pairs (2i, 2i + 1)."""
    return rows.reshape(heads, 2, -1, *rows.shape[1:]).transpose(1, 2).reshape(rows.shape)


def as_model_has(rows: Tensor, heads: int) -> Tensor:
    """The other way."""
    return rows.reshape(heads, -1, 2, *rows.shape[1:]).transpose(1, 2).reshape(rows.shape)
