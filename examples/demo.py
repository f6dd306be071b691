"""The main job on a real model, offline: quantize SmolLM2-135M-Instruct to 4 bits, measure it, let it write.

Run it with `make demo`. Calibration is qcore's default; the held-out text is the documentation of some standard library
modules, which the calibration text does not contain.
"""

from __future__ import annotations

import ast
import shutil
import sys
import sysconfig
from pathlib import Path

import qcore
from qcore.cli import cli

OUTPUT = Path("demo-output")
MODULES = ("argparse", "asyncio/streams", "decimal", "difflib", "email/message", "fractions", "logging/__init__",
           "optparse", "pickletools", "statistics", "tarfile", "typing", "unittest/case", "zipfile", "_pydecimal")  # fmt: skip


def held_out_text() -> str:
    """Return the docstrings of some standard library modules."""
    library = Path(sysconfig.get_path("stdlib"))
    texts = []
    for module in MODULES:
        file = library / f"{module}.py"
        if file.exists():
            nodes = ast.walk(ast.parse(file.read_text(encoding="utf-8")))
            documented = (ast.Module, ast.ClassDef, ast.FunctionDef)
            texts += [doc for node in nodes if isinstance(node, documented) and (doc := ast.get_docstring(node))]
    return "\n\n".join(text for text in texts if len(text) > 200)


def main() -> None:
    """Quantize, report, evaluate, generate."""
    shutil.rmtree(OUTPUT, ignore_errors=True)
    print("1. qcore quantize demo: SmolLM2-135M-Instruct, GPTQ, 4 bits, group 64", flush=True)
    cli(
        ["quantize", "demo", "-o", str(OUTPUT), "--group-size", "64", "--samples", "32", "--seqlen", "512"],
        standalone_mode=False,
    )
    print("\n2. held-out text: perplexity before and after, KL divergence to the float model", flush=True)
    result = qcore.evaluate(OUTPUT, held_out_text(), reference="demo", windows=6)
    print(f"   float {result['reference_perplexity']:.2f}   4 bits {result['perplexity']:.2f}   KL {result['kl']:.4f}")
    print("\n3. qcore generate, with the 4-bit model", flush=True)
    cli(["generate", str(OUTPUT), "The capital of France is", "--max-new-tokens", "24"], standalone_mode=False)
    print(f"\nThe folder {OUTPUT}/ loads in qcore, transformers, vLLM and GPTQModel.")


if __name__ == "__main__":
    sys.exit(main())
