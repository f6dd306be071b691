"""The walk over decoder blocks: bring in, observe, replay, let go.

`capture` runs the model's own forward once with every block replaced by a recorder, so that whatever a model passes to
its blocks (masks, rotary embeddings, per-layer variants of both) is what they get here. `Block` is the BlockContext
that algorithms see.
"""

from __future__ import annotations

import contextlib
import inspect
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cache, partial
from typing import Any

import torch
from torch import Tensor, nn

from .adapter import is_linear
from .algorithm import Linear, Task, TotalT
from .config import QuantConfig
from .errors import ModelError, RunError
from .experts import Experts
from .linear import set_weight, weight_of
from .memory import MEMO_BYTES, Ferry, is_out_of_memory
from .packing import pack
from .ranks import Ranks, Sums, assign
from .weight import QuantizedWeight

#: an expert that gets fewer tokens than this share of its columns is calibrated on all tokens
FEW_TOKENS = 0.25
#: tasks a deterministic run asks for: more than a block has, so that how it is cut does not depend on the processes
MANY = 2**20


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


class _Enough(Exception):
    """Everything wanted from this forward pass has been seen."""


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
                    _run_until_enough(model, ids.to(device), attention)
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
                    kwargs[index].append(_reuse(_own(recorder.call[1], keep_on), previous))  # type: ignore[index]
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


def _run_until_enough(model: nn.Module, ids: Tensor, attention: Tensor | None) -> None:
    try:
        with torch.no_grad():
            model(input_ids=ids, attention_mask=attention, use_cache=False)
    except _Enough:
        pass


class _Recorder:
    """Stands in for a block's forward: notes the call and passes the hidden states on untouched."""

    def __init__(self, block: nn.Module, width: int) -> None:
        self.signature = inspect.signature(type(block).forward)
        self.width, self.stop = width, False
        self.call: tuple[Tensor, dict[str, Any]] | None = None

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        self.call = split_call(self.signature, args, kwargs)
        if self.stop:
            raise _Enough
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


def _own(value: Any, device: torch.device) -> Any:
    """Move the tensors of a nested value."""
    if isinstance(value, Tensor):
        return value.to(device)
    if isinstance(value, (list, tuple)):
        return type(value)(_own(item, device) for item in value)
    if isinstance(value, dict):
        return {key: _own(item, device) for key, item in value.items()}
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


class Span(nn.ModuleDict):
    """Consecutive blocks that run as one, by their names in the model's list; each has keyword arguments of its own."""

    def forward(self, hidden: Tensor, **kwargs: dict[str, Any]) -> Tensor:
        for name, block in self.items():
            hidden = _run(block, {}, hidden, kwargs[name])
        return hidden


@dataclass
class Block:
    """One decoder block under work; implements algorithm.BlockContext (see there)."""

    index: int
    name: str
    module: nn.Module
    device: torch.device
    seed: int
    linears: Mapping[str, Linear]
    groups: Sequence[tuple[str, ...]]
    stages: Sequence[Sequence[tuple[str, ...]]]
    stream: Stream | None
    float_inputs: Stream | None
    kwargs: list[dict[str, Any]]
    masks: list[Tensor | None]
    records: dict[str, dict[str, Any]]
    ranks: Ranks
    share: range  # which of all calibration batches these are, and how many there are in all
    batches_in_all: int
    ferry: Ferry
    memo_bytes: int = MEMO_BYTES
    _memo: dict[str, dict[int, Any]] = field(default_factory=dict)  # part -> batch -> its output
    _tails: dict[str, dict[int, Tensor]] = field(default_factory=dict)  # child -> batch -> input of its closing linear
    _final: dict[str, QuantizedWeight] = field(default_factory=dict)  # what `replace` gave each linear last
    _observing: int = 0  # the batch that `observe` shows, numbered among all
    _agreed: set[str] = field(default_factory=set)  # linears whose weight all processes have from `spread`

    @property
    def workers(self) -> int:
        return MANY if self.ranks.deterministic else self.ranks.size

    @torch.no_grad()
    def widen_starved(self) -> None:
        """Let experts that too few calibration tokens are routed to be calibrated on all tokens, and record which.

        Too few is less than FEW_TOKENS times the columns of their linears: most directions would go unseen.
        """
        for name, module in self.module.named_modules():
            if isinstance(module, Experts) and self.stream is not None:
                counts, total = self._routed(module)
                for index in range(len(counts)):
                    prefix = f"{self.name}.{name}.{index}."
                    mine = [linear for linear in self.linears if linear.startswith(prefix)]
                    columns = max((self.linears[linear].weight.shape[1] for linear in mine), default=0)
                    if counts[index] < FEW_TOKENS * columns:
                        module.widened.add(index)
                        for linear in mine:
                            self.record(
                                linear, note=f"{counts[index]} of {total} tokens routed here: calibrated on all"
                            )

    def _routed(self, experts: Experts) -> tuple[list[int], int]:
        """How many calibration tokens each expert gets, and how many there are."""
        counts, total = [0] * len(experts), 0
        for hidden, kwargs, mask in self.batches():

            def note(_: nn.Module, args: tuple[Any, ...], mask: Tensor | None = mask) -> None:
                nonlocal total
                chosen = _tokens(args[1], mask)  # [tokens, k]
                total += len(chosen)
                for index in range(len(counts)):
                    counts[index] += int((chosen == index).sum())
                raise _Enough

            hook = experts.register_forward_pre_hook(note)
            try:
                self.forward(hidden, kwargs)
            except _Enough:
                pass
            finally:
                hook.remove()
        if len(self.share) < self.batches_in_all:
            everywhere = torch.tensor([*counts, total], device=self.device)
            self.ranks.sum([everywhere])
            *counts, total = everywhere.tolist()
        return counts, total

    def narrow(self) -> None:
        """Undo `widen_starved`."""
        for module in self.module.modules():
            if isinstance(module, Experts) and module.widened:
                module.widened.clear()
                self._forget()  # what is kept is for all tokens

    def observe(self, names: Sequence[str], visit: Callable[..., None], *, paired: bool = False) -> None:
        if paired and self.float_inputs is None:
            raise RunError("paired observation needs an algorithm with float_stream.")
        if paired:
            self._source(float_stream=True)
        for number, (hidden, kwargs, mask) in enumerate(self.batches()):
            self._observing = self.share[number]
            seen = self._inputs(names, hidden, kwargs, mask, number)
            if not paired:
                for name, x in seen.items():
                    visit(name, x)
                continue
            assert self.float_inputs is not None
            with self.original_weights():
                float_hidden = self.float_inputs.hidden[number].to(self.device)
                original = self._inputs(names, float_hidden, kwargs, mask, None)
            for name, x in seen.items():
                if x.shape != original[name].shape:
                    raise RunError(
                        f"{name}: quantized and float inputs differ in shape; routing differs between streams."
                    )
                visit(name, x, original[name])

    def accumulate(
        self, names: Sequence[str], make: Callable[[str], TotalT], *, paired: bool = False
    ) -> dict[str, TotalT]:
        ranks = self.ranks if len(self.share) < self.batches_in_all else Ranks.alone(self.ranks.deterministic)
        sums = {name: Sums(ranks, self.batches_in_all, partial(make, name)) for name in names}

        def visit(name: str, *inputs: Tensor) -> None:
            sums[name].of(self._observing).add(*inputs)

        self.observe(names, visit, paired=paired)
        return {name: sums.pop(name).finish() for name in names}

    def spread(self, tasks: list[Task]) -> dict[str, QuantizedWeight]:
        owners = assign([task.cost for task in tasks], self.ranks.size)
        owner_of = {name: owner for task, owner in zip(tasks, owners, strict=True) for name in task.names}
        self._agreed |= owner_of.keys()
        found: dict[str, QuantizedWeight] = {}
        for owner in owners:
            task = tasks.pop(0)
            if owner == self.ranks.rank:
                found |= task.work()
            del task
        return self._exchange(owner_of, found)

    def agree(self, results: Mapping[str, QuantizedWeight]) -> dict[str, QuantizedWeight]:
        """Return results that are the same on every process: what did not come from `spread` is taken from the first."""
        rest = {name: 0 for name in results if name not in self._agreed}
        return {**results, **self._exchange(rest, results)}

    def _exchange(
        self, owner_of: Mapping[str, int], found: Mapping[str, QuantizedWeight]
    ) -> dict[str, QuantizedWeight]:
        """Return the named weights, each from the process that owns it; their records come along.

        Hosts wait for each other, but not for what their GPUs have yet to compute.
        """
        if self.ranks.size == 1 or not owner_of:
            return {name: found[name] for name in owner_of}
        own = [name for name, owner in owner_of.items() if owner == self.ranks.rank]
        mine = {name: _parts(found[name], self.records[name], self.device) for name in own}
        told = self.ranks.gather({name: _described(mine[name], found[name].config, self.records[name]) for name in own})
        results: dict[str, QuantizedWeight] = {}
        for owner in sorted(set(owner_of.values())):
            parts = mine if owner == self.ranks.rank else {
                name: {part: torch.empty(shape, dtype=dtype, device=self.device) for part, (shape, dtype) in layout.items()}
                for name, (layout, _, _) in told[owner].items()
            }  # fmt: skip
            self.ranks.send([tensor for each in parts.values() for tensor in each.values()], owner)
            for name, (_, config, facts) in told[owner].items():
                self.records[name] = {key: parts[name].pop(f"{FACT}{key}", fact) for key, fact in facts.items()}
                results[name] = found[name] if owner == self.ranks.rank else _from_parts(parts[name], config)
        return {name: results[name] for name in owner_of}

    def replace(self, name: str, weight: QuantizedWeight) -> None:
        set_weight(self._module(name), weight.to(self.device).dequantize(self.linears[name].weight.dtype))
        position = self._position(name)
        if name in self._final or any(self._position(other) > position for other in self._final):
            self._forget()  # out of order: what ran behind this linear has another input now
        self._final[name] = weight

    def _forget(self) -> None:
        """Drop what is kept of earlier replays."""
        for kept in (*self._memo.values(), *self._tails.values()):
            self.memo_bytes += sum(_size(each) for each in kept.values())
        self._memo.clear()
        self._tails.clear()

    def _keep_tail(self, name: str, x: Tensor, batch: int) -> None:
        """Keep a linear's input when it closes a child of the block and nothing in front of it changes any more."""
        child = name.removeprefix(f"{self.name}.").partition(".")[0]
        part, closing = f"{self.name}.{child}", self._closing(child)
        before = {other for other in self.linears if self._position(other) < self._position(name)}
        if closing is None or name != f"{part}.{closing.linear}" or not before <= self._final.keys():
            return
        for other, kept in self._memo.items():
            if other.startswith(f"{part}."):
                self.memo_bytes += _size(kept.pop(batch, (None,))[0])
        if _size(x) <= self.memo_bytes:
            self.memo_bytes -= _size(x)
            self._tails.setdefault(part, {})[batch] = x

    def _closing(self, child: str) -> Closing | None:
        return self.stream.closing.get((type(self.module.get_submodule(child)), child)) if self.stream else None

    def acts_as(self, name: str, weight: QuantizedWeight) -> bool:
        """Whether replays run this linear with this weight."""
        return name in self._final and (self._final[name] is weight or self._final[name].equal(weight))

    def finished_parts(self) -> list[str]:
        """Names of the finished linears, and of the children of the block in which every linear is finished."""
        parts: list[str] = []
        for child, module in self.module.named_children():
            prefix = f"{self.name}.{child}"
            inside = [f"{prefix}.{n}".rstrip(".") for n, sub in module.named_modules() if is_linear(sub)]
            if inside and self._final.keys() >= set(inside):
                parts.append(prefix)
            parts += [name for name in inside if name in self._final and name != prefix]
        return parts

    def _position(self, name: str) -> int:
        return next(i for i, group in enumerate(self.groups) if name in group)

    def batches(self, *, float_stream: bool = False) -> Iterator[tuple[Tensor, dict[str, Any], Tensor | None]]:
        for number, hidden in enumerate(self.ferry.bring(self._source(float_stream).hidden)):
            yield hidden, _own(self.kwargs[number], self.device), self.masks[number]

    def batch(self, number: int, *, float_stream: bool = False) -> tuple[Tensor, dict[str, Any], Tensor | None]:
        hidden = self._source(float_stream).hidden[number].to(self.device)
        return hidden, _own(self.kwargs[number], self.device), self.masks[number]

    def _source(self, float_stream: bool) -> Stream:
        source = self.float_inputs if float_stream else self.stream
        if source is None:
            raise RunError("this algorithm asked for calibration data it did not declare.")
        if float_stream and self._float_moved_on:
            raise RunError("the float stream's inputs of this block are gone: float_outputs was called before.")
        return source

    @property
    def _float_moved_on(self) -> bool:
        """Whether float_inputs hold this block's outputs already."""
        return self.float_inputs is not None and self.float_inputs.passed == self.index

    def float_outputs(
        self, names: Sequence[str] = (), visit: Callable[[str, Tensor], None] | None = None
    ) -> Sequence[Tensor]:
        if not self._float_moved_on:
            source = self._source(float_stream=True)
            with self.original_weights():
                self.advance(source, original=True, names=names, visit=visit)
        assert self.float_inputs is not None
        return self.float_inputs.hidden

    def forward(
        self,
        hidden: Tensor,
        kwargs: dict[str, Any],
        weights: Mapping[str, Tensor] | None = None,
        *,
        compiled: bool = False,
    ) -> Tensor:
        layouts = {}
        for name, weight in (weights or {}).items():
            short = name.removeprefix(f"{self.name}.")
            layouts[f"{short}.weight"] = weight if isinstance(self._module(name), nn.Linear) else weight.t()
        run = _compiled_run() if compiled else _run
        return run(self.module, layouts, hidden, kwargs)

    def record(self, name: str, **facts: Any) -> None:
        self.records[name].update(facts)

    def original_weights(self) -> _OriginalWeights:
        """A context in which every linear has its float weight again."""
        return _OriginalWeights(self)

    @torch.no_grad()
    def advance(
        self,
        stream: Stream,
        *,
        original: bool = False,
        names: Sequence[str] = (),
        visit: Callable[[str, Tensor], None] | None = None,
    ) -> None:
        """Send a stream's hidden states through the block, in place; names, visit: see `float_outputs`.

        Raises RunError when they become NaN or Inf, naming the block.
        """
        finite = torch.ones((), dtype=torch.bool, device=self.device)  # looked at once: looking makes the host wait
        for number, inputs in enumerate(self.ferry.bring(stream.hidden, stream.moved), stream.moved):
            hidden, arguments = stream.hidden[number], _own(self.kwargs[number], self.device)
            if original:
                with self._watched(names, visit, self.masks[number]):
                    output = self.forward(inputs, arguments)
            else:
                with _Memoised(self, number):
                    output = self.forward(inputs, arguments)
            finite &= torch.isfinite(_tokens(output, self.masks[number])).all()
            if output.shape == hidden.shape and output.dtype == hidden.dtype:
                self.ferry.put(
                    hidden, output
                )  # a new tensor would outlive the temporary ones around it and splinter the heap
            else:
                stream.hidden[number] = output.to(hidden.device)
            stream.moved += 1
        self.ferry.wait()
        stream.passed, stream.moved = self.index, 0
        if not bool(finite):
            raise RunError(
                f"the hidden states after block {self.name} hold NaN or Inf"
                f"{'' if original else ' (quantized)'}; its activations overflow {stream.hidden[0].dtype}. "
                "Try another dtype (bfloat16 or float32), or look for damaged weights in this block."
            )

    @contextlib.contextmanager
    def _watched(self, names: Sequence[str], visit: Callable[[str, Tensor], None] | None, mask: Any) -> Iterator[None]:
        """Show `visit` the inputs [tokens, in] of the named linears as they run."""
        hooks = []
        if visit is not None:
            for name in names:

                def note(_: nn.Module, args: tuple[Any, ...], name: str = name) -> None:
                    visit(name, _tokens(args[0], mask))

                hooks.append(self._module(name).register_forward_pre_hook(note))
        try:
            yield
        finally:
            for hook in hooks:
                hook.remove()

    def _module(self, name: str) -> nn.Module:
        return self.module.get_submodule(name.removeprefix(f"{self.name}."))

    @torch.no_grad()
    def _inputs(
        self, names: Sequence[str], hidden: Tensor, kwargs: dict[str, Any], mask: Tensor | None, memo_for: int | None
    ) -> dict[str, Tensor]:
        """Run one batch until every named linear has been called; return their inputs as [tokens, in]."""
        seen: dict[str, list[Tensor]] = {}
        last: dict[str, Tensor] = {}
        hooks = []
        for name in names:

            def note(_: nn.Module, args: tuple[Any, ...], name: str = name) -> None:
                seen.setdefault(name, []).append(_tokens(args[0], mask))
                last[name] = args[0]
                if len(seen) == len(names):
                    raise _Enough

            hooks.append(self._module(name).register_forward_pre_hook(note))
        try:
            if memo_for is None:
                self.forward(hidden, kwargs)
            else:
                with _Memoised(self, memo_for):
                    self.forward(hidden, kwargs)
        except _Enough:
            pass
        finally:
            for hook in hooks:
                hook.remove()
        if memo_for is not None and len(last) == 1 and len(seen[name := next(iter(last))]) == 1:
            self._keep_tail(name, last[name], memo_for)
        return {name: torch.cat(parts) if len(parts) > 1 else parts[0] for name, parts in seen.items()}


def _run(module: nn.Module, weights: dict[str, Tensor], hidden: Tensor, kwargs: dict[str, Any]) -> Tensor:
    """Call a block with some parameters replaced; knows no block by name, so that one compilation serves all."""
    if weights:
        output = torch.func.functional_call(module, weights, (hidden,), kwargs)
    else:
        output = module(hidden, **kwargs)
    return _first_output(output)


@cache
def _compiled_run() -> Callable[..., Tensor]:
    """`_run`, compiled; where torch has the choice, with kernels that are not picked by how long they took."""
    steady = "deterministic" in torch._inductor.list_options()
    return torch.compile(_run, options={"deterministic": True} if steady else None)


def _tokens(x: Tensor, mask: Tensor | None) -> Tensor:
    """Flatten inputs to [tokens, in], leaving padding out where the layout still shows it: [batch, length, in], [length,
    batch, in] (ChatGLM) or [batch * length, in].
    """
    if mask is not None and x.shape[:-1] == mask.shape:
        return x[mask.to(x.device)]
    if mask is not None and x.shape[:-1] == mask.t().shape:
        return x[mask.t().to(x.device)]
    if mask is not None and x.ndim == 2 and x.shape[0] == mask.numel():
        return x[mask.reshape(-1).to(x.device)]
    return x.reshape(-1, x.shape[-1])


#: in front of a fact's name among the parts of a weight
FACT = "fact."


def _parts(weight: QuantizedWeight, facts: Mapping[str, Any], device: torch.device) -> dict[str, Tensor]:
    """Return a weight as it is sent to other processes: as `QuantizedWeight.from_tensors` takes it, on `device`.

    With it go the facts recorded of it that are tensors.
    """
    parts = {
        "codes": pack(weight.codes, weight.bits),
        "scales": weight.scales,
        "zeros": weight.zeros,
        "g_idx": weight.g_idx,
    }
    if weight.bias is not None:
        parts["bias"] = weight.bias
    parts |= {f"{FACT}{key}": fact for key, fact in facts.items() if isinstance(fact, Tensor)}
    return {name: tensor.to(device).contiguous() for name, tensor in parts.items()}


def _described(parts: Mapping[str, Tensor], config: QuantConfig, facts: Mapping[str, Any]) -> tuple[Any, ...]:
    """Return what another process needs to know to receive `_parts`; facts that are tensors stand as None."""
    layout = {name: (tensor.shape, tensor.dtype) for name, tensor in parts.items()}
    return layout, config, {key: None if isinstance(fact, Tensor) else fact for key, fact in facts.items()}


def _from_parts(parts: dict[str, Tensor], config: QuantConfig) -> QuantizedWeight:
    if "bias" in parts:
        parts["bias"] = parts["bias"].cpu()
    return QuantizedWeight.from_tensors(parts, config)


class _OriginalWeights:
    def __init__(self, block: Block) -> None:
        self.block = block
        self.current: dict[str, Any] = {}

    def __enter__(self) -> None:
        for name, linear in self.block.linears.items():
            module = self.block._module(name)
            self.current[name] = module.weight
            set_weight(module, linear.weight)

    def __exit__(self, *_: object) -> None:
        for name, weight in self.current.items():
            self.block._module(name).weight = weight


class _Memoised:
    """While active, finished parts of the block return the output they gave for this batch in an earlier replay.

    Replaying a block once per group of linears would compute the first groups again and again. Their weights are
    final and their inputs the same, so their outputs are too: within a budget they are kept, exactly. A part is a
    finished linear, or a child of the block whose linears all are (the whole attention): once a child's output is kept,
    those of its linears need not be. Nor is the child run when the input of the linear that closes it was kept.
    """

    def __init__(self, block: Block, batch: int) -> None:
        self.block, self.batch = block, batch
        self.parts = {name: block._module(name) for name in block.finished_parts()}

    def __enter__(self) -> None:
        for name, module in self.parts.items():
            module.forward = self._wrap(name, type(module).forward, module)

    def __exit__(self, *_: object) -> None:
        for module in self.parts.values():
            del module.forward

    def _wrap(self, name: str, compute: Callable[..., Any], module: nn.Module) -> Callable[..., Any]:
        kept = self.block._memo.setdefault(name, {})
        inner = [self.block._memo[other] for other in self.block._memo if other.startswith(f"{name}.")]
        calls = 0

        def forward(*args: Any, **kwargs: Any) -> Any:
            nonlocal calls
            calls += 1
            if calls > 1:  # a part used twice in one pass has two inputs
                return compute(module, *args, **kwargs)
            if self.batch in kept and kept[self.batch][1] != _versions(kept[self.batch][0]):
                return compute(module, *args, **kwargs)  # the block wrote into it (Falcon adds to its MLP's output)
            if self.batch not in kept:
                output = self._from_tail(name)
                if output is None:
                    output = self._compute(name, module, compute, args, kwargs)
                for outputs in inner:
                    self.block.memo_bytes += _size(outputs.pop(self.batch, (None,))[0])
                size = _size(output)
                if size > self.block.memo_bytes:
                    return output
                self.block.memo_bytes -= size
                kept[self.batch] = output, _versions(output)
            return kept[self.batch][0]

        return forward

    def _from_tail(self, name: str) -> Any:
        """A child's output from the kept input of its closing linear, or None."""
        x = self.block._tails.get(name, {}).pop(self.batch, None)
        child = name.removeprefix(f"{self.block.name}.")
        closing = self.block._closing(child)
        if x is None or closing is None:
            return None
        self.block.memo_bytes += _size(x)
        linear = self.block.module.get_submodule(child).get_submodule(closing.linear)
        output = type(linear).forward(linear, x)
        return (output, *[None] * (closing.width - 1)) if closing.width else output

    def _compute(self, name: str, module: nn.Module, compute: Callable[..., Any], args: Any, kwargs: Any) -> Any:
        """Run a part; the first time, find the linear that closes it."""
        key = type(module), name.removeprefix(f"{self.block.name}.")
        if is_linear(module) or self.block.stream is None or key in self.block.stream.closing:
            return compute(module, *args, **kwargs)
        outputs: dict[str, tuple[Tensor, list[int]]] = {}
        hooks = []
        for inner, linear in module.named_modules():
            if is_linear(linear):

                def note(_: nn.Module, __: Any, output: Tensor, inner: str = inner) -> None:
                    outputs[inner] = output, _versions(output)

                hooks.append(linear.register_forward_hook(note))
        try:
            output = compute(module, *args, **kwargs)
        finally:
            for hook in hooks:
                hook.remove()
        first, width = _first_output(output), len(output) if isinstance(output, tuple) else 0
        found = [inner for inner, (x, versions) in outputs.items() if x is first and versions == _versions(x)]
        plain = width == 0 or (type(output) is tuple and all(other is None for other in output[1:]))
        self.block.stream.closing[key] = Closing(found[0], width) if found and plain else None
        return output


def _versions(value: Any) -> list[int]:
    """How often each tensor of a nested value was written into."""
    if isinstance(value, Tensor):
        return [value._version]
    items = value.values() if isinstance(value, dict) else value if isinstance(value, (list, tuple)) else ()
    return [version for item in items for version in _versions(item)]


def _size(value: Any) -> int:
    """Bytes of the tensors in a nested value."""
    if isinstance(value, Tensor):
        return value.numel() * value.element_size()
    if isinstance(value, (list, tuple)):
        return sum(_size(item) for item in value)
    return sum(_size(item) for item in value.values()) if isinstance(value, dict) else 0


def make_block(
    index: int,
    name: str,
    module: nn.Module,
    stages: Sequence[Sequence[tuple[str, ...]]],
    plan: Mapping[str, QuantConfig | None],
    dtype_of: Callable[[str], torch.dtype],
    captured: Captured | None,
    kwargs: list[dict[str, Any]],
    float_inputs: Stream | None,
    device: torch.device,
    seed: int,
    memo_bytes: int = MEMO_BYTES,
    ranks: Ranks | None = None,
    batches_in_all: int | None = None,
) -> Block:
    """Set up a block whose weights are in memory; kwargs: its keyword arguments, batch by batch.

    Linears whose plan is None stay out of `linears` and `groups`.
    """
    linears: dict[str, Linear] = {}
    for group in (group for stage in stages for group in stage):
        for short in group:
            full = f"{name}.{short}"
            config = plan[full]
            if config is not None:
                linear = module.get_submodule(short)
                bias = getattr(linear, "bias", None)
                bias = None if bias is None else bias.detach().to("cpu", dtype_of(f"{full}.bias"))
                linears[full] = Linear(full, weight_of(linear).detach().contiguous(), bias, config)
    named = [
        [tuple(f"{name}.{short}" for short in group if f"{name}.{short}" in linears) for group in stage]
        for stage in stages
    ]
    planned = [[group for group in stage if group] for stage in named]
    ranks = ranks or Ranks.alone()
    count = len(kwargs) if batches_in_all is None else batches_in_all
    return Block(
        index=index,
        name=name,
        module=module,
        device=device,
        seed=seed + index,
        linears=linears,
        groups=[group for stage in planned for group in stage],
        stages=[stage for stage in planned if stage],
        stream=captured.stream if captured else None,
        float_inputs=float_inputs,
        kwargs=kwargs,
        masks=captured.masks if captured else [],
        records={full: {} for full in linears},
        ranks=ranks,
        share=ranks.share(count) if len(kwargs) < count else range(count),
        batches_in_all=count,
        ferry=Ferry(device),
        memo_bytes=memo_bytes,
    )


@torch.no_grad()
def check_causal(module: nn.Module, hidden: Tensor, kwargs: dict[str, Any], model: str) -> None:
    """Raise ModelError when what a block makes of the first tokens depends on the last one. hidden: one sequence."""

    def by_token(x: Tensor) -> Tensor:  # from [1, length, …], [length, 1, …] or [length, hidden]
        return x.flatten(0, 1) if x.ndim > 2 else x

    changed = hidden.clone()
    by_token(changed)[-1].neg_()
    first, second = (_first_output(module(x, **kwargs)) for x in (hidden.clone(), changed))
    earlier = [by_token(x)[:-1].float() for x in (first, second)]
    if float((earlier[0] - earlier[1]).norm()) > 1e-2 * float(earlier[0].norm()):
        raise ModelError(
            f"{model} is no causal language model: in its block {type(module).__name__} earlier tokens see later ones. "
            "qcore quantizes causal ones; if this is a decoder run as an encoder, look for is_decoder in its config."
        )


def _first_output(output: Any) -> Tensor:
    found: Tensor = output[0] if isinstance(output, (tuple, list)) else output
    return found


@contextlib.contextmanager
def all_experts(module: nn.Module) -> Iterator[None]:
    """Within it every expert runs, on every token."""
    found = [experts for experts in module.modules() if isinstance(experts, Experts)]
    for experts in found:
        experts.widened.update(range(len(experts)))
    try:
        yield
    finally:
        for experts in found:
            experts.widened.clear()


@torch.no_grad()
def inputs_of(module: nn.Module, hidden: Tensor, kwargs: dict[str, Any]) -> dict[str, int]:
    """Run one block and number the inputs of its linears, which stand in the order they ran; equal numbers: one tensor.

    A linear that computes more or less than its product (a router that also chooses) counts as not run.
    """
    inputs: list[tuple[Tensor, int]] = []
    numbers: dict[str, int] = {}

    def watch(name: str) -> Callable[..., None]:
        def note(linear: nn.Module, args: tuple[Any, ...], output: Any) -> None:
            x = args[0]
            if not _is_product(linear, x, output):
                return
            for number, (known, version) in enumerate(inputs):
                same = known.data_ptr() == x.data_ptr() and known.numel() == x.numel() and version == x._version
                if same and known.shape[-1] == x.shape[-1]:
                    numbers.setdefault(name, number)
                    return
            inputs.append((x, x._version))  # holding x keeps its memory from being reused under another input
            numbers.setdefault(name, len(inputs) - 1)

        return note

    hooks = [m.register_forward_hook(watch(name)) for name, m in module.named_modules() if is_linear(m)]
    try:
        module(hidden, **kwargs)
    finally:
        for hook in hooks:
            hook.remove()
    return numbers


def _is_product(linear: Any, x: Tensor, output: Any) -> bool:
    expected = nn.functional.linear(x, weight_of(linear), linear.bias)
    same_shape = isinstance(output, Tensor) and output.shape == expected.shape
    return same_shape and float((output - expected).float().norm()) <= 1e-2 * float(expected.float().norm())


def order_of_use(module: nn.Module, hidden: Tensor, kwargs: dict[str, Any]) -> list[tuple[str, ...]]:
    """Run one block and return the groups of its linears that got the very same input tensor, in the order they ran.

    Linears that did not run, as linears, are left out.
    """
    groups: dict[int, list[str]] = {}
    for name, number in inputs_of(module, hidden, kwargs).items():
        groups.setdefault(number, []).append(name)
    return [tuple(names) for names in groups.values()]
