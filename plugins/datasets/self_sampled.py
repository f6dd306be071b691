"""Calibration text sampled from the float model itself.

Needs no data and lies in the model's own domain, the idea of "data-free" calibration in LLM-QAT (arXiv 2305.17888).
Every draw starts from the beginning-of-text token, at temperature 1 from the full distribution.
"""

from __future__ import annotations

from itertools import chain

import torch

from qcore import CalibrationDataset, CalibrationError, CalibrationRequest, hookimpl

LENGTH = 512  # tokens of one draw: longer sequences are several, so that many are drawn at once
TOGETHER = 1 << 17  # tokens drawn at once; decoding is bound by reading weights, so many cost little more than one


class SelfSampled(CalibrationDataset):
    """Seeded; the process's global random state is left as it was."""

    name = "self"
    description = "text sampled from the float model itself (temperature 1); needs no data"

    def load(self, request: CalibrationRequest) -> list[list[int]]:
        """Return `samples` sequences of `seqlen` token ids."""
        model = request.float_model()
        device = model.get_input_embeddings().weight.device
        start = _first_token(model, request.tokenizer)
        length = min(LENGTH, request.seqlen)
        wanted = request.samples * -(-request.seqlen // length)
        drawn: list[list[int]] = []
        gpus = [device] if device.type == "cuda" else []
        with torch.random.fork_rng(gpus), torch.no_grad():
            torch.manual_seed(request.seed)
            while len(drawn) < wanted:
                count = min(TOGETHER // length, wanted - len(drawn))
                prompt = torch.full((count, 1), start, dtype=torch.int64, device=device)
                batch = model.generate(
                    prompt, attention_mask=torch.ones_like(prompt), do_sample=True, temperature=1.0, top_k=0, top_p=1.0,
                    max_length=length, min_length=length, pad_token_id=start,
                )  # fmt: skip
                drawn += batch.tolist()
        per_sequence = wanted // request.samples
        joined = [list(chain(*drawn[i : i + per_sequence])) for i in range(0, wanted, per_sequence)]
        return [tokens[: request.seqlen] for tokens in joined]


def _first_token(model, tokenizer) -> int:  # type: ignore[no-untyped-def]
    for source in (tokenizer, model.generation_config, model.config):
        for name in ("bos_token_id", "eos_token_id"):
            value = getattr(source, name, None)
            if isinstance(value, list) and value:
                value = value[0]
            if isinstance(value, int):
                return value
    raise CalibrationError("calibration 'self' starts from the BOS or EOS token, and this model names neither.")


@hookimpl
def qcore_calibration_datasets() -> list[CalibrationDataset]:
    return [SelfSampled()]
