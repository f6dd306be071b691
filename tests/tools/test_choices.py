"""Which backend a model's linears take, by rank and by measured speed, and what is said of the others."""

import json

import pytest
from click.testing import CliRunner

import qcore
from qcore import Backend, cli
from qcore.plugins import Plugins
from qcore.tools.choices import choices


@pytest.fixture(scope="module")
def quantized(llama_folder, tmp_path_factory):
    overrides = ["layers.0.mlp.down_proj:bits=8"]
    folder = tmp_path_factory.mktemp("choices") / "out"
    return qcore.quantize(llama_folder, "rtn", group_size=32, overrides=overrides, output=folder)


def backend(name, rank, reason=None, speeds=()):
    class Some(Backend):
        def why_not(self, spec):
            return reason

        def speed(self, spec):
            return dict(speeds).get(spec.tokens)

        def prepare(self, weight, spec):
            return {}

        def matmul(self, x, buffers, spec):
            return x

    Some.name, Some.rank = name, rank
    return Some()


@pytest.fixture
def plugins():
    found = Plugins()
    for plugin in found.all:
        plugin.offers = [offer for offer in plugin.offers if offer[0] != "backend"]
    offered = [
        backend("slow", 1), backend("measured", 5, speeds={1: 2.0, 64: 0.5}), backend("other", 4, speeds={1: 1.0, 64: 0.75}),
        backend("narrow", 9, reason="serves 2 bits alone"),
    ]  # fmt: skip
    found.all[0].offers += [("backend", each.name, each) for each in offered]
    return found


def test_each_kind_of_linear_has_one_row_with_its_backend_and_why_not_the_others(quantized, plugins):
    rows = choices(quantized, device="cpu", plugins=plugins)
    by_shape = {(tuple(row["shape"]), row["grid"]): row for row in rows}
    row = by_shape[(64, 96), "8 bits, group 32, sym"]
    assert row["linears"] == ["model.layers.*.mlp.down_proj"]
    assert row["count"] == 1
    row = by_shape[(96, 64), "4 bits, group 32, sym"]
    assert row["linears"] == ["model.layers.*.mlp.gate_proj", "model.layers.*.mlp.up_proj"]
    assert row["count"] == 6
    assert row["backend"] == "measured"
    assert row["because"] == "measured 2.00 x as fast as the float product"
    assert row["others"] == {
        "other": "measured 1.00 x, slower", "slow": "rank 1, no speed measured", "narrow": "serves 2 bits alone",
    }  # fmt: skip


def test_the_number_of_tokens_decides(quantized, plugins):
    assert {row["backend"] for row in choices(quantized, device="cpu", tokens=64, plugins=plugins)} == {"other"}


def test_without_a_measured_speed_the_rank_decides(quantized, plugins):
    rows = choices(quantized, device="cpu", tokens=7, plugins=plugins)
    assert {row["backend"] for row in rows} == {"measured"}
    assert rows[0]["others"]["slow"] == "rank 1, below 5"
    assert "its rank, 5" in rows[0]["because"]


def test_what_is_shown_is_what_a_loaded_model_takes(quantized, monkeypatch):
    shown = {name: row["backend"] for row in choices(quantized, device="cpu") for name in row["linears"]}
    model = qcore.load(quantized, device="cpu")
    assert model.model.layers[1].mlp.up_proj.backend.name == shown["model.layers.*.mlp.up_proj"]
    monkeypatch.setenv("QCORE_BACKEND", "torch_reference")
    (row,) = choices(quantized, device="cpu")[:1]
    assert row["backend"] == "torch_reference"
    assert row["because"].startswith("asked for; ")


def test_the_command_prints_it(quantized):
    result = CliRunner().invoke(
        cli.cli, ["backends", "--model", str(quantized), "--device", "cpu"], catch_exceptions=False
    )
    assert "model.layers.*.mlp.down_proj" in result.output
    assert "  not cuda: " in result.output
    result = CliRunner().invoke(cli.cli, ["backends", "--model", str(quantized), "--json"], catch_exceptions=False)
    assert sum(row["count"] for row in json.loads(result.output)) == 21
    listed = CliRunner().invoke(cli.cli, ["backends"], catch_exceptions=False).output
    assert "torch_reference" in listed
