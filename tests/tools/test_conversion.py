import json
import subprocess
import sys

import pytest
import torch
from click.testing import CliRunner
from safetensors.torch import load_file

import qcore
from qcore import CheckpointError, Content, Exporter, LayerSpec, QuantConfig, cli
from qcore.content import open_content
from qcore.plugins import installed
from qcore.testing import random_weight
from qcore.tools import conversion


@pytest.fixture(scope="module")
def folders(llama_folder, tmp_path_factory):
    """A function that gives the tiny Llama quantized by rtn in some grid and saved as GPTQ: folders(bits, sym, …)."""
    made = {}

    def folder(bits=4, sym=True, algo="rtn", **options):
        key = repr((bits, sym, algo, sorted(options.items())))
        if key not in made:
            target = tmp_path_factory.mktemp("quantized") / "model"
            made[key] = qcore.quantize(
                llama_folder, algo, bits=bits, sym=sym, group_size=32, output=target, format="gptq_v2", **options
            )
        return made[key]

    return folder


def weights(folder):
    _, content = open_content(folder)
    return {name: content.weight(name) for name in content.layers}


PAIRS = [
    (4, True, ["gptq", "gptq_v2", "awq", "autoround", "compressed-tensors"]),
    (4, False, ["awq", "autoround", "gptq", "compressed-tensors", "gptq_v2"]),
    (3, True, ["autoround", "compressed-tensors", "gptq"]),
    (8, False, ["compressed-tensors", "autoround", "gptq_v2"]),
    (2, False, ["autoround", "gptq", "compressed-tensors"]),
]


@pytest.mark.parametrize(("bits", "sym", "chain"), PAIRS)
def test_a_chain_of_conversions_changes_no_bit(folders, tmp_path, bits, sym, chain, same_files):
    first = folders(bits, sym)
    original, last = weights(first), first
    for number, name in enumerate(chain):
        last = qcore.convert(last, tmp_path / f"{number}-{name}", name)
        assert open_content(last)[0].name == name
        found = weights(last)
        assert found.keys() == original.keys()
        assert all(weight.equal(found[layer]) for layer, weight in original.items())
    assert qcore.report(last)["converted"] == {"from": (["gptq_v2", *chain])[-2], "model": str(tmp_path / f"{len(chain) - 2}-{chain[-2]}"), "lossy": {}}  # fmt: skip
    assert qcore.report(last)["algorithm"] == "rtn"
    assert (last / "tokenizer.json").read_bytes() == (first / "tokenizer.json").read_bytes()


def test_a_converted_folder_answers_as_the_first(folders, tmp_path, tokens):
    converted = qcore.convert(folders(4), tmp_path / "awq", "awq")
    with torch.no_grad():
        assert torch.equal(
            qcore.load(converted)(tokens[0][None]).logits, qcore.load(folders(4))(tokens[0][None]).logits
        )


def test_what_a_format_cannot_hold_is_refused_with_every_reason(folders, tmp_path):
    source = folders(4, overrides=("*.0.*down_proj:bits=8", "*.1.*down_proj:bits=3"))
    with pytest.raises(CheckpointError) as error:
        qcore.convert(source, tmp_path / "out", "awq")
    text = str(error.value)
    assert "cannot hold 2 linears exactly" in text
    assert "model.layers.0.mlp.down_proj: 8 bits; this layout has 4" in text
    assert "model.layers.1.mlp.down_proj: 3 bits; this layout has 4" in text
    assert "lossy=True (--lossy)" in text
    assert not (tmp_path / "out").exists()


def test_lossy_changes_only_what_must_change_and_says_so(folders, tmp_path):
    source = folders(4, overrides=("*.0.*down_proj:bits=8", "*.1.*down_proj:bits=3"))
    target = qcore.convert(source, tmp_path / "out", "awq", lossy=True)
    before, after = weights(source), weights(target)
    lost = qcore.report(target)["converted"]["lossy"]
    assert set(lost) == {"model.layers.0.mlp.down_proj", "model.layers.1.mlp.down_proj"}
    for name, weight in before.items():
        if name not in lost:
            assert weight.equal(after[name])
            continue
        error = float((after[name].dequantize() - weight.dequantize()).norm() / weight.dequantize().norm())
        assert error == pytest.approx(lost[name]["error"], rel=1e-4)
        assert after[name].bits == 4
    assert 0.01 < lost["model.layers.0.mlp.down_proj"]["error"] < 0.2


def test_lossy_undoes_act_order(folders, tmp_path, tokens):
    source = folders(4, algo="gptq", desc_act=True, calibration=tokens, samples=8, seqlen=32)
    with pytest.raises(CheckpointError, match="act-order needs g_idx"):
        qcore.convert(source, tmp_path / "exact", "awq")
    target = qcore.convert(source, tmp_path / "out", "awq", lossy=True)
    lost = qcore.report(target)["converted"]["lossy"]
    assert len(lost) == 21
    assert all(0 < facts["error"] < 0.2 for facts in lost.values())


def one_layer(folder, weight, floats=()):
    """A folder in gptq_v2 of one quantized layer."""
    name = "model.layers.0.mlp.up_proj"
    spec = LayerSpec(name, weight.config, weight.in_features, weight.out_features, weight.act_order)
    folder.mkdir()
    content = Content({"model_type": "llama"}, {name: spec}, {name: weight}.__getitem__, floats, {}.__getitem__)
    installed().get("format", "gptq_v2").save(content, folder)
    return folder


def test_values_that_cannot_be_held_are_refused_by_name_and_lossy_moves_them_least(tmp_path):
    weight = random_weight(32, 64, QuantConfig(bits=4, group_size=32, sym=False))
    weight.zeros[3, 1] = 0
    source = one_layer(tmp_path / "source", weight)
    with pytest.raises(CheckpointError, match=r"up_proj: it holds integer zero points 1 to 15, found 0 to 15"):
        qcore.convert(source, tmp_path / "v1", "gptq")
    found = weights(qcore.convert(source, tmp_path / "v1", "gptq", lossy=True))["model.layers.0.mlp.up_proj"]
    changed = (found.dequantize() != weight.dequantize()).nonzero().tolist()
    assert all(row == 3 and column >= 32 and weight.codes[row, column] == 15 for row, column in changed)
    assert found.zeros[3, 1] == 1


def test_lossy_keeps_in_float_what_no_grid_fits(tmp_path):
    weight = random_weight(32, 48, QuantConfig(bits=8, group_size=48), bias=True)

    class Wide(Exporter):
        name = "wide"

        def why_not(self, layer):
            return "too narrow"

        def save(self, content, folder):
            assert not content.layers
            assert torch.equal(content.tensor("model.layers.0.mlp.up_proj.weight"), weight.dequantize(torch.float16))
            assert torch.equal(content.tensor("model.layers.0.mlp.up_proj.bias"), weight.bias)
            (folder / "qcore.json").write_text(json.dumps(dict(content.provenance)))

    plugins = type(installed())()
    plugins.all[0].offers.append(("format", "wide", Wide()))
    source = one_layer(tmp_path / "source", weight)
    target = qcore.convert(source, tmp_path / "out", "wide", lossy=True, plugins=plugins)
    lost = qcore.report(target)["converted"]["lossy"]
    assert lost == {"model.layers.0.mlp.up_proj": {"error": 0.0, "kept": "float"}}


def test_rounding_again_onto_the_same_grid_is_close():
    weight = random_weight(32, 72, QuantConfig(bits=4, group_size=32, sym=False))
    for config in (QuantConfig(bits=8, group_size=32), QuantConfig(bits=8, group_size=-1, sym=False)):
        again = conversion.round_again(weight, config)
        assert again.config == config
        W = weight.dequantize()
        assert float((again.dequantize() - W).norm() / W.norm()) < 0.01


def test_a_float_folder_is_no_source(llama_folder, tmp_path):
    with pytest.raises(CheckpointError, match="is not quantized"):
        qcore.convert(llama_folder, tmp_path / "out", "awq")


def test_an_output_that_is_there_is_left_alone(folders, tmp_path):
    (tmp_path / "notes.txt").write_text("mine")
    with pytest.raises(CheckpointError, match="exists already"):
        qcore.convert(folders(4), tmp_path, "awq")
    assert [path.name for path in tmp_path.iterdir()] == ["notes.txt"]


def test_the_command_converts_and_tells(folders, tmp_path):
    source = folders(4, overrides=("*.0.*down_proj:bits=8",))
    result = CliRunner().invoke(
        cli.cli, ["convert", str(source), "-o", str(tmp_path / "a"), "--format", "compressed-tensors"]
    )
    assert result.output.endswith("gptq_v2 to compressed-tensors, exact\n")
    result = CliRunner().invoke(cli.cli, ["convert", str(source), "-o", str(tmp_path / "b"), "--format", "awq"])
    assert isinstance(result.exception, CheckpointError)
    result = CliRunner().invoke(
        cli.cli, ["convert", str(source), "-o", str(tmp_path / "b"), "--format", "awq", "--lossy"]
    )
    assert "changed: model.layers.0.mlp.down_proj: 4 bits, group 32, relative error 0." in result.output
    assert result.output.endswith("gptq_v2 to awq, 1 linears changed\n")
    result = CliRunner().invoke(
        cli.cli, ["convert", str(source), "-o", str(tmp_path / "c"), "--format", "autoround", "--json"]
    )
    assert json.loads(result.output)["lossy"] == {}


def test_a_manifest_tells_a_changed_file(folders, tmp_path):
    plain = qcore.convert(folders(4), tmp_path / "plain", "gptq")
    assert qcore.inspect(plain)["manifest"] is None
    target = qcore.convert(folders(4), tmp_path / "out", "gptq", manifest=True)
    assert qcore.inspect(target)["manifest"] is True
    assert subprocess.run(["sha256sum", "-c", "--quiet", "SHA256SUMS"], cwd=target).returncode == 0
    names = [line.split("  ")[1] for line in (target / "SHA256SUMS").read_text().splitlines()]
    assert sorted([*names, "SHA256SUMS"]) == sorted(path.name for path in target.iterdir())
    (target / "tokenizer.json").write_text((target / "tokenizer.json").read_text() + " ")
    with pytest.raises(CheckpointError, match=r"tokenizer\.json is not the file that SHA256SUMS was written for"):
        qcore.inspect(target)
    (target / "tokenizer.json").unlink()
    with pytest.raises(CheckpointError, match=r"names 'tokenizer\.json', which is no file in the folder"):
        qcore.inspect(target)
    (target / "SHA256SUMS").write_text("0  ../../etc/passwd\n")
    with pytest.raises(CheckpointError, match="which is no file in the folder"):
        qcore.inspect(target)


@pytest.mark.parametrize("name", ["gptq", "autoround", "hf-dequantized"])
def test_weight_files_stay_below_the_size_asked_for_and_are_indexed(folders, tmp_path, name):
    source = folders(4)
    target = qcore.convert(source, tmp_path / "out", name, shard_bytes=60_000)
    files = sorted(target.glob("*.safetensors"))
    assert len(files) > 2
    for tensors in map(load_file, files):  # a tensor that is larger has a file of its own
        assert len(tensors) == 1 or sum(t.numel() * t.element_size() for t in tensors.values()) <= 60_000
    index = json.loads((target / "model.safetensors.index.json").read_text())
    assert set(index["weight_map"].values()) == {file.name for file in files}
    whole = qcore.convert(source, tmp_path / "whole", name)
    found = {key: tensor for file in files for key, tensor in load_file(file).items()}
    expected = load_file(whole / "model.safetensors")
    assert found.keys() == expected.keys() == index["weight_map"].keys()
    assert all(torch.equal(found[key], tensor) for key, tensor in expected.items())
    assert index["metadata"]["total_size"] == sum(t.numel() * t.element_size() for t in expected.values())


@pytest.mark.parametrize(
    ("format", "size", "says"),
    [("gguf", 10**6, "is one file"), ("gptq", 0, "shard_bytes=0 is 0 bytes, expected 1 at least")],
)
def test_a_size_of_shards_that_cannot_be_is_refused(folders, tmp_path, format, size, says):
    with pytest.raises(qcore.ConfigError, match=says):
        qcore.convert(folders(4), tmp_path / "out", format, shard_bytes=size)


CONVERT_DEEP = """
import resource, sys, qcore
from pathlib import Path
from qcore import Content, LayerSpec, QuantConfig
from qcore.plugins import installed
from qcore.testing import random_weight

count, home = int(sys.argv[1]), Path(sys.argv[2])
weight = random_weight(1024, 4096, QuantConfig(bits=4, group_size=128))
names = [f"model.layers.{n}.mlp.down_proj" for n in range(count)]
specs = {name: LayerSpec(name, weight.config, 4096, 1024) for name in names}
(home / "a").mkdir()
content = Content({"model_type": "llama"}, specs, lambda name: weight, (), {}.__getitem__)
installed().get("format", "gptq").save(content, home / "a")
qcore.convert(home / "a", home / "b", "awq")
print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024)
"""


def test_converting_takes_the_memory_of_a_few_layers_whatever_the_depth(tmp_path):
    """Layers of 4 MB unpacked: 60 of them would be 240 MB, and 120 MB packed."""

    def peak(count):
        home = tmp_path / str(count)
        home.mkdir()
        command = [sys.executable, "-c", CONVERT_DEEP, str(count), str(home)]
        return float(subprocess.run(command, capture_output=True, text=True, check=True, timeout=600).stdout)

    shallow, deep = peak(4), peak(64)
    assert deep - shallow < 30, (shallow, deep)
