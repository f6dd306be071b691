"""What a run will take, found by trying: one block of each kind quantized with a few batches, kept, written and read back.

Times are those of a block's own parts, and a straight line through two numbers of batches; memory is the process's peak during
the trial and what more batches add. The tokens are random: no calibration has to be made, and its making is not counted.
"""

from __future__ import annotations

import tempfile
import time
from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import torch

from ..calibration import Calibration, TokenSequence
from ..checkpoint import ModelFolder
from ..exporter import Content, Exporter
from ..journal import Journal
from ..memory import limited
from ..plan import Job, shape_of
from ..run import _Inputs, _move_on, _quantize, _Work, journal_content
from ..streaming import FolderWeights

#: a trial of one batch that takes longer than this many seconds is not repeated, and the longer one is of two batches
PATIENCE = 10.0
#: batches of the longer trial at most
BATCHES = 8


@dataclass
class Trial:
    """One block tried: seconds of its parts, bytes of memory at its worst, and what of them grows with the batches."""

    batches: int
    capture: float
    fetch: float
    quantize: float  # and send the hidden states through
    keep: float  # pack it and write it to the journal
    write: float  # write it to the output and read it back
    gpu: int
    host: int
    hidden: int  # hidden states
    memo: int  # outputs kept between replays


def probe(
    job: Job, folder: ModelFolder, exporter: Exporter, samples: int, seqlen: int, scratch: Path | None
) -> dict[str, Any]:
    """Return {"seconds", "parts": the same apart, "gpu_memory", "host_memory", "batches"} of a run of this job.

    scratch: a folder on the disk that the run would write to, or None.
    """
    calibration = random_calibration(job, samples if job.algorithm.uses_calibration else 0, seqlen)
    parts: dict[str, float] = {"capture": 0, "fetch": 0, "quantize": 0, "keep": 0, "write": 0}
    memory = {"gpu": 0, "host": 0}
    on_gpu = job.device.type == "cuda"
    with tempfile.TemporaryDirectory(dir=scratch, prefix=".qcore-probe-") as place, limited(job.device, job.room.limit):
        trials = _Trials(job, folder, exporter, calibration, Path(place))
        batches = trials.batches
        parts["write"] += trials.write_floats()
        for indices, times in _kinds(job):
            few, many = trials.two(indices)
            slope = (many.quantize - few.quantize) / max(1, many.batches - few.batches)
            quantize = many.quantize + max(0.0, slope) * (batches - many.batches)
            parts["capture"] = many.capture * batches / max(1, many.batches)
            parts["quantize"] += times * quantize
            parts["write"] += times * many.write
            for part, seconds in (("fetch", many.fetch), ("keep", many.keep)):  # beside the work of a GPU
                parts[part] += times * max(0.0, seconds - (quantize if on_gpu else 0))
            hidden, memo = _growth(many, batches, job.room.memo_bytes)
            beside = hidden if trials.on_host else 0  # a GPU
            memory["gpu"] = max(memory["gpu"], many.gpu + memo + hidden - beside)
            memory["host"] = max(memory["host"], many.host + (beside if on_gpu else hidden + memo))
    return {
        "seconds": sum(parts.values()),
        "parts": parts,
        "gpu_memory": memory["gpu"] if on_gpu else 0,
        "host_memory": memory["host"],
        "batches": batches,
    }


def random_calibration(job: Job, samples: int, seqlen: int) -> Calibration:
    """Token ids as many as the run's, of no meaning."""
    vocabulary = int(job.model.get_input_embeddings().weight.shape[0])  # type: ignore[operator]
    ids = torch.randint(0, vocabulary, (samples, seqlen), generator=torch.Generator().manual_seed(0))
    return Calibration([TokenSequence(row) for row in ids])


def _kinds(job: Job) -> list[tuple[list[int], float]]:
    """Blocks to try, as many at once as the algorithm takes, and how often such blocks are there."""
    kinds: dict[str, list[int]] = {}
    for index, (name, block) in enumerate(job.blocks):
        linears = [f"{name}.{short}" for stage in job.adapter.stages_in(block) for group in stage for short in group]
        shapes = [(shape_of(job.model.get_submodule(full)), str(job.linears[full])) for full in linears]
        kinds.setdefault(repr(shapes), []).append(index)
    at_once = job.algorithm.blocks_at_once
    return [(indices[:at_once], len(indices) / len(indices[:at_once])) for indices in kinds.values()]


def _growth(trial: Trial, batches: int, memo_bytes: int) -> tuple[int, int]:
    """Bytes that hidden states take more with all batches, and outputs kept between replays, which memo_bytes limits."""
    if not trial.batches:
        return 0, 0
    hidden = trial.hidden * batches // trial.batches - trial.hidden
    return hidden, max(0, min(memo_bytes, trial.memo * batches // trial.batches) - trial.memo)


class _Trials:
    """Tries blocks of a job; what they write goes to `place`."""

    def __init__(
        self, job: Job, folder: ModelFolder, exporter: Exporter, calibration: Calibration, place: Path
    ) -> None:
        self.job, self.folder, self.exporter, self.calibration, self.place = job, folder, exporter, calibration, place
        self.batches = len(calibration.batches(job.batch_size)) if calibration.sequences else 0
        self.on_host = job.algorithm.keep_on_host or job.room.keep != "device"

    def two(self, indices: Sequence[int]) -> tuple[Trial, Trial]:
        """Try blocks with one batch and with several (or twice without any)."""
        few = self.once(indices, min(1, self.batches))
        patient = few.quantize < PATIENCE
        if patient:  # what is compiled and allocated for the first time is no part of the line
            few = self.once(indices, few.batches)
        more = min(self.batches, max(2, min(BATCHES, int(PATIENCE / max(few.quantize, 1e-9)))))
        return few, self.once(indices, more) if more > few.batches else few

    def once(self, indices: Sequence[int], count: int) -> Trial:
        """Try blocks with `count` batches."""
        job, seconds = self.job, _Stopwatch(self.job.device)
        _reset_peaks(job.device)
        sequences = self.calibration.sequences[: count * job.batch_size]
        inputs = _Inputs(job, Calibration(sequences)) if count else None
        capture = seconds.lap()
        for index in indices:
            job.weights.expect(job.blocks[index][0], job.device)
        try:
            work = _Work(job, indices, inputs)
            fetch = seconds.lap()
            done = work.attempt(partial(_quantize, job, indices=indices))
            memo = job.room.memo_bytes - work.block.memo_bytes
            if inputs is not None:
                _move_on(inputs, {name: weight for results, _ in done for name, weight in results.items()}, work.block)
        finally:
            for index in indices:
                job.weights.let_go(job.blocks[index][0])
        del work
        quantize = seconds.lap()
        journal = Journal(self.place / "out", fresh=True)
        for index, (results, records) in zip(indices, done, strict=True):
            journal.write_block(index, results, records)
        keep = seconds.lap()
        gpu = torch.cuda.max_memory_allocated(job.device) if job.device.type == "cuda" else 0
        streams = [inputs.captured.stream, inputs.float_inputs] if inputs is not None else []
        hidden = sum(each.nbytes for stream in streams if stream for each in stream.hidden)
        del inputs, streams
        location = {name: index for index, (results, _) in zip(indices, done, strict=True) for name in results}
        records = [record for _, records in done for record in records]
        del done, results
        content = replace(journal_content(job, self.folder, journal, location, records), tensors=[])
        seconds.lap()
        self._save(content)
        write = seconds.lap()
        journal.finish()
        return Trial(count, capture, fetch, quantize, keep, write, gpu, _peak(), hidden, memo)

    def write_floats(self) -> float:
        """Seconds that copying everything beside the quantized linears takes; nothing is quantized for it."""
        weights = self.job.weights
        assert isinstance(weights, FolderWeights)
        seconds = _Stopwatch(self.job.device)
        with (self.place / "floats").open("wb") as file:
            for name in weights.keys:
                if self.job.linears.get(name.rpartition(".")[0]) is None:
                    file.write(weights.tensor(name).contiguous().view(-1).view(torch.uint8).numpy().data)
        return seconds.lap()

    def _save(self, content: Content) -> None:
        draft = self.place / "draft"
        draft.mkdir()
        self.exporter.save(content, draft)
        for file in draft.iterdir():
            file.unlink()
        draft.rmdir()


class _Stopwatch:
    """Seconds since the last lap, the device's work done."""

    def __init__(self, device: torch.device) -> None:
        self.device, self.last = device, time.perf_counter()

    def lap(self) -> float:
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)
        now = time.perf_counter()
        spent, self.last = now - self.last, now
        return spent


def _reset_peaks(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
    Path("/proc/self/clear_refs").write_text("5")  # the kernel forgets the process's highest resident size


def _peak() -> int:
    """Bytes of the process's highest resident size."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith("VmHWM")) * 1024
