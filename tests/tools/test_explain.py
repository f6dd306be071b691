import json

import pytest
import torch
from click.testing import CliRunner
from zoo import build

import qcore
from qcore import ModelError
from qcore.checkpoint import ModelFolder
from qcore.cli import cli
from qcore.plugins import installed
from qcore.saving import FolderExporter
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


def written(folder):
    return sum(file.stat().st_size for file in folder.iterdir() if file.suffix in (".safetensors", ".gguf"))


@pytest.mark.parametrize(
    "format", [name for name in installed().usable("format") if name not in ("gguf", "hf-dequantized")]
)
@pytest.mark.parametrize("shard_bytes", [5 * 10**9, 50_000])
def test_the_bytes_on_disk_are_foretold_exactly(sparse, tmp_path, monkeypatch, format, shard_bytes):
    monkeypatch.setattr(FolderExporter, "shard_bytes", shard_bytes)
    overrides = ["down_proj:skip", "*.0.*.up_proj:bits=8"] if format == "gptq" else []
    foretold = explain(sparse, group_size=32, format=format, overrides=overrides)["disk"]["output"]
    output = qcore.quantize(sparse, "rtn", group_size=32, format=format, overrides=overrides, output=tmp_path / "out")
    assert foretold == written(output)
    assert len(list(output.glob("*.safetensors"))) > (shard_bytes < 10**6)


def test_the_journal_is_foretold_and_another_format_about(llama_folder, tmp_path, watched):
    disk = explain(llama_folder, group_size=32, format="gguf")["disk"]
    assert not disk["exact"]

    class Watcher:
        kept = 0

        @qcore.hookimpl
        def qcore_block_finished(self, index):
            files = (tmp_path / "out.partial").glob("block-*")
            self.kept = sum(file.stat().st_size - header_of(file) for file in files)

    watcher = Watcher()
    output = qcore.quantize(
        llama_folder, "rtn", group_size=32, format="gguf", output=tmp_path / "out", plugins=watched(watcher)
    )
    assert disk["journal"] == watcher.kept
    assert written(output) == pytest.approx(disk["output"], rel=0.15)


def header_of(file):
    """Bytes of a safetensors file that are no tensors."""
    with file.open("rb") as handle:
        return 8 + int.from_bytes(handle.read(8), "little")


def test_linears_grids_and_what_stays_are_those_of_the_run(sparse):
    overrides = ["down_proj:bits=8", "o_proj:skip"]
    plan = explain(sparse, "rtn", group_size=32, overrides=overrides)
    model = qcore.quantize(sparse, "rtn", group_size=32, overrides=overrides, device="cpu")
    linears = {name: module for name, module in model.named_modules() if isinstance(module, qcore.QuantLinear)}
    grids = {}
    for module in linears.values():
        weight = module.weight_source()
        linears_so_far, weights = grids.get(str(weight.config), (0, 0))
        grids[str(weight.config)] = (linears_so_far + 1, weights + weight.codes.numel())
    assert {each["grid"]: (each["linears"], each["weights"]) for each in plan["grids"]} == grids
    assert plan["quantized"] == sum(weights for _, weights in grids.values())
    in_float = sum(p.numel() for name, p in model.named_parameters())
    assert sum(kept["weights"] for kept in plan["float"] if kept["why"] != "biases") <= in_float


@pytest.mark.parametrize("algo", ["gptq", "rtn", "autoround"])
def test_a_trial_tells_time_and_memory_and_leaves_nothing(sparse, tmp_path, algo):
    params = {"iters": 2, "bs": 2} if algo == "autoround" else {}
    plan = explain(sparse, algo, group_size=32, samples=6, seqlen=16, batch_size=2, format="gptq", probe=True,
                   output=tmp_path / "out", device="cpu", **params)  # fmt: skip
    assert plan["batches"] == (0 if algo == "rtn" else 3)
    assert plan["seconds"] == pytest.approx(sum(plan["parts"].values()))
    assert plan["parts"]["quantize"] > 0
    assert plan["parts"]["write"] > 0
    assert (plan["parts"]["capture"] > 0) == (algo != "rtn")
    assert plan["gpu_memory"] == 0
    assert plan["host_memory"] > plan["size"]
    assert list(tmp_path.iterdir()) == []


def test_more_batches_take_more_memory_up_to_what_is_kept_between_replays():
    from qcore.memory import MEMO_BYTES
    from qcore.tools.probe import Trial, _growth

    trial = Trial(2, 0, 0, 0, 0, 0, gpu=0, host=0, hidden=200, memo=MEMO_BYTES // 4)
    assert _growth(trial, 2, MEMO_BYTES) == (0, 0)
    assert _growth(trial, 5, MEMO_BYTES) == (300, MEMO_BYTES // 4 * 5 // 2 - MEMO_BYTES // 4)
    assert _growth(trial, 100, MEMO_BYTES) == (9800, MEMO_BYTES - MEMO_BYTES // 4)


def test_the_dry_run_prints_the_plan_and_needs_no_output(sparse, tmp_path):
    command = ["quantize", str(sparse), "--group-size", "32", "--samples", "2", "--seqlen", "16", "--dry-run"]
    shown = CliRunner().invoke(cli, [*command, "--override", "down_proj:bits=8"])
    assert shown.exit_code == 0, shown.output
    for expected in (
        "linears to 4 bits, group 32, sym",
        "to 8 bits",
        "disk: 0.000 GB",
        "peak host memory",
        "one block tried",
    ):
        assert expected in shown.output
    plan = json.loads(CliRunner().invoke(cli, [*command, "--json"]).stdout)
    assert plan["disk"]["exact"]
    missing = CliRunner().invoke(cli, command[:-1])
    assert missing.exit_code == 2
    assert "Missing option '-o'" in missing.output
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "file").touch()
    with pytest.raises(qcore.CheckpointError, match="exists"):
        explain(sparse, output=tmp_path / "out")
    with pytest.raises(qcore.ConfigError, match="has an option 'desc_akt'"):
        explain(sparse, desc_akt=True)


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
