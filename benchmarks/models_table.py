"""Which architectures work: a small random-weight model of each goes through everything, and the table of docs/models.md is
written from what happened.

    python benchmarks/models_table.py            # writes the table
    python benchmarks/models_table.py llama      # prints the rows of some
"""

from __future__ import annotations

import sys
import tempfile
from pathlib import Path
from typing import Any

import torch
from peft import LoraConfig

import qcore
from qcore import QuantLinear
from qcore.compat.peft import get_peft_model
from qcore.discovery import find_adapter
from qcore.experts import unfuse
from qcore.plugins import installed
from qcore.streaming import ModuleWeights

ROOT = Path(__file__).parent.parent
sys.path.insert(0, str(ROOT / "tests/plugins/models"))
from zoo import REMOTE, ZOO, fresh  # noqa: E402

PAGE = ROOT / "docs/models.md"
MARKS = ("<!-- written by benchmarks/models_table.py -->", "<!-- end -->")
COLUMNS = ("model type", "adapter", "gptq", "autoround", "save, load", "generate", "PEFT-ready", "generic agrees")
ALGORITHMS: dict[str, dict[str, Any]] = {"gptq": {}, "autoround": {"iters": 20, "bs": 4}}
CPU = torch.device("cpu")


def row(name: str, scratch: Path) -> list[str]:
    """Take one model through everything; what fails stands in its cell by the name of the error."""
    tokens = list(torch.randint(0, 320, (8, 32), generator=torch.Generator().manual_seed(0)))
    ids = tokens[0][None]
    more = {"trust_remote_code": True} if name in REMOTE else {}
    model = fresh(name, scratch)
    adapter = find_adapter(unfuse(model), ModuleWeights(model), installed(), CPU)
    cells = {"model type": name, "adapter": adapter.name}
    for algorithm, options in ALGORITHMS.items():
        cells[algorithm] = attempt(lambda a=algorithm, o=options: distance(fresh(name, scratch), ids, tokens, a, o))
    quantized = qcore.quantize(fresh(name, scratch), "gptq", bits=8, group_size=32, calibration=tokens, seqlen=32)
    folder = qcore.save(quantized, scratch / "saved")
    loaded = attempt(lambda: qcore.load(folder, **more))
    cells["save, load"] = (
        loaded if isinstance(loaded, str) else yes(torch.equal(logits(loaded, ids), logits(quantized, ids)))
    )
    generates = hasattr(loaded, "generate")  # models whose own code predates transformers 5 have lost it
    cells["generate"] = attempt(lambda: yes(generates_alike(loaded, ids))) if generates else "own code"
    cells["PEFT-ready"] = attempt(lambda: yes(trains(quantized, ids)))
    cells["generic agrees"] = (
        "serves it" if adapter.name == "generic" else attempt(lambda: yes(agrees(fresh(name, scratch), adapter)))
    )
    return [cells[column] for column in COLUMNS]


def attempt(work: Any) -> Any:
    """What `work` gives, or the kind of its error."""
    try:
        return work()
    except Exception as error:
        print(f"{type(error).__name__}: {error}", file=sys.stderr)
        return f"**{type(error).__name__}**"


def yes(fact: bool) -> str:
    return "yes" if fact else "**no**"


def logits(model: Any, ids: torch.Tensor) -> torch.Tensor:
    with torch.no_grad():
        return model(input_ids=ids, use_cache=False).logits


def distance(model: Any, ids: torch.Tensor, tokens: list[torch.Tensor], algorithm: str, options: dict[str, Any]) -> str:
    """The median over tokens of how far 8 bits with groups of 32 move the logits, in per cent of their length."""
    before = logits(model, ids)
    qcore.quantize(model, algorithm, bits=8, group_size=32, calibration=tokens, seqlen=32, **options)
    moved = (logits(model, ids) - before).norm(dim=-1) / before.norm(dim=-1)
    return f"{100 * float(moved.median()):.2f} %"


def generates_alike(model: Any, ids: torch.Tensor) -> bool:
    """Whether greedy text is the same with and without a cache."""
    prompt = {"input_ids": ids[:, :12], "attention_mask": torch.ones(1, 12, dtype=torch.int64)}
    settings = {"max_new_tokens": 8, "do_sample": False, "eos_token_id": None, "pad_token_id": 0}
    texts = [model.generate(**prompt, use_cache=cache, **settings) for cache in (True, False)]
    return torch.equal(*texts)


def trains(model: Any, ids: torch.Tensor) -> bool:
    """Whether adapters of peft on all quantized linears train: the loss falls, each adapter moves (those of experts that no
    token reaches aside), and without them the model is what it was.
    """
    before = logits(model, ids)
    targets = [name for name, module in model.named_modules() if isinstance(module, QuantLinear)]
    torch.manual_seed(0)
    adapted = get_peft_model(model, LoraConfig(r=4, target_modules=targets))
    moving = {name: p for name, p in adapted.named_parameters() if p.requires_grad}
    optimizer = torch.optim.AdamW(moving.values(), lr=1e-2)
    losses = []
    for _ in range(4):
        found = adapted(input_ids=ids, use_cache=False).logits[0, :-1].float()
        losses.append(torch.nn.functional.cross_entropy(found, ids[0, 1:]))
        optimizer.zero_grad()
        losses[-1].backward()
        optimizer.step()
    moved = all(p.abs().sum() > 0 for name, p in moving.items() if "lora_B" in name and ".experts." not in name)
    with adapted.disable_adapter():
        return moved and bool(losses[-1] < losses[0]) and torch.equal(logits(adapted, ids), before)


def agrees(model: Any, adapter: Any) -> bool:
    """Whether the generic adapter finds the declared blocks and linears, and each declared group within one of its own."""
    found = find_adapter(unfuse(model), ModuleWeights(model), installed(), CPU, "generic")
    pairs = [(found.groups_in(block), adapter.groups_in(block)) for _, block in adapter.find_blocks(model)]
    return found.blocks == adapter.blocks and all(
        {n for group in seen for n in group} == {n for group in stated for n in group}
        and all(any(set(group) <= set(other) for other in seen) for group in stated)
        for seen, stated in pairs
    )


def main() -> None:
    """Write the table, or print the rows of the named models."""
    torch.set_num_threads(1)
    wanted = sys.argv[1:] or [*ZOO, *REMOTE]
    lines = ["| " + " | ".join(COLUMNS) + " |", "|" + "---|" * len(COLUMNS)]
    for name in wanted:
        with tempfile.TemporaryDirectory() as scratch:
            lines.append("| " + " | ".join(row(name, Path(scratch))) + " |")
        print(lines[-1], flush=True)
    if len(sys.argv) == 1:
        text = PAGE.read_text(encoding="utf-8")
        before, _, rest = text.partition(MARKS[0])
        _, _, after = rest.partition(MARKS[1])
        PAGE.write_text("\n".join([f"{before}{MARKS[0]}", "", *lines, "", f"{MARKS[1]}{after}"]), encoding="utf-8")


if __name__ == "__main__":
    main()
