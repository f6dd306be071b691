"""Perplexity by llama.cpp's definition, for figures that compare with its `llama-perplexity` and AutoGPTQ's perplexity.py.

    python benchmarks/perplexity.py MODEL --text FILE [--n-ctx 512] [--chunks N] [--device cuda]

MODEL is a quantized or float folder, a hub name, or `demo`. The text is tokenized once and cut into chunks of n_ctx tokens, the
incomplete last one dropped. Where the tokenizer begins a text with BOS, each chunk's first token is replaced by it. Only the second
half of a chunk is predicted: the tokens from n_ctx/2 + 1 on, each from all before it in the chunk. (`qcore eval`
predicts every token but the first, and so gives higher figures on the same text.)

`--tokens FILE` also writes the chunks as JSON for benchmarks/peers/run_llamacpp.py, which measures the same by llama.cpp itself.
"""

from __future__ import annotations

import argparse
import json
import math
import time
from pathlib import Path
from typing import Any

import torch

from qcore.api import open_any
from qcore.evaluation import windows_of


def chunks_of(text: str, tokenizer: Any, n_ctx: int, limit: int | None) -> torch.Tensor:
    """Token ids [chunks, n_ctx], with BOS in front where the tokenizer puts one in front of a text."""
    ids = windows_of(text, tokenizer, n_ctx, limit).clone()
    if tokenizer("a")["input_ids"][0] == tokenizer.bos_token_id is not None:
        ids[:, 0] = tokenizer.bos_token_id
    return ids


@torch.no_grad()
def losses(model: torch.nn.Module, ids: torch.Tensor) -> torch.Tensor:
    """Negative log likelihoods of the second half of one chunk [n_ctx], in float64."""
    device = model.get_input_embeddings().weight.device
    first = len(ids) // 2
    logits = model(input_ids=ids[None].to(device), use_cache=False).logits[0, first:-1].float()
    log_p = torch.log_softmax(logits, -1)
    return -log_p.gather(1, ids[first + 1 :, None].to(log_p.device))[:, 0].double().cpu()


def measure(model: torch.nn.Module, ids: torch.Tensor) -> tuple[float, float]:
    """Return (perplexity, its standard error) over chunks [n, n_ctx], printing the running figure as llama.cpp does."""
    found: list[torch.Tensor] = []
    for chunk in ids:
        found.append(losses(model, chunk))
        print(f"[{len(found)}]{math.exp(torch.cat(found).mean()):.4f}", end=",", flush=True)
    print()
    nll = torch.cat(found)
    perplexity = math.exp(nll.mean())
    return perplexity, perplexity * float(nll.std(unbiased=False)) / math.sqrt(max(1, len(nll) - 1))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model")
    parser.add_argument("--text", type=Path, required=True)
    parser.add_argument("--n-ctx", "--n_ctx", type=int, default=512)
    parser.add_argument("--chunks", type=int, help="use at most this many")
    parser.add_argument("--device", default="auto")
    parser.add_argument("--tokens", type=Path, help="write the chunks as JSON")
    options = parser.parse_args()
    model, tokenizer = open_any(options.model, options.device)
    ids = chunks_of(options.text.read_text(encoding="utf-8"), tokenizer, options.n_ctx, options.chunks)
    if options.tokens:
        options.tokens.write_text(json.dumps(ids.tolist()))
    started = time.perf_counter()
    perplexity, error = measure(model, ids)
    print(f"{options.model}: PPL = {perplexity:.4f} +/- {error:.5f} ({len(ids)} chunks of {options.n_ctx}, "
          f"{time.perf_counter() - started:.1f} s)")  # fmt: skip


if __name__ == "__main__":
    main()
