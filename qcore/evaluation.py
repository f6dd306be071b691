"""Perplexity and KL divergence over non-overlapping windows, and what an evaluation task is.

Definitions, so that figures compare with other tools': the text is tokenized once with the tokenizer's defaults and
cut into windows of `seqlen` tokens, the incomplete last one dropped. Within a window every token but the first is predicted from
those before it. perplexity = exp(mean negative log likelihood over all predicted tokens). kl = mean over the same
positions of KL(reference || model) in nats. Logits are compared in float32.
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Iterator
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from .config import Options
from .errors import CalibrationError, ConfigError, ModelError


class EvalTask(ABC):
    """Base of every evaluation task plugin: measures a model, float or quantized, and returns numbers.

    Params: the options, validated before anything runs; they reach `run` as `params`.
    """

    name: ClassVar[str]
    description: ClassVar[str] = ""
    Params: ClassVar[type[Options]] = Options

    @abstractmethod
    def run(self, model: nn.Module, tokenizer: Any, params: Any, argument: str = "") -> dict[str, float]:
        """Return the metrics by name. Must leave the model and the process's random state as they were.

        tokenizer: the model's, or None. argument: what stands behind the colon where a task is named `NAME:ARGUMENT`.
        """


def windows_of(text: str | Tensor, tokenizer: Any, seqlen: int, limit: int | None = None) -> Tensor:
    """Return token ids [windows, seqlen] of a text, or of token ids [n] or [windows, n] given as they are.

    Raises CalibrationError when there is less than one window.
    """
    whole = isinstance(seqlen, int) and isinstance(limit, int | None)
    if not whole or seqlen < 2 or (limit is not None and limit < 1):
        raise ConfigError(f"seqlen={seqlen!r}, windows={limit!r}: expected whole numbers, at least 2 and 1.")
    if not isinstance(text, (str, Tensor)):
        raise ConfigError(f"text is a {type(text).__name__}, expected a string or a tensor of token ids.")
    if isinstance(text, Tensor):
        ids = text.reshape(-1)
    else:
        if tokenizer is None:
            raise ModelError("evaluating text needs a tokenizer: pass tokenizer=, or a tensor of token ids.")
        ids = torch.tensor(tokenizer(text, verbose=False)["input_ids"], dtype=torch.int64)
    count = len(ids) // seqlen
    if count == 0:
        raise CalibrationError(f"the text has {len(ids)} tokens, less than one window of {seqlen}. Give more text.")
    return ids[: count * seqlen].view(count, seqlen)[:limit]


@torch.no_grad()
def measure(model: nn.Module, windows: Tensor, reference: nn.Module | None = None) -> dict[str, float]:
    """Return perplexity, and with a reference kl and reference_perplexity, over windows [n, seqlen].

    One window at a time goes through the model and the reference, each on its own device.
    """
    nll = reference_nll = kl = 0.0
    for ids in windows:
        log_p, targets = _log_probabilities(model, ids)
        nll -= float(log_p.gather(1, targets[:, None]).double().sum())
        if reference is not None:
            log_r, _ = _log_probabilities(reference, ids)
            reference_nll -= float(log_r.gather(1, targets[:, None].to(log_r.device)).double().sum())
            if log_r.shape != log_p.shape:
                raise ModelError(
                    f"the reference predicts {log_r.shape[1]} tokens, the model {log_p.shape[1]}: give the same model before quantization."
                )
            log_r = log_r.to(log_p.device)
            kl += sum(float(part.double().sum()) for part in _kl_rows(log_r, log_p))
    predicted = windows.shape[0] * (windows.shape[1] - 1)
    result = {"perplexity": _exp(nll / predicted)}
    if reference is not None:
        result |= {"kl": kl / predicted, "reference_perplexity": _exp(reference_nll / predicted)}
    return {**result, "windows": windows.shape[0], "seqlen": windows.shape[1], "tokens": predicted}


def _kl_rows(log_r: Tensor, log_p: Tensor, rows: int = 64) -> Iterator[Tensor]:
    """KL of each position, a few rows at a time: vocabularies are large."""
    for start in range(0, len(log_r), rows):
        r, p = log_r[start : start + rows], log_p[start : start + rows]
        yield (r.exp() * (r - p)).sum(-1)


def _log_probabilities(model: nn.Module, ids: Tensor) -> tuple[Tensor, Tensor]:
    """Return (log probabilities float32 [seqlen-1, vocabulary], the tokens they predict [seqlen-1])."""
    device = next(model.parameters()).device
    ids = ids.to(device)
    try:
        logits = model(input_ids=ids[None], use_cache=False).logits[0, :-1]
    except IndexError as error:  # of an embedding
        raise ModelError(
            f"{type(model).__name__} has no embedding for one of {len(ids)} tokens, up to id {int(ids.max())}, or for its position. "
            "Give a smaller seqlen, or tokens of the model's own tokenizer."
        ) from error
    return torch.log_softmax(logits.float(), -1), ids[1:].to(logits.device)


def _exp(value: float) -> float:
    return math.exp(value) if value < 700 else math.inf
