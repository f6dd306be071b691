"""The benchmark scripts that AutoGPTQ's users know by name run, and measure what they say."""

import importlib.util
import json
import math
import sys
from pathlib import Path

import pytest
import torch

import qcore
from qcore.plugins import installed
from qcore.testing import tiny_language_model, tiny_tokenizer

BENCHMARKS = Path(__file__).parent.parent / "benchmarks"
TEXT = "The quick brown fox jumps over the lazy dog. " * 20


def script(name):
    spec = importlib.util.spec_from_file_location(name, BENCHMARKS / f"{name}.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_perplexity_scores_the_second_half_of_each_chunk_as_llama_cpp_does():
    module, model, tokenizer = script("perplexity"), tiny_language_model(), tiny_tokenizer()
    ids = module.chunks_of(TEXT, tokenizer, 64, 3)
    nll = []
    for chunk in ids:
        log_p = torch.log_softmax(model(chunk[None]).logits[0].detach().double(), -1)
        nll += [-float(log_p[position - 1, chunk[position]]) for position in range(33, 64)]
    perplexity, error = module.measure(model, ids)
    assert perplexity == pytest.approx(math.exp(sum(nll) / len(nll)), rel=1e-5)
    assert error == pytest.approx(
        perplexity * torch.tensor(nll).std(unbiased=False).item() / math.sqrt(len(nll) - 1), rel=1e-4
    )


def test_each_chunk_begins_with_bos_where_the_tokenizer_says_so():
    module, tokenizer = script("perplexity"), tiny_tokenizer()
    plain = module.chunks_of(TEXT, tokenizer, 64, 2)
    assert tokenizer.bos_token_id not in plain

    class Beginning:
        bos_token_id = tokenizer.bos_token_id

        def __call__(self, text, **options):
            return {"input_ids": [self.bos_token_id, *tokenizer(text)["input_ids"]]}

    begun = module.chunks_of(TEXT, Beginning(), 64, 2)
    assert begun[:, 0].tolist() == [tokenizer.bos_token_id] * 2
    assert begun[0, 1:].tolist() == plain[0, :-1].tolist()


def test_the_scripts_run(llama_folder, tmp_path, monkeypatch, capsys):
    text = tmp_path / "text.txt"
    text.write_text(TEXT)
    out = qcore.quantize(llama_folder, "rtn", group_size=32, output=tmp_path / "out")
    arguments = [
        "perplexity.py",
        out,
        "--text",
        text,
        "--n-ctx",
        32,
        "--chunks",
        2,
        "--tokens",
        tmp_path / "tokens.json",
    ]
    monkeypatch.setattr(sys, "argv", list(map(str, arguments)))
    script("perplexity").main()
    assert "PPL = " in capsys.readouterr().out
    assert [len(chunk) for chunk in json.loads((tmp_path / "tokens.json").read_text())] == [32, 32]
    arguments = ["generation_speed.py", out, "--reference", llama_folder, "--new-tokens", 3, "--prompt-tokens", 5,
                 "--num-beams", 1, 2, "--no-fast"]  # fmt: skip
    monkeypatch.setattr(sys, "argv", list(map(str, arguments)))
    script("generation_speed").main()
    rows = [row.split(" | ") for row in capsys.readouterr().out.splitlines()[2:]]
    assert [(row[0], row[2]) for row in rows] == [
        (str(model), beams) for model in (llama_folder, out) for beams in "12"
    ]
    assert all(float(cell) >= 0 for row in rows for cell in row[3:])


def test_a_shape_alone_is_measured_with_random_weights(monkeypatch, tmp_path, capsys):
    module = script("generation_speed")
    tiny = {
        "vocab_size": 96,
        "hidden_size": 64,
        "intermediate_size": 96,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
    }
    monkeypatch.setitem(module.MODEL_SHAPES, "llama-2-7b", {**module.MODEL_SHAPES["llama-2-7b"], **tiny})
    arguments = ["generation_speed.py", "--shape", "llama-2-7b", "--layers", 2, "--group-size", 32, "--reference", "fp32",
                 "--dtype", "float32", "--new-tokens", 3, "--prompt-tokens", 5, "--num-beams", 1, "--no-fast", "--device", "cpu",
                 "--json", tmp_path / "found.json"]  # fmt: skip
    monkeypatch.setattr(sys, "argv", list(map(str, arguments)))
    module.main()
    found = json.loads((tmp_path / "found.json").read_text())["speeds"]
    assert [each["model"] for each in found] == ["llama-2-7b, fp32", "llama-2-7b, 4 bits, group 32, sym"]
    assert found[0]["memory"] > 2 * found[1]["memory"]


def test_the_adapter_example_lowers_the_loss(llama_folder, tmp_path, monkeypatch, capsys):
    pytest.importorskip("peft")
    monkeypatch.syspath_prepend(str(BENCHMARKS.parent / "examples"))
    text = tmp_path / "text.txt"
    text.write_text(TEXT * 2)
    arguments = ["x", "--model", llama_folder, "--text", text, "--steps", 12, "--seqlen", 32, "--rate", 1e-2,
                 "--group-size", 32, "--output", tmp_path / "adapter", "--merged", tmp_path / "merged"]  # fmt: skip
    monkeypatch.setattr(sys, "argv", list(map(str, arguments)))
    import train_adapter

    train_adapter.main()
    lines = capsys.readouterr().out.splitlines()
    for line in lines[:2]:
        before, after = map(float, line.rpartition("perplexity ")[2].split(" -> "))
        assert after < 0.8 * before
    assert float(lines[2].rpartition("perplexity ")[2]) < 0.8 * before
    assert qcore.inspect(tmp_path / "merged")["format"] == "gptq"
    assert lines[4:6] == ["| steps | float | 4 bits |", "|---|---|---|"]
    curve = [[float(cell) for cell in line.split("|")[2:4]] for line in lines[6:]]
    assert len(curve) == 12
    assert curve[-1][0] < curve[0][0]
    assert curve[-1][1] < curve[0][1]
    assert (tmp_path / "adapter" / "adapter_model.safetensors").is_file()


def test_matmul_cpu_times_every_column_beside_the_others(monkeypatch, capsys, tmp_path):
    if installed().get("backend", "cpu").unavailable():
        pytest.skip("the CPU kernels are not built")
    out = tmp_path / "found.json"
    monkeypatch.setattr(
        sys, "argv", f"matmul_cpu --shape 256x64 --tokens 1,3 --copies 2 --seconds 0.01 --json {out}".split()
    )
    script("matmul_cpu").main()
    found = json.loads(out.read_text())["milliseconds"]
    dtypes = ("float32", "bfloat16", "float16")
    ours, torchs = ({f"{kind}{dtype}" for dtype in dtypes} for kind in ("cpu 4 bits, ", "torch "))
    assert set(found) == {*ours, *torchs, "torch int4pack, bfloat16"}
    assert all(len(times) == 2 and min(times) > 0 for times in found.values())
    assert capsys.readouterr().out.count("\n") == 2 + len(found)


def test_the_solvers_find_what_the_paper_written_down_finds(monkeypatch, capsys, tmp_path):
    arguments = ["solver.py", "--device", "cpu", "--shapes", "256x64", "--group-size", 32, "--repeats", 1,
                 "--json", tmp_path / "rows"]  # fmt: skip
    monkeypatch.setattr(sys, "argv", list(map(str, arguments)))
    script("solver").main()
    rows = json.loads((tmp_path / "rows").read_text())
    assert [row["solver"] for row in rows][:3] == ["plain64", "plain32", "torch"]
    for row in rows:
        assert row["codes equal"] > 0.99
        assert row["loss ratio"] == pytest.approx(1, abs=1e-3)


def test_gptq_speed_tells_where_the_time_goes(monkeypatch, capsys, tmp_path):
    monkeypatch.syspath_prepend(str(BENCHMARKS))
    arguments = ["gptq_speed.py", "--device", "cpu", "--shape", "tiny", "--blocks", 2, "--samples", 4, "--seqlen", 32, "--parts",
                 "--scratch", tmp_path, "batch_size=2", "--then", "batch_size=1"]  # fmt: skip
    monkeypatch.setattr(sys, "argv", list(map(str, arguments)))
    script("gptq_speed").main()
    lines = [line for line in capsys.readouterr().out.splitlines() if "{" in line]
    assert [line.split(" {")[0] for line in lines[:2]] == ["batch_size=2", "batch_size=1"]
    parts = json.loads(lines[2])["parts s a block"]
    assert all(parts[name] > 0 for name in ("forward", "Hessians", "factorization", "solve", "fetch weights"))


def test_generation_on_a_cpu_is_measured_beside_float_weights(llama_folder, tmp_path, monkeypatch, capsys):
    out, found = qcore.quantize(llama_folder, "rtn", group_size=32, output=tmp_path / "out"), tmp_path / "found.json"
    arguments = [
        "generation_cpu.py",
        out,
        "--new-tokens",
        3,
        "--prompt-tokens",
        5,
        "--repeat",
        1,
        "--threads",
        1,
        "--json",
        found,
    ]
    monkeypatch.setattr(sys, "argv", list(map(str, arguments)))
    before = torch.get_num_threads()
    try:
        script("generation_cpu").main()
    finally:
        torch.set_num_threads(before)
    rows = json.loads(found.read_text())["rows"]
    assert list(rows) == ["float32 weights", "bfloat16 weights", "qcore", "qcore, fast", "qcore, fast, bfloat16"]
    assert all(row["tokens_per_second"] > 0 for row in rows.values())
    assert capsys.readouterr().out.count("\n") == 2 + len(rows)


@pytest.mark.parametrize("name", ["autoround_speed", "gptq_speed"])
def test_what_the_speed_benchmarks_time_is_there(name):
    module = script(name)
    timed = module.parts() if name == "autoround_speed" else module.TIMED
    assert len(timed) > 8
    for owner, method, _ in timed:
        assert callable(getattr(owner, method)), (owner, method)
