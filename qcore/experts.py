"""Mixture of experts: fused parameters taken apart, so that everything else sees one linear per expert and projection.

transformers 5 keeps the experts of a layer in two parameters of three dimensions, [experts, out, in], and names them one by
one in checkpoints. `unfuse` puts `Experts` in the place of such a module: the checkpoint's names, ordinary nn.Linears.
Layouts are those of transformers.integrations.moe.use_experts_implementation; a module without its marks is left alone.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from .linear import replace_module

_MARKS = ("num_experts", "has_gate", "has_bias", "is_transposed", "is_concatenated", "_apply_gate")
_DEFAULT_NAMES = {"gate": "gate_proj", "up": "up_proj", "down": "down_proj"}


@dataclass(frozen=True)
class Piece:
    """Where one expert's tensor stands in a fused parameter: [experts, rows, columns], or [experts, rows] for a bias."""

    fused: str  # dotted name of the fused parameter
    index: int
    rows: slice
    transposed: bool

    def take(self, fused: Tensor) -> Tensor:
        """Return the expert's part, a view."""
        part = fused[self.index]
        return (part.t() if self.transposed else part)[self.rows]


class Experts(nn.Module):
    """The experts of one layer, children "0", "1", …, each with linears under the names its checkpoints use.

    widened: experts that are run on every token, so that their linears are calibrated on all of them; the output is the
    same, because a token still takes only what its router chose.
    """

    def __init__(self, fused: Any, name: str, names: Mapping[str, str]) -> None:
        super().__init__()
        self._origin = (fused,)  # in a tuple: its activation is wanted, its parameters are not
        self.names = dict(names)
        self.is_concatenated, self.has_gate = bool(fused.is_concatenated), bool(fused.has_gate)
        self.pieces: dict[str, Piece] = {}
        self.widened: set[int] = set()
        for index in range(fused.num_experts):
            expert = nn.Module()
            for part, child in names.items():
                linear, pieces = _linear(fused, name, part, index)
                expert.add_module(child, linear)
                self.pieces |= {f"{index}.{child}.{key}": piece for key, piece in pieces.items()}
            self.add_module(str(index), expert)
        fused._parameters.clear()

    def __len__(self) -> int:
        return len(self._modules)

    def forward(self, hidden_states: Tensor, top_k_index: Tensor, top_k_weights: Tensor) -> Tensor:
        """Return the weighted sum of each token's experts; [tokens, hidden], [tokens, k], [tokens, k]."""
        output = torch.zeros_like(hidden_states)
        everything = torch.arange(len(hidden_states), device=hidden_states.device)
        for index, expert in enumerate(self.children()):
            token, choice = torch.where(top_k_index == index)
            if index in self.widened:
                result = self._run(expert, hidden_states[everything])[token]
            elif len(token):
                result = self._run(expert, hidden_states[token])
            else:
                continue
            output.index_add_(0, token, (result * top_k_weights[token, choice, None]).to(output.dtype))
        return output

    def _run(self, expert: nn.Module, x: Tensor) -> Tensor:
        if self.has_gate:
            gate, up = getattr(expert, self.names["gate"])(x), getattr(expert, self.names["up"])(x)
            joined = torch.cat((gate, up), -1) if self.is_concatenated else torch.stack((gate, up), -1).flatten(-2)
            hidden = self._origin[0]._apply_gate(joined)
        else:
            hidden = self._origin[0].act_fn(getattr(expert, self.names["up"])(x))
        result: Tensor = getattr(expert, self.names["down"])(hidden)
        return result


def _linear(fused: Any, name: str, part: str, index: int) -> tuple[nn.Linear, dict[str, Piece]]:
    """One projection of one expert as a linear whose tensors are views of the fused ones, and where they stand there."""
    parameter = "down_proj" if part == "down" else "gate_up_proj" if fused.has_gate else "up_proj"
    rows = slice(None)
    if parameter == "gate_up_proj":
        half = getattr(fused, parameter).shape[2 if fused.is_transposed else 1] // 2
        first = part == "gate"
        rows = slice(0 if first else 1, None, 2)
        if fused.is_concatenated:
            rows = slice(0, half) if first else slice(half, None)
    pieces = {"weight": Piece(f"{name}.{parameter}", index, rows, bool(fused.is_transposed))}
    if fused.has_bias:
        pieces["bias"] = Piece(f"{name}.{parameter}_bias", index, rows, False)
    views = {key: piece.take(getattr(fused, piece.fused.rpartition(".")[2]).detach()) for key, piece in pieces.items()}
    out, columns = views["weight"].shape
    linear = nn.Linear(columns, out, bias="bias" in views, device="meta")
    for key, view in views.items():
        setattr(linear, key, nn.Parameter(view, requires_grad=False))
    return linear, pieces


def is_fused(module: nn.Module) -> bool:
    """Whether a module keeps experts in fused parameters of a layout known here."""
    if getattr(module, "has_post_expert_norm", False) or not all(hasattr(module, mark) for mark in _MARKS):
        return False
    wanted = {"gate_up_proj" if module.has_gate else "up_proj", "down_proj"}
    if module.has_bias:
        wanted |= {f"{parameter}_bias" for parameter in wanted}
    return set(module._parameters) == wanted and not list(module.buffers())


def unfuse(model: nn.Module) -> nn.Module:
    """Take every fused experts module of a model apart, in place; what it computes stays the same."""
    fused = [(name, module) for name, module in model.named_modules() if is_fused(module)]
    for name, module in fused:
        replace_module(model, name, Experts(module, name, _names_on_disk(model, name, bool(module.has_gate))))
    return model


def _names_on_disk(model: nn.Module, name: str, has_gate: bool) -> dict[str, str]:
    """What checkpoints call an expert's projections: read from transformers' own conversion of them, w1, w3 and w2 say."""
    names = dict(_DEFAULT_NAMES)
    for converter in conversions(model):
        target = f".{converter.target_patterns[0]}".replace("\\", "").replace("..", ".")
        children = [source.removesuffix(".weight").rpartition(".")[2] for source in converter.source_patterns]
        if not all("experts.*." in source.replace("\\", "") for source in converter.source_patterns):
            continue
        for parts, parameter in ((("gate", "up"), "gate_up_proj"), (("up",), "up_proj"), (("down",), "down_proj")):
            if f"{'.' + name}.{parameter}".endswith(target) and len(parts) == len(children):
                names |= dict(zip(parts, children, strict=True))
    return names if has_gate else {part: child for part, child in names.items() if part != "gate"}


def conversions(model: nn.Module) -> list[Any]:
    """transformers' rules from names in checkpoints to names in the model, renamings and converters; none for strangers."""
    from transformers import PreTrainedModel
    from transformers.conversion_mapping import get_model_conversion_mapping

    return list(get_model_conversion_mapping(model, add_legacy=False)) if isinstance(model, PreTrainedModel) else []


def pieces_of(model: nn.Module) -> dict[str, Piece]:
    """Every tensor that came out of a fused parameter, by its full name."""
    return {
        f"{name}.{local}": piece
        for name, module in model.named_modules()
        if isinstance(module, Experts)
        for local, piece in module.pieces.items()
    }
