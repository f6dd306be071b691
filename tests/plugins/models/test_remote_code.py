"""Models whose code comes with them, through the real remote-code path: stand-ins in remote/ say whose shape they have."""

import json
import shutil
from pathlib import Path

import pytest
import torch
import transformers
from zoo import enliven

import qcore
from qcore import Algorithm, ModelError
from qcore.checkpoint import ModelFolder
from qcore.model import ModuleWeights, load_float
from qcore.plugins import installed
from qcore.run import find_adapter
from qcore.testing import check_adapter

#: name -> file, config class, model class, what the config adds
REMOTE = {
    "moss": ("moss", "MossConfig", "MossForCausalLM", {}),
    "baichuan-7b": ("baichuan", "BaichuanConfig", "BaichuanForCausalLM", {}),
    "baichuan-13b": ("baichuan", "BaichuanConfig", "BaichuanForCausalLM", {"alibi": True}),
    "qwen": ("qwen", "QWenConfig", "QWenLMHeadModel", {}),
    "chatglm3": ("chatglm", "ChatGLMConfig", "ChatGLMForConditionalGeneration", {}),
    "RefinedWebModel": ("RW", "RWConfig", "RWForCausalLM", {
        "vocab_size": 320, "hidden_size": 64, "n_layer": 2, "n_head": 4, "ffn_hidden_size": 96,
        "model_type": "RefinedWebModel", "bos_token_id": 0, "eos_token_id": 1,
    }),
}  # fmt: skip
CPU = torch.device("cpu")


@pytest.fixture(params=REMOTE)
def repository(request, tmp_path):
    """A model folder with its own code, as a hub repository has it, and the very model that was saved in it."""
    file, config_class, model_class, config = REMOTE[request.param]
    folder = tmp_path / "repository"
    folder.mkdir()
    module = f"modeling_{file}"
    shutil.copy(Path(__file__).parent / "remote" / f"{module}.py", folder)
    auto_map = {"AutoConfig": f"{module}.{config_class}", "AutoModelForCausalLM": f"{module}.{model_class}"}
    text = json.dumps({"architectures": [model_class], "auto_map": auto_map, **config})
    (folder / "config.json").write_text(text)
    settled = transformers.AutoConfig.from_pretrained(folder, trust_remote_code=True)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = transformers.AutoModelForCausalLM.from_config(settled, trust_remote_code=True)
    enliven(model)
    model.save_pretrained(folder)
    saved = json.loads((folder / "config.json").read_text())
    assert "auto_map" in saved
    return folder, model.eval()


def logits(model, ids):
    with torch.no_grad():
        return model(input_ids=ids, use_cache=False).logits


def test_without_the_word_it_is_refused(repository, tmp_path):
    repository, _ = repository
    with pytest.raises(ModelError, match=r"needs Python code from its own repository.*trust_remote_code=True"):
        qcore.quantize(repository, "rtn", output=tmp_path / "out")
    with pytest.raises(ModelError, match="trust_remote_code=True"):
        qcore.quantize(repository, "rtn")
    assert not (tmp_path / "out").exists()


def test_with_the_word_it_is_quantized_and_loaded(repository, tmp_path, tokens):
    repository, original = repository
    ids = tokens[0][None]
    expected = logits(original, ids)
    assert torch.equal(logits(load_float(ModelFolder(repository), True), ids), expected)
    settings = {"bits": 8, "group_size": 32, "calibration": tokens, "seqlen": 32, "trust_remote_code": True}
    model = qcore.quantize(repository, "gptq", **settings)
    found = logits(model, ids)
    assert qcore.report(model)["adapter"] != "generic"
    assert float((found - expected).norm() / expected.norm()) < 0.03  # as in test_architectures.py
    out = qcore.quantize(repository, "gptq", output=tmp_path / "out", **settings)
    assert torch.equal(logits(qcore.load(out, trust_remote_code=True), ids), found)
    saved = qcore.save(model, tmp_path / "saved")
    assert torch.equal(logits(qcore.load(saved, trust_remote_code=True), ids), found)
    with pytest.raises(ModelError, match="trust_remote_code=True"):
        qcore.load(out)


def test_a_declaration_fits_and_looking_finds_it(repository):
    _, model = repository
    declared = find_adapter(model, ModuleWeights(model), installed(), CPU)
    found = find_adapter(model, ModuleWeights(model), installed(), CPU, "generic")
    check_adapter(declared, model)
    assert found.blocks == declared.blocks
    for _, block in declared.find_blocks(model):
        seen = [set(group) for group in found.groups_in(block)]
        assert all(any(set(group) <= other for other in seen) for group in declared.groups_in(block))


class Counting(Algorithm):
    """Rounds to nearest and counts the tokens each linear was shown."""

    name = "counting"

    def quantize_block(self, block):
        for group in block.groups:
            block.observe(group, lambda name, x: COUNTS.__setitem__(name, COUNTS.get(name, 0) + len(x)))
        return installed().get("algorithm", "rtn")().quantize_block(block)


COUNTS = {}


def test_padding_is_left_out_whatever_the_layout(repository, tokens):
    COUNTS.clear()
    masks = [torch.arange(32) < length for length in (32, 20, 27, 9)]
    rows = [{"input_ids": ids, "attention_mask": mask} for ids, mask in zip(tokens, masks, strict=False)]
    _, model = repository
    qcore.quantize(model, Counting(), group_size=32, calibration=rows, seqlen=32, batch_size=4)
    assert set(COUNTS.values()) == {32 + 20 + 27 + 9}
