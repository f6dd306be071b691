import json
import os
import subprocess
import sys

import pytest
from click.testing import CliRunner

import qcore
from qcore import cli

LISTINGS = ["plugins", "algorithms", "models", "backends", "formats", "datasets", "tasks"]


@pytest.fixture
def run(monkeypatch, capsys):
    """A function that runs the command line in this process: run(*arguments) -> (exit code, stdout, stderr)."""

    def call(*arguments):
        monkeypatch.setattr(sys, "argv", ["qcore", *map(str, arguments)])
        with pytest.raises(SystemExit) as stopped:
            cli.main()
        captured = capsys.readouterr()
        return stopped.value.code, captured.out, captured.err

    return call


@pytest.fixture
def text_file(tmp_path):
    file = tmp_path / "held_out.txt"
    file.write_text("The quick brown fox jumps over the lazy dog, and then it sleeps. " * 30)
    return file


def the_one_object(out):
    """The JSON object on stdout; fails when there is anything else."""
    assert out.endswith("\n")
    assert out.count("\n") == 1
    found = json.loads(out)
    assert isinstance(found, (dict, list))
    return found


@pytest.fixture(scope="module")
def quantized(llama_folder, tmp_path_factory):
    return qcore.quantize(llama_folder, "rtn", group_size=32, output=tmp_path_factory.mktemp("cli") / "out")


def test_quantize_writes_a_folder_and_shows_each_linear(run, llama_folder, text_file, tmp_path):
    code, out, err = run("quantize", llama_folder, "-o", tmp_path / "out", "--group-size", 32, "--calibration", text_file,
                         "--samples", 4, "--seqlen", 32, "--set", "desc_act=true")  # fmt: skip
    assert code == 0, err
    assert "model.layers.2.mlp.down_proj" in out
    assert "bits per quantized weight" in out
    assert "calibrated on 4 sequences, 128 tokens" in out
    report = qcore.report(tmp_path / "out")
    assert report["params"]["desc_act"] is True
    assert "gptq blocks" in err


def test_quantize_prints_one_json_object_and_nothing_else(run, llama_folder, tmp_path):
    code, out, err = run("quantize", llama_folder, "-o", tmp_path / "out", "--algo", "rtn", "--bits", 3, "--group-size", 32,
                         "--asym", "--set", "grid=mse", "--override", "down_proj:skip", "--seed", 7, "--json")  # fmt: skip
    found = the_one_object(out)
    assert code == 0
    assert err == ""
    assert found["config"] == {"bits": 3, "group_size": 32, "sym": False}
    assert found["params"]["grid"] == "mse"
    assert found["seed"] == 7
    assert len(found["layers"]) == 18
    assert found["size"] == (tmp_path / "out" / "model.safetensors").stat().st_size
    assert 3 < found["bits_per_weight"] < 5


def test_inspect_shows_and_prints(run, quantized):
    code, out, _ = run("inspect", quantized)
    assert code == 0
    assert "model.layers.0.self_attn.q_proj" in out
    assert "format gptq, llama" in out
    assert "with rtn" in out
    code, out, _ = run("inspect", quantized, "--json")
    assert code == 0
    assert the_one_object(out) == json.loads(json.dumps(qcore.inspect(quantized), default=str))


def test_eval_measures_and_compares(run, quantized, llama_folder, text_file):
    arguments = ["eval", quantized, "--text", text_file, "--seqlen", 32, "--windows", 2]
    code, out, _ = run(*arguments, "--reference", llama_folder, "--json")
    found = the_one_object(out)
    assert code == 0
    assert found["windows"] == 2
    assert found["kl"] > 0
    code, out, _ = run(*arguments)
    assert code == 0
    assert f"{found['perplexity']:.4f}" in out


def test_eval_runs_tasks_beside_a_reference(run, quantized, llama_folder, text_file, tmp_path):
    data = tmp_path / "rows.jsonl"
    data.write_text('{"prompt": "The quick", "answer": " brown fox"}\n' * 3)
    arguments = ["eval", quantized, "--task", "language_modeling", "--data", data, "--set", "label_col_name=answer"]
    code, out, _ = run(*arguments, "--reference", llama_folder, "--text", text_file, "--seqlen", 32, "--json")
    found = the_one_object(out)
    assert code == 0
    assert set(found) == {"text", "language_modeling"}
    assert found["language_modeling"]["samples"] == 3
    code, out, _ = run(*arguments, "--reference", llama_folder)
    assert code == 0
    (row,) = (line.split() for line in out.splitlines() if line.startswith("perplexity"))
    assert row[1:] == [f"{found['language_modeling'][name]:.4f}" for name in ("perplexity", "reference_perplexity")]


def test_generate_continues_a_prompt(run, quantized, llama_folder):
    code, out, _ = run("generate", quantized, "The quick", "--max-new-tokens", 3, "--json")
    assert code == 0
    assert the_one_object(out)["text"].startswith("The quick")
    code, out, _ = run("generate", llama_folder, "The quick", "--max-new-tokens", 3)
    assert code == 0
    assert out.startswith("The quick")


@pytest.mark.parametrize("listing", LISTINGS)
def test_each_listing_names_first_party_plugins_with_their_distribution(run, listing):
    code, out, _ = run(listing, "--json")
    rows = the_one_object(out)
    assert code == 0
    assert rows
    assert {"name", "distribution", "version", "status"} <= set(rows[0])
    code, out, _ = run(listing)
    assert code == 0
    assert all(row["name"] in out for row in rows)


def test_backends_tell_whether_they_can_run_here(run):
    rows = {row["name"]: row for row in json.loads(run("backends", "--json")[1])}
    assert rows["torch_reference"]["usable"] == "yes"


def test_models_tell_the_types_they_serve(run):
    rows = {row["name"]: row for row in json.loads(run("models", "--json")[1])}
    assert "llama" in rows["llama"]["description"]


@pytest.mark.parametrize(
    ("arguments", "code", "says"),
    [
        (["quantise"], 2, "No such command 'quantise'"),
        (["quantize"], 2, "Missing argument"),
        (["quantize", "m"], 2, "Missing option"),
        (["quantize", "m", "-o", "o", "--bits", "9"], 2, "9 is not in the range"),
        (["quantize", "m", "-o", "o", "--gruop-size", "9"], 2, "--group-size"),
        (["quantize", "m", "-o", "o", "--set", "desc_act"], 2, "expected NAME=VALUE"),
        (["quantize", "m", "-o", "o", "--set", "bits=3"], 2, "an option of its own, --bits"),
        (["quantize", "m", "-o", "o", "--set", "format=awq"], 2, "--set format: this is not an option of a plugin"),
        (["quantize", "m", "-o", "o", "--set", "model=m"], 2, "--set model: this is not an option of a plugin"),
        (["quantize", "m", "-o", "o", "--set", "plugins=1"], 2, "--set plugins: this is not an option of a plugin"),
        (["quantize", "m", "-o", "o", "--set", "damp_percnt=1"], 2, "Did you mean 'damp_percent'"),
        (["quantize", "m", "-o", "o", "--seqlen", "0"], 2, "seqlen=0"),
        (["quantize", "m", "-o", "o", "--batch-size", "0"], 2, "batch_size=0"),
        (["quantize", "m", "--dry-run", "--samples", "0"], 2, "samples=0"),
        (["quantize", "m", "--dry-run", "--batch-size", "-1"], 2, "batch_size=-1"),
        (["quantize", "m", "-o", "o", "--seed", "-1"], 2, "seed=-1"),
        (["quantize", "m", "-o", "o", "--algo", "autoround", "--set", "preset=[1]"], 2, "preset=[1]"),
        (["quantize", "m", "-o", "o", "--group-size", "0"], 2, "group_size=0"),
        (["quantize", "m", "-o", "o", "--device", "gpu"], 2, "device 'gpu'"),
        (["quantize", "m", "-o", "o", "--algo", "gtpq"], 2, "Did you mean 'gptq'"),
        (["quantize", "m", "-o", "o", "--format", "gtpq"], 2, "Did you mean 'gptq'"),
        (["quantize", "no/such/model", "-o", "o"], 1, "there is no folder no/such/model"),
        (["inspect", "no-such-folder"], 1, "there is no folder no-such-folder"),
        (["eval", "m"], 2, "nothing to measure on: give --text FILE, --task NAME"),
        (["eval", "m", "--text", "f", "--data", "d"], 2, "--data and --set are for tasks"),
        (["eval", "m", "--task", "t", "--set", "seqlen=8"], 2, "an option of its own, --seqlen"),
        (["check", "m", "--target", "vllm", "--set", "format=awq"], 2, "an option of its own, --format"),
        (["eval", "m", "--task", "language_model"], 2, "Did you mean 'language_modeling'"),
        (["eval", "m", "--text", "no-such-file"], 2, "--text no-such-file cannot be read"),
        (["generate", "no/such/model", "hi"], 1, "there is no folder"),
        (["generate", "m", "hi", "--max-new-tokens", "0"], 2, "--max-new-tokens"),
        (["bench", "generate", "m", "--new-tokens", "0"], 2, "--new-tokens"),
        (["bench", "generate", "m", "--prompt-tokens", "0"], 2, "--prompt-tokens"),
        (["bench", "generate", "m", "--num-beams", "0"], 2, "--num-beams"),
        (["bench", "generate", "m", "--repeat", "0"], 2, "--repeat"),
        (["bench", "matmul", "--shapes", "64x0"], 2, "'64x0' are no shapes"),
        (["bench", "matmul", "--shapes", "64x64", "--group-size", "0"], 2, "group_size=0"),
    ],
)
def test_mistakes_get_their_exit_code_and_say_what_is_wrong(run, tmp_path, monkeypatch, arguments, code, says):
    monkeypatch.chdir(tmp_path)
    found, out, err = run(*arguments)
    assert found == code
    assert says in err
    assert out == ""
    assert "Traceback" not in err
    assert list(tmp_path.iterdir()) == []


def test_an_output_that_exists_is_refused(run, llama_folder, quantized):
    code, _, err = run("quantize", llama_folder, "-o", quantized, "--algo", "rtn", "--group-size", 32)
    assert code == 1
    assert "exists already" in err


def test_a_prompt_without_tokens_is_refused(run, quantized):
    code, out, err = run("generate", quantized, "")
    assert (code, out) == (2, "")
    assert "the prompt '' has no tokens" in err


def test_a_model_without_a_tokenizer_cannot_read_a_prompt(run, llama_folder, tmp_path):
    import shutil

    bare = shutil.copytree(llama_folder, tmp_path / "bare", ignore=shutil.ignore_patterns("tokenizer*"))
    code, _, err = run("generate", bare, "hi")
    assert code == 2
    assert "has no tokenizer" in err


def test_ctrl_c_says_how_to_resume(run, llama_folder, tmp_path, monkeypatch, text_file):
    from qcore import api

    def interrupt(*_, **__):
        raise KeyboardInterrupt

    monkeypatch.setattr(api, "quantize", interrupt)
    code, out, err = run("quantize", llama_folder, "-o", tmp_path / "out")
    assert code == 130
    assert "run the same command again to resume" in err
    assert f"{tmp_path / 'out'}.partial" in err
    assert out == ""


def test_a_resumed_run_says_so(run, llama_folder, tmp_path, watched):
    class Stop:
        @qcore.hookimpl
        def qcore_block_finished(self, index):
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        qcore.quantize(llama_folder, "rtn", group_size=32, output=tmp_path / "out", plugins=watched(Stop()),
                       batch_size=None)  # fmt: skip
    code, _, err = run("quantize", llama_folder, "-o", tmp_path / "out", "--algo", "rtn", "--group-size", 32)
    assert code == 0, err
    assert "Resuming after 1 finished blocks" in err


def test_the_generic_adapter_says_what_it_assumed(run, llama_folder, tmp_path):
    code, _, err = run("quantize", llama_folder, "-o", tmp_path / "out", "--algo", "rtn", "--group-size", 32,
                       "--adapter", "generic")  # fmt: skip
    assert code == 0
    assert "generic adapter: took 'model.layers' for the decoder blocks" in err


def test_help_and_version():
    runner = CliRunner()
    for arguments in (["--help"], ["-h"], ["quantize", "--help"], ["plugins", "-h"], ["--version"]):
        result = runner.invoke(cli.cli, arguments)
        assert result.exit_code == 0
        assert "qcore" in result.output or "Usage" in result.output


@pytest.mark.parametrize("command", [[sys.executable, "-m", "qcore"], ["qcore"]])
def test_the_installed_command_runs_as_a_process(command):
    path = os.pathsep.join([os.path.dirname(sys.executable), os.environ["PATH"]])
    result = subprocess.run(
        [*command, "plugins", "--json"], capture_output=True, text=True, env={**os.environ, "PATH": path}
    )
    assert result.returncode == 0, result.stderr
    assert {row["status"] for row in json.loads(result.stdout) if row["distribution"] == "qcore"} == {"loaded"}


def test_a_broken_plugin_does_not_break_the_commands(run, monkeypatch, plugin):
    import importlib.metadata

    from qcore import plugins

    points = [
        *importlib.metadata.entry_points(group="qcore"),
        plugin("bad", "import no_such_module_anywhere", "bad-dist"),
    ]
    broken = plugins.Plugins(points)
    monkeypatch.setattr(plugins, "installed", lambda: broken)
    for listing in LISTINGS:
        assert run(listing)[0] == 0
    rows = json.loads(run("plugins", "--json")[1])
    assert [row["status"] for row in rows if row["distribution"] == "bad-dist"] == ["failed"]
    assert "no_such_module_anywhere" in run("plugins")[1]


def test_a_name_that_clashes_is_listed_and_breaks_no_listing(run, monkeypatch, plugin):
    import importlib.metadata

    from qcore import plugins

    source = "import qcore_plugins.backends.torch_reference as t\nimport qcore\n@qcore.hookimpl\ndef qcore_backends(): return [t.TorchReference()]\n"
    points = [*importlib.metadata.entry_points(group="qcore"), plugin("twin", source, "twin-dist")]
    clashing = plugins.Plugins(points)
    monkeypatch.setattr(plugins, "installed", lambda: clashing)
    rows = [row for row in json.loads(run("backends", "--json")[1]) if row["name"] == "torch_reference"]
    assert [row["status"] for row in rows] == ["clash", "clash"]
    for listing in LISTINGS:
        assert run(listing)[0] == 0
