"""A stand-in for THUDM/chatglm3-6b: the module tree, names and forward signatures of its modeling_chatglm.py.

Hidden states run through its blocks as [length, batch, hidden].
"""

import torch
from torch import nn
from transformers import PretrainedConfig, PreTrainedModel
from transformers.modeling_outputs import BaseModelOutputWithPast, CausalLMOutputWithPast


class ChatGLMConfig(PretrainedConfig):
    model_type = "chatglm"

    def __init__(self, num_layers=2, padded_vocab_size=320, hidden_size=64, ffn_hidden_size=96, kv_channels=16,
                 num_attention_heads=4, multi_query_group_num=2, seq_length=64, layernorm_epsilon=1e-5,
                 **kwargs):  # fmt: skip
        self.num_layers, self.vocab_size, self.padded_vocab_size = num_layers, padded_vocab_size, padded_vocab_size
        self.hidden_size, self.ffn_hidden_size, self.kv_channels = hidden_size, ffn_hidden_size, kv_channels
        self.num_attention_heads, self.multi_query_group_num = num_attention_heads, multi_query_group_num
        self.seq_length, self.layernorm_epsilon = seq_length, layernorm_epsilon
        kwargs.pop("vocab_size", None)
        super().__init__(tie_word_embeddings=kwargs.pop("tie_word_embeddings", False), **kwargs)


class RMSNorm(nn.Module):
    def __init__(self, size, eps):
        super().__init__()
        self.weight, self.eps = nn.Parameter(torch.ones(size)), eps

    def forward(self, hidden_states):
        variance = hidden_states.float().pow(2).mean(-1, keepdim=True)
        return self.weight * (hidden_states * torch.rsqrt(variance + self.eps)).to(hidden_states.dtype)


class RotaryEmbedding(nn.Module):
    def __init__(self, dim):
        super().__init__()
        self.dim = dim
        self.register_buffer("inv_freq", 1.0 / (10000 ** (torch.arange(0, dim, 2).float() / dim)), persistent=False)

    def forward(self, length):
        angles = torch.outer(torch.arange(length, device=self.inv_freq.device).float(), self.inv_freq)
        return torch.stack((angles.cos(), angles.sin()), -1)  # [length, dim / 2, 2]


def apply_rotary_pos_emb(x, rope_cache):
    size = rope_cache.shape[-2] * 2  # x: [length, batch, heads, head_dim], its first half is turned
    turned, kept = x[..., :size].unflatten(-1, (-1, 2)), x[..., size:]
    cos, sin = rope_cache[:, None, None, :, 0], rope_cache[:, None, None, :, 1]
    a, b = turned[..., 0], turned[..., 1]
    return torch.cat((torch.stack((a * cos - b * sin, b * cos + a * sin), -1).flatten(-2), kept), -1)


class SelfAttention(nn.Module):
    def __init__(self, config, layer_number):
        super().__init__()
        self.layer_number, self.heads, self.size = layer_number, config.num_attention_heads, config.kv_channels
        self.groups = config.multi_query_group_num
        projection = self.heads * self.size
        self.query_key_value = nn.Linear(config.hidden_size, projection + 2 * self.size * self.groups)
        self.dense = nn.Linear(projection, config.hidden_size, bias=False)

    def forward(self, hidden_states, attention_mask, rotary_pos_emb, kv_cache=None, use_cache=True):
        length, batch, _ = hidden_states.shape
        sizes = [self.heads * self.size, self.groups * self.size, self.groups * self.size]
        mixed = self.query_key_value(hidden_states).split(sizes, -1)
        query, key, value = (x.view(length, batch, -1, self.size) for x in mixed)
        query, key = apply_rotary_pos_emb(query, rotary_pos_emb), apply_rotary_pos_emb(key, rotary_pos_emb)
        key, value = (x.repeat_interleave(self.heads // self.groups, 2) for x in (key, value))
        query, key, value = (x.permute(1, 2, 0, 3) for x in (query, key, value))
        mask = None if attention_mask is None else ~attention_mask
        output = nn.functional.scaled_dot_product_attention(query, key, value, mask, is_causal=mask is None)
        return self.dense(output.permute(2, 0, 1, 3).reshape(length, batch, -1)), kv_cache


class MLP(nn.Module):
    def __init__(self, config):
        super().__init__()
        self.dense_h_to_4h = nn.Linear(config.hidden_size, config.ffn_hidden_size * 2, bias=False)
        self.dense_4h_to_h = nn.Linear(config.ffn_hidden_size, config.hidden_size, bias=False)

    def forward(self, hidden_states):
        gate, up = self.dense_h_to_4h(hidden_states).chunk(2, dim=-1)
        return self.dense_4h_to_h(nn.functional.silu(gate) * up)


class GLMBlock(nn.Module):
    def __init__(self, config, layer_number):
        super().__init__()
        self.layer_number = layer_number
        self.input_layernorm = RMSNorm(config.hidden_size, config.layernorm_epsilon)
        self.self_attention = SelfAttention(config, layer_number)
        self.post_attention_layernorm = RMSNorm(config.hidden_size, config.layernorm_epsilon)
        self.mlp = MLP(config)

    def forward(self, hidden_states, attention_mask, rotary_pos_emb, kv_cache=None, use_cache=True):
        attended, kv_cache = self.self_attention(
            self.input_layernorm(hidden_states), attention_mask, rotary_pos_emb, kv_cache=kv_cache, use_cache=use_cache
        )
        hidden_states = hidden_states + attended
        return hidden_states + self.mlp(self.post_attention_layernorm(hidden_states)), kv_cache


class GLMTransformer(nn.Module):
    def __init__(self, config):
        super().__init__()
        self.layers = nn.ModuleList([GLMBlock(config, i + 1) for i in range(config.num_layers)])
        self.final_layernorm = RMSNorm(config.hidden_size, config.layernorm_epsilon)

    def forward(self, hidden_states, attention_mask, rotary_pos_emb, use_cache=True):
        for layer in self.layers:
            hidden_states, _ = layer(hidden_states, attention_mask, rotary_pos_emb, kv_cache=None, use_cache=use_cache)
        return self.final_layernorm(hidden_states)


class Embedding(nn.Module):
    def __init__(self, config):
        super().__init__()
        self.word_embeddings = nn.Embedding(config.padded_vocab_size, config.hidden_size)

    def forward(self, input_ids):
        return self.word_embeddings(input_ids).transpose(0, 1).contiguous()


class ChatGLMPreTrainedModel(PreTrainedModel):
    config_class = ChatGLMConfig
    base_model_prefix = "transformer"

    def _init_weights(self, module):
        pass


class ChatGLMModel(ChatGLMPreTrainedModel):
    def __init__(self, config):
        super().__init__(config)
        self.embedding = Embedding(config)
        self.rotary_pos_emb = RotaryEmbedding(config.kv_channels // 2)
        self.encoder = GLMTransformer(config)
        self.output_layer = nn.Linear(config.hidden_size, config.padded_vocab_size, bias=False)
        self.post_init()

    def get_input_embeddings(self):
        return self.embedding.word_embeddings

    def get_masks(self, input_ids, padding_mask):
        length = input_ids.shape[1]
        allowed = torch.ones(length, length, device=input_ids.device).tril()[None] * padding_mask[:, None, :]
        allowed = allowed - (padding_mask[:, :, None] - 1)  # padding sees everything: no row may be empty
        return (allowed < 0.5)[:, None]

    def forward(self, input_ids, attention_mask=None, use_cache=None):
        full = None
        if attention_mask is not None and not attention_mask.all():
            full = self.get_masks(input_ids, attention_mask)
        rotary_pos_emb = self.rotary_pos_emb(input_ids.shape[1])
        hidden_states = self.encoder(
            self.embedding(input_ids), full, rotary_pos_emb=rotary_pos_emb, use_cache=use_cache
        )
        return BaseModelOutputWithPast(last_hidden_state=hidden_states)


class ChatGLMForConditionalGeneration(ChatGLMPreTrainedModel):
    def __init__(self, config):
        super().__init__(config)
        self.transformer = ChatGLMModel(config)
        self.post_init()

    def forward(self, input_ids=None, attention_mask=None, use_cache=None):
        hidden_states = self.transformer(input_ids, attention_mask=attention_mask, use_cache=use_cache)[0]
        logits = self.transformer.output_layer(hidden_states).transpose(0, 1).contiguous()
        return CausalLMOutputWithPast(logits=logits)
