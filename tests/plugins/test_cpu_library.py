"""The library of csrc/cpu: where it is looked for, what is refused, how it is built."""

from __future__ import annotations

import re
import shutil

import pytest
from click.testing import CliRunner
from qcore_plugins import cpu_library
from qcore_plugins.cpu_library import CPU
from qcore_plugins.csrc import build as recipe

from qcore import BackendError, cli

needs_compiler = pytest.mark.skipif(recipe.compiler() is None, reason="no C compiler is found ($CC, cc, gcc, clang)")


@pytest.fixture
def elsewhere(monkeypatch, tmp_path):
    """The sources alone, copied, with an empty cache: elsewhere / "cpu"."""
    shutil.copytree(CPU.sources, tmp_path / "cpu", ignore=shutil.ignore_patterns("*.so"))
    monkeypatch.setattr(type(CPU), "sources", property(lambda self: tmp_path / self.name))
    monkeypatch.setattr(recipe, "SOURCES", tmp_path / "cpu")
    monkeypatch.setenv("QCORE_CACHE", str(tmp_path / "cache"))
    monkeypatch.delenv("QCORE_CPU_LIBRARY", raising=False)
    cpu_library.load.cache_clear()
    yield tmp_path
    cpu_library.load.cache_clear()


def test_the_functions_are_those_of_the_header(declared_in):
    header = CPU.sources / "qcore_cpu.h"
    text = header.read_text()
    assert f"#define QC_CPU_ABI {CPU.abi}\n" in text
    assert f"QC_SCALE_OVERFLOW = {cpu_library.SCALE_OVERFLOW}," in text
    for name, number in cpu_library.SEARCH.items():
        assert f"QC_SEARCH_{name.upper()} = {number}" in text
    assert declared_in(header) == {name: parameters for name, (_, parameters) in CPU.functions.items()}


def test_what_is_not_built_says_how_to_build_it(elsewhere):
    assert "not built; run `qcore build-kernels` (needs a C compiler" in cpu_library.unavailable()


@needs_compiler
def test_it_is_built_once_into_the_cache_and_found_there(elsewhere):
    said = []
    path = cpu_library.build(said.append)
    assert len(said) == 1
    assert path.is_relative_to(elsewhere / "cache")
    assert [each.name for each in path.parent.iterdir()] == [CPU.file]
    assert cpu_library.unavailable() is None
    assert cpu_library.load().qc_source().decode() == CPU.source_hash()
    assert cpu_library.build(said.append) == path
    assert len(said) == 1, "built a second time"


@needs_compiler
def test_a_library_of_other_sources_is_not_taken(elsewhere):
    assert recipe.compile_cpu(CPU.sources / CPU.file) is None
    assert cpu_library.find() == CPU.sources / CPU.file
    with (CPU.sources / "gptq.c").open("a") as source:
        source.write("/* changed */\n")
    assert "not built from these sources" in cpu_library.unavailable()
    assert cpu_library.build(print) == cpu_library.find()


def test_a_named_file_must_be_the_library(elsewhere, monkeypatch):
    monkeypatch.setenv("QCORE_CPU_LIBRARY", str(elsewhere / "lib.so"))
    with pytest.raises(BackendError, match=r"QCORE_CPU_LIBRARY=.*lib\.so is not a file"):
        cpu_library.unavailable()
    (elsewhere / "lib.so").write_text("text")
    with pytest.raises(BackendError, match=r"lib\.so cannot be loaded"):
        cpu_library.unavailable()


def test_without_a_compiler_the_way_to_one_is_named(elsewhere, monkeypatch):
    monkeypatch.setenv("CC", "no-such-compiler")
    with pytest.raises(BackendError, match=r"no C compiler is found: \$CC, cc, gcc or clang"):
        cpu_library.build(print)
    assert "no C compiler" in recipe.compile_cpu(elsewhere / "out.so")
    assert not list((elsewhere / "cache").rglob("*.so"))


@needs_compiler
def test_a_failed_build_shows_what_the_compiler_said_and_leaves_nothing(elsewhere):
    with (CPU.sources / "gptq.c").open("a") as source:
        source.write("#error no such luck\n")
    with pytest.raises(BackendError, match=r"failed \(1\)(.|\n)*no such luck"):
        cpu_library.build(print)
    assert "no such luck" in recipe.compile_cpu(elsewhere / "out.so")
    assert not list((elsewhere / "cache").rglob("*.so"))


@needs_compiler
def test_the_command_builds_it_and_says_what_it_cannot_build(elsewhere, monkeypatch):
    """On a machine without a GPU the CUDA kernels cannot be built; that does not keep the CPU's from it."""
    import torch

    monkeypatch.setattr(torch.cuda, "device_count", lambda: 0)
    monkeypatch.delenv("QCORE_CUDA_ARCH", raising=False)
    done = CliRunner().invoke(cli.cli, ["build-kernels"])
    assert done.exit_code == 0, done.output
    assert re.search(r"^gptq: \S+/libqcore_cpu\.so$", done.stdout, re.MULTILINE)
    assert "cuda: there is no GPU" in done.stderr
    one = CliRunner().invoke(cli.cli, ["build-kernels", "gptq"])
    assert re.fullmatch(r"gptq: \S+/libqcore_cpu\.so\n", one.stdout)
    monkeypatch.setenv("CC", "no-such-compiler")
    shutil.rmtree(elsewhere / "cache")
    none = CliRunner().invoke(cli.cli, ["build-kernels"])
    assert isinstance(none.exception, BackendError)
    assert "nothing could be built" in str(none.exception)


def test_a_torch_without_the_interface_is_served_through_python(monkeypatch):
    monkeypatch.setattr(cpu_library, "TORCH_FUNCTIONS", (*cpu_library.TORCH_FUNCTIONS, "aoti_torch_of_tomorrow"))
    assert cpu_library.register.__wrapped__() == "this torch has no aoti_torch_of_tomorrow"


def test_a_table_of_another_length_is_not_taken():
    if cpu_library.unavailable():
        pytest.skip("the library is not built")
    assert cpu_library.load().qc_torch_register(None, len(cpu_library.TORCH_FUNCTIONS)) == 1
    assert cpu_library.load().qc_torch_register(None, 1) == 1
