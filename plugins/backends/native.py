"""Finds, loads and builds the shared library of csrc/cuda; importing this does none of it.

The library is looked for in three places, in this order:

1. the file that QCORE_CUDA_LIBRARY names;
2. beside the sources, where a distributor may put it built;
3. the cache that `qcore build-kernels` fills: $QCORE_CACHE (~/.cache/qcore)/kernels/ABI-HASH-ARCHITECTURES, where HASH is
   that of the sources, so a library of other sources is never taken for this one.
"""

from __future__ import annotations

import ctypes
import hashlib
import os
import re
import shutil
import subprocess
import tempfile
from collections.abc import Callable, Iterable
from concurrent.futures import ThreadPoolExecutor, as_completed
from functools import cache
from pathlib import Path

from qcore import BackendError, ConfigError

from .. import csrc

ABI = 1  # QC_CUDA_ABI of qcore_cuda.h
LIBRARY = "libqcore_cuda.so"
SOURCES = Path(csrc.__file__).parent / "cuda"
FLAGS = ("-std=c++17", "-O3", "-Xcompiler", "-fPIC")
OLDEST = (8, 0)  # the compute capability that the kernels start from
JOBS = 8  # nvcc processes at a time: each takes up to about a gigabyte

BAD_VARIANT = 10  # QC_BAD_VARIANT: the kernel asked for is not in this build or not for this GPU; nothing was launched

#: The functions used here: what they return, and their parameters: `name` is int, `name#` int64, `name*` a pointer.
FUNCTIONS = {
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
}
_TYPES = {"#": ctypes.c_int64, "*": ctypes.c_void_p}


def call(function: str, *arguments: int | None, accept: int = 0) -> int:
    """Call a function that returns a status; return the status, which is 0 or `accept`.

    Raises BackendError for any other, in the library's words and with all the numbers.
    """
    library = load()
    status: int = getattr(library, function)(*arguments)
    if status and status != accept:
        raise failure(function, status, library.qc_error_string(status).decode(), arguments)
    return status


def failure(function: str, status: int, words: str, arguments: Iterable[int | None]) -> BackendError:
    """Return the error for a status: what was called, why it failed, with what."""
    names = FUNCTIONS[function][1].split()
    given = (
        f"{name.rstrip('#*')}={'null' if value is None else hex(value) if name.endswith('*') else int(value)}"
        for name, value in zip(names, arguments, strict=True)
    )
    return BackendError(f"cuda: {function} failed with status {status}: {words}.\n  Called with {', '.join(given)}.")


@cache
def load() -> ctypes.CDLL:
    """Return the library, loaded once.

    Raises BackendError when it is not built, cannot be loaded or is of another version.
    """
    return open_library(find(capabilities()))


def open_library(path: Path) -> ctypes.CDLL:
    """Load a file and declare its functions; raises BackendError when it is not the library this version needs."""
    try:
        library = ctypes.CDLL(str(path))
        for name, (result, parameters) in FUNCTIONS.items():
            function = getattr(library, name)
            function.restype = result
            function.argtypes = [_TYPES.get(each[-1], ctypes.c_int) for each in parameters.split()]
            if name == "qc_abi_version" and function() != ABI:
                raise BackendError(
                    f"{path} has version {function()} of the kernels' interface, expected {ABI}. Run `qcore build-kernels`, "
                    "or unset QCORE_CUDA_LIBRARY if it names this file."
                )
    except (OSError, AttributeError) as error:
        raise BackendError(f"{path} cannot be loaded: {error}. Build it anew with `qcore build-kernels`.") from None
    return library


def capabilities() -> list[tuple[int, int]]:
    """The compute capabilities of the GPUs here that the kernels can serve."""
    import torch

    found = {torch.cuda.get_device_capability(index) for index in range(torch.cuda.device_count())}
    return sorted(each for each in found if each >= OLDEST)


def find(gpus: Iterable[tuple[int, int]]) -> Path:
    """Return the library that serves these GPUs; raises BackendError saying how to get it."""
    named = os.environ.get("QCORE_CUDA_LIBRARY")
    if named:
        if not Path(named).is_file():
            raise BackendError(f"QCORE_CUDA_LIBRARY={named} is not a file.")
        return Path(named)
    if (SOURCES / LIBRARY).is_file():
        return SOURCES / LIBRARY
    gpus, others = list(gpus), []
    for folder in sorted(cache_folder().glob(f"{ABI}-{source_hash()}-*")):
        built_for = folder.name.split("-", 2)[2].split("+")
        if (folder / LIBRARY).is_file():
            if all(any(serves(arch, gpu) for arch in built_for) for gpu in gpus):
                return folder / LIBRARY
            others.append("+".join(built_for))
    wanted = ", ".join(f"sm_{arch_of(gpu)}" for gpu in gpus)
    has = f"built for {' and '.join(others)}, not for {wanted}" if others else "not built"
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


def cache_folder() -> Path:
    return Path(os.environ.get("QCORE_CACHE", Path.home() / ".cache" / "qcore")) / "kernels"


def source_hash() -> str:
    """A short hash of all that the library is compiled from."""
    digest = hashlib.sha256(" ".join(FLAGS).encode())
    for file in sorted(SOURCES.glob("*")):
        if file.suffix in (".cu", ".cuh", ".h"):
            digest.update(f"\n{file.name}\n".encode() + file.read_bytes())
    return digest.hexdigest()[:16]


def build(report: Callable[[str], None]) -> Path:
    """Compile the library into the cache, unless it is there, and return its path.

    It is compiled for QCORE_CUDA_ARCH ("80,90a"), by default for the GPUs here. Raises BackendError when nvcc is missing or
    fails, ConfigError for an architecture that cannot be meant.
    """
    archs = wanted_archs()
    target = cache_folder() / f"{ABI}-{source_hash()}-{'+'.join(archs)}" / LIBRARY
    if target.is_file():
        return target
    nvcc = find_nvcc()
    sources = sorted(SOURCES.glob("*.cu"))
    if not sources:
        raise BackendError(f"there are no sources in {SOURCES}: this installation of qcore is incomplete.")
    gencode = [f"-gencode=arch=compute_{arch},code=sm_{arch}" for arch in archs]
    defines = ["-DQC_SM90A"] if "90a" in archs else []  # the host's compiler cannot see what the targets are
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(prefix=".partial-", dir=target.parent) as folder:
            work = Path(folder)
            commands = {
                source.name: [nvcc, *FLAGS, *defines, *gencode, "-c", str(source), "-o", str(work / f"{source.stem}.o")]
                for source in sources
            }
            _run_all(commands, report)
            objects = [str(work / f"{source.stem}.o") for source in sources]
            _run([nvcc, "-shared", *gencode, *objects, "-o", str(work / LIBRARY)])
            open_library(work / LIBRARY)
            os.replace(work / LIBRARY, target)
    except OSError as error:
        raise BackendError(f"the kernels cannot be built in {target.parent}: {error}.") from None
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
        jobs = {pool.submit(_run, command): name for name, command in commands.items()}
        try:
            for done, job in enumerate(as_completed(jobs), 1):
                job.result()
                report(f"compiled {jobs[job]} ({done} of {len(jobs)})")
        except BaseException:
            pool.shutdown(wait=False, cancel_futures=True)
            raise


def _run(command: list[str]) -> None:
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode:
        said = "\n  ".join((done.stderr or done.stdout).strip().splitlines()[-12:])
        raise BackendError(f"nvcc failed ({done.returncode}): {' '.join(command)}\n  {said}")
