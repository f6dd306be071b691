"""SGLang: what it loads. It takes vLLM's kernels and conventions for these formats; not checked against a running SGLang."""

from __future__ import annotations

from qcore import Finding, Subject, Target, hookimpl

from .rules import formats, fused, partly_quantized, tensor_parallel, tied_head, zero_range

SOURCE = "sglang/srt/layers/quantization"
READ = ("gptq", "awq", "autoround", "compressed-tensors", "hf-dequantized")


class Sglang(Target):
    """SGLang."""

    name = "sglang"
    description = "SGLang on NVIDIA GPUs"
    options = {"tensor_parallel": 1}

    def check(self, subject: Subject) -> list[Finding]:
        """See Target."""
        found = formats(subject, READ, "SGLang", SOURCE)
        packing = subject.quantization.get("packing_format")
        if packing in ("auto_round", "auto_round:gptqmodel"):
            problem = f"packing_format {packing!r} (true zero points) is unknown to it"
            found.append(Finding("refuses", "packing", problem, (), SOURCE))
        found += [*fused(subject, SOURCE), *partly_quantized(subject, SOURCE)]
        if subject.format == "gptq":
            found += zero_range(subject, "sgl-kernel: q_gemm_kernel_gptq.cuh")
        return [*found, *tied_head(subject, SOURCE), *tensor_parallel(subject, SOURCE)]

    def how_to_load(self, format: str) -> str | None:
        """See Target."""
        return 'import sglang\nsglang.Engine(model_path="{folder}").generate("Hello")' if format in READ else None


@hookimpl
def qcore_targets() -> list[Target]:
    return [Sglang()]
