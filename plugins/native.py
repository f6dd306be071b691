"""Shared libraries of csrc: where they are, opening them, calling them, building them. Importing this does none of it.

A library is looked for in three places, in this order:

1. the file that QCORE_CUDA_LIBRARY (or …_CPU_…) names;
2. beside the sources, where an installer or a distributor puts it built;
3. the cache that `qcore build-kernels` fills: $QCORE_CACHE (~/.cache/qcore)/kernels/NAME-ABI-HASH-VARIANT, where HASH is that
   of the sources, so a library of other sources is never taken for this one.
"""

from __future__ import annotations

import ctypes
import functools
import os
import subprocess
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from qcore import BackendError

from . import csrc
from .csrc.build import source_hash

_TYPES = {"#": ctypes.c_int64, "*": ctypes.c_void_p}


@functools.cache
def _hash_at(sources: Path, flags: tuple[str, ...], stamps: object) -> str:
    """The hash of sources as they are at some time; it is asked for with every layer that is loaded."""
    return source_hash(sources, flags)


@dataclass(frozen=True, eq=False)
class Native:
    """One library, and what is known of it without opening it.

    name: its folder under csrc; the file is libqcore_NAME.so. abi: what its qc_abi_version returns. flags: the compiler's, part of
    the hash. functions: those used, with what they return and their parameters: `name` is int, `name#` int64, `name*` a
    pointer. Every library has qc_abi_version and qc_error_string.
    """

    name: str
    abi: int
    flags: Sequence[str]
    functions: Mapping[str, tuple[Any, str]]

    @property
    def file(self) -> str:
        return f"libqcore_{self.name}.so"

    @property
    def sources(self) -> Path:
        return Path(csrc.__file__).parent / self.name

    @property
    def variable(self) -> str:
        return f"QCORE_{self.name.upper()}_LIBRARY"

    def source_hash(self) -> str:
        stamps = tuple(
            (file.name, (stat := file.stat()).st_mtime_ns, stat.st_size) for file in sorted(self.sources.glob("*"))
        )
        return _hash_at(self.sources, tuple(self.flags), stamps)

    def named(self) -> Path | None:
        """The file that the environment names; raises BackendError when there is no such file."""
        named = os.environ.get(self.variable)
        if named and not Path(named).is_file():
            raise BackendError(f"{self.variable}={named} is not a file.")
        return Path(named) if named else None

    def cached(self, variant: str) -> Path:
        """Where a build for `variant` is kept."""
        return cache_folder() / f"{self.name}-{self.abi}-{self.source_hash()}-{variant}" / self.file

    def variants(self) -> dict[str, Path]:
        """The builds of these sources in the cache."""
        found = sorted(path.parent.name for path in cache_folder().glob(f"{self.cached('*').parent.name}/{self.file}"))
        return {variant: self.cached(variant) for variant in (folder.split("-", 3)[3] for folder in found)}

    def open(self, path: Path) -> ctypes.CDLL:
        """Load a file and declare its functions; raises BackendError when it is not the library this version needs."""
        try:
            library = ctypes.CDLL(str(path))
            for name, (result, parameters) in self.functions.items():
                function = getattr(library, name)
                function.restype = result
                function.argtypes = [_TYPES.get(each[-1], ctypes.c_int) for each in parameters.split()]
                if name == "qc_abi_version" and function() != self.abi:
                    raise BackendError(
                        f"{path} has version {function()} of the kernels' interface, expected {self.abi}. Run "
                        f"`qcore build-kernels`, or unset {self.variable} if it names this file."
                    )
        except (OSError, AttributeError) as error:
            raise BackendError(f"{path} cannot be loaded: {error}. Build it anew with `qcore build-kernels`.") from None
        return library

    def call(self, library: Any, function: str, *arguments: int | None, accept: int = 0) -> int:
        """Call a function that returns a status; return the status, which is 0 or `accept`.

        Raises BackendError for any other, in the library's words and with all the numbers.
        """
        status: int = getattr(library, function)(*arguments)
        if status and status != accept:
            names = self.functions[function][1].split()
            given = (
                f"{name.rstrip('#*')}={'null' if value is None else hex(value) if name.endswith('*') else int(value)}"
                for name, value in zip(names, arguments, strict=True)
            )
            words = library.qc_error_string(status).decode()
            raise BackendError(
                f"{self.name}: {function} failed with status {status}: {words}.\n  Called with {', '.join(given)}."
            )
        return status

    @contextmanager
    def building(self, target: Path) -> Iterator[Path]:
        """Give the path to link at, in a folder for intermediate files; what is there afterwards is checked and moved to `target`."""
        try:
            target.parent.mkdir(parents=True, exist_ok=True)
            with tempfile.TemporaryDirectory(prefix=".partial-", dir=target.parent) as folder:
                draft = Path(folder) / self.file
                yield draft
                self.open(draft)
                os.replace(draft, target)
        except OSError as error:
            raise BackendError(f"the kernels cannot be built in {target.parent}: {error}.") from None


def cache_folder() -> Path:
    return Path(os.environ.get("QCORE_CACHE", Path.home() / ".cache" / "qcore")) / "kernels"


def run_compiler(command: Sequence[str]) -> None:
    """Run a compiler; raises BackendError with what it said."""
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode:
        said = "\n  ".join((done.stderr or done.stdout).strip().splitlines()[-12:])
        program = Path(command[0]).name
        raise BackendError(f"{program} failed ({done.returncode}): {' '.join(command)}\n  {said}")


def sources_in(folder: Path, pattern: str) -> list[Path]:
    """The sources in a folder, sorted; raises BackendError where there are none."""
    found = sorted(folder.glob(pattern))
    if not found:
        raise BackendError(f"there are no sources in {folder}: this installation of qcore is incomplete.")
    return found
