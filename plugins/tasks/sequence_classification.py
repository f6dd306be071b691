"""Sequence classification by generating: the model continues a prompt, and the nearest class name is its answer.

With several returned sequences (`generation_config`: beams or samples) the answers of one prompt are put to a vote:
self-consistency (Wang et al. 2022, arXiv 2203.11171).
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from typing import Any

from pydantic import Field

from qcore import ConfigError, EvalTask, EvaluationError, hookimpl

from .samples import (
    SampleOptions,
    Samples,
    batches,
    checked,
    continuations,
    generation_config,
    label_texts,
    measuring,
    pad_token,
    read_rows,
    tokenize,
)


class ClassificationOptions(SampleOptions):
    """classes: the names to choose from. prompt_template: a prompt made of each row's prompt, as `"{prompt} Answer:"`.
    generation_config: transformers' GenerationConfig, or its options; max_new_tokens is set from the classes.
    """

    classes: list[str] = Field(default_factory=list)
    prompt_template: str | None = None
    generation_config: Any = None


class SequenceClassification(EvalTask):
    name = "sequence_classification"
    description = "accuracy of the class named after a prompt, with a vote over several answers"
    Params = ClassificationOptions

    def run(self, model: Any, tokenizer: Any, params: ClassificationOptions, argument: str = "") -> dict[str, float]:
        """Return accuracy, samples, truncated and dropped."""
        classes = [name.lower().strip() for name in params.classes]
        if len(set(classes)) < 2 or len(set(classes)) < len(classes):
            raise ConfigError(f"task {self.name!r}: classes={params.classes!r}: expected two or more, all different.")
        longest = max(len(tokenizer(name, add_special_tokens=False)["input_ids"]) for name in params.classes)
        loader, samples = params.dataloader, Samples([])
        if loader is None:
            rows = [(_prompt(params, prompt), label) for prompt, label in read_rows(params, self.name)]
            _check_labels([label for _, label in rows], classes, self.name)
            samples = tokenize(rows, tokenizer, params, model, self.name, longest)
            loader = batches(samples, params, pad_token(tokenizer), label_is_read=False)
        config = generation_config(params.generation_config, tokenizer, longest)
        right = total = 0
        with measuring(model, params.seed) as device:
            for batch in checked(loader, self.name):
                labels = [text.lower().strip() for text in label_texts(batch["label"], tokenizer)]
                _check_labels(labels, classes, self.name)
                answers = continuations(model, tokenizer, batch, config, device)
                votes = [vote([closest(text, classes) for text in texts]) for texts in answers]
                right += sum(found == label for found, label in zip(votes, labels, strict=True))
                total += len(labels)
        return {"accuracy": right / total, **samples.counts}


def _prompt(params: ClassificationOptions, prompt: str) -> str:
    if params.prompt_template is None:
        return prompt
    try:
        return params.prompt_template.format(prompt=prompt, classes=params.classes, labels=params.classes)
    except (KeyError, IndexError, ValueError) as error:
        raise ConfigError(
            f"prompt_template {params.prompt_template!r}: {error!r}; it may use {{prompt}} and {{classes}}."
        ) from None


def _check_labels(labels: Sequence[str], classes: Sequence[str], what: str) -> None:
    strange = sorted({label for label in labels if label.lower().strip() not in classes})
    if strange:
        raise EvaluationError(
            f"task {what!r}: label {strange[0]!r} is not among the classes {list(classes)}"
            f"{f' (and {len(strange) - 1} more)' if len(strange) > 1 else ''}. Map labels to class names in preprocess_fn."
        )


def vote(answers: Sequence[str]) -> str:
    """The most frequent answer; of equals the one that came first.

    >>> vote(["b", "a", "a"])
    'a'
    """
    return Counter(answers).most_common(1)[0][0]


def closest(text: str, classes: Sequence[str]) -> str:
    """The class whose name the text starts with most nearly; of equals the longest, then the first.

    >>> closest("negativ. text:", ["positive", "negative", "neg"])
    'neg'
    """
    return min(classes, key=lambda name: (edit_distance(text[: len(name)], name) / len(name), -len(name)))


def edit_distance(a: str, b: str) -> int:
    """Insertions, deletions and replacements that turn a into b (Levenshtein 1966).

    >>> edit_distance("kitten", "sitting")
    3
    """
    row = list(range(len(b) + 1))
    for i, x in enumerate(a, 1):
        above, row[0] = row[0], i
        for j, y in enumerate(b, 1):
            above, row[j] = row[j], min(row[j] + 1, row[j - 1] + 1, above + (x != y))
    return row[-1]


@hookimpl
def qcore_eval_tasks() -> list[EvalTask]:
    return [SequenceClassification()]
