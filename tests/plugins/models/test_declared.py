"""Declarations: their size, those of other distributions, and variants that deserve a closer look."""

from pathlib import Path

import pytest
import qcore_plugins.models
import torch
from zoo import REMOTE, ZOO, build

import qcore
from qcore.plugins import installed
from qcore.testing import check_adapter

#: adapters of other installed distributions
OTHERS = [
    (offer, model_type)
    for plugin in installed().all
    for kind, _, offer in plugin.offers
    if kind == "model" and plugin.distribution != "qcore"
    for model_type in offer.model_types
]


@pytest.mark.parametrize(("adapter", "model_type"), OTHERS, ids=str)
def test_a_strangers_declaration_fits_its_model(adapter, model_type):
    check_adapter(adapter, build(model_type))


def test_every_declaration_is_short():
    for path in Path(qcore_plugins.models.__file__).parent.glob("*.py"):
        lines = [line for line in path.read_text().splitlines() if line.strip()]
        assert len(lines) < 15, f"{path.name} has {len(lines)} lines"


def test_the_page_shows_every_model_and_nothing_that_fails():
    page = (Path(__file__).parents[3] / "docs/models.md").read_text(encoding="utf-8")
    table = page.partition("<!-- written by benchmarks/models_table.py -->")[2].partition("<!-- end -->")[0]
    rows = [line.strip("| ").split(" | ") for line in table.strip().splitlines()[2:]]
    assert [row[0] for row in rows] == [*ZOO, *REMOTE]
    assert not [row for row in rows if "**" in " ".join(row)]


@pytest.mark.parametrize(
    "changes", [{"do_layer_norm_before": True}, {"word_embed_proj_dim": 64}, {"enable_bias": False}]
)
def test_opt_in_all_its_variants(changes, tmp_path, tokens):
    model = build("opt/350m", **changes)
    check_adapter(installed().get("model", "opt"), model)
    model.save_pretrained(tmp_path / "opt")
    out = qcore.quantize(tmp_path / "opt", "gptq", group_size=32, calibration=tokens, output=tmp_path / "out")
    assert qcore.load(out)(tokens[0][None]).logits.isfinite().all()


def test_gpt2_keeps_its_transposed_layout_and_fused_bias(tmp_path, tokens):
    model = build("gpt2")
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
