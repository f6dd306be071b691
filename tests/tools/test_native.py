import subprocess
import sys

import pytest
import torch
from transformers import AutoModelForCausalLM
from transformers.quantizers import auto
from zoo import build

import qcore
from qcore import CheckpointError, QuantLinear


@pytest.fixture
def as_before(monkeypatch):
    """Whatever a test registers is gone after it."""
    for mapping in ("AUTO_QUANTIZER_MAPPING", "AUTO_QUANTIZATION_CONFIG_MAPPING"):
        monkeypatch.setattr(auto, mapping, dict(getattr(auto, mapping)))
        monkeypatch.setattr(f"qcore.tools.native.{mapping}", getattr(auto, mapping))


@pytest.fixture(scope="module")
def gptq(llama_folder, tmp_path_factory):
    target = tmp_path_factory.mktemp("native") / "gptq"
    return qcore.quantize(llama_folder, "rtn", group_size=32, output=target)


@pytest.mark.parametrize("format", ["gptq", "gptq_v2", "awq", "autoround", "compressed-tensors"])
def test_from_pretrained_answers_as_qcore_load_does(as_before, monkeypatch, gptq, tmp_path, tokens, format):
    folder = gptq if format == "gptq" else qcore.convert(gptq, tmp_path / "out", format)
    for package in ("gptqmodel", "optimum", "auto_round", "compressed_tensors"):
        monkeypatch.setitem(sys.modules, package, None)  # importing it fails, as where it is not installed
    served = qcore.use_in_transformers(backend="torch_reference")
    assert {"gptq", "awq", "auto-round", "compressed-tensors"} <= set(served)
    model, info = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32, output_loading_info=True)
    assert not info["missing_keys"]
    assert not info["unexpected_keys"]
    assert sum(isinstance(module, QuantLinear) for module in model.modules()) == 21
    ids = tokens[0][None]
    with torch.no_grad():
        assert torch.equal(model(ids).logits, qcore.load(folder, backend="torch_reference")(ids).logits)
    assert model.generate(ids, max_new_tokens=3, do_sample=False).shape == (1, 35)


@pytest.mark.parametrize("name", ["mixtral", "gpt_oss"])  # names on disk other than the model's; experts fused on disk
def test_experts_one_by_one_are_read_by_transformers_too(as_before, name, tmp_path, tokens):
    build(name).save_pretrained(tmp_path / "float")
    folder = qcore.quantize(tmp_path / "float", "rtn", group_size=32, output=tmp_path / "out")
    qcore.use_in_transformers(backend="torch_reference")
    model, info = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32, output_loading_info=True)
    assert not info["missing_keys"]
    assert not info["unexpected_keys"]
    ids = tokens[0][None]
    with torch.no_grad():
        assert torch.equal(model(ids).logits, qcore.load(folder, backend="torch_reference")(ids).logits)


def test_what_transformers_opened_can_be_saved_in_any_format(as_before, gptq, tmp_path):
    qcore.use_in_transformers(["gptq"])
    model = AutoModelForCausalLM.from_pretrained(gptq)
    saved = qcore.save(model, tmp_path / "saved", "awq")
    direct = qcore.convert(gptq, tmp_path / "direct", "awq")
    found, expected = (qcore.content.open_content(each)[1] for each in (saved, direct))
    assert all(expected.weight(name).equal(found.weight(name)) for name in expected.layers)
    assert set(found.tensors) == set(expected.tensors)


def test_a_damaged_folder_is_an_error_of_ours(as_before, gptq, tmp_path):
    import shutil

    folder = shutil.copytree(gptq, tmp_path / "copy")
    text = (folder / "config.json").read_text()
    (folder / "config.json").write_text(text.replace('"group_size": 32', '"group_size": 16'))
    (folder / "quantize_config.json").unlink()
    qcore.use_in_transformers()
    with pytest.raises(CheckpointError, match="scales are"):
        AutoModelForCausalLM.from_pretrained(folder)


def test_an_unknown_method_is_named(as_before):
    with pytest.raises(CheckpointError, match="no installed format has quant_method 'hqq'"):
        qcore.use_in_transformers(["hqq"])


def test_importing_qcore_changes_nothing_in_transformers():
    code = (
        "from transformers.quantizers import auto; before = dict(auto.AUTO_QUANTIZER_MAPPING)\n"
        "import qcore; qcore.load; qcore.use_in_transformers\n"
        "assert before == auto.AUTO_QUANTIZER_MAPPING"
    )
    assert subprocess.run([sys.executable, "-c", code], timeout=120).returncode == 0
