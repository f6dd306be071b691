"""A stand-in for Qwen/Qwen-7B (the first Qwen): the module tree, names and forward signatures of its modeling_qwen.py."""

import torch
from torch import nn
from transformers import PretrainedConfig, PreTrainedModel
from transformers.modeling_outputs import BaseModelOutputWithPast, CausalLMOutputWithPast


class QWenConfig(PretrainedConfig):
    model_type = "qwen"

    def __init__(self, vocab_size=320, hidden_size=64, num_hidden_layers=2, num_attention_heads=4, kv_channels=16,
                 intermediate_size=192, seq_length=64, layer_norm_epsilon=1e-6, no_bias=True, **kwargs):  # fmt: skip
        self.vocab_size, self.hidden_size, self.intermediate_size = vocab_size, hidden_size, intermediate_size
        self.num_hidden_layers, self.num_attention_heads = num_hidden_layers, num_attention_heads
        self.kv_channels, self.seq_length, self.no_bias = kv_channels, seq_length, no_bias
        self.layer_norm_epsilon = layer_norm_epsilon
        super().__init__(tie_word_embeddings=kwargs.pop("tie_word_embeddings", False), **kwargs)


class RMSNorm(nn.Module):
    def __init__(self, dim, eps):
        super().__init__()
        self.eps, self.weight = eps, nn.Parameter(torch.ones(dim))

    def forward(self, x):
        return (x.float() * torch.rsqrt(x.float().pow(2).mean(-1, keepdim=True) + self.eps)).type_as(x) * self.weight


class RotaryEmbedding(nn.Module):
    def __init__(self, dim):
        super().__init__()
        self.register_buffer("inv_freq", 1.0 / (10000 ** (torch.arange(0, dim, 2).float() / dim)), persistent=False)

    def forward(self, length):
        angles = torch.outer(torch.arange(length, device=self.inv_freq.device).float(), self.inv_freq)
        angles = torch.cat((angles, angles), -1)[None, :, None, :]
        return [angles.cos(), angles.sin()]


class QWenAttention(nn.Module):
    def __init__(self, config):
        super().__init__()
        self.num_heads, self.head_dim = config.num_attention_heads, config.kv_channels
        projection = config.kv_channels * config.num_attention_heads
        self.c_attn = nn.Linear(config.hidden_size, 3 * projection)
        self.c_proj = nn.Linear(config.hidden_size, projection, bias=not config.no_bias)

    def forward(self, hidden_states, rotary_pos_emb_list=None, registered_causal_mask=None, layer_past=None,
                attention_mask=None, head_mask=None, encoder_hidden_states=None, encoder_attention_mask=None,
                output_attentions=False, use_cache=False):  # fmt: skip
        batch, length, _ = hidden_states.shape
        query, key, value = (x.view(batch, length, self.num_heads, self.head_dim)
                             for x in self.c_attn(hidden_states).chunk(3, 2))  # fmt: skip
        cos, sin = rotary_pos_emb_list[0]
        half = self.head_dim // 2
        query, key = (x * cos + torch.cat((-x[..., half:], x[..., :half]), -1) * sin for x in (query, key))
        weights = query.transpose(1, 2) @ key.permute(0, 2, 3, 1) / self.head_dim**0.5
        future = torch.ones(length, length, dtype=torch.bool, device=weights.device).triu(1)
        weights = weights.masked_fill(future, torch.finfo(weights.dtype).min)
        if attention_mask is not None:
            weights = weights + attention_mask
        output = (weights.softmax(-1) @ value.transpose(1, 2)).transpose(1, 2).reshape(batch, length, -1)
        return self.c_proj(output), None


class QWenMLP(nn.Module):
    def __init__(self, config):
        super().__init__()
        self.w1 = nn.Linear(config.hidden_size, config.intermediate_size // 2, bias=not config.no_bias)
        self.w2 = nn.Linear(config.hidden_size, config.intermediate_size // 2, bias=not config.no_bias)
        self.c_proj = nn.Linear(config.intermediate_size // 2, config.hidden_size, bias=not config.no_bias)

    def forward(self, hidden_states):
        return self.c_proj(self.w1(hidden_states) * nn.functional.silu(self.w2(hidden_states)))


class QWenBlock(nn.Module):
    def __init__(self, config):
        super().__init__()
        self.ln_1 = RMSNorm(config.hidden_size, config.layer_norm_epsilon)
        self.attn = QWenAttention(config)
        self.ln_2 = RMSNorm(config.hidden_size, config.layer_norm_epsilon)
        self.mlp = QWenMLP(config)

    def forward(self, hidden_states, rotary_pos_emb_list=None, registered_causal_mask=None, layer_past=None,
                attention_mask=None, head_mask=None, encoder_hidden_states=None, encoder_attention_mask=None,
                use_cache=False, output_attentions=False):  # fmt: skip
        attn_outputs = self.attn(
            self.ln_1(hidden_states), rotary_pos_emb_list, registered_causal_mask=registered_causal_mask,
            layer_past=layer_past, attention_mask=attention_mask, head_mask=head_mask, use_cache=use_cache,
            output_attentions=output_attentions,
        )  # fmt: skip
        hidden_states = attn_outputs[0] + hidden_states
        return (self.mlp(self.ln_2(hidden_states)) + hidden_states, *attn_outputs[1:])


class QWenPreTrainedModel(PreTrainedModel):
    config_class = QWenConfig
    base_model_prefix = "transformer"

    def _init_weights(self, module):
        pass


class QWenModel(QWenPreTrainedModel):
    def __init__(self, config):
        super().__init__(config)
        self.wte = nn.Embedding(config.vocab_size, config.hidden_size)
        self.drop = nn.Dropout(0.0)
        self.rotary_emb = RotaryEmbedding(config.kv_channels)
        self.h = nn.ModuleList([QWenBlock(config) for _ in range(config.num_hidden_layers)])
        self.ln_f = RMSNorm(config.hidden_size, config.layer_norm_epsilon)
        self.post_init()

    def get_input_embeddings(self):
        return self.wte

    def forward(self, input_ids=None, attention_mask=None, use_cache=None):
        mask = None
        if attention_mask is not None:
            mask = (1.0 - attention_mask[:, None, None, :].to(self.dtype)) * torch.finfo(self.dtype).min
        rotary_pos_emb_list = [self.rotary_emb(input_ids.shape[1])]
        hidden_states = self.drop(self.wte(input_ids))
        for block in self.h:
            outputs = block(
                hidden_states, layer_past=None, rotary_pos_emb_list=rotary_pos_emb_list, registered_causal_mask=None,
                attention_mask=mask, head_mask=None, encoder_hidden_states=None, encoder_attention_mask=None,
                use_cache=use_cache, output_attentions=False,
            )  # fmt: skip
            hidden_states = outputs[0]
        return BaseModelOutputWithPast(last_hidden_state=self.ln_f(hidden_states))


class QWenLMHeadModel(QWenPreTrainedModel):
    def __init__(self, config):
        super().__init__(config)
        self.transformer = QWenModel(config)
        self.lm_head = nn.Linear(config.hidden_size, config.vocab_size, bias=False)
        self.post_init()

    def get_output_embeddings(self):
        return self.lm_head

    def forward(self, input_ids=None, attention_mask=None, use_cache=None):
        hidden_states = self.transformer(input_ids, attention_mask=attention_mask, use_cache=use_cache)[0]
        return CausalLMOutputWithPast(logits=self.lm_head(hidden_states))
