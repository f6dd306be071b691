"""Real clients load what qcore writes and continue prompts as qcore itself does (make test-interop).

Clients compute in other precisions (llama.cpp rounds activations to 8 bits, vLLM computes in bfloat16), so a near tie may fall the
other way: each token a client chooses must be, to qcore given the same beginning, within MARGIN of the likeliest one.
"""

import importlib.util
import json
import os
import subprocess
from pathlib import Path

import pytest
import torch

import qcore

pytestmark = pytest.mark.interop
HERE = Path(__file__).parent
MARGIN = 0.15  # in log-probability; seen: at most 0.05
PROMPTS = ["The capital of France is", "def fibonacci(n):", "Water boils at a temperature of"]
COUNT = 8

_spec = importlib.util.spec_from_file_location("environments", HERE / "environments.py")
environments = importlib.util.module_from_spec(_spec)
_spec.loader.exec_module(environments)

#: folder -> (where it comes from, format, grid)
FOLDERS = {
    "gptq-4s": (None, "gptq", {"bits": 4}),
    "gptq-8s": (None, "gptq", {"bits": 8}),
    "awq-4a": (None, "awq", {"bits": 4, "sym": False}),
    "autoround-2a": (None, "autoround", {"bits": 2, "sym": False, "group_size": 32}),
    "gptq-4a": ("awq-4a", "gptq", {}),
    "gptq_v2-4a": ("awq-4a", "gptq_v2", {}),
    "awq-4s": ("gptq-4s", "awq", {}),
    "autoround-4s": ("gptq-4s", "autoround", {}),
    "autoround-4a": ("awq-4a", "autoround", {}),
    "ct-4s": ("gptq-4s", "compressed-tensors", {}),
    "ct-8s": ("gptq-8s", "compressed-tensors", {}),
    "ct-4a": ("awq-4a", "compressed-tensors", {}),
    "dense-4s": ("gptq-4s", "hf-dequantized", {}),
    "gguf-Q4_0": ("gptq-4s", "gguf", {}),
    "gguf-Q4_1": ("awq-4a", "gguf", {}),
    "gguf-Q8_0": ("gptq-8s", "gguf", {}),
    "gguf-Q5_0": (None, "gguf", {"bits": 5}),
    "gguf-Q5_1": (None, "gguf", {"bits": 5, "sym": False}),
}


@pytest.fixture(scope="session")
def folder(tmp_path_factory):
    """A function that makes a folder of the demo model, once."""
    made, home = {}, tmp_path_factory.mktemp("folders")

    def make(name):
        if name not in made:
            source, format, grid = FOLDERS[name]
            if source is None:
                made[name] = qcore.quantize(
                    "demo", "rtn", output=home / name, format=format, **{"group_size": 64, **grid}
                )
            else:
                made[name] = qcore.convert(make(source), home / name, format)
        return made[name]

    return make


def ask(environment, client, folder, prompts):
    """Run a client in its own environment; return the tokens it adds to each prompt."""
    environments.make(environment)
    python = environments.HOME / environment / "bin/python"
    command = [python, HERE / "clients.py", client, str(folder), str(COUNT)]
    variables = {**os.environ, "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}
    result = subprocess.run(
        command, input=json.dumps(prompts), capture_output=True, text=True, env=variables, timeout=580
    )
    answers = [line for line in result.stdout.splitlines() if line.startswith("RESULT ")]
    assert answers, f"{client} failed:\n{result.stdout[-2000:]}\n{result.stderr[-4000:]}"
    return json.loads(answers[0].removeprefix("RESULT "))["tokens"]


MATRIX = [
    ("llamacpp", "llamacpp", "gguf-Q4_0"), ("llamacpp", "llamacpp", "gguf-Q4_1"), ("llamacpp", "llamacpp", "gguf-Q5_0"),
    ("llamacpp", "llamacpp", "gguf-Q5_1"), ("llamacpp", "llamacpp", "gguf-Q8_0"),
    ("compressed-tensors", "transformers", "ct-4s"), ("compressed-tensors", "transformers", "ct-8s"),
    ("compressed-tensors", "transformers", "ct-4a"), ("compressed-tensors", "transformers", "dense-4s"),
    ("gptqmodel", "transformers", "gptq-4s"), ("gptqmodel", "gptqmodel", "gptq-4s"), ("gptqmodel", "gptqmodel", "gptq_v2-4a"),
    ("auto-round", "transformers", "autoround-4s"), ("auto-round", "transformers", "autoround-2a"),
    ("vllm", "vllm", "gptq-4s"), ("vllm", "vllm", "awq-4a"), ("vllm", "vllm", "ct-4s"), ("vllm", "vllm", "autoround-4s"), ("vllm", "vllm", "awq-4s"), ("vllm", "vllm", "ct-4a"), ("vllm", "vllm", "autoround-4a"),
]  # fmt: skip


@pytest.mark.parametrize(("environment", "client", "name"), MATRIX)
def test_a_client_continues_as_qcore_does(folder, environment, client, name):
    reference = qcore.load(folder(name if name != "dense-4s" else "gptq-4s"), backend="torch_reference")
    tokenizer = reference.qcore_info.tokenizer
    prompts = [tokenizer(text).input_ids for text in PROMPTS]
    for prompt, added in zip(prompts, ask(environment, client, folder(name), prompts), strict=True):
        assert len(added) == COUNT
        with torch.no_grad():
            logits = reference(torch.tensor([prompt + added])).logits[0].log_softmax(-1)
        for place, token in enumerate(added, len(prompt) - 1):
            gap = float(logits[place].max() - logits[place, token])
            assert gap < MARGIN, (
                f"{client} chose {token}, {gap:.3f} below the likeliest, after {prompt + added[: place + 1]}"
            )


@pytest.mark.parametrize("name", ["gptq-8s", "ct-8s", "gptq-4a"])
def test_what_check_says_vllm_refuses_it_refuses(folder, name):
    findings = qcore.check(folder(name), "vllm", device="cpu")
    assert any(finding.level == "refuses" for finding in findings)
    with pytest.raises(AssertionError, match="vllm failed"):
        ask("vllm", "vllm", folder(name), [[1, 2, 3]])
