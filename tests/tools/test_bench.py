"""`qcore bench`: what is measured is what is said to be, on tiny models and linears."""

import json

import pytest
import torch
from click.testing import CliRunner

import qcore
from qcore import BackendError, ConfigError, MatmulSpec, QuantConfig, cli
from qcore.plugins import Plugins
from qcore.testing import check_backend
from qcore.tools import bench

CPU = torch.device("cpu")
SHAPE = {
    "model_type": "llama", "vocab_size": 96, "hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 2,
    "num_attention_heads": 4, "num_key_value_heads": 2, "max_position_embeddings": 128,
}  # fmt: skip


@pytest.fixture(autouse=True)
def few_weights(monkeypatch):
    monkeypatch.setattr(bench, "ROTATED", 1e5)


@pytest.fixture(scope="module")
def quantized(llama_folder, tmp_path_factory):
    return qcore.quantize(llama_folder, "rtn", group_size=32, output=tmp_path_factory.mktemp("bench") / "out")


def run(*arguments):
    result = CliRunner().invoke(cli.cli, ["bench", *map(str, arguments)], catch_exceptions=False)
    assert result.exit_code == 0
    return result.output


def test_products_are_timed_for_the_float_weight_tinygemm_and_each_backend_asked_for():
    rows = list(bench.matmul([(1024, 64)], (1, 3, 100), ["torch_reference", "cuda"], dtype=torch.float32, device=CPU))
    by_kind = {row.kind: row for row in rows}
    assert list(by_kind) == ["fp32", "tinygemm", "torch_reference", "cuda"]
    for kind, measured in (("fp32", 3), ("tinygemm", 2), ("torch_reference", 3)):
        times = by_kind[kind].microseconds
        assert len(times) == 3
        assert sum(each is not None and each > 0 for each in times) == measured
    assert by_kind["cuda"].microseconds == [None] * 3
    assert by_kind["cuda"].why_not


def test_a_product_that_does_not_repeat_is_no_figure():
    spec = MatmulSpec(QuantConfig(bits=4, group_size=32), 64, 32, False, torch.float32, CPU)
    with pytest.raises(BackendError, match=r"broken: its product is not repeatable or not finite for x \[2, 64\]"):
        bench._timed("broken", [lambda x: torch.randn(2, 32)], spec, [2], checked=True)


def test_the_float_backend_is_a_backend_and_exact():
    assert check_backend(bench.FloatBackend(torch.float32), tolerance=1e-6) == 32


@pytest.mark.parametrize("config", [QuantConfig(bits=4, group_size=32), QuantConfig(bits=3, group_size=16, sym=False)])
def test_random_weights_repeat_by_seed_and_have_the_size_that_layers_keep(config):
    spec = MatmulSpec(config, 256, 128, True, torch.float32, CPU)
    weight = bench.random_weight(spec, 3)
    assert weight.equal(bench.random_weight(spec, 3))
    assert not weight.equal(bench.random_weight(spec, 4))
    assert weight.act_order
    out = torch.randn(64, 256) @ weight.dequantize().t()
    assert 0.3 < float(out.std()) < 3


def test_a_model_of_a_shape_generates_the_same_quantized_and_with_float_weights_and_can_be_saved(tmp_path):
    config = QuantConfig(bits=8, group_size=32)
    settings = {"dtype": torch.float32, "device": "cpu", "fast": False}
    torch.manual_seed(0)
    model = bench.random_model(SHAPE, config, "torch_reference", **settings)
    torch.manual_seed(0)
    floating = bench.random_model(SHAPE, config, bench.FloatBackend(torch.float32), **settings)
    ids = torch.arange(8)[None]
    torch.testing.assert_close(model(ids).logits, floating(ids).logits)
    again = qcore.load(qcore.save(model, tmp_path / "out"), device="cpu")
    torch.testing.assert_close(model(ids).logits, again(ids).logits, rtol=1e-2, atol=1e-2)  # scales become float16


def test_generate_prints_both_models_for_each_number_of_beams(quantized, llama_folder):
    common = ["generate", quantized, "--new-tokens", 3, "--prompt-tokens", 4, "--no-fast"]
    found = json.loads(run(*common, "--reference", "fp32", "--num-beams", 1, "--num-beams", 2, "--json"))
    names = [(each["model"], each["backends"], each["num_beams"]) for each in found["speeds"]]
    chosen = found["speeds"][-1]["backends"]
    assert names == [
        (f"{quantized} in fp32", "fp32", 1), (f"{quantized} in fp32", "fp32", 2), (str(quantized), chosen, 1),
        (str(quantized), chosen, 2),
    ]  # fmt: skip
    for each in found["speeds"]:
        assert each["first_token_seconds"] > 0
        assert each["tokens_per_second"] > 0
    assert found["speeds"][0]["memory"] > 2 * found["speeds"][-1]["memory"]
    table = run(*common, "--reference", llama_folder)
    assert "tokens/s" in table
    assert str(llama_folder) in table


def test_a_float_folder_is_not_spread():
    with pytest.raises(ConfigError, match="--reference fp16"):
        bench.openers("out", "float", device_map="auto")


def test_matmul_prints_a_row_for_each_kind():
    lines = run("matmul", "--shapes", "1024x64", "--tokens", "1,2", "--backend", "torch_reference", "--device", "cpu")
    assert [line.split()[1] for line in lines.splitlines()[2:]] == ["fp32", "tinygemm", "torch_reference"]
    assert "copies at" in lines
    found = json.loads(run("matmul", "--shapes", "64x32", "--tokens", "1", "--bits", "3", "--group-size", 32, "--json"))
    assert found["tokens"] == [1]
    assert found["rows"][0]["kind"] == "fp32" if found["device"] == "cpu" else "fp16"


@pytest.mark.parametrize(
    "arguments", [["--shapes", "4096"], ["--shapes", "axb"], ["--tokens", "1,0"], ["--tokens", "x"]]
)
def test_what_is_no_shape_or_number_is_refused(arguments):
    with pytest.raises(ConfigError, match="separated by commas"):
        CliRunner().invoke(cli.cli, ["bench", "matmul", *arguments], catch_exceptions=False)


def test_load_tells_reading_from_loading(quantized):
    found = json.loads(run("load", quantized, "--json"))
    assert found["bytes"] == sum(file.stat().st_size for file in quantized.glob("*.safetensors"))
    assert 0 < found["read_seconds"] < found["load_seconds"]
    assert min(found["first_load_seconds"], found["first_token_seconds"]) > 0
    assert "read in" in run("load", quantized)


def test_openers_take_the_backend_asked_for(quantized):
    ((name, open_model),) = bench.openers(str(quantized), backend="torch_reference", device="cpu", fast=False)
    assert name == str(quantized)
    assert bench._backends_of(open_model()) == "torch_reference"
    with pytest.raises(qcore.PluginError):
        bench.openers(str(quantized), backend="no such", device="cpu", plugins=Plugins())[0][1]()
