"""Language modeling: the perplexity of labels given their prompts.

perplexity = exp(mean negative log likelihood over all label tokens), each predicted from the prompt and the label so far.
With `label_col_name=None` the prompt column is plain text, predicted from its second token on.
"""

from __future__ import annotations

import math
from typing import Any

import torch

from qcore import EvalTask, EvaluationError, hookimpl

from .samples import IGNORED, SampleOptions, Samples, batches, checked, measuring, pad_token, read_rows, tokenize


class LanguageModeling(EvalTask):
    name = "language_modeling"
    description = "perplexity of the label column given the prompt column"
    Params = SampleOptions

    def run(self, model: Any, tokenizer: Any, params: SampleOptions, argument: str = "") -> dict[str, float]:
        """Return perplexity, tokens (how many were predicted), samples, truncated and dropped."""
        loader, samples = params.dataloader, Samples([])
        if loader is None:
            samples = tokenize(read_rows(params, self.name), tokenizer, params, model, self.name, None)
            loader = batches(samples, params, pad_token(tokenizer), label_is_read=True)
        nll, count = 0.0, 0
        with measuring(model, params.seed) as device:
            for batch in checked(loader, self.name):
                ids, mask, label = (
                    torch.as_tensor(batch[k]).to(device) for k in ("input_ids", "attention_mask", "label")
                )
                logits = model(input_ids=ids, attention_mask=mask, use_cache=False).logits[:, :-1].float()
                targets = label[:, 1:].to(logits.device)
                chosen = targets != IGNORED
                log_p = torch.log_softmax(logits[chosen], -1).gather(1, targets[chosen][:, None])
                nll, count = nll - float(log_p.double().sum()), count + int(chosen.sum())
        if count == 0:
            raise EvaluationError(f"task {self.name!r}: no token to predict; the labels are empty.")
        return {"perplexity": math.exp(min(nll / count, 700)), "tokens": count, **samples.counts}


@hookimpl
def qcore_eval_tasks() -> list[EvalTask]:
    return [LanguageModeling()]
