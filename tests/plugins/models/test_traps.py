"""What models do that a walk over blocks must not stumble over, and models that are no business of ours."""

import dataclasses
import re

import pytest
import torch
import transformers
from torch import nn
from zoo import COMMON, EXPERTS, GROUPED, HYBRID, build, enliven

import qcore
from qcore import ModelAdapter, ModelError
from qcore import blocks as walk
from qcore.checkpoint import ModelFolder
from qcore.discovery import _merge, check_causal, find_adapter
from qcore.experts import Experts, is_fused, unfuse
from qcore.plugins import installed
from qcore.streaming import ModuleWeights
from qcore.testing import TinyBlock, TinyModel, check_adapter, tiny_tokens, with_tiny_adapter

SETTINGS = {"group_size": 32, "seqlen": 32}


def logits(model, ids):
    with torch.no_grad():
        return model(input_ids=ids, use_cache=False).logits


# ---- mixture of experts ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["mixtral", "qwen3_moe", "deepseek_v3", "gpt_oss", "granitemoe", "olmoe"])
def test_taking_experts_apart_changes_nothing(name, tokens):
    model = build(name)
    ids = torch.stack(tokens)
    expected = logits(model, ids)
    assert any(is_fused(module) for module in model.modules())
    unfuse(model)
    assert not any(is_fused(module) for module in model.modules())
    assert not [key for key, parameter in model.named_parameters() if parameter.ndim > 2]
    torch.testing.assert_close(logits(model, ids), expected, rtol=1e-4, atol=1e-5)


def test_an_expert_that_every_token_is_run_through_gives_what_its_own_tokens_give(tokens):
    model = unfuse(build("mixtral"))
    expected = logits(model, torch.stack(tokens))
    for module in model.modules():
        if isinstance(module, Experts):
            module.widened.update({0, 2})
    torch.testing.assert_close(logits(model, torch.stack(tokens)), expected, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize(
    ("name", "linear"),
    [
        ("mixtral", "model.layers.0.block_sparse_moe.experts.3.w2"),
        ("qwen3_moe", "model.layers.1.mlp.experts.0.gate_proj"),
        ("deepseek_v3", "model.layers.1.mlp.experts.2.down_proj"),
        ("gpt_oss", "model.layers.0.mlp.experts.1.up_proj"),
    ],
)
def test_experts_are_saved_one_by_one_under_the_names_that_readers_know(name, linear, tmp_path, tokens):
    build(name).save_pretrained(tmp_path / "float")
    out = qcore.quantize(tmp_path / "float", "rtn", group_size=32, output=tmp_path / "out")
    saved = set(ModelFolder(out).tensors)
    assert {f"{linear}.{part}" for part in ("qweight", "qzeros", "scales", "g_idx")} <= saved
    assert not [key for key in saved if key.endswith(("gate_up_proj", "experts.down_proj"))]
    report = qcore.report(qcore.load(out))
    assert {f"{layer['name']}.qweight" for layer in qcore.inspect(out)["layers"]} <= saved
    assert linear.replace("block_sparse_moe", "mlp") in {layer["name"] for layer in report["layers"]}


@pytest.mark.parametrize("name", ["mixtral", "gpt_oss"])  # experts one by one on disk, and fused
def test_experts_may_stay_in_float_one_by_one(name, tmp_path, tokens):
    model = build(name)
    model.save_pretrained(tmp_path / "float")
    settings = {"overrides": ["model.layers.0.mlp.experts.1.*:skip"], "bits": 8, "group_size": 32}
    qcore.quantize(model, "rtn", **settings)
    out = qcore.quantize(tmp_path / "float", "rtn", output=tmp_path / "out", **settings)
    kept = [key for key in ModelFolder(out).tensors if "layers.0" in key and ".experts.1." in key]
    assert sorted({key.rpartition(".")[2] for key in kept}) == (["weight"] if name == "mixtral" else ["bias", "weight"])
    again = qcore.load(out)
    assert isinstance(
        again.model.layers[0].mlp.experts.get_submodule("1.w1" if name == "mixtral" else "1.up_proj"), nn.Linear
    )
    assert torch.equal(logits(again, tokens[0][None]), logits(model, tokens[0][None]))


def test_starved_experts_are_calibrated_on_all_tokens_and_reported(tokens):
    model = build("mixtral", num_local_experts=6, num_experts=6)
    with torch.no_grad():  # of 0 to 3 two are always above zero, so that nothing is left for 4 and 5
        gate = model.model.layers[0].mlp.gate.weight
        gate[1], gate[3], gate[4:] = -gate[0], -gate[2], 0
    qcore.quantize(model, "gptq", calibration=tokens[:2], **SETTINGS)
    layers = {layer["name"]: layer for layer in qcore.report(model)["layers"]}
    starved = [name for name in layers if "calibrated on all" in layers[name].get("note", "")]
    assert all(".experts." in name for name in starved)
    for expert in (4, 5):
        for linear in ("w1", "w3", "w2"):
            layer = layers[f"model.layers.0.mlp.experts.{expert}.{linear}"]
            assert layer["note"] == "0 of 64 tokens routed here: calibrated on all"
            assert (
                layer["error"] is not None
            )  # an expert that saw nothing would be rounded blindly, without an error to tell
            assert layer["error"] < 0.2


def test_what_holds_experts_in_an_unknown_way_is_left_alone_and_said():
    class Odd(nn.Module):
        def __init__(self):
            super().__init__()
            self.weights = nn.Parameter(torch.zeros(4, 8, 8))

    assert not is_fused(Odd())
    fused = next(module for module in build("mixtral").modules() if is_fused(module))
    fused.register_parameter("extra", nn.Parameter(torch.zeros(1)))
    assert not is_fused(fused)


# ---- finding blocks and groups ---------------------------------------------------------------------------------------


def test_kinds_of_blocks_that_share_differently_get_groups_right_for_each():
    one = [("q", "k", "v"), ("o",), ("up",)]
    other = [("q", "k"), ("v",), ("o", "up")]
    assert _merge([one, other]) == [("q", "k"), ("v",), ("o",), ("up",)]
    assert _merge([one, [("gate",), ("q", "k", "v")]]) == [("q", "k", "v"), ("o",), ("up",), ("gate",)]


@pytest.mark.parametrize(
    ("name", "note"),
    [
        ("jamba", r"did not see mamba.dt_proj used as plain linears; they stay in float"),
        ("llama4_text", r"did not see feed_forward.router used as plain linears"),
        ("llama4_text", r"leaves 147,456 weights in float that are in no linear \(model.layers.0.feed_forward.experts"),
        ("hunyuan_v1_moe", r"took mlp.gate.wg for routers"),
        ("qwen2_moe", r"took mlp.shared_expert_gate for routers"),
    ],
)
def test_what_the_generic_adapter_leaves_in_float_is_said(name, note):
    model = unfuse(build(name))
    adapter = find_adapter(model, ModuleWeights(model), installed(), torch.device("cpu"), "generic")
    assert [found for found in adapter.notes if re.search(note, found)], adapter.notes


def test_a_block_of_several_streams_a_token_is_no_cause_to_call_a_model_not_causal():
    class Streams(nn.Module):
        """As DeepSeek V4's blocks: hidden states [batch, length, streams, hidden]; the streams of a token mix."""

        def __init__(self, looks_ahead):
            super().__init__()
            self.looks_ahead = looks_ahead

        def forward(self, x):
            return x + x.mean(2, keepdim=True) + (x.flip(1) if self.looks_ahead else 0)

    hidden = torch.randn(1, 6, 4, 8, generator=torch.Generator().manual_seed(0))
    check_causal(Streams(False), hidden, {}, "Model")
    with pytest.raises(ModelError, match="Model is no causal language model"):
        check_causal(Streams(True), hidden, {}, "Model")


class Upset(TinyBlock):
    """A block that writes into the output of its last linear, and into the input it was given."""

    def forward(self, hidden_states, scale=1.0):
        mixed = self.out(torch.tanh(self.left(hidden_states) * self.right(hidden_states)))
        y = self.down(nn.functional.silu(self.gate(hidden_states)) * self.up(hidden_states))
        mixed += y
        return hidden_states + scale * mixed


def test_outputs_that_a_block_writes_into_are_computed_again():
    class Model(TinyModel):
        def __init__(self):
            super().__init__()
            self.blocks = nn.ModuleList(Upset(64, 96) for _ in range(2))
            enliven(self)
            self.requires_grad_(False)

    seen = {}

    class Watching(qcore.Algorithm):
        name = "watching"

        def quantize_block(self, block):
            rtn = installed().get("algorithm", "rtn")().quantize_block(block)
            for name in rtn:
                block.replace(name, rtn[name])
            for _ in range(3):
                for hidden, kwargs, _mask in block.batches():
                    with walk._Memoised(block, 0):
                        seen.setdefault(block.name, []).append(block.forward(hidden, kwargs).clone())
            return rtn

    settings = {"group_size": 32, "calibration": tiny_tokens(1), "adapter": "tiny", "plugins": with_tiny_adapter()}
    qcore.quantize(Model(), Watching(), **settings)
    assert all(torch.equal(outputs[0], other) for outputs in seen.values() for other in outputs)


@pytest.mark.parametrize(
    ("changes", "says"),
    [
        ({"before_blocks": ("embed", "positions")}, "TinyModel has no module positions"),
        ({"after_blocks": ("norm",)}, "TinyModel has no module norm"),
        ({"linear_groups": (*TinyModel.adapter.linear_groups, ("extra",))}, r"no block of TinyModel has a linear \('extra'"),
        ({"linear_groups": TinyModel.adapter.linear_groups[:-1]}, r"Add the missing ones \(down\)"),
        ({"blocks": "layers"}, "expects decoder blocks at 'layers'"),
    ],
)  # fmt: skip
def test_the_conformance_kit_catches_a_wrong_declaration(changes, says):
    with pytest.raises((AssertionError, ModelError), match=says):
        check_adapter(dataclasses.replace(TinyModel.adapter, **changes), TinyModel())


def test_a_declaration_may_keep_linears_in_float(weights_of):
    groups = (("left", "right"), ("out",), ("up",), ("down",))
    adapter = ModelAdapter("tiny", (), "blocks", groups, ("embed",), keep_float=("gate",))
    plugins = installed().__class__()
    plugins.all[0].offers.append(("model", "tiny", adapter))
    model = qcore.quantize(TinyModel(), "rtn", group_size=32, adapter="tiny", plugins=plugins)
    assert isinstance(model.blocks[0].gate, nn.Linear)
    assert len(weights_of(model)) == 10


# ---- models of several parts -----------------------------------------------------------------------------------------


VISION = {
    "hidden_size": 96, "intermediate_size": 384, "num_hidden_layers": 4, "num_attention_heads": 4, "image_size": 28,
    "patch_size": 14,
}  # fmt: skip
TEXT = {**COMMON, **GROUPED, "head_dim": 16, "sliding_window": 8}
ROTARY = {"rope_type": "default", "rope_theta": 1e4, "mrope_section": [2, 3, 3], "partial_rotary_factor": 1.0}
QWEN_TEXT = {**TEXT, "rope_parameters": ROTARY}
QWEN = {"image_token_id": 310, "video_token_id": 311, "vision_start_token_id": 312, "vision_end_token_id": 313}
QWEN_VISION = {"depth": 2, "hidden_size": 64, "num_heads": 2}


@pytest.mark.parametrize(
    ("model_type", "config"),
    [
        ("gemma3", {"text_config": TEXT, "vision_config": VISION, "mm_tokens_per_image": 4, "image_token_id": 310,
                    "boi_token_index": 311, "eoi_token_index": 312}),
        ("llava", {"text_config": {**TEXT, "model_type": "llama"}, "image_token_index": 310,
                   "vision_config": {**VISION, "model_type": "clip_vision_model"}}),
        ("qwen2_vl", {**QWEN, "text_config": QWEN_TEXT, "vision_config": {**QWEN_VISION, "embed_dim": 32}}),
        # transformers can open this one as a language model alone, which would lose its vision part
        ("qwen3_5", {**QWEN, "text_config": {**QWEN_TEXT, **HYBRID}, "vision_config": {
            **QWEN_VISION, "out_hidden_size": 64, "intermediate_size": 64, "num_position_embeddings": 16}}),
    ],
)  # fmt: skip
def test_only_the_language_model_of_a_vision_model_is_quantized_and_that_is_said(model_type, config, tmp_path, tokens):
    auto = transformers.AutoModelForImageTextToText
    with torch.random.fork_rng(devices=[]):
        model = auto.from_config(transformers.AutoConfig.for_model(model_type, **config)).eval()
    enliven(model)
    model.save_pretrained(tmp_path / "float")
    ids = tokens[0][None] % 300 + 5
    expected = logits(model, ids)
    settings = {"bits": 8, "calibration": [row % 300 + 5 for row in tokens], **SETTINGS}
    qcore.quantize(model, "gptq", **settings)
    found = logits(model, ids)
    assert all("language_model" in layer["name"] for layer in qcore.report(model)["layers"])
    assert any("language model" in note and "stay in float" in note for note in qcore.report(model)["assumed"])
    assert float((found - expected).norm() / expected.norm()) < 0.03
    out = qcore.quantize(tmp_path / "float", "gptq", output=tmp_path / "out", **settings)
    for again in (qcore.load(out), qcore.load(qcore.save(model, tmp_path / "saved"))):
        assert type(again) is type(model)
        assert torch.equal(logits(again, ids), found)
    seen = {key for key in ModelFolder(tmp_path / "float").tensors if "vis" in key}
    assert seen
    assert seen <= set(ModelFolder(out).tensors)


# ---- bad input -------------------------------------------------------------------------------------------------------


def test_a_model_whose_tokens_see_later_ones_is_refused(tmp_path):
    model = build("bert", **COMMON)
    with pytest.raises(ModelError, match="no causal language model: in its block BertLayer earlier tokens see later"):
        qcore.quantize(model, "rtn", group_size=32)
    model.save_pretrained(tmp_path / "bert")
    with pytest.raises(ModelError, match="look for is_decoder in its config"):
        qcore.quantize(tmp_path / "bert", "rtn", group_size=32, output=tmp_path / "out")
    qcore.quantize(build("bert", **COMMON, is_decoder=True), "rtn", group_size=32)


def test_encoder_decoder_models_are_refused_in_memory_as_in_a_folder(tmp_path):
    config = transformers.T5Config(vocab_size=64, d_model=32, d_kv=8, d_ff=64, num_layers=2, num_heads=4)
    model = transformers.T5ForConditionalGeneration(config)
    with pytest.raises(ModelError, match=r"T5ForConditionalGeneration is an encoder-decoder model \(t5\)"):
        qcore.quantize(model, "rtn", group_size=32)
    model.save_pretrained(tmp_path / "t5")
    with pytest.raises(ModelError, match=r"t5 is an encoder-decoder model \(t5\); qcore quantizes causal ones"):
        qcore.quantize(tmp_path / "t5", "rtn", group_size=32, output=tmp_path / "out")


def test_a_model_that_is_no_language_model_is_refused(tmp_path):
    config = transformers.ViTConfig(hidden_size=32, num_hidden_layers=1, num_attention_heads=2, intermediate_size=64)
    transformers.ViTModel(config).save_pretrained(tmp_path / "vit")
    with pytest.raises(ModelError, match=r"type 'vit', for which transformers has no causal language model"):
        qcore.quantize(tmp_path / "vit", "rtn", group_size=32, output=tmp_path / "out")


def test_a_folder_whose_tensors_transformers_merges_is_refused_with_what_helps(tmp_path, tokens):
    layers = ["linear_attention", "full_attention"]
    model = build("olmo_hybrid", layer_types=layers, linear_num_key_heads=8, linear_num_value_heads=8,
                  linear_key_head_dim=8, linear_value_head_dim=8)  # fmt: skip
    model.save_pretrained(tmp_path / "hybrid")
    with pytest.raises(ModelError, match=r"no tensor for 1 parameters.*conv1d.weight.*quantize the model in memory"):
        qcore.quantize(tmp_path / "hybrid", "rtn", group_size=32, output=tmp_path / "out")
    qcore.quantize(model, "gptq", calibration=tokens, **SETTINGS)
    again = qcore.load(qcore.save(model, tmp_path / "saved"))
    assert torch.equal(logits(again, tokens[0][None]), logits(model, tokens[0][None]))


def test_a_model_quantized_by_another_library_is_refused(tmp_path):
    model = build("llama")
    model.config.quantization_config = {"quant_method": "bitsandbytes", "load_in_4bit": True}
    with pytest.raises(ModelError, match=r"quantized already \(bitsandbytes\). Start from the float model"):
        qcore.quantize(model, "rtn", group_size=32)


def test_experts_sizes_are_those_asked_for():
    assert sum(isinstance(module, Experts) for module in unfuse(build("qwen3_moe")).modules()) == 1  # block 0 is dense
    experts = unfuse(build("mixtral")).model.layers[0].mlp.experts
    assert len(experts) == EXPERTS["num_local_experts"]
