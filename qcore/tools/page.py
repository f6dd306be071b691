"""Reports as one self-contained HTML page, and as PNG plots. No script, no font, no file beside it."""

from __future__ import annotations

import html
import json
import math
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from ..errors import PluginError
from .reporting import grid_of

#: dark to light, even in brightness (from matplotlib's "viridis", CC0)
COLORS = ((68, 1, 84), (59, 82, 139), (33, 145, 140), (94, 201, 98), (253, 231, 37))
CELL, GAP, HEAD = 22, 2, 20  # of a heat map, in pixels

STYLE = Path(__file__).parent / "templates" / "report.css"


def report_page(report: Mapping[str, Any]) -> str:
    """Draw what `reporting.gather` found."""
    made, measured = report["provenance"], report["measured"] or {}
    errors = [layer["error"] for layer in report["layers"] if layer["error"] is not None]
    cards = [
        (f"{report['bits_per_weight']:.2f}", "bits per quantized weight"),
        (f"{report['size'] / 1e6:.1f} MB", f"{report['size_float16'] / report['size']:.2f}× smaller than in 16 bits"),
    ]
    if errors:
        cards.append((f"{sum(errors) / len(errors):.4f}", f"mean relative error; worst {max(errors):.4f}"))
    if "perplexity" in measured:
        before = measured.get("reference_perplexity")
        cards.append((f"{measured['perplexity']:.3f}", "perplexity" + (f"; {before:.3f} before" if before else "")))
    if "kl" in measured:
        cards.append((f"{measured['kl']:.4f}", "KL divergence to the original, nats per token"))
    source = f"{made.get('algorithm', 'unknown')} on {made.get('model', 'unknown')}" if made else "not made by qcore"
    heat_maps = [
        ("Relative error of each linear", "error", "{:.4f}"),
        ("Bits of each linear", "bits", "{:.0f}"),
        ("Outliers: largest |w| / rms", "peak", "{:.1f}"),
    ]
    maps = [_section(title, heat_map(report["layers"], key, form)) for title, key, form in heat_maps
            if any(layer.get(key) is not None for layer in report["layers"])]  # fmt: skip
    parts = [
        f"<h1>{_text(report['name'])}</h1>",
        f'<p class="dim">{_text(report["model_type"])} · format {_text(report["format"])} · {_text(source)}</p>',
        _cards(cards),
        _section("Before and after", _before_after(report, measured)),
        f'<div class="maps">{"".join(maps)}</div>',
        _section("How it was made", _pairs({key: value for key, value in made.items() if key != "skipped"})) if made else "",
        _section("Notes", "".join(f"<p>{_text(note)}</p>" for note in report["notes"])) if report["notes"] else "",
        _layer_table(report["layers"]),
        f'<p class="dim small">This page: {_text(", ".join(f"{name} {version}" for name, version in report["versions"].items()))}</p>',
    ]  # fmt: skip
    return _page(str(report["name"]), parts)


def _before_after(report: Mapping[str, Any], measured: Mapping[str, Any]) -> str:
    """A table of what quantization changed, with what was measured on."""
    before, after = report["size_float16"] / 1e6, report["size"] / 1e6
    rows = [
        ("size, MB", before, after, "{:.1f}"),
        ("bits per quantized weight", 16, report["bits_per_weight"], "{:.2f}"),
    ]
    if "perplexity" in measured:
        rows.append(("perplexity", measured.get("reference_perplexity"), measured["perplexity"], "{:.3f}"))
    if "kl" in measured:
        rows.append(("KL divergence, nats per token", 0.0, measured["kl"], "{:.4f}"))
    body = ""
    for name, old, new, form in rows:
        change = f"{100 * (new / old - 1):+.1f} %".replace("-", "−") if old else ""
        old_text = "" if old is None else form.format(old)
        bar = f'<span class="bar" style="width:{max(2, round(160 * new / old))}px"></span>' if old and new < old else ""
        cells = (_cell("td", old_text, True), _cell("td", form.format(new), True), _cell("td", change, True))
        body += f"<tr><th>{_text(name)}</th>{''.join(cells)}<td>{bar}</td></tr>"
    head = "".join(_cell("th", name, bool(name)) for name in ("", "16 bits", "quantized", "change")) + "<th></th>"
    told = ""
    if "windows" in measured:
        told = (f'<p class="dim small">Measured on {measured["tokens"]} tokens of held-out text, in {measured["windows"]} windows of '
                f"{measured['seqlen']}.</p>")  # fmt: skip
    return f"<table><tr>{head}</tr>{body}</table>{told}"


def compare_page(rows: Sequence[Mapping[str, Any]]) -> str:
    """Draw what `reporting.compare` found: a table, and a plot of quality against size."""
    parts = ["<h1>Quantized variants</h1>", '<p class="dim">best first</p>', _section("Table", comparison_table(rows))]
    quality = _quality(rows)
    drawn = [row for row in rows if quality and math.isfinite(row[quality])]
    if quality and drawn:
        parts.append(
            _section(f"{QUALITY[quality]} against size: lower and further left is better", scatter(drawn, quality))
        )
    return _page("Quantized variants", parts)


#: what a comparison shows of each variant: the column's title and how its values are written
COMPARED = {
    "name": ("folder", "{}"),
    "algorithm": ("algorithm", "{}"),
    "format": ("format", "{}"),
    "bits": ("bits per weight", "{:.2f}"),
    "size": ("MB", "{:.1f}"),
    "kl": ("KL", "{:.4f}"),
    "perplexity": ("perplexity", "{:.3f}"),
    "reference_perplexity": ("before", "{:.3f}"),
    "tokens_per_second": ("tokens/s", "{:.1f}"),
}


def compared_cells(row: Mapping[str, Any], columns: Iterable[str]) -> list[str]:
    """One row of a comparison as text, for page and terminal alike."""
    values = {**row, "size": row["size"] / 1e6}
    return ["" if values.get(name) is None else COMPARED[name][1].format(values[name]) for name in columns]


def compared_columns(rows: Sequence[Mapping[str, Any]]) -> list[str]:
    """The columns that some row has."""
    return [name for name in COMPARED if any(name in row for row in rows)]


def comparison_table(rows: Sequence[Mapping[str, Any]]) -> str:
    columns = compared_columns(rows)
    numbers = [name not in ("name", "algorithm", "format") for name in columns]
    head = "".join(_cell("th", COMPARED[name][0], number) for name, number in zip(columns, numbers, strict=True))
    body = ""
    for index, row in enumerate(rows):
        cells = "".join(_cell("td", cell, n) for cell, n in zip(compared_cells(row, columns), numbers, strict=True))
        body += f'<tr class="best">{cells}</tr>' if index == 0 else f"<tr>{cells}</tr>"
    return f"<table><tr>{head}</tr>{body}</table>"


#: what variants are drawn by, the first that was measured
QUALITY = {"kl": "KL divergence", "perplexity": "Perplexity"}


def _quality(rows: Sequence[Mapping[str, Any]]) -> str | None:
    return next((name for name in QUALITY if rows and name in rows[0]), None)


def heat_map(layers: Sequence[Mapping[str, Any]], key: str, form: str) -> str:
    """An SVG with a row per kind of linear and a column per block; a cell tells its figure when pointed at."""
    kinds, blocks, values = grid_of(layers, key)
    known = [value for row in values for value in row if value is not None]
    low, high = min(known), max(known)
    step, label = CELL + GAP, 16 + 6 * max(map(len, kinds))
    width, height = label + step * len(blocks) + 70, HEAD + step * len(kinds)
    parts = [f'<svg role="img" aria-label="{_text(key)}" width="{width}" height="{height}">']
    for column, block in enumerate(blocks):
        if len(blocks) <= 16 or column % 4 == 0:
            parts.append(f'<text x="{label + step * column + CELL / 2}" y="13" text-anchor="middle">{block}</text>')
    for row, kind in enumerate(kinds):
        y = HEAD + step * row
        parts.append(f'<text x="{label - 8}" y="{y + 15}" text-anchor="end">{_text(kind)}</text>')
        for column, value in enumerate(values[row]):
            if value is not None:
                share = (value - low) / (high - low) if high > low else 0.5
                title = f"{kind}, block {blocks[column]}: {form.format(value)}"
                parts.append(
                    f'<rect x="{label + step * column}" y="{y}" width="{CELL}" height="{CELL}" rx="3" '
                    f'fill="{color(share)}"><title>{_text(title)}</title></rect>'
                )
    return "".join([*parts, *_legend(label + step * len(blocks) + 10, height, low, high, form), "</svg>"])


def _legend(x: int, height: int, low: float, high: float, form: str) -> list[str]:
    """The colors of a heat map beside it, from the highest figure down; one square where there is one figure."""
    if low == high:
        return [f'<rect x="{x}" y="{HEAD}" width="10" height="{CELL}" rx="3" fill="{color(0.5)}"/>',
                f'<text x="{x + 16}" y="{HEAD + 15}">{form.format(low)}</text>']  # fmt: skip
    long, parts = height - HEAD - GAP, []
    for part in range(20):
        parts.append(f'<rect x="{x}" y="{HEAD + long * part / 20:.1f}" width="10" height="{long / 20 + 0.5:.1f}" '
                     f'fill="{color(1 - part / 19)}"/>')  # fmt: skip
    ends = ((HEAD + 9, high), (HEAD + long, low))
    return [*parts, *(f'<text x="{x + 16}" y="{y}">{form.format(value)}</text>' for y, value in ends)]


def scatter(rows: Sequence[Mapping[str, Any]], quality: str) -> str:
    """An SVG of size (x) against quality (y), both lower the better."""
    width, height, left, bottom = 820, 340, 60, 40
    x_ticks, y_ticks = ticks([row["size"] / 1e6 for row in rows]), ticks([float(row[quality]) for row in rows])

    def across(size: float) -> float:
        return left + (width - left - 20) * (size - x_ticks[0]) / (x_ticks[-1] - x_ticks[0])

    def down(mark: float) -> float:
        return 10 + (height - bottom - 10) * (y_ticks[-1] - mark) / (y_ticks[-1] - y_ticks[0])

    parts = [f'<svg role="img" aria-label="{_text(quality)} against size" viewBox="0 0 {width} {height}" class="plot">']
    for tick in y_ticks:
        at = f"{down(tick):.1f}"
        parts.append(f'<line x1="{left}" x2="{width - 20}" y1="{at}" y2="{at}" stroke="var(--line)"/>')
        parts.append(f'<text x="{left - 8}" y="{at}" dy="4" text-anchor="end">{tick:g}</text>')
    for tick in x_ticks:
        parts.append(f'<text x="{across(tick):.1f}" y="{height - 20}" text-anchor="middle">{tick:g}</text>')
    parts.append(f'<text x="{(left + width - 20) / 2}" y="{height - 4}" text-anchor="middle">MB</text>')
    for row in rows:
        x, y, name = across(row["size"] / 1e6), down(float(row[quality])), _text(Path(str(row["name"])).name)
        side, anchor = (-9, "end") if x > width - 160 else (9, "start")
        parts.append(f'<circle cx="{x:.1f}" cy="{y:.1f}" r="6" fill="var(--mark)"><title>{name}</title></circle>')
        parts.append(f'<text x="{x + side:.1f}" y="{y - 6:.1f}" text-anchor="{anchor}">{name}</text>')
    return "".join([*parts, "</svg>"])


def ticks(values: Sequence[float], most: int = 5) -> list[float]:
    """Round numbers, evenly spaced, that values >= 0 lie between.

    >>> ticks([0.001, 1.01])
    [0.0, 0.5, 1.0, 1.5]
    """
    low, high = min(values), max(values)
    span = (high - low) or abs(high) or 1.0
    power = 10.0 ** math.floor(math.log10(span / most))
    step = next(power * factor for factor in (1, 2, 5, 10) if span / (power * factor) <= most)
    first, last = max(0, math.floor((low - span / 20) / step)), math.ceil((high + span / 20) / step)
    return [round(index * step, 12) for index in range(first, last + 1)]


def color(share: float) -> str:
    """A color for 0 (dark) to 1 (light).

    >>> color(0), color(1)
    ('#440154', '#fde725')
    """
    at = min(max(share, 0.0), 1.0) * (len(COLORS) - 1)
    index = min(int(at), len(COLORS) - 2)
    mixed = [round(a + (b - a) * (at - index)) for a, b in zip(COLORS[index], COLORS[index + 1], strict=True)]
    return "#{:02x}{:02x}{:02x}".format(*mixed)


def _page(title: str, parts: Iterable[str]) -> str:
    style = STYLE.read_text(encoding="utf-8")
    return (
        f'<!doctype html>\n<html lang="en"><head><meta charset="utf-8"><title>{_text(title)}</title>'
        f'<meta name="viewport" content="width=device-width, initial-scale=1"><style>\n{style}</style></head>'
        f"<body><main>{''.join(parts)}</main></body></html>\n"
    )


def _section(title: str, content: str) -> str:
    return f"<section><h2>{_text(title)}</h2>{content}</section>"


def _cards(cards: Iterable[tuple[str, str]]) -> str:
    shown = (f'<div class="card"><b>{_text(big)}</b><span>{_text(small)}</span></div>' for big, small in cards)
    return f'<div class="cards">{"".join(shown)}</div>'


def _cell(tag: str, content: str, number: bool) -> str:
    return f"<{tag}{' class=n' if number else ''}>{_text(content)}</{tag}>"


def _pairs(values: Mapping[str, Any]) -> str:
    """A row for each value that says something."""
    told = {name: value for name, value in values.items() if value not in (None, [], {}, "")}
    return "<table class=pairs>" + "".join(
        f"<tr><th>{_text(name.replace('_', ' '))}</th><td>{_shown(value)}</td></tr>" for name, value in told.items()
    ) + "</table>"  # fmt: skip


def _shown(value: Any) -> str:
    """A value for people: mappings as chips, lists as lines."""
    if isinstance(value, Mapping):
        if any(isinstance(each, (Mapping, list)) for each in value.values()):
            return "".join(f"<div><i>{_text(name)}</i> {_shown(each)}</div>" for name, each in value.items())
        return "".join(f"<span class=chip><i>{_text(name)}</i> {_shown(each)}</span>" for name, each in value.items())
    if isinstance(value, list):
        return "".join(f"<div>{_shown(each)}</div>" for each in value)
    if isinstance(value, float):
        return f"{value:.5g}"
    return _text(value if isinstance(value, str) else json.dumps(value, default=str))


def _layer_table(layers: Sequence[Mapping[str, Any]]) -> str:
    head = "".join(_cell("th", name, name not in ("linear", "note"))
                   for name in ("linear", "shape", "bits", "group", "error", "peak", "beyond 6 rms", "note"))  # fmt: skip
    rows = ""
    for layer in layers:
        error = "" if layer["error"] is None else f"{layer['error']:.4f}"
        kind = f"{layer['bits']} {'sym' if layer['sym'] else 'asym'}"
        cells = [layer["name"], "×".join(map(str, layer["shape"])), kind, str(layer["group_size"]), error,
                 f"{layer['peak']:.1f}", f"{layer['beyond_6']:.1e}", str(layer.get("note") or "")]  # fmt: skip
        rows += "<tr>" + "".join(_cell("td", cell, 0 < index < 7) for index, cell in enumerate(cells)) + "</tr>"
    return f"<section><details><summary>All {len(layers)} linears</summary><table><tr>{head}</tr>{rows}</table></details></section>"


def _text(value: Any) -> str:
    return html.escape(str(value))


def save_plots(report: Mapping[str, Any], folder: Path) -> list[Path]:
    """Write error.png, bits.png and outliers.png; return the files. Needs matplotlib."""
    Figure = _figure_class()
    written = []
    for key, name, title in (
        ("error", "error", "relative error"),
        ("bits", "bits", "bits"),
        ("peak", "outliers", "max |w| / rms"),
    ):
        kinds, blocks, values = grid_of(report["layers"], key)
        if not any(value is not None for row in values for value in row):
            continue
        figure = Figure(figsize=(2.5 + 0.32 * len(blocks), 1.2 + 0.32 * len(kinds)), layout="constrained")
        axes = figure.subplots()
        image = axes.imshow([[float("nan") if v is None else v for v in row] for row in values], aspect="auto")
        axes.set_yticks(range(len(kinds)), kinds)
        axes.set_xticks(range(0, len(blocks), max(1, len(blocks) // 12)), blocks[:: max(1, len(blocks) // 12)])
        axes.set(xlabel="block", title=f"{report['name']}: {title}")
        figure.colorbar(image, ax=axes)
        folder.mkdir(parents=True, exist_ok=True)
        written.append(folder / f"{name}.png")
        figure.savefig(written[-1], dpi=150)
    return written


def save_comparison(rows: Sequence[Mapping[str, Any]], file: Path) -> None:
    """Write a plot of quality against size as PNG. Needs matplotlib, and rows that were measured on text."""
    quality = _quality(rows) or "bits"
    figure = _figure_class()(figsize=(7, 4), layout="constrained")
    axes = figure.subplots()
    rows = [row for row in rows if math.isfinite(row[quality])]
    axes.scatter([row["size"] / 1e6 for row in rows], [row[quality] for row in rows])
    for row in rows:
        axes.annotate(
            Path(str(row["name"])).name, (row["size"] / 1e6, row[quality]), (6, 4), textcoords="offset points"
        )
    axes.margins(x=0.2, y=0.1)
    axes.set(xlabel="MB", ylabel=QUALITY.get(quality, "bits per weight"))
    axes.grid(alpha=0.3)
    figure.savefig(file, dpi=150)


def _figure_class() -> Any:
    """matplotlib's Figure, which draws without a window and without pyplot's global state."""
    try:
        from matplotlib.figure import Figure
    except ImportError:
        raise PluginError("PNG plots need matplotlib: pip install 'qcore[report]'.") from None
    return Figure
