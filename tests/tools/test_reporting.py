import json
import math

import pytest
import torch

import qcore
from qcore import ConfigError
from qcore.tools import reporting

TEXT = "The quick brown fox jumps over the lazy dog. " * 20


@pytest.fixture(scope="module")
def folders(llama_folder, tmp_path_factory):
    """The same model in 2, 4 and 8 bits."""
    base = tmp_path_factory.mktemp("variants")
    return {
        bits: qcore.quantize(llama_folder, "rtn", bits=bits, group_size=32, output=base / f"b{bits}")
        for bits in (2, 4, 8)
    }


def test_a_report_holds_each_linear_with_its_place_and_its_outliers(folders):
    found = reporting.gather(folders[4])
    assert found["name"] == "b4"
    assert found["measured"] is None
    assert set(found["versions"]) == {"qcore", "torch", "transformers", "python", "platform"}
    weights = {name: m for name, m in qcore.load(folders[4]).named_modules() if isinstance(m, qcore.QuantLinear)}
    assert {layer["name"] for layer in found["layers"]} == set(weights)
    layer = next(each for each in found["layers"] if each["name"] == "model.layers.2.mlp.down_proj")
    assert (layer["block"], layer["kind"], layer["bits"]) == (2, "mlp.down_proj", 4)
    W = weights[layer["name"]].weight_source().dequantize()
    assert layer["peak"] == pytest.approx(float(W.abs().max() / W.square().mean().sqrt()))
    assert layer["beyond_6"] == 0


def test_outliers_are_counted():
    class Content:
        def weight(self, name):
            W = torch.ones(100, 10)
            W[0, 0] = 100.0
            return type("Weight", (), {"dequantize": lambda self: W})()

    rms = math.sqrt((999 + 100**2) / 1000)
    assert reporting.outliers(Content(), "x") == {"peak": pytest.approx(100 / rms), "beyond_6": pytest.approx(1e-3)}


@pytest.mark.parametrize(
    ("name", "block", "kind"),
    [("model.layers.3.self_attn.q_proj", 3, "self_attn.q_proj"), ("transformer.h.12.mlp.experts.4.w1", 12, "mlp.experts.4.w1"),
     ("lm_head", 0, "lm_head")],
)  # fmt: skip
def test_a_linear_is_placed_by_its_blocks_number(name, block, kind):
    assert reporting.place(name) == {"block": block, "kind": kind}


def test_figures_are_arranged_by_kind_and_block():
    layers = [
        {"kind": "a", "block": 0, "error": 1},
        {"kind": "b", "block": 2, "error": None},
        {"kind": "a", "block": 2, "error": 3},
    ]
    assert reporting.grid_of(layers, "error") == (["a", "b"], [0, 2], [[1.0, 3.0], [None, None]])


def test_measurements_are_those_of_evaluate(folders, llama_folder):
    measured = reporting.gather(folders[4], text=TEXT, reference=llama_folder, seqlen=32, windows=2)["measured"]
    assert measured == qcore.evaluate(folders[4], TEXT, reference=llama_folder, seqlen=32, windows=2)


def test_variants_are_ranked_by_kl_else_perplexity_else_size(folders, llama_folder):
    given = [folders[2], folders[8], folders[4]]
    rows = reporting.compare(given, text=TEXT, reference=llama_folder, seqlen=32, windows=2, new_tokens=2)
    assert [row["name"] for row in rows] == [str(folders[bits]) for bits in (8, 4, 2)]
    assert [row["kl"] for row in rows] == sorted(row["kl"] for row in rows)
    assert all(row["tokens_per_second"] > 0 for row in rows)
    assert rows[0]["perplexity"] == qcore.evaluate(folders[8], TEXT, seqlen=32, windows=2)["perplexity"]
    by_perplexity = reporting.compare(given, text=TEXT, seqlen=32, windows=2, new_tokens=0)
    assert [row["perplexity"] for row in by_perplexity] == sorted(row["perplexity"] for row in by_perplexity)
    assert "tokens_per_second" not in by_perplexity[0]
    by_size = reporting.compare(given, new_tokens=0)
    assert [row["name"] for row in by_size] == [str(folders[bits]) for bits in (2, 4, 8)]
    json.dumps([rows, by_perplexity, by_size])


@pytest.mark.parametrize(
    "call", [lambda f: reporting.gather(f, reference="demo"), lambda f: reporting.compare([f], reference="demo")]
)
def test_a_reference_without_text_is_refused(folders, call):
    with pytest.raises(ConfigError, match="give text"):
        call(folders[4])


def test_a_float_folder_is_no_variant(llama_folder):
    with pytest.raises(qcore.CheckpointError, match="is not quantized"):
        reporting.compare([llama_folder], new_tokens=0)
