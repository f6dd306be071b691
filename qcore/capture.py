"""The inputs of decoder blocks, as the model itself hands them over.

`capture` runs the model's own forward once with every block replaced by a recorder, so that whatever a model passes to
its blocks (masks, rotary embeddings, per-layer variants of both) is what they get in the
"""

from __future__ import annotations

import contextlib
import inspect
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from .adapter import ModelAdapter
from .errors import ModelError, RunError
from .memory import is_out_of_memory, keeper
from .streaming import Weights


@dataclass
class Stream:
    """Hidden states between two blocks: one tensor [batch, length, hidden] per calibration batch.

    passed: the index of the block they went through last. moved: how many of them are through the next one already; more than
    none only while that block is under work. closing: see `Closing`, by class and name of a block's child.
    """

    hidden: list[Tensor]
    passed: int = -1
    moved: int = 0
    closing: dict[tuple[type, str], Closing | None] = field(default_factory=dict)


@dataclass(frozen=True)
class Closing:
    """The linear whose very output a child of a block returns, as attention does its projection's: who has kept the linear's
    input need not run the child. width: 0 when the child returns it plainly, else the length of a tuple of it and None.
    """

    linear: str
    width: int


@dataclass
class Captured:
    """What one pass over the embeddings yields: block 0's inputs, and per block and batch the keyword arguments."""

    stream: Stream
    kwargs: list[list[dict[str, Any]]]  # [block][batch]
    masks: list[Tensor | None]  # [batch], bool [batch, length]


class Enough(Exception):
    """Everything wanted from this forward pass has been seen."""


@contextlib.contextmanager
def watching(modules: Mapping[str, nn.Module], note: Callable[..., None], *, after: bool = False) -> Iterator[None]:
    """Within it `note(name, arguments)` is called in front of each of these modules; `after`: behind it, with its output too."""
    hooks = []
    for name, module in modules.items():

        def hook(_: nn.Module, *seen: Any, name: str = name) -> None:
            note(name, *seen)

        hooks.append(module.register_forward_hook(hook) if after else module.register_forward_pre_hook(hook))
    try:
        yield
    finally:
        for handle in hooks:
            handle.remove()


def capture_inputs(
    model: nn.Module,
    weights: Weights,
    adapter: ModelAdapter,
    batches: Sequence[tuple[torch.Tensor, torch.Tensor | None]],
    device: torch.device,
    dtype: torch.dtype,
    keep: Callable[[torch.Tensor], torch.Tensor] | None = None,
) -> Captured:
    """Bring in what stands before the blocks, record the blocks' inputs, and let go again.

    keep: puts hidden states where they stay between uses; without it, on the device.
    """
    present = {name for name, _ in model.named_modules(remove_duplicate=False)}
    before = [name for name in adapter.before_blocks or outside(model, adapter.blocks) if name in present]
    blocks = [block for _, block in adapter.find_blocks(model)]
    try:
        for name in before:
            weights.bring(name, device, dtype)
        return capture(model, blocks, batches, device, keep or keeper(device, "device"))
    finally:
        for name in before:
            weights.let_go(name)


def outside(model: nn.Module, blocks_name: str) -> list[str]:
    """Names of the modules beside the blocks, without the output head, which runs after them."""
    names: list[str] = []
    head = getattr(model, "get_output_embeddings", lambda: None)()
    path = blocks_name.split(".")
    for depth in range(len(path)):
        parent = ".".join(path[:depth])
        for child, module in model.get_submodule(parent).named_children():
            if child != path[depth] and module is not head:
                names.append(f"{parent}.{child}" if parent else child)
    return names


def capture(
    model: nn.Module,
    blocks: Sequence[nn.Module],
    batches: Sequence[tuple[Tensor, Tensor | None]],
    device: torch.device,
    keep: Callable[[Tensor], Tensor],
) -> Captured:
    """Run what stands before the blocks on every batch and record what each block would be called with.

    keep: puts hidden states where they stay between uses.
    Raises ModelError when the model changes hidden states between blocks, which a block-by-block walk cannot follow.
    """
    stumbled: list[Exception] = []
    for width in (0, 1, 2, 3):  # a block returns its hidden states plainly, or first in a tuple
        recorders = [_Recorder(block, width) for block in blocks]
        stream, kwargs = Stream([]), [[] for _ in blocks]  # type: ignore[var-annotated]
        try:
            for block, recorder in zip(blocks, recorders, strict=True):
                block.forward = recorder
            for ids, mask in batches:
                for recorder in recorders:
                    recorder.call = None
                recorders[-1].stop = True
                attention = None if mask is None else mask.to(device, torch.int64)
                try:
                    with torch.no_grad(), contextlib.suppress(Enough):
                        model(input_ids=ids.to(device), attention_mask=attention, use_cache=False)
                except Exception as error:
                    if is_out_of_memory(error):
                        raise RunError(
                            f"memory ran out in front of the first block: {error}. Give a smaller batch_size."
                        ) from None
                    # a model handed a tensor where it expects a tuple, or the reverse
                    stumbled.append(error)
                    break
                if not all(recorder.call for recorder in recorders) or not _unchanged(recorders):
                    break
                stream.hidden.append(keep(_first(recorders)))
                keep_on = device if mask is None else stream.hidden[-1].device  # what belongs to padding may be large
                for index, recorder in enumerate(recorders):
                    previous = kwargs[index][-1] if kwargs[index] else {}
                    kwargs[index].append(_reuse(own(recorder.call[1], keep_on), previous))  # type: ignore[index]
            else:
                return Captured(stream, kwargs, [mask for _, mask in batches])
        finally:
            for block in blocks:
                del block.forward
    found = f" It stopped with {type(stumbled[0]).__name__}: {stumbled[0]}" if len(stumbled) == 4 else ""
    raise ModelError(
        f"{type(model).__name__} does not hand hidden states from block to block unchanged, or does not call all of its "
        f"{len(blocks)} blocks; it cannot be quantized block by block.{found}"
    ) from (stumbled[0] if stumbled else None)


class _Recorder:
    """Stands in for a block's forward: notes the call and passes the hidden states on untouched."""

    def __init__(self, block: nn.Module, width: int) -> None:
        self.signature = inspect.signature(type(block).forward)
        self.width, self.stop = width, False
        self.call: tuple[Tensor, dict[str, Any]] | None = None

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        self.call = split_call(self.signature, args, kwargs)
        if self.stop:
            raise Enough
        return (self.call[0], *[None] * (self.width - 1)) if self.width else self.call[0]


def split_call(signature: inspect.Signature, args: Any, kwargs: dict[str, Any]) -> tuple[Tensor, dict[str, Any]]:
    """Return (hidden states, all else by keyword) of a block call, caches left out."""
    names = [name for name in signature.parameters if name != "self"]
    given = dict(zip(names, args, strict=False)) | kwargs
    hidden = given.pop(names[0])
    for name in ("past_key_value", "past_key_values", "layer_past", "use_cache"):
        if given.get(name) is not None:
            given[name] = False if name == "use_cache" else None
    return hidden, given


def _first(recorders: Sequence[_Recorder]) -> Tensor:
    call = recorders[0].call
    assert call is not None
    return call[0]


def _unchanged(recorders: Sequence[_Recorder]) -> bool:
    first = _first(recorders)
    return all(r.call is not None and isinstance(r.call[0], Tensor) and r.call[0] is first for r in recorders)


def own(value: Any, device: torch.device) -> Any:
    """Move the tensors of a nested value."""
    if isinstance(value, Tensor):
        return value.to(device)
    if isinstance(value, (list, tuple)):
        return type(value)(own(item, device) for item in value)
    if isinstance(value, dict):
        return {key: own(item, device) for key, item in value.items()}
    return value


def _reuse(value: Any, previous: Any) -> Any:
    """Return `value` with every tensor equal to the one in `previous` replaced by it: batches share their masks."""
    if isinstance(value, Tensor):
        same = isinstance(previous, Tensor) and value.shape == previous.shape and value.dtype == previous.dtype
        return previous if same and torch.equal(value, previous) else value
    if isinstance(value, (list, tuple)) and isinstance(previous, (list, tuple)) and len(value) == len(previous):
        return type(value)(_reuse(a, b) for a, b in zip(value, previous, strict=True))
    if isinstance(value, dict) and isinstance(previous, dict):
        return {key: _reuse(item, previous.get(key)) for key, item in value.items()}
    return value


def first_output(output: Any) -> Tensor:
    found: Tensor = output[0] if isinstance(output, (tuple, list)) else output
    return found
