"""The library of csrc/cpu: finding it, and compiling it with the C compiler that is here."""

from __future__ import annotations

import ctypes
import platform
from collections.abc import Callable
from functools import cache
from pathlib import Path

from qcore import BackendError

from .csrc import build as recipe
from .native import Native, run_compiler

OK, SCALE_OVERFLOW = 0, 3  # QC_OK, QC_SCALE_OVERFLOW of qcore_cpu.h
SEARCH = {"none": 0, "minmax": 1, "mse": 2}  # QC_SEARCH_…

CPU = Native(
    name="cpu",
    abi=1,  # QC_CPU_ABI
    flags=recipe.FLAGS,
    functions={
        "qc_abi_version": (ctypes.c_int, ""),
        "qc_source": (ctypes.c_char_p, ""),
        "qc_error_string": (ctypes.c_char_p, "status"),
        "qc_cpu_level": (ctypes.c_int, ""),
        "qc_gptq_block": (
            ctypes.c_int,
            "bits sym search rows# columns# extent# group_size# groups# W* ldw# U* ldu# importance* group_of* scales* zeros*"
            " ldg# codes* ldc# Err* lde# threads level",
        ),
        "qc_matmul_level": (ctypes.c_int, ""),
        "qc_cpu_matmul": (
            ctypes.c_int,
            "bits dtype m# n# columns# k# group_size# asym half_meta x* ldx# packed* meta* perm* y* ldy# threads level parallel*",
        ),
        "qc_cpu_pack": (ctypes.c_int, "bits n# columns# k# codes* perm* packed* threads parallel*"),
        "qc_cpu_dequantize": (
            ctypes.c_int,
            "bits dtype n# columns# k# group_size# asym half_meta packed* meta* perm* weight* ldw# threads parallel*",
        ),
    },
)


@cache
def openmp() -> int | None:
    """GOMP_parallel of the OpenMP runtime that torch has loaded: its threads are those of torch's own products. None without one."""
    function = getattr(ctypes.CDLL(None), "GOMP_parallel", None)
    return None if function is None else ctypes.cast(function, ctypes.c_void_p).value


@cache
def load() -> ctypes.CDLL:
    """Return the library, loaded once; raises BackendError saying how to get it."""
    return CPU.open(find())


def unavailable() -> str | None:
    """Why there is no library, or None. One that is named and cannot be used raises BackendError instead."""
    if CPU.named() is None:
        try:
            find()
        except BackendError as error:
            return str(error)
    load()
    return None


def find() -> Path:
    """Return the library's path. One beside the sources counts only when it was compiled from them."""
    named = CPU.named()
    beside, cached = CPU.sources / CPU.file, CPU.cached(platform.machine())
    if named:
        return named
    if beside.is_file() and CPU.open(beside).qc_source().decode() == CPU.source_hash():
        return beside
    if cached.is_file():
        return cached
    stale = " from these sources" if beside.is_file() else ""
    raise BackendError(
        f"the CPU kernels are not built{stale}; run `qcore build-kernels` (needs a C compiler, takes seconds)"
    )


def build(report: Callable[[str], None]) -> Path:
    """Compile the library into the cache, unless it is there, and return its path.

    Raises BackendError when no compiler is there or it fails.
    """
    target = CPU.cached(platform.machine())
    if not target.is_file():
        with CPU.building(target) as draft:
            command = recipe.command(draft)
            if command is None:
                raise BackendError(
                    "no C compiler is found: $CC, cc, gcc or clang. Install one, or set QCORE_CPU_LIBRARY."
                )
            report(" ".join([command[0], *(path.name for path in sorted(CPU.sources.glob("*.c")))]))
            run_compiler(command)
    load.cache_clear()
    return target
