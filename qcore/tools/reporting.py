"""What a quantized folder looks like and how variants compare: the figures, gathered; `page.py` draws them."""

from __future__ import annotations

import platform
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch

from .. import api
from ..content import open_content
from ..errors import ConfigError
from ..exporter import Content
from ..files import local_path
from ..plugins import Plugins, installed
from .bench import tokens_per_second


def gather(
    folder: str | Path,
    *,
    text: str | None = None,
    reference: str | Path | None = None,
    seqlen: int = 512,
    windows: int | None = None,
    device: str = "auto",
    trust_remote_code: bool = False,
    plugins: Plugins | None = None,
) -> dict[str, Any]:
    """Return everything a report shows: what `inspect` says, each layer with its block, kind and outliers, measurements.

    text, reference: held-out text to measure perplexity on, and the model before quantization to measure KL divergence to.
    """
    plugins = plugins or installed()
    if reference is not None and text is None:
        raise ConfigError("a reference is measured on text: give text (--text) as well.")
    folder = local_path(folder, "folder")
    found = api.inspect(folder, plugins)
    _, content = open_content(folder, plugins)
    layers = [{**layer, **place(layer["name"]), **outliers(content, layer["name"])} for layer in found["layers"]]
    measured = None
    if text is not None:
        measured = api.evaluate(
            folder, text, reference=reference, seqlen=seqlen, windows=windows, device=device,
            trust_remote_code=trust_remote_code, plugins=plugins,
        )  # fmt: skip
    name = folder.resolve().name
    return {**found, "name": name, "layers": layers, "measured": measured, "versions": versions()}


def versions() -> dict[str, str]:
    """What the report was made with; what the model was made with stands in its provenance."""
    import transformers

    from .. import __version__

    found = {"qcore": __version__, "torch": torch.__version__, "transformers": transformers.__version__}
    return {**found, "python": platform.python_version(), "platform": f"{platform.system()} {platform.machine()}"}


def place(name: str) -> dict[str, Any]:
    """Split a linear's name at its block's number.

    >>> place("model.layers.3.self_attn.q_proj")
    {'block': 3, 'kind': 'self_attn.q_proj'}
    """
    parts = name.split(".")
    numbers = [index for index, part in enumerate(parts) if part.isdigit()]
    if not numbers:
        return {"block": 0, "kind": name}
    first = numbers[0]
    return {"block": int(parts[first]), "kind": ".".join(parts[first + 1 :]) or parts[0]}


def outliers(content: Content, name: str) -> dict[str, float]:
    """How far a weight's largest values stand out: max |w| over the root mean square, and the share beyond six of these."""
    W = content.weight(name).dequantize()
    rms = W.square().mean().sqrt().clamp_min(1e-30)
    return {"peak": float(W.abs().max() / rms), "beyond_6": float((W.abs() > 6 * rms).float().mean())}


def compare(
    folders: Sequence[str | Path],
    *,
    text: str | None = None,
    reference: str | Path | None = None,
    seqlen: int = 512,
    windows: int | None = None,
    new_tokens: int = 32,
    device: str = "auto",
    trust_remote_code: bool = False,
    plugins: Plugins | None = None,
) -> list[dict[str, Any]]:
    """Return one row per folder, best first: by KL divergence, else by perplexity, else by size.

    new_tokens: how many to generate for tokens per second; 0 leaves that out.
    """
    plugins = plugins or installed()
    if reference is not None and text is None:
        raise ConfigError("a reference is measured on text: give text (--text) as well.")
    other = None
    if reference is not None:
        other, _ = api.open_any(reference, device, trust_remote_code, plugins)
    rows = []
    for folder in folders:
        found = api.inspect(folder, plugins)
        made = found["provenance"]
        row: dict[str, Any] = {
            "name": str(folder), "algorithm": made.get("algorithm", ""), "format": found["format"],
            "bits": found["bits_per_weight"], "size": found["size"],
        }  # fmt: skip
        if text is not None or new_tokens:
            model, tokenizer = api.open_any(folder, device, trust_remote_code, plugins)
            if text is not None:
                measured = api.evaluate(
                    model, text, reference=other, seqlen=seqlen, windows=windows, tokenizer=tokenizer, plugins=plugins
                )
                shown = ("perplexity", "kl", "reference_perplexity")
                row |= {name: measured[name] for name in shown if name in measured}
            if new_tokens:
                row["tokens_per_second"] = tokens_per_second(model, new_tokens)
            del model
        rows.append(row)
    key = next((name for name in ("kl", "perplexity") if name in rows[0]), "size") if rows else ""
    return sorted(rows, key=lambda row: float(row[key]))


def grid_of(layers: Sequence[Mapping[str, Any]], key: str) -> tuple[list[str], list[int], list[list[float | None]]]:
    """Arrange one figure of the layers: (kinds, blocks, values [kind][block]); None where there is no such layer or figure."""
    kinds = list(dict.fromkeys(str(layer["kind"]) for layer in layers))
    blocks = sorted({int(layer["block"]) for layer in layers})
    values: list[list[float | None]] = [[None] * len(blocks) for _ in kinds]
    for layer in layers:
        value = layer.get(key)
        values[kinds.index(layer["kind"])][blocks.index(layer["block"])] = None if value is None else float(value)
    return kinds, blocks, values
