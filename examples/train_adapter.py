"""QLoRA in small: train a LoRA adapter on a 4-bit model, beside the same adapter on the float model.

    pip install 'qcore[peft]'
    python examples/train_adapter.py                      # the demo model, some minutes on a CPU
    python examples/train_adapter.py --model out --text mine.txt --output adapter

The text is cut in two: four fifths to train on, the rest to measure. Printed are the training loss every few steps and the
perplexity of the measured part before and after.
"""

from __future__ import annotations

import argparse
import pydoc_data.topics
from pathlib import Path

import torch
from peft import LoraConfig, get_peft_model

import qcore
import qcore.compat.peft
from qcore.api import open_any


def batches(ids: torch.Tensor, seqlen: int, steps: int, batch_size: int) -> list[torch.Tensor]:
    """Draw windows [batch_size, seqlen] of the ids, the same ones in every run."""
    generator = torch.Generator().manual_seed(0)
    starts = torch.randint(0, len(ids) - seqlen, (steps, batch_size), generator=generator)
    return [torch.stack([ids[start : start + seqlen] for start in row]) for row in starts.tolist()]


def train(model: torch.nn.Module, data: list[torch.Tensor], rate: float) -> list[float]:
    """Take one optimizer step per batch; return the losses."""
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=rate)
    losses = []
    model.train()
    for ids in data:
        ids = ids.to(model.device)
        loss = model(input_ids=ids, labels=ids).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    model.eval()
    return losses


def run(name: str, model: torch.nn.Module, wrap, text: torch.Tensor, options: argparse.Namespace):  # type: ignore[no-untyped-def]
    """Train on the first four fifths of the tokens; return the adapted model, its losses, and the perplexities."""
    cut = len(text) * 4 // 5
    torch.manual_seed(0)
    before = qcore.evaluate(model, text[cut:], seqlen=options.seqlen, windows=8)["perplexity"]
    adapted = wrap(model, LoraConfig(r=8, lora_alpha=16, target_modules="all-linear", task_type="CAUSAL_LM"))
    losses = train(adapted, batches(text[:cut], options.seqlen, options.steps, options.batch_size), options.rate)
    after = qcore.evaluate(adapted, text[cut:], seqlen=options.seqlen, windows=8)["perplexity"]
    shown = " ".join(f"{loss:.2f}" for loss in losses[:: max(1, len(losses) // 10)])
    print(f"{name:8} loss {shown}   perplexity {before:.2f} -> {after:.2f}", flush=True)
    return adapted, losses, before, after


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="demo", help="float model: a folder, a hub name, or demo")
    parser.add_argument("--text", type=Path, help="text to learn; by default a part of Python's language reference")
    parser.add_argument("--bits", type=int, default=4)
    parser.add_argument("--group-size", type=int, default=64)
    parser.add_argument("--algo", default="rtn", help="rtn needs no calibration and takes seconds; gptq is better")
    parser.add_argument("--steps", type=int, default=40)
    parser.add_argument("--seqlen", type=int, default=128)
    parser.add_argument("--batch-size", type=int, default=2)
    parser.add_argument("--rate", type=float, default=5e-4)
    parser.add_argument("--no-float", action="store_true", help="leave out the float model")
    parser.add_argument("--output", type=Path, help="folder for the adapter of the quantized model")
    options = parser.parse_args()

    content = options.text.read_text(encoding="utf-8") if options.text else pydoc_data.topics.topics["formatstrings"]
    float_model, tokenizer = open_any(options.model)
    text = torch.tensor(tokenizer(content, verbose=False)["input_ids"])
    if not options.no_float:
        run("float", float_model, get_peft_model, text, options)
        float_model, _ = open_any(options.model)  # the adapter changed it
    model = qcore.quantize(
        float_model, options.algo, bits=options.bits, group_size=options.group_size, tokenizer=tokenizer
    )
    adapted, *_ = run(f"{options.bits} bits", model, qcore.compat.peft.get_peft_model, text, options)
    if options.output:
        adapted.save_pretrained(options.output)
        print(f"adapter saved in {options.output}")


if __name__ == "__main__":
    main()
