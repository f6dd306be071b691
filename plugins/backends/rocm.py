"""The Triton kernels on AMD GPUs (wavefronts of 64, matrix-core instructions).

Compiled ahead of time in the tests for gfx90a, gfx942 and gfx1100; it has not run on AMD hardware yet (docs/backends.md).
"""

from __future__ import annotations

from qcore import Backend, hookimpl

from .triton import TritonBackend


class RocmBackend(TritonBackend):
    """Serves fp16 and bf16 activations on AMD GPUs."""

    name = "rocm"
    description = "the Triton kernels on AMD GPUs: 2, 3, 4, 8 bits, fp16 and bf16; not yet run on hardware"
    hip = True


@hookimpl
def qcore_backends() -> list[Backend]:
    return [RocmBackend()]
