"""Which backend serves each kind of linear of a model, and why the others do not. `qcore backends --model`."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import torch

from .. import api
from ..backend import MatmulSpec, Verdict, judge
from ..checkpoint import ModelFolder, resolve_model
from ..content import open_content
from ..model import compute_dtype, stored_dtype
from ..plugins import Plugins, installed


def choices(
    model: str | Path, *, backend: str = "auto", device: str = "auto", dtype: torch.dtype | None = None, tokens: int = 1,
    plugins: Plugins | None = None,
) -> list[dict[str, Any]]:  # fmt: skip
    """Return one dict per kind of linear of a quantized folder: linears, count, shape, grid, act_order, dtype, backend, others.

    backend is None where none can serve. others: one text for each backend not taken. Linears of one kind differ in nothing
    that a choice depends on.
    """
    plugins = plugins or installed()
    folder = resolve_model(str(model), plugins)
    _, content = open_content(folder, plugins)
    backends, wanted = api.backends_for(backend, plugins)
    place = api.pick_device(device)
    dtype = dtype or compute_dtype(stored_dtype(content.source or ModelFolder(folder)), place)
    kinds: dict[MatmulSpec, list[str]] = {}
    for name, layer in content.layers.items():
        kinds.setdefault(MatmulSpec.of(layer, dtype, place, tokens), []).append(name)
    rows = [_choice(spec, names, judge(backends.values(), spec)) for spec, names in kinds.items()]
    return rows if wanted == "auto" else [{**row, "because": f"asked for; {row['because']}"} for row in rows]


def _choice(spec: MatmulSpec, names: list[str], verdicts: list[Verdict]) -> dict[str, Any]:
    best = next((each for each in verdicts if each.reason is None), None)
    return {
        "linears": list(dict.fromkeys(re.sub(r"(?<=\.)\d+(?=\.)", "*", name) for name in names)),
        "count": len(names),
        "shape": [spec.out_features, spec.in_features],
        "grid": str(spec.config),
        "act_order": spec.act_order,
        "dtype": str(spec.dtype).removeprefix("torch."),
        "device": str(spec.device),
        "tokens": spec.tokens,
        "backend": best.backend.name if best else None,
        "because": _because(best),
        "others": {each.backend.name: each.reason or _passed_over(each, best) for each in verdicts if each is not best},
    }


def _because(best: Verdict | None) -> str:
    if best is None:
        return "no backend can serve it"
    if best.speed is None:
        return f"its rank, {best.backend.rank}, is the highest; no speed was measured for such a layer here"
    return f"measured {best.speed:.2f} x as fast as the float product"


def _passed_over(verdict: Verdict, best: Verdict | None) -> str:
    assert best is not None  # or this one, which can serve, would be the best
    if best.speed is None:
        return f"rank {verdict.backend.rank}, below {best.backend.rank}"
    if verdict.speed is None:
        return f"rank {verdict.backend.rank}, no speed measured"
    return f"measured {verdict.speed:.2f} x, slower"
