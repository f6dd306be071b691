"""Keeping to a limit of memory: where hidden states stay between uses, how large batches are, and what an error means.

Hidden states live on the device, in host memory or in a file mapped into memory, whichever has room. Those that are not on a
GPU come to it one batch ahead of the work and go back behind it, on a stream of their own.
"""

from __future__ import annotations

import contextlib
import os
import re
import tempfile
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

#: tokens of a forward pass where memory allows: matrix products are at full speed from there on
BATCH_TOKENS = {"cpu": 4096}
BATCH_TOKENS_OF_GPU = 8192
#: outputs of finished parts of one block kept between replays, so that they are not computed again
MEMO_BYTES = 3 * 10**9 // 2


@dataclass(frozen=True)
class Room:
    """How a run uses memory: made by `plan_room`.

    batch_size: sequences per forward pass. memo_bytes: for `Block`. keep: where hidden states stay, "device", "host" or "disk".
    limit: bytes of the device's memory, None for all of it.
    """

    batch_size: int
    memo_bytes: int = MEMO_BYTES
    keep: str = "device"
    limit: int | None = None


def plan_room(
    device: torch.device, limit: int | None, tokens: int, seqlen: int, hidden: int, widest: int, itemsize: int
) -> Room:
    """Decide how to use a device's memory, or the part of it that `limit` allows.

    tokens: of the calibration; hidden, widest: elements of a token's hidden state and of the widest linear's output. A block's
    forward holds about four of the latter and six of the former at a time. What is kept may take a fifth of the memory.
    """
    free = limit or free_memory(device)
    kept, active = tokens * hidden * itemsize, (4 * widest + 6 * hidden) * itemsize
    per_pass = BATCH_TOKENS.get(device.type, BATCH_TOKENS_OF_GPU)
    if limit is not None:
        per_pass = min(per_pass, limit // 4 // active)
    keep = "device" if kept <= free // 5 else "host" if device.type != "cpu" and kept <= free_memory() // 2 else "disk"
    memo = MEMO_BYTES if limit is None else min(MEMO_BYTES, limit // 16)
    return Room(max(1, per_pass // seqlen), memo, keep, limit)


def free_memory(device: torch.device | None = None) -> int:
    """Bytes free on a GPU, or on the host: those that the system could give without swapping."""
    if device is not None and device.type == "cuda":
        return int(torch.cuda.mem_get_info(device)[0])
    found = re.search(r"MemAvailable:\s+(\d+) kB", Path("/proc/meminfo").read_text())
    return int(found[1]) * 1024 if found else os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")


@contextlib.contextmanager
def limited(device: torch.device, limit: int | None) -> Iterator[None]:
    """Within it a GPU gives no more than `limit` bytes: what goes beyond ends in torch's out-of-memory error."""
    if device.type != "cuda" or limit is None:
        yield
        return
    index = torch.cuda.current_device() if device.index is None else device.index
    torch.cuda.empty_cache()
    torch.cuda.set_per_process_memory_fraction(
        min(1.0, limit / torch.cuda.get_device_properties(index).total_memory), index
    )
    try:
        yield
    finally:
        torch.cuda.set_per_process_memory_fraction(1.0, index)


def is_out_of_memory(error: BaseException) -> bool:
    """Whether an error says that memory ran out, on a GPU or on the host."""
    return isinstance(error, (torch.OutOfMemoryError, MemoryError)) or "can't allocate memory" in str(error)


def keeper(device: torch.device, keep: str) -> Callable[[Tensor], Tensor]:
    """Return what puts a tensor where it stays between uses; see `Room.keep`."""
    if keep == "device":
        return lambda x: x.to(device)
    if keep == "host":
        return lambda x: torch.empty(x.shape, dtype=x.dtype, pin_memory=device.type == "cuda").copy_(x)
    return on_disk


def on_disk(x: Tensor) -> Tensor:
    """Return a copy of x in a file that is mapped into memory and gone when nobody uses it any more."""
    handle, name = tempfile.mkstemp(prefix="qcore-")
    os.close(handle)
    try:
        mapped = torch.from_file(name, shared=True, size=x.numel(), dtype=x.dtype)
    finally:
        os.unlink(name)
    return mapped.view(x.shape).copy_(x)


class Ferry:
    """Brings tensors kept elsewhere to a device one ahead of their use, and results back behind it."""

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self.stream: torch.cuda.Stream | None = None
        if device.type == "cuda":
            self.stream = torch.cuda.Stream(device)  # type: ignore[no-untyped-call]

    def bring(self, tensors: Sequence[Tensor], first: int = 0) -> Iterator[Tensor]:
        """Yield tensors[first:] on the device."""
        ahead = self._start(tensors[first]) if first < len(tensors) else None
        for number in range(first, len(tensors)):
            now = ahead
            ahead = self._start(tensors[number + 1]) if number + 1 < len(tensors) else None
            assert now is not None
            yield self._arrived(*now)

    def _start(self, tensor: Tensor) -> tuple[Tensor, torch.cuda.Event | None]:
        if self.stream is None or tensor.is_cuda:
            return tensor.to(self.device), None
        with torch.cuda.stream(self.stream):
            return tensor.to(self.device, non_blocking=True), self.stream.record_event()

    def _arrived(self, tensor: Tensor, there: torch.cuda.Event | None) -> Tensor:
        if there is not None:
            current = torch.cuda.current_stream(self.device)
            current.wait_event(there)
            tensor.record_stream(current)
        return tensor

    def put(self, target: Tensor, result: Tensor) -> None:
        """Copy a result to where it is kept; a later `bring` finds it there."""
        if self.stream is None or target.is_cuda:
            target.copy_(result)
            return
        self.stream.wait_stream(torch.cuda.current_stream(self.device))
        with torch.cuda.stream(self.stream):
            target.copy_(result, non_blocking=True)
        result.record_stream(self.stream)

    def wait(self) -> None:
        """Wait until all that was put is there, for readers other than `bring`."""
        if self.stream is not None:
            self.stream.synchronize()
