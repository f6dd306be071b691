"""Calibration: text, tokens or a named dataset to batches of token ids.

Text is packed: documents are joined and cut into windows of `seqlen`, so there is no padding. Sequences given as
token ids stay as they are, and an attention mask is honoured where one is given. What was asked for and what was used
is written down in `Calibration.report`.
"""

from __future__ import annotations

import hashlib
import itertools
import json
import math
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar

import torch
from torch import Tensor

from .errors import CalibrationError, ConfigError, name_list, suggest

if TYPE_CHECKING:
    from .plugins import Plugins


@dataclass(frozen=True)
class CalibrationRequest:
    """What a dataset is asked for. `float_model` opens the original model, for datasets that sample from it."""

    tokenizer: Any
    samples: int
    seqlen: int
    seed: int
    device: torch.device
    float_model: Callable[[], Any]


class CalibrationDataset(ABC):
    """Base of every named source of calibration data."""

    name: ClassVar[str]
    description: ClassVar[str] = ""

    @abstractmethod
    def load(self, request: CalibrationRequest) -> Iterable[str] | Iterable[Sequence[int]]:
        """Return documents of text, or finished sequences of token ids. Must depend on `request` alone."""


@dataclass(frozen=True)
class TokenSequence:
    """Token ids [length] int64, and a mask [length] bool of the tokens that count, or None for all."""

    ids: Tensor
    mask: Tensor | None = None


@dataclass(frozen=True)
class Calibration:
    """The sequences a run uses, and the account of how they came about."""

    sequences: list[TokenSequence]
    report: dict[str, Any] = field(default_factory=dict)

    @property
    def digest(self) -> str:
        """sha256 over all token ids and masks: what a resumed run compares."""
        hasher = hashlib.sha256()
        for sequence in self.sequences:
            hasher.update(sequence.ids.numpy().tobytes())
            hasher.update(b"-" if sequence.mask is None else sequence.mask.numpy().tobytes())
        return hasher.hexdigest()

    def batches(self, batch_size: int) -> list[tuple[Tensor, Tensor | None]]:
        """Return (ids [b, length], mask [b, length] bool or None), joining neighbours of equal length."""
        groups: dict[tuple[int, bool], list[TokenSequence]] = {}
        for sequence in self.sequences:
            groups.setdefault((len(sequence.ids), sequence.mask is not None), []).append(sequence)
        batches = []
        for (_, masked), members in groups.items():
            for start in range(0, len(members), batch_size):
                part = members[start : start + batch_size]
                mask = torch.stack([s.mask for s in part if s.mask is not None]) if masked else None
                batches.append((torch.stack([s.ids for s in part]), mask))
        return batches


def prepare(
    source: Any, request: CalibrationRequest, vocab_size: int, plugins: Plugins, longest: int | None = None
) -> Calibration:
    """Turn whatever the caller gave as calibration into sequences.

    source: a dataset plugin's name, a path to a text or JSON-lines file, a mixture "a:2,b" or {"a": 2, "b": 1}, a
    list of strings, an iterable of token-id sequences (or dicts with input_ids and attention_mask) or of batches of them
    [b, length], such as a DataLoader, or a `datasets`
    dataset with a "text" column. A hub name "org/name" or "org/name@split" is opened with the `datasets` library.
    longest: the longest sequence the model takes; seqlen is cut to it.

    Raises CalibrationError for too little text, empty input, or token ids beyond vocab_size.
    """
    if request.samples < 1 or request.seqlen < 2:
        raise ConfigError(f"samples={request.samples}, seqlen={request.seqlen}: expected at least 1 and 2.")
    if longest is not None and longest < request.seqlen:
        request = replace(request, seqlen=longest)
    parts = _parse_mixture(source)
    total = sum(parts.values()) if parts else 0
    sequences: list[TokenSequence] = []
    reports = []
    for part, share in parts.items() if parts else [(None, 1.0)]:
        wanted = max(1, round(request.samples * share / total)) if parts else request.samples
        asked = replace(request, samples=wanted)
        data, name = _open_source(source if part is None else part, asked, plugins)
        found, report = _to_sequences(data, asked, name)
        sequences += found
        reports.append({"source": name, **report})
    _check_ids(sequences, vocab_size)
    report = {
        "asked": {"samples": request.samples, "seqlen": request.seqlen, "seed": request.seed},
        "used": {"samples": len(sequences), "tokens": sum(_counted(s) for s in sequences)},
        "sources": reports,
    }
    return Calibration(sequences, report)


def _counted(sequence: TokenSequence) -> int:
    return len(sequence.ids) if sequence.mask is None else int(sequence.mask.sum())


def _parse_mixture(source: Any) -> dict[str, float]:
    """Return {name: weight} for strings and mappings of names, {} for anything that is data itself."""
    if isinstance(source, Path) or (isinstance(source, str) and Path(source).exists()):
        return {str(source): 1.0}
    if isinstance(source, Mapping) and not ("input_ids" in source or hasattr(source, "column_names")):
        pieces = [(str(name), weight) for name, weight in source.items()]
    elif isinstance(source, str):
        split = [piece.strip().partition(":") for piece in source.split(",")]
        pieces = [(name, weight if colon else 1.0) for name, colon, weight in split]
    else:
        return {}
    parts: dict[str, float] = {}
    for name, weight in pieces:
        try:
            parts[name] = float(weight)
        except (TypeError, ValueError):
            raise ConfigError(f"calibration {source!r}: {weight!r} is not a weight. Expected NAME:NUMBER,…") from None
        if not 0 < parts[name] < math.inf:
            raise ConfigError(f"calibration {source!r}: weights must be positive.")
    return parts


def identify(source: Any) -> dict[str, list[Any]] | None:
    """Tell a source from others without preparing it: {name: [weight, sha256 of a file]}; None for data in memory."""

    def content(name: str) -> str | None:
        path = Path(name)
        return hashlib.sha256(path.read_bytes()).hexdigest() if path.is_file() else None

    return {name: [weight, content(name)] for name, weight in _parse_mixture(source).items()} or None


def _open_source(source: Any, request: CalibrationRequest, plugins: Plugins) -> tuple[Any, str]:
    """Return the data of one source (documents or token sequences) and its name for the report."""
    if not isinstance(source, str):
        return source, type(source).__name__
    path = Path(source)
    if path.is_file():
        return _read_file(path), path.name
    names = plugins.offers("dataset")
    if source in names:
        return plugins.get("dataset", source).load(request), source
    if source.count("/") == 1 and not path.is_absolute():
        return _hub_dataset(source), source
    raise CalibrationError(
        f"calibration {source!r} is neither a dataset nor a file. {suggest(source, names)} "
        "Or give a text file, a JSON-lines file, or a list of strings or token ids."
    )


def _read_file(path: Path) -> list[str]:
    try:
        text = path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise CalibrationError(f"calibration file {path} cannot be read as UTF-8 text: {error}") from None
    if path.suffix != ".jsonl":
        return [text]
    documents = []
    for number, line in enumerate(text.splitlines(), 1):
        if not line.strip():
            continue
        try:
            row = json.loads(line)
        except json.JSONDecodeError as error:
            raise CalibrationError(f"{path} line {number} is not JSON: {error}") from None
        document = row if isinstance(row, str) else row.get("text") if isinstance(row, dict) else None
        if not isinstance(document, str):
            raise CalibrationError(f'{path} line {number}: expected a string or an object with a "text" string.')
        documents.append(document)
    return documents


def _hub_dataset(name: str) -> Any:
    try:
        from datasets import load_dataset
    except ImportError:
        raise CalibrationError(f"calibration {name!r} looks like a hub dataset: pip install datasets.") from None
    repository, _, split = name.partition("@")
    try:
        return load_dataset(repository, split=split or "train")
    except Exception as error:  # the library raises many unrelated types; all mean "not to be had"
        raise CalibrationError(f"dataset {name!r} cannot be opened: {error}") from None


def _to_sequences(data: Any, request: CalibrationRequest, name: str) -> tuple[list[TokenSequence], dict[str, Any]]:
    if hasattr(data, "column_names"):
        columns = data.column_names
        if "input_ids" not in columns and "text" not in columns:
            raise CalibrationError(f'dataset {name!r} has columns {columns}; expected "text" or "input_ids".')
        data = data if "input_ids" in columns else [row["text"] for row in data]
    if isinstance(data, Mapping) and "input_ids" in data:  # what a tokenizer returns for many texts
        data = _masked_rows(data)
    if isinstance(data, Tensor) and data.ndim == 2:
        data = list(data)
    if not isinstance(data, Iterable):
        raise CalibrationError(
            f"calibration {name!r} cannot be gone through. Give texts, token ids or batches of them."
        )
    rows = iter(data)  # those of a data loader may have no end
    start = list(itertools.islice(rows, 1))
    if not start:
        raise CalibrationError(
            f"calibration {name!r} is empty. Give at least one text or token sequence; an iterator that was read before has none left."
        )
    if isinstance(start[0], str) or isinstance(data, list):
        start += rows
    if all(isinstance(row, str) for row in start):
        return _pack_text(start, request, name)
    batches = start if isinstance(data, list) else itertools.chain(start, rows)
    return _take_tokens((row for batch in batches for row in _rows_of(batch)), request, name, isinstance(data, list))


def _rows_of(batch: Any) -> list[Any]:
    """Take apart what a data loader yields: tensors [b, length], or mappings of them."""
    if isinstance(batch, Tensor) and batch.ndim == 2:
        return list(batch)
    ids = batch.get("input_ids") if isinstance(batch, Mapping) else None
    return _masked_rows(batch) if isinstance(ids, Tensor) and ids.ndim == 2 else [batch]


def _masked_rows(batch: Mapping[str, Any]) -> list[Any]:
    """One mapping for each sequence of a mapping that has them all."""
    ids, masks = batch["input_ids"], batch.get("attention_mask")
    masks = [None] * len(ids) if masks is None else masks
    if len(masks) != len(ids):
        raise CalibrationError(f"calibration: a batch has {len(masks)} masks for {len(ids)} sequences.")
    return [{"input_ids": row, "attention_mask": mask} for row, mask in zip(ids, masks, strict=True)]


def _pack_text(texts: list[str], request: CalibrationRequest, name: str) -> tuple[list[TokenSequence], dict[str, Any]]:
    """Join the documents' tokens and draw `samples` windows, seeded, never overlapping."""
    if request.tokenizer is None:
        raise CalibrationError("calibration text needs a tokenizer: pass tokenizer=, or give token ids.")
    ids: list[int] = []
    for text in texts:
        ids += request.tokenizer(text)["input_ids"] if text else []
    windows = len(ids) // request.seqlen
    if windows == 0:
        raise CalibrationError(
            f"calibration {name!r} has {len(ids)} tokens, less than one window of seqlen={request.seqlen}. "
            "Give more text or a smaller seqlen."
        )
    generator = torch.Generator().manual_seed(request.seed)
    chosen = torch.randperm(windows, generator=generator)[: request.samples].sort().values
    flat = torch.tensor(ids[: windows * request.seqlen], dtype=torch.int64).view(windows, request.seqlen)
    report: dict[str, Any] = {"documents": len(texts), "tokens_found": len(ids), "samples": len(chosen)}
    if windows < request.samples:
        report["short"] = f"asked for {request.samples} samples, the text has {windows}"
    return [TokenSequence(flat[index].clone()) for index in chosen], report


def _take_tokens(
    rows: Iterable[Any], request: CalibrationRequest, name: str, to_the_end: bool
) -> tuple[list[TokenSequence], dict[str, Any]]:
    """Take `samples` sequences. to_the_end: look at the others too, and count them."""
    sequences: list[TokenSequence] = []
    number, dropped, cut = -1, 0, 0
    for number, row in enumerate(rows):
        sequence = _read_tokens(row, f"calibration {name!r}, sequence {number}")
        if len(sequence.ids) < 2 or _counted(sequence) < 1:
            dropped += 1
            continue
        if len(sequence.ids) > request.seqlen:
            cut += 1
            mask = None if sequence.mask is None else sequence.mask[: request.seqlen]
            sequence = TokenSequence(sequence.ids[: request.seqlen], mask)
        sequences.append(sequence)
        if len(sequences) == request.samples and not to_the_end:
            break
    if not sequences:
        raise CalibrationError(f"calibration {name!r}: all {number + 1} sequences are empty or of a single token.")
    unused = max(0, len(sequences) - request.samples)
    report: dict[str, Any] = {
        "samples": len(sequences) - unused, "dropped_empty": dropped, "cut_to_seqlen": cut, "not_needed": unused
    }  # fmt: skip
    if len(sequences) < request.samples:
        report["short"] = f"asked for {request.samples} samples, it ended after {len(sequences)}"
    return sequences[: request.samples], report


def _read_tokens(row: Any, where: str) -> TokenSequence:
    mask = None
    if isinstance(row, Mapping):
        if "input_ids" not in row:
            raise CalibrationError(f"{where}: expected a string or token ids, found a mapping of {name_list(row)}.")
        row, mask = row.get("input_ids"), row.get("attention_mask")
    try:
        ids = torch.as_tensor(row)
        ids = ids.reshape(-1) if ids.ndim <= 2 and (ids.ndim < 2 or ids.shape[0] == 1) else ids
    except (TypeError, ValueError, RuntimeError):
        raise CalibrationError(f"{where}: expected a string or token ids, found {type(row).__name__}.") from None
    if ids.ndim != 1 or (ids.numel() and (ids.is_floating_point() or ids.dtype == torch.bool)):
        raise CalibrationError(
            f"{where}: expected integers [length] or [1, length], found {ids.dtype} {list(ids.shape)}."
        )
    if mask is None:
        return TokenSequence(ids.long())
    try:
        given = torch.as_tensor(mask).reshape(-1)
    except (TypeError, ValueError, RuntimeError):
        given = torch.tensor([math.nan])
    keep = given == 1
    if not bool((keep | (given == 0)).all()):
        raise CalibrationError(f"{where}: attention_mask holds other values than 0 and 1, which say what counts.")
    if keep.shape != ids.shape:
        raise CalibrationError(f"{where}: attention_mask has {len(keep)} entries for {len(ids)} tokens.")
    return TokenSequence(ids.long(), None if bool(keep.all()) else keep)


def _check_ids(sequences: list[TokenSequence], vocab_size: int) -> None:
    for number, sequence in enumerate(sequences):
        low, high = int(sequence.ids.min()), int(sequence.ids.max())
        if low < 0 or high >= vocab_size:
            raise CalibrationError(
                f"calibration sequence {number} has token id {low if low < 0 else high}; the model's vocabulary "
                f"has 0 to {vocab_size - 1}. Was it made with another tokenizer?"
            )
