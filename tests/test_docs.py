"""The documentation cannot drift from the code: its examples run, its hooks and lists are the real ones."""

from __future__ import annotations

import importlib.util
import inspect
import json
import re
import shlex
import subprocess
import sys
import types
from collections.abc import Iterator
from pathlib import Path

import pytest

import qcore
from qcore import CalibrationRequest, LayerSpec, QuantConfig, Subject, cli, hookspecs, packing, testing
from qcore.plugins import Plugins, installed

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib

ROOT = Path(__file__).parent.parent
GUIDE = (ROOT / "docs/plugins.md").read_text(encoding="utf-8")
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))
HOOKS = {name: spec for name, spec in vars(hookspecs).items() if name.startswith("qcore_")}
NOT_RUN = "<!-- not run -->"


def python_blocks(text: str) -> list[str]:
    """The ```python blocks of a page, without those that follow the mark."""
    found = re.findall(rf"({NOT_RUN}\s*)?^```python\n(.*?)^```$", text, re.DOTALL | re.MULTILINE)
    return [block for mark, block in found if not mark]


def guide_plugins() -> dict[str, str]:
    """Module name -> source of the guide's example plugins, which name their file in the first line."""
    named = ((re.match(r'"""(\w+)\.py: ', block), block) for block in python_blocks(GUIDE))
    return {match.group(1): block for match, block in named if match}


@pytest.fixture(scope="module")
def plugins(tmp_path_factory: pytest.TempPathFactory) -> Iterator[dict[str, Plugins]]:
    """Each example of the guide loaded through an entry point, importable under its own name as well."""
    folder = tmp_path_factory.mktemp("acme")
    path, made = list(sys.path), {}
    for name, source in guide_plugins().items():
        point = testing.entry_point(folder, name, source, "acme")
        testing.check_plugin(point)
        made[name] = Plugins([point], disabled=(), only=None)
        sys.modules[name] = sys.modules[point.module]
    yield made
    sys.path[:] = path
    for name in made:
        del sys.modules[name]


def with_installed(extra: Plugins) -> Plugins:
    """The installed plugins and those of an example."""
    together = testing.with_tiny_adapter()
    together.all += extra.all
    for plugin in extra.manager.get_plugins():
        together.manager.register(plugin)
    return together


def test_examples_are_complete_and_short(plugins):
    kinds = {kind for each in plugins.values() for plugin in each.all for kind, _, _ in plugin.offers}
    assert kinds == {"algorithm", "model", "backend", "format", "dataset", "task", "target"}
    for name, source in guide_plugins().items():
        lines = source.splitlines()
        assert len(lines) <= 30, f"{name} has {len(lines)} lines"
        assert max(map(len, lines)) <= 120, f"{name} has a line beyond 120 characters"


def test_other_blocks_run():
    for block in python_blocks(GUIDE):
        if block not in guide_plugins().values() and "def test_" not in block:
            exec(compile(block, "docs/plugins.md", "exec"), vars(types.ModuleType("shown")))


PAGES = sorted(path for path in (ROOT / "docs").rglob("*.md") if path.name != "plugins.md")


@pytest.mark.parametrize("page", [page for page in PAGES if python_blocks(page.read_text(encoding="utf-8"))], ids=str)
def test_examples_of_a_page_run(page, tmp_path, monkeypatch):
    """All blocks of a page in one namespace, as a reader would paste them one after the other."""
    monkeypatch.chdir(tmp_path)
    namespace = types.ModuleType("shown")
    for block in python_blocks(page.read_text(encoding="utf-8")):
        exec(compile(block, str(page), "exec"), vars(namespace))


@pytest.mark.parametrize("test", ["test_algorithm", "test_adapter", "test_backend", "test_exporter"])
def test_the_guides_own_tests_pass(plugins, test):
    (block,) = (block for block in python_blocks(GUIDE) if "def test_" in block)
    namespace = types.ModuleType("acme_tests")
    exec(compile(block, "docs/plugins.md", "exec"), vars(namespace))
    assert {name for name in vars(namespace) if name.startswith("test_")} == {
        "test_algorithm", "test_adapter", "test_backend", "test_exporter",
    }  # fmt: skip
    vars(namespace)[test]()


def test_example_dataset_yields_documents(plugins, tmp_path, monkeypatch):
    (tmp_path / "b.md").write_text("second")
    (tmp_path / "a.md").write_text("first")
    monkeypatch.setenv("ACME_NOTES", str(tmp_path))
    dataset = plugins["acme_notes"].get("dataset", "notes")
    assert list(dataset.load(CalibrationRequest(None, 1, 8, 0, None, None))) == ["first", "second"]


def test_example_task_measures(plugins):
    found = testing.check_task(plugins["acme_echo"].get("task", "echo"), text="The quick brown fox")
    assert 0 <= found["right"] <= 1


def test_example_target_judges(plugins):
    acme = plugins["acme_target"].get("target", "acme")
    layer = LayerSpec("m", QuantConfig(bits=8, group_size=-1), 100, 64)
    assert [found.level for found in acme.check(Subject("gptq", {}, {"m": layer}))] == ["refuses"]
    assert [found.layers for found in acme.check(Subject("acme-int8", {}, {"m": layer}))] == [("m",)]
    assert acme.how_to_load("gptq") is None


def test_example_names_resolve(plugins, tmp_path, monkeypatch):
    (tmp_path / "small").mkdir()
    monkeypatch.setenv("ACME_MODELS", str(tmp_path))
    ask = plugins["acme_registry"].manager.hook.qcore_resolve_model
    assert ask(model="acme:small", cache=tmp_path) == tmp_path / "small"
    assert ask(model="org/other", cache=tmp_path) is None
    with pytest.raises(sys.modules["qcore"].ModelError, match="acme:none"):
        ask(model="acme:none", cache=tmp_path)


def test_example_events_are_told_of_a_run(plugins, capsys):
    chosen = with_installed(plugins["acme_log"])
    sys.modules["qcore"].quantize(
        testing.TinyModel(), "rtn", group_size=32, adapter="tiny", device="cpu", plugins=chosen
    )
    out, err = capsys.readouterr()
    lines = [json.loads(line) for line in err.splitlines()]
    assert out == ""
    assert lines[0]["blocks"] == 2
    assert [line["block"] for line in lines[1:-1]] == [0, 1]
    assert lines[-1] == {"layers": 12}


@pytest.mark.parametrize("name", HOOKS)
def test_every_hook_stands_in_the_guide(name):
    signature = str(inspect.signature(HOOKS[name])).replace("'", "").replace("|", r"\|")
    assert f"`{name}{signature}`" in GUIDE
    assert HOOKS[name].__doc__


def test_guide_names_no_other_hook():
    assert set(re.findall(r"\bqcore_[a-z_]+", GUIDE)) == set(HOOKS)


def test_guide_states_the_api_version():
    assert f"PLUGIN_API_VERSION = {hookspecs.PLUGIN_API_VERSION}" in GUIDE


def test_guide_names_every_check():
    checks = [name for name in vars(testing) if name.startswith("check_")]
    for name in checks:
        arguments = ", ".join(
            f"**{p.name}" if p.kind is p.VAR_KEYWORD else p.name
            for p in inspect.signature(getattr(testing, name)).parameters.values()
        )
        assert f"`{name}({arguments})`" in GUIDE


@pytest.mark.parametrize("page", sorted(path.name for path in (ROOT / "docs").glob("*.md")))
def test_links_lead_somewhere(page):
    for target in re.findall(r"\]\((?!https?:)([^)#]+)", (ROOT / "docs" / page).read_text(encoding="utf-8")):
        assert (ROOT / "docs" / target).exists(), f"docs/{page} links to {target}"


PROMISED = re.findall(r"`([\w/]+\.py)::(test_\w+)`", (ROOT / "docs/migrating.md").read_text(encoding="utf-8"))


def test_the_tests_that_run_the_seeds_features_are_there():
    assert len(PROMISED) > 25
    for file, name in PROMISED:
        source = (ROOT / "tests" / file).read_text(encoding="utf-8")
        assert f"\ndef {name}(" in source, f"docs/migrating.md names tests/{file}::{name}, which is not there"


@pytest.mark.parametrize(
    ("kind", "page"),
    [("algorithm", "choosing.md"), ("format", "formats.md"), ("format", "choosing.md"), ("backend", "backends.md"),
     ("task", "tasks.md"), ("dataset", "evaluation.md"), ("target", "formats.md")],
)  # fmt: skip
def test_a_page_names_everything_of_its_kind(kind, page):
    text = (ROOT / "docs" / page).read_text(encoding="utf-8")
    ours = [
        name
        for plugin in installed().all
        if plugin.distribution == "qcore"
        for k, name, _ in plugin.offers
        if k == kind
    ]
    assert ours
    assert not [name for name in ours if name not in text.lower()]


README = ROOT / "README.md"


def commands_shown() -> list[str]:
    """Lines that run qcore, from the blocks of all pages that are no Python."""
    pages = [README, *sorted((ROOT / "docs").rglob("*.md"))]
    blocks = [
        b
        for page in pages
        for b in re.findall(r"^ *```\w*\n(.*?)^ *```$", page.read_text(encoding="utf-8"), re.DOTALL | re.MULTILINE)
    ]
    lines = [line.strip() for block in blocks for line in block.splitlines()]
    return sorted({line for line in lines if line.startswith("qcore ") and "…" not in line})


@pytest.mark.parametrize("line", commands_shown())
def test_commands_shown_are_ones_that_the_command_line_takes(line):
    """Options and arguments are parsed, nothing runs."""
    words = shlex.split(line, comments=True)[1:]
    context = cli.cli.make_context("qcore", words, resilient_parsing=False)
    name, command, rest = cli.cli.resolve_command(context, [*context._protected_args, *context.args])
    with command.make_context(name, rest, parent=context) as parsed:
        assert parsed.command is command


def test_the_site_builds_strictly_with_every_public_name_and_command(tmp_path, monkeypatch):
    pytest.importorskip("mkdocstrings_handlers.python")
    monkeypatch.setenv("NO_MKDOCS_2_WARNING", "1")
    command = [sys.executable, "-m", "mkdocs", "build", "--strict", "--quiet", "--site-dir", str(tmp_path / "site")]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=300, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    reference = (tmp_path / "site/api/index.html").read_text(encoding="utf-8")
    for home, names in qcore._HOMES.items():
        for name in names:
            assert f'id="qcore.{home}.{name}"' in reference
    for name in ("tools.page.report_page", "compat.auto_round.AutoRound", "compat.auto_gptq.modeling.BaseQuantizeConfig",
                 "compat.auto_gptq.eval_tasks.LanguageModelingTask", "compat.peft.prepare"):  # fmt: skip
        assert f'id="qcore.{name}"' in reference
    commands = (tmp_path / "site/commands/index.html").read_text(encoding="utf-8")
    for name, each in cli.cli.commands.items():
        assert f"qcore {name}" in commands
        for option in each.params:
            assert all(spelling in commands for spelling in option.opts if spelling.startswith("--"))
    pages = (ROOT / "docs").rglob("*.md")
    missing = [
        page.name for page in pages if str(page.relative_to(ROOT / "docs")) not in (ROOT / "mkdocs.yml").read_text()
    ]
    assert not missing, f"mkdocs.yml does not list {missing}"


@pytest.mark.slow
def test_readme_examples_run(tmp_path, monkeypatch):
    """All blocks of the README in one namespace, as a reader would paste them one after the other."""
    monkeypatch.chdir(tmp_path)
    blocks = python_blocks(README.read_text(encoding="utf-8"))
    namespace = types.ModuleType("readme")
    for block in blocks:
        exec(compile(block, "README.md", "exec"), vars(namespace))


def first_party_modules() -> list[str]:
    """Dotted names of the modules that are plugins: what lies in a folder of plugins/."""
    files = sorted((ROOT / "plugins").rglob("*.py"))
    dotted = (".".join(("qcore_plugins", *file.relative_to(ROOT / "plugins").with_suffix("").parts)) for file in files)
    return [name for name in dotted if not name.endswith("__init__")]


def implements_a_hook(module: str) -> bool:
    source = (ROOT / "plugins" / Path(*module.split(".")[1:])).with_suffix(".py").read_text(encoding="utf-8")
    return "@hookimpl" in source


@pytest.mark.parametrize("module", [name for name in first_party_modules() if implements_a_hook(name)])
def test_first_party_plugin_is_an_entry_point(module):
    assert module in PROJECT["project"]["entry-points"]["qcore"].values()


def test_entry_points_name_real_modules():
    for name, module in PROJECT["project"]["entry-points"]["qcore"].items():
        assert module in first_party_modules(), f"{name} names {module}"


def test_every_package_folder_is_packaged():
    listed, homes = PROJECT["tool"]["setuptools"]["packages"], PROJECT["tool"]["setuptools"]["package-dir"]
    folders = {
        file.parent.relative_to(ROOT)
        for top in ("qcore", "plugins", "csrc")
        for file in (ROOT / top).rglob("*.py")
        if "__pycache__" not in file.parts
    }
    named = {path: package for package, path in homes.items()}
    for folder in folders:
        top = folder.parts[0]
        package = ".".join((named[top], *folder.parts[1:]))
        assert package in listed, f"{folder} is in no package of pyproject.toml"
    assert len(listed) == len(folders), "pyproject.toml lists a package that has no folder"


def test_first_party_plugins_load_from_this_checkout():
    failed = [f"{plugin.label}: {plugin.reason}" for plugin in installed().all if plugin.status == "failed"]
    assert not failed
    assert importlib.util.find_spec("qcore_plugins") is not None


def test_formats_page_shows_what_is_packed():
    """The worked example of docs/formats.md, computed."""
    import torch
    from qcore_plugins.exporters.gptq import Gptq, GptqV2

    page = (ROOT / "docs/formats.md").read_text(encoding="utf-8")
    for bits in (2, 3, 4, 8):
        weight = testing.random_weight(32, 32, QuantConfig(bits=bits, group_size=-1))
        words = [format_.encode("m", weight)["m.qzeros"][0] for format_ in (Gptq(), GptqV2())]
        cells = [
            " ".join(f"`0x{int(word) & 0xFFFFFFFF:08X}`" for word in row[: 3 if bits == 3 else 1]) for row in words
        ]
        assert f"| {bits} | {cells[0]} | {cells[1]} |" in page
    codes = torch.arange(32) % 8
    row = " ".join(f"`0x{int(word) & 0xFFFFFFFF:08X}`" for word in packing.pack(codes, 3))
    assert row in page
