"""What may import what, read from the source; and that nothing heavy is imported before it is needed."""

import ast
import importlib.metadata
import subprocess
import sys
from pathlib import Path

import pytest

import qcore
from qcore import hookspecs
from qcore.plugins import Plugins

CORE = Path(qcore.__file__).parent

#: each file imports only from those above it
ORDER = [
    "errors", "config", "grid", "packing", "weight", "algorithm", "ranks", "adapter", "backend", "exporter", "target", "hookspecs",
    "plugins", "linear", "experts", "calibration", "files", "checkpoint", "saving", "memory", "streaming", "model", "loading", "capture", "discovery", "plan", "journal",
    "blocks", "run", "evaluation", "tape", "fast", "content", "api", "cli", "testing",
]  # fmt: skip

#: what stands on the public door, and is imported by the command line alone
TOOLS = {path.stem for path in CORE.glob("tools/*.py")} - {"__init__"}

#: plugins that the core may name: as defaults of the public functions and of the command line
DEFAULTS = {"api.py": {"gptq", "topics"}, "cli.py": {"gptq"}}


def tree_of(path):
    return ast.parse(path.read_text(encoding="utf-8"))


def sources():
    return sorted([*CORE.glob("*.py"), *CORE.glob("tools/*.py")])


def imported_from_core(tree):
    """Names of the core modules a file imports at run time, inside functions too, but not under TYPE_CHECKING."""
    typing_only = {
        id(inner)
        for node in ast.walk(tree)
        if isinstance(node, ast.If) and "TYPE_CHECKING" in ast.dump(node.test)
        for inner in ast.walk(node)
    }
    for node in ast.walk(tree):
        if isinstance(node, ast.ImportFrom) and node.level == 1 and id(node) not in typing_only:
            yield from [node.module] if node.module else [alias.name for alias in node.names]


def test_the_order_names_every_file_of_the_core():
    assert sorted(ORDER) == sorted(path.stem for path in CORE.glob("*.py") if not path.stem.startswith("__"))


def test_the_page_on_the_architecture_lists_the_core_in_this_order():
    page = (CORE.parent / "docs" / "architecture.md").read_text(encoding="utf-8")
    listed = [line.split("`")[1].removesuffix(".py") for line in page.splitlines() if line.startswith("| `")]
    assert listed == ORDER


#: exceptions, inside a function: plugins.py looks at the kinds it checks; the command line calls the tools
INSIDE_FUNCTIONS = {"plugins": {"calibration", "evaluation"}, "cli": {"tools", *(f"tools.{name}" for name in TOOLS)}}


@pytest.mark.parametrize("name", ORDER)
def test_a_file_imports_only_from_those_above_it(name):
    above = [*ORDER[: ORDER.index(name)], "__version__"]
    found = set(imported_from_core(tree_of(CORE / f"{name}.py"))) - INSIDE_FUNCTIONS.get(name, set())
    assert found <= set(above)


@pytest.mark.parametrize("name", sorted(TOOLS))
def test_a_tool_imports_what_the_command_line_could(name):
    tree = tree_of(CORE / "tools" / f"{name}.py")
    found = {node.module for node in ast.walk(tree) if isinstance(node, ast.ImportFrom) and node.level == 2}
    assert found - {None} <= set(ORDER[: ORDER.index("cli")])


def docstrings(tree):
    for node in ast.walk(tree):
        if isinstance(node, (ast.Module, ast.ClassDef, ast.FunctionDef)) and node.body:
            first = node.body[0]
            if isinstance(first, ast.Expr) and isinstance(first.value, ast.Constant):
                yield id(first.value)


def names_of_plugins():
    """Names of the installed plugins and of all they offer, model types included; `self`, `cpu`, `cuda` and `transformers` are others' words too."""
    offers = [offer for plugin in Plugins(disabled=[]).all for offer in plugin.offers]
    points = {point.name for point in importlib.metadata.entry_points(group="qcore")}
    types = {each for kind, _, adapter in offers if kind == "model" for each in adapter.model_types}
    return (points | types | {name for _, name, _ in offers}) - {"self", "cpu", "cuda", "transformers"}


@pytest.mark.parametrize("path", sources(), ids=lambda path: path.name)
def test_the_core_imports_and_names_no_plugin(path):
    tree = tree_of(path)
    texts = set(docstrings(tree))
    names = names_of_plugins() - DEFAULTS.get(path.name, set())
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            assert not [alias.name for alias in node.names if alias.name.startswith("qcore_plugins")]
        elif isinstance(node, ast.ImportFrom) and node.level == 0:
            assert not str(node.module).startswith(("qcore_plugins", "plugins"))
        elif isinstance(node, ast.Constant) and isinstance(node.value, str) and id(node) not in texts:
            assert node.value not in names, f"{path.name} line {node.lineno}"


def run_python(code):
    return subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=120)


@pytest.mark.parametrize(
    "code",
    [
        "import qcore",
        "import qcore.cli",
        "import qcore.cli; qcore.cli.cli.main(['--help'], standalone_mode=False)",
        "import qcore.cli; qcore.cli.cli.main(['quantize', '--help'], standalone_mode=False)",
    ],
)
def test_nothing_heavy_is_imported_before_it_is_needed(code):
    heavy = "('torch', 'transformers', 'numpy', 'pluggy', 'pydantic', 'qcore_plugins')"
    result = run_python(f"{code}\nimport sys; print([m for m in {heavy} if m in sys.modules], file=sys.stderr)")
    assert result.returncode == 0, result.stderr
    allowed = "['pluggy']" if "quantize" in code else "[]"
    assert result.stderr.strip() in ("[]", allowed)


def test_importing_every_plugin_touches_neither_triton_nor_a_gpu():
    result = run_python(
        "import importlib.metadata, sys, torch\n"
        "for point in importlib.metadata.entry_points(group='qcore'):\n"
        "    if point.dist.name == 'qcore': point.load()\n"
        "print('triton' in sys.modules, torch.cuda.is_initialized())"
    )
    assert result.stdout.split() == ["False", "False"], result.stderr


@pytest.mark.parametrize("name", [name for name in vars(hookspecs) if name.startswith("qcore_")])
def test_every_hook_says_when_it_is_called_and_what_it_returns(name):
    text = getattr(hookspecs, name).__doc__
    assert text is not None
    assert len(text.split()) >= 5


def test_every_public_name_can_be_imported_and_has_a_docstring():
    for name in qcore.__all__:
        value = getattr(qcore, name)
        assert value is not None
        if callable(value) and not isinstance(value, str) and name != "hookimpl":
            assert value.__doc__, name


def test_an_unknown_public_name_is_an_attribute_error():
    with pytest.raises(AttributeError, match="no attribute 'quantise'"):
        _ = qcore.quantise
