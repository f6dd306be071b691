"""Rules that several targets share."""

from __future__ import annotations

from collections.abc import Sequence

from qcore import Finding, QuantizedWeight, Subject

FUSED = (("q_proj", "k_proj", "v_proj"), ("gate_proj", "up_proj"))
#: linears that tensor parallelism cuts along their inputs; all others along their outputs
CUT_ALONG_INPUTS = ("o_proj", "out_proj", "down_proj", "c_proj", "fc2", "dense_4h_to_h")


def formats(subject: Subject, read: Sequence[str], name: str, source: str) -> list[Finding]:
    """The format is among those read."""
    if subject.format in read:
        return []
    return [
        Finding("refuses", "format", f"{name} does not read {subject.format}; it reads {', '.join(read)}", (), source)
    ]


def config_keys(subject: Subject, keys: Sequence[str], source: str) -> list[Finding]:
    """The keys (or either of two, a|b) without which a loader stops; a plan has no config yet, and qcore writes them all."""
    here = subject.quantization
    missing = [key for key in keys if here and not any(name in here for name in key.split("|"))]
    if not missing:
        return []
    problem = f"quantization_config has no {', '.join(missing)}; a folder that qcore writes has them"
    return [Finding("refuses", "config keys", problem, (), source)]


def zero_range(subject: Subject, source: str) -> list[Finding]:
    """Zero points that a v1 file cannot hold for every reader, looked up in the weights of a folder.

    A field of ones is 2**bits to some readers, 0 to others, and to GPTQModel 0 with one more in the next field (docs/formats.md).
    """
    if subject.weight is None:
        return []
    odd = subject.where(lambda layer: not layer.config.sym)
    found = tuple(name for name in odd if _beyond(subject.weight(name)))
    problem = "zero points that readers of v1 files take for different numbers; convert to gptq_v2 or awq"
    return [Finding("refuses", "zero range", problem, found, source)] if found else []


def _beyond(weight: QuantizedWeight) -> bool:
    return bool(((weight.zeros < 1) | (weight.zeros > weight.config.maxq)).any())


def fused(subject: Subject, source: str) -> list[Finding]:
    """Linears that are fused when loaded have one grid."""
    uneven = [group for parts in FUSED for group in subject.shards(parts) if len({layer.config for layer in group}) > 1]
    names = tuple(layer.name for group in uneven for layer in group)
    problem = (
        "q/k/v and gate/up become one layer, which cannot have several grids; give them the same bits and group size"
    )
    return [Finding("refuses", "fused shards", problem, names, source)] if names else []


def partly_quantized(subject: Subject, source: str) -> list[Finding]:
    """A fused layer is quantized whole or not at all."""
    present = {name.rpartition(".")[2] for name in subject.layers} | set(FUSED[0])  # every attention has all three
    found = [
        layer.name
        for parts in FUSED
        for group in subject.shards(parts)
        if len(group) < len(present.intersection(parts))
        for layer in group
    ]
    problem = "some of q/k/v or gate/up are quantized and others float; they become one layer"
    return [Finding("refuses", "fused shards", problem, tuple(found), source)] if found else []


def tied_head(subject: Subject, source: str) -> list[Finding]:
    """A quantized output head is not tied to the embeddings."""
    if "lm_head" in subject.layers and subject.config.get("tie_word_embeddings"):
        problem = "lm_head is quantized, but config.json ties it to the embeddings (tie_word_embeddings)"
        return [Finding("refuses", "tied lm_head", problem, ("lm_head",), source)]
    return []


def tensor_parallel(subject: Subject, source: str) -> list[Finding]:
    """Each rank gets whole groups and whole words."""
    ranks = int(subject.options.get("tensor_parallel", 1))
    if ranks == 1:
        return []
    groups, words, ordered = [], [], []
    for name, layer in subject.layers.items():
        along_inputs = name.rpartition(".")[2] in CUT_ALONG_INPUTS
        size, side = layer.config.group_size, layer.in_features if along_inputs else layer.out_features
        if side % ranks or side // ranks * layer.config.bits % 32:
            words.append(name)
        elif along_inputs and size != -1 and side // ranks % size:
            groups.append(name)
        if along_inputs and layer.act_order:
            ordered.append(name)
    found = []
    if words:
        problem = f"a {ranks}th of the layer is no whole number of 32-bit words"
        found.append(Finding("refuses", "tensor parallel", problem, tuple(words), source))
    if groups:
        problem = f"groups do not divide a {ranks}th of in_features"
        found.append(Finding("refuses", "tensor parallel", problem, tuple(groups), source))
    if ordered:
        problem = "act-order with tensor parallelism: every rank keeps all scales, and only some kernels can"
        found.append(Finding("warns", "act-order", problem, tuple(ordered), source))
    return found
