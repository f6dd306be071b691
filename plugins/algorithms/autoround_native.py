"""AutoRound's step compiled for CPUs (csrc/cpu/autoround.c): `signed_step` of autoround.py and the next quantized weight.

Rows are spread over torch's threads. Neither their number nor the instruction set changes a bit of the result.
"""

from __future__ import annotations

import torch
from torch import Tensor

from qcore import BackendError

from .. import cpu_library
from ..cpu_library import CPU


def step(
    W: Tensor,
    V: Tensor,
    ranges: tuple[Tensor, Tensor, Tensor, Tensor],
    G: Tensor,
    Q: Tensor,
    lr: float,
    minmax_lr: float | None,
    bits: int,
    sym: bool,
    threads: int | None = None,
) -> None:
    """Take one step in place and write the weight that follows to Q; arguments as of `step` in autoround_triton.py, all float32."""
    rows, groups, size = W.shape
    G = G.contiguous()
    tensors = {"W": W, "V": V, "G": G, "Q": Q, **dict(zip(("low", "high", "alpha", "beta"), ranges, strict=True))}
    for name, tensor in tensors.items():
        if tensor.dtype != torch.float32 or tensor.device.type != "cpu" or not tensor.is_contiguous():
            raise BackendError(
                f"AutoRound's native step needs {name} as float32 on the CPU, contiguous; found {tensor.dtype} on {tensor.device}."
            )
    rates = torch.tensor([lr, -1.0 if minmax_lr is None else minmax_lr])
    CPU.call(
        cpu_library.load(), "qc_autoround_step", bits, sym, rows, groups, size, G.shape[1],
        *(tensor.data_ptr() for tensor in tensors.values()), rates.data_ptr(),
        torch.get_num_threads() if threads is None else threads, cpu_library.openmp(),
    )  # fmt: skip
