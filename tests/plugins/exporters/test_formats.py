"""Every format: round trips, bytes against independent packing, config keys, what is refused, damage."""

import hashlib
import json
import re
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

import qcore
from qcore import CheckpointError, LayerSpec, QcoreError, QuantConfig, QuantizedWeight, grid, testing
from qcore.plugins import Plugins, installed
from qcore.testing import check_exporter, random_weight, tiny_transformer

LAYER = "model.layers.0.mlp.up_proj"


def plain_weight(bits, sym=True, out=32, columns=64, group_size=32):
    """A weight made by counting, so that its bytes depend on nothing but the format."""
    config = QuantConfig(bits=bits, group_size=group_size, sym=sym)
    groups = grid.num_groups(columns, group_size)
    codes = (torch.arange(out)[:, None] * 5 + torch.arange(columns) * 3) % 2**bits
    scales = ((torch.arange(out)[:, None] + torch.arange(groups)) % 7 + 1).half() / 64
    zeros = torch.arange(out)[:, None] % config.maxq + torch.ones(1, groups)
    zeros = torch.full_like(zeros, 2 ** (bits - 1)) if sym else zeros
    return QuantizedWeight(codes.byte(), scales, zeros.int(), grid.group_index(columns, group_size), config)


def content(layers, tensors=None, config=None, **provenance):
    """Quantized weights, and float tensors beside them, as a Content."""
    specs = {n: LayerSpec(n, w.config, w.in_features, w.out_features, w.act_order) for n, w in layers.items()}
    tensors = tensors or {}
    return qcore.Content(
        config or {"model_type": "llama"},
        specs,
        layers.__getitem__,
        list(tensors),
        tensors.__getitem__,
        provenance,
    )


def save(exporter, layers, folder, tensors=None, **provenance):
    """Save quantized weights as a folder."""
    folder.mkdir()
    exporter.save(content(layers, tensors, **provenance), folder)
    return folder


def change(folder, tensors=None, config=None):
    """Change a folder: tensors(dict) and config(quantization_config) alter in place."""
    if tensors is not None:
        found = load_file(folder / "model.safetensors")
        tensors(found)
        save_file({name: tensor.contiguous() for name, tensor in found.items()}, folder / "model.safetensors")
    if config is not None:
        whole = json.loads((folder / "config.json").read_text())
        config(whole["quantization_config"])
        (folder / "config.json").write_text(json.dumps(whole))
    return folder


def quantization_config(folder):
    return json.loads((folder / "config.json").read_text())["quantization_config"]


def open_all(folder):
    """Open a folder and decode every weight; only qcore's own errors may come of it. Returns whether it went through."""
    try:
        _, found = qcore.content.open_content(folder)
        for name in found.layers:
            found.weight(name)
        for name in found.tensors:
            found.tensor(name)
    except QcoreError:
        return False
    return True


AWQ, AUTOROUND, CT, DENSE, ITREX = (
    installed().get("format", name) for name in ("awq", "autoround", "compressed-tensors", "hf-dequantized", "itrex")
)


@pytest.mark.parametrize(
    ("exporter", "held"),
    [(AWQ, 4), (AUTOROUND, 20), (CT, 20), (DENSE, 30), (ITREX, 12)],
    ids=lambda e: getattr(e, "name", e),
)
def test_conforms(exporter, held, tmp_path):
    assert check_exporter(exporter, tmp_path) == held


def nibbles(tensor):
    """int32 [rows, words] -> the nibbles of each word, lowest first, by arithmetic on Python's integers."""
    words = tensor.contiguous().numpy().view(np.uint32)
    return [[[int(word) >> 4 * slot & 15 for slot in range(8)] for word in row] for row in words]


def test_awq_interleaves_eight_outputs_in_a_word():
    weight = plain_weight(4, sym=False)
    tensors = AWQ.encode("m", weight)
    assert {name: (tuple(t.shape), t.dtype) for name, t in tensors.items()} == {
        "m.qweight": ((64, 4), torch.int32), "m.qzeros": ((2, 4), torch.int32), "m.scales": ((2, 32), torch.float16),
    }  # fmt: skip
    words, zeros = nibbles(tensors["m.qweight"]), nibbles(tensors["m.qzeros"])
    for k, word, slot, n in ((0, 0, 0, 0), (0, 0, 1, 2), (5, 0, 4, 1), (63, 3, 7, 31), (17, 2, 3, 22), (17, 2, 5, 19)):
        assert words[k][word][slot] == weight.codes[n, k]
        assert zeros[k // 32][word][slot] == weight.zeros[n, k // 32]


def test_awq_writes_symmetric_weights_with_their_zero_points(tmp_path):
    folder = save(AWQ, {LAYER: plain_weight(4)}, tmp_path / "out")
    assert set(load_file(folder / "model.safetensors")[f"{LAYER}.qzeros"].numpy().view(np.uint32).flatten()) == {
        0x88888888
    }
    assert quantization_config(folder) == {
        "quant_method": "awq", "bits": 4, "group_size": 32, "zero_point": True, "version": "gemm", "sym": True,
        "modules_to_not_convert": ["lm_head"],
    }  # fmt: skip


@pytest.mark.parametrize(
    ("said", "sym"), [({"zero_point": False}, True), ({"zero_point": True}, False), ({"zero_point": None}, False)]
)
def test_awq_of_others_is_symmetric_when_it_says_so(tmp_path, said, sym):
    folder = save(AWQ, {LAYER: plain_weight(4)}, tmp_path / "out")
    change(folder, config=lambda found: (found.pop("sym"), found.update(said)))
    assert AWQ.open(folder).weight(LAYER).config == QuantConfig(bits=4, group_size=32, sym=sym)


def test_awq_of_old_is_read_from_its_side_file(tmp_path):
    weight = plain_weight(4, sym=False)
    folder = save(AWQ, {LAYER: weight}, tmp_path / "out")
    (folder / "config.json").write_text('{"model_type": "llama"}')
    side = {"zero_point": True, "q_group_size": 32, "w_bit": 4, "version": "GEMM", "modules_to_not_convert": None}
    (folder / "quant_config.json").write_text(json.dumps(side))
    exporter, content_ = qcore.content.open_content(folder)
    assert exporter is AWQ
    assert content_.weight(LAYER).equal(weight)


@pytest.mark.parametrize("version", ["gemv", "marlin", "exllama", 3])
def test_awq_in_another_version_is_refused(tmp_path, version):
    folder = save(AWQ, {LAYER: plain_weight(4)}, tmp_path / "out")
    change(folder, config=lambda found: found.update(version=version))
    with pytest.raises(CheckpointError, match=f"version is '{version}'; qcore reads AWQ's gemm"):
        AWQ.open(folder)


@pytest.mark.parametrize("bits", [2, 3, 4, 5, 8])
def test_compressed_tensors_packs_along_the_inputs_and_zeros_along_the_outputs(bits):
    weight = plain_weight(bits, sym=False)
    tensors = CT.encode("m", weight)
    assert {name: (tuple(t.shape), t.dtype) for name, t in tensors.items()} == {
        "m.weight_packed": ((32, 2 * bits), torch.int32), "m.weight_scale": ((32, 2), torch.float16),
        "m.weight_shape": ((2,), torch.int64), "m.weight_zero_point": ((bits, 2), torch.int32),
    }  # fmt: skip
    assert tensors["m.weight_shape"].tolist() == [32, 64]
    packed, zeros = (tensors[f"m.{part}"].numpy().view(np.uint32) for part in ("weight_packed", "weight_zero_point"))
    for n, k in ((0, 0), (3, 7), (31, 63), (20, 33)):
        stream = sum(int(word) << 32 * i for i, word in enumerate(packed[n]))
        assert stream >> bits * k & weight.config.maxq == weight.codes[n, k]
        stream = sum(int(word) << 32 * i for i, word in enumerate(zeros[:, k // 32]))
        assert stream >> bits * n & weight.config.maxq == weight.zeros[n, k // 32]


def test_compressed_tensors_symmetric_has_no_zero_points_and_the_keys_readers_need(tmp_path):
    folder = save(CT, {LAYER: plain_weight(4, group_size=-1)}, tmp_path / "out")
    assert set(load_file(folder / "model.safetensors")) == {
        f"{LAYER}.{part}" for part in ("weight_packed", "weight_scale", "weight_shape")
    }
    config = quantization_config(folder)
    assert {key: config[key] for key in ("quant_method", "format", "quantization_status", "ignore")} == {
        "quant_method": "compressed-tensors", "format": "pack-quantized", "quantization_status": "compressed",
        "ignore": ["lm_head"],
    }  # fmt: skip
    (group,) = config["config_groups"].values()
    assert group["targets"] == ["Linear"]
    assert group["weights"]["strategy"] == "channel"
    assert group["weights"]["group_size"] is None


@pytest.mark.parametrize("bits", [3, 5, 6, 7])
def test_compressed_tensors_in_the_padded_packing_of_old_is_read(tmp_path, bits):
    weight = plain_weight(bits, sym=False, columns=96)
    folder = save(CT, {LAYER: weight}, tmp_path / "out")

    def padded(codes):
        per_word = 32 // bits
        words = torch.zeros(codes.shape[0], -(-codes.shape[1] // per_word), dtype=torch.int64)
        for j in range(codes.shape[1]):
            words[:, j // per_word] |= codes[:, j].long() << bits * (j % per_word)
        return words.numpy().astype(np.uint32).view(np.int32)

    def older(tensors):
        tensors[f"{LAYER}.weight_packed"] = torch.from_numpy(padded(weight.codes))
        tensors[f"{LAYER}.weight_zero_point"] = (weight.zeros - 2 ** (bits - 1)).to(torch.int8)

    change(folder, tensors=older)
    assert CT.open(folder).weight(LAYER).equal(weight)


def test_compressed_tensors_with_a_g_idx_is_read_and_not_written(tmp_path):
    weight = random_weight(32, 64, QuantConfig(bits=4, group_size=32), act_order=True)
    plain = QuantizedWeight(weight.codes, weight.scales, weight.zeros, grid.group_index(64, 32), weight.config)
    folder = save(CT, {LAYER: plain}, tmp_path / "out")
    change(folder, tensors=lambda tensors: tensors.update({f"{LAYER}.weight_g_idx": weight.g_idx}))
    assert CT.open(folder).weight(LAYER).equal(weight)
    with pytest.raises(CheckpointError, match="act-order, which compressed-tensors has removed"):
        save(CT, {LAYER: weight}, tmp_path / "again")


@pytest.mark.parametrize(
    ("bits", "sym", "packing"),
    [(4, True, "auto_round:auto_gptq"), (3, True, "auto_round:auto_gptq"), (4, False, "auto_round:auto_awq"),
     (2, False, "auto_round"), (8, False, "auto_round")],
)  # fmt: skip
def test_autoround_takes_the_layout_that_auto_round_would(tmp_path, bits, sym, packing):
    weight = plain_weight(bits, sym)
    folder = save(AUTOROUND, {LAYER: weight}, tmp_path / "out")
    assert quantization_config(folder) == {
        "quant_method": "auto-round", "bits": bits, "group_size": 32, "sym": sym, "data_type": "int",
        "packing_format": packing, "block_name_to_quantize": "model.layers", "provider": "qcore",
    }  # fmt: skip
    tensors = load_file(folder / "model.safetensors")
    assert set(tensors) == {f"{LAYER}.{part}" for part in ("qweight", "qzeros", "scales")}
    if packing == "auto_round":
        stored = int(tensors[f"{LAYER}.qzeros"][0, 0]) & 2**bits - 1
        assert stored == weight.zeros[0, 0]


@pytest.mark.parametrize(
    ("written", "read"),
    [("auto_round", "auto_round:gptqmodel"), ("auto_round", "autoround:exllamav2"), ("auto_round:auto_awq", "auto_round:awq"),
     ("auto_round:auto_gptq", "auto_round:gptq")],
)  # fmt: skip
def test_autoround_knows_the_names_that_versions_gave_their_layouts(tmp_path, written, read):
    weight = plain_weight(3 if written == "auto_round" else 4, sym="gptq" in written)
    folder = save(AUTOROUND, {LAYER: weight}, tmp_path / "out")
    change(
        folder,
        config=lambda found: found.update(
            quant_method="intel/auto-round", backend=found.pop("packing_format") and read
        ),
    )
    assert AUTOROUND.open(folder).weight(LAYER).equal(weight)


def itrex_words(codes, bits):
    """Codes [rows, n] as auto-round packs them, word by word: 32 // bits to a word, the lowest bits first."""
    per_word = 32 // bits
    words = torch.zeros(codes.shape[0], -(-codes.shape[1] // per_word), dtype=torch.int64)
    for j in range(codes.shape[1]):
        words[:, j // per_word] |= (codes[:, j].long() & 2**bits - 1) << bits * (j % per_word)
    return words.numpy().astype(np.uint32).view(np.int32)


@pytest.mark.parametrize("bits", [2, 4, 8])
def test_itrex_is_packed_as_auto_round_did_with_zero_stored_as_ones(tmp_path, bits):
    weight = plain_weight(bits, sym=False)
    weight.zeros[3, 1] = 0
    folder = save(ITREX, {LAYER: weight}, tmp_path / "out")
    found = load_file(folder / "model.safetensors")
    assert np.array_equal(found[f"{LAYER}.qweight"].numpy(), itrex_words(weight.codes, bits).T)
    assert np.array_equal(found[f"{LAYER}.qzeros"].numpy(), itrex_words(weight.zeros.t() - 1, bits))
    assert torch.equal(found[f"{LAYER}.scales"], weight.scales.t())
    exporter, again = qcore.content.open_content(folder)
    assert exporter is ITREX
    assert again.weight(LAYER).equal(weight)


@pytest.mark.parametrize("scale_dtype", ["torch.float32", "fp16"])
def test_itrex_of_auto_round_0_1_is_read_with_its_biases_of_zeros(tmp_path, scale_dtype):
    weight = plain_weight(4)
    folder = save(ITREX, {LAYER: weight}, tmp_path / "out")
    written = {
        "bits": 4, "group_size": 32, "scale_dtype": scale_dtype, "sym": True, "quant_method": "gptq", "model_name_or_path": None,
        "model_file_base_name": "model", "enable_minmax_tuning": True, "iters": 200, "lr": 0.005, "minmax_lr": 0.005,
        "use_quant_input": True, "damp_percent": 0.01, "desc_act": False, "true_sequential": False,
    }  # fmt: skip
    change(folder, lambda t: t.update({f"{LAYER}.bias": torch.zeros(32)}), lambda c: (c.clear(), c.update(written)))
    exporter, again = qcore.content.open_content(folder)
    assert exporter is ITREX
    read = again.weight(LAYER)
    assert torch.equal(read.dequantize(), weight.dequantize())
    assert not read.bias.any()


def mixed():
    layers = {f"model.layers.{i}.mlp.up_proj": plain_weight(4) for i in range(3)}
    layers["model.layers.1.mlp.up_proj2"] = plain_weight(8)
    layers["lm_head"] = plain_weight(8, group_size=-1)
    return layers


def test_autoround_keeps_mixed_bits_and_names_what_stays_in_float(tmp_path):
    floats = {"model.layers.0.mlp.gate_proj.weight": torch.ones(4, 4), "model.layers.0.norm.weight": torch.ones(4),
              "model.embed_tokens.weight": torch.ones(4, 4)}  # fmt: skip
    folder = save(AUTOROUND, mixed(), tmp_path / "out", floats)
    assert quantization_config(folder)["extra_config"] == {
        "model.layers.1.mlp.up_proj2": {"bits": 8, "group_size": 32, "sym": True, "data_type": "int"},
        "lm_head": {"bits": 8, "group_size": -1, "sym": True, "data_type": "int"},
        "model.layers.0.mlp.gate_proj": {"bits": 16, "data_type": "float"},
    }
    again = AUTOROUND.open(folder)
    assert all(weight.equal(again.weight(name)) for name, weight in mixed().items())


def test_autoround_patterns_count_after_names(tmp_path):
    folder = save(AUTOROUND, mixed(), tmp_path / "out")
    rules = {
        r".*layers\.1\.mlp\..*2$": {"bits": 8},
        r".*up_proj.*": {"bits": 4},
        "lm_head": {"bits": 8, "group_size": -1},
    }
    change(folder, config=lambda found: found.update(extra_config=rules))
    again = AUTOROUND.open(folder)
    assert all(weight.equal(again.weight(name)) for name, weight in mixed().items())


def test_compressed_tensors_keeps_mixed_bits(tmp_path):
    floats = {"model.layers.0.mlp.gate_proj.weight": torch.ones(4, 4), "model.layers.0.norm.weight": torch.ones(4)}
    folder = save(CT, mixed(), tmp_path / "out", floats)
    config = quantization_config(folder)
    assert config["ignore"] == ["model.layers.0.mlp.gate_proj"]
    assert [group["targets"] for group in config["config_groups"].values()] == [
        ["Linear"], ["model.layers.1.mlp.up_proj2"], ["lm_head"],
    ]  # fmt: skip
    again = CT.open(folder)
    assert all(weight.equal(again.weight(name)) for name, weight in mixed().items())
    pattern = r"re:.*up_proj2$"
    change(folder, config=lambda found: found["config_groups"]["group_1"].update(targets=[pattern]))
    assert CT.open(folder).layers["model.layers.1.mlp.up_proj2"].config.bits == 8


def test_awq_refuses_mixed_grids(tmp_path):
    layers = {LAYER: plain_weight(4), "model.layers.1.mlp.up_proj": plain_weight(4, group_size=-1)}
    with pytest.raises(
        CheckpointError, match="one grid for all linears, found 4 bits, group -1, sym and 4 bits, group 32, sym"
    ):
        save(AWQ, layers, tmp_path / "out")


@pytest.mark.parametrize(
    ("exporter", "config", "out", "columns", "says"),
    [
        (AWQ, {"bits": 3}, 32, 64, "3 bits; this layout has 4"),
        (AWQ, {"bits": 4}, 12, 64, "out_features 12 is no multiple of 8"),
        (AWQ, {"bits": 4, "group_size": 48}, 32, 64, "groups of 48 do not divide in_features 64"),
        (AUTOROUND, {"bits": 3}, 24, 64, "out_features 24 x 3 bits is no whole number"),
        (AUTOROUND, {"bits": 4, "sym": False}, 12, 64, "out_features 12 x 4 bits is no whole number"),
        (ITREX, {"bits": 3}, 32, 64, "3 bits; qcore writes 2, 4, 8"),
        (ITREX, {"bits": 4, "group_size": 64}, 32, 64, "groups of 64; its config allows -1, 32, 128"),
        (CT, {"bits": 4, "group_size": 48}, 32, 64, "groups of 48 do not divide in_features 64"),
    ],
)
def test_what_a_format_cannot_hold_is_told_beforehand(exporter, config, out, columns, says):
    assert says in exporter.why_not(LayerSpec("layer", QuantConfig(**{"group_size": 32, **config}), columns, out))


@pytest.mark.parametrize("exporter", [AWQ, AUTOROUND], ids=lambda e: e.name)
def test_act_order_is_told_beforehand(exporter):
    assert "act-order needs g_idx" in exporter.why_not(LayerSpec("m", QuantConfig(bits=4, group_size=32), 64, 64, True))


@pytest.mark.parametrize("exporter", [AWQ, AUTOROUND, CT], ids=lambda e: e.name)
@pytest.mark.parametrize("value", [-1, 16, 2.5])
def test_zero_points_beyond_the_format_are_refused(exporter, value, tmp_path):
    weight = plain_weight(4, sym=False)
    zeros = weight.zeros.float() if isinstance(value, float) else weight.zeros.clone()
    zeros[3, 1] = value
    weight = QuantizedWeight(weight.codes, weight.scales, zeros, weight.g_idx, weight.config)
    with pytest.raises(CheckpointError, match=f"cannot hold {LAYER}: it holds integer zero points 0 to 15, found"):
        save(exporter, {LAYER: weight}, tmp_path / "out")


#: sha256 of model.safetensors for `plain_weight(bits, sym)`; a change of these bytes is a change of the format
GOLDEN = {
    ("awq", 4, False): "9b6ad1daa2b69e5295cf408196dedfa9b0cb13a97256d985933892c52995f203",
    ("autoround", 2, False): "4ccbf873c8a7233e0539485e73181751348c365a4a62fbbe62536d8766769e7f",
    ("itrex", 4, False): "9c5cbdeefcea8fc68ae64338593e325ffe2758b8311a831600f73ef19704386b",
    ("compressed-tensors", 4, True): "b8c97c849e427573732d046b516e544194629cf7eb395fac528f71b2323a48a3",
    ("compressed-tensors", 3, False): "b02a03ee994c8734bf2088477539912b9ccf48f3f77560cce87013016f22110c",
}


@pytest.mark.parametrize(("name", "bits", "sym"), GOLDEN)
def test_a_small_checkpoint_has_its_golden_bytes(tmp_path, name, bits, sym):
    folder = save(installed().get("format", name), {LAYER: plain_weight(bits, sym)}, tmp_path / "out")
    assert hashlib.sha256((folder / "model.safetensors").read_bytes()).hexdigest() == GOLDEN[name, bits, sym]


SUFFIXES = {"awq": "qweight qzeros scales", "autoround": "qweight qzeros scales",
            "compressed-tensors": "weight_packed weight_scale weight_shape weight_zero_point"}  # fmt: skip
DAMAGES = {
    "missing": None,
    "of another dtype": lambda t: t.to(torch.int16),
    "a row short": lambda t: t[:-1],
    "flat": lambda t: t.flatten(),
    "empty": lambda t: t[:0],
    "of three dimensions": lambda t: t[None],
}


@pytest.mark.parametrize("damage", DAMAGES)
@pytest.mark.parametrize(("name", "part"), [(n, part) for n, parts in SUFFIXES.items() for part in parts.split()])
def test_a_damaged_tensor_is_named_with_its_layer(tmp_path, name, part, damage):
    exporter = installed().get("format", name)
    layers = {"model.layers.0.mlp.gate_proj": plain_weight(4, sym=False), LAYER: plain_weight(4, sym=False)}
    folder = save(exporter, layers, tmp_path / "out")

    def spoil(tensors):
        key = f"{LAYER}.{part}"
        tensor = tensors.pop(key)
        if DAMAGES[damage] is not None:
            tensors[key] = DAMAGES[damage](tensor)

    change(folder, tensors=spoil)
    if (part, damage) == ("weight_shape", "flat"):
        assert exporter.open(folder).weight(LAYER).equal(layers[LAYER])  # it is flat already
        return
    with pytest.raises(CheckpointError) as error:
        exporter.open(folder).weight(LAYER)
    assert LAYER in str(error.value)
    assert str(folder) in str(error.value)


@pytest.mark.parametrize("value", [[0, 64], [32, -64], [2**40, 2**40], [32, 2**62], [64, 32]])
def test_a_wild_weight_shape_is_refused_without_an_allocation(tmp_path, value):
    folder = save(CT, {LAYER: plain_weight(4)}, tmp_path / "out")
    change(folder, tensors=lambda tensors: tensors.update({f"{LAYER}.weight_shape": torch.tensor(value)}))
    with pytest.raises(CheckpointError, match=LAYER):
        CT.open(folder)


@pytest.mark.parametrize(
    ("name", "update", "says"),
    [
        ("awq", {"bits": 8}, "8 bits, expected 4"),
        ("awq", {"group_size": 64}, "scales are [2, 32], expected [1, 32]"),
        ("awq", {"group_size": "x"}, "group_size='x'"),
        ("awq", {"sym": 3}, "sym=3"),
        ("autoround", {"bits": 8}, "expected"),
        ("autoround", {"bits": None}, "bits=None"),
        ("autoround", {"packing_format": 7}, "packing_format 7"),
        ("autoround", {"packing_format": "auto_round:fp8"}, "which qcore does not read"),
        ("autoround", {"packing_format": "auto_round:llm_compressor"}, "which qcore does not read"),
        ("autoround", {"data_type": "mx_fp"}, "data_type 'mx_fp'"),
        ("autoround", {"act_bits": 8}, "act_bits 8"),
        ("autoround", {"extra_config": [1]}, "extra_config is no object"),
        ("autoround", {"extra_config": {LAYER: 3}}, "expected an object"),
        ("autoround", {"extra_config": {LAYER: {"bits": 16}}}, "leaves model.layers.0.mlp.up_proj in float"),
        ("autoround", {"extra_config": {"(": {"bits": 8}}}, "is no regular expression"),
        ("compressed-tensors", {"config_groups": {}}, "config_groups is empty"),
        ("compressed-tensors", {"config_groups": []}, "is no object of objects"),
        ("compressed-tensors", {"config_groups": {"g": {"targets": "Linear"}}}, "no list of names"),
        ("compressed-tensors", {"config_groups": {"g": {"targets": ["Linear"]}}}, "weights is no object"),
        ("compressed-tensors", {"config_groups": {"g": {"targets": ["re:("]}}}, "is no regular expression"),
        ("compressed-tensors", {"config_groups": {"g": {"targets": ["re:other"]}}}, "no group targets"),
        ("compressed-tensors", {"format": "nvfp4-pack-quantized", "config_groups": {"g": {"targets": []}}}, "qcore reads pack-quantized"),
        ("compressed-tensors", {"config_groups": {"g": {"targets": ["Linear"], "weights": {"strategy": "tensor"}}}}, "strategy 'tensor'"),
        ("compressed-tensors", {"config_groups": {"g": {"targets": ["Linear"], "weights": {"type": "float"}}}}, "integer weights alone"),
        ("compressed-tensors", {"config_groups": {"g": {"targets": ["Linear"], "weights": {"num_bits": 40, "strategy": "channel"}}}}, "bits=40"),
    ],
)  # fmt: skip
def test_a_config_that_cannot_be_or_contradicts_the_tensors_is_refused(tmp_path, name, update, says):
    exporter = installed().get("format", name)
    folder = save(exporter, {LAYER: plain_weight(4)}, tmp_path / "out")
    change(folder, config=lambda found: found.update(update))
    with pytest.raises(CheckpointError) as error:
        exporter.open(folder).weight(LAYER)
    assert says in str(error.value)
    assert str(folder) in str(error.value)


@pytest.mark.parametrize("model_type", ["llama", "gpt2"])
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
def test_dequantized_folders_are_opened_by_transformers_with_equal_logits(tmp_path, model_type, dtype, tokens):
    from transformers import AutoModelForCausalLM

    small = {
        "llama": {"hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 2, "num_attention_heads": 4, "num_key_value_heads": 2},
        "gpt2": {"n_embd": 64, "n_layer": 2, "n_head": 4},
    }[model_type]  # fmt: skip
    source = tmp_path / "model"
    tiny_transformer(model_type, vocab_size=320, bos_token_id=0, eos_token_id=1, **small).to(dtype).save_pretrained(
        source
    )
    quantized = qcore.quantize(source, "rtn", group_size=32, output=tmp_path / "gptq")
    _, found = qcore.content.open_content(quantized)
    target = tmp_path / "dense"
    target.mkdir()
    DENSE.save(found, target)
    assert "quantization_config" not in json.loads((target / "config.json").read_text())
    model, info = AutoModelForCausalLM.from_pretrained(target, output_loading_info=True, dtype=torch.float32)
    assert not info["missing_keys"]
    assert not info["unexpected_keys"]
    assert next(iter(load_file(target / "model.safetensors").values())).dtype == dtype
    expected = qcore.load(quantized)
    for name, weight in ((name, found.weight(name)) for name in found.layers):
        dense = qcore.linear.weight_of(model.get_submodule(name))
        assert torch.equal(dense, weight.dequantize(dtype).float())
    with torch.no_grad():
        logits, wanted = model(tokens[0][None]).logits, expected(tokens[0][None]).logits
    assert float((logits - wanted).abs().max() / wanted.abs().max()) < {torch.float32: 1e-4}.get(dtype, 2e-2)


@pytest.fixture
def signed(tmp_path, monkeypatch):
    """The exporter of docs/formats.md, loaded as a plugin, and its plugins."""
    page = (Path(__file__).parents[3] / "docs/formats.md").read_text(encoding="utf-8")
    (source,) = (block for block in re.findall(r"```python\n(.*?)```", page, re.DOTALL) if "acme_signed.py" in block)
    assert sum(bool(line.strip()) for line in source.splitlines()) <= 30
    monkeypatch.setenv("ACME_KEY", "secret")
    monkeypatch.syspath_prepend(tmp_path)
    plugins = Plugins([testing.entry_point(tmp_path, "acme_signed", source, "acme")], disabled=(), only=None)
    return plugins.get("format", "acme-signed"), plugins


def test_a_format_with_a_signed_manifest_round_trips_and_refuses_what_was_not_signed(signed, tmp_path, monkeypatch):
    exporter, plugins = signed
    (tmp_path / "check").mkdir()
    assert check_exporter(exporter, tmp_path / "check") > 0
    weight = random_weight(32, 64, QuantConfig(bits=8, group_size=-1), bias=True)
    folder = save(exporter, {LAYER: weight}, tmp_path / "out")
    found, content_ = qcore.content.open_content(folder, plugins)
    assert found is exporter
    assert content_.weight(LAYER).equal(weight)
    monkeypatch.setenv("ACME_KEY", "another")
    with pytest.raises(CheckpointError, match="is not signed by Acme"):
        exporter.open(folder)
    monkeypatch.setenv("ACME_KEY", "secret")
    data = bytearray((folder / "model.safetensors").read_bytes())
    data[-1] ^= 1
    (folder / "model.safetensors").write_bytes(data)
    with pytest.raises(CheckpointError, match=r"model\.safetensors is not the file that SHA256SUMS was written for"):
        exporter.open(folder)
    (folder / "signature").unlink()
    with pytest.raises(CheckpointError, match="is not signed by Acme"):
        exporter.open(folder)
