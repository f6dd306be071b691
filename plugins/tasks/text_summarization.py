"""Text summarization: ROUGE (Lin 2004) between what the model writes after a prompt and the reference summary.

The scores are those of Google's `rouge-score` library (pip install 'qcore[eval]'), stemmed, in lower case.
"""

from __future__ import annotations

from typing import Any

from pydantic import Field

from qcore import EvalTask, PluginError, hookimpl

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

KINDS = ("rouge1", "rouge2", "rougeL")


class SummarizationOptions(SampleOptions):
    """max_new_tokens: length of a summary. generation_config: transformers' GenerationConfig, or its options; greedy by default."""

    max_new_tokens: int = Field(128, ge=1)
    generation_config: Any = None


class TextSummarization(EvalTask):
    name = "text_summarization"
    description = "ROUGE-1, -2 and -L of generated summaries"
    Params = SummarizationOptions

    def run(self, model: Any, tokenizer: Any, params: SummarizationOptions, argument: str = "") -> dict[str, float]:
        """Return precision, recall and F1 of each kind of ROUGE, averaged over samples; samples, truncated and dropped."""
        try:
            from rouge_score.rouge_scorer import RougeScorer
        except ImportError:
            raise PluginError(f"task {self.name!r} needs the rouge-score library: pip install 'qcore[eval]'.") from None
        config = generation_config(params.generation_config, tokenizer, params.max_new_tokens)
        config.num_return_sequences = 1
        loader, samples = params.dataloader, Samples([])
        if loader is None:
            rows = read_rows(params, self.name)
            samples = tokenize(rows, tokenizer, params, model, self.name, config.max_new_tokens)
            loader = batches(samples, params, pad_token(tokenizer), label_is_read=False)
        scorer, scores = RougeScorer(KINDS, use_stemmer=True), []
        with measuring(model, params.seed) as device:
            for batch in checked(loader, self.name):
                found = continuations(model, tokenizer, batch, config, device)
                wanted = label_texts(batch["label"], tokenizer)
                scores += [scorer.score(w.lower().strip(), f[0]) for w, f in zip(wanted, found, strict=True)]
        means = {
            f"{kind}_{short}": sum(getattr(score[kind], part) for score in scores) / len(scores)
            for kind in KINDS
            for short, part in (("precision", "precision"), ("recall", "recall"), ("f1", "fmeasure"))
        }
        return {**means, **samples.counts}


@hookimpl
def qcore_eval_tasks() -> list[EvalTask]:
    return [TextSummarization()]
