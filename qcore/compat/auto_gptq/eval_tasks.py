"""AutoGPTQ's evaluation tasks: made with a model, a tokenizer and data, run with `.run()`; results under its names."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch

from ... import api


class _Task:
    """A task of qcore's with AutoGPTQ's constructor."""

    task = ""

    def __init__(
        self,
        model: Any,
        tokenizer: Any,
        data_name_or_path: Any,
        prompt_col_name: str,
        label_col_name: str,
        device: Any = None,
        **options: Any,
    ) -> None:
        self.model = model if device is None else model.to(torch.device(device))
        self.tokenizer = tokenizer
        self.options = {
            "data_name_or_path": data_name_or_path,
            "prompt_col_name": prompt_col_name,
            "label_col_name": label_col_name,
            **options,
        }

    def _measure(self, **more: Any) -> dict[str, float]:
        return api.evaluate(self.model, task=self.task, tokenizer=self.tokenizer, **self.options, **more)


class LanguageModelingTask(_Task):
    """Perplexity of labels given their prompts."""

    task = "language_modeling"

    def run(self) -> dict[str, float]:
        """Return {"ppl": …}."""
        return {"ppl": self._measure()["perplexity"]}


class SequenceClassificationTask(_Task):
    """Accuracy of the class that a continuation is nearest to."""

    task = "sequence_classification"

    def __init__(self, model: Any, tokenizer: Any, classes: Sequence[str], *args: Any, **options: Any) -> None:
        super().__init__(model, tokenizer, *args, classes=list(classes), **options)

    def run(self, generation_config: Any = None) -> dict[str, float]:
        """Return {"acc": …}; several returned sequences are put to a vote."""
        return {"acc": self._measure(generation_config=generation_config)["accuracy"]}


class TextSummarizationTask(_Task):
    """ROUGE of generated summaries."""

    task = "text_summarization"

    def run(self, generation_config: Any = None) -> dict[str, dict[str, float]]:
        """Return {"rouge-1": {"r": …, "p": …, "f": …}, "rouge-2": …, "rouge-l": …}."""
        length = getattr(generation_config, "max_new_tokens", None)
        found = self._measure(generation_config=generation_config, **({"max_new_tokens": length} if length else {}))
        parts = {"r": "recall", "p": "precision", "f": "f1"}
        return {
            f"rouge-{kind.lower()}": {short: found[f"rouge{kind}_{part}"] for short, part in parts.items()}
            for kind in ("1", "2", "L")
        }


__all__ = ["LanguageModelingTask", "SequenceClassificationTask", "TextSummarizationTask"]
