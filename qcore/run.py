"""A quantization run: the walk over the blocks, in memory or from folder to folder.

A run that writes to a folder keeps a journal beside it (qcore.journal). Killed anywhere, it resumes at the first block
without a file and ends in the same bytes. Only when everything is there is the output assembled, verified and renamed into
place.
"""

from __future__ import annotations

import contextlib
import ctypes
import gc
import logging
import time
from collections import deque
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from functools import partial
from pathlib import Path
from typing import Any, TypeVar

import torch

from . import blocks as walk
from .calibration import Calibration
from .capture import Captured, Stream, capture_inputs
from .checkpoint import ModelFolder
from .errors import CheckpointError, ConfigError, ModelError, RunError, first_line, name_list
from .exporter import Content, Exporter, LayerSpec
from .files import complete_folder
from .journal import Journal, Result, fingerprint, provenance, renamed
from .memory import is_out_of_memory, keeper, limited
from .plan import Job
from .streaming import FolderWeights, Names
from .weight import QuantizedWeight

T = TypeVar("T")
_log = logging.getLogger("qcore")


class _Inputs:
    """The calibration as it stands between two blocks: the streams of hidden states and what blocks are called with."""

    def __init__(self, job: Job, calibration: Calibration) -> None:
        self.job, batches = job, calibration.batches(job.batch_size)
        self.count = len(batches)  # of all processes
        self.batches = [batches[number] for number in share_of(job, self.count)]
        self.keep = "host" if job.algorithm.keep_on_host and job.room.keep == "device" else job.room.keep
        self.captured = self._capture(keeper(job.device, self.keep))
        self.float_inputs: Stream | None = None
        if job.algorithm.float_stream:
            copy = keeper(job.device, self.keep)
            self.float_inputs = Stream([copy(hidden.clone()) for hidden in self.captured.stream.hidden])

    def _capture(self, keep: Callable[[torch.Tensor], torch.Tensor]) -> Captured:
        job = self.job
        return capture_inputs(job.model, job.weights, job.adapter, self.batches, job.device, job.dtype, keep)

    @property
    def size(self) -> int:
        """Sequences of the largest batch."""
        return max(len(ids) for ids, _ in self.batches)

    def shrink(self, reason: str) -> None:
        """Halve the batches after memory ran out, or, when they hold one sequence each, move hidden states off the GPU.

        Raises RunError when neither is left to do. What changes is the order of floating point sums.
        """
        streams = [stream for stream in (self.captured.stream, self.float_inputs) if stream is not None]
        size = self.size
        fixed = self.job.algorithm.batch_size is not None or self.job.ranks.deterministic or self.job.ranks.size > 1
        if fixed or (size == 1 and self.keep != "device"):
            raise RunError(
                f"memory ran out with batches of {size} sequences ({reason}). "
                "Give fewer tokens a sequence (seqlen), a smaller batch_size, more memory (max_memory), or another device."
            )
        if size == 1:
            self.keep = "host" if self.job.device.type != "cpu" else "disk"
            _log.warning("memory ran out: hidden states move off the device.")
            for stream in streams:
                stream.hidden[:] = map(keeper(self.job.device, self.keep), stream.hidden)
            return
        _log.warning(f"memory ran out: batches of {size} sequences are halved.")
        for stream in streams:
            cut = [_halves(hidden, ids) for hidden, (ids, _) in zip(stream.hidden, self.batches, strict=True)]
            stream.moved = sum(map(len, cut[: stream.moved]))
            stream.hidden[:] = [half for halves in cut for half in halves]
        self.batches = [
            (ids_half, mask_half)
            for ids, mask in self.batches
            for ids_half, mask_half in zip(
                _halves(ids, ids), [None, None] if mask is None else _halves(mask, ids), strict=False
            )
        ]
        again = self._capture(lambda x: x.new_empty(0))
        self.captured.kwargs, self.captured.masks = again.kwargs, again.masks
        self.count = len(self.batches)


def _halves(x: torch.Tensor, ids: torch.Tensor) -> list[torch.Tensor]:
    """Cut what belongs to the sequences ids [batch, length] in two, where there are two. x: [batch, …], [length, batch, …] or
    [batch * length, …].
    """
    count = len(ids)
    if count == 1:
        return [x]
    dim = 1 if x.ndim > 2 and x.shape[0] != count and x.shape[1] == count else 0
    step = x.shape[dim] // count
    return list(torch.split(x, [step * (count - count // 2), step * (count // 2)], dim))


class _Work:
    """A block under work, or several that run as one: set up, and set up anew with smaller batches when memory runs out."""

    def __init__(
        self, job: Job, indices: Sequence[int], inputs: _Inputs | None, journal: Journal | None = None
    ) -> None:
        self.job, self.indices, self.inputs, self.journal = job, indices, inputs, journal
        alone = job.ranks.size == 1
        while inputs and journal and alone and inputs.size > journal.most_at(indices[0], inputs.size):
            inputs.shrink("as it did when this run was here before")
        self.block = self._set_up()

    def _set_up(self) -> walk.Block:
        for index in self.indices:
            self.job.weights.let_go(self.job.blocks[index][0])
            self.job.weights.bring(self.job.blocks[index][0], self.job.device, self.job.dtype)
        return _block_at(self.job, self.indices, self.inputs)

    def attempt(self, step: Callable[[walk.Block], T]) -> T:
        """Return step(block), begun again with smaller batches when memory runs out."""
        while True:
            try:
                return step(self.block)
            except (RuntimeError, MemoryError) as error:
                if self.inputs is None or not is_out_of_memory(error):
                    raise
                reason = first_line(error)
            del self.block  # and, with the error, all that it held
            gc.collect()  # or what holds itself stays until the next block
            self.inputs.shrink(reason)
            if self.journal:
                self.journal.note_most(self.indices[0], self.inputs.size)
            self.block = self._set_up()


def quantize_blocks(
    job: Job, journal: Journal | None = None, resumed_at: int = 0
) -> Iterator[tuple[int, dict[str, QuantizedWeight], list[dict[str, Any]]]]:
    """Walk the blocks; yield (index, quantized weights, records) for each, resumed ones included.

    Without a journal the weights are on the CPU. Plugins are told of the start and of every newly quantized block.
    """
    counts = {"blocks": len(job.blocks), "linears": len(job.linears), "resumed_at": resumed_at}
    job.tell("qcore_run_started", plan={**counts, **job.describe()})
    at_once, heap = job.algorithm.blocks_at_once, 0
    with limited(job.device, job.room.limit), _Behind(job, journal) as behind:
        inputs = _Inputs(job, job.calibration) if job.calibration is not None else None
        for first in range(0, len(job.blocks), at_once):
            indices = list(range(first, min(first + at_once, len(job.blocks))))
            try:
                work = _Work(job, indices, inputs, journal)
                following = [job.blocks[index][0] for index in range(len(job.blocks))[indices[-1] + 1 :][:at_once]]
                for name in following:
                    job.weights.expect(name, job.device)
                restored = [journal.read_block(index) if journal else None for index in indices]
                done = [each for each in restored if each is not None]
                if is_new := len(done) < len(indices):
                    done = work.attempt(partial(_quantize, job, indices=indices))
                for index, (results, records) in zip(indices, done, strict=True):
                    behind.take(index, results, records, is_new)
                if inputs is not None and following:
                    for name in following if job.room.limit is None else ():
                        job.weights.send(name, job.device)
                    found = {name: weight for results, _ in done for name, weight in results.items()}
                    work.attempt(partial(_move_on, inputs, found))
            finally:  # also of an interrupted run: a model in memory gets its own weights back
                for index in indices:
                    job.weights.let_go(job.blocks[index][0])
            del work, restored, done, results
            found = {}
            heap = _trim_heap(heap)
            yield from behind.give()
        yield from behind.give(all_of_them=True)


def _move_on(inputs: _Inputs, found: Mapping[str, QuantizedWeight], block: walk.Block) -> None:
    """Send the streams through a finished block."""
    if inputs.float_inputs is not None:
        block.float_outputs()
    for linear, weight in found.items():
        if not block.acts_as(linear, weight):
            block.replace(linear, weight)
        block.drop_original(linear)
    block.advance(inputs.captured.stream)


class _Behind:
    """Brings finished blocks to the host, packs and writes them on a thread of its own, while the next is quantized.

    A GPU's run may be one block ahead of it, a CPU's not at all. An error there is raised by the next `give`; whatever ends the
    run, what was taken is written first.
    """

    def __init__(self, job: Job, journal: Journal | None) -> None:
        self.journal, self.tell = journal, job.tell
        self.ahead = _lead(job)
        self.stream: torch.cuda.Stream | None = None
        if job.device.type == "cuda":
            self.stream = torch.cuda.Stream(job.device)  # type: ignore[no-untyped-call]
        self.thread = ThreadPoolExecutor(1)
        self.queue: deque[Future[_Finished]] = deque()

    def __enter__(self) -> _Behind:
        return self

    def __exit__(self, *_: object) -> None:
        self.thread.shutdown()

    def take(
        self, index: int, results: dict[str, QuantizedWeight], records: list[dict[str, Any]], is_new: bool
    ) -> None:
        """Take a block over; is_new: it was not read from the journal."""
        ready = torch.cuda.current_stream(self.stream.device).record_event() if self.stream else None

        def work() -> _Finished:
            with torch.cuda.stream(self.stream) if self.stream else contextlib.nullcontext():
                if self.stream and ready:
                    self.stream.wait_event(ready)
                if self.journal and is_new:
                    self._write(self.journal, index, results, records)
                    return index, results, records, is_new
                return index, {name: weight.to("cpu") for name, weight in results.items()}, records, is_new

        self.queue.append(self.thread.submit(work))

    @staticmethod
    def _write(
        journal: Journal, index: int, results: dict[str, QuantizedWeight], records: list[dict[str, Any]]
    ) -> None:
        """Write a block, packed on its device where that has room."""
        try:
            journal.write_block(index, results, records)
            return
        except (RuntimeError, MemoryError) as error:
            if not is_out_of_memory(error):
                raise
        journal.write_block(index, {name: weight.to("cpu") for name, weight in results.items()}, records)

    def give(self, all_of_them: bool = False) -> Iterator[tuple[int, dict[str, QuantizedWeight], list[dict[str, Any]]]]:
        """Yield the blocks that are written; wait for those it is too far behind with."""
        ahead = 0 if all_of_them else self.ahead
        while self.queue and (len(self.queue) > ahead or self.queue[0].done()):
            index, results, records, is_new = self.queue.popleft().result()
            if is_new:
                self.tell(
                    "qcore_block_finished", index=index, records=[dict(each) for each in records]
                )  # theirs to change
            yield index, results, records


def _lead(job: Job) -> int:
    """How many blocks the run may be ahead of their writing."""
    return 0 if job.device.type == "cpu" else job.algorithm.blocks_at_once


_Finished = tuple[int, dict[str, QuantizedWeight], list[dict[str, Any]], bool]


def share_of(job: Job, count: int) -> range:
    """Return which of `count` calibration batches this process works on.

    Raises ConfigError when there are fewer batches than processes that share them.
    """
    if not job.algorithm.shares_calibration:
        return range(count)
    if count < job.ranks.size:
        raise ConfigError(
            f"{job.ranks.size} processes cannot share {count} calibration batches of {job.batch_size}: each needs one at least. "
            "Give more samples or a smaller batch_size, or start fewer processes."
        )
    return job.ranks.share(count)


def _block_at(job: Job, indices: Sequence[int], inputs: _Inputs | None) -> walk.Block:
    """Set up the block that an algorithm sees: one of the model's, or several that run as one."""
    captured, float_inputs, count = (inputs.captured, inputs.float_inputs, inputs.count) if inputs else (None, None, 0)
    name, module = job.blocks[indices[0]]
    stages = job.adapter.stages_in(module)
    kwargs = captured.kwargs[indices[0]] if captured else []
    if len(indices) > 1:
        children = {job.blocks[index][0].rpartition(".")[2]: index for index in indices}
        name, module = name.rpartition(".")[0], walk.Span({key: job.blocks[i][1] for key, i in children.items()})
        stages = [
            [tuple(f"{key}.{short}" for short in group) for group in stage]
            for key, index in children.items()
            for stage in job.adapter.stages_in(job.blocks[index][1])
        ]
        batches = range(len(kwargs))
        kwargs = [{key: captured.kwargs[i][n] for key, i in children.items()} for n in batches] if captured else []
    dtype_of = job.weights.dtype_of
    return walk.Block(
        indices[0], name, module, stages, job.linears, dtype_of, captured, kwargs, float_inputs, job.device, job.seed,
        job.room.memo_bytes, job.ranks, count,
    )  # fmt: skip


def _trim_heap(ceiling: int) -> int:
    """Hand what glibc keeps in pieces of finished blocks back to the system once they have added up to a thirtieth.

    ceiling: resident pages after the first block, 0 to measure; returned. Trimming after every block would let the next one
    fault all its pages in anew, a tenth of a run's time.
    """
    trim = getattr(ctypes.CDLL(None), "malloc_trim", None)  # other C libraries have none
    if not trim:
        return 0
    pages = int(Path("/proc/self/statm").read_text().split()[1])
    if ceiling and pages > ceiling * 31 // 30:
        trim(0)
    return ceiling or pages


def _quantize(job: Job, block: walk.Block, indices: Sequence[int]) -> list[Result]:
    """Let the algorithm work on a block and check that it did all of it, in the form promised.

    Returns weights and records of each of the model's blocks that it stands for.
    """
    started = time.perf_counter()
    try:
        block.widen_starved()
        results = job.algorithm.quantize_block(block) if block.linears else {}
    except (ModelError, CheckpointError) as error:
        if block.name in str(error):
            raise
        raise type(error)(f"block {block.name}: {error}") from error
    finally:
        block.narrow()
    if not isinstance(results, Mapping):
        raise RunError(
            f"algorithm {job.algorithm.name!r} returned {type(results).__name__} for block {block.name}, expected names and weights."
        )
    seconds = (time.perf_counter() - started) / max(1, len(block.linears))
    if set(results) != set(block.linears):
        missing = sorted(set(block.linears) - set(results)) or sorted(set(results) - set(block.linears))
        raise RunError(
            f"algorithm {job.algorithm.name!r} returned {len(results)} of {len(block.linears)} linears of block "
            f"{block.name}; look at {name_list(missing)}."
        )
    results = block.agree(results)
    done: list[Result] = []
    for index in indices:
        prefix, records = f"{job.blocks[index][0]}.", []
        for name in [name for name in block.linears if name.startswith(prefix)]:
            weight = results[name]
            shape = tuple(block.linears[name].weight.shape)
            if not isinstance(weight, QuantizedWeight) or tuple(weight.codes.shape) != shape:
                raise RunError(f"algorithm {job.algorithm.name!r} returned no fitting QuantizedWeight for {name}.")
            facts = {"name": name, "block": index, "shape": list(shape), **weight.config.model_dump()}
            facts["act_order"] = weight.act_order
            noted = {key: v.item() if isinstance(v, torch.Tensor) else v for key, v in block.records[name].items()}
            records.append({**facts, "error": None, "seconds": seconds, **noted})
        done.append(({record["name"]: results[record["name"]] for record in records}, records))
    return done


def quantize_to_folder(job: Job, folder: ModelFolder, journal: Journal, exporter: Exporter) -> dict[str, Any]:
    """Quantize from folder to folder, one block in memory at a time; return the report.

    Raises RunError, CheckpointError and ModelError; whatever happens, the output is complete or absent and finished
    blocks are kept.
    """
    resumed_at = journal.begin(fingerprint(job, folder))
    records: list[dict[str, Any]] = []
    location: dict[str, int] = {}
    for index, results, found in quantize_blocks(job, journal, resumed_at):
        records += found
        location.update(dict.fromkeys(results, index))
        del results
    content = journal_content(job, folder, journal, location, records)

    def write() -> None:
        with complete_folder(journal.output, scratch=journal.path / "output") as draft:
            exporter.save(content, draft)
        journal.finish()

    job.ranks.first(write)
    report = {**job.describe(), "format": exporter.name, "layers": records, "output": str(journal.output)}
    job.tell("qcore_run_finished", report=report)
    return report


def journal_content(
    job: Job, folder: ModelFolder, journal: Journal, location: Mapping[str, int], records: list[dict[str, Any]]
) -> Content:
    """The finished run as a stream: quantized linears from the journal, everything else from the source folder.

    Tensors take the names that transformers writes, whatever prefix the source checkpoint left out.
    """
    assert isinstance(job.weights, FolderWeights)
    weights, names = job.weights, Names(job.model)
    on_disk = {names.layer_on_disk(name): name for name in location}
    floats = {names.on_disk(name): name for name in weights.keys if name.rpartition(".")[0] not in location}
    strays = set(folder.tensors) - set(weights.keys.values())  # of no parameter: carried along

    def weight(key: str) -> QuantizedWeight:
        index = location[on_disk[key]]
        restored = journal.read_own(index, only=on_disk[key])
        if restored is None:
            raise RunError(f"{journal.path} lost block {index} while the output was being written.")
        return restored[0][on_disk[key]]

    specs = job.specs()
    act_order = {record["name"]: record["act_order"] for record in records}
    return Content(
        config={key: value for key, value in folder.config.items() if key != "quantization_config"},
        layers={
            key: LayerSpec(key, specs[name].config, specs[name].in_features, specs[name].out_features, act_order[name])
            for key, name in on_disk.items()
        },
        weight=weight,
        tensors=[*floats, *sorted(strays)],
        tensor=lambda key: weights.tensor(floats[key]) if key in floats else folder.tensor(key),
        provenance=provenance(*renamed(job.describe(), records, names.layer_on_disk)),
        files=folder.carried_files(),
    )
