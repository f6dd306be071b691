"""The snippets of AutoRound 0.1's README run with the import lines and the names of models changed, and nothing else."""

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

import qcore
from qcore import ConfigError, ModelError
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
def test_usage(short_opt_folder, tmp_path):
    """README, "Usage" and "Tips": quantize asymmetric, export, export for AutoGPTQ, generate."""
    model_name = str(short_opt_folder)
    model = AutoModelForCausalLM.from_pretrained(
        model_name, low_cpu_mem_usage=True, torch_dtype="auto", trust_remote_code=True
    )
    tokenizer = AutoTokenizer.from_pretrained(model_name, trust_remote_code=True)
    bits, group_size, scheme = 4, 128, "asym"
    autoround = AutoRound(model, tokenizer, bits=bits, group_size=group_size, scheme=scheme)
    autoround.quantize()
    autoround.export(tmp_path / "tmp_autoround")
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
def test_every_keyword_arrives(model, tokenizer, tokens):
    """All of README's detailed hyperparameters at once."""
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


@pytest.mark.parametrize(
    ("options", "says"),
    [
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
