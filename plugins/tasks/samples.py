"""What the tasks that read prompts and labels share: options, rows, token limits, batches.

The options have the names of AutoGPTQ's evaluation tasks. Rows become samples of tokens, samples of similar length share
a batch, and a torch DataLoader hands the batches out. What was cut or dropped is counted, so that a result can say so.
"""

from __future__ import annotations

import copy
import csv
import json
import random
import warnings
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from pydantic import Field
from torch import Tensor
from torch.utils.data import DataLoader

from qcore import ConfigError, EvaluationError, Options

IGNORED = -100  # a position that nothing is predicted for, as in transformers


class SampleOptions(Options):
    """Where prompts and labels come from, and how many tokens they may take.

    data_name_or_path: a .jsonl, .json or .csv file, a hub name (with the `datasets` library), or rows themselves: a list of
        mappings, a mapping of lists, a datasets.Dataset. load_fn(data_name_or_path, **load_fn_kwargs): reads it instead.
    preprocess_fn(columns, **preprocess_fn_kwargs): turns columns (name -> list) into the columns that are used.
    prompt_col_name, label_col_name: the two columns used.
    num_samples: how many rows, drawn by `seed`. sample_max_len: tokens of a sample at most; the model's context limits it too.
    block_max_len: tokens of a batch at most, padding included.
    truncate_prompt: a sample too long loses the start of its prompt; otherwise the end of its label (language modeling) or
        it is left out (tasks that generate).
    add_eos_token: end every label with the end-of-text token.
    dataloader: finished batches instead of rows: mappings with input_ids, attention_mask and label (or labels).
    """

    data_name_or_path: Any = None
    load_fn: Callable[..., Any] | None = None
    load_fn_kwargs: dict[str, Any] = Field(default_factory=dict)
    preprocess_fn: Callable[..., Any] | None = None
    preprocess_fn_kwargs: dict[str, Any] = Field(default_factory=dict)
    prompt_col_name: str = "prompt"
    label_col_name: str | None = "label"
    num_samples: int = Field(128, ge=1)
    sample_max_len: int = Field(1024, ge=2)
    block_max_len: int = Field(2048, ge=2)
    truncate_prompt: bool = True
    add_eos_token: bool = False
    dataloader: Any = None
    seed: int = 0


@dataclass
class Sample:
    """One prompt and its label, as tokens and as text."""

    prompt: list[int]
    label: list[int]
    text: str


@dataclass
class Samples:
    """The samples of a task and the account of how they came about."""

    all: list[Sample]
    counts: dict[str, float] = field(default_factory=dict)


def read_rows(options: SampleOptions, what: str) -> list[tuple[str, str]]:
    """Return (prompt, label) of the rows that are used; a label column of None gives empty prompts and the text as label.

    Raises EvaluationError for data that cannot be read, is empty or lacks a column.
    """
    source = options.data_name_or_path
    if source is None and options.load_fn is None:
        raise ConfigError(f"task {what!r} needs data: give data_name_or_path (--data), or a dataloader.")
    data = options.load_fn(source, **options.load_fn_kwargs) if options.load_fn else open_rows(source, options)
    columns = _columns(_test_split(data), source)
    total = max((len(values) for values in columns.values()), default=0)
    if total == 0:
        raise EvaluationError(f"task {what!r}: the data {_shown(source)} is empty.")
    chosen = random.Random(options.seed).sample(range(total), min(total, options.num_samples))
    columns = {name: [values[index] for index in chosen] for name, values in columns.items()}
    if options.preprocess_fn:
        columns = options.preprocess_fn(columns, **options.preprocess_fn_kwargs)
    return _pairs(columns, options, what)


def _shown(source: Any) -> str:
    return repr(source) if isinstance(source, (str, Path)) else f"given as {type(source).__name__}"


def open_rows(source: Any, options: SampleOptions) -> Any:
    """Read a file of rows, or open a hub data set; rows themselves pass through."""
    if not isinstance(source, (str, Path)):
        return source
    path = Path(source)
    if not path.is_file():
        return _hub_rows(str(source), options)
    try:
        text = path.read_text(encoding="utf-8")
        if path.suffix == ".jsonl":
            return [json.loads(line) for line in text.splitlines() if line.strip()]
        if path.suffix == ".json":
            return json.loads(text)
        if path.suffix == ".csv":
            return list(csv.DictReader(text.splitlines()))
    except (OSError, ValueError, csv.Error) as error:
        raise EvaluationError(f"{path} cannot be read as {path.suffix[1:]}: {error}") from None
    raise EvaluationError(f"{path}: expected .jsonl, .json or .csv, or give load_fn.")


def _hub_rows(name: str, options: SampleOptions) -> Any:
    try:
        import datasets
    except ImportError:
        raise EvaluationError(f"{name!r} is no file; to open hub data: pip install 'qcore[datasets]'.") from None
    try:
        return datasets.load_dataset(name, **options.load_fn_kwargs)
    except Exception as error:  # the library raises many unrelated types; all mean "not to be had"
        raise EvaluationError(f"{name!r} is no file, and cannot be opened as a data set: {error}") from None


def _test_split(data: Any) -> Any:
    """Of a mapping of splits the one meant for evaluation."""
    if isinstance(data, Mapping) and data and all(hasattr(split, "column_names") for split in data.values()):
        for name in ("evaluation", "test", "validation", "train"):
            if name in data:
                return data[name]
        return next(iter(data.values()))
    return data


def _columns(data: Any, source: Any) -> dict[str, list[Any]]:
    """Rows or columns, whatever holds them, as columns."""
    if hasattr(data, "column_names"):
        return {name: list(data[name]) for name in data.column_names}
    if isinstance(data, Mapping) and all(isinstance(values, Sequence) for values in data.values()):
        return {name: list(values) for name, values in data.items()}
    if isinstance(data, Iterable) and not isinstance(data, (str, Mapping)):
        rows = list(data)
        if all(isinstance(row, Mapping) for row in rows):
            names = dict.fromkeys(name for row in rows for name in row)
            return {name: [row.get(name) for row in rows] for name in names}
    raise EvaluationError(f"the data {_shown(source)} are no rows: expected a list of mappings or a mapping of lists.")


def _pairs(columns: Any, options: SampleOptions, what: str) -> list[tuple[str, str]]:
    names = [name for name in (options.prompt_col_name, options.label_col_name) if name is not None]
    found = list(columns) if isinstance(columns, Mapping) else []
    missing = [name for name in names if name not in found]
    if missing:
        raise EvaluationError(
            f"task {what!r}: the data has no column {', '.join(map(repr, missing))}; it has "
            f"{', '.join(map(repr, found)) or 'none'}. Set prompt_col_name and label_col_name, or give a preprocess_fn."
        )
    texts = [[str(value) for value in columns[name]] for name in names]
    lengths = {len(each) for each in texts}
    if lengths == {0} or len(lengths) > 1:
        raise EvaluationError(
            f"task {what!r}: columns {names} hold {sorted(lengths)} values; expected equally many, not 0."
        )
    if options.label_col_name is None:
        return [("", text) for text in texts[0]]
    return list(zip(*texts, strict=True))


def tokenize(
    rows: Sequence[tuple[str, str]],
    tokenizer: Any,
    options: SampleOptions,
    model: Any,
    what: str,
    new_tokens: int | None,
) -> Samples:
    """Turn rows into samples within the limits.

    new_tokens: how many tokens the model will add to a prompt; None when the label itself is read by the model.
    Raises EvaluationError when nothing is left.
    """
    if tokenizer is None:
        raise EvaluationError(f"task {what!r} reads text, and the model has no tokenizer: pass tokenizer=.")
    limit = min(options.sample_max_len, context_length(model) or options.sample_max_len)
    samples, cut = [], 0
    for prompt, label in rows:
        sample = Sample(
            list(tokenizer(prompt)["input_ids"]) if prompt else [], _label_ids(tokenizer, prompt, label), label
        )
        if options.add_eos_token and tokenizer.eos_token_id is not None:
            sample.label.append(tokenizer.eos_token_id)
        excess = len(sample.prompt) + (len(sample.label) if new_tokens is None else new_tokens) - limit
        if excess > 0:
            fits = _shorten(sample, excess, options.truncate_prompt, new_tokens is None)
            cut += fits
            if not fits:
                continue
        samples.append(sample)
    counts = {"samples": len(samples), "truncated": cut, "dropped": len(rows) - len(samples)}
    if not samples:
        raise EvaluationError(
            f"task {what!r}: none of the {len(rows)} samples fits into {limit} tokens (sample_max_len="
            f"{options.sample_max_len}, context {context_length(model)}). Shorten the prompts or set truncate_prompt=True."
        )
    if cut or counts["dropped"]:
        message = (
            f"task {what!r}: {cut} of {len(rows)} samples were cut to {limit} tokens, {counts['dropped']} left out"
        )
        warnings.warn(message, stacklevel=2)
    return Samples(samples, counts)


def _label_ids(tokenizer: Any, prompt: str, label: str) -> list[int]:
    """The label's tokens: with the tokenizer's own start where it stands alone, without behind a prompt."""
    return list(tokenizer(label, add_special_tokens=not prompt)["input_ids"])


def _shorten(sample: Sample, excess: int, truncate_prompt: bool, label_is_read: bool) -> bool:
    """Cut a sample by `excess` tokens; whether something worth asking is left."""
    if truncate_prompt and len(sample.prompt) > excess:
        sample.prompt = sample.prompt[excess:]
        return True
    if label_is_read and len(sample.label) > excess:
        sample.label = sample.label[:-excess]
        return True
    return False


def context_length(model: Any) -> int | None:
    """The longest sequence the model's positions reach, where its config tells."""
    for name in ("max_position_embeddings", "n_positions", "max_seq_len", "seq_length"):
        value = getattr(model.config, name, None)
        if isinstance(value, int):
            return value
    return None


def batches(samples: Samples, options: SampleOptions, pad: int, label_is_read: bool) -> DataLoader[Any]:
    """A DataLoader of {"input_ids", "attention_mask", "label"}: neighbours in length together, block_max_len tokens each.

    label_is_read: the label follows its prompt, padding stands on the right, and label [n, length] is IGNORED elsewhere.
    Otherwise prompts stand on the right, ready to be continued, and label is a list of texts.
    """

    def length(sample: Sample) -> int:
        return len(sample.prompt) + (len(sample.label) if label_is_read else 0)

    order = sorted(range(len(samples.all)), key=lambda index: length(samples.all[index]))
    blocks: list[list[int]] = []
    for index in order:
        size = length(samples.all[index])
        if not blocks or (len(blocks[-1]) + 1) * size > options.block_max_len:
            blocks.append([])
        blocks[-1].append(index)
    collate = _collate_read if label_is_read else _collate_prompts
    return DataLoader(samples.all, batch_sampler=blocks, collate_fn=lambda part: collate(part, pad))  # type: ignore[arg-type]


def _collate_read(part: list[Sample], pad: int) -> dict[str, Any]:
    ids = [sample.prompt + sample.label for sample in part]
    width = max(map(len, ids))
    labels = [
        [IGNORED] * len(s.prompt) + s.label + [IGNORED] * (width - len(i)) for s, i in zip(part, ids, strict=True)
    ]
    return {
        "input_ids": torch.tensor([each + [pad] * (width - len(each)) for each in ids]),
        "attention_mask": torch.tensor([[1] * len(each) + [0] * (width - len(each)) for each in ids]),
        "label": torch.tensor(labels),
    }


def _collate_prompts(part: list[Sample], pad: int) -> dict[str, Any]:
    width = max(len(sample.prompt) for sample in part)
    return {
        "input_ids": torch.tensor([[pad] * (width - len(s.prompt)) + s.prompt for s in part]),
        "attention_mask": torch.tensor([[0] * (width - len(s.prompt)) + [1] * len(s.prompt) for s in part]),
        "label": [sample.text for sample in part],
    }


def checked(loader: Iterable[Any], what: str) -> Iterator[dict[str, Any]]:
    """The batches of a loader, which may be the caller's own, with the labels under "label".

    Raises EvaluationError for a batch that lacks something, and when there is none.
    """
    count = 0
    for count, batch in enumerate(loader, 1):
        found = dict(batch) if isinstance(batch, Mapping) else {}
        found.setdefault("label", found.get("labels"))
        missing = [name for name in ("input_ids", "attention_mask", "label") if found.get(name) is None]
        if missing:
            raise EvaluationError(
                f"task {what!r}: batch {count} of the dataloader has no {', '.join(missing)}; expected a mapping with input_ids, "
                "attention_mask and label."
            )
        yield found
    if count == 0:
        raise EvaluationError(f"task {what!r}: the dataloader is empty.")


def pad_token(tokenizer: Any) -> int:
    """A token to pad with; masked, so which one it is changes nothing."""
    for name in ("pad_token_id", "eos_token_id", "bos_token_id"):
        value = getattr(tokenizer, name, None)
        if isinstance(value, int):
            return value
    return 0


def generation_config(given: Any, tokenizer: Any, new_tokens: int) -> Any:
    """A GenerationConfig of its own with the length set; greedy where nothing was asked for."""
    from transformers import GenerationConfig

    config = copy.deepcopy(given) if isinstance(given, GenerationConfig) else GenerationConfig(**(given or {}))
    config.max_new_tokens, config.max_length = new_tokens, None
    config.num_return_sequences = config.num_return_sequences or 1
    config.pad_token_id = pad_token(tokenizer)
    if config.eos_token_id is None:
        config.eos_token_id = getattr(tokenizer, "eos_token_id", None)
    return config


@contextmanager
def measuring(model: Any, seed: int) -> Iterator[torch.device]:
    """The model in evaluation mode without gradients, random draws seeded; all as before afterwards. Yields its device."""
    device = model.get_input_embeddings().weight.device
    training = model.training
    with torch.no_grad(), torch.random.fork_rng([device] if device.type == "cuda" else []):
        torch.manual_seed(seed)
        try:
            model.eval()
            yield device
        finally:
            model.train(training)


def continuations(
    model: Any, tokenizer: Any, batch: Mapping[str, Any], config: Any, device: torch.device
) -> list[list[str]]:
    """What the model writes after each prompt of a batch: one text per returned sequence, lower case, stripped."""
    ids, mask = (torch.as_tensor(batch[key]).to(device) for key in ("input_ids", "attention_mask"))
    output = model.generate(input_ids=ids, attention_mask=mask, generation_config=config)
    texts = [
        text.lower().strip() for text in tokenizer.batch_decode(output[:, ids.shape[1] :], skip_special_tokens=True)
    ]
    each = config.num_return_sequences
    return [texts[start : start + each] for start in range(0, len(texts), each)]


def label_texts(labels: Any, tokenizer: Any) -> list[str]:
    """Labels of a batch as text; a DataLoader of the caller's own may hold tokens, padded with IGNORED."""
    if isinstance(labels, Tensor):
        return [tokenizer.decode(row[row != IGNORED], skip_special_tokens=True) for row in labels]
    return list(labels)
