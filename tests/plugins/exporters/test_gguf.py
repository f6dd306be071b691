"""GGUF: blocks against the gguf package's own decoding, whole models against transformers' reader, damage."""

import json
import struct
from dataclasses import replace

import gguf
import numpy as np
import pytest
import torch
from qcore_plugins import cpu_library
from qcore_plugins.exporters import gguf_blocks, gguf_file
from transformers import AutoModelForCausalLM, AutoTokenizer

import qcore
from qcore import BackendError, CheckpointError, Content, LayerSpec, QuantConfig, QuantizedWeight
from qcore.content import open_content
from qcore.plugins import installed
from qcore.testing import random_weight, tiny_transformer

GGUF = installed().get("format", "gguf")
SMALL = {
    "vocab_size": 320, "hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 2, "num_attention_heads": 4,
    "num_key_value_heads": 2, "max_position_embeddings": 256, "bos_token_id": 0, "eos_token_id": 1,
}  # fmt: skip
GRIDS = [(2, True), (3, True), (4, True), (5, True), (6, True), (7, True), (8, True), (2, False), (3, False), (4, False), (5, False)]  # fmt: skip


@pytest.mark.parametrize(("bits", "sym"), GRIDS)
@pytest.mark.parametrize("group_size", [32, 64, -1])
def test_blocks_decode_as_the_gguf_package_decodes_them(bits, sym, group_size):
    weight = random_weight(8, 160, QuantConfig(bits=bits, group_size=group_size, sym=sym))
    kind = gguf_blocks.type_for(bits, sym)
    blocks = gguf_blocks.encode(kind, *gguf_blocks.into_type(kind, weight))
    assert blocks.shape == (8, 160 // 32 * kind.size)
    dense = gguf.quants.dequantize(blocks.numpy(), gguf.GGMLQuantizationType(kind.number))
    step = float(weight.scales.abs().max())
    # an offset m = -d z is rounded to float16: at most half a unit in its last place, z d 2**-11
    assert np.abs(dense - weight.dequantize().numpy()).max() <= (0 if sym else step * weight.config.maxq * 2**-11)
    codes, scales, low = gguf_blocks.decode(kind, blocks)
    assert torch.equal(codes, gguf_blocks.into_type(kind, weight)[0])
    assert torch.equal(scales, weight.scales[:, weight.g_idx[::32].long()])
    if not sym:
        assert torch.equal(gguf_blocks.zeros_from(scales, low), weight.zeros[:, weight.g_idx[::32].long()])


@pytest.mark.parametrize("kind", gguf_blocks.TYPES, ids=lambda kind: kind.name)
def test_compiled_and_torch_agree(kind, monkeypatch):
    weight = random_weight(7, 352, QuantConfig(bits=kind.bits, group_size=64, sym=not kind.offset))
    parts = gguf_blocks.into_type(kind, weight)
    blocks = gguf_blocks.encode(kind, *parts)
    found = gguf_blocks.decode(kind, blocks)
    monkeypatch.setattr(cpu_library, "serves", lambda tensor: False)
    assert torch.equal(gguf_blocks.encode(kind, *parts), blocks)
    for one, other in zip(found, gguf_blocks.decode(kind, blocks), strict=True):
        assert (one is None and other is None) or torch.equal(one, other)
    assert gguf_blocks.weight_of(kind, blocks, weight.config).equal(weight)


@pytest.mark.parametrize(
    "wrong", [{"bits": 3}, {"blocks": 0}, {"codes": 0}, {"d": 0}, {"packed": 0}, {"bits": 8}, {"m": 1}]
)
def test_the_library_refuses_what_are_no_blocks(wrong):
    held = {name: torch.zeros(64, dtype=torch.uint8) for name in ("codes", "d", "m", "packed")}
    values = {"bits": 4, "blocks": 1, **{name: each.data_ptr() for name, each in held.items()}, **wrong}
    for function, order in (("pack", ("codes", "d", "m", "packed")), ("unpack", ("packed", "codes", "d", "m"))):
        arguments = [values[name] for name in ("bits", "blocks", *order)]
        with pytest.raises(BackendError, match=f"qc_{function}_blocks failed"):
            cpu_library.CPU.call(cpu_library.load(), f"qc_{function}_blocks", *arguments)


def test_the_types_are_those_of_the_gguf_package():
    for kind in gguf_blocks.TYPES:
        theirs = gguf.GGMLQuantizationType[kind.name]
        assert (theirs.value, gguf.GGML_QUANT_SIZES[theirs]) == (kind.number, (32, kind.size))
        assert gguf.LlamaFileType[f"MOSTLY_{kind.name}"] == kind.file_type


def quantized(model_type, folder, config, tokenizer, dtype=torch.float16, **more):
    """A tiny model whose linears hold random weights of a grid, as a GGUF folder; and those weights."""
    source = folder / "float"
    model = tiny_transformer(model_type, **{**SMALL, **more}).to(dtype)
    model.save_pretrained(source)
    tokenizer.save_pretrained(source)
    target = qcore.quantize(source, "rtn", **config.model_dump(), output=folder / "gptq", format="gptq_v2")
    _, content = open_content(target)
    layers = {}
    for number, (name, layer) in enumerate(content.layers.items()):
        bias = content.weight(name).bias is not None
        made = random_weight(layer.out_features, layer.in_features, config, bias=bias, seed=number)
        layers[name] = (
            made if made.bias is None else QuantizedWeight(*list(vars(made).values())[:5], made.bias.to(dtype))
        )
    out = folder / "gguf"
    out.mkdir()
    GGUF.save(
        Content(
            content.config, content.layers, layers.__getitem__, content.tensors, content.tensor, files=content.files
        ),
        out,
    )
    return out, layers, content


@pytest.mark.parametrize("config", [QuantConfig(bits=b, group_size=g, sym=s) for (b, s), g in zip(GRIDS, [32, 64, -1] * 4, strict=False) if b not in (5, 6, 7)], ids=str)  # fmt: skip
def test_a_model_comes_back_bit_for_bit(tmp_path, tokenizer, config):
    out, layers, content = quantized("llama", tmp_path, config, tokenizer)
    again = GGUF.open(out)
    assert {name: weight.difference(again.weight(name)) for name, weight in layers.items()} == dict.fromkeys(layers)
    for name in content.tensors:
        assert torch.equal(content.tensor(name), again.tensor(name))
        assert content.tensor(name).dtype == again.tensor(name).dtype
    assert again.config == content.config


@pytest.mark.parametrize(
    ("model_type", "more"),
    [
        ("llama", {}), ("llama", {"tie_word_embeddings": True}), ("mistral", {"sliding_window": None}), ("qwen2", {}), ("qwen3", {"head_dim": 128}),
        ("llama", {"rope_parameters": {"rope_type": "linear", "rope_theta": 5000.0, "factor": 4.0}}),
    ],
)  # fmt: skip
def test_transformers_reads_the_file_with_equal_weights(tmp_path, tokenizer, tokens, model_type, more):
    config = QuantConfig(bits=4, group_size=32)
    out, layers, _ = quantized(model_type, tmp_path, config, tokenizer, **more)
    theirs = AutoModelForCausalLM.from_pretrained(out, gguf_file="model.gguf", dtype=torch.float32)
    for name, weight in layers.items():
        assert torch.equal(theirs.get_submodule(name).weight, weight.dequantize()), name
        if weight.bias is not None:
            assert torch.equal(theirs.get_submodule(name).bias, weight.bias.float()), name
    ours = qcore.load(out, backend="torch_reference")
    with torch.no_grad():
        logits, expected = ours(tokens[0][None]).logits, theirs(tokens[0][None]).logits
    if "rope_parameters" not in more:  # which transformers does not take from the file
        assert torch.allclose(logits, expected, atol=1e-4)


def test_the_tokenizer_in_the_file_cuts_text_as_the_models_own(tmp_path, tokenizer):
    out, _, _ = quantized("llama", tmp_path, QuantConfig(bits=4, group_size=32), tokenizer)
    theirs = AutoTokenizer.from_pretrained(out, gguf_file="model.gguf")
    text = "assert_stmt: the simple form, `assert expression`, is equivalent to\n  if __debug__: 1234"
    assert theirs(text).input_ids == tokenizer(text).input_ids


def test_metadata_is_what_llama_cpp_asks_for(tmp_path, tokenizer):
    out, _, _ = quantized("llama", tmp_path, QuantConfig(bits=8, group_size=64), tokenizer)
    fields = gguf_file.GgufFile(out / "model.gguf").fields
    expected = {
        "general.architecture": "llama", "general.file_type": 7, "llama.block_count": 2, "llama.context_length": 256,
        "llama.embedding_length": 64, "llama.feed_forward_length": 96, "llama.attention.head_count": 4,
        "llama.attention.head_count_kv": 2, "llama.rope.dimension_count": 16, "llama.vocab_size": 320,
        "tokenizer.ggml.model": "gpt2", "tokenizer.ggml.pre": "gpt-2", "tokenizer.ggml.bos_token_id": 0,
        "tokenizer.ggml.eos_token_id": 1, "general.quantization_version": 2,
    }  # fmt: skip
    assert {key: fields[key] for key in expected} == expected
    assert len(fields["tokenizer.ggml.tokens"]) == 320
    reader = gguf.GGUFReader(out / "model.gguf")
    assert {tensor.name: tensor.tensor_type.name for tensor in reader.tensors}["blk.1.ffn_down.weight"] == "Q8_0"


def test_llama3_frequencies_are_those_of_transformers(tmp_path, tokenizer):
    rope = {"rope_type": "llama3", "rope_theta": 10000.0, "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
            "original_max_position_embeddings": 64}  # fmt: skip
    out, _, content = quantized("llama", tmp_path, QuantConfig(bits=4, group_size=32), tokenizer, rope_parameters=rope)
    factors = gguf_file.GgufFile(out / "model.gguf").floats("rope_freqs.weight")
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "float")
    plain = 1 / 10000.0 ** (torch.arange(0, 16, 2) / 16)
    assert torch.allclose(plain / factors, model.model.rotary_emb.inv_freq, rtol=1e-5)
    assert set(GGUF.open(out).tensors) == set(content.tensors)


@pytest.mark.parametrize(
    ("config", "columns", "act_order", "says"),
    [
        ({"bits": 4, "group_size": 16}, 64, False, "groups of 16 are no whole blocks of 32"),
        ({"bits": 4, "group_size": 32}, 48, False, "in_features 48 is no multiple of 32"),
        ({"bits": 8, "group_size": 32, "sym": False}, 64, False, "8 bits with zero points"),
        ({"bits": 6, "group_size": 32, "sym": False}, 64, False, "6 bits with zero points"),
        ({"bits": 4, "group_size": 32}, 64, True, "act-order, which GGUF has not"),
    ],
)
def test_what_it_cannot_hold_is_told_beforehand(config, columns, act_order, says):
    assert says in GGUF.why_not(LayerSpec("m", QuantConfig(**config), columns, 32, act_order))


def test_an_unknown_model_is_refused_before_the_run(tmp_path, tokenizer):
    source = tmp_path / "model"
    tiny_transformer("gpt2", vocab_size=320, n_embd=64, n_layer=2, n_head=4).save_pretrained(source)
    with pytest.raises(qcore.ConfigError, match="model_type 'gpt2'; qcore writes llama, mistral, qwen2, qwen3 as GGUF"):
        qcore.quantize(source, "rtn", group_size=32, output=tmp_path / "out", format="gguf")


@pytest.mark.parametrize(
    ("scale", "says"), [(2.0**-30, "does not hold all of these"), (1.0001, "does not hold all of these")]
)
def test_scales_beyond_float16_are_refused(scale, says):
    weight = random_weight(32, 64, QuantConfig(bits=4, group_size=32))
    weight = QuantizedWeight(weight.codes, weight.scales.float() * scale, weight.zeros, weight.g_idx, weight.config)
    assert says in GGUF.why_not_exact(weight)


def test_zero_points_that_float16_offsets_lose_are_refused():
    weight = random_weight(32, 64, QuantConfig(bits=4, group_size=32, sym=False))
    scales = torch.full_like(weight.scales, 60000.0)
    weight = QuantizedWeight(weight.codes, scales, weight.zeros, weight.g_idx, weight.config)
    assert "offsets do not give these zero points back" in GGUF.why_not_exact(weight)


def test_gptq_converts_to_gguf_and_back_without_a_changed_bit(tmp_path, llama_folder, tokens):
    first = qcore.quantize(llama_folder, "rtn", group_size=32, sym=False, output=tmp_path / "gptq", format="gptq")
    middle = qcore.convert(first, tmp_path / "gguf", "gguf")
    last = qcore.convert(middle, tmp_path / "again", "gptq")
    before, after = open_content(first)[1], open_content(last)[1]
    assert all(before.weight(name).equal(after.weight(name)) for name in before.layers)
    assert qcore.inspect(middle)["format"] == "gguf"
    assert qcore.inspect(middle)["bits_per_weight"] == 5  # 20 bytes for 32 weights
    with torch.no_grad():
        assert torch.equal(qcore.load(last)(tokens[0][None]).logits, qcore.load(first)(tokens[0][None]).logits)


def test_what_stays_in_float_is_read_when_its_turn_comes(tmp_path, llama_folder):
    """No tensor waits in memory while others are written; in a folder's headers stands what the file's header needs."""
    first = qcore.quantize(llama_folder, "rtn", group_size=32, output=tmp_path / "gptq", format="gptq")
    content, out, read = open_content(first)[1], tmp_path / "gguf", []

    def tensor(name):
        read.append((name, (out / "model.gguf").stat().st_size))
        return content.tensor(name)

    out.mkdir()
    GGUF.save(replace(content, tensor=tensor), out)
    assert sorted(name for name, _ in read) == sorted(content.tensors)  # each once
    assert 0 < read[0][1] < read[-1][1]  # the file has grown meanwhile


def test_a_file_that_reads_back_differently_is_not_kept(tmp_path, llama_folder, monkeypatch):
    first = qcore.quantize(llama_folder, "rtn", group_size=32, output=tmp_path / "gptq", format="gptq")
    encode = gguf_blocks.encode
    monkeypatch.setattr(gguf_blocks, "encode", lambda *parts: encode(*parts) ^ 64)
    with pytest.raises(CheckpointError, match="reads back with a different"):
        qcore.convert(first, tmp_path / "out", "gguf")
    assert not (tmp_path / "out").exists()


@pytest.fixture(scope="module")
def good(tmp_path_factory, tokenizer):
    """The bytes of a small file, and a folder to damage it in."""
    folder = tmp_path_factory.mktemp("gguf")
    out, _, _ = quantized("llama", folder, QuantConfig(bits=4, group_size=32), tokenizer, num_hidden_layers=1)
    return out, (out / "model.gguf").read_bytes()


def damaged(good, data):
    folder, original = good
    (folder / "model.gguf").write_bytes(data)
    try:
        content = GGUF.open(folder)
        for name in content.layers:
            content.weight(name)
        for name in content.tensors:
            content.tensor(name)
    finally:
        (folder / "model.gguf").write_bytes(original)


@pytest.mark.parametrize(
    ("place", "value", "says"),
    [
        (0, b"GGML", "starts with b'GGML'"),
        (4, struct.pack("<I", 1), "GGUF version 1"),
        (4, struct.pack(">I", 3), "GGUF version 50331648"),
        (8, struct.pack("<Q", 2**62), "tensors do not fit"),
        (16, struct.pack("<Q", 2**63), "fields do not fit"),
        (24, struct.pack("<Q", 2**40), "more bytes should be"),
    ],
)
def test_a_wild_header_is_refused(good, place, value, says):
    data = good[1][:place] + value + good[1][place + len(value) :]
    with pytest.raises(CheckpointError, match=says):
        damaged(good, data)


def tensor_info(data, name=b"blk.0.ffn_up.weight"):
    """Where the number of dimensions of a tensor stands."""
    return data.index(struct.pack("<Q", len(name)) + name) + 8 + len(name)


@pytest.mark.parametrize(
    ("offset", "value", "says"),
    [
        (0, struct.pack("<I", 9), "has 9 dimensions"),
        (4, struct.pack("<Q", 2**60), "leaves the file"),
        (4, struct.pack("<Q", 33), "no whole blocks"),
        (12, struct.pack("<Q", 0), "is empty or leaves the file"),
        (20, struct.pack("<I", 12), "has type 12; qcore reads F32, F16, BF16, Q4_0"),
        (20, struct.pack("<I", 3), "qcore.layers says 4 bits, group 32, sym, its type is Q4_1|leaves the file"),
        (24, struct.pack("<Q", 2**62), "leaves the file"),
        (24, struct.pack("<Q", 7), "is not aligned to 32"),
    ],
)
def test_a_wild_tensor_is_refused(good, offset, value, says):
    place = tensor_info(good[1]) + offset
    with pytest.raises(CheckpointError, match=says):
        damaged(good, good[1][:place] + value + good[1][place + len(value) :])


def test_a_tensor_that_is_there_twice_or_unknown_is_refused(good):
    with pytest.raises(CheckpointError, match="is there twice"):
        damaged(good, good[1].replace(b"blk.0.ffn_gate.weight", b"blk.0.attn_q.weight\0\0").replace(b"blk.0.attn_k.weight", b"blk.0.attn_v.weight"))  # fmt: skip
    with pytest.raises(CheckpointError, match=r"'blk\.0\.ffn_xx\.weight' is unknown in llama"):
        damaged(good, good[1].replace(b"blk.0.ffn_up.weight", b"blk.0.ffn_xx.weight"))


@pytest.mark.parametrize("name", ["../model.gguf", "/etc/passwd", "absent.gguf", 7])
def test_a_file_name_that_leaves_the_folder_is_refused(good, tmp_path, name):
    config = json.loads((good[0] / "config.json").read_text())
    config["quantization_config"]["file"] = name
    (tmp_path / "config.json").write_text(json.dumps(config))
    with pytest.raises(CheckpointError, match="is no file in the folder"):
        GGUF.open(tmp_path)


def test_a_note_that_contradicts_the_blocks_is_refused(good):
    text = b'"bits": 4, "group_size": 32'
    assert text in good[1]
    with pytest.raises(CheckpointError, match="blocks of one group differ in scale"):
        damaged(good, good[1].replace(text, b'"bits": 4, "group_size": 64'))
    with pytest.raises(CheckpointError, match=r"a code lies outside 2 bits|code \d+ is beyond 3"):
        damaged(good, good[1].replace(text, b'"bits": 2, "group_size": 32'))
    with pytest.raises(CheckpointError, match=r"qcore\.layers"):
        damaged(good, good[1].replace(text, b'"bits": 9, "group_size": 32'))
