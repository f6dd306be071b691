"""Damaged files of every format: only qcore's own errors may come of them, quickly and without a huge allocation.

The damage is drawn from a seeded generator, 1,000 cases for each format (QCORE_FUZZ_CASES for more): bytes changed, files cut, numbers made wild, JSON values
replaced. What still opens must hold well-formed weights.
"""

import json
import os
import random
import resource
import shutil
import time

import pytest
import torch

from qcore import Content, LayerSpec, ModelFolder, QcoreError, QuantConfig
from qcore.content import open_content
from qcore.plugins import installed
from qcore.testing import random_weight

CASES = int(os.environ.get("QCORE_FUZZ_CASES", "1000"))
NAMES = [f"model.layers.0.{part}" for part in ("self_attn.q_proj", "mlp.up_proj")]
CONFIG = {
    "model_type": "llama", "vocab_size": 16, "hidden_size": 32, "intermediate_size": 32, "num_hidden_layers": 1,
    "num_attention_heads": 2, "max_position_embeddings": 64, "rms_norm_eps": 1e-6, "dtype": "float16",
}  # fmt: skip
FORMATS = [
    ("gptq", 4, True), ("gptq_v2", 3, False), ("awq", 4, False), ("autoround", 4, True), ("autoround", 2, False),
    ("compressed-tensors", 4, False), ("gguf", 4, True), ("gguf", 5, False), ("itrex", 4, False),
]  # fmt: skip
WILD = [
    None,
    True,
    -1,
    0,
    3,
    17,
    2**31,
    2**63,
    -(2**70),
    1e300,
    float("nan"),
    "",
    "x" * 50,
    "../..",
    [],
    [[]],
    {},
    {"a": {}},
]


def small_folder(folder, name, bits, sym):
    config = QuantConfig(bits=bits, group_size=32, sym=sym)
    layers = {layer: random_weight(32, 32, config, seed=number) for number, layer in enumerate(NAMES)}
    specs = {layer: LayerSpec(layer, config, 32, 32) for layer in NAMES}
    floats = {"model.norm.weight": torch.ones(32).half(), "model.embed_tokens.weight": torch.ones(16, 32).half()}
    folder.mkdir()
    content = Content(CONFIG, specs, layers.__getitem__, list(floats), floats.__getitem__, {"layers": []})
    installed().get("format", name).save(content, folder)
    return folder


def damage(folder, draw):
    """Change one file of a folder; return it and what it held."""
    path = draw.choice(sorted(folder.iterdir()))
    original = path.read_bytes()
    data = bytearray(original)
    if path.suffix == ".json" and draw.random() < 0.6:
        value = json.loads(data)
        spoil_json(value, draw)
        path.write_text(json.dumps(value))
        return path, original
    kind = draw.random()
    head = min(len(data), 3000)  # where the structure is
    if kind < 0.2:
        data = data[: draw.randrange(len(data))]
    elif kind < 0.4:
        data[draw.randrange(len(data))] = draw.randrange(256)
    elif kind < 0.7:
        for _ in range(draw.randrange(1, 5)):
            data[draw.randrange(head)] = draw.randrange(256)
    elif kind < 0.9:
        place = draw.randrange(max(1, head - 8))
        data[place : place + 8] = draw.choice([0, 1, 2**16, 2**31 - 1, 2**32, 2**62, 2**64 - 1]).to_bytes(8, "little")
    else:
        place = draw.randrange(len(data))
        data[place:place] = bytes(draw.randrange(256) for _ in range(draw.randrange(1, 20)))
    path.write_bytes(data)
    return path, original


def spoil_json(value, draw):
    """Replace, remove or rename something anywhere in an object."""
    while isinstance(value, dict) and value:
        key = draw.choice(sorted(value))
        inner = value[key]
        if isinstance(inner, (dict, list)) and inner and draw.random() < 0.7:
            if isinstance(inner, dict):
                value = inner
                continue
            inner[draw.randrange(len(inner))] = draw.choice(WILD)
        elif draw.random() < 0.15:
            del value[key]
        elif draw.random() < 0.1:
            value[key + "x"] = value.pop(key)
        else:
            value[key] = draw.choice(WILD)
        return


@pytest.mark.parametrize(("name", "bits", "sym"), FORMATS)
def test_a_thousand_damaged_folders_give_errors_of_ours_or_weights(tmp_path, name, bits, sym):
    folder = small_folder(tmp_path / "damaged", name, bits, sym)
    draw, opened, slowest = random.Random(f"{name} {bits}"), 0, 0.0
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    for number in range(CASES):
        path, original = damage(folder, draw)
        started = time.perf_counter()
        try:
            _, content = open_content(folder)
            for layer in content.layers:
                assert content.weight(layer).codes.numel() < 2**16, number
            for tensor in content.tensors:
                content.tensor(tensor)
            opened += 1
        except QcoreError:
            pass
        slowest = max(slowest, time.perf_counter() - started)
        path.write_bytes(original)
    assert 0 < opened < CASES * 0.9  # both happen: some damage does no harm, most does
    assert slowest < 5
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 500_000  # kilobytes


def test_a_thousand_damaged_float_folders_give_errors_of_ours_or_tensors(tmp_path):
    """What hf-dequantized writes is read as a float model."""
    folder, opened = small_folder(tmp_path / "damaged", "hf-dequantized", 4, True), 0
    draw = random.Random("float")
    for _ in range(CASES):
        path, original = damage(folder, draw)
        try:
            found = ModelFolder(folder)
            assert all(found.tensor(name).numel() < 2**16 for name in found.tensors)
            opened += 1
        except QcoreError:
            pass
        path.write_bytes(original)
    assert 0 < opened < CASES


@pytest.mark.parametrize(("name", "bits", "sym"), FORMATS)
@pytest.mark.parametrize("file", ["../outside.safetensors", "/etc/passwd", "a/b.safetensors", "..", ""])
def test_shard_names_that_leave_the_folder_are_refused(tmp_path, name, bits, sym, file):
    if name == "gguf":
        pytest.skip("has no shards")
    folder = small_folder(tmp_path / "good", name, bits, sym)
    shutil.copy(folder / "model.safetensors", tmp_path / "outside.safetensors")
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": {"a": file}}))
    with pytest.raises(QcoreError, match="leaves the folder"):
        open_content(folder)


@pytest.mark.parametrize(("name", "bits", "sym"), FORMATS)
def test_weights_behind_a_link_out_of_the_folder_are_refused(tmp_path, name, bits, sym):
    folder = small_folder(tmp_path / "good", name, bits, sym)
    (weights,) = (path for path in folder.iterdir() if path.suffix in (".safetensors", ".gguf"))
    elsewhere = tmp_path / "elsewhere"
    elsewhere.mkdir()
    shutil.move(weights, elsewhere / weights.name)
    weights.symlink_to(elsewhere / weights.name)
    with pytest.raises(QcoreError, match="is a link out of the folder"):
        open_content(folder)
