"""QLoRA in small: train a LoRA adapter on a 4-bit model, beside the same adapter on the float model.

    pip install 'qcore[peft]'
    python examples/train_adapter.py                      # the demo model, some minutes on a CPU
    python examples/train_adapter.py --model out --text mine.txt --output adapter

The text is cut in two: four fifths to train on, the rest to measure. Printed are the perplexity of the measured part before and
after, and the training losses of both models on the same batches.
"""

from __future__ import annotations

import argparse
import pydoc_data.topics
from pathlib import Path
from typing import Any

import torch
from peft import LoraConfig, PeftModel, get_peft_model

import qcore
import qcore.compat.peft
from qcore.api import open_any


def open_float(options: argparse.Namespace) -> tuple[torch.nn.Module, Any]:
    """The float model in the wanted dtype, and its tokenizer."""
    model, tokenizer = open_any(options.model)
    return (model.to(getattr(torch, options.dtype)) if options.dtype else model), tokenizer


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


def measure(model: torch.nn.Module, text: torch.Tensor, options: argparse.Namespace) -> float:
    """Perplexity of the last fifth of the tokens."""
    return qcore.evaluate(model, text[len(text) * 4 // 5 :], seqlen=options.seqlen, windows=8)["perplexity"]


def run(name: str, model: torch.nn.Module, wrap, text: torch.Tensor, options: argparse.Namespace):  # type: ignore[no-untyped-def]
    """Train on the first four fifths of the tokens; return the adapted model and its losses."""
    before = measure(model, text, options)
    torch.manual_seed(0)
    adapted = wrap(model, LoraConfig(r=8, lora_alpha=16, target_modules="all-linear", task_type="CAUSAL_LM"))
    windows = batches(text[: len(text) * 4 // 5], options.seqlen, options.steps, options.batch_size)
    losses = train(adapted, windows, options.rate)
    print(f"{name:8} perplexity {before:.2f} -> {measure(adapted, text, options):.2f}", flush=True)
    return adapted, losses


def show(curves: dict[str, list[float]]) -> None:
    """The losses side by side, as means of a tenth of the steps each; every column saw the same batches."""
    steps = len(next(iter(curves.values())))
    each = max(1, steps // 10)
    print(f"\n| steps | {' | '.join(curves)} |\n|---|{'---|' * len(curves)}")
    for start in range(0, steps, each):
        end = min(start + each, steps)
        cells = (f"{sum(losses[start:end]) / (end - start):.3f}" for losses in curves.values())
        print(f"| {start + 1} to {end} | {' | '.join(cells)} |")


def merge(adapter: Path, text: torch.Tensor, tokenizer, options: argparse.Namespace) -> None:  # type: ignore[no-untyped-def]
    """Merge the adapter into the float weights, quantize those again and save them."""
    float_model, _ = open_float(options)
    merged = PeftModel.from_pretrained(float_model, adapter).merge_and_unload()
    again = qcore.quantize(merged, options.algo, bits=options.bits, group_size=options.group_size, tokenizer=tokenizer)
    print(f"merged into the float weights and quantized again: perplexity {measure(again, text, options):.2f}")
    qcore.save(again, options.merged, tokenizer=tokenizer)


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
    parser.add_argument("--dtype", help="of activations: bfloat16, float32, …; by default the model's own")
    parser.add_argument("--no-float", action="store_true", help="leave out the float model")
    parser.add_argument("--output", type=Path, help="folder for the adapter of the quantized model")
    parser.add_argument(
        "--merged", type=Path, help="folder for the float model with that adapter merged in, quantized again"
    )
    options = parser.parse_args()

    if options.merged and not options.output:
        parser.error("--merged needs --output, where the adapter is saved first")

    content = options.text.read_text(encoding="utf-8") if options.text else pydoc_data.topics.topics["formatstrings"]
    float_model, tokenizer = open_float(options)
    text = torch.tensor(tokenizer(content, verbose=False)["input_ids"])
    curves = {}
    if not options.no_float:
        _, curves["float"] = run("float", float_model, get_peft_model, text, options)
        float_model, _ = open_float(options)  # the adapter changed it
    model = qcore.quantize(
        float_model, options.algo, bits=options.bits, group_size=options.group_size, tokenizer=tokenizer
    )
    name = f"{options.bits} bits"
    adapted, curves[name] = run(name, model, qcore.compat.peft.get_peft_model, text, options)
    if options.output:
        adapted.save_pretrained(options.output)
    if options.merged:
        merge(options.output, text, tokenizer, options)
    show(curves)


if __name__ == "__main__":
    main()
