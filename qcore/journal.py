"""What a run writes down: the journal that lets it resume, the fingerprint that tells runs apart, where a folder came from."""

from __future__ import annotations

import fcntl
import hashlib
import json
import os
import shutil
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch import nn

from .calibration import Calibration, TokenSequence
from .checkpoint import ModelFolder
from .config import QuantConfig
from .errors import QcoreError, RunError
from .files import check_output, disk_errors, read_json, write_atomic, write_json
from .plan import Job
from .ranks import Ranks
from .weight import QuantizedWeight

#: what a block comes to: the weights of its linears by name, and a record of each
Result = tuple[dict[str, QuantizedWeight], list[dict[str, Any]]]


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
        try:
            check_output(self.output)  # once more: another run may have finished it since
        except QcoreError:
            self.close()
            raise
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

    def read_block(self, index: int) -> Result | None:
        """Return a finished block, or None."""
        return self.ranks.first(lambda: self.read_own(index))

    def read_own(self, index: int, only: str | None = None) -> Result | None:
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
        "calibration": calibration_facts(job.calibration) if job.calibration else None,
        "run": {
            "seed": job.seed,
            "batch_size": job.batch_size_alone,
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


def calibration_facts(calibration: Calibration) -> dict[str, Any]:
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
    layers = [{key: value for key, value in record.items() if key != "seconds"} for record in records]
    return {**versions, **description, "layers": layers}
