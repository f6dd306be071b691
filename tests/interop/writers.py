"""Run by the interpreter of a peer's own environment: quantize a model, save it the peer's way, say what it answers.

    python writers.py WRITER MODEL OUT OPTIONS < [prompt ids]

Writers: gptqmodel, autoround, llmcompressor. The folder is left in OUT/model, the logits of the prompt, as the peer computes
them, in OUT/logits.npy (float32 [tokens, vocabulary]). Nothing of qcore is imported here.
"""

import importlib.metadata
import json
import sys
from pathlib import Path

import numpy as np
import torch


def calibration(prompt):
    """Few tokens: what is shown here is the file, not the quality."""
    return [torch.tensor([prompt * (64 // len(prompt) + 1)])[:, :64] for _ in range(2)]


def gptqmodel(model, out, options, prompt):
    from gptqmodel import BACKEND, GPTQModel, QuantizeConfig

    made = GPTQModel.load(model, QuantizeConfig(**options))
    made.quantize([{"input_ids": row[0], "attention_mask": torch.ones_like(row[0])} for row in calibration(prompt)])
    made.save(str(out))
    return GPTQModel.load(str(out), device="cpu", backend=BACKEND.TORCH, dtype=torch.float16).model


def autoround(model, out, options, prompt):
    """One run in memory, whose rounded weights answer (auto-round has no CPU kernel for some of its layouts), and one saved."""
    from auto_round import AutoRound

    def rounder():
        return AutoRound(
            model, iters=0, dataset=calibration(prompt), nsamples=2, seqlen=64, amp=False, enable_torch_compile=False,
            disable_opt_rtn=True, **options,
        )  # fmt: skip

    rounder().quantize_and_save(str(out), format="auto_round")
    return rounder().quantize()[0].float()


def llmcompressor(model, out, options, prompt):
    from llmcompressor import oneshot
    from llmcompressor.modifiers.quantization import QuantizationModifier
    from transformers import AutoModelForCausalLM

    groups = {name: {"targets": targets, "weights": weights} for name, (targets, weights) in options["groups"].items()}
    recipe = QuantizationModifier(config_groups=groups, ignore=options["ignore"])
    oneshot(model=model, recipe=recipe, output_dir=str(out))
    return AutoModelForCausalLM.from_pretrained(out, dtype=torch.float32)


WRITERS = {"gptqmodel": gptqmodel, "autoround": autoround, "llmcompressor": llmcompressor}
PACKAGE = {"autoround": "auto-round"}

if __name__ == "__main__":
    writer, model, out, options = sys.argv[1], sys.argv[2], Path(sys.argv[3]), json.loads(sys.argv[4])
    prompt = json.load(sys.stdin)
    answering = WRITERS[writer](model, out / "model", options, prompt)
    with torch.no_grad():
        logits = answering(torch.tensor([prompt])).logits[0].float().numpy()
    np.save(out / "logits.npy", logits)
    print("RESULT " + json.dumps({"version": importlib.metadata.version(PACKAGE.get(writer, writer))}))
