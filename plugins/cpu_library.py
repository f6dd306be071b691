"""The library of csrc/cpu: finding it, and compiling it with the C compiler that is here."""

from __future__ import annotations

import ctypes
import os
import platform
from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING

from qcore import BackendError

from .csrc import build as recipe
from .native import Native, run_compiler

if TYPE_CHECKING:
    import torch

OK, SCALE_OVERFLOW = 0, 3  # QC_OK, QC_SCALE_OVERFLOW of qcore_cpu.h
LEVELS = (
    "best",
    "portable",
    "avx2",
    "avx512",
    "avx512_vnni",
    "avx512_bf16",
)  # instruction sets, as QC_LEVEL_… number them
SEARCH = {"none": 0, "minmax": 1, "mse": 2}  # QC_SEARCH_…

CPU = Native(
    name="cpu",
    abi=4,  # QC_CPU_ABI
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
        "qc_autoround_step": (
            ctypes.c_int,
            "bits sym rows# groups# group_size# columns# W* V* G* Q* low* high* alpha* beta* rates* threads parallel*",
        ),
        "qc_matmul_level": (ctypes.c_int, ""),
        "qc_limit_matmul_level": (ctypes.c_int, "level"),
        "qc_cpu_matmul": (
            ctypes.c_int,
            "bits dtype m# n# columns# k# group_size# asym half_meta x* ldx# packed* meta* perm* y* ldy# threads level parallel*",
        ),
        "qc_cpu_pack": (ctypes.c_int, "bits n# columns# k# codes* perm* packed* threads parallel*"),
        "qc_cpu_dequantize": (
            ctypes.c_int,
            "bits dtype n# columns# k# group_size# asym half_meta packed* meta* perm* weight* ldw# threads parallel*",
        ),
        "qc_pack_codes": (ctypes.c_int, "bits layout n# k# codes* ldc# words*"),
        "qc_unpack_codes": (ctypes.c_int, "bits layout n# k# words* codes* ldc#"),
        "qc_pack_blocks": (ctypes.c_int, "bits blocks# codes* d* m* packed*"),
        "qc_unpack_blocks": (ctypes.c_int, "bits blocks# packed* codes* d* m*"),
        "qc_torch_register": (ctypes.c_int, "functions* count#"),
    },
)


@cache
def openmp() -> int | None:
    """GOMP_parallel of the OpenMP runtime that torch has loaded: its threads are those of torch's own products. None without one."""
    function = getattr(ctypes.CDLL(None), "GOMP_parallel", None)
    return None if function is None else ctypes.cast(function, ctypes.c_void_p).value


#: what csrc/cpu/torch_op.c calls, in the order of its struct: torch's stable C interface and its OpenMP runtime
TORCH_FUNCTIONS = (
    *(f"aoti_torch_{name}" for name in (
        "get_data_ptr", "get_dim", "get_sizes", "get_strides", "get_numel", "get_dtype", "get_device_type", "empty_strided",
        "delete_tensor_object", "check", "library_init_impl", "library_impl",
    )),
    "omp_get_max_threads", "GOMP_parallel",
)  # fmt: skip


@cache
def register() -> str | None:
    """Let the library serve qcore::cpu_matmul without Python, for the rest of the process; return None, or why it cannot."""
    import torch

    names = torch.__path__[0] + "/lib/libtorch_cpu.so"
    try:
        libraries = [ctypes.CDLL(names), ctypes.CDLL(None)]
    except OSError as error:
        return str(error)
    found = [next((getattr(each, name) for each in libraries if hasattr(each, name)), None) for name in TORCH_FUNCTIONS]
    missing = [name for name, function in zip(TORCH_FUNCTIONS, found, strict=True) if function is None]
    if missing:
        return f"this torch has no {missing[0]}"
    table = (ctypes.c_void_p * len(found))(*(ctypes.cast(each, ctypes.c_void_p).value for each in found if each))
    CPU.call(load(), "qc_torch_register", ctypes.addressof(table), len(found))
    return None


@cache
def load() -> ctypes.CDLL:
    """Return the library, loaded once; raises BackendError saying how to get it.

    QCORE_CPU_LEVEL names the instruction set that products use, in place of the machine's best.
    """
    library = CPU.open(find())
    named = os.environ.get("QCORE_CPU_LEVEL")
    if named:
        limit_level(library, named)
    return library


def limit_level(library: ctypes.CDLL, name: str) -> None:
    """Have products use an instruction set of LEVELS; "best" for the machine's best again."""
    if name not in LEVELS:
        raise BackendError(f"QCORE_CPU_LEVEL={name} is no instruction set: expected one of {', '.join(LEVELS)}.")
    if library.qc_limit_matmul_level(LEVELS.index(name)):
        best = LEVELS[library.qc_matmul_level()]
        raise BackendError(f"QCORE_CPU_LEVEL={name}: this machine does not have it; its best is {best}.")


def unavailable() -> str | None:
    """Why there is no library, or None. One that is named and cannot be used raises BackendError instead."""
    if load.cache_info().currsize:  # this is asked for with every layer, and finding out reads the sources
        return None
    if CPU.named() is None:
        try:
            find()
        except BackendError as error:
            return str(error)
    load()
    return None


def serves(tensor: torch.Tensor) -> bool:
    """Whether a tensor is where the library works, and the library is there."""
    return tensor.device.type == "cpu" and unavailable() is None


def find() -> Path:
    """Return the library's path. One beside the sources counts only when it was compiled from them."""
    named = CPU.named()
    beside, cached = CPU.sources / CPU.file, CPU.cached(platform.machine())
    if named:
        return named
    if beside.is_file() and _compiled_from(beside, beside.stat().st_mtime_ns) == CPU.source_hash():
        return beside
    if cached.is_file():
        return cached
    stale = " from these sources" if beside.is_file() else ""
    raise BackendError(
        f"the CPU kernels are not built{stale}; run `qcore build-kernels` (needs a C compiler, takes seconds)"
    )


@cache
def _compiled_from(library: Path, changed: int) -> str:
    """The hash of the sources that a library was compiled from; "" where it does not say. It may be an older one, of other functions."""
    try:
        function = ctypes.CDLL(str(library)).qc_source
    except (OSError, AttributeError):
        return ""
    function.restype = ctypes.c_char_p
    source: bytes = function()
    return source.decode()


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
