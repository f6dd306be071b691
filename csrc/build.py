"""Compiles csrc/cpu into one shared library, in a few seconds. Standard library only: setup.py runs it too.

One library serves every CPU of an architecture: it holds the code for each instruction set and picks at run time.
"""

from __future__ import annotations

import hashlib
import os
import shlex
import shutil
import subprocess
from collections.abc import Iterable
from pathlib import Path

SOURCES = Path(__file__).parent / "cpu"
LIBRARY = "libqcore_cpu.so"
#: no contraction and no fast-math: the same bits from every compiler and on every CPU; torch's exceptions pass through torch_op.c
FLAGS = ("-std=c11", "-O3", "-ffp-contract=off", "-fexceptions", "-fPIC", "-shared", "-pthread", "-fvisibility=default")
SUFFIXES = (".c", ".cu", ".cuh", ".h")


def source_hash(folder: Path, flags: Iterable[str]) -> str:
    """A short hash of all that a library is compiled from."""
    digest = hashlib.sha256(" ".join(flags).encode())
    for file in sorted(folder.glob("*")):
        if file.suffix in SUFFIXES:
            digest.update(f"\n{file.name}\n".encode() + file.read_bytes())
    return digest.hexdigest()[:16]


def compiler() -> list[str] | None:
    """The C compiler as a command: $CC, or the first of cc, gcc and clang on PATH; None where there is none."""
    named = shlex.split(os.environ.get("CC", ""))
    for command in [named] if named else [["cc"], ["gcc"], ["clang"]]:
        if shutil.which(command[0]):
            return command
    return None


def command(target: Path) -> list[str] | None:
    """The command that compiles csrc/cpu into the file `target`, or None without a compiler."""
    found = compiler()
    if found is None:
        return None
    defines = [f'-DQC_SOURCE="{source_hash(SOURCES, FLAGS)}"']
    return [*found, *FLAGS, *defines, *map(str, sorted(SOURCES.glob("*.c"))), "-o", str(target)]


def compile_cpu(target: Path) -> str | None:
    """Compile into `target`; return None, or why that cannot be done here."""
    line = command(target)
    if line is None:
        return "no C compiler is found ($CC, cc, gcc, clang)"
    target.parent.mkdir(parents=True, exist_ok=True)
    done = subprocess.run(line, capture_output=True, text=True, check=False)
    return f"{line[0]} failed: {done.stderr.strip()[-500:]}" if done.returncode else None
