"""A stand-in for tiiuae/falcon-7b of early 2023 (model type RefinedWebModel; falcon-40b: RefinedWeb): its modelling_RW.py
became transformers' own Falcon, with the same module tree and, but for the rotary embeddings, the same signatures."""

from transformers import FalconConfig, FalconForCausalLM


class RWConfig(FalconConfig):
    model_type = "RefinedWebModel"
    attribute_map = {"n_layer": "num_hidden_layers", "n_head": "num_attention_heads"}


class RWForCausalLM(FalconForCausalLM):
    config_class = RWConfig


class RW40bConfig(RWConfig):
    model_type = "RefinedWeb"


class RW40bForCausalLM(FalconForCausalLM):
    config_class = RW40bConfig
