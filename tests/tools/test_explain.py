import json

import pytest
import torch
from click.testing import CliRunner
from zoo import build

import qcore
from qcore import ModelError
from qcore.checkpoint import ModelFolder
from qcore.cli import cli
from qcore.tools.explain import explain


@pytest.fixture(scope="module")
def sparse(tmp_path_factory):
    folder = tmp_path_factory.mktemp("models") / "qwen2_moe"
    build("qwen2_moe").save_pretrained(folder)
    return folder


def test_every_weight_is_accounted_for_once(sparse):
    plan = explain(sparse, group_size=32, samples=2, seqlen=16)
    in_folder = sum(torch.Size(info.shape).numel() for info in ModelFolder(sparse).tensors.values())
    assert plan["quantized"] + sum(kept["weights"] for kept in plan["float"]) == in_folder
    reasons = {kept["why"].partition(":")[0]: kept for kept in plan["float"]}
    assert reasons["routers"]["example"] == "model.layers.1.mlp.gate.weight"
    assert reasons["routers"]["tensors"] == 2  # what chooses experts, and what weighs the shared one
    assert {"biases", "norms and other small parameters"} <= set(reasons)


def test_blocks_that_differ_are_told_apart_and_experts_are_shown_once(sparse):
    plan = explain(sparse, group_size=32)
    assert [kind["blocks"] for kind in plan["kinds"]] == [[0], [1]]
    dense, experts = (kind["groups"] for kind in plan["kinds"])
    assert all(group["times"] == 1 for group in dense)
    assert experts[-1] == {"linears": [{"linear": "mlp.experts.*.down_proj", "shape": [64, 32]}], "times": 4}
    assert plan["memory"] > 0
    assert plan["seconds_forward"] > 0


def test_overrides_and_adapters_change_the_plan(sparse):
    plan, skipped = explain(sparse, group_size=32), explain(sparse, group_size=32, overrides=["down_proj:skip"])
    assert skipped["quantized"] < plan["quantized"]
    assert "skipped by an override" in {kept["why"] for kept in skipped["float"]}
    generic = explain(sparse, group_size=32, adapter="generic")
    assert generic["quantized"] == plan["quantized"]
    assert any("shared_expert_gate" in note for note in generic["assumed"])


def test_the_size_foretold_is_that_of_the_tensors_written(sparse, tmp_path):
    plan = explain(sparse, group_size=32)
    tensors = ModelFolder(qcore.quantize(sparse, "rtn", group_size=32, output=tmp_path / "out")).tensors
    sizes = {name: torch.Size(info.shape).numel() * info.dtype.itemsize for name, info in tensors.items()}
    assert plan["size_quantized"] == sum(size for name, size in sizes.items() if not name.endswith(".g_idx"))


def test_the_command_prints_the_plan(sparse):
    shown = CliRunner().invoke(cli, ["models", "--explain", str(sparse), "--group-size", "32"])
    assert shown.exit_code == 0, shown.output
    assert "adapter qwen2_moe, 2 blocks" in shown.output
    assert "mlp.experts.*.gate_proj" in shown.output
    assert "4 experts" in shown.output
    assert "routers" in shown.output
    plan = json.loads(CliRunner().invoke(cli, ["models", "--explain", str(sparse), "--json"]).stdout)
    assert plan["adapter"] == "qwen2_moe"


def test_a_model_quantized_already_has_no_plan(sparse, tmp_path):
    (tmp_path / "config.json").write_text('{"model_type": "llama", "quantization_config": {"quant_method": "awq"}}')
    (tmp_path / "model.safetensors").write_bytes((sparse / "model.safetensors").read_bytes())
    with pytest.raises(ModelError, match=r"quantized already \(awq\)"):
        explain(tmp_path)
