"""A stand-in for baichuan-inc/Baichuan-7B (rotary) and Baichuan-13B-Base (alibi, a mask buffer made when it first runs):

the module tree, names and forward signatures of the two modeling_baichuan.py, the second with `alibi` in the config.
"""

import math

import torch
from torch import nn
from transformers import PretrainedConfig, PreTrainedModel
from transformers.modeling_outputs import BaseModelOutputWithPast, CausalLMOutputWithPast


class BaichuanConfig(PretrainedConfig):
    model_type = "baichuan"

    def __init__(self, vocab_size=320, hidden_size=64, intermediate_size=96, num_hidden_layers=2, num_attention_heads=4,
                 model_max_length=64, rms_norm_eps=1e-6, alibi=False, **kwargs):  # fmt: skip
        self.vocab_size, self.hidden_size, self.intermediate_size = vocab_size, hidden_size, intermediate_size
        self.num_hidden_layers, self.num_attention_heads = num_hidden_layers, num_attention_heads
        self.model_max_length, self.rms_norm_eps, self.alibi = model_max_length, rms_norm_eps, alibi
        super().__init__(tie_word_embeddings=kwargs.pop("tie_word_embeddings", False), **kwargs)


def _gen_alibi_mask(n_head, max_pos):
    slopes = torch.tensor([2 ** (-8 * (head + 1) / n_head) for head in range(n_head)])
    alibi = slopes[:, None, None] * torch.arange(max_pos)[None, None, :].expand(n_head, -1, -1)
    return torch.triu(torch.full((max_pos, max_pos), float("-inf")), 1)[None] + alibi


class RMSNorm(nn.Module):
    def __init__(self, hidden_size, eps):
        super().__init__()
        self.weight, self.epsilon = nn.Parameter(torch.ones(hidden_size)), eps

    def forward(self, hidden_states):
        variance = hidden_states.float().pow(2).mean(-1, keepdim=True)
        return self.weight * (hidden_states * torch.rsqrt(variance + self.epsilon)).to(self.weight.dtype)


class RotaryEmbedding(nn.Module):
    def __init__(self, dim, max_position_embeddings):
        super().__init__()
        inv_freq = 1.0 / (10000 ** (torch.arange(0, dim, 2).float() / dim))
        angles = torch.outer(torch.arange(max_position_embeddings).float(), inv_freq)
        angles = torch.cat((angles, angles), -1)
        self.register_buffer("inv_freq", inv_freq, persistent=False)
        self.register_buffer("cos_cached", angles.cos(), persistent=False)
        self.register_buffer("sin_cached", angles.sin(), persistent=False)

    def forward(self, x, position_ids):
        cos, sin = self.cos_cached[position_ids][:, None], self.sin_cached[position_ids][:, None]
        half = x.shape[-1] // 2
        return x * cos + torch.cat((-x[..., half:], x[..., :half]), -1) * sin


class MLP(nn.Module):
    def __init__(self, config):
        super().__init__()
        self.gate_proj = nn.Linear(config.hidden_size, config.intermediate_size, bias=False)
        self.down_proj = nn.Linear(config.intermediate_size, config.hidden_size, bias=False)
        self.up_proj = nn.Linear(config.hidden_size, config.intermediate_size, bias=False)

    def forward(self, x):
        return self.down_proj(nn.functional.silu(self.gate_proj(x)) * self.up_proj(x))


class Attention(nn.Module):
    def __init__(self, config):
        super().__init__()
        self.num_heads, self.head_dim = config.num_attention_heads, config.hidden_size // config.num_attention_heads
        self.W_pack = nn.Linear(config.hidden_size, 3 * config.hidden_size, bias=False)
        self.o_proj = nn.Linear(config.hidden_size, config.hidden_size, bias=False)
        if not config.alibi:
            self.rotary_emb = RotaryEmbedding(self.head_dim, config.model_max_length)

    def forward(self, hidden_states, attention_mask=None, position_ids=None):
        batch, length, _ = hidden_states.shape
        packed = self.W_pack(hidden_states).unflatten(-1, (3, -1)).unsqueeze(0).transpose(0, -2).squeeze(-2)
        query, key, value = (x.view(batch, length, self.num_heads, self.head_dim).transpose(1, 2) for x in packed)
        if hasattr(self, "rotary_emb"):
            query, key = self.rotary_emb(query, position_ids), self.rotary_emb(key, position_ids)
        weights = query @ key.transpose(2, 3) / math.sqrt(self.head_dim) + attention_mask
        weights = torch.max(weights, torch.tensor(torch.finfo(weights.dtype).min))
        output = (weights.softmax(-1) @ value).transpose(1, 2).reshape(batch, length, -1)
        return self.o_proj(output), None, None


class DecoderLayer(nn.Module):
    """Of the 7B."""

    def __init__(self, config):
        super().__init__()
        self.self_attn = Attention(config)
        self.mlp = MLP(config)
        self.input_layernorm = RMSNorm(config.hidden_size, config.rms_norm_eps)
        self.post_attention_layernorm = RMSNorm(config.hidden_size, config.rms_norm_eps)

    def forward(self, hidden_states, attention_mask=None, position_ids=None, past_key_value=None,
                output_attentions=False, use_cache=False):  # fmt: skip
        attended, _, _ = self.self_attn(self.input_layernorm(hidden_states), attention_mask, position_ids)
        hidden_states = hidden_states + attended
        return (hidden_states + self.mlp(self.post_attention_layernorm(hidden_states)),)


class BaichuanLayer(DecoderLayer):
    """Of the 13B: no position_ids."""

    def forward(self, hidden_states, attention_mask=None, past_key_value=None, output_attentions=False,
                use_cache=False):  # fmt: skip
        return super().forward(hidden_states, attention_mask)


class PreTrained(PreTrainedModel):
    config_class = BaichuanConfig
    base_model_prefix = "model"

    def _init_weights(self, module):
        pass


class Model(PreTrained):
    def __init__(self, config):
        super().__init__(config)
        self.embed_tokens = nn.Embedding(config.vocab_size, config.hidden_size)
        kind = BaichuanLayer if config.alibi else DecoderLayer
        self.layers = nn.ModuleList([kind(config) for _ in range(config.num_hidden_layers)])
        self.norm = RMSNorm(config.hidden_size, config.rms_norm_eps)
        self.first_run = True
        self.post_init()

    def get_input_embeddings(self):
        return self.embed_tokens

    def get_alibi_mask(self, tensor, length):
        if self.first_run:
            self.first_run = False
            mask = _gen_alibi_mask(self.config.num_attention_heads, self.config.model_max_length)
            self.register_buffer("future_mask", mask.to(tensor), persistent=False)
        return self.future_mask[:, :length, :length]

    def forward(self, input_ids=None, attention_mask=None, use_cache=None):
        hidden_states = self.embed_tokens(input_ids)
        length = input_ids.shape[1]
        if self.config.alibi:
            mask = self.get_alibi_mask(hidden_states, length)[None]
        else:
            mask = torch.triu(torch.full((length, length), torch.finfo(hidden_states.dtype).min), 1)[None, None]
            mask = mask.to(hidden_states)
        if attention_mask is not None:
            mask = mask.masked_fill(attention_mask[:, None, None, :] == 0, torch.finfo(hidden_states.dtype).min)
        positions = torch.arange(length, device=input_ids.device)[None]
        for layer in self.layers:
            more = {} if self.config.alibi else {"position_ids": positions}
            outputs = layer(hidden_states, attention_mask=mask, **more, past_key_value=None, output_attentions=False,
                            use_cache=use_cache)  # fmt: skip
            hidden_states = outputs[0]
        return BaseModelOutputWithPast(last_hidden_state=self.norm(hidden_states))


class BaichuanForCausalLM(PreTrained):
    def __init__(self, config):
        super().__init__(config)
        self.model = Model(config)
        self.lm_head = nn.Linear(config.hidden_size, config.vocab_size, bias=False)
        self.post_init()

    def get_output_embeddings(self):
        return self.lm_head

    def forward(self, input_ids=None, attention_mask=None, use_cache=None):
        hidden_states = self.model(input_ids, attention_mask=attention_mask, use_cache=use_cache)[0]
        return CausalLMOutputWithPast(logits=self.lm_head(hidden_states))
