"""transformers without qcore: what it loads and which packages it asks for. Checked against 5.23 (5.17 for compressed-tensors)."""

from __future__ import annotations

from qcore import Finding, Subject, Target, hookimpl

from .rules import formats, tied_head, zero_range

SOURCE = "transformers/quantizers"
#: format -> packages beside transformers
NEEDS = {
    "gptq": "optimum and gptqmodel",
    "gptq_v2": "optimum and gptqmodel",
    "awq": "gptqmodel",
    "autoround": "auto-round (for 4 bits asymmetric also auto-round-lib on a CPU, gptqmodel on a GPU)",
    "compressed-tensors": "compressed-tensors",
    "gguf": "gguf (weights are multiplied out)",
    "hf-dequantized": "",
}


class Transformers(Target):
    """Hugging Face transformers."""

    name = "transformers"
    description = "Hugging Face transformers with the packages that a format needs, or with qcore.use_in_transformers()"

    def check(self, subject: Subject) -> list[Finding]:
        """See Target."""
        found = formats(subject, tuple(NEEDS), "transformers", SOURCE)
        if found:
            return found
        found = tied_head(subject, SOURCE)
        if subject.format == "autoround":
            odd = subject.where(lambda layer: layer.in_features % 32 != 0 or layer.out_features % 32 != 0)
            problem = "auto-round's torch kernel wants both sides in multiples of 32"
            found += [Finding("refuses", "shape", problem, odd, "auto_round/inference/backend.py")] if odd else []
        if subject.format == "gptq":
            found += zero_range(subject, "gptqmodel/utils/model.py")
        needs = NEEDS[subject.format]
        return [*found, Finding("kernel", "packages", f"needs {needs}", (), SOURCE)] if needs else found

    def how_to_load(self, format: str) -> str | None:
        """See Target."""
        if format not in NEEDS:
            return None
        more = ', gguf_file="model.gguf"' if format == "gguf" else ""
        needs = f"  # needs {NEEDS[format]}" if NEEDS[format] else ""
        code = (
            f'from transformers import AutoModelForCausalLM{needs}\nAutoModelForCausalLM.from_pretrained("{{folder}}"'
        )
        return f"{code}{more})"


@hookimpl
def qcore_targets() -> list[Target]:
    return [Transformers()]
