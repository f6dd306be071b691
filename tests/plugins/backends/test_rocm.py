"""csrc/cuda on AMD GPUs: compiled by hipcc from the same sources, inspected, and called where no GPU is needed.

No AMD GPU is here: nothing of this has run on one. Debian's packages suffice: `apt-get install hipcc`.
"""

from __future__ import annotations

import ctypes
import os
import re
import shutil
import subprocess
from pathlib import Path

import pytest
from qcore_plugins.backends.cuda_library import CUDA

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(shutil.which("hipcc") is None, reason="hipcc is not installed (Debian: apt-get install hipcc)"),
]

SOURCES = ("api", "layout", "amd")  # the others are made of NVIDIA's instructions


def hipcc(*arguments):
    command = ["hipcc", "-x", "hip", "--offload-arch=gfx90a", "-std=c++17", "-O3", "-fPIC", *map(str, arguments)]
    done = subprocess.run(
        command, env={**os.environ, "HIP_PLATFORM": "amd"}, capture_output=True, text=True, cwd=CUDA.sources
    )
    assert done.returncode == 0, done.stderr[-3000:]


def test_products_are_made_by_matrix_instructions(tmp_path):
    hipcc("--cuda-device-only", "-S", "amd.cu", "-o", tmp_path / "amd.s")
    text = (tmp_path / "amd.s").read_text()
    kernels = dict(re.findall(r"^(_ZN5qcore10amd_kernel\w+):(.*?)\.end_amdhsa_kernel", text, re.S | re.M))
    assert len(kernels) == 8  # four widths, two dtypes
    for name, body in kernels.items():
        wanted = "v_mfma_f32_16x16x16f16" if "__half" in name else "v_mfma_f32_16x16x16bf16_1k"
        assert len(re.findall(rf"\b{wanted}\b", body)) == 4, name  # the k-steps of a chunk
    assert set(re.findall(r"\.vgpr_spill_count: +(\d+)", text)) == {"0"}


def test_products_are_right_where_the_matrix_instruction_is_imitated(tmp_path):
    """The kernel's own code, compiled for the host: threads for lanes, v_mfma as AMD's guide describes it."""
    compiler = shutil.which("clang++-15") or shutil.which("clang++")
    if compiler is None:
        pytest.skip("clang++ is not installed")
    here = Path(__file__).parent / "amd_on_host"
    command = [
        compiler,
        "-std=c++20",
        "-O1",
        "-pthread",
        "-D__HIP__",
        "-I",
        here,
        "-I",
        CUDA.sources,
        here / "products.cpp",
    ]
    subprocess.run([*command, "-o", tmp_path / "products"], check=True, capture_output=True)
    found = subprocess.run([tmp_path / "products"], check=True, capture_output=True, text=True).stdout
    assert found.count("right") == 16
    assert "WRONG" not in found, found


def test_the_library_links_and_checks_its_arguments(tmp_path):
    objects = [tmp_path / f"{source}.o" for source in SOURCES]
    for source, target in zip(SOURCES, objects, strict=True):
        hipcc("-c", f"{source}.cu", "-o", target)
    path = tmp_path / CUDA.file
    subprocess.run(["hipcc", "-shared", *objects, "-o", path], env={**os.environ, "HIP_PLATFORM": "amd"}, check=True)
    try:
        library = CUDA.open(path)
    except Exception as error:
        if "libamdhip64" in str(error):
            pytest.skip(str(error))
        raise
    assert library.qc_abi_version() == CUDA.abi
    assert library.qc_packed_bytes(4, 40, 96) == 3 * 2 * 512
    assert library.qc_packed_bytes(5, 40, 96) == -1
    aligned = ctypes.create_string_buffer(64)
    at = -(-ctypes.addressof(aligned) // 16) * 16
    good = [4, 0, 1, 16, 64, 32, 0, at, 64, at, at, None, at, 16, None, 0, 0, 0, None]
    assert len(good) == len(CUDA.functions["qc_matmul"][1].split())
    for place, value, words in (
        (0, 5, "bits must be"), (1, 2, "dtype must be"), (3, 0, "sizes out of range"), (5, 48, "group_size must be"),
        (7, at + 2, "16-byte aligned"), (8, 32, "stride"), (9, None, "null"), (12, None, "null"),
    ):  # fmt: skip
        wrong = [*good[:place], value, *good[place + 1 :]]
        assert words in library.qc_error_string(library.qc_matmul(*wrong)).decode(), place
    assert library.qc_matmul(*good[:2], 0, *good[3:]) == 0  # no tokens: nothing to do
