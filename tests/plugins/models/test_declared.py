"""Every declared model adapter, ours and those of other installed distributions."""

import pytest
import torch

import qcore
from qcore.model import ModuleWeights
from qcore.plugins import installed
from qcore.run import find_adapter
from qcore.testing import check_adapter, tiny_transformer

SIZES = {
    "vocab_size": 320, "hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 2, "num_attention_heads": 4,
    "max_position_embeddings": 64,
}  # fmt: skip
#: what a model type needs beyond SIZES to be small
SMALL = {
    "llama": {"num_key_value_heads": 2},
    "opt": {"ffn_dim": 96, "word_embed_proj_dim": 32, "do_layer_norm_before": False, "dropout": 0.0},
    "mistral": {"num_key_value_heads": 2},
}
SERVED = [(name, kind) for name, adapter in installed().usable("model").items() for kind in adapter.model_types]


@pytest.fixture(params=SERVED, ids=lambda served: served[1])
def served(request):
    name, model_type = request.param
    return installed().get("model", name), tiny_transformer(model_type, **{**SIZES, **SMALL.get(model_type, {})})


def test_a_declaration_fits_its_model(served):
    check_adapter(*served)


def test_looking_finds_what_is_declared(served):
    adapter, model = served
    found = find_adapter(model, ModuleWeights(model), installed(), torch.device("cpu"), "generic")
    assert found.blocks == adapter.blocks
    for _, block in adapter.find_blocks(model):
        assert [set(group) for group in found.groups_in(block)] == [set(group) for group in adapter.groups_in(block)]


def test_declared_and_found_adapters_quantize_alike(served, tokens, weights_of):
    _, model = served
    state = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    settings = {"group_size": 32, "calibration": tokens, "seqlen": 32}
    declared = weights_of(qcore.quantize(model, "gptq", **settings))
    again = tiny_transformer(model.config.model_type, **{**SIZES, **SMALL.get(model.config.model_type, {})})
    assert all(torch.equal(tensor, state[name]) for name, tensor in again.state_dict().items())
    found = weights_of(qcore.quantize(again, "gptq", adapter="generic", **settings))
    assert set(declared) == set(found)
    assert all(declared[name].equal(found[name]) for name in declared)


@pytest.mark.parametrize(
    "changes", [{"do_layer_norm_before": True}, {"word_embed_proj_dim": 64}, {"enable_bias": False}]
)
def test_opt_in_all_its_variants(changes, tmp_path, tokens):
    model = tiny_transformer("opt", **{**SIZES, **SMALL["opt"], **changes})
    check_adapter(installed().get("model", "opt"), model)
    model.save_pretrained(tmp_path / "opt")
    out = qcore.quantize(tmp_path / "opt", "gptq", group_size=32, calibration=tokens, output=tmp_path / "out")
    assert qcore.load(out)(tokens[0][None]).logits.isfinite().all()


def test_gpt2_keeps_its_transposed_layout_and_fused_bias(tmp_path, tokens):
    model = tiny_transformer("gpt2", **SIZES)
    model.save_pretrained(tmp_path / "gpt2")
    ids = tokens[0][None]
    with torch.no_grad():
        expected = model(ids).logits
    out = qcore.quantize(tmp_path / "gpt2", "gptq", bits=8, group_size=32, calibration=tokens, output=tmp_path / "out")
    loaded = qcore.load(out)
    assert loaded.transformer.h[0].attn.c_attn.out_features == 192
    assert torch.equal(loaded.transformer.h[0].attn.c_attn.bias, model.transformer.h[0].attn.c_attn.bias)
    # 8 bits round to 0.4 % of a group's largest weight; 3 % of the logits' size bounds two blocks of it
    assert float((loaded(ids).logits - expected).norm() / expected.norm()) < 0.03
