"""A stand-in for fnlp/moss-moon-003-base: the module tree, names and forward signatures of its modeling_moss.py."""

import torch
from torch import nn
from transformers import PretrainedConfig, PreTrainedModel
from transformers.modeling_outputs import BaseModelOutputWithPast, CausalLMOutputWithPast


class MossConfig(PretrainedConfig):
    model_type = "moss"
    attribute_map = {"hidden_size": "n_embd", "num_attention_heads": "n_head", "num_hidden_layers": "n_layer"}

    def __init__(self, vocab_size=320, n_positions=64, n_embd=64, n_layer=2, n_head=4, rotary_dim=8, **kwargs):
        self.vocab_size, self.n_positions, self.n_embd = vocab_size, n_positions, n_embd
        self.n_layer, self.n_head, self.rotary_dim = n_layer, n_head, rotary_dim
        super().__init__(tie_word_embeddings=kwargs.pop("tie_word_embeddings", False), **kwargs)


def create_sinusoidal_positions(num_pos, dim):
    inv_freq = 1.0 / (10000 ** (torch.arange(0, dim, 2) / dim))
    angles = torch.outer(torch.arange(num_pos, dtype=torch.float), inv_freq)
    return torch.cat((torch.sin(angles), torch.cos(angles)), dim=1)


def apply_rotary_pos_emb(x, sin, cos):
    sin, cos = (each[:, :, None, :].repeat_interleave(2, 3) for each in (sin, cos))
    turned = torch.stack((-x[..., 1::2], x[..., ::2]), -1).flatten(-2)
    return x * cos + turned * sin


class MossAttention(nn.Module):
    def __init__(self, config):
        super().__init__()
        mask = torch.tril(torch.ones((config.n_positions, config.n_positions), dtype=torch.bool))
        self.register_buffer("causal_mask", mask.view(1, 1, config.n_positions, config.n_positions), persistent=False)
        self.heads, self.size, self.rotary_dim = config.n_head, config.n_embd // config.n_head, config.rotary_dim
        self.qkv_proj = nn.Linear(config.n_embd, config.n_embd * 3, bias=False)
        self.out_proj = nn.Linear(config.n_embd, config.n_embd, bias=False)
        positions = create_sinusoidal_positions(config.n_positions, config.rotary_dim)
        self.register_buffer("embed_positions", positions, persistent=False)

    def forward(self, hidden_states, layer_past=None, attention_mask=None, position_ids=None, head_mask=None,
                use_cache=False, output_attentions=False):  # fmt: skip
        shape = (*hidden_states.shape[:2], self.heads, self.size)
        query, value, key = (each.reshape(shape) for each in self.qkv_proj(hidden_states).chunk(3, -1))
        sin, cos = self.embed_positions[position_ids].chunk(2, -1)
        query, key = (
            torch.cat((apply_rotary_pos_emb(x[..., : self.rotary_dim], sin, cos), x[..., self.rotary_dim :]), -1)
            for x in (query, key)
        )
        weights = query.transpose(1, 2) @ key.transpose(1, 2).transpose(-1, -2) / self.size**0.5
        length = weights.shape[-1]
        weights = torch.where(self.causal_mask[:, :, :length, :length], weights, torch.finfo(weights.dtype).min)
        if attention_mask is not None:
            weights = weights + attention_mask
        output = (weights.softmax(-1) @ value.transpose(1, 2)).transpose(1, 2).reshape(hidden_states.shape)
        return self.out_proj(output), None


class MossMLP(nn.Module):
    def __init__(self, config):
        super().__init__()
        self.fc_in = nn.Linear(config.n_embd, 4 * config.n_embd)
        self.fc_out = nn.Linear(4 * config.n_embd, config.n_embd)

    def forward(self, hidden_states):
        return self.fc_out(nn.functional.gelu(self.fc_in(hidden_states), approximate="tanh"))


class MossBlock(nn.Module):
    def __init__(self, config):
        super().__init__()
        self.ln_1 = nn.LayerNorm(config.n_embd)
        self.attn = MossAttention(config)
        self.mlp = MossMLP(config)

    def forward(self, hidden_states, layer_past=None, attention_mask=None, position_ids=None, head_mask=None,
                use_cache=False, output_attentions=False):  # fmt: skip
        residual = hidden_states
        hidden_states = self.ln_1(hidden_states)
        attn_outputs = self.attn(
            hidden_states=hidden_states, layer_past=layer_past, attention_mask=attention_mask,
            position_ids=position_ids, head_mask=head_mask, use_cache=use_cache, output_attentions=output_attentions,
        )  # fmt: skip
        return (attn_outputs[0] + self.mlp(hidden_states) + residual, *attn_outputs[1:])


class MossPreTrainedModel(PreTrainedModel):
    config_class = MossConfig
    base_model_prefix = "transformer"
    _no_split_modules = ["MossBlock"]

    def _init_weights(self, module):
        pass


class MossModel(MossPreTrainedModel):
    def __init__(self, config):
        super().__init__(config)
        self.wte = nn.Embedding(config.vocab_size, config.n_embd)
        self.drop = nn.Dropout(0.0)
        self.h = nn.ModuleList([MossBlock(config) for _ in range(config.n_layer)])
        self.ln_f = nn.LayerNorm(config.n_embd)
        self.post_init()

    def get_input_embeddings(self):
        return self.wte

    def forward(self, input_ids=None, attention_mask=None, use_cache=None):
        position_ids = torch.arange(input_ids.shape[1], device=input_ids.device)[None]
        mask = None
        if attention_mask is not None:
            mask = (1.0 - attention_mask[:, None, None, :].to(self.dtype)) * torch.finfo(self.dtype).min
        hidden_states = self.drop(self.wte(input_ids))
        for block in self.h:
            outputs = block(
                hidden_states, layer_past=None, attention_mask=mask, position_ids=position_ids, head_mask=None,
                use_cache=use_cache, output_attentions=False,
            )  # fmt: skip
            hidden_states = outputs[0]
        return BaseModelOutputWithPast(last_hidden_state=self.ln_f(hidden_states))


class MossForCausalLM(MossPreTrainedModel):
    def __init__(self, config):
        super().__init__(config)
        self.transformer = MossModel(config)
        self.lm_head = nn.Linear(config.n_embd, config.vocab_size)
        self.post_init()

    def get_output_embeddings(self):
        return self.lm_head

    def forward(self, input_ids=None, attention_mask=None, use_cache=None):
        hidden_states = self.transformer(input_ids, attention_mask=attention_mask, use_cache=use_cache)[0]
        return CausalLMOutputWithPast(logits=self.lm_head(hidden_states).to(torch.float32))
