"""Models whose code comes with them, through the real remote-code path: stand-ins in remote/ say whose shape they have."""

import pytest
import torch
from zoo import ALGORITHMS, REMOTE, write_repository

import qcore
from qcore import Algorithm, ModelError, QuantLinear
from qcore.checkpoint import ModelFolder
from qcore.discovery import find_adapter
from qcore.model import load_float
from qcore.plugins import installed
from qcore.streaming import ModuleWeights
from qcore.testing import check_adapter

CPU = torch.device("cpu")


@pytest.fixture(params=REMOTE)
def repository(request, tmp_path):
    """A model folder with its own code, as a hub repository has it, and the very model that was saved in it."""
    return tmp_path / "repository", write_repository(request.param, tmp_path / "repository")


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


@pytest.mark.parametrize("algorithm", ALGORITHMS)
def test_with_the_word_it_is_quantized_and_loaded(repository, algorithm, tmp_path, tokens):
    repository, original = repository
    ids = tokens[0][None]
    expected = logits(original, ids)
    assert torch.equal(logits(load_float(ModelFolder(repository), True), ids), expected)
    settings = {"bits": 8, "group_size": 32, "calibration": tokens, "seqlen": 32, "trust_remote_code": True,
                **ALGORITHMS[algorithm]}  # fmt: skip
    model = qcore.quantize(repository, algorithm, **settings)
    found = logits(model, ids)
    assert qcore.report(model)["adapter"] != "generic"
    declared = find_adapter(original, ModuleWeights(original), installed(), CPU)
    blocks = declared.find_blocks(original)
    promised = {f"{name}.{linear}" for name, each in blocks for group in declared.groups_in(each) for linear in group}
    assert {name for name, module in model.named_modules() if isinstance(module, QuantLinear)} == promised
    assert float((found - expected).norm() / expected.norm()) < 0.03  # as in test_architectures.py
    out = qcore.quantize(repository, algorithm, output=tmp_path / "out", **settings)
    assert torch.equal(logits(qcore.load(out, trust_remote_code=True), ids), found)
    saved = qcore.save(model, tmp_path / "saved")
    assert torch.equal(logits(qcore.load(saved, trust_remote_code=True), ids), found)
    with pytest.raises(ModelError, match="trust_remote_code=True"):
        qcore.load(out)
    given = qcore.quantize(
        original, algorithm, **settings
    )  # a module whose folder qcore never saw brings its code along
    again = qcore.load(qcore.save(given, tmp_path / "given"), trust_remote_code=True)
    assert torch.equal(logits(again, ids), found)


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
