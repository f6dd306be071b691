"""The library of csrc/cuda: which build of it serves the GPUs here, and building it with nvcc."""

from __future__ import annotations

import ctypes
import os
import re
import shutil
from collections.abc import Callable, Iterable
from concurrent.futures import ThreadPoolExecutor, as_completed
from functools import cache
from pathlib import Path

from qcore import BackendError, ConfigError

from ..native import Native, run_compiler, sources_in

FLAGS = ("-std=c++17", "-O3", "-Xcompiler", "-fPIC")
OLDEST = (8, 0)  # the compute capability that the kernels start from
JOBS = 8  # nvcc processes at a time: each takes up to about a gigabyte

BAD_VARIANT = 10  # QC_BAD_VARIANT: the kernel asked for is not in this build or not for this GPU; nothing was launched

CUDA = Native(
    name="cuda",
    abi=1,  # QC_CUDA_ABI of qcore_cuda.h
    flags=FLAGS,
    functions={
        "qc_abi_version": (ctypes.c_int, ""),
        "qc_error_string": (ctypes.c_char_p, "code"),
        "qc_packed_bytes": (ctypes.c_int64, "bits n# k#"),
        "qc_meta_bytes": (ctypes.c_int64, "n# groups# asym"),
        "qc_workspace_bytes": (ctypes.c_int64, ""),
        "qc_repack": (ctypes.c_int, "bits n# k_codes# k# codes* perm* packed* stream*"),
        "qc_pack_meta": (ctypes.c_int, "bits dtype n# groups# scales* zeros* meta* stream*"),
        "qc_dequantize": (
            ctypes.c_int,
            "bits dtype n# k_out# k# group_size# asym packed* meta* perm* w* ldw# stream*",
        ),
        "qc_gather": (ctypes.c_int, "dtype m# k_in# k_out# x* ldx# perm* out* stream*"),
        "qc_matmul": (
            ctypes.c_int,
            "bits dtype m# n# k# group_size# asym x* ldx# packed* meta* bias* y* ldy# workspace* workspace_bytes# kernel flags"
            " stream*",
        ),
    },
)


def call(function: str, *arguments: int | None, accept: int = 0) -> int:
    """Call a function of the library; see Native.call."""
    return CUDA.call(load(), function, *arguments, accept=accept)


@cache
def load() -> ctypes.CDLL:
    """Return the library, loaded once.

    Raises BackendError when it is not built, cannot be loaded or is of another version.
    """
    return CUDA.open(find(capabilities()))


def capabilities() -> list[tuple[int, int]]:
    """The compute capabilities of the GPUs here that the kernels can serve."""
    import torch

    found = {torch.cuda.get_device_capability(index) for index in range(torch.cuda.device_count())}
    return sorted(each for each in found if each >= OLDEST)


def find(gpus: Iterable[tuple[int, int]], native: Native = CUDA) -> Path:
    """Return the library that serves these GPUs; raises BackendError saying how to get it."""
    named = native.named()
    if named:
        return named
    if (native.sources / native.file).is_file():
        return native.sources / native.file
    gpus, variants = list(gpus), native.variants()
    for variant, path in variants.items():
        if all(any(serves(arch, gpu) for arch in variant.split("+")) for gpu in gpus):
            return path
    wanted = ", ".join(f"sm_{arch_of(gpu)}" for gpu in gpus)
    has = f"built for {' and '.join(variants)}, not for {wanted}" if variants else "not built"
    raise BackendError(f"the kernels are {has}; run `qcore build-kernels` (needs nvcc, takes minutes)")


def arch_of(gpu: tuple[int, int]) -> str:
    """The architecture to compile for: on Hopper the one that has wgmma.

    >>> arch_of((9, 0)), arch_of((8, 6))
    ('90a', '86')
    """
    return "90a" if gpu == (9, 0) else f"{gpu[0]}{gpu[1]}"


def serves(arch: str, gpu: tuple[int, int]) -> bool:
    """Whether code for an architecture runs on a GPU: the same major version, no later minor; with a letter only itself.

    >>> serves("80", (8, 6)), serves("89", (8, 6)), serves("90a", (9, 0)), serves("80", (9, 0))
    (True, False, True, False)
    """
    number = int(arch.rstrip("af"))
    major, minor = divmod(number, 10)
    return gpu == (major, minor) if arch[-1] in "af" else gpu[0] == major and gpu[1] >= minor


def build(report: Callable[[str], None], native: Native = CUDA) -> Path:
    """Compile a library of CUDA sources into the cache, unless it is there, and return its path.

    It is compiled for QCORE_CUDA_ARCH ("80,90a"), by default for the GPUs here. Raises BackendError when nvcc is missing or
    fails, ConfigError for an architecture that cannot be meant.
    """
    archs = wanted_archs()
    target = native.cached("+".join(archs))
    if target.is_file():
        return target
    nvcc, sources = find_nvcc(), sources_in(native.sources, "*.cu")
    gencode = [f"-gencode=arch=compute_{arch},code=sm_{arch}" for arch in archs]
    defines = ["-DQC_SM90A"] if "90a" in archs else []  # the host's compiler cannot see what the targets are
    with native.building(target) as draft:
        objects = {source: str(draft.with_name(f"{source.stem}.o")) for source in sources}
        _run_all(
            {
                source.name: [nvcc, *FLAGS, *defines, *gencode, "-c", str(source), "-o", object]
                for source, object in objects.items()
            },
            report,
        )
        run_compiler([nvcc, "-shared", *gencode, *objects.values(), "-o", str(draft)])
    return target


def wanted_archs() -> list[str]:
    """The architectures to build for, sorted: those of QCORE_CUDA_ARCH or of the GPUs here."""
    asked = os.environ.get("QCORE_CUDA_ARCH", "")
    archs = {each.strip().removeprefix("sm_") for each in asked.split(",") if each.strip()}
    for arch in archs:
        if not re.fullmatch(r"\d{2,3}[af]?", arch) or divmod(int(arch.rstrip("af")), 10) < OLDEST:
            raise ConfigError(f"QCORE_CUDA_ARCH={asked}: {arch!r} is no architecture from sm_80, for instance 80,90a.")
    archs = archs or {arch_of(gpu) for gpu in capabilities()}
    if not archs:
        raise BackendError(
            "there is no GPU of sm_80 or later here to build for. Name the architectures: QCORE_CUDA_ARCH=80,90a."
        )
    return sorted(archs, key=lambda arch: (int(arch.rstrip("af")), arch))


def find_nvcc() -> str:
    """Return the path of nvcc: from CUDA_HOME, PATH or /usr/local/cuda; raises BackendError where there is none."""
    homes = [os.environ.get("CUDA_HOME"), os.environ.get("CUDA_PATH")]
    candidates = [*(f"{home}/bin/nvcc" for home in homes if home), "nvcc", "/usr/local/cuda/bin/nvcc"]
    found = next((path for each in candidates if (path := shutil.which(each))), None)
    if found is None:
        raise BackendError(
            "nvcc is neither in CUDA_HOME, on PATH nor in /usr/local/cuda. Install the CUDA toolkit (13.0 is tested), "
            "https://developer.nvidia.com/cuda-downloads, or set QCORE_CUDA_LIBRARY to a library built elsewhere."
        )
    return found


def _run_all(commands: dict[str, list[str]], report: Callable[[str], None]) -> None:
    with ThreadPoolExecutor(min(os.cpu_count() or 1, JOBS)) as pool:
        jobs = {pool.submit(run_compiler, command): name for name, command in commands.items()}
        try:
            for done, job in enumerate(as_completed(jobs), 1):
                job.result()
                report(f"compiled {jobs[job]} ({done} of {len(jobs)})")
        except BaseException:
            pool.shutdown(wait=False, cancel_futures=True)
            raise
