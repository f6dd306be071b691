"""Calibration text sampled from the float model itself.

Needs no data and lies in the model's own domain, the idea of "data-free" calibration in LLM-QAT (arXiv 2305.17888).
Every sequence starts from the beginning-of-text token and is drawn at temperature 1 from the full distribution.
"""

from __future__ import annotations

import torch

from qcore import CalibrationDataset, CalibrationError, CalibrationRequest, hookimpl

BATCH = 64  # sequences generated together; decoding is bound by reading weights, so many cost little more than one


class SelfSampled(CalibrationDataset):
    """Seeded; the process's global random state is left as it was."""

    name = "self"
    description = "text sampled from the float model itself (temperature 1); needs no data"

    def load(self, request: CalibrationRequest) -> list[list[int]]:
        """Return `samples` sequences of `seqlen` token ids."""
        model = request.float_model()
        device = model.get_input_embeddings().weight.device
        start = _first_token(model, request.tokenizer)
        sequences: list[list[int]] = []
        gpus = [device] if device.type == "cuda" else []
        with torch.random.fork_rng(gpus), torch.no_grad():
            torch.manual_seed(request.seed)
            while len(sequences) < request.samples:
                count = min(BATCH, request.samples - len(sequences))
                prompt = torch.full((count, 1), start, dtype=torch.int64, device=device)
                drawn = model.generate(
                    prompt, attention_mask=torch.ones_like(prompt), do_sample=True, temperature=1.0, top_k=0, top_p=1.0,
                    max_length=request.seqlen, min_length=request.seqlen, pad_token_id=start,
                )  # fmt: skip
                sequences += drawn.tolist()
        return sequences


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
