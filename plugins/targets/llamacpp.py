"""llama.cpp: it loads GGUF, one file that holds everything. Checked against xllamacpp 2026.10.11549."""

from __future__ import annotations

from qcore import Finding, Subject, Target, hookimpl

from .rules import formats

SOURCE = "ggml/docs/gguf.md"


class LlamaCpp(Target):
    """llama.cpp."""

    name = "llama.cpp"
    description = "llama.cpp and what is built on it, from a GGUF file"

    def check(self, subject: Subject) -> list[Finding]:
        """See Target."""
        found = formats(subject, ("gguf",), "llama.cpp", SOURCE)
        return found or [Finding("kernel", "blocks", "its kernels for Q4_0, Q4_1, Q5_0, Q5_1 and Q8_0", (), SOURCE)]

    def how_to_load(self, format: str) -> str | None:
        """See Target."""
        return 'llama-cli -m "{folder}/model.gguf" -p "Hello"' if format == "gguf" else None


@hookimpl
def qcore_targets() -> list[Target]:
    return [LlamaCpp()]
