"""The processes of one run and what they tell each other; a run alone is a group of one, for which nothing here does anything.

Every process walks the same blocks of the same model. Calibration batches are shared out, what is summed over them is added up
over the processes (`Ranks.sum`, `Sums`), linears are solved on one process and sent to all, and the first process alone writes
files. The group is torch.distributed's: the one torchrun's environment describes (`connect`), or one that exists already.
"""

from __future__ import annotations

import contextlib
import os
import re
from collections.abc import Callable, Iterator, Sequence
from datetime import timedelta
from functools import reduce
from typing import Any, Generic, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor

from .algorithm import Total
from .errors import BackendError, ConfigError, QcoreError, RunError, first_line

T = TypeVar("T")
TotalT = TypeVar("TotalT", bound=Total)

#: seconds without a word from the others after which a process gives up; one that dies is noticed at once
TIMEOUT = 1800
_REASON = "qcore/failed"


class Ranks:
    """The processes of a run, as each of them sees them.

    deterministic: add sums over calibration in an order that does not depend on how many processes there are.
    """

    def __init__(self, deterministic: bool = False) -> None:
        together = dist.is_available() and dist.is_initialized()
        self.rank = dist.get_rank() if together else 0
        self.size = dist.get_world_size() if together else 1
        self.deterministic = deterministic

    @classmethod
    def alone(cls, deterministic: bool = False) -> Ranks:
        """Return a group of one, whatever torch.distributed says."""
        ranks = cls(deterministic)
        ranks.rank, ranks.size = 0, 1
        return ranks

    def share(self, count: int) -> range:
        """Return which of `count` batches are this process's: neighbours, as many as anyone's or one more."""
        return self._share(self.rank, count)

    def _share(self, rank: int, count: int) -> range:
        return range(rank * count // self.size, (rank + 1) * count // self.size)

    def sum(self, tensors: Sequence[Tensor]) -> None:
        """Add up each tensor over the processes, in place: all end with the same."""
        if self.size > 1:
            with self._talking():
                # those of hosts first, which notice at once that one is gone
                for tensor in sorted(tensors, key=lambda tensor: tensor.is_cuda):
                    with self._there(tensor) as there:
                        dist.all_reduce(there)

    def send(self, tensors: Sequence[Tensor], source: int) -> None:
        """Copy tensors from one process into those, of the same shapes and dtypes, of all others; those of a device together."""
        if self.size == 1:
            return
        for device in dict.fromkeys(tensor.device for tensor in tensors):
            there = [tensor for tensor in tensors if tensor.device == device]
            packed = there[0] if len(there) == 1 else _packed(there)
            with self._talking(), self._there(packed) as reached:
                dist.broadcast(reached, source)
            if packed is not there[0] and self.rank != source:
                _unpack(packed, there)

    @contextlib.contextmanager
    def _there(self, tensor: Tensor) -> Iterator[Tensor]:
        """Give a tensor where the group can reach it: a group of NCCL alone, made by the caller, reaches GPUs only."""
        far = dist.get_backend() == "nccl" and not tensor.is_cuda
        there = tensor.cuda() if far else tensor
        yield there
        if far:
            tensor.copy_(there)

    def gather(self, value: T) -> list[T]:
        """Return the small value that each process has, by rank."""
        values: list[Any] = [value] * self.size
        if self.size > 1:
            with self._talking():
                dist.all_gather_object(values, value)
        return values

    def first(self, make: Callable[[], T]) -> T:
        """Return what `make`, called on the first process alone, returns there; a QcoreError it raises is raised by all."""
        if self.size == 1:
            return make()
        outcome: list[Any] = [None, None]
        if self.rank == 0:
            try:
                outcome[0] = make()
            except QcoreError as error:
                outcome[1] = error
        with self._talking():
            dist.broadcast_object_list(outcome, 0)
        if outcome[1] is not None:
            raise outcome[1]
        result: T = outcome[0]
        return result

    @contextlib.contextmanager
    def _talking(self) -> Iterator[None]:
        """Turn what torch.distributed says of a lost process into a RunError."""
        try:
            yield
        except RuntimeError as error:
            said = re.sub(r"^\[[^]]*\] *", "", str(error).splitlines()[0])  # without the source line it is from
            raise _Lost(
                f"rank {self.rank} of {self.size} lost contact with the others: {(_reason() or said).rstrip('.')}. "
                "Finished blocks are kept; start the same command again to resume, with any number of processes."
            ) from error


def _packed(tensors: Sequence[Tensor]) -> Tensor:
    """The bytes of tensors one after another, uint8 [bytes]: those of large elements first, so that each lies where it may."""
    widest_first = sorted(tensors, key=lambda tensor: -tensor.element_size())
    return torch.cat([tensor.contiguous().view(-1).view(torch.uint8) for tensor in widest_first])


def _unpack(packed: Tensor, tensors: Sequence[Tensor]) -> None:
    """Undo `_packed`, into the tensors."""
    start = 0
    for tensor in sorted(tensors, key=lambda tensor: -tensor.element_size()):
        stop = start + tensor.nbytes
        tensor.copy_(packed[start:stop].view(tensor.dtype).view(tensor.shape))
        start = stop


class _Lost(RunError):
    """Another process is gone; it, not this one, knows why."""


class Sums(Generic[TotalT]):
    """Totals over numbered batches, of which each process adds its share.

    The deterministic order is that of a binary tree over the batches' numbers: neighbours first, then pairs of neighbours. A
    process adds within its share what the tree has there and sends the rest, so that the additions are the same ones
    whoever does them. It takes log2(batches) + 1 totals instead of one.
    """

    def __init__(self, ranks: Ranks, count: int, make: Callable[[], TotalT]) -> None:
        self.ranks, self.count, self.make = ranks, count, make
        self.share = ranks.share(count)
        self.nodes: list[tuple[int, int, TotalT]] = []  # (first batch, how many, their total)
        self.seen = self.share.start  # batches before it have their place in the nodes

    def of(self, number: int) -> TotalT:
        """Return the total to add a batch to; batches come in order, and may be left out."""
        if not self.ranks.deterministic:
            if not self.nodes:
                self.nodes.append((0, self.count, self.make()))
            return self.nodes[0][2]
        while self.seen <= number:
            _merge(self.nodes)
            self.nodes.append((self.seen, 1, self.make()))
            self.seen += 1
        return self.nodes[-1][2]

    def finish(self) -> TotalT:
        """Return the total over all batches of all processes."""
        if not self.ranks.deterministic:
            total = self.of(0)
            self.ranks.sum(total.tensors())
            return total
        if self.share:
            self.of(self.share.stop - 1)
        _merge(self.nodes)
        mine, nodes = {node[0]: node[2] for node in self.nodes}, []
        self.nodes = []
        for rank in range(self.ranks.size):
            for first, count in _spans(self.ranks._share(rank, self.count)):
                total = mine.pop(first) if rank == self.ranks.rank else self.make()
                self.ranks.send(total.tensors(), rank)
                nodes.append((first, count, total))
                _merge(nodes)
        # a tree of batches that are no power of two leaves several: they are added up from the left
        return reduce(_add, (total for _, _, total in nodes)) if nodes else self.make()


def _merge(nodes: list[tuple[int, int, TotalT]]) -> None:
    """Add up neighbours at the end that are two halves of one node of the tree."""
    while len(nodes) > 1 and nodes[-1][1] == nodes[-2][1] and nodes[-2][0] % (2 * nodes[-1][1]) == 0:
        _, count, right = nodes.pop()
        first, _, left = nodes.pop()
        nodes.append((first, 2 * count, _add(left, right)))


def _add(left: TotalT, right: TotalT) -> TotalT:
    for mine, other in zip(left.tensors(), right.tensors(), strict=True):
        mine += other
    return left


def _spans(share: range) -> Iterator[tuple[int, int]]:
    """Cut a share into the nodes of the tree that lie in it whole: (first batch, how many)."""
    first = share.start
    while first < share.stop:
        count = 1
        while first % (2 * count) == 0 and first + 2 * count <= share.stop:
            count *= 2
        yield first, count
        first += count


def assign(costs: Sequence[float], size: int) -> list[int]:
    """Give each piece of work to one of `size` processes: the dearest first, each to the one with least to do."""
    load, owners = [0.0] * size, [0] * len(costs)
    for number in sorted(range(len(costs)), key=lambda n: -costs[n]):
        owners[number] = min(range(size), key=lambda rank: load[rank])
        load[owners[number]] += costs[number]
    return owners


# ---- torchrun --------------------------------------------------------------------------------------------------------

_OWN_STORE: list[Any] = []  # of the group that `connect` made, while there is one


def launched() -> int:
    """Return how many processes torchrun's environment speaks of; 1 without it."""
    size = os.environ.get("WORLD_SIZE", "1")
    if not size.isdigit() or not (size == "1" or {"RANK", "MASTER_ADDR", "MASTER_PORT"} <= os.environ.keys()):
        raise ConfigError(f"WORLD_SIZE={size!r} without a RANK, MASTER_ADDR and MASTER_PORT. Start with torchrun.")
    return int(size)


@contextlib.contextmanager
def connect(device: str) -> Iterator[None]:
    """Join the group that torchrun's environment describes, and leave it; nothing where there is none.

    device: as `quantize` takes it; "auto" and "cuda" mean the GPU of this process's LOCAL_RANK.
    QCORE_RANK_TIMEOUT: seconds after which a silent process is given up.
    """
    if launched() == 1:
        yield
        return
    gpu = _take_gpu(device)
    backend = "cpu:gloo,cuda:nccl" if gpu else "gloo"
    if not dist.is_available() or (gpu and not dist.is_nccl_available()):
        raise BackendError(
            f"this torch has no {'NCCL' if dist.is_available() else 'torch.distributed'}: {torch.__version__}."
        )
    from torch.distributed.rendezvous import rendezvous  # a torch without torch.distributed has it not

    timeout = timedelta(seconds=_timeout())
    try:
        store, rank, size = next(rendezvous("env://", timeout=timeout))
        dist.init_process_group(backend, store=store, rank=rank, world_size=size, timeout=timeout)
    except (RuntimeError, ValueError) as error:
        raise RunError(f"the processes cannot find each other: {first_line(error)}.") from error
    _OWN_STORE.append(store)
    try:
        yield
    except BaseException as error:
        if not isinstance(error, _Lost):
            with contextlib.suppress(RuntimeError):  # the store may be gone with the process that keeps it
                store.set(_REASON, f"rank {rank} failed: {str(error) or type(error).__name__}")
        raise
    dist.destroy_process_group()  # not after an error: it would wait for the others
    _OWN_STORE.clear()


def _timeout() -> float:
    text = os.environ.get("QCORE_RANK_TIMEOUT", str(TIMEOUT))
    try:
        seconds = float(text)
    except ValueError:
        seconds = -1.0
    if not 0 < seconds < 10**7:
        raise ConfigError(f"QCORE_RANK_TIMEOUT={text!r}: expected a positive number of seconds.")
    return seconds


def _take_gpu(device: str) -> bool:
    """Make this process's GPU the current one; return whether it computes on a GPU at all."""
    if device == "cpu" or (device == "auto" and not torch.cuda.is_available()):
        return False
    local, visible = int(os.environ.get("LOCAL_RANK", "0")), torch.cuda.device_count()
    if device not in ("auto", "cuda"):
        raise ConfigError(f"--device {device}: each process takes a GPU of its own. Give auto, cuda or cpu.")
    if local >= visible:
        raise ConfigError(
            f"process {local} of this machine has no GPU: {visible} are visible. Start at most that many "
            "(--nproc-per-node), or compute on the CPU (--device cpu)."
        )
    torch.cuda.set_device(local)
    return True


def _reason() -> str:
    """What a process that failed left in the store, if it could."""
    for store in _OWN_STORE:
        with contextlib.suppress(RuntimeError):  # it could not, or the store is gone with it
            store.wait([_REASON], timedelta(seconds=2))
            return str(store.get(_REASON).decode())
    return ""
