"""A quantization run: the plan, the walk over the blocks, the journal that lets it resume.

A run that writes to a folder keeps a journal beside it, `OUT.partial`: one file per finished block and the calibration
tokens. Killed anywhere, it resumes at the first block without a file and ends in the same bytes. Only when
everything is there is the output assembled, verified and renamed into place.
"""

from __future__ import annotations

import contextlib
import ctypes
import fcntl
import hashlib
import json
import logging
import os
import shutil
import time
from collections import deque
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any, TypeVar

import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch import nn

from . import blocks as walk
from .adapter import ModelAdapter, discover, find_block_list
from .algorithm import Algorithm
from .calibration import Calibration, TokenSequence
from .checkpoint import ModelFolder, complete_folder, disk_errors, read_json, write_atomic, write_json
from .config import Override, QuantConfig, resolve
from .errors import ConfigError, ModelError, RunError, name_list
from .exporter import Content, Exporter, LayerSpec
from .linear import QuantLinear
from .memory import Room, is_out_of_memory, keeper, limited
from .model import FolderWeights, Names, Weights, compute_dtype, refuse_encoder_decoder
from .plugins import Plugins
from .ranks import Ranks
from .weight import QuantizedWeight

T = TypeVar("T")
_log = logging.getLogger("qcore")


@dataclass
class Job:
    """Everything a run needs, checked: made by `plan`, used by `quantize_blocks`."""

    model: nn.Module
    weights: Weights
    adapter: ModelAdapter
    algorithm: Algorithm
    config: QuantConfig
    linears: dict[str, QuantConfig | None]  # by full name, in model order; None stays in float
    device: torch.device
    dtype: torch.dtype  # of the computation
    seed: int
    room: Room
    calibration: Calibration | None
    label: str  # the model, as the user called it
    blocks: list[tuple[str, nn.Module]] = field(default_factory=list)
    ranks: Ranks = field(default_factory=Ranks)

    @property
    def batch_size(self) -> int:
        """Sequences per forward pass."""
        return self.room.batch_size

    def specs(self) -> dict[str, LayerSpec]:
        """What a format is asked about before any work is done."""
        specs = {}
        for name, config in self.linears.items():
            if config is not None:
                out, columns = shape_of(self.model.get_submodule(name))
                specs[name] = LayerSpec(name, config, columns, out)
        return specs

    def describe(self) -> dict[str, Any]:
        """The settled facts of the run, as they stand in reports and in the output's provenance."""
        return {
            "model": self.label,
            "model_type": str(getattr(getattr(self.model, "config", None), "model_type", "")),
            "adapter": self.adapter.name,
            "assumed": list(self.adapter.notes),
            "algorithm": self.algorithm.name,
            "params": self.algorithm.params.model_dump(mode="json"),
            "facts": self.algorithm.facts(self.device),
            "config": self.config.model_dump(),
            "seed": self.seed,
            "calibration": self.calibration.report if self.calibration else None,
            "skipped": [name for name, config in self.linears.items() if config is None],
        }


def shape_of(linear: nn.Module) -> tuple[int, int]:
    """[out, in] of a linear that may be on the meta device."""
    weight = linear.weight
    assert isinstance(weight, torch.Tensor)
    rows, columns = weight.shape
    return (rows, columns) if isinstance(linear, nn.Linear) else (columns, rows)


def plan_linears(
    model: nn.Module, adapter: ModelAdapter, config: QuantConfig, overrides: Sequence[Override]
) -> dict[str, QuantConfig | None]:
    """Give each linear of each block its config, in order of use."""
    names = [
        f"{block_name}.{short}"
        for block_name, block in adapter.find_blocks(model)
        for group in adapter.groups_in(block)
        for short in group
    ]
    return resolve(names, config, overrides)


def find_adapter(
    model: nn.Module,
    weights: Weights,
    plugins: Plugins,
    device: torch.device,
    wanted: str | ModelAdapter | None = None,
) -> ModelAdapter:
    """Return the adapter given, the one by name, the one declared for the model's type, or one made by looking (the generic adapter)."""
    if isinstance(wanted, ModelAdapter):
        return wanted
    if wanted == "generic":
        return discover_adapter(model, weights, device)
    if wanted is not None:
        chosen: ModelAdapter = plugins.get("model", wanted)
        return chosen
    declared: ModelAdapter | None = plugins.adapter_for(str(getattr(model.config, "model_type", "")))
    return declared or discover_adapter(model, weights, device)


def discover_adapter(model: nn.Module, weights: Weights, device: torch.device) -> ModelAdapter:
    """Watch one short forward pass through every kind of block the model has."""
    dtype = compute_dtype(_model_dtype(model), device)

    def order_of_use(blocks_name: str) -> list[list[tuple[str, ...]]]:
        blocks = list(model.get_submodule(blocks_name).children())
        ids = torch.arange(8).reshape(1, 8) % _vocabulary(model)
        captured = capture_inputs(model, weights, blocks_name, (), blocks, [(ids, None)], device, dtype)
        kinds: dict[tuple[str, ...], list[tuple[str, ...]]] = {}
        for index, block in enumerate(blocks):
            kind = tuple(name for name, _ in block.named_modules())
            if kind in kinds:
                continue
            name = f"{blocks_name}.{index}"
            weights.bring(name, device, dtype)
            kwargs = walk._own(captured.kwargs[index][0], device)
            walk.check_causal(block, captured.stream.hidden[0].to(device), kwargs, type(model).__name__)
            with walk.all_experts(block):
                kinds[kind] = walk.order_of_use(block, captured.stream.hidden[0].to(device), kwargs)
            weights.let_go(name)
        return list(kinds.values())

    return discover(model, order_of_use)


def _model_dtype(model: nn.Module) -> torch.dtype:
    return next((p.dtype for p in model.parameters() if p.is_floating_point()), torch.float32)


def _vocabulary(model: nn.Module) -> int:
    embeddings = getattr(model, "get_input_embeddings", lambda: None)()
    size = getattr(embeddings, "num_embeddings", None) or getattr(model.config, "vocab_size", None)
    if not isinstance(size, int):
        raise ModelError(f"{type(model).__name__} does not tell the size of its vocabulary.")
    return size


def capture_inputs(
    model: nn.Module,
    weights: Weights,
    blocks_name: str,
    before_blocks: Sequence[str],
    blocks: Sequence[nn.Module],
    batches: Sequence[tuple[torch.Tensor, torch.Tensor | None]],
    device: torch.device,
    dtype: torch.dtype,
    keep: Callable[[torch.Tensor], torch.Tensor] | None = None,
) -> walk.Captured:
    """Bring in what stands before the blocks, record the blocks' inputs, and let go again.

    keep: puts hidden states where they stay between uses; without it, on the device.
    """
    brought: list[str] = []
    try:
        for name in before_blocks or outside(model, blocks_name):
            if _has_module(model, name):
                brought.append(name)
                weights.bring(name, device, dtype)
        return walk.capture(model, blocks, batches, device, keep or keeper(device, "device"))
    finally:
        for name in brought:
            weights.let_go(name)


def outside(model: nn.Module, blocks_name: str) -> list[str]:
    """Names of the modules beside the blocks, without the output head, which runs after them."""
    names: list[str] = []
    head = getattr(model, "get_output_embeddings", lambda: None)()
    path = blocks_name.split(".")
    for depth in range(len(path)):
        parent = ".".join(path[:depth])
        for child, module in model.get_submodule(parent).named_children():
            if child != path[depth] and module is not head:
                names.append(f"{parent}.{child}" if parent else child)
    return names


def _has_module(model: nn.Module, name: str) -> bool:
    try:
        model.get_submodule(name)
    except AttributeError:
        return False
    return True


class _Inputs:
    """The calibration as it stands between two blocks: the streams of hidden states and what blocks are called with."""

    def __init__(self, job: Job, calibration: Calibration) -> None:
        self.job, batches = job, calibration.batches(job.batch_size)
        self.count = len(batches)  # of all processes
        self.batches = [batches[number] for number in share_of(job, self.count)]
        self.keep = "host" if job.algorithm.keep_on_host and job.room.keep == "device" else job.room.keep
        self.captured = self._capture(keeper(job.device, self.keep))
        self.float_inputs: walk.Stream | None = None
        if job.algorithm.float_stream:
            copy = keeper(job.device, self.keep)
            self.float_inputs = walk.Stream([copy(hidden.clone()) for hidden in self.captured.stream.hidden])

    def _capture(self, keep: Callable[[torch.Tensor], torch.Tensor]) -> walk.Captured:
        job, adapter = self.job, self.job.adapter
        modules = [module for _, module in job.blocks]
        return capture_inputs(
            job.model, job.weights, adapter.blocks, adapter.before_blocks, modules, self.batches, job.device, job.dtype, keep
        )  # fmt: skip

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

    def __init__(self, job: Job, indices: Sequence[int], inputs: _Inputs | None, journal: Journal | None) -> None:
        self.job, self.indices, self.inputs, self.journal = job, indices, inputs, journal
        alone = job.ranks.size == 1
        while inputs and journal and alone and inputs.size > journal.most_at(indices[0], inputs.size):
            inputs.shrink("as it did when this run was here before")
        self.block = self._set_up()

    def _set_up(self) -> walk.Block:
        for index in self.indices:
            self.job.weights.let_go(self.job.blocks[index][0])
            self.job.weights.bring(self.job.blocks[index][0], self.job.device, self.job.dtype)
        captured, float_inputs = (self.inputs.captured, self.inputs.float_inputs) if self.inputs else (None, None)
        return _block_at(self.job, self.indices, captured, float_inputs, self.inputs.count if self.inputs else 0)

    def attempt(self, step: Callable[[walk.Block], T]) -> T:
        """Return step(block), begun again with smaller batches when memory runs out."""
        while True:
            try:
                return step(self.block)
            except (RuntimeError, MemoryError) as error:
                if self.inputs is None or not is_out_of_memory(error):
                    raise
                reason = str(error).splitlines()[0] if str(error) else type(error).__name__
            del self.block  # and, with the error, all that it held
            self.inputs.shrink(reason)
            if self.journal:
                self.journal.note_most(self.indices[0], self.inputs.size)
            self.block = self._set_up()


def quantize_blocks(
    job: Job, journal: Journal | None, finished: Callable[[int, list[dict[str, Any]]], None]
) -> Iterator[tuple[int, dict[str, QuantizedWeight], list[dict[str, Any]]]]:
    """Walk the blocks; yield (index, quantized weights, records) for each, resumed ones included.

    Without a journal the weights are on the CPU. `finished` is told of every newly quantized block.
    """
    at_once, heap = job.algorithm.blocks_at_once, 0
    with limited(job.device, job.room.limit), _Behind(job, journal, finished) as behind:
        inputs = _Inputs(job, job.calibration) if job.calibration is not None else None
        for first in range(0, len(job.blocks), at_once):
            indices = list(range(first, min(first + at_once, len(job.blocks))))
            try:
                work = _Work(job, indices, inputs, journal)
                for index in range(indices[-1] + 1, min(indices[-1] + 1 + at_once, len(job.blocks))):
                    job.weights.expect(job.blocks[index][0], job.device)
                restored = [journal.read_block(index) if journal else None for index in indices]
                done = [each for each in restored if each is not None]
                if is_new := len(done) < len(indices):
                    done = work.attempt(partial(_quantize, job, indices=indices))
                for index, (results, records) in zip(indices, done, strict=True):
                    behind.take(index, results, records, is_new)
                if inputs is not None and indices[-1] + 1 < len(job.blocks):
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
    block.advance(inputs.captured.stream)


class _Behind:
    """Brings finished blocks to the host, packs and writes them on a thread of its own, while the next is quantized.

    A GPU's run may be one block ahead of it, a CPU's not at all. An error there is raised by the next `give`; whatever ends the
    run, what was taken is written first.
    """

    def __init__(
        self, job: Job, journal: Journal | None, finished: Callable[[int, list[dict[str, Any]]], None]
    ) -> None:
        self.journal, self.finished = journal, finished
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
                self.finished(index, records)
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


def _block_at(
    job: Job, indices: Sequence[int], captured: walk.Captured | None, float_inputs: walk.Stream | None, count: int
) -> walk.Block:
    """Set up the block that an algorithm sees: one of the model's, or several that run as one."""
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
    return walk.make_block(
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


def _quantize(
    job: Job, block: walk.Block, indices: Sequence[int]
) -> list[tuple[dict[str, QuantizedWeight], list[dict[str, Any]]]]:
    """Let the algorithm work on a block and check that it did all of it, in the form promised.

    Returns weights and records of each of the model's blocks that it stands for.
    """
    started = time.perf_counter()
    try:
        block.widen_starved()
        results = job.algorithm.quantize_block(block) if block.linears else {}
    except ModelError as error:
        if block.name in str(error):
            raise
        raise ModelError(f"block {block.name}: {error}") from error
    finally:
        block.narrow()
    seconds = (time.perf_counter() - started) / max(1, len(block.linears))
    if set(results) != set(block.linears):
        missing = sorted(set(block.linears) - set(results)) or sorted(set(results) - set(block.linears))
        raise RunError(
            f"algorithm {job.algorithm.name!r} returned {len(results)} of {len(block.linears)} linears of block "
            f"{block.name}; look at {name_list(missing)}."
        )
    results = block.agree(results)
    done: list[tuple[dict[str, QuantizedWeight], list[dict[str, Any]]]] = []
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


def without_times(records: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """Records as they go into an output folder: equal runs must write equal bytes."""
    return [{key: value for key, value in record.items() if key != "seconds"} for record in records]


class Journal:
    """The record of a run beside its output: what was asked for, the calibration tokens, each finished block.

    Of a run of several processes the first alone touches files; the others are told what it finds.

    Raises RunError when another run holds the journal, or when it belongs to a run that differs; the difference is named.
    """

    def __init__(self, output: Path, fresh: bool = False, ranks: Ranks | None = None) -> None:
        self.path = output.with_name(f"{output.name}.partial")
        self.output = output
        self.ranks = ranks or Ranks.alone()
        self.ranks.first(lambda: self._open(fresh))

    def _open(self, fresh: bool) -> None:
        with disk_errors(f"making {self.path}"):
            self.path.mkdir(parents=True, exist_ok=True)
            self._lock = (self.path / "lock").open("w")
        try:
            fcntl.flock(self._lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            self._lock.close()
            raise RunError(f"another run is writing {self.output} (it holds {self.path}/lock).") from None
        if fresh:
            for old in self.path.iterdir():
                if old.name != "lock":
                    shutil.rmtree(old) if old.is_dir() else old.unlink()

    def calibration(self, make: Callable[[], Calibration], asked: Mapping[str, Any]) -> Calibration:
        """Return the run's calibration: read back when it was made before, so that sampling is not repeated.

        Data held in memory (asked["source"] is None) is looked at again: `begin` tells whether it is the same.
        """
        return self.ranks.first(lambda: self._calibration(make, asked))

    def _calibration(self, make: Callable[[], Calibration], asked: Mapping[str, Any]) -> Calibration:
        path = self.path / "calibration.safetensors"
        if path.is_file() and asked["source"] is not None:
            with disk_errors(f"reading {path}"), safe_open(path, "pt") as handle:
                note = json.loads(handle.metadata()["qcore"])
                if note["asked"] == json.loads(json.dumps(asked)):
                    keys = set(handle.keys())
                    sequences = []
                    for number in range(note["count"]):
                        mask = handle.get_tensor(f"mask.{number}") if f"mask.{number}" in keys else None
                        sequences.append(TokenSequence(handle.get_tensor(f"ids.{number}"), mask))
                    return Calibration(sequences, note["report"])
        made = make()
        tensors = {f"ids.{n}": sequence.ids.clone() for n, sequence in enumerate(made.sequences)}
        tensors |= {f"mask.{n}": s.mask.clone() for n, s in enumerate(made.sequences) if s.mask is not None}
        note = {"asked": asked, "count": len(made.sequences), "report": made.report}
        if not self._blocks():  # a journal with blocks keeps the calibration they were made with
            write_atomic(path, lambda draft: save_file(tensors, draft, {"qcore": json.dumps(note)}))
        return made

    def begin(self, fingerprint: Mapping[str, Any]) -> int:
        """Start or resume; return how many blocks are done.

        Raises RunError when the journal belongs to a run with another fingerprint.
        """
        return self.ranks.first(lambda: self._begin(fingerprint))

    def _begin(self, fingerprint: Mapping[str, Any]) -> int:
        path = self.path / "run.json"
        current = json.loads(json.dumps(fingerprint))
        if path.is_file():
            before = read_json(path)
            for key in {**before, **current}:
                if before.get(key) != current.get(key) and self._blocks():
                    raise RunError(
                        f"{self.path} holds an unfinished run that differs in {key}: {_differ(before.get(key), current.get(key))}. "
                        "Run with the same settings to resume it, or start over with fresh=True (--fresh)."
                    )
        write_json(path, current)
        if not self._blocks():
            (self.path / "batches.json").unlink(missing_ok=True)
        return len(self._blocks())

    def note_most(self, block: int, size: int) -> None:
        """Keep how many sequences a batch had from this block on, after memory ran out: a resumed run adds up in the same order."""
        write_json(self.path / "batches.json", self._most() | {str(block): size})

    def most_at(self, block: int, size: int) -> int:
        """Return how many sequences a batch may have at this block, `size` at most."""
        return min([size, *(most for first, most in self._most().items() if int(first) <= block)])

    def _most(self) -> dict[str, int]:
        path = self.path / "batches.json"
        return read_json(path) if path.is_file() else {}

    def _blocks(self) -> list[Path]:
        return sorted(self.path.glob("block-*.safetensors"))

    def _block(self, index: int) -> Path:
        return self.path / f"block-{index:05d}.safetensors"

    def write_block(self, index: int, results: Mapping[str, QuantizedWeight], records: list[dict[str, Any]]) -> None:
        """Keep a finished block, atomically."""
        if self.ranks.rank > 0:
            return
        tensors = {
            f"{name}/{part}": t.clone(memory_format=torch.contiguous_format)
            for name, weight in results.items()
            for part, t in weight.to_tensors().items()
        }
        configs = {name: weight.config.model_dump() for name, weight in results.items()}
        note = {"qcore": json.dumps({"configs": configs, "records": records})}
        write_atomic(self._block(index), lambda draft: save_file(tensors, draft, note))

    def read_block(self, index: int) -> tuple[dict[str, QuantizedWeight], list[dict[str, Any]]] | None:
        """Return a finished block, or None."""
        return self.ranks.first(lambda: self.read_own(index))

    def read_own(
        self, index: int, only: str | None = None
    ) -> tuple[dict[str, QuantizedWeight], list[dict[str, Any]]] | None:
        """As `read_block`, for the first process alone. only: one of the block's linears, the others left out."""
        path = self._block(index)
        if not path.is_file():
            return None
        with disk_errors(f"reading {path}"), safe_open(path, "pt") as handle:
            note = json.loads(handle.metadata()["qcore"])
            configs = {n: QuantConfig(**each) for n, each in note["configs"].items() if only in (None, n)}
            parts: dict[str, dict[str, torch.Tensor]] = {name: {} for name in configs}
            for key in handle.keys():  # noqa: SIM118 (a handle is no dict)
                name, _, part = key.rpartition("/")
                if name in parts:
                    parts[name][part] = handle.get_tensor(key).clone()
        return {name: QuantizedWeight.from_tensors(parts[name], configs[name]) for name in configs}, note["records"]

    def finish(self) -> None:
        """Remove the journal; its output is in place."""
        if self.ranks.rank > 0:
            return
        self._lock.close()
        shutil.rmtree(self.path, ignore_errors=True)

    def close(self) -> None:
        """Leave the journal for a later run; one that holds nothing yet goes."""
        if self.ranks.rank > 0:
            return
        if [path.name for path in self.path.glob("*")] == ["lock"]:
            shutil.rmtree(self.path, ignore_errors=True)
        self._lock.close()


def same_everywhere(ranks: Ranks, facts: Mapping[str, Any]) -> None:
    """Raise RunError on every process when they were not started with the same model, settings and calibration."""
    first = ranks.first(lambda: dict(facts))
    key = next((key for key in {**first, **facts} if first.get(key) != facts.get(key)), None)
    difference = key and f"{key}: {_differ(first.get(key), facts.get(key), 'is', 'there')}"
    for rank, found in enumerate(ranks.gather(difference)):
        if found:
            raise RunError(
                f"rank {rank} was started with something else than rank 0: {found}. "
                "Give every process the same model, settings and calibration."
            )


def _differ(before: Any, current: Any, earlier: str = "was", later: str = "now") -> str:
    """Show where two fingerprint values differ, as narrowly as possible."""
    if isinstance(before, dict) and isinstance(current, dict):
        keys = [key for key in {**before, **current} if before.get(key) != current.get(key)]
        return "; ".join(f"{key} {earlier} {before.get(key)!r}, {later} {current.get(key)!r}" for key in keys[:3])
    return f"{earlier} {before!r}, {later} {current!r}"


def fingerprint(job: Job, folder: ModelFolder | None) -> dict[str, Any]:
    """What must be equal for a journal's blocks to be this run's blocks, and for processes to share a run."""
    import transformers

    from . import __version__

    described = job.describe()
    return {
        "model": {"weights": model_digest(folder), "config": folder.config} if folder else module_digest(job.model),
        "linears": {name: config and config.model_dump() for name, config in job.linears.items()},
        "algorithm": {"name": described["algorithm"], **described["params"], **described["facts"]},
        "calibration": _calibration_facts(job.calibration) if job.calibration else None,
        "run": {
            "seed": job.seed,
            "batch_size": job.batch_size,
            "adapter": job.adapter.name,
            "deterministic": job.ranks.deterministic,
        },
        "environment": {
            "qcore": __version__,
            "torch": torch.__version__,
            "transformers": transformers.__version__,
            "device": job.device.type,
            "dtype": str(job.dtype),
            "threads": torch.get_num_threads() if job.device.type == "cpu" else None,
        },
    }


def _calibration_facts(calibration: Calibration) -> dict[str, Any]:
    """What was asked for, which tells a user more than the digest, and the digest of what it came to."""
    sources = [source["source"] for source in calibration.report.get("sources", [])]
    return {**calibration.report.get("asked", {}), "sources": sources, "digest": calibration.digest}


def model_digest(folder: ModelFolder) -> str:
    """sha256 over every tensor's name, dtype, shape and three samples of its bytes: tells models apart in a blink."""
    hasher = hashlib.sha256()
    for name, info in sorted(folder.tensors.items()):
        hasher.update(f"{name} {info.dtype} {info.shape}".encode())
    for file in sorted({info.file for info in folder.tensors.values()}):
        path = folder.path / file
        size = path.stat().st_size
        count = sum(info.file == file for info in folder.tensors.values())
        hasher.update(str(size).encode())
        with disk_errors(f"reading {path}"), path.open("rb") as handle:
            step = max(4096, size // (3 * count + 1))
            for offset in range(0, size, step):
                hasher.update(os.pread(handle.fileno(), 4096, offset))
    return hasher.hexdigest()


def module_digest(model: nn.Module) -> str:
    """sha256 over every tensor's name, dtype, shape and some of its values, of a model in memory."""
    hasher = hashlib.sha256()
    for name, tensor in model.state_dict().items():
        few = tensor.reshape(-1)[:: max(1, tensor.numel() // 64)].cpu()
        hasher.update(f"{name} {tensor.dtype} {tuple(tensor.shape)} {few.tolist()}".encode())
    return hasher.hexdigest()


def quantize_to_folder(
    job: Job, folder: ModelFolder, journal: Journal, exporter: Exporter, plugins: Plugins
) -> dict[str, Any]:
    """Quantize from folder to folder, one block in memory at a time; return the report.

    Raises RunError, CheckpointError and ModelError; whatever happens, the output is complete or absent and finished
    blocks are kept.
    """
    assert isinstance(job.weights, FolderWeights)
    done = journal.begin(fingerprint(job, folder))
    started = {"blocks": len(job.blocks), "linears": len(job.linears), "resumed_at": done, **job.describe()}
    tell = plugins.call if job.ranks.rank == 0 else _nobody
    tell("qcore_run_started", plan=started)
    records: list[dict[str, Any]] = []
    location: dict[str, int] = {}
    for index, results, found in quantize_blocks(job, journal, _announce(tell)):
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
    tell("qcore_run_finished", report=report)
    return report


def _nobody(hook: str, **facts: Any) -> None:
    """In the place of the plugins on processes other than the first: one run has one course of events."""


def _announce(tell: Callable[..., Any]) -> Callable[[int, list[dict[str, Any]]], None]:
    def finished(index: int, records: list[dict[str, Any]]) -> None:
        tell("qcore_block_finished", index=index, records=records)

    return finished


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


def renamed(
    description: Mapping[str, Any], records: Sequence[Mapping[str, Any]], rename: Callable[[str], str]
) -> tuple[dict[str, Any], list[dict[str, Any]]]:
    """Give the linears of a report other names: the model's own in memory, those on disk in a folder."""
    skipped = {"skipped": [rename(name) for name in description["skipped"]]} if "skipped" in description else {}
    return {**description, **skipped}, [{**record, "name": rename(record["name"])} for record in records]


def provenance(description: Mapping[str, Any], records: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """What `qcore.json` says: how the folder was made, free of times so that equal runs write equal bytes."""
    import transformers

    from . import __version__

    versions = {"qcore": __version__, "torch": torch.__version__, "transformers": transformers.__version__}
    return {**versions, **description, "layers": without_times(records)}


def check_model(model: nn.Module, folder: ModelFolder | None) -> None:
    """Refuse a model that is quantized already."""
    quantization = getattr(getattr(model, "config", None), "quantization_config", None)
    quantization = quantization or (folder.config.get("quantization_config") if folder else None)
    if quantization:
        method = quantization.get("quant_method") if isinstance(quantization, dict) else type(quantization).__name__
        raise ModelError(f"the model is quantized already ({method}). Start from the float model.")
    if any(isinstance(module, QuantLinear) for module in model.modules()):
        raise ModelError("the model is quantized already (it has QuantLinears). Start from the float model.")
    refuse_encoder_decoder(getattr(model, "config", None), type(model).__name__)
    find_block_list(model)


def check_format(job: Job, exporter: Exporter) -> None:
    """Refuse, before any work, what the wanted format cannot hold."""
    for spec in job.specs().values():
        reason = exporter.why_not(spec)
        if reason:
            raise ConfigError(
                f"format {exporter.name!r} cannot hold {spec.name} ({spec.out_features}x{spec.in_features}, "
                f"{spec.config}): {reason}. Change it with an override (or skip it), or choose another format."
            )
    config = getattr(job.model, "config", None)
    described = config.to_dict() if config is not None and hasattr(config, "to_dict") else {}
    reason = exporter.why_not_model(described) or exporter.why_not_together(list(job.specs().values()))
    if reason:
        raise ConfigError(f"format {exporter.name!r} cannot hold this plan: {reason}. Choose another format.")
