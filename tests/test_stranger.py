"""What a stranger has: wheels installed in a virtual environment, no checkout, plugins from elsewhere beside them.

The environments borrow the heavy packages (torch, transformers) of the running one by links, never qcore itself.
"""

from __future__ import annotations

import email
import json
import os
import pydoc_data.topics
import shutil
import subprocess
import sys
import tarfile
import zipfile
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
from qcore_plugins.csrc.build import compiler

from qcore import __version__
from qcore.testing import tiny_transformer

pytestmark = pytest.mark.slow

ROOT = Path(__file__).parent.parent
EXAMPLE = ROOT / "examples/qcore-plugin-mistral"
LEFT_BEHIND = (".*", "__pycache__", "*.egg-info", "build", "dist", "*.so", "*.partial", "site", "node_modules")
TORCHLESS = ("annotated_types", "click", "markdown_it", "mdurl", "pluggy", "pydantic", "pydantic_core", "pygments",
             "rich", "typing_extensions", "typing_inspection")  # fmt: skip


@dataclass(frozen=True)
class Environment:
    """A virtual environment, used as its owner would: from another folder, with no path of ours set."""

    path: Path

    def run(self, *command: str, variables: Mapping[str, str] | None = None) -> subprocess.CompletedProcess[str]:
        inherited = {key: value for key, value in os.environ.items() if not key.startswith(("PYTHON", "QCORE_"))}
        settings = {**inherited, "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1", **(variables or {})}
        program, *arguments = command
        return subprocess.run(
            [self.path / "bin" / program, *arguments],
            cwd=self.path.parent, env=settings, capture_output=True, text=True, timeout=600, check=False,
        )  # fmt: skip

    def json(self, *command: str, variables: Mapping[str, str] | None = None) -> Any:
        done = self.run(*command, variables=variables)
        assert done.returncode == 0, done.stderr
        return json.loads(done.stdout)

    def pip(self, *arguments: str) -> None:
        pip = [sys.executable, "-m", "pip", "--python", self.path / "bin/python", "--disable-pip-version-check"]
        done = subprocess.run([*pip, *arguments], cwd=self.path.parent, capture_output=True, text=True, check=False)
        assert done.returncode == 0, done.stderr

    def install(self, *wheels: Path) -> None:
        self.pip("install", "--quiet", "--no-deps", "--no-index", *map(str, wheels))

    def plugins(self) -> dict[tuple[str, str], dict[str, str]]:
        """The table of `qcore plugins`, by (distribution, plugin); the plugins of this test offer one thing each."""
        return {(row["distribution"], row["plugin"]): row for row in self.json("qcore", "plugins", "--json")}


@pytest.fixture(scope="module")
def environment(tmp_path_factory: pytest.TempPathFactory) -> Callable[..., Environment]:
    """Makes fresh environments that borrow packages, all of them or the named ones."""

    def make(*borrowed: str) -> Environment:
        path = tmp_path_factory.mktemp("stranger") / "venv"
        subprocess.run([sys.executable, "-m", "venv", "--without-pip", path], check=True)
        (target,) = path.glob("lib/python*/site-packages")
        for folder in (Path(entry) for entry in sys.path if entry.endswith("-packages")):
            for item in folder.iterdir() if folder.is_dir() else ():
                ours = "qcore" in item.name or item.suffix in (".pth", ".egg-link") or item.name == "__pycache__"
                wanted = not borrowed or item.name.removesuffix(".py") in borrowed
                if wanted and not ours and not (target / item.name).exists():
                    (target / item.name).symlink_to(item)
        return Environment(path)

    return make


@pytest.fixture(scope="module")
def built(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """The sdist and, built from it, the wheel of qcore; the wheel of the example."""
    work = tmp_path_factory.mktemp("built")
    for name, folder in (("qcore", ROOT), ("example", EXAMPLE)):
        shutil.copytree(folder, work / name, ignore=shutil.ignore_patterns(*LEFT_BEHIND))
        command = [sys.executable, "-m", "build", "--no-isolation", "--outdir", work / "dist", work / name]
        done = subprocess.run(command, cwd=work, capture_output=True, text=True, check=False)
        assert done.returncode == 0, done.stdout + done.stderr
    (wheel,) = (work / "dist").glob(f"qcore-{__version__}-py3-none-*.whl")  # "any" without a C compiler
    files = {"sdist": f"qcore-{__version__}.tar.gz", "mistral": "qcore_plugin_mistral-1.0-py3-none-any.whl"}
    return {"wheel": wheel, **{kind: work / "dist" / file for kind, file in files.items()}}


@pytest.fixture(scope="module")
def stranger(environment: Callable[..., Environment], built: dict[str, Path]) -> Environment:
    made = environment()
    made.install(built["wheel"])
    return made


@pytest.fixture(scope="module")
def mistral_folder(tokenizer: Any, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A small random Mistral with its tokenizer, and a text beside the folder."""
    folder = tmp_path_factory.mktemp("models") / "mistral"
    model = tiny_transformer(
        "mistral", vocab_size=320, hidden_size=64, intermediate_size=96, num_hidden_layers=2,
        num_attention_heads=4, num_key_value_heads=2, bos_token_id=0, eos_token_id=1, pad_token_id=None,
    )  # fmt: skip
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    (folder.parent / "text.txt").write_text(pydoc_data.topics.topics["if"])
    return folder


def quantize(where: Environment, model: Path, output: str, *more: str, **options: Any) -> dict[str, Any]:
    """Run `qcore quantize` and return its report."""
    text = str(model.parent / "text.txt")
    report: dict[str, Any] = where.json(
        "qcore", "quantize", str(model), "-o", output, "--group-size", "32", "--device", "cpu",
        "--calibration", text, "--samples", "4", "--seqlen", "32", "--json", *more, **options,
    )  # fmt: skip
    return report


def wheel_of(folder: Path, name: str, source: str) -> Path:
    """A wheel of one module that is a qcore plugin, made by hand."""
    module = name.replace("-", "_")
    info = f"{module}-2.0.dist-info"
    files = {
        f"{module}.py": source,
        f"{info}/METADATA": f"Metadata-Version: 2.1\nName: {name}\nVersion: 2.0\n",
        f"{info}/WHEEL": "Wheel-Version: 1.0\nGenerator: by hand\nRoot-Is-Purelib: true\nTag: py3-none-any\n",
        f"{info}/entry_points.txt": f"[qcore]\n{name} = {module}\n",
    }
    record = "".join(f"{file},,\n" for file in [*files, f"{info}/RECORD"])
    path = folder / f"{module}-2.0-py3-none-any.whl"
    with zipfile.ZipFile(path, "w") as archive:
        for file, content in {**files, f"{info}/RECORD": record}.items():
            archive.writestr(file, content)
    return path


BROKEN = "import no_such_library\n"
RAISES = "from qcore import hookimpl\n@hookimpl\ndef qcore_backends():\n    raise RuntimeError('no luck')\n"
RIVAL = """
from qcore import Algorithm, hookimpl

class Rival(Algorithm):
    name = "rtn"
    def quantize_block(self, block):
        return {}

@hookimpl
def qcore_algorithms():
    return [Rival]
"""


def test_distributions_hold_what_they_must(built: dict[str, Path]) -> None:
    with zipfile.ZipFile(built["wheel"]) as archive:
        wheel = set(archive.namelist())
        metadata = email.message_from_bytes(archive.read(f"qcore-{__version__}.dist-info/METADATA"))
    with tarfile.open(built["sdist"]) as archive:
        sdist = {name.partition("/")[2] for name in archive.getnames()}
    modules = {str(file.relative_to(ROOT)) for top in ("qcore", "plugins") for file in (ROOT / top).rglob("*.py")}
    assert {name.replace("plugins/", "qcore_plugins/", 1) for name in modules} <= wheel
    kernels = {str(f.relative_to(ROOT)) for f in (ROOT / "csrc").rglob("*") if f.suffix in (".c", ".cu", ".cuh", ".h")}
    assert {f"qcore_plugins/{name}" for name in kernels} <= wheel
    assert kernels <= sdist
    assert {"qcore/py.typed", f"qcore-{__version__}.dist-info/licenses/LICENSE"} <= wheel
    assert {name.split("/")[0] for name in wheel} == {"qcore", "qcore_plugins", f"qcore-{__version__}.dist-info"}
    assert not [name for name in wheel if "test_" in name or "/tests/" in name]
    assert modules | {"qcore/py.typed", "pyproject.toml", "README.md", "LICENSE", "setup.py"} <= sdist
    assert metadata["License-Expression"] == "Apache-2.0"


@pytest.mark.skipif(compiler() is None, reason="no C compiler is found ($CC, cc, gcc, clang)")
def test_the_wheel_brings_the_cpu_library_built(stranger: Environment, built: dict[str, Path]) -> None:
    assert not built["wheel"].name.endswith("-any.whl")
    asked = "from qcore_plugins import cpu_library; print(cpu_library.find(), cpu_library.unavailable())"
    found, reason = stranger.run("python", "-I", "-c", asked).stdout.split()
    assert Path(found).is_relative_to(stranger.path)
    assert reason == "None"


def test_a_machine_without_a_compiler_gets_a_wheel_for_every_platform(tmp_path: Path) -> None:
    shutil.copytree(ROOT, tmp_path / "qcore", ignore=shutil.ignore_patterns(*LEFT_BEHIND))
    command = [sys.executable, "-m", "build", "--wheel", "--no-isolation", "--outdir", tmp_path, tmp_path / "qcore"]
    settings = {**os.environ, "CC": "no-such-compiler"}
    done = subprocess.run(command, cwd=tmp_path, env=settings, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    assert "no C compiler is found" in done.stdout
    assert (tmp_path / f"qcore-{__version__}-py3-none-any.whl").is_file()


def test_bare_wheel_lists_its_plugins(stranger: Environment) -> None:
    """Every entry point of pyproject.toml is found by the installed metadata and loads from the environment."""
    found = stranger.run(
        "python", "-I", "-c",
        "import qcore, qcore_plugins, json, importlib.metadata as m\n"
        "points = m.entry_points(group='qcore')\n"
        "print(json.dumps([qcore.__file__, qcore_plugins.__file__, sorted(p.name for p in points)]))",
    )  # fmt: skip
    core, plugins, names = json.loads(found.stdout)
    assert Path(core).is_relative_to(stranger.path)
    assert Path(plugins).is_relative_to(stranger.path)
    rows = stranger.json("qcore", "plugins", "--json")
    assert {row["plugin"] for row in rows} == set(names) == set(declared())
    assert {(row["distribution"], row["version"], row["status"]) for row in rows} == {("qcore", __version__, "loaded")}


def declared() -> list[str]:
    """Entry-point names in pyproject.toml."""
    section = (ROOT / "pyproject.toml").read_text().partition("[project.entry-points.qcore]\n")[2].partition("\n[")[0]
    return [line.partition("=")[0].strip() for line in section.splitlines() if "=" in line]


def test_without_torch_the_failures_are_listed(environment: Callable[..., Environment], built: dict[str, Path]) -> None:
    """A missing library is the plugin's failure, told by name; help and listing still work."""
    bare = environment(*TORCHLESS)
    bare.install(built["wheel"])
    assert bare.run("qcore", "--help").returncode == 0
    rows = bare.plugins()
    assert rows["qcore", "gptq"]["status"] == "failed"
    assert "torch" in rows["qcore", "gptq"]["reason"]


def test_strangers_adapter_comes_and_goes(stranger: Environment, built: dict[str, Path], mistral_folder: Path) -> None:
    stranger.install(built["mistral"])
    row = stranger.plugins()["qcore-plugin-mistral", "mistral"]
    assert (row["kind"], row["name"], row["version"], row["status"]) == ("model", "mistral", "1.0", "loaded")
    report = quantize(stranger, mistral_folder, "with-plugin")
    assert (report["adapter"], report["assumed"], len(report["layers"])) == ("mistral", [], 14)

    stranger.pip("uninstall", "--quiet", "--yes", "qcore-plugin-mistral")
    assert ("qcore-plugin-mistral", "mistral") not in stranger.plugins()
    report = quantize(stranger, mistral_folder, "without-plugin")
    assert (report["adapter"], len(report["layers"])) == ("generic", 14)
    assert report["assumed"]
    declared_bytes, found_bytes = (
        (stranger.path.parent / folder / "model.safetensors").read_bytes()
        for folder in ("with-plugin", "without-plugin")
    )
    assert declared_bytes == found_bytes, "the generic adapter quantizes differently from the declaration"

    said = stranger.run("qcore", "generate", "with-plugin", "the cat sat", "--max-new-tokens", "3", "--device", "cpu")
    assert said.returncode == 0, said.stderr
    assert said.stdout.startswith("the cat sat")


def test_examples_own_tests_pass(stranger: Environment, built: dict[str, Path], tmp_path: Path) -> None:
    tests = shutil.copytree(EXAMPLE / "tests", tmp_path / "tests", ignore=shutil.ignore_patterns("__pycache__"))
    stranger.install(built["mistral"])
    try:
        done = stranger.run(
            "python", "-m", "pytest", "-q", "-p", "no:cacheprovider", "--rootdir", str(tests), str(tests)
        )
    finally:
        stranger.pip("uninstall", "--quiet", "--yes", "qcore-plugin-mistral")
    assert done.returncode == 0, done.stdout + done.stderr
    assert "2 passed" in done.stdout


def test_broken_and_clashing_plugins_harm_nobody_else(
    environment: Callable[..., Environment], built: dict[str, Path], mistral_folder: Path, tmp_path: Path
) -> None:
    crowded = environment()
    strangers = {"acme-broken": BROKEN, "acme-raises": RAISES, "acme-rival": RIVAL}
    crowded.install(built["wheel"], *(wheel_of(tmp_path, name, source) for name, source in strangers.items()))
    rows = crowded.plugins()
    broken = rows["acme-broken", "acme-broken"]
    assert (broken["status"], broken["reason"]) == ("failed", "ModuleNotFoundError: No module named 'no_such_library'")
    raises = rows["acme-raises", "acme-raises"]
    assert (raises["status"], raises["reason"]) == ("failed", "RuntimeError: no luck")
    assert {key for key, row in rows.items() if row["status"] == "clash"} == {
        ("acme-rival", "acme-rival"),
        ("qcore", "rtn"),
    }
    fine = {key for key, row in rows.items() if row["status"] == "loaded"}
    assert fine == {("qcore", name) for name in declared() if name != "rtn"}

    assert quantize(crowded, mistral_folder, "gptq-out")["algorithm"] == "gptq"
    asked = ("qcore", "quantize", str(mistral_folder), "-o", "rtn-out", "--algo", "rtn", "--group-size", "32")
    refused = crowded.run(*asked)
    assert refused.returncode == 1
    assert "acme-rival:acme-rival" in refused.stderr
    assert "qcore:rtn" in refused.stderr
    assert "QCORE_DISABLE_PLUGINS=" in refused.stderr
    assert "Traceback" not in refused.stderr
    settled = quantize(
        crowded, mistral_folder, "rtn-out", "--algo", "rtn", variables={"QCORE_DISABLE_PLUGINS": "acme-rival"}
    )
    assert settled["algorithm"] == "rtn"


KINDS = ("algorithm", "backend", "dataset", "format", "model", "target", "task")


def build_wheels(folders: Iterable[Path], target: Path) -> None:
    """Build by the backend that their pyproject.toml names, all in one process: it takes seconds to start."""
    script = ("import os, sys; from setuptools import build_meta\n"
              "for folder in sys.argv[2:]: os.chdir(folder); build_meta.build_wheel(sys.argv[1])")  # fmt: skip
    target.mkdir()
    subprocess.run([sys.executable, "-c", script, target, *folders], capture_output=True, check=True, timeout=300)


def test_new_plugins_of_every_kind_pass_their_own_tests(stranger: Environment, tmp_path: Path) -> None:
    folders = [tmp_path / f"qcore-plugin-my-{kind}" for kind in KINDS]
    for kind in KINDS:
        done = stranger.run("qcore", "new-plugin", f"my-{kind}", "--kind", kind, "--in", str(tmp_path))
        assert done.returncode == 0, done.stderr
    build_wheels(folders, tmp_path / "dist")
    stranger.install(*(tmp_path / "dist").iterdir())
    try:
        offered = {(row["kind"], row["name"]) for row in stranger.json("qcore", "plugins", "--json")}
        assert offered >= {(kind, f"my-{kind}") for kind in KINDS}
        tests = [str(file) for folder in folders for file in folder.glob("tests/*.py")]
        done = stranger.run("python", "-m", "pytest", "-q", "--import-mode=importlib", f"--rootdir={tmp_path}", *tests)
        assert done.returncode == 0, done.stdout + done.stderr
        assert "9 passed" in done.stdout
    finally:
        stranger.pip("uninstall", "--quiet", "--yes", *(f"qcore-plugin-my-{kind}" for kind in KINDS))
