import copy
import json
import pickle
import shutil

import pytest
import torch
from safetensors.torch import load_file, save_file

import qcore
from qcore import (
    BackendError,
    CheckpointError,
    ConfigError,
    ModelError,
    ModelFolder,
    Override,
    PluginError,
    QuantLinear,
)
from qcore.model import load_float
from qcore.testing import TinyModel, tiny_tokens, tiny_transformer
from qcore.tools.explain import explain
from qcore.tools.reporting import gather

SETTINGS = {"group_size": 32}


def add_tensor(folder, name, tensor):
    tensors = load_file(folder / "model.safetensors")
    save_file({**tensors, name: tensor}, folder / "model.safetensors", {"format": "pt"})


@pytest.mark.parametrize(
    ("settings", "kind", "says"),
    [
        ({"bit": 4}, ConfigError, "neither quantize nor algorithm 'gptq' has an option 'bit'. Did you mean 'bits'"),
        ({"damp_percnt": 0.1}, ConfigError, "Did you mean 'damp_percent'"),
        ({"desc_act": "perhaps"}, ConfigError, "algorithm 'gptq': desc_act='perhaps'"),
        ({"damp_percent": -1}, ConfigError, "damp_percent=-1"),
        ({"bits": 16}, ConfigError, "bits=16"),
        ({"group_size": 0}, ConfigError, "group_size=0"),
        ({"algo": "gtpq"}, PluginError, "no algorithm is called 'gtpq'. Did you mean 'gptq'"),
        ({"format": "gtpq"}, PluginError, "no format is called 'gtpq'. Did you mean 'gptq'"),
        ({"adapter": "lama"}, PluginError, "no model is called 'lama'. Did you mean 'llama'"),
        ({"device": "gpu"}, ConfigError, "device 'gpu' cannot be used here"),
        ({"overrides": ["down_proj:bit=8"]}, ConfigError, "Did you mean 'bits'"),
        ({"overrides": [{"patern": "x"}]}, ConfigError, "Did you mean 'pattern'"),
        ({"samples": 0}, ConfigError, "samples=0"),
        ({"samples": None}, ConfigError, "samples=None"),
        ({"seqlen": "long"}, ConfigError, "seqlen='long'"),
        ({"batch_size": 0}, ConfigError, "batch_size=0"),
        ({"seed": None}, ConfigError, "seed=None"),
        ({"group_size": 10**30}, ConfigError, "group_size=1000"),
        ({"device": None}, ConfigError, "device 'None' cannot be used here"),
        ({"algo": None}, PluginError, "algorithm None is no name"),
        ({"algo": qcore.Algorithm}, PluginError, "Give the name of one, or an object of that class"),
        ({"overrides": "down_proj:bits=8"}, ConfigError, "overrides='down_proj:bits=8': expected a list of them"),
        ({"overrides": None}, ConfigError, "overrides=None: expected a list of them"),
        ({"overrides": [1]}, ConfigError, "override 1: expected an Override"),
        ({"calibration": 7}, qcore.CalibrationError, "calibration 'int' cannot be gone through"),
    ],
)
def test_a_mistaken_option_is_named_with_what_is_close(llama, settings, kind, says):
    with pytest.raises(kind) as error:
        qcore.quantize(llama, **{"calibration": tiny_tokens(), **settings})
    assert says in str(error.value)


def test_an_algorithm_object_brings_its_own_options(llama):
    from qcore.plugins import installed

    rtn = installed().get("algorithm", "rtn")
    model = qcore.quantize(llama, rtn(grid="mse"), **SETTINGS)
    assert qcore.report(model)["params"]["grid"] == "mse"
    with pytest.raises(ConfigError, match="unknown option 'grid': an Algorithm object has its own options already"):
        qcore.quantize(llama, rtn(), grid="mse")


def test_a_module_cannot_be_streamed_to_a_folder(llama, tmp_path):
    with pytest.raises(ConfigError, match=r"leave it out and call qcore.save"):
        qcore.quantize(llama, output=tmp_path / "out")


def test_quantize_save_load_gives_identical_logits(llama, tokens, tmp_path, weights_of):
    model = qcore.quantize(llama, "gptq", calibration=tokens, **SETTINGS)
    again = qcore.load(qcore.save(model, tmp_path / "out"))
    ids = torch.stack(tokens)
    assert torch.equal(model(ids).logits, again(ids).logits)
    before, after = weights_of(model), weights_of(again)
    assert list(before) == list(after)
    assert len(before) == 21
    assert all(before[name].equal(after[name]) for name in before)


def test_folder_to_folder_gives_what_memory_gives(llama_folder, tokens, tmp_path):
    settings = {**SETTINGS, "calibration": tokens, "desc_act": True}
    streamed = qcore.quantize(llama_folder, "gptq", output=tmp_path / "streamed", **settings)
    saved = qcore.save(qcore.quantize(llama_folder, "gptq", **settings), tmp_path / "saved")
    one, other = ModelFolder(streamed), ModelFolder(saved)
    assert set(one.tensors) == set(other.tensors)
    for name, tensor in one.read(one.tensors):
        assert torch.equal(tensor, other.tensor(name)), name
        assert tensor.dtype == other.tensors[name].dtype, name
    assert {file.name for file in streamed.iterdir()} == {file.name for file in saved.iterdir()}
    for name in ("config.json", "qcore.json", "tokenizer.json", "generation_config.json"):
        assert (streamed / name).read_bytes() == (saved / name).read_bytes(), name


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize("streamed", [True, False])
def test_what_is_not_quantized_keeps_its_bytes(save_llama, tmp_path, tokens, dtype, tied, streamed):
    source = save_llama(
        tmp_path / "source", dtype, tie_word_embeddings=tied, attention_bias=True, num_hidden_layers=2, seed=3
    )
    settings = {**SETTINGS, "calibration": tokens}
    if streamed:
        out = qcore.quantize(source, "gptq", output=tmp_path / "out", **settings)
    else:
        out = qcore.save(qcore.quantize(source, "gptq", **settings), tmp_path / "out")
    before, after = ModelFolder(source), ModelFolder(out)
    linears = {layer["name"] for layer in qcore.inspect(out)["layers"]}
    kept = {name for name in before.tensors if name.removesuffix(".weight") not in linears}
    assert kept == {name for name in after.tensors if name.rpartition(".")[2] in ("weight", "bias")}
    assert ("lm_head.weight" in kept) == (not tied)
    assert "model.layers.0.self_attn.q_proj.bias" in kept
    for name in kept:
        assert after.tensors[name].dtype == dtype, name
        assert torch.equal(after.tensor(name), before.tensor(name)), name
    assert after.config["dtype"] == before.config["dtype"]
    model = qcore.load(out)
    assert (model.lm_head.weight is model.model.embed_tokens.weight) == tied
    generated = model.generate(tokens[0][None], max_new_tokens=3, do_sample=False)
    assert generated.shape == (1, 35)


@pytest.mark.parametrize("streamed", [True, False])
def test_tensors_nobody_asked_about_are_copied(llama_folder, tmp_path, streamed):
    source = shutil.copytree(llama_folder, tmp_path / "source")
    add_tensor(source, "model.layers.0.self_attn.rotary_emb.inv_freq", torch.arange(8.0))
    add_tensor(source, "extra.table", torch.arange(6, dtype=torch.int64))
    out = tmp_path / "out"
    if streamed:
        qcore.quantize(source, "rtn", output=out, **SETTINGS)
    else:
        qcore.save(qcore.load(qcore.save(qcore.quantize(source, "rtn", **SETTINGS), tmp_path / "first")), out)
    for name in ("model.layers.0.self_attn.rotary_emb.inv_freq", "extra.table"):
        assert torch.equal(ModelFolder(out).tensor(name), ModelFolder(source).tensor(name))
    assert qcore.load(out)


def test_tokenizer_templates_and_configs_come_along(llama_folder, tmp_path):
    source = shutil.copytree(llama_folder, tmp_path / "source")
    (source / "chat_template.jinja").write_text("{{ messages }}")
    (source / "generation_config.json").write_text('{"temperature": 0.3, "do_sample": true, "eos_token_id": 1}')
    streamed = qcore.quantize(source, "rtn", output=tmp_path / "streamed", **SETTINGS)
    saved = qcore.save(qcore.quantize(source, "rtn", **SETTINGS), tmp_path / "saved")
    for out in (streamed, saved):
        for name in ("chat_template.jinja", "generation_config.json", "tokenizer.json", "tokenizer_config.json"):
            assert (out / name).read_bytes() == (source / name).read_bytes()
    assert qcore.load(streamed).generation_config.temperature == 0.3


def test_the_float_config_is_kept_beside_the_quantization(llama_folder, tmp_path):
    out = qcore.quantize(llama_folder, "rtn", output=tmp_path / "out", **SETTINGS)
    config = json.loads((out / "config.json").read_text())
    assert config.pop("quantization_config")["bits"] == 4
    assert config == json.loads((llama_folder / "config.json").read_text())


def test_a_loaded_model_saves_again_to_the_same_bytes(llama_folder, tmp_path, same_files):
    first = qcore.quantize(llama_folder, "rtn", output=tmp_path / "first", **SETTINGS)
    second = qcore.save(qcore.load(first), tmp_path / "second")
    third = qcore.save(qcore.load(second), tmp_path / "third")
    same_files(second, third)
    one, other = ModelFolder(first), ModelFolder(second)
    assert all(torch.equal(one.tensor(name), tensor) for name, tensor in other.read(one.tensors))


@pytest.mark.parametrize("fast", [False, True])
def test_a_loaded_model_can_be_pickled(llama_folder, tmp_path, weights_of, fast):
    out = qcore.quantize(llama_folder, "rtn", output=tmp_path / "out", **SETTINGS)
    model = qcore.load(out, fast=fast)
    again = pickle.loads(pickle.dumps(model))
    ids = torch.tensor([[1, 2, 3]])
    assert torch.equal(again(ids).logits, model(ids).logits)
    assert all(weight.equal(weights_of(model)[name]) for name, weight in weights_of(again).items())


@pytest.mark.parametrize("loaded", [False, True])
def test_transformers_own_saving_would_lose_the_weights_and_is_refused(llama_folder, tmp_path, loaded):
    model = qcore.quantize(llama_folder, "rtn", **SETTINGS)
    if loaded:
        model = qcore.load(qcore.save(model, tmp_path / "out"))
    for each in (model, copy.deepcopy(model)):
        with pytest.raises(ModelError, match=r"save_pretrained would leave the quantized weights out: use qcore\.save"):
            each.save_pretrained(tmp_path / "lost")
    assert not (tmp_path / "lost").exists()


def test_a_module_without_transformers_quantizes_in_place():
    model = TinyModel()
    ids = torch.stack(tiny_tokens(2))
    before = model(ids).logits
    quantized = qcore.quantize(model, "gptq", bits=8, group_size=32, calibration=tiny_tokens())
    assert quantized is model
    # 8 bits round to 0.4 % of a group's largest weight; 5 % of the logits' size bounds two blocks of it
    assert (model(ids).logits - before).norm() < 0.05 * before.norm()
    assert isinstance(model.blocks[0].left, QuantLinear)
    assert not isinstance(model.head, QuantLinear)


def test_a_half_precision_module_stays_one(tokens):
    model = tiny_transformer("llama", vocab_size=320, hidden_size=64, intermediate_size=96, num_hidden_layers=2,
                             num_attention_heads=4, num_key_value_heads=2).bfloat16()  # fmt: skip
    head, norm = model.lm_head.weight, model.model.layers[1].input_layernorm.weight
    qcore.quantize(model, "gptq", calibration=tokens, **SETTINGS)
    assert model.lm_head.weight is head
    assert model.model.layers[1].input_layernorm.weight is norm
    logits = model(tokens[0][None]).logits
    assert logits.dtype == torch.bfloat16
    assert logits.isfinite().all()


def test_text_calibration_uses_the_tokenizer_given(llama, tokenizer):
    model = qcore.quantize(llama, "gptq", calibration=["The quick brown fox jumps. " * 50], tokenizer=tokenizer,
                           samples=4, seqlen=16, **SETTINGS)  # fmt: skip
    assert qcore.report(model)["calibration"]["used"] == {"samples": 4, "tokens": 64}


def test_an_interrupted_model_in_memory_is_left_usable(llama, tokens, watched):
    class Stop:
        @qcore.hookimpl
        def qcore_block_finished(self, index):
            if index == 1:
                raise KeyboardInterrupt

    llama.bfloat16()
    with pytest.raises(KeyboardInterrupt):
        qcore.quantize(llama, "gptq", calibration=tokens, plugins=watched(Stop()), **SETTINGS)
    assert llama(tokens[0][None]).logits.isfinite().all()
    assert {parameter.dtype for parameter in llama.parameters()} == {torch.bfloat16}


def test_the_report_tells_each_linear_and_how_it_went(llama, tokens):
    report = qcore.report(qcore.quantize(llama, "gptq", calibration=tokens, seed=3, desc_act=True, **SETTINGS))
    assert report["algorithm"] == "gptq"
    assert report["adapter"] == "llama"
    assert report["config"] == {"bits": 4, "group_size": 32, "sym": True}
    assert report["params"]["desc_act"] is True
    assert report["seed"] == 3
    assert report["calibration"]["used"] == {"samples": 8, "tokens": 256}
    assert len(report["layers"]) == 21
    for layer in report["layers"]:
        assert layer["name"].startswith(f"model.layers.{layer['block']}.")
        assert layer["bits"] == 4
        assert layer["act_order"] is True
        assert 0 < layer["error"] < 0.5
        assert layer["seconds"] > 0
    json.dumps(report)


def test_a_folder_tells_how_it_was_made_but_no_times(llama_folder, tmp_path):
    out = qcore.quantize(llama_folder, "rtn", output=tmp_path / "out", **SETTINGS)
    assert "seconds" in qcore.report(out)["layers"][0]  # this process ran it
    moved = out.rename(tmp_path / "moved")
    report = qcore.report(moved)
    assert report["algorithm"] == "rtn"
    assert report["model"] == str(llama_folder)
    assert "seconds" not in report["layers"][0]
    assert qcore.report(qcore.load(moved))["layers"] == report["layers"]


def test_inspect_describes_a_folder(llama_folder, tmp_path):
    out = qcore.quantize(llama_folder, "rtn", bits=3, output=tmp_path / "out", **SETTINGS)
    found = qcore.inspect(out)
    assert (found["format"], found["model_type"], found["notes"]) == ("gptq", "llama", [])
    weights = 3 * (2 * 64 * 64 + 2 * 32 * 64 + 3 * 64 * 96)
    assert found["quantized_weights"] == weights
    assert found["size"] == (out / "model.safetensors").stat().st_size
    # 3 bits, and for each 32 weights 16 bits of scale and 3 of zero, and 32 bits of g_idx per column of 32 to 96 rows
    assert 3.6 < found["bits_per_weight"] < 4.6
    assert {layer["bits"] for layer in found["layers"]} == {3}
    ran = [layer["name"].rpartition(".")[2] for layer in found["layers"]][:7]
    assert ran == ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
    assert "model.embed_tokens.weight" in found["float_tensors"]
    assert found["provenance"]["algorithm"] == "rtn"
    json.dumps(found)


def test_what_is_quantized_already_is_refused(llama_folder, tmp_path):
    out = qcore.quantize(llama_folder, "rtn", output=tmp_path / "out", **SETTINGS)
    for model in (out, str(out), qcore.load(out)):
        with pytest.raises(ModelError, match="quantized already"):
            qcore.quantize(model, "rtn", **SETTINGS)


def test_what_is_not_quantized_cannot_be_loaded_or_saved(llama_folder, llama, tmp_path):
    with pytest.raises(CheckpointError, match="is not quantized; open it with transformers"):
        qcore.load(llama_folder)
    with pytest.raises(CheckpointError, match="is not quantized"):
        qcore.inspect(llama_folder)
    with pytest.raises(ModelError, match=r"has no quantized linears. Quantize it first"):
        qcore.save(llama, tmp_path / "out")
    with pytest.raises(ModelError, match="was not made by qcore"):
        qcore.report(llama)
    with pytest.raises(ModelError, match=r"has no qcore\.json"):
        qcore.report(llama_folder)
    assert not (tmp_path / "out").exists()


def test_a_format_nobody_reads_is_named(llama_folder, tmp_path):
    folder = shutil.copytree(llama_folder, tmp_path / "model")
    config = json.loads((folder / "config.json").read_text())
    for quantization in ({"quant_method": "gtpq"}, {"quant_method": 7}, [1], "gptq", {"bits": 4}):
        (folder / "config.json").write_text(json.dumps({**config, "quantization_config": quantization}))
        with pytest.raises(CheckpointError, match="which no installed format reads"):
            qcore.load(folder)


def test_a_backend_is_chosen_by_name_or_an_error_says_why(llama_folder, tmp_path):
    out = qcore.quantize(llama_folder, "rtn", output=tmp_path / "out", **SETTINGS)
    model = qcore.load(out, backend="torch_reference")
    assert model.model.layers[0].mlp.up_proj.backend.name == "torch_reference"
    with pytest.raises(PluginError, match=r"no backend is called 'torch_refrence'. Did you mean 'torch_reference'"):
        qcore.load(out, backend="torch_refrence")


def test_no_backend_for_a_layer_is_a_backend_error(llama_folder, tmp_path, plugin):
    import importlib.metadata

    from qcore.plugins import Plugins

    source = """
import qcore
class Never(qcore.Backend):
    name, rank = "never", 0
    def why_not(self, spec): return "it is Sunday"
    def prepare(self, weight, spec): return {}
    def matmul(self, x, buffers, spec): return x
@qcore.hookimpl
def qcore_backends(): return [Never()]
"""
    out = qcore.quantize(llama_folder, "rtn", output=tmp_path / "out", **SETTINGS)
    points = [point for point in importlib.metadata.entry_points(group="qcore") if "backends" not in point.value]
    with pytest.raises(BackendError, match="never: it is Sunday"):
        qcore.load(out, plugins=Plugins([*points, plugin("never", source)]))


@pytest.mark.parametrize("dtype", [None, torch.bfloat16, torch.float16, torch.float64])
def test_load_takes_a_dtype_and_by_default_computes_in_float32_on_a_cpu(save_llama, tmp_path, tokens, dtype):
    source = save_llama(tmp_path / "source", torch.float16)
    model = qcore.load(qcore.quantize(source, "rtn", output=tmp_path / "out", **SETTINGS), dtype=dtype)
    assert model.dtype == (dtype or torch.float32)
    logits = model(tokens[0][None]).logits
    assert logits.dtype == (dtype or torch.float32)
    assert logits.isfinite().all()


def test_a_device_map_places_each_module(llama_folder, tmp_path, tokens):
    out = qcore.quantize(llama_folder, "rtn", output=tmp_path / "out", **SETTINGS)
    parts = {
        "model.embed_tokens": "cpu",
        "model.layers": "cpu",
        "model.norm": "cpu",
        "model.rotary_emb": "cpu",
        "lm_head": "cpu",
    }
    model = qcore.load(out, device_map=parts)
    assert torch.equal(model(tokens[0][None]).logits, qcore.load(out)(tokens[0][None]).logits)
    del parts["lm_head"]
    with pytest.raises(ModelError, match="device_map gives no device for lm_head"):
        qcore.load(out, device_map=parts)


def test_quantizing_twice_gives_the_same_bytes(llama_folder, tokens, tmp_path, same_files):
    settings = {**SETTINGS, "calibration": tokens}
    torch.manual_seed(1)
    one = qcore.quantize(llama_folder, "gptq", output=tmp_path / "one", **settings)
    torch.manual_seed(2)
    same_files(one, qcore.quantize(llama_folder, "gptq", output=tmp_path / "two", **settings))


def test_quantizing_leaves_global_random_state_and_grad_mode_alone(llama, tokens):
    before = torch.get_rng_state()
    qcore.quantize(llama, "gptq", calibration=tokens, **SETTINGS)
    assert torch.equal(torch.get_rng_state(), before)
    assert torch.is_grad_enabled()


def test_a_quantized_model_passes_gradients_to_its_inputs(llama, tokens):
    model = qcore.quantize(llama, "rtn", **SETTINGS)
    x = model.get_input_embeddings()(tokens[0][None]).detach().requires_grad_()
    model(inputs_embeds=x).logits.sum().backward()
    assert x.grad.isfinite().all()
    assert float(x.grad.abs().sum()) > 0


def test_a_plan_that_quantizes_nothing_is_refused_before_any_work(llama_folder, tmp_path):
    with pytest.raises(ConfigError, match="overrides keep every linear in float"):
        qcore.quantize(llama_folder, "rtn", output=tmp_path / "out", overrides=["*:skip"], **SETTINGS)
    assert list(tmp_path.iterdir()) == []


def test_a_dtype_by_name_is_refused(llama_folder):
    with pytest.raises(ConfigError, match=r"dtype='float16': expected a torch\.dtype"):
        qcore.load(llama_folder, dtype="float16")


def test_what_load_save_and_evaluate_cannot_take_is_refused_by_name(llama, llama_folder, tmp_path):
    model = qcore.quantize(llama, "rtn", group_size=32)
    for size, words in (("5 shards", "shard_bytes='5 shards': expected bytes"), (0, "shard_bytes=0 is 0 bytes")):
        with pytest.raises(ConfigError, match=words):
            qcore.save(model, tmp_path / "out", shard_bytes=size)
    folder = qcore.save(model, tmp_path / "out", shard_bytes="20kB")
    assert len(list(folder.glob("*.safetensors"))) > 1
    for places in (3, "balanced"):
        with pytest.raises(ConfigError, match=rf"device_map={places!r}: expected \"auto\", or devices by name"):
            qcore.load(folder, device_map=places)
    ids = torch.randint(0, 100, (64,))
    for wrong, words in (
        ({"seqlen": 8.5}, "whole numbers"),
        ({"windows": "2"}, "whole numbers"),
        ({"seqlen": None}, "whole"),
    ):
        with pytest.raises(ConfigError, match=words):
            qcore.evaluate(model, ids, **wrong)
    with pytest.raises(ConfigError, match="text is a int, expected a string or a tensor"):
        qcore.evaluate(model, 5)


def test_overrides_take_every_form(llama):
    overrides = ["q_proj:bits=8", {"pattern": "k_proj", "bits": 3}, Override(pattern="v_proj", skip=True)]
    layers = {
        each["name"]: each["bits"]
        for each in qcore.report(qcore.quantize(llama, "rtn", overrides=overrides, **SETTINGS))["layers"]
    }
    assert layers["model.layers.0.self_attn.q_proj"] == 8
    assert layers["model.layers.0.self_attn.k_proj"] == 3
    assert "model.layers.0.self_attn.v_proj" not in layers


@pytest.mark.parametrize(("algorithm", "bits", "limit"), [("rtn", 8, 0.03), ("gptq", 8, 0.03), ("gptq", 4, 0.4)])
def test_a_quantized_model_stays_close_to_the_float_one(llama_folder, tokens, algorithm, bits, limit):
    """Limits: 8 bits round to 0.4 % of a group's largest weight, 4 bits to 7 %, over three blocks."""
    model = qcore.quantize(llama_folder, algorithm, bits=bits, calibration=tokens, **SETTINGS)
    ids = torch.stack(tokens)
    with torch.no_grad():
        expected = load_float(ModelFolder(llama_folder))(ids).logits
        found = model(ids).logits
    assert float((found - expected).norm() / expected.norm()) < limit


def test_a_save_to_a_folder_that_exists_is_refused(llama, tmp_path):
    model = qcore.quantize(llama, "rtn", **SETTINGS)
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "precious").write_text("")
    with pytest.raises(CheckpointError, match="exists already"):
        qcore.save(model, tmp_path / "out")
    assert [path.name for path in tmp_path.iterdir()] == ["out"]


def test_a_width_the_format_cannot_hold_is_refused_before_any_work(llama_folder, llama, tmp_path):
    with pytest.raises(ConfigError) as error:
        qcore.quantize(llama_folder, "rtn", bits=5, output=tmp_path / "out", **SETTINGS)
    assert "format 'gptq' cannot hold model.layers.0.self_attn.q_proj" in str(error.value)
    assert "5 bits" in str(error.value)
    model = qcore.quantize(llama, "rtn", bits=5, **SETTINGS)  # in memory there is no format to ask
    with pytest.raises(CheckpointError, match=r"cannot hold model.layers.0.self_attn.q_proj: 5 bits"):
        qcore.save(model, tmp_path / "out")
    assert list(tmp_path.iterdir()) == []


def test_a_save_that_reads_back_differently_is_refused(llama, tmp_path, monkeypatch):
    from qcore_plugins.exporters.gptq import Gptq

    encode = Gptq.encode

    def flip(self, name, weight):
        tensors = encode(self, name, weight)
        if name.endswith("1.mlp.up_proj"):
            tensors[f"{name}.qweight"] = tensors[f"{name}.qweight"] ^ 1
        return tensors

    model = qcore.quantize(llama, "rtn", **SETTINGS)
    monkeypatch.setattr(Gptq, "encode", flip)
    with pytest.raises(CheckpointError, match=r"model.layers.1.mlp.up_proj reads back with a different codes"):
        qcore.save(model, tmp_path / "out")
    assert list(tmp_path.iterdir()) == []


def test_paths_may_begin_at_home(llama_folder, tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    shutil.copytree(llama_folder, tmp_path / "float")
    qcore.quantize("~/float", "rtn", group_size=32, output="~/models/out")
    assert (tmp_path / "models/out/config.json").is_file()
    assert qcore.inspect("~/models/out")["format"] == "gptq"
    assert qcore.report("~/models/out")["algorithm"] == "rtn"
    qcore.save(qcore.load("~/models/out"), "~/again")
    assert (tmp_path / "again/config.json").is_file()
    qcore.convert("~/again", "~/v2", "gptq_v2")
    assert gather("~/v2")["name"] == "v2"
    with pytest.raises(CheckpointError, match=r"out.* exists"):
        explain("~/float", output="~/models/out")


@pytest.mark.parametrize(
    ("call", "error", "message"),
    [
        (lambda out: qcore.save(None, "again"), qcore.ModelError, "expected a model with quantized linears, got None"),
        (lambda out: qcore.save(qcore.load(out), None), ConfigError, "folder=None: expected a path"),
        (lambda out: qcore.quantize(TinyModel(), "rtn", output=3), ConfigError, "output=3: expected a path"),
        (lambda out: qcore.inspect(None), ConfigError, "folder=None: expected a path"),
        (lambda out: qcore.load(out, tokens=0), ConfigError, "tokens=0: expected a whole number from 1"),
        (lambda out: qcore.load(out, tokens="2"), ConfigError, "tokens='2': expected"),
    ],
)
def test_what_is_no_path_no_model_and_no_number_is_named(llama_folder, tmp_path, call, error, message):
    qcore.quantize(llama_folder, "rtn", group_size=32, output=tmp_path / "out")
    with pytest.raises(error, match=message):
        call(tmp_path / "out")
