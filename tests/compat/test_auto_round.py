"""The snippets of AutoRound 0.1's README run with the import lines and the names of models changed, and nothing else.

That README had three states: of the code's first publication (`export`, scheme), of 0.1rc (`save_quantized(format=)`, scheme)
and of 0.1 (sym).
"""

import sys
from types import SimpleNamespace

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer
from transformers.quantizers import auto

import qcore
from qcore import ConfigError, ModelError
from qcore.compat import auto_round as compat
from qcore.compat.auto_gptq import AutoGPTQForCausalLM
from qcore.compat.auto_round import AutoRound
from qcore.plugins import installed

needs_autoround = pytest.mark.skipif(
    "autoround" not in installed().offers("algorithm"), reason="the algorithm autoround is not installed"
)


@pytest.fixture
def model(opt_folder):
    return AutoModelForCausalLM.from_pretrained(opt_folder, dtype="auto")


@needs_autoround
def test_usage_as_first_published(short_opt_folder, tmp_path):
    """ "Usage" and "Tips": quantize asymmetric, export, export for AutoGPTQ, generate."""
    model_name = str(short_opt_folder)
    model = AutoModelForCausalLM.from_pretrained(
        model_name, low_cpu_mem_usage=True, torch_dtype="auto", trust_remote_code=True
    )
    tokenizer = AutoTokenizer.from_pretrained(model_name, trust_remote_code=True)
    scheme = "asym"
    autoround = AutoRound(model, tokenizer, bits=4, group_size=128, scheme=scheme)
    autoround.quantize()
    output_dir = tmp_path / "tmp_autoround"
    autoround.export(output_dir=output_dir)
    autoround.export(tmp_path / "for_gptq", target="auto_gptq", use_triton=True)

    for folder in ("tmp_autoround", "for_gptq"):
        found = qcore.inspect(tmp_path / folder)
        assert {(each["bits"], each["group_size"], each["sym"]) for each in found["layers"]} == {(4, 128, False)}
        assert found["provenance"]["params"]["iters"] == 200
    loaded = AutoGPTQForCausalLM.from_quantized(tmp_path / "for_gptq", device="cuda:0")
    inputs = tokenizer("Once upon a time, a little girl", return_tensors="pt").input_ids
    outputs = loaded.generate(input_ids=inputs.to(loaded.device), max_new_tokens=30)
    assert outputs.shape[1] > inputs.shape[1]


@needs_autoround
def test_usage_and_inference_of_0_1(short_opt_folder, tmp_path, monkeypatch):
    """ "Usage of Tuning", then "Model inference" on a GPU and through ITREX, whose import lines become qcore's."""
    monkeypatch.chdir(tmp_path)
    for mapping in (auto.AUTO_QUANTIZATION_CONFIG_MAPPING, auto.AUTO_QUANTIZER_MAPPING):
        for method in list(mapping):
            monkeypatch.setitem(mapping, method, mapping[method])  # put back afterwards
    tuning_device = "cuda:0"
    dtype = "auto" if tuning_device != "hpu" else torch.bfloat16
    model_name = str(short_opt_folder)
    model = AutoModelForCausalLM.from_pretrained(model_name, torch_dtype=dtype, trust_remote_code=True)
    tokenizer = AutoTokenizer.from_pretrained(model_name, trust_remote_code=True)

    bits, group_size, sym = 4, 128, False
    autoround = AutoRound(model, tokenizer, bits=bits, group_size=group_size, sym=sym, device=tuning_device)
    autoround.quantize()
    output_dir = "./tmp_autoround"
    autoround.save_quantized(output_dir)

    quantized_model_path = "./tmp_autoround"
    model = compat.AutoModelForCausalLM.from_pretrained(quantized_model_path, device_map="auto", trust_remote_code=True)
    tokenizer = AutoTokenizer.from_pretrained(quantized_model_path, use_fast=True)
    text = "There is a girl who likes adventure,"
    inputs = tokenizer(text, return_tensors="pt").to(model.device)
    by_device_map = tokenizer.decode(model.generate(**inputs, max_new_tokens=20)[0])
    assert by_device_map.startswith(text)
    assert sum(isinstance(module, qcore.QuantLinear) for module in model.modules()) == 6

    scheme = "sym" if sym else "asym"
    woq_config = compat.WeightOnlyQuantConfig(group_size=group_size, scheme=scheme, use_autoround=True)
    inputs = tokenizer(text, return_tensors="pt").input_ids
    model = compat.AutoModelForCausalLM.from_pretrained(
        quantized_model_path, quantization_config=woq_config, trust_remote_code=True, device="cpu"
    )
    outputs = model.generate(inputs, max_new_tokens=20)
    assert tokenizer.decode(outputs[0]).startswith(text)


@needs_autoround
def test_formats_of_0_1rc(model, tokens, tmp_path):
    autoround = AutoRound(
        model, None, bits=4, group_size=32, bs=2, iters=1, n_samples=2, dataloader=[torch.stack(tokens[:2])]
    )
    autoround.quantize()
    for format in ("itrex", "auto_gptq"):
        folder = autoround.save_quantized(tmp_path / format, format=format, use_triton=True, inplace=False)
        assert qcore.inspect(folder)["format"] == "gptq"
    assert qcore.inspect(autoround.export(tmp_path / "ar", target="auto_round"))["format"] == "autoround"
    with pytest.raises(qcore.QcoreError, match=r"no format is called .gtpq.\. Did you mean .gptq."):
        autoround.export(tmp_path / "out", target="gtpq")


@needs_autoround
def test_every_keyword_arrives(model, tokenizer, tokens):
    """All of the README's detailed hyperparameters at once, in the earlier spelling."""
    name = "model.decoder.layers.0.fc1"
    autoround = AutoRound(
        model, None, bits=3, group_size=32, scheme="sym", use_quant_input=False, enable_minmax_tuning=False, iters=2, lr=0.25,
        minmax_lr=0.125, n_samples=4, seqlen=16, bs=2, amp=False, n_blocks=2, gradient_accumulate_steps=2,
        low_gpu_mem_usage=True, dataloader=[torch.stack(tokens[:2]), {"input_ids": torch.stack(tokens[2:4])}],
        dataset_split="train", device="cpu", weight_config={name: {"bits": 8}, "model.decoder.layers.1.fc2": {"bits": 16}},
    )  # fmt: skip
    quantized, layers = autoround.quantize()
    assert quantized is model
    assert layers[name]["bits"] == 8
    assert "model.decoder.layers.1.fc2" not in layers
    assert {layer["bits"] for key, layer in layers.items() if key != name} == {3}
    report = qcore.report(model)
    wanted = {
        "iters": 2, "lr": 0.25, "minmax_lr": 0.125, "bs": 2, "amp": False, "n_blocks": 2, "gradient_accumulate_steps": 2,
        "low_gpu_mem_usage": True, "use_quant_input": False, "enable_minmax_tuning": False,
    }  # fmt: skip
    assert wanted.items() <= report["params"].items()
    assert report["calibration"]["used"] == {"samples": 4, "tokens": 64}
    assert report["seed"] == 42


@needs_autoround
def test_dataset_split_goes_to_the_hub_with_its_dataset(model, tokenizer, tmp_path, monkeypatch):
    opened = []

    def load_dataset(name, split):
        opened.append((name, split))
        return ["The quick brown fox jumps over the lazy dog. " * 20]

    monkeypatch.setitem(sys.modules, "datasets", SimpleNamespace(load_dataset=load_dataset))
    AutoRound(model, tokenizer, group_size=32, iters=1, bs=1, n_samples=1, seqlen=16, dataset_name="org/texts",
              dataset_split="validation").quantize()  # fmt: skip
    assert opened == [("org/texts", "validation")]


@needs_autoround
def test_the_later_spelling_of_the_keywords(model, tokenizer, tmp_path):
    text = tmp_path / "text.txt"
    text.write_text("The quick brown fox jumps over the lazy dog. " * 20)
    name = "model.decoder.layers.0.fc1"
    autoround = AutoRound(
        model, tokenizer, 4, 32, True, {name: {"data_type": "int", "bits": 8, "group_size": 64, "sym": False}}, batch_size=4,
        dataset=str(text), iters=1, n_samples=4, seqlen=16, sampler="rand", scale_dtype="fp32", not_use_best_mse=True,
        dynamic_max_gap=-1, lr_scheduler=None, enable_full_range=False, data_type="int",
    )  # fmt: skip
    _, layers = autoround.quantize()
    found = {key: (layer["bits"], layer["group_size"], layer["sym"]) for key, layer in layers.items()}
    assert found.pop(name) == (8, 64, False)
    assert set(found.values()) == {(4, 32, True)}
    report = qcore.report(model)
    assert {"bs": 4, "checks": 0}.items() <= report["params"].items()
    assert report["calibration"]["used"] == {"samples": 4, "tokens": 64}


@pytest.mark.parametrize(
    ("options", "says"),
    [
        ({"data_type": "fp4"}, "data_type='fp4': expected False and 'int'"),
        ({"enable_full_range": True}, "enable_full_range=True"),
        ({"weight_config": {"fc1": {"scheme": "s"}}}, r"weight_config\['fc1'\]: scheme='s': expected 'sym' or 'asym'"),
        ({"scheme": "symmetric"}, "expected 'sym' or 'asym'"),
        ({"n_sample": 3}, "no option 'n_sample'"),
        ({"weight_config": {"fc1": {"bit": 8}}}, r"weight_config\['fc1'\] has bit"),
    ],
)
def test_what_cannot_be_meant_is_said_so(model, tokenizer, options, says):
    with pytest.raises(ConfigError, match=says):
        AutoRound(model, tokenizer, **options)


def test_text_needs_a_tokenizer_and_export_a_quantized_model(model, tokenizer, tmp_path):
    with pytest.raises(ConfigError, match="needs a tokenizer"):
        AutoRound(model)
    with pytest.raises(ModelError, match=r"call quantize\(\) first"):
        AutoRound(model, tokenizer).export(tmp_path / "out")
