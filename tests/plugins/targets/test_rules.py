import pytest

from qcore import LayerSpec, QuantConfig, Subject
from qcore.plugins import installed
from qcore.testing import check_target, random_weight

SHAPES = {
    "self_attn.q_proj": (4096, 4096), "self_attn.k_proj": (4096, 1024), "self_attn.v_proj": (4096, 1024),
    "self_attn.o_proj": (4096, 4096), "mlp.gate_proj": (4096, 11008), "mlp.up_proj": (4096, 11008), "mlp.down_proj": (11008, 4096),
}  # fmt: skip

BASE = {"quant_method": "gptq", "bits": 4, "group_size": 128, "sym": True, "desc_act": False}
QKV = {f"self_attn.{part}_proj": {"bits": 8} for part in "qkv"}


def subject(format="gptq", changed=None, act_order=False, config=None, options=None, **grid):
    """A Llama of one block; `changed` maps a linear to another grid, or to None for float."""
    layers = {}
    for short, (columns, out) in SHAPES.items():
        values = {"bits": 4, "group_size": 128, "sym": True, **grid}
        if changed and short in changed:
            if changed[short] is None:
                continue
            values |= changed[short]
        name = f"model.layers.0.{short}"
        layers[name] = LayerSpec(name, QuantConfig(**values), columns, out, act_order)
    return Subject(format, {"model_type": "llama", **(config or {})}, layers, options or {})


def outcome(target, of):
    findings = check_target(installed().get("target", target), of)
    return {(finding.level, finding.rule) for finding in findings}


@pytest.mark.parametrize(
    ("target", "of", "expected"),
    [
        ("vllm", subject(), {("kernel", "Marlin")}),
        ("vllm", subject(sym=False), {("refuses", "width")}),
        ("vllm", subject("gptq_v2", sym=False), {("refuses", "width")}),
        ("vllm", subject(bits=3), {("refuses", "width")}),
        ("vllm", subject(group_size=16), {("refuses", "group size")}),
        ("vllm", subject("awq", sym=False, group_size=16), {("kernel", "its own kernel"), ("warns", "kernel")}),
        ("vllm", subject("compressed-tensors", sym=False), {("kernel", "Marlin")}),
        ("vllm", subject("compressed-tensors", sym=False, bits=8), {("refuses", "width")}),
        ("vllm", subject(act_order=True), {("refuses", "act-order")}),
        ("vllm", subject(config={"quantization_config": {**BASE, "desc_act": True}}), {("refuses", "act-order")}),
        ("vllm", subject(group_size=-1, config={"quantization_config": {**BASE, "group_size": -1, "desc_act": True}}), {("kernel", "Marlin")}),
        ("vllm", subject(config={"quantization_config": BASE}, changed=QKV), {("refuses", "fused shards")}),
        ("vllm", subject(config={"quantization_config": {**BASE, "dynamic": {"+:.*qkv_proj": {"bits": 8}}}}, changed=QKV), {("kernel", "Marlin")}),
        ("vllm", subject("compressed-tensors", changed=QKV), {("kernel", "Marlin")}),
        ("vllm", subject("awq", sym=False), {("kernel", "Marlin")}),
        ("vllm", subject("compressed-tensors", bits=8), {("kernel", "Marlin")}),
        ("vllm", subject("compressed-tensors", bits=3), {("refuses", "width")}),
        ("vllm", subject("gguf"), {("refuses", "format")}),
        ("vllm", subject("autoround", bits=2, sym=False), {("refuses", "packing"), ("refuses", "width")}),
        ("vllm", subject("autoround", sym=False), {("kernel", "Marlin")}),
        ("vllm", subject(sym=False, options={"device": "cpu"}), {("refuses", "width")}),
        ("vllm", subject(bits=8, options={"device": "cpu"}), {("refuses", "width")}),
        ("vllm", subject("awq", sym=False, options={"device": "cpu"}), {("kernel", "cpu")}),
        ("vllm", subject(changed={"mlp.up_proj": {"bits": 8}}), {("refuses", "fused shards")}),
        ("vllm", subject(changed={"self_attn.k_proj": None}), {("refuses", "fused shards")}),
        ("vllm", subject(changed={"mlp.down_proj": {"bits": 8}}), {("kernel", "Marlin")}),
        ("vllm", subject(options={"tensor_parallel": 2}), {("kernel", "Marlin")}),
        ("vllm", subject(options={"tensor_parallel": 4}), {("refuses", "tensor parallel")}),  # 11008 / 4 = 21.5 groups
        ("vllm", subject(options={"tensor_parallel": 4}, group_size=32), {("kernel", "Marlin")}),
        ("vllm", subject(options={"tensor_parallel": 3}), {("refuses", "tensor parallel")}),
        ("vllm", subject("hf-dequantized", changed={"mlp.up_proj": {"bits": 8}}), set()),
        ("sglang", subject(act_order=True, options={"tensor_parallel": 2}), {("warns", "act-order")}),
        ("sglang", subject(), set()),
        ("sglang", subject("autoround", config={"quantization_config": {"packing_format": "auto_round"}}), {("refuses", "packing")}),
        ("sglang", subject(changed={"mlp.up_proj": {"group_size": 64}}), {("refuses", "fused shards")}),
        ("transformers", subject("gguf"), {("kernel", "packages")}),
        ("transformers", subject("hf-dequantized"), set()),
        ("transformers", subject("marlin"), {("refuses", "format")}),
        ("llama.cpp", subject("gguf"), {("kernel", "blocks")}),
        ("llama.cpp", subject("gptq"), {("refuses", "format")}),
        ("gptqmodel", subject("gptq_v2", sym=False), set()),
        ("gptqmodel", subject("gptq"), set()),
        ("gptqmodel", subject("gptq", sym=False), {("refuses", "asymmetric v1")}),
        ("gptqmodel", subject("gptq", sym=False, config={"quantization_config": {"meta": {"quantizer": ["gptqmodel:7.6.0"]}}}), set()),
        ("gptqmodel", subject("compressed-tensors"), {("refuses", "format")}),
    ],
)  # fmt: skip
def test_rules(target, of, expected):
    assert outcome(target, of) == expected


@pytest.mark.parametrize("target", ["vllm", "sglang", "transformers", "gptqmodel"])
def test_a_tied_head_that_is_quantized_is_refused(target):
    head = LayerSpec("lm_head", QuantConfig(bits=4, group_size=128), 4096, 32000)
    for tied in (True, False):
        judged = Subject("gptq", {"tie_word_embeddings": tied}, {"lm_head": head})
        assert (("refuses", "tied lm_head") in outcome(target, judged)) is tied


@pytest.mark.parametrize("target", ["gptqmodel", "transformers"])
def test_sides_that_are_no_multiple_of_32_are_told(target):
    layer = LayerSpec("m", QuantConfig(bits=4, group_size=8), 72, 64)
    assert ("refuses", "shape") in outcome(
        target, Subject("awq" if target == "gptqmodel" else "autoround", {}, {"m": layer})
    )


@pytest.mark.parametrize("target", installed().usable("target"))
def test_every_finding_says_where_it_comes_from_and_every_snippet_takes_a_folder(target):
    offer = installed().get("target", target)
    for format in installed().usable("format"):
        for finding in offer.check(
            subject(format, changed={"mlp.up_proj": {"bits": 8}}, options={"tensor_parallel": 4})
        ):
            assert finding.source
            assert finding.message
        snippet = offer.how_to_load(format)
        refuses = ("refuses", "format") in outcome(target, subject(format))
        assert (snippet is None) == refuses, format
        assert snippet is None or "{folder}" in snippet


@pytest.mark.parametrize(
    ("format", "config", "missing"),
    [
        ("gptq", {"bits": 4, "group_size": 128, "sym": True}, "has no desc_act"),
        ("gptq_v2", {"bits": 4, "group_size": 128, "desc_act": False}, "has no sym"),
        ("awq", {"w_bit": 4, "q_group_size": 128}, "has no zero_point"),
        ("awq", {"w_bit": 4, "q_group_size": 128, "zero_point": True}, None),
        ("gptq", {}, None),
    ],
)
def test_config_keys_that_vllm_asks_for(format, config, missing):
    findings = installed().get("target", "vllm").check(subject(format, config={"quantization_config": config}))
    found = [each.message for each in findings if each.rule == "config keys"]
    assert [missing in message for message in found] == ([True] if missing else [])


@pytest.mark.parametrize("target", ["transformers", "sglang"])
@pytest.mark.parametrize(
    ("zero", "format", "refused"), [(0, "gptq", True), (1, "gptq", False), (15, "gptq", False), (16, "gptq", True), (0, "gptq_v2", False)]
)  # fmt: skip
def test_zero_points_that_v1_readers_disagree_about(target, zero, format, refused):
    weight = random_weight(32, 256, QuantConfig(bits=4, group_size=128, sym=False))
    weight.zeros.fill_(8)[3, 1] = zero
    layer = {"m": LayerSpec("m", weight.config, 256, 32)}
    judged = Subject(format, {}, layer, installed().get("target", target).options, lambda name: weight)
    assert (("refuses", "zero range") in outcome(target, judged)) is refused


def test_a_side_that_the_cpu_kernel_of_vllm_has_not_is_told():
    layer = LayerSpec("m", QuantConfig(bits=4, group_size=-1), 80, 64)
    for device, refused in (("cpu", True), ("cuda", False)):
        judged = Subject("gptq", {}, {"m": layer}, {**installed().get("target", "vllm").options, "device": device})
        assert (("refuses", "shape") in outcome("vllm", judged)) is refused
