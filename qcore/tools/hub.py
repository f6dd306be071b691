"""Quantized models on the Hugging Face hub: uploading with a card that says how each was made and how to load it."""

from __future__ import annotations

import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from torch import nn

from ..api import DEFAULT_FORMAT, inspect, save
from ..content import open_content
from ..errors import ModelError, first_line
from ..files import local_path
from ..plugins import Plugins, installed
from .checking import check

CARD = "README.md"


def push_to_hub(
    model: nn.Module | str | Path,
    repo_id: str,
    *,
    format: str = DEFAULT_FORMAT,
    evaluation: Mapping[str, float] | None = None,
    private: bool | None = None,
    revision: str | None = None,
    message: str = "Upload quantized model",
    token: str | None = None,
    plugins: Plugins | None = None,
) -> str:
    """Upload a quantized model, or a folder qcore can read, with a model card; return the address of the commit.

    format: of what is written for a model in memory. evaluation: what `qcore.evaluate` returned, for the card. revision: a
    branch, made when it is not there. A README.md that lies in the folder is uploaded as it is.

    Raises ModelError when the hub refuses.

    Example: `qcore.push_to_hub(model, "org/name", evaluation=qcore.evaluate(model, text, reference=original))`
    """
    from huggingface_hub import CommitOperationAdd, HfApi

    plugins = plugins or installed()
    with tempfile.TemporaryDirectory() as scratch:
        if isinstance(model, nn.Module):
            model = save(model, Path(scratch) / "model", format, plugins=plugins)
        folder = local_path(model, "model")
        open_content(folder, plugins)  # nothing that cannot be read again goes up
        files: dict[str, Path | bytes] = {file.name: file for file in sorted(folder.iterdir()) if file.is_file()}
        files.setdefault(CARD, model_card(folder, repo_id, evaluation, plugins).encode())
        api = HfApi(token=token)
        try:
            api.create_repo(repo_id, private=private, exist_ok=True)
            if revision is not None:
                api.create_branch(repo_id, branch=revision, exist_ok=True)
            operations = [CommitOperationAdd(name, content) for name, content in files.items()]
            commit = api.create_commit(repo_id, operations, commit_message=message, revision=revision)
        except (
            Exception
        ) as error:  # what is behind huggingface_hub raises kinds of its own, which change between versions
            raise ModelError(f"{folder} could not be uploaded to {repo_id}: {first_line(error)}") from None
    return str(commit.commit_url)


def model_card(
    folder: str | Path, name: str, evaluation: Mapping[str, float] | None = None, plugins: Plugins | None = None
) -> str:
    """Return a model card: how a folder was made, what was measured, and how to load it in each program that does."""
    plugins = plugins or installed()
    found = inspect(folder, plugins)
    made, layers = found["provenance"], found["layers"]
    grids = sorted({f"{layer['bits']} bits, group {layer['group_size']}, {_kind(layer)}" for layer in layers})
    base = made.get("model")
    head = ["---", "tags:", "- qcore", f"- {found['format']}"]
    head += [f"base_model: {base}", "base_model_relation: quantized"] if _is_hub_name(base) else []
    lines = [*head, "---", "", f"# {name}", ""]
    lines.append(
        f"{'Quantized by qcore' if made.get('algorithm') else 'A quantized model'}, format `{found['format']}`."
    )
    lines += ["", "| | |", "|---|---|"]
    rows = {
        "base model": base,
        "algorithm": made.get("algorithm"),
        "grid": "; ".join(grids),
        "linears": f"{len(layers)} quantized, {found['bits_per_weight']:.2f} bits per quantized weight",
        "size": f"{found['size'] / 1e6:.1f} MB, {found['size_float16'] / 1e6:.1f} MB in 16 bits",
        "calibration": _calibration(made.get("calibration")),
    }
    lines += [f"| {key} | {value} |" for key, value in rows.items() if value]
    if evaluation:
        lines += ["", "## Measured", "", "| | |", "|---|---|"]
        lines += [f"| {key.replace('_', ' ')} | {value:.4g} |" for key, value in evaluation.items()]
    lines += ["", "## Loading", "", "```python", f'import qcore\nmodel = qcore.load("{name}")', "```"]
    for target in plugins.usable("target").values():
        snippet = target.how_to_load(found["format"])
        if snippet and not any(finding.level == "refuses" for finding in check(folder, target.name, plugins=plugins)):
            lines += ["", f"{target.description}:", "", "```", snippet.replace("{folder}", name), "```"]
    return "\n".join(lines) + "\n"


def _kind(layer: Mapping[str, Any]) -> str:
    return "sym" if layer["sym"] else "asym"


def _is_hub_name(base: Any) -> bool:
    return isinstance(base, str) and base.count("/") == 1 and not base.startswith((".", "/"))


def _calibration(facts: Any) -> str | None:
    if not isinstance(facts, dict):
        return None
    sources = ", ".join(str(source.get("source")) for source in facts.get("sources", []))
    used = facts.get("used", {})
    return f"{sources}: {used.get('samples')} sequences, {used.get('tokens')} tokens"
