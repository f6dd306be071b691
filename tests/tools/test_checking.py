import json

import pytest
from click.testing import CliRunner

import qcore
from qcore import ConfigError, PluginError, cli


@pytest.fixture(scope="module")
def gptq(llama_folder, tmp_path_factory):
    target = tmp_path_factory.mktemp("checking") / "gptq"
    return qcore.quantize(llama_folder, "rtn", group_size=32, output=target)


def refused(findings):
    return {finding.rule for finding in findings if finding.level == "refuses"}


def said(findings):
    """What is found, whatever the order of the layers."""
    return {(each.level, each.rule, each.message, each.source, frozenset(each.layers)) for each in findings}


def test_a_folder_and_the_plan_for_it_are_judged_alike(gptq, llama_folder):
    for target in ("vllm", "sglang", "transformers", "gptqmodel", "llama.cpp"):
        folder = qcore.check(gptq, target)
        plan = qcore.check(llama_folder, target, format="gptq", group_size=32)
        assert said(folder) == said(plan), target
        assert bool(refused(folder)) == (target == "llama.cpp")


def test_a_plan_that_the_format_cannot_hold_is_refused_by_the_format(llama_folder):
    (first, *_) = found = qcore.check(llama_folder, "vllm", format="awq", bits=3, group_size=32)
    assert refused(found) == {"format"}
    assert "3 bits; this layout has 4" in first.message
    assert first.layers == ("model.layers.0.self_attn.q_proj",)


def test_overrides_of_a_plan_count(llama_folder):
    uneven = qcore.check(llama_folder, "vllm", group_size=32, overrides=["*.1.*v_proj:bits=8"])
    assert refused(uneven) == {"fused shards"}
    assert {name for finding in uneven if finding.level == "refuses" for name in finding.layers} == {
        f"model.layers.1.self_attn.{part}_proj" for part in "qkv"
    }
    assert refused(qcore.check(llama_folder, "vllm", group_size=32, overrides=["*.1.*down_proj:bits=8"])) == set()


def test_an_option_the_target_has_not_is_named(gptq):
    with pytest.raises(
        ConfigError, match=r"target 'vllm' has no option 'tensor_paralel'\. Did you mean 'tensor_parallel'"
    ):
        qcore.check(gptq, "vllm", tensor_paralel=2)


def test_an_unknown_target_is_named(gptq):
    with pytest.raises(PluginError, match=r"no target is called 'vlm'\. Did you mean 'vllm'"):
        qcore.check(gptq, "vlm")


def test_the_command_tells_and_exits_by_the_outcome(gptq, llama_folder):
    run = CliRunner()
    result = run.invoke(cli.cli, ["check", str(gptq), "--target", "vllm"])
    assert (result.exit_code, result.output.splitlines()[-1]) == (0, "vllm loads it")
    result = run.invoke(cli.cli, ["check", str(gptq), "--target", "llama.cpp"])
    assert result.exit_code == 1
    assert "refuses: format: llama.cpp does not read gptq; it reads gguf" in result.output
    plan = ["--format", "gguf", "--group-size", "32", "--json"]
    result = run.invoke(cli.cli, ["check", str(llama_folder), "--target", "llama.cpp", *plan])
    assert json.loads(result.output)["loads"] is True
    result = run.invoke(cli.cli, ["targets", "--json"])
    assert [row["name"] for row in json.loads(result.output)] == [
        "gptqmodel",
        "llama.cpp",
        "sglang",
        "transformers",
        "vllm",
    ]
