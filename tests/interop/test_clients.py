"""Real clients load what qcore writes and continue prompts as qcore itself does, and qcore reads what peers write (make test-interop).

Clients compute in float16 or, llama.cpp, with activations rounded to 8 bits, so a near tie may fall the other way: each token a client
chooses must be, to qcore given the same beginning, within MARGIN of the likeliest one. A client that tells likelihoods must tell those of
qcore, no further off than on a float file in which qcore has no part (`cases.baseline`). Where a client loads a folder and where it does
not must be what `qcore check` says.
"""

import itertools
import sys
from pathlib import Path

import pytest

from qcore import Content, LayerSpec, QuantConfig, Subject
from qcore.plugins import installed

sys.path.insert(0, str(Path(__file__).parent))
import cases

pytestmark = pytest.mark.interop

#: (environment, folder) -> the client's words where it lacks a package that `qcore check` says it needs
KNOWN = {
    ("auto-round", "autoround-4a"): "NoneType"
}  # AWQ's layout on a CPU needs auto-round-lib, with which the same folder loads


@pytest.fixture(scope="session")
def home(tmp_path_factory):
    return tmp_path_factory.mktemp("folders")


@pytest.fixture(scope="session")
def baselines(home):
    return {environment: cases.baseline(environment, home) for environment in cases.FLOAT}


@pytest.mark.parametrize(("environment", "client", "target", "name"), cases.READERS)
def test_a_client_continues_as_qcore_does_or_refuses_as_check_says(home, baselines, environment, client, target, name):
    found = cases.read(environment, client, target, name, home)
    if (environment, name) in KNOWN:
        assert KNOWN[environment, name] in found["message"]
        return
    assert (found["outcome"] == "loads") == (found["check"] == "loads"), found
    if found["outcome"] == "loads":
        float_file = baselines.get(environment, {"gap": cases.MARGIN - cases.HALF})
        assert found["gap"] <= float_file["gap"] + cases.HALF, found
        assert found.get("mean", 0) <= cases.NOISE * float_file.get("mean", 0), found


def test_what_autoround_lacks_in_one_environment_it_has_in_the_other():
    for environment, name in KNOWN:
        assert (f"{environment}-lib", "transformers", "transformers", name) in cases.READERS


#: (format, bits, sym, group size, act-order, sides): what the rules about grids tell apart
GRIDS = [
    *itertools.product(("gptq", "gptq_v2", "autoround", "compressed-tensors"), (2, 3, 4, 8), (True, False), (64,), (False,), ((256, 128),)),
    *itertools.product(("gptq", "autoround", "awq", "compressed-tensors"), (4,), (True,), (16, 32, 128, -1), (False,), ((256, 128),)),
    *itertools.product(("gptq", "gptq_v2"), (4,), (True,), (64, -1), (True,), ((256, 128),)),
    *itertools.product(("gptq", "awq", "compressed-tensors"), (4,), (True,), (16, 64), (False,), ((256, 80), (80, 256))),
    ("awq", 4, False, 64, False, (256, 128)), ("awq", 4, False, 16, False, (256, 128)), ("autoround", 4, False, 16, False, (256, 128)),
]  # fmt: skip
DOWN = "model.layers.0.mlp.down_proj"


def config_of(format, layers, drop=()):
    """The quantization_config that qcore writes for these linears."""
    content = Content({}, {layer.name: layer for layer in layers}, {}.__getitem__, (), {}.__getitem__)
    exporter = installed().get("format", format)
    if format == "autoround":
        from qcore_plugins.exporters.autoround import packing_for

        exporter = type(exporter)(packing_for(layers))
    return {key: value for key, value in exporter.quantization_config(content).items() if key not in drop}


def refusals(format, layers, config):
    target = installed().get("target", "vllm")
    subject = Subject(
        format,
        {"quantization_config": config},
        {each.name: each for each in layers},
        {**target.options, "device": "cpu"},
    )
    return [finding for finding in target.check(subject) if finding.level == "refuses"]


def fits(format, layer):
    exporter = installed().get("format", format)
    return exporter.why_not(layer) is None


def test_vllms_own_code_takes_the_configs_that_check_lets_pass_and_no_others():
    asked, expected = [], []
    for format, bits, sym, group_size, act_order, (columns, out) in GRIDS:
        layer = LayerSpec(DOWN, QuantConfig(bits=bits, group_size=group_size, sym=sym), columns, out, act_order)
        if not fits(format, layer):
            continue
        config = config_of(format, [layer])
        asked.append([config, DOWN, columns, out])
        expected.append([finding.rule for finding in refusals(format, [layer], config)])
    for answer, rules, case in zip(cases.vllm_rules(asked), expected, asked, strict=True):
        assert bool(answer["error"]) == bool(rules), (case, rules, answer)
    assert {rule for rules in expected for rule in rules} >= {"width", "group size", "act-order", "packing", "shape"}


@pytest.mark.parametrize("format", ["gptq", "gptq_v2", "awq", "autoround", "compressed-tensors"])
def test_vllm_misses_the_config_keys_that_check_asks_for_and_no_others(format):
    layer = LayerSpec(DOWN, QuantConfig(bits=4, group_size=64), 256, 128)
    own = (
        "bits",
        "group_size",
        "desc_act",
        "sym",
        "zero_point",
        "lm_head",
        "packing_format",
        "checkpoint_format",
        "format",
    )
    configs = [config_of(format, [layer], drop=[key]) for key in own if key in config_of(format, [layer])]
    answers = cases.vllm_rules([[config, DOWN, 256, 128] for config in configs])
    for config, answer in zip(configs, answers, strict=True):
        found = [finding.rule for finding in refusals(format, [layer], config)]
        assert ("config keys" in found) == bool(answer["error"]), (config, found, answer)


def test_vllm_gives_a_fused_layer_the_grid_of_its_parts_where_check_lets_it_pass():
    """q, k and v in groups of 32, the rest in groups of 64; without the rule for qkv_proj vLLM takes the base grid."""
    grids = {part: QuantConfig(bits=4, group_size=32) for part in ("q_proj", "k_proj", "v_proj")}
    grids |= dict.fromkeys(("o_proj", "a_proj", "b_proj", "c_proj"), QuantConfig(bits=4, group_size=64))
    layers = [LayerSpec(f"model.layers.0.self_attn.{part}", grid, 256, 128) for part, grid in grids.items()]
    good = config_of("gptq", layers)
    bad = {**good, "dynamic": {rule: grid for rule, grid in good["dynamic"].items() if "qkv" not in rule}}
    answers = cases.vllm_rules([[config, "model.layers.0.self_attn.qkv_proj", 256, 384] for config in (good, bad)])
    assert [answer["grid"] for answer in answers] == [[4, 32, True], [4, 64, True]]
    assert [[f.rule for f in refusals("gptq", layers, config)] for config in (good, bad)] == [[], ["fused shards"]]


def test_a_zero_point_that_check_refuses_is_another_one_to_a_real_reader(home):
    """A field of ones in a v1 file: 16 to qcore, and to GPTQModel (through transformers) 0 with one more in the next field."""
    found = cases.read("gptqmodel", "transformers", "transformers", "gptq-4a-ones", home)
    assert (found["check"], found["outcome"]) == ("zero range", "loads")
    assert found["gap"] > 10 * cases.MARGIN, found


@pytest.mark.parametrize("name", cases.WRITERS)
def test_a_folder_that_a_peer_wrote_answers_as_the_peer_does(home, name):
    found = cases.write(name, home)
    assert found["outcome"] == "reads", found
    assert found["difference"] < cases.CLOSE[found["environment"]], found
