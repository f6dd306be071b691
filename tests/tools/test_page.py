import html.parser
import re
import sys

import pytest
import torch
import transformers
from click.testing import CliRunner

import qcore
from qcore import PluginError, cli
from qcore.tools import page, reporting

VOID = {"meta"}


class Balanced(html.parser.HTMLParser):
    """Notes tags, texts and addresses; fails on a tag that is closed in the wrong place."""

    def __init__(self, text):
        super().__init__()
        self.open, self.tags, self.texts = [], [], []
        self.feed(text)
        assert self.open == []

    def handle_starttag(self, tag, attributes):
        self.tags.append((tag, dict(attributes)))
        if tag not in VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag, attributes):
        self.tags.append((tag, dict(attributes)))

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, data):
        self.texts.append(data)


@pytest.fixture(scope="module")
def folder(llama_folder, tmp_path_factory):
    target = tmp_path_factory.mktemp("page") / "b<4>"
    return qcore.quantize(llama_folder, "rtn", bits=4, group_size=32, overrides=["down_proj:bits=8"], output=target)


def test_a_report_is_one_page_with_a_cell_for_each_linear(folder):
    text = page.report_page(reporting.gather(folder))
    found = Balanced(text)
    assert not re.search(r"https?:|src=|<script|<link|@import|url\(", text)
    cells = [text for text in found.texts if re.fullmatch(r".+, block \d+: [\d.]+", text)]
    assert len(cells) == 3 * 21  # errors, bits and outliers of 21 linears
    assert "mlp.down_proj, block 2: 8" in cells
    assert "b<4>" in found.texts  # escaped
    assert any("rtn on" in text for text in found.texts)
    rows = [text for text in found.texts if text.startswith("model.layers.")]
    assert len(rows) == 21


def test_a_report_shows_what_was_measured_and_notes(folder):
    found = reporting.gather(folder)
    found |= {
        "measured": {
            "perplexity": 12.3456,
            "kl": 0.0123,
            "reference_perplexity": 11.5,
            "windows": 2,
            "seqlen": 32,
            "tokens": 62,
        },
        "notes": ["odd & ends"],
        "provenance": {},
    }
    texts = Balanced(page.report_page(found)).texts
    assert "12.346" in texts
    assert "perplexity; 11.500 before" in texts
    assert "odd & ends" in texts
    assert any("not made by qcore" in text for text in texts)
    after = texts[texts.index("Before and after") :]
    row = after.index("perplexity")
    assert after[row + 1 : row + 4] == ["11.500", "12.346", "+7.4 %"]
    assert "Measured on 62 tokens of held-out text, in 2 windows of 32." in after


def test_a_report_tells_the_plan_and_the_versions(folder):
    found = reporting.gather(folder)
    text = page.report_page(found)
    texts = Balanced(text).texts
    plan = texts[texts.index("How it was made") :]
    assert plan[plan.index("torch") + 1] == torch.__version__
    assert plan[plan.index("transformers") + 1] == transformers.__version__
    assert "<span class=chip><i>group_size</i> 32</span>" in text
    assert [layer["name"].rpartition(".")[2] for layer in found["layers"][:4]] == [
        "q_proj",
        "k_proj",
        "v_proj",
        "o_proj",
    ]


def test_layers_without_an_error_leave_its_map_out(folder):
    found = reporting.gather(folder)
    found["layers"] = [{**layer, "error": None} for layer in found["layers"]]
    texts = Balanced(page.report_page(found)).texts
    assert "Relative error of each linear" not in texts
    assert "Bits of each linear" in texts


def test_colors_run_from_dark_to_light_and_stay_inside():
    assert [page.color(share) for share in (-1, 0, 1, 2)] == ["#440154", "#440154", "#fde725", "#fde725"]
    assert page.color(0.25) == "#3b528b"


ROWS = [
    {"name": "/x/a", "algorithm": "rtn", "format": "f", "bits": 4.25, "size": 5e6, "kl": 0.01, "perplexity": 10.5},
    {"name": "/x/b", "algorithm": "rtn", "format": "f", "bits": 3.25, "size": 4e6, "kl": 0.5, "perplexity": 11.5},
]


def test_a_comparison_is_a_table_and_a_plot():
    found = Balanced(page.compare_page(ROWS))
    assert [text for text in found.texts if text in ("0.0100", "0.5000")] == ["0.0100", "0.5000"]
    marks = [attributes for tag, attributes in found.tags if tag == "circle"]
    assert len(marks) == 2
    assert float(marks[0]["cx"]) > float(marks[1]["cx"])  # larger, to the right
    assert float(marks[0]["cy"]) > float(marks[1]["cy"])  # better, lower
    beyond = {**ROWS[0], "kl": float("inf")}
    marks = [tag for tag, _ in Balanced(page.compare_page([*ROWS, beyond])).tags if tag == "circle"]
    assert len(marks) == 2  # what has no finite figure stands in the table alone
    bare = [{key: row[key] for key in ("name", "algorithm", "format", "bits", "size")} for row in ROWS]
    assert "circle" not in [tag for tag, _ in Balanced(page.compare_page(bare)).tags]


@pytest.mark.parametrize(
    ("values", "expected"),
    [
        ([110.0, 169.0], [100, 120, 140, 160, 180]),
        ([5.0], [4, 5, 6]),
        ([0.0], [0, 0.2]),
        ([1e5, 3e6], [0, 1e6, 2e6, 3e6, 4e6]),
    ],
)
def test_axes_have_round_numbers(values, expected):
    assert page.ticks(values) == expected


def test_plots_are_written_as_png(folder, tmp_path):
    pytest.importorskip("matplotlib")
    files = page.save_plots(reporting.gather(folder), tmp_path / "plots")
    assert [file.name for file in files] == ["error.png", "bits.png", "outliers.png"]
    page.save_comparison(ROWS, tmp_path / "compared.png")
    for file in (*files, tmp_path / "compared.png"):
        assert file.read_bytes().startswith(b"\x89PNG")


def test_matplotlib_missing_names_the_extra(folder, tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    with pytest.raises(PluginError, match=r"pip install 'qcore\[report\]'"):
        page.save_comparison(ROWS, tmp_path / "x.png")


def test_the_commands_write_pages_and_plots(folder, llama_folder, tmp_path):
    pytest.importorskip("matplotlib")
    text = tmp_path / "text.txt"
    text.write_text("The quick brown fox jumps over the lazy dog. " * 20)
    measure = ["--text", text, "--reference", llama_folder, "--seqlen", 32, "--windows", 1]

    def run(*arguments):
        found = CliRunner().invoke(cli.cli, [str(each) for each in arguments], catch_exceptions=False)
        assert found.exit_code == 0, found.output
        return found.output

    out = run("report", folder, "-o", tmp_path / "r.html", "--plots", tmp_path / "plots", *measure)
    assert out.split() == [
        str(tmp_path / name) for name in ("r.html", "plots/error.png", "plots/bits.png", "plots/outliers.png")
    ]
    assert "KL divergence to the original" in (tmp_path / "r.html").read_text()
    out = run("compare", folder, "-o", tmp_path / "c.html", "--plot", tmp_path / "c.png", "--new-tokens", 2, *measure)
    assert "tokens/s" in out
    assert (tmp_path / "c.png").stat().st_size > 1000
    assert "Quantized variants" in (tmp_path / "c.html").read_text()
