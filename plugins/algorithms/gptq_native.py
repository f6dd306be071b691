"""GPTQ's inner loop compiled (csrc/cpu/gptq.c): the same function as `quantize_columns` of gptq.py.

Rows are spread over torch's threads. Neither their number nor the instruction set changes a bit of the result.
"""

from __future__ import annotations

import torch
from torch import Tensor

from qcore import BackendError, QuantConfig

from .. import cpu_library
from ..cpu_library import CPU, SEARCH

LEVELS = {"best": 0, "portable": 1, "avx2": 2, "avx512": 3}  # QC_LEVEL_…


def quantize_columns(
    W: Tensor,
    U: Tensor,
    importance: Tensor,
    group_of: Tensor,
    scales: Tensor,
    zeros: Tensor,
    codes: Tensor,
    Err: Tensor,
    size: int,
    config: QuantConfig,
    search: str,
    threads: int | None = None,
    level: str = "best",
) -> None:
    """Quantize columns and find grids; see `quantize_columns` in gptq.py. W is left as it is.

    threads: by default torch's. level: an instruction set, for tests; by default the best there is.
    """
    importance, group_of = importance.contiguous(), group_of.to(torch.int32).contiguous()
    columns, (reach, rows) = len(codes), W.shape
    shapes = {
        "W": (W, torch.float32, (reach, rows)),
        "U": (U, torch.float32, (columns, columns)),
        "importance": (importance, torch.float32, (reach,)),
        "group_of": (group_of, torch.int32, (reach,)),
        "scales": (scales, torch.float32, (len(scales), rows)),
        "zeros": (zeros, torch.float32, (len(scales), rows)),
        "codes": (codes, torch.uint8, (columns, rows)),
        "Err": (Err, torch.float32, (columns, rows)),
    }
    for name, (tensor, dtype, shape) in shapes.items():
        fits = tensor.dtype == dtype and tuple(tensor.shape) == shape and tensor.device.type == "cpu"
        if not fits or tensor.stride(-1) != 1:
            raise BackendError(
                f"the native GPTQ solver needs {name} as {dtype} {list(shape)} on the CPU, rows contiguous; found "
                f"{tensor.dtype} {list(tensor.shape)} on {tensor.device}, strides {list(tensor.stride())}."
            )
    CPU.call(
        cpu_library.load(), "qc_gptq_block", config.bits, config.sym, SEARCH[search], rows, columns, reach, size, len(scales),
        W.data_ptr(), W.stride(0), U.data_ptr(), max(U.stride(0), columns), importance.data_ptr(), group_of.data_ptr(),
        scales.data_ptr(), zeros.data_ptr(), rows, codes.data_ptr(), codes.stride(0), Err.data_ptr(), Err.stride(0),
        torch.get_num_threads() if threads is None else threads, LEVELS[level], accept=cpu_library.SCALE_OVERFLOW,
    )  # fmt: skip


def why_not(device: torch.device) -> str | None:
    """Why it cannot run on a device, or None."""
    return cpu_library.unavailable() if device.type == "cpu" else f"it runs on the CPU, not on {device}"


def label() -> str:
    """What tells one build's results from another's: the hash of the sources."""
    return f"native {cpu_library.CPU.source_hash()}"
