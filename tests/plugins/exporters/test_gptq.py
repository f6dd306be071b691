import hashlib
import json
import shutil

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file

import qcore
from qcore import CheckpointError, LayerSpec, QcoreError, QuantConfig, QuantizedWeight, grid
from qcore.plugins import installed
from qcore.testing import check_exporter, random_weight, tiny_transformer

V1, V2 = (installed().get("format", name) for name in ("gptq", "gptq_v2"))
LAYER = "model.layers.0.mlp.up_proj"


def words(tensor):
    return tensor.contiguous().numpy().view(np.uint32)


def plain_weight(bits, sym=True, out=32, columns=64):
    """A weight made by counting, so that its bytes depend on nothing but the format."""
    config = QuantConfig(bits=bits, group_size=32, sym=sym)
    codes = (torch.arange(out)[:, None] * 5 + torch.arange(columns) * 3) % 2**bits
    scales = ((torch.arange(out)[:, None] + torch.arange(2)) % 7 + 1).half() / 64
    zeros = (
        torch.full((out, 2), 2 ** (bits - 1)) if sym else torch.arange(out)[:, None] % config.maxq + torch.ones(1, 2)
    )
    return QuantizedWeight(codes.byte(), scales, zeros.int(), grid.group_index(columns, 32), config)


@pytest.mark.parametrize("exporter", [V1, V2], ids=lambda each: each.name)
def test_conforms(exporter, tmp_path):
    assert (
        check_exporter(exporter, tmp_path) >= 24
    )  # 4 widths, 2 group sizes, both symmetries, with and without act-order


@pytest.mark.parametrize(
    ("exporter", "bits", "word"),
    [
        (V1, 4, 0x77777777),
        (V2, 4, 0x88888888),
        (V1, 8, 0x7F7F7F7F),
        (V2, 8, 0x80808080),
        (V1, 2, 0x55555555),
        (V2, 2, 0xAAAAAAAA),
    ],
)
def test_symmetric_zeros_are_the_words_that_other_readers_expect(exporter, bits, word):
    tensors = exporter.encode("layer", plain_weight(bits))
    assert set(words(tensors["layer.qzeros"]).flatten().tolist()) == {word}


@pytest.mark.parametrize("bits", [2, 3, 4, 8])
def test_tensors_have_the_names_shapes_and_order_of_the_format(bits):
    weight = plain_weight(bits, sym=False)
    tensors = V1.encode("layer", weight)
    assert {name: (tuple(t.shape), t.dtype) for name, t in tensors.items()} == {
        "layer.qweight": ((64 * bits // 32, 32), torch.int32),
        "layer.qzeros": ((2, 32 * bits // 32), torch.int32),
        "layer.scales": ((2, 32), torch.float16),
        "layer.g_idx": ((64,), torch.int32),
    }
    qweight, qzeros = words(tensors["layer.qweight"]), words(tensors["layer.qzeros"])
    for column, code in ((0, 0), (3, 7), (31, 63)):  # codes run down a column of qweight, zeros along a row of qzeros
        stream = sum(int(word) << (32 * i) for i, word in enumerate(qweight[:, column]))
        assert stream >> (bits * code) & weight.config.maxq == weight.codes[column, code]
        stream = sum(int(word) << (32 * i) for i, word in enumerate(qzeros[1]))
        assert stream >> (bits * column) & weight.config.maxq == weight.zeros[column, 1] - 1


def save(exporter, layers, folder, **provenance):
    """Save quantized weights alone as a folder."""
    folder.mkdir()
    specs = {n: LayerSpec(n, w.config, w.in_features, w.out_features, w.act_order) for n, w in layers.items()}
    exporter.save(
        qcore.Content({"model_type": "llama"}, specs, layers.__getitem__, [], {}.__getitem__, provenance), folder
    )
    return folder


#: sha256 of model.safetensors for `plain_weight(bits, sym)`; a change of these bytes is a change of the format
GOLDEN = {
    ("gptq", 4, True): "89ccf78c3215999c0c48e9fca39fc76d3041fa6669d6ac59ba9fd7084f0425de",
    ("gptq", 3, False): "95909e04c221551f53c1d8ab1a827a5f0af4c13ad8ab6f00f1bf86d02fdc4048",
    ("gptq_v2", 4, True): "7fc94261055710d64e49c2f663fa0da891ba77418b0304a8006d713665a6923d",
}


@pytest.mark.parametrize(("name", "bits", "sym"), GOLDEN)
def test_a_small_checkpoint_has_its_golden_bytes(tmp_path, name, bits, sym):
    folder = save(installed().get("format", name), {LAYER: plain_weight(bits, sym)}, tmp_path / "out")
    data = (folder / "model.safetensors").read_bytes()
    assert hashlib.sha256(data).hexdigest() == GOLDEN[name, bits, sym]


def test_the_config_has_the_keys_that_other_readers_require(tmp_path):
    folder = save(
        V1, {LAYER: plain_weight(4)}, tmp_path / "out", params={"damp_percent": 0.03, "true_sequential": False}
    )
    config = json.loads((folder / "config.json").read_text())
    assert config["model_type"] == "llama"
    assert config["quantization_config"] == {
        "bits": 4, "group_size": 32, "sym": True, "desc_act": False, "static_groups": False, "true_sequential": False,
        "damp_percent": 0.03, "quant_method": "gptq", "checkpoint_format": "gptq", "format": "gptq", "pack_dtype": "int32",
        "lm_head": False,
    }  # fmt: skip
    side = json.loads((folder / "quantize_config.json").read_text())
    assert side | config["quantization_config"] == side


def test_layers_that_differ_stand_under_dynamic_and_come_back(tmp_path):
    layers = {f"model.layers.{i}.mlp.up_proj": plain_weight(4) for i in range(10, 13)}
    layers["model.layers.1.mlp.up_proj"] = plain_weight(8)
    layers["model.layers.1.mlp.up_proj2"] = plain_weight(3, sym=False)
    folder = save(V1, layers, tmp_path / "out", skipped=["model.layers.0.mlp.up_proj"])
    dynamic = json.loads((folder / "config.json").read_text())["quantization_config"]["dynamic"]
    assert dynamic == {
        r"+:^model\.layers\.1\.mlp\.up_proj$": {"bits": 8, "group_size": 32, "sym": True},
        r"+:^model\.layers\.1\.mlp\.up_proj2$": {"bits": 3, "group_size": 32, "sym": False},
        r"-:^model\.layers\.0\.mlp\.up_proj$": {},
    }
    again = V1.open(folder)
    assert all(weight.equal(again.weight(name)) for name, weight in layers.items())


def test_dynamic_names_what_vllm_fuses_where_all_parts_have_one_grid(tmp_path):
    layers = {f"model.layers.{i}.mlp.{part}": plain_weight(8) for i in range(2) for part in ("gate_proj", "up_proj")}
    layers["model.layers.1.mlp.up_proj"] = plain_weight(2)
    layers |= {f"model.layers.{i}.mlp.down_proj": plain_weight(4) for i in range(6)}
    folder = save(V1, layers, tmp_path / "out")
    dynamic = json.loads((folder / "config.json").read_text())["quantization_config"]["dynamic"]
    fused = {rule: grid for rule, grid in dynamic.items() if "gate_up" in rule}
    assert fused == {r"+:^model\.layers\.0\.mlp\.gate_up_proj$": {"bits": 8, "group_size": 32, "sym": True}}
    again = V1.open(folder)
    assert all(weight.equal(again.weight(name)) for name, weight in layers.items())


def rewrite(folder, tensors=None, config=None, side=False):
    """Change a folder: tensors(dict) and config(quantization_config) alter in place; the side file goes unless kept."""
    if tensors is not None:
        found = load_file(folder / "model.safetensors")
        tensors(found)
        save_file({name: tensor.contiguous() for name, tensor in found.items()}, folder / "model.safetensors")
    if config is not None:
        whole = json.loads((folder / "config.json").read_text())
        config(whole["quantization_config"])
        (folder / "config.json").write_text(json.dumps(whole))
    if not side:
        (folder / "quantize_config.json").unlink(missing_ok=True)
    return folder


@pytest.mark.parametrize(("written", "label", "found"), [(V2, "gptq", "gptq_v2"), (V1, "gptq_v2", "gptq")])
@pytest.mark.parametrize("bits", [2, 3, 4, 8])
def test_a_file_that_lies_about_its_zeros_is_read_right_and_said_so(tmp_path, written, label, found, bits):
    weight = plain_weight(bits)
    folder = save(written, {LAYER: weight}, tmp_path / "out")
    rewrite(folder, config=lambda quantization: quantization.update(checkpoint_format=label))
    again = installed().get("format", label).open(folder)
    assert again.weight(LAYER).equal(weight)
    (note,) = again.notes
    assert note == f"labelled {label}, but its zero points are stored as {found} does; read as such"
    assert qcore.inspect(folder)["notes"] == [note]


def test_a_file_that_says_the_truth_gets_no_note(tmp_path):
    for exporter in (V1, V2):
        assert exporter.open(save(exporter, {LAYER: plain_weight(4)}, tmp_path / exporter.name)).notes == ()


def test_zero_points_of_zero_are_refused_in_v1_and_kept_in_v2(tmp_path):
    weight = plain_weight(4, sym=False)
    weight.zeros[3, 1] = 0
    with pytest.raises(
        CheckpointError, match=f"format 'gptq' cannot hold {LAYER}: it holds integer zero points 1 to 15, found 0 to 15"
    ):
        save(V1, {LAYER: weight}, tmp_path / "one")
    assert V2.open(save(V2, {LAYER: weight}, tmp_path / "two")).weight(LAYER).equal(weight)


def test_floating_zero_points_are_refused(tmp_path):
    weight = plain_weight(4, sym=False)
    weight = QuantizedWeight(weight.codes, weight.scales, weight.zeros + 0.5, weight.g_idx, weight.config)
    with pytest.raises(CheckpointError, match="integer zero points"):
        save(V2, {LAYER: weight}, tmp_path / "out")


@pytest.mark.parametrize(
    ("bits", "columns", "out", "says"),
    [
        (5, 64, 64, "5 bits; the format's readers know 2, 3, 4, 8"),
        (4, 60, 64, "in_features 60 x 4 bits is no whole number of 32-bit words"),
        (3, 64, 40, "out_features 40 x 3 bits is no whole number of 32-bit words"),
    ],
)
def test_what_the_format_cannot_hold_is_told_beforehand(bits, columns, out, says):
    assert says in V1.why_not(LayerSpec("layer", QuantConfig(bits=bits, group_size=32), columns, out))


def test_a_folder_of_old_autogptq_is_read_from_its_side_file(llama_folder, tmp_path):
    folder = qcore.quantize(llama_folder, "rtn", group_size=32, output=tmp_path / "out")
    config = json.loads((folder / "config.json").read_text())
    side = config.pop("quantization_config")
    side = {"w_bit": side["bits"], "q_group_size": side["group_size"], "sym": True, "desc_act": False}
    (folder / "config.json").write_text(json.dumps(config))
    (folder / "quantize_config.json").write_text(json.dumps(side))
    assert qcore.inspect(folder)["format"] == "gptq"
    assert qcore.load(folder).model.layers[0].mlp.up_proj.config == QuantConfig(bits=4, group_size=32)


def test_shards_named_by_autogptq_are_found_by_their_own_index(llama_folder, tmp_path, monkeypatch, tokens):
    monkeypatch.setattr(type(V1), "shard_bytes", 50_000)
    folder = qcore.quantize(llama_folder, "rtn", group_size=32, output=tmp_path / "out")
    expected = qcore.load(folder)(tokens[0][None]).logits
    index, base = json.loads((folder / "model.safetensors.index.json").read_text()), "gptq_model-4bit-32g"
    names = {name: name.replace("model-", f"{base}-") for name in index["weight_map"].values()}
    for old, new in names.items():
        (folder / old).rename(folder / new)
    index["weight_map"] = {tensor: names[file] for tensor, file in index["weight_map"].items()}
    (folder / f"{base}.safetensors.index.json").write_text(json.dumps(index))
    (folder / "model.safetensors.index.json").unlink()
    assert torch.equal(qcore.load(folder)(tokens[0][None]).logits, expected)


@pytest.mark.parametrize("version", ["marlin", "gptq_v3", "bitblas", 3, None])
def test_an_unknown_version_of_the_format_is_refused_by_name(tmp_path, version):
    folder = save(V1, {LAYER: plain_weight(4)}, tmp_path / "out")
    rewrite(folder, config=lambda found: found.update(checkpoint_format=version))
    with pytest.raises(CheckpointError, match=f"checkpoint_format is {version!r}; qcore reads gptq and gptq_v2"):
        qcore.load(folder)


def test_a_bias_of_zeros_that_the_model_does_not_have_changes_nothing(llama_folder, tmp_path, tokens):
    """GPTQ-for-LLaMa and early AutoGPTQ kept one for every linear."""
    folder = qcore.quantize(llama_folder, "rtn", group_size=32, output=tmp_path / "out")
    expected = qcore.load(folder)(tokens[0][None]).logits

    def add(tensors):
        for name in [name for name in tensors if name.endswith(".scales")]:
            tensors[name.replace(".scales", ".bias")] = torch.zeros(tensors[name].shape[1], dtype=torch.float16)

    rewrite(folder, tensors=add)
    assert torch.equal(qcore.load(folder)(tokens[0][None]).logits, expected)


@pytest.mark.parametrize("said", [True, False])
def test_desc_act_is_told_by_g_idx_and_not_by_the_label(tmp_path, said):
    """AutoGPTQ says desc_act for static groups, whose g_idx is in order; others forgot to say it."""
    for act_order in (True, False):
        weight = random_weight(32, 64, QuantConfig(bits=4, group_size=32), act_order=act_order)
        folder = save(V1, {LAYER: weight}, tmp_path / f"{act_order}")
        rewrite(folder, config=lambda found: found.update(desc_act=said))
        again = V1.open(folder)
        assert again.layers[LAYER].act_order == act_order
        assert again.weight(LAYER).equal(weight)


def test_two_configs_that_contradict_each_other_are_refused(tmp_path):
    folder = save(V1, {LAYER: plain_weight(4)}, tmp_path / "out")
    side = json.loads((folder / "quantize_config.json").read_text())
    (folder / "quantize_config.json").write_text(json.dumps(side | {"bits": 8}))
    with pytest.raises(CheckpointError, match=r"bits is 4 in config\.json and 8 in quantize_config\.json"):
        V1.open(folder)


def test_a_folder_without_g_idx_has_groups_in_sequence(tmp_path):
    weight = plain_weight(4)
    folder = rewrite(save(V1, {LAYER: weight}, tmp_path / "out"), tensors=lambda t: t.pop(f"{LAYER}.g_idx"))
    assert V1.open(folder).weight(LAYER).equal(weight)


@pytest.mark.parametrize(
    ("key", "change", "says"),
    [
        ("qweight", lambda t: t.long(), "qweight is torch.int64, expected int32"),
        ("qzeros", lambda t: t.float(), "qzeros is torch.float32, expected int32"),
        ("g_idx", lambda t: t.long(), "g_idx is torch.int64, expected int32"),
        ("scales", lambda t: t.int(), "scales are torch.int32, expected a floating point"),
        ("qweight", lambda t: t.flatten(), "qweight has shape"),
        ("qweight", lambda t: t[:0], "qweight has shape"),
        ("qweight", lambda t: t[:7], "g_idx is [64], expected [56]"),
        ("qweight", lambda t: t[:, :31], "scales are [2, 32], expected [2, 31]"),
        ("scales", lambda t: t.t(), "scales are [32, 2], expected [2, 32]"),
        ("scales", lambda t: t[:1], "scales are [1, 32], expected [2, 32]"),
        ("qzeros", lambda t: t[:, :3], "qzeros are [2, 3], expected [2, 4]"),
        ("g_idx", lambda t: t[:63], "g_idx is [63], expected [64]"),
        ("g_idx", lambda t: t + 1, "g_idx spans 1 to 2, expected 0 to 1"),
        ("g_idx", lambda t: t - 1, "g_idx spans -1 to 0"),
        ("g_idx", lambda t: t * 10**9, "g_idx spans 0 to 1000000000"),
        ("scales", lambda t: t * float("inf"), "scales hold NaN or Inf"),
        ("scales", lambda t: t * float("nan"), "scales hold NaN or Inf"),
        ("qzeros", lambda t: t ^ 0x30, "sym is true, but the stored zero points"),
        ("qweight", None, "no qweight"),
        ("qzeros", None, "no qzeros"),
        ("scales", None, "no scales"),
    ],
)
def test_a_damaged_tensor_is_named_with_its_layer(tmp_path, key, change, says):
    def damage(tensors):
        name = f"{LAYER}.{key}"
        if change is None:
            del tensors[name]
        else:
            tensors[name] = change(tensors[name])

    layers = {"model.layers.0.mlp.gate_proj": plain_weight(4), LAYER: plain_weight(4)}
    folder = save(V1, layers, tmp_path / "out")
    rewrite(folder, tensors=damage)
    with pytest.raises(CheckpointError) as error:
        V1.open(folder).weight(LAYER)
    assert says in str(error.value)
    assert LAYER in str(error.value)
    assert str(folder) in str(error.value)


def test_a_float_copy_beside_the_quantized_weight_is_refused(tmp_path):
    folder = save(V1, {LAYER: plain_weight(4)}, tmp_path / "out")
    rewrite(folder, tensors=lambda tensors: tensors.update({f"{LAYER}.weight": torch.zeros(32, 64)}))
    with pytest.raises(CheckpointError, match=f"{LAYER} is there quantized and in float"):
        V1.open(folder)


@pytest.mark.parametrize(
    ("change", "says"),
    [
        ({"bits": 8}, "expected"),
        ({"bits": 3}, "bits is wrong"),
        ({"bits": 77}, "bits=77"),
        ({"bits": "four"}, "bits='four'"),
        ({"bits": None}, "bits=None"),
        ({"group_size": 16}, "scales are [2, 32], expected [4, 32]"),
        ({"group_size": -1}, "scales are [2, 32], expected [1, 32]"),
        ({"group_size": 0}, "group_size=0"),
        ({"group_size": 10**9}, "scales are [2, 32], expected [1, 32]"),
        ({"group_size": 10**12}, "group_size=1000000000000 is not valid"),
        ({"group_size": [32]}, "group_size=[32]"),
        ({"sym": "perhaps"}, "sym='perhaps'"),
        ({"dynamic": [1]}, "dynamic is no object"),
        ({"dynamic": {"+:(": {"bits": 8}}}, "is no regular expression"),
        ({"dynamic": {"+:.*up_proj": {"bits": 99}}}, "bits=99"),
        ({"dynamic": {".*up_proj": {"bits": 8}}}, LAYER),
        ({"dynamic": {"-:.*up_proj": {}}}, LAYER),
    ],
)
def test_a_config_that_contradicts_the_tensors_is_refused(tmp_path, change, says):
    folder = rewrite(
        save(V1, {LAYER: plain_weight(4)}, tmp_path / "out"), config=lambda quantization: quantization.update(change)
    )
    with pytest.raises(CheckpointError) as error:
        V1.open(folder)
    assert says in str(error.value)
    assert str(folder) in str(error.value)


@pytest.mark.parametrize("key", ["bits", "group_size"])
def test_a_config_without_what_cannot_be_guessed_is_refused(tmp_path, key):
    folder = rewrite(
        save(V1, {LAYER: plain_weight(4)}, tmp_path / "out"), config=lambda quantization: quantization.pop(key)
    )
    with pytest.raises(CheckpointError, match=f"quantization_config has no {key}"):
        V1.open(folder)


def test_a_folder_without_any_quantized_linear_is_refused(llama_folder, tmp_path):
    folder = shutil.copytree(llama_folder, tmp_path / "model")
    config = json.loads((folder / "config.json").read_text())
    quantization = {"quant_method": "gptq", "bits": 4, "group_size": 32, "sym": True}
    (folder / "config.json").write_text(json.dumps({**config, "quantization_config": quantization}))
    with pytest.raises(CheckpointError, match=r"says quant_method gptq but holds no \*.qweight"):
        qcore.load(folder)


def test_a_layer_the_model_does_not_have_is_named(llama_folder, tmp_path):
    folder = qcore.quantize(llama_folder, "rtn", group_size=32, output=tmp_path / "out")

    def rename(tensors):
        for name in [name for name in tensors if name.startswith("model.layers.2.mlp.up_proj")]:
            tensors[name.replace("up_proj", "top_proj")] = tensors.pop(name)

    rewrite(folder, tensors=rename)
    with pytest.raises(
        CheckpointError, match=r"quantized layer model.layers.2.mlp.top_proj is not in LlamaForCausalLM"
    ):
        qcore.load(folder)


def test_a_layer_of_another_shape_than_the_models_is_named(llama_folder, tmp_path):
    folder = qcore.quantize(llama_folder, "rtn", group_size=32, output=tmp_path / "out")
    name = "model.layers.2.mlp.up_proj"

    def exchange(tensors):
        tensors.update(V1.encode(name, random_weight(64, 64, QuantConfig(bits=4, group_size=32))))

    rewrite(folder, tensors=exchange)
    with pytest.raises(CheckpointError, match=name):
        qcore.load(folder)


def test_a_quantized_layer_that_is_missing_is_named(llama_folder, tmp_path):
    folder = qcore.quantize(llama_folder, "rtn", group_size=32, output=tmp_path / "out")

    def remove(tensors):
        for name in [name for name in tensors if name.startswith("model.layers.2.mlp.up_proj")]:
            del tensors[name]

    rewrite(folder, tensors=remove)
    with pytest.raises(QcoreError, match=r"model.layers.2.mlp.up_proj"):
        qcore.load(folder)


def test_quantized_folders_are_read_sharded_too(llama_folder, tmp_path, monkeypatch, tokens):
    whole = qcore.quantize(llama_folder, "rtn", group_size=32, output=tmp_path / "whole")
    monkeypatch.setattr(type(V1), "shard_bytes", 50_000)
    many = qcore.quantize(llama_folder, "rtn", group_size=32, output=tmp_path / "many")
    assert len(list(many.glob("*.safetensors"))) > 2
    ids = tokens[0][None]
    assert torch.equal(qcore.load(many)(ids).logits, qcore.load(whole)(ids).logits)
    os_error = sorted(many.glob("*.safetensors"))[1]
    os_error.write_bytes(os_error.read_bytes()[:-1])
    with pytest.raises(CheckpointError, match=os_error.name):
        qcore.load(many)


@pytest.fixture(scope="module")
def small_folder(tmp_path_factory):
    """A quantized model of few bytes, for damaging."""
    model = tiny_transformer("llama", vocab_size=16, hidden_size=32, intermediate_size=32, num_hidden_layers=1,
                             num_attention_heads=1, num_key_value_heads=1, bos_token_id=0, eos_token_id=1)  # fmt: skip
    return qcore.save(qcore.quantize(model, "rtn", group_size=32), tmp_path_factory.mktemp("fuzz") / "small")


FUZZ = settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
FILES = ["model.safetensors", "config.json", "quantize_config.json", "qcore.json", "generation_config.json"]


def open_all(folder):
    """Open a folder in every way; only qcore's own errors may come of it."""
    for opening in (qcore.inspect, qcore.load):
        try:
            found = opening(folder)
        except QcoreError:
            continue
        assert found is not None


@FUZZ
@given(st.data(), st.sampled_from(FILES))
def test_flipped_bytes_are_an_error_of_ours_or_a_valid_load(small_folder, tmp_path, data, name):
    folder = shutil.copytree(small_folder, tmp_path / "damaged", dirs_exist_ok=True)
    content = bytearray((folder / name).read_bytes())
    header = min(len(content), 5000)  # where the structure is
    places = st.one_of(st.integers(0, header - 1), st.integers(0, len(content) - 1))
    for place, value in data.draw(st.lists(st.tuples(places, st.integers(0, 255)), min_size=1, max_size=4)):
        content[place] = value
    (folder / name).write_bytes(content)
    open_all(folder)


@FUZZ
@given(st.data(), st.sampled_from(FILES))
def test_truncated_files_are_an_error_of_ours_or_a_valid_load(small_folder, tmp_path, data, name):
    folder = shutil.copytree(small_folder, tmp_path / "damaged", dirs_exist_ok=True)
    content = (folder / name).read_bytes()
    (folder / name).write_bytes(content[: data.draw(st.integers(0, len(content) - 1))])
    open_all(folder)


JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=5),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=5), inner, max_size=3),
    max_leaves=5,
)


@pytest.mark.parametrize("layers", [3, None, "x", [3], [{}], [{"name": 3}], {"name": "x"}])
def test_a_damaged_provenance_is_refused(small_folder, tmp_path, layers):
    folder = shutil.copytree(small_folder, tmp_path / "damaged")
    (folder / "qcore.json").write_text(json.dumps({"layers": layers}))
    with pytest.raises(CheckpointError, match=r"qcore.json: layers is no list of objects with a name"):
        qcore.inspect(folder)


@pytest.mark.parametrize("text", ["", "{", "[]", '{"version": 1}'])
def test_a_damaged_tokenizer_is_an_error_or_none_at_all(small_folder, tmp_path, text):
    folder = shutil.copytree(small_folder, tmp_path / "damaged")
    (folder / "tokenizer.json").write_text(text)
    (folder / "tokenizer_config.json").write_text('{"tokenizer_class": "PreTrainedTokenizerFast"}')
    open_all(folder)


@FUZZ
@given(st.data(), st.sampled_from(["config.json", "qcore.json", "generation_config.json"]), JSON)
def test_any_value_under_any_key_is_an_error_of_ours_or_a_valid_load(small_folder, tmp_path, data, name, value):
    folder = shutil.copytree(small_folder, tmp_path / "damaged", dirs_exist_ok=True)
    whole = json.loads((folder / name).read_text())
    part = whole
    if name == "config.json" and data.draw(st.booleans()):
        part = whole["quantization_config"]
    part[data.draw(st.sampled_from(sorted(part)))] = value
    (folder / name).write_text(json.dumps(whole))
    open_all(folder)
