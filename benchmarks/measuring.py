"""What the quality benchmarks share: fixed windows, the float model's hidden states, and KL of a set of weights."""

from __future__ import annotations

import math
import resource
import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from qcore import ModelFolder, QuantLinear
from qcore.checkpoint import resolve_model
from qcore.content import open_content
from qcore.model import load_float, load_tokenizer
from qcore.plugins import installed


@dataclass
class Bench:
    """A float model, held-out windows, and the float model's final hidden states on them (KL needs no second pass)."""

    folder: Path
    model: nn.Module
    tokenizer: Any
    windows: dict[str, Tensor]
    hidden: dict[str, Tensor] = field(default_factory=dict)

    @classmethod
    def open(cls, model: str, texts: dict[str, Path], count: int, device: str = "cpu", seqlen: int = 512) -> Bench:
        """Open the model in float32 and tokenize the first `count` windows of each text."""
        folder = resolve_model(model, installed())
        tokenizer = load_tokenizer(folder)
        windows = {}
        for name, path in texts.items():
            ids = tokenizer(path.read_text(encoding="utf-8"), verbose=False)["input_ids"][: count * seqlen]
            windows[name] = torch.tensor(ids, device=device).view(-1, seqlen)
        bench = cls(folder, load_float(ModelFolder(folder), dtype=torch.float32).to(device), tokenizer, windows)
        bench.hidden = {name: torch.stack([bench._last_hidden(w) for w in ids]) for name, ids in windows.items()}
        return bench

    @torch.no_grad()
    def _last_hidden(self, ids: Tensor) -> Tensor:
        return self.model.base_model(input_ids=ids[None], use_cache=False).last_hidden_state[0, :-1]

    @torch.no_grad()
    def measure(self, weights: dict[str, Tensor]) -> dict[str, float]:
        """Return ppl_NAME and kl_NAME with the named linears' weights [out, in] in place of the float ones."""
        kept = {}
        for name, weight in weights.items():
            parameter = self.model.get_parameter(name)
            kept[name] = parameter.data
            weight = weight.to(parameter.device, torch.float32)
            parameter.data = weight if weight.shape == parameter.shape else weight.t()
        try:
            result: dict[str, float] = {}
            for name, windows in self.windows.items():
                nll = kl = 0.0
                for ids, hidden in zip(windows, self.hidden[name], strict=True):
                    log_p = torch.log_softmax(self.model.lm_head(self._last_hidden(ids)), -1)
                    log_r = torch.log_softmax(self.model.lm_head(hidden), -1)
                    nll -= float(log_p.gather(1, ids[1:, None]).double().sum())
                    kl += float((log_r.exp() * (log_r - log_p)).sum(-1).double().sum())
                positions = windows.shape[0] * (windows.shape[1] - 1)
                result |= {f"ppl_{name}": math.exp(min(700.0, nll / positions)), f"kl_{name}": kl / positions}
            return result
        finally:
            for name, data in kept.items():
                self.model.get_parameter(name).data = data


def weights_of(model: nn.Module) -> dict[str, Tensor]:
    """Return the dequantized weights of a quantized model, by parameter name."""
    linears = {name: module for name, module in model.named_modules() if isinstance(module, QuantLinear)}
    return {f"{name}.weight": linear.weight_source().dequantize() for name, linear in linears.items()}


def weights_in(folder: Path) -> dict[str, Tensor]:
    """Return the dequantized weights of a folder in any format qcore reads."""
    _, content = open_content(folder)
    return {f"{name}.weight": content.weight(name).dequantize() for name in content.layers}


def token_file(path: Path) -> list[Tensor]:
    """Read calibration sequences from an int64 .npy file [samples, seqlen]: what peers are given too."""
    return list(torch.from_numpy(np.load(path)))


class Clock:
    """CPU seconds and wall seconds of a with block."""

    def __enter__(self) -> Clock:
        self.wall, self.cpu = time.perf_counter(), self._cpu()
        return self

    def __exit__(self, *_: object) -> None:
        self.wall, self.cpu = time.perf_counter() - self.wall, self._cpu() - self.cpu

    @staticmethod
    def _cpu() -> float:
        usage = resource.getrusage(resource.RUSAGE_SELF)
        return usage.ru_utime + usage.ru_stime


def table(rows: list[dict[str, Any]], columns: list[str]) -> str:
    """Format rows as a Markdown table."""

    def cell(value: Any) -> str:
        return (
            f"{value:.3g}"
            if isinstance(value, float) and value >= 1000
            else f"{value:.3f}"
            if isinstance(value, float)
            else str(value)
        )

    lines = ["| " + " | ".join(columns) + " |", "|" + "---|" * len(columns)]
    lines += ["| " + " | ".join(cell(row.get(column, "")) for column in columns) + " |" for row in rows]
    return "\n".join(lines)
