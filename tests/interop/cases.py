"""What the interop tests run and `matrix.py` prints: which folders, which clients, which writers, and how each is judged.

Every function returns a record: a flat dict that says what was run, with which versions, and what came of it. Records are kept in
results.json beside the environments, so that the matrix can be filled over several runs.
"""

import importlib.metadata
import json
import shutil
from pathlib import Path

import environments
import numpy as np
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

import qcore
from qcore.checkpoint import resolve_model
from qcore.plugins import installed

PROMPTS = ["The capital of France is", "def fibonacci(n):", "Water boils at a temperature of"]
COUNT = 8
MARGIN = 0.15  # in log-probability: how far below the likeliest a token may lie that a client chooses
#: those that tell likelihoods are judged by what they make of a float file: llama.cpp of the one that its own converter wrote (it rounds
#: activations to 8 bits: 0.08 in the mean, and a token 0.22 below the likeliest), vLLM of the same weights multiplied out (float16: 0.008)
FLOAT = ("llamacpp", "vllm")
HALF = 0.01  # what float16 alone does to a gap
NOISE = 1.25  # times the mean on the float file
#: in logits, whose range is 30: how far what a peer answers may lie from qcore; GPTQModel computes in float16 (qcore itself is 0.14
#: from its own float32 there), the others in float32
CLOSE = {"gptqmodel": 0.3, "auto-round": 1e-3, "llmcompressor": 1e-3}
RESULTS = environments.HOME / "results.json"

#: folder -> (the folder it is converted from or None, format, what qcore.quantize is asked for)
FOLDERS = {
    "gptq-4s": (None, "gptq", {"bits": 4}),
    "gptq-8s": (None, "gptq", {"bits": 8}),
    "gptq-3s": (None, "gptq", {"bits": 3}),
    "gptq-2a": (None, "gptq", {"bits": 2, "sym": False, "group_size": 32}),
    "gptq-4s-act-order": (None, "gptq", {"algo": "gptq", "bits": 4, "desc_act": True, "samples": 4, "seqlen": 128}),
    "gptq-mixed": (None, "gptq", {"bits": 4, "overrides": ["*down_proj:bits=8"]}),
    "awq-4a": (None, "awq", {"bits": 4, "sym": False}),
    "autoround-2a": ("gptq-2a", "autoround", {}),
    "autoround-mixed": ("gptq-mixed", "autoround", {}),
    "gptq-4a": ("awq-4a", "gptq", {}),
    "gptq_v2-4a": ("awq-4a", "gptq_v2", {}),
    "gptq-4a-ones": ("gptq-4a", "gptq", {}),
    "gptq-groups": (None, "gptq", {"bits": 4, "overrides": [f"*{part}_proj:group_size=32" for part in "qkv"]}),
    "awq-4s": ("gptq-4s", "awq", {}),
    "autoround-4s": ("gptq-4s", "autoround", {}),
    "autoround-4a": ("awq-4a", "autoround", {}),
    "compressed-tensors-4s": ("gptq-4s", "compressed-tensors", {}),
    "compressed-tensors-8s": ("gptq-8s", "compressed-tensors", {}),
    "compressed-tensors-4a": ("awq-4a", "compressed-tensors", {}),
    "compressed-tensors-mixed": ("gptq-mixed", "compressed-tensors", {}),
    "hf-dequantized-4s": ("gptq-4s", "hf-dequantized", {}),
    "gguf-Q4_0": ("gptq-4s", "gguf", {}),
    "gguf-Q4_1": ("awq-4a", "gguf", {}),
    "gguf-Q8_0": ("gptq-8s", "gguf", {}),
    "gguf-Q5_0": (None, "gguf", {"bits": 5}),
    "gguf-Q5_1": (None, "gguf", {"bits": 5, "sym": False}),
}
#: (environment, client, target by whose rules `qcore check` judges, folder)
READERS = [
    *(("llamacpp", "llamacpp", "llama.cpp", f"gguf-{kind}") for kind in ("Q4_0", "Q4_1", "Q5_0", "Q5_1", "Q8_0")),
    *(("vllm", "vllm", "vllm", name) for name in (
        "gptq-4s", "awq-4a", "awq-4s", "compressed-tensors-4s", "compressed-tensors-4a", "autoround-4s", "autoround-4a",
        "gptq-4a", "gptq-8s", "compressed-tensors-8s", "gptq-groups", "gptq-4s-act-order",
    )),
    *(("llmcompressor", "transformers", "transformers", name) for name in (
        "compressed-tensors-4s", "compressed-tensors-4a", "compressed-tensors-8s", "compressed-tensors-mixed", "hf-dequantized-4s",
    )),
    *(("gptqmodel", "transformers", "transformers", name) for name in ("gptq-4s", "gptq-4a", "gptq-8s", "awq-4a")),
    *(("gptqmodel", "gptqmodel", "gptqmodel", name) for name in (
        "gptq-4s", "gptq-3s", "gptq-2a", "gptq-8s", "gptq-4s-act-order", "gptq-mixed", "gptq_v2-4a", "awq-4a",
    )),
    *(("auto-round", "transformers", "transformers", f"autoround-{name}") for name in ("4s", "2a", "4a", "mixed")),
    *(("auto-round-lib", "transformers", "transformers", f"autoround-{name}") for name in ("4s", "2a", "4a")),
]  # fmt: skip
_GROUP = {"num_bits": 4, "type": "int", "symmetric": True, "strategy": "group", "group_size": 64}
#: name -> (environment and writer, options of its quantizer)
WRITERS = {
    "GPTQModel, 4 bits sym": ("gptqmodel", "gptqmodel", {"bits": 4, "group_size": 64, "sym": True}),
    "GPTQModel, 4 bits asym, v1": ("gptqmodel", "gptqmodel", {"bits": 4, "group_size": 64, "sym": False, "format": "gptq"}),
    "GPTQModel, 4 bits sym, desc_act, dynamic: down_proj 8 bits, some v_proj float": (
        "gptqmodel", "gptqmodel",
        {"bits": 4, "group_size": 64, "desc_act": True, "act_group_aware": False,
         "dynamic": {"+:.*down_proj.*": {"bits": 8}, "-:.*\\.1[0-9]\\..*v_proj.*": {}}},
    ),
    "auto-round, 4 bits sym": ("auto-round", "autoround", {"bits": 4, "group_size": 64, "sym": True}),
    "auto-round, 4 bits asym": ("auto-round", "autoround", {"bits": 4, "group_size": 64, "sym": False}),
    "auto-round, 2 bits asym, layer_config: o_proj 8 bits, some down_proj float": (
        "auto-round", "autoround",
        {"bits": 2, "group_size": 64, "sym": False, "layer_config": {
            **{f"model.layers.{i}.self_attn.o_proj": {"bits": 8} for i in range(30)},
            **{f"model.layers.{i}.mlp.down_proj": {"bits": 16} for i in range(5)},
        }},
    ),
    "llm-compressor, W4A16": (
        "llmcompressor", "llmcompressor", {"ignore": ["lm_head"], "groups": {"group_0": [["Linear"], _GROUP]}},
    ),
    "llm-compressor, W4A16 asym, ignore by pattern": (
        "llmcompressor", "llmcompressor",
        {"ignore": ["lm_head", "re:.*layers\\.[0-4]\\.mlp.*"], "groups": {"group_0": [["Linear"], {**_GROUP, "symmetric": False}]}},
    ),
    "llm-compressor, W8A16 by channel and W4A16 in two groups": (
        "llmcompressor", "llmcompressor",
        {"ignore": ["lm_head"], "groups": {
            "group_0": [["re:.*self_attn.*"], {"num_bits": 8, "type": "int", "symmetric": True, "strategy": "channel"}],
            "group_1": [["re:.*mlp.*"], _GROUP],
        }},
    ),
}  # fmt: skip


def folder(name, home):
    """The demo model quantized, made once under `home`."""
    target = home / name
    if not target.exists():
        source, format, asked = FOLDERS[name]
        if name.endswith("-ones"):
            shutil.copytree(folder(source, home), target)
            ones(target)
        elif source is None:
            asked = {"algo": "rtn", "group_size": 64, **asked}
            qcore.quantize("demo", asked.pop("algo"), output=target, format=format, **asked)
        else:
            qcore.convert(folder(source, home), target, format)
    return target


def prompts():
    tokenizer = AutoTokenizer.from_pretrained(demo())
    return [tokenizer(text).input_ids for text in PROMPTS]


def demo():
    """The demo model's folder."""
    return resolve_model("demo", installed())


def read(environment, client, target, name, home):
    """Let a client continue the prompts and judge every token it chooses by qcore's own logits."""
    made, asked = folder(name, home), prompts()
    options = {"device": "cpu"} if target == "vllm" else {}
    refused = [each.rule for each in qcore.check(made, target, **options) if each.level == "refuses"]
    record = {
        "kind": "read",
        "client": client,
        "environment": environment,
        "folder": name,
        "check": ", ".join(refused) or "loads",
    }
    answer, complaints = ask(environment, client, made, asked)
    if answer is None:
        return keep({**record, "outcome": "fails", "message": last_line(complaints)})
    source = FOLDERS[name][0] if name.startswith("hf-dequantized") else name
    logits = likelihoods(qcore.load(folder(source, home), backend="torch_reference"), asked, answer["tokens"])
    return keep({**record, "outcome": "loads", "version": answer["version"], **judged(logits, answer)})


def ask(environment, client, folder, asked):
    """What a client says, or None and its complaints."""
    _, out, complaints = environments.run(environment, "clients.py", client, folder, COUNT, stdin=json.dumps(asked))
    answers = [line for line in out.splitlines() if line.startswith("RESULT ")]
    return (json.loads(answers[0].removeprefix("RESULT ")) if answers else None), complaints


def likelihoods(reference, asked, added):
    """Log-probabilities [tokens, vocabulary] of a model at each place where a client added a token."""
    found = []
    for prompt, tokens in zip(asked, added, strict=True):
        assert len(tokens) == COUNT
        with torch.no_grad():
            logits = reference(torch.tensor([prompt + tokens])).logits[0].float()
        found.append(logits[len(prompt) - 1 : -1].log_softmax(-1))
    return torch.cat(found)


def judged(logits, answer):
    """gap: how far a token chosen lies below the likeliest, at most. mean: distance of the likelihoods a client gave, in the mean."""
    chosen = torch.tensor(answer["tokens"]).flatten()
    gaps = logits.amax(-1) - logits.gather(1, chosen[:, None])[:, 0]
    found = {"gap": float(gaps.max()), "tokens": len(gaps)}
    if "top" in answer:
        given = [place for prompt in answer["top"] for place in prompt]
        apart = [
            abs(float(row[int(token)]) - value)
            for row, place in zip(logits, given, strict=True)
            for token, value in place.items()
        ]
        found["mean"] = sum(apart) / len(apart)
    return found


def baseline(environment, home):
    """What a client that tells likelihoods makes of a file that quantizing had no part in, by transformers' float32."""
    if environment == "vllm":
        made = folder("hf-dequantized-4s", home)
        reference = AutoModelForCausalLM.from_pretrained(made, dtype=torch.float32)
    else:
        made, reference = wheels_file(home), AutoModelForCausalLM.from_pretrained(demo(), dtype=torch.float32)
    asked = prompts()
    answer, complaints = ask(environment, environment, made, asked)
    assert answer is not None, complaints
    found = judged(likelihoods(reference, asked, answer["tokens"]), answer)
    record = {"kind": "read", "client": environment, "environment": environment, "folder": f"float: {made.name}"}
    return keep({**record, "outcome": "loads", "version": answer["version"], **found})


def wheels_file(home):
    """A folder with the demo model's own GGUF file, which llama.cpp's converter wrote."""
    from qcore_plugins.sources.gguf_model import demo_file

    made = home / "of-llama.cpp"
    made.mkdir(parents=True, exist_ok=True)
    if not (made / "model.gguf").exists():
        (made / "model.gguf").symlink_to(demo_file())
    return made


def vllm_rules(asked):
    """What vLLM's own code makes of quantization configs, see vllm_rules.py."""
    _, out, complaints = environments.run("vllm", "vllm_rules.py", stdin=json.dumps(asked))
    answers = [line for line in out.splitlines() if line.startswith("RESULT ")]
    assert answers, complaints
    found = json.loads(answers[0].removeprefix("RESULT "))
    assert len(found) == len(asked)
    return found


def ones(made):
    """Let the zero points of one linear in each block be fields of ones, as a writer leaves them that takes 1 off 0."""
    from safetensors.torch import load_file, save_file

    tensors = load_file(made / "model.safetensors")
    for name in [name for name in tensors if name.endswith("mlp.up_proj.qzeros")]:
        tensors[name] = torch.full_like(tensors[name], -1)
    save_file(tensors, made / "model.safetensors", {"format": "pt"})


def write(name, home):
    """Let a peer quantize the demo model and say what it answers; read its folder and answer the same prompt."""
    environment, writer, options = WRITERS[name]
    out, prompt = home / name.replace(" ", "-").replace(",", ""), prompts()[0]
    shutil.rmtree(out, ignore_errors=True)
    out.mkdir(parents=True)
    asked = (writer, demo(), out, json.dumps(options))
    _, printed, complaints = environments.run(environment, "writers.py", *asked, stdin=json.dumps(prompt))
    record = {"kind": "write", "writer": name, "environment": environment}
    answers = [line for line in printed.splitlines() if line.startswith("RESULT ")]
    if not answers:
        return keep({**record, "outcome": "fails", "message": last_line(complaints)})
    version = json.loads(answers[0].removeprefix("RESULT "))["version"]
    (config,) = [*(out / "model").glob("config.json"), *(out / "model").glob("*/config.json")]
    theirs = torch.from_numpy(np.load(out / "logits.npy"))
    model = qcore.load(config.parent, backend="torch_reference", dtype=torch.float32)
    with torch.no_grad():
        ours = model(torch.tensor([prompt])).logits[0]
    found = qcore.inspect(config.parent)
    return keep({
        **record, "outcome": "reads", "version": version, "format": found["format"], "linears": len(found["layers"]),
        "difference": float((ours - theirs).abs().max()), "largest": float(ours.abs().max()),
    })  # fmt: skip


def last_line(text):
    """The last line of what a program complained about, without paths."""
    lines = [line.strip() for line in text.splitlines() if "Error" in line or "not support" in line or "cannot" in line]
    reasons = [
        line.strip() for line in text.splitlines() if "Value error," in line
    ]  # pydantic names none in its own last line
    return (reasons or lines or text.strip().splitlines() or ["nothing was said"])[-1].replace(
        str(environments.HOME), ""
    )[:300]


def results():
    return json.loads(RESULTS.read_text()) if RESULTS.is_file() else []


def keep(record):
    """Put a record in the place of the older one for the same run."""

    def same(other):
        return all(record.get(key) == other.get(key) for key in ("kind", "client", "environment", "folder", "writer"))

    record["qcore"] = importlib.metadata.version("qcore")
    RESULTS.parent.mkdir(parents=True, exist_ok=True)
    RESULTS.write_text(json.dumps([*(each for each in results() if not same(each)), record], indent=1) + "\n")
    return record


def home():
    return Path(environments.HOME) / "folders"
