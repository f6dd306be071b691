"""GPTQModel: what it loads. Checked against 7.6.0."""

from __future__ import annotations

from qcore import Finding, Subject, Target, hookimpl

from .rules import formats, tied_head

SOURCE = "gptqmodel/nn_modules/qlinear"
READ = ("gptq", "gptq_v2", "awq")


class GptqModel(Target):
    """GPTQModel."""

    name = "gptqmodel"
    description = "GPTQModel's own loader"

    def check(self, subject: Subject) -> list[Finding]:
        """See Target."""
        found = formats(subject, READ, "GPTQModel", SOURCE) or tied_head(subject, SOURCE)
        odd = subject.where(lambda layer: layer.in_features % 32 != 0 or layer.out_features % 32 != 0)
        if odd:
            problem = "its kernels want both sides in multiples of 32"
            found.append(Finding("refuses", "shape", problem, odd, SOURCE))
        return [*found, *_asymmetric(subject)]

    def how_to_load(self, format: str) -> str | None:
        """See Target."""
        return 'from gptqmodel import GPTQModel\nGPTQModel.load("{folder}")' if format in READ else None


def _asymmetric(subject: Subject) -> list[Finding]:
    """Asymmetric v1 folders of its own only."""
    odd = subject.where(lambda layer: not layer.config.sym)
    if subject.format != "gptq" or not odd or "gptqmodel" in str(subject.quantization.get("meta")):
        return []
    problem = "it takes asymmetric v1 folders only from itself; convert to gptq_v2"
    return [Finding("refuses", "asymmetric v1", problem, odd, "gptqmodel/models/loader.py: MIN_VERSION_WITH_V2")]


@hookimpl
def qcore_targets() -> list[Target]:
    return [GptqModel()]
