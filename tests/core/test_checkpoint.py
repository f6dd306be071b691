import json
import os
import shutil
import time

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from qcore import CheckpointError, ModelError, ModelFolder
from qcore.checkpoint import INDEX, SINGLE, ShardWriter, resolve_model
from qcore.files import check_output, complete_folder, read_json, write_atomic, write_json
from qcore.plugins import Plugins, installed

DTYPES = [torch.float32, torch.float16, torch.bfloat16, torch.int32, torch.int64, torch.uint8, torch.bool]


@pytest.fixture
def model_copy(llama_folder, tmp_path):
    """A copy of the tiny model that a test may damage."""
    return shutil.copytree(llama_folder, tmp_path / "model")


@pytest.fixture
def sharded_copy(sharded_folder, tmp_path):
    """A copy of the sharded model that a test may damage."""
    return shutil.copytree(sharded_folder, tmp_path / "sharded")


def test_one_file_and_shards_hold_the_same_tensors(llama_folder, sharded_folder):
    one, many = ModelFolder(llama_folder), ModelFolder(sharded_folder)
    assert len({info.file for info in many.tensors.values()}) > 2
    assert set(one.tensors) == set(many.tensors)
    for name, tensor in many.read(sorted(many.tensors)):
        assert torch.equal(tensor, one.tensor(name))
        assert many.tensors[name].shape == tuple(tensor.shape)
        assert many.tensors[name].dtype == tensor.dtype
    assert many.size() == sum(file.stat().st_size for file in sharded_folder.glob("*.safetensors"))


def test_a_tensor_that_is_not_there_is_named(llama_folder):
    with pytest.raises(CheckpointError, match=r"has no tensor model.absent"):
        ModelFolder(llama_folder).tensor("model.absent")


def test_carried_files_are_those_that_belong_to_the_model(model_copy):
    for name in ("chat_template.jinja", "tokenizer.model", "modeling_own.py", "LICENSE.txt", "notes.pdf", "run.log"):
        (model_copy / name).write_text("")
    assert set(ModelFolder(model_copy).carried_files()) >= {
        "tokenizer.json", "tokenizer_config.json", "generation_config.json", "chat_template.jinja", "tokenizer.model",
        "modeling_own.py", "LICENSE.txt",
    }  # fmt: skip
    assert not {"notes.pdf", "run.log", "config.json", SINGLE} & set(ModelFolder(model_copy).carried_files())


def no_folder(folder):
    shutil.rmtree(folder)


def no_config(folder):
    (folder / "config.json").unlink()


def no_weights(folder):
    (folder / SINGLE).unlink()


def pickle_only(folder):
    (folder / SINGLE).rename(folder / "pytorch_model.bin")


def truncated(folder):
    os.truncate(folder / SINGLE, (folder / SINGLE).stat().st_size - 100)


def truncated_header(folder):
    os.truncate(folder / SINGLE, 100)


def emptied(folder):
    os.truncate(folder / SINGLE, 0)


def config_no_json(folder):
    (folder / "config.json").write_text("{'model_type': 'llama'}")


def config_no_text(folder):
    (folder / "config.json").write_bytes(b"\xff\xfe{}")


def config_no_object(folder):
    (folder / "config.json").write_text("[1, 2]")


def two_files_without_index(folder):
    shutil.copy(folder / SINGLE, folder / "second.safetensors")
    (folder / SINGLE).rename(folder / "first.safetensors")


@pytest.mark.parametrize(
    ("damage", "kind", "says"),
    [
        (no_folder, ModelError, "there is no folder"),
        (no_config, ModelError, "has no config.json"),
        (no_weights, ModelError, "has no *.safetensors weights"),
        (pickle_only, ModelError, "only pickle weights (pytorch_model.bin), which can run code"),
        (truncated, CheckpointError, "model.safetensors: not a valid safetensors file"),
        (truncated_header, CheckpointError, "model.safetensors: not a valid safetensors file"),
        (emptied, CheckpointError, "model.safetensors: not a valid safetensors file"),
        (config_no_json, CheckpointError, "config.json cannot be read as JSON"),
        (config_no_text, CheckpointError, "config.json cannot be read as JSON"),
        (config_no_object, CheckpointError, "holds a JSON list, expected an object"),
        (two_files_without_index, CheckpointError, "has 2 safetensors files and no model.safetensors.index.json"),
    ],
)
def test_a_damaged_folder_is_named_with_its_damage(model_copy, damage, kind, says):
    damage(model_copy)
    with pytest.raises(kind) as error:
        ModelFolder(model_copy)
    assert says in str(error.value)
    assert str(model_copy) in str(error.value)


def edit_index(folder, change):
    index = json.loads((folder / INDEX).read_text())
    change(index["weight_map"])
    (folder / INDEX).write_text(json.dumps(index))


def test_a_shard_that_is_missing_is_named(sharded_copy):
    gone = sorted(sharded_copy.glob("*.safetensors"))[1]
    gone.unlink()
    with pytest.raises(CheckpointError, match=f"shard {gone.name} named by {INDEX} is missing"):
        ModelFolder(sharded_copy)


def test_a_truncated_shard_is_named(sharded_copy):
    shard = sorted(sharded_copy.glob("*.safetensors"))[1]
    os.truncate(shard, shard.stat().st_size - 1)
    with pytest.raises(CheckpointError, match=shard.name):
        ModelFolder(sharded_copy)


@pytest.mark.parametrize("name", ["../outside.safetensors", "/etc/passwd", "sub/shard.safetensors", "..", "", "."])
def test_a_shard_name_that_leaves_the_folder_is_refused(sharded_copy, name):
    edit_index(sharded_copy, lambda weights: weights.update({"model.norm.weight": name}))
    with pytest.raises(CheckpointError, match="leaves the folder"):
        ModelFolder(sharded_copy)


def test_a_tensor_in_two_shards_is_refused(sharded_copy):
    first, second = sorted(sharded_copy.glob("*.safetensors"))[:2]
    name, tensor = next(iter(load_file(first).items()))
    save_file({**load_file(second), name: tensor}, second)
    with pytest.raises(CheckpointError, match=f"tensor {name} is in {first.name} and in {second.name}"):
        ModelFolder(sharded_copy)


@pytest.mark.parametrize("text", ["{}", '{"weight_map": []}', '{"weight_map": {"a": 1}}', "[]", "nothing"])
def test_an_index_without_a_map_is_refused(sharded_copy, text):
    (sharded_copy / INDEX).write_text(text)
    with pytest.raises(CheckpointError, match=r"index.json"):
        ModelFolder(sharded_copy)


def tensors_of(seed, count):
    generator = torch.Generator().manual_seed(seed)
    shapes = [(3, 5), (), (0,), (7,), (2, 2, 2), (64, 3)]
    return {
        f"layer.{i}.{'x' * (i % 4)}": (torch.randn(shapes[i % len(shapes)], generator=generator) * 9).to(DTYPES[i % 7])
        for i in range(count)
    }


@given(st.integers(0, 99), st.integers(1, 20), st.sampled_from([1, 100, 10**9]))
def test_what_the_writer_writes_safetensors_reads(tmp_path_factory, seed, count, limit):
    folder = tmp_path_factory.mktemp("shards")
    tensors = tensors_of(seed, count)
    writer = ShardWriter(folder, tensors, limit)
    for name, tensor in tensors.items():
        writer.add(name, tensor)
    writer.close()
    writer.settle()
    found = {}
    for file in sorted(folder.glob("*.safetensors")):
        found |= load_file(file)
    assert set(found) == set(tensors)
    for name, tensor in tensors.items():
        assert found[name].dtype == tensor.dtype
        assert torch.equal(found[name], tensor)
    assert (folder / INDEX).exists() == (len(list(folder.glob("*.safetensors"))) > 1)
    assert not list(folder.glob("*.part"))


def test_shards_keep_the_order_stay_below_the_limit_and_are_indexed(tmp_path):
    tensors = {f"t{i}": torch.full((100,), float(i)) for i in (3, 1, 2, 5, 4)}  # 400 bytes each
    writer = ShardWriter(tmp_path, tensors, limit=1000)
    for name, tensor in tensors.items():
        writer.add(name, tensor)
    writer.close()
    writer.settle()
    files = sorted(file.name for file in tmp_path.glob("*.safetensors"))
    assert files == [f"model-0000{i}-of-00003.safetensors" for i in (1, 2, 3)]
    order = [name for file in files for name in sorted(load_file(tmp_path / file), key=list(tensors).index)]
    assert order == list(tensors)
    index = read_json(tmp_path / INDEX)
    assert index["metadata"]["total_size"] == 2000
    assert index["weight_map"] == {"t3": files[0], "t1": files[0], "t2": files[1], "t5": files[1], "t4": files[2]}


def test_a_tensor_larger_than_the_limit_gets_a_shard_of_its_own(tmp_path):
    writer = ShardWriter(tmp_path, "abc", limit=100)
    for name, size in (("a", 10), ("b", 1000), ("c", 10)):
        writer.add(name, torch.zeros(size))
    writer.close()
    writer.settle()
    assert len(list(tmp_path.glob("*.safetensors"))) == 3


def test_equal_content_gives_equal_bytes_and_data_is_aligned(tmp_path):
    tensors = {"a": torch.arange(8, dtype=torch.int32), "bb": torch.arange(4, dtype=torch.int32)}
    for folder in (tmp_path / "one", tmp_path / "two"):
        folder.mkdir()
        writer = ShardWriter(folder, tensors)
        for name, tensor in tensors.items():
            writer.add(name, tensor)
        writer.close()
        writer.settle()
    data = (tmp_path / "one" / SINGLE).read_bytes()
    assert data == (tmp_path / "two" / SINGLE).read_bytes()
    header = int.from_bytes(data[:8], "little")
    assert header % 8 == 0  # so that tensors mapped from the file lie on their natural boundaries
    assert data[8 + header :] == bytes(tensors["a"].numpy().data) + bytes(tensors["bb"].numpy().data)
    with safe_open(tmp_path / "one" / SINGLE, "pt") as handle:
        assert handle.metadata() == {"format": "pt"}


def test_work_on_threads_keeps_its_order_and_takes_one_thread_each():
    from qcore.saving import in_order

    before = torch.get_num_threads()
    torch.set_num_threads(3)
    try:
        found = list(in_order(lambda n: (time.sleep(0.02 * (n % 2)), n, torch.get_num_threads())[1:], range(6)))
        assert [n for n, _ in found] == list(range(6))
        assert {threads for _, threads in found} == {1}
        assert torch.get_num_threads() == 3
    finally:
        torch.set_num_threads(before)


def test_a_dtype_safetensors_cannot_hold_is_named(tmp_path):
    with pytest.raises(CheckpointError, match=r"tensor spectrum has dtype torch.complex64"):
        ShardWriter(tmp_path, ["spectrum"]).add("spectrum", torch.zeros(2, dtype=torch.complex64))


def test_a_folder_appears_complete(tmp_path):
    target = tmp_path / "deep" / "out"
    with complete_folder(target) as draft:
        (draft / "file").write_text("x")
        assert not target.exists()
    assert (target / "file").read_text() == "x"
    assert [path.name for path in target.parent.iterdir()] == ["out"]


@pytest.mark.parametrize("error", [ValueError, KeyboardInterrupt, SystemExit])
def test_a_folder_that_fails_is_absent(tmp_path, error):
    def fill(target):
        with complete_folder(target) as draft:
            (draft / "file").write_text("x")
            raise error

    with pytest.raises(error):
        fill(tmp_path / "out")
    assert list(tmp_path.iterdir()) == []


def test_an_empty_folder_may_be_filled_and_a_full_one_is_refused(tmp_path):
    target = tmp_path / "out"
    target.mkdir()
    with complete_folder(target) as draft:
        (draft / "file").write_text("x")
    with pytest.raises(CheckpointError, match="exists already"), complete_folder(target):
        pass
    assert (target / "file").read_text() == "x"


def test_the_remains_of_a_killed_writer_do_not_get_into_the_output(tmp_path):
    remains = tmp_path / "out.writing"
    remains.mkdir()
    (remains / "stale").write_text("")
    with complete_folder(tmp_path / "out") as draft:
        (draft / "file").write_text("x")
    assert [path.name for path in (tmp_path / "out").iterdir()] == ["file"]


def test_an_output_below_a_file_is_refused(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(CheckpointError, match="cannot be made"):
        check_output(tmp_path / "file" / "out")


def test_an_output_that_is_a_file_is_refused(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(CheckpointError, match="exists already"):
        check_output(tmp_path / "file")


def test_an_atomic_write_that_fails_leaves_the_old_file_and_nothing_else(tmp_path):
    file = tmp_path / "run.json"
    write_json(file, {"old": True})

    def fail(draft):
        draft.write_text("half")
        raise RuntimeError

    with pytest.raises(RuntimeError):
        write_atomic(file, fail)
    assert read_json(file) == {"old": True}
    assert [path.name for path in tmp_path.iterdir()] == ["run.json"]


def test_json_keeps_its_key_order_and_its_letters(tmp_path):
    write_json(tmp_path / "a.json", {"z": "é", "a": 1})
    assert (tmp_path / "a.json").read_text(encoding="utf-8") == '{\n  "z": "é",\n  "a": 1\n}\n'


@pytest.mark.parametrize("text", ["", "nothing", "[" * 100_000, '{"a": ' + "9" * 5000 + "}"])
def test_what_is_no_json_is_a_checkpoint_error(tmp_path, text):
    (tmp_path / "a.json").write_text(text)
    with pytest.raises(CheckpointError, match=r"a\.json cannot be read as JSON"):
        read_json(tmp_path / "a.json")


def test_a_model_is_a_folder_or_what_a_plugin_resolves(tmp_path, plugin):
    source = f"""
import pathlib, qcore
@qcore.hookimpl
def qcore_resolve_model(model, cache):
    return pathlib.Path({str(tmp_path)!r}) if model == "favourite" else None
"""
    plugins = Plugins([plugin("resolver", source)])
    assert resolve_model("favourite", plugins) == tmp_path
    assert resolve_model(str(tmp_path), plugins) == tmp_path


@pytest.mark.parametrize("model", ["no/such/folder", "./nothing", "nothing", "/absent"])
def test_a_model_that_is_neither_folder_nor_hub_name_is_named(model):
    with pytest.raises(ModelError, match=f"there is no folder {model}, and it is not a hub name"):
        resolve_model(model, installed())


def test_a_hub_name_without_a_network_is_a_model_error():
    with pytest.raises(ModelError, match="there is no folder some-org/some-model, and the hub gave no model"):
        resolve_model("some-org/some-model", installed())
