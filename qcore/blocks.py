"""The block under work: observed, replayed, moved on. `Block` is the BlockContext that algorithms see."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import replace
from functools import cache, partial
from typing import Any

import torch
from torch import Tensor, nn

from .adapter import is_linear
from .algorithm import Linear, Task, TotalT
from .capture import Captured, Closing, Enough, Stream, first_output, own, watching
from .config import QuantConfig
from .errors import RunError
from .experts import Experts
from .linear import set_weight, weight_of
from .memory import MEMO_BYTES, Ferry
from .ranks import Ranks, Sums, assign
from .weight import QuantizedWeight

#: an expert that gets fewer tokens than this share of its columns is calibrated on all tokens
FEW_TOKENS = 0.25
#: tasks a deterministic run asks for: more than a block has, so that how it is cut does not depend on the processes
MANY = 2**20


class Span(nn.ModuleDict):
    """Consecutive blocks that run as one, by their names in the model's list; each has keyword arguments of its own."""

    def forward(self, hidden: Tensor, **kwargs: dict[str, Any]) -> Tensor:
        for name, block in self.items():
            hidden = _run(block, {}, hidden, kwargs[name])
        return hidden


class Block:
    """One decoder block under work, its weights in memory; implements algorithm.BlockContext (see there).

    stages: names inside the block; linears whose plan is None stay out of `linears` and `groups`. kwargs: the block's keyword
    arguments, batch by batch. batches_in_all: how many there are in all processes, where these are not all.
    """

    def __init__(
        self,
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
    ) -> None:
        self.index, self.name, self.module, self.device, self.seed = index, name, module, device, seed + index
        self.stream = captured.stream if captured else None
        self.masks = captured.masks if captured else []
        self.float_inputs, self.kwargs, self.memo_bytes = float_inputs, kwargs, memo_bytes
        self.ranks, self.ferry = ranks or Ranks.alone(), Ferry(device)
        self.batches_in_all = count = len(kwargs) if batches_in_all is None else batches_in_all
        self.share = self.ranks.share(count) if len(kwargs) < count else range(count)  # which of all batches these are
        named = [[tuple(f"{name}.{short}" for short in group) for group in stage] for stage in stages]
        configs = {full: plan[full] for stage in named for group in stage for full in group}
        self.linears: Mapping[str, Linear] = {
            full: self._linear(full, config, dtype_of) for full, config in configs.items() if config is not None
        }
        kept = [[tuple(full for full in group if full in self.linears) for group in stage] for stage in named]
        planned = [[group for group in stage if group] for stage in kept]
        self.stages: Sequence[Sequence[tuple[str, ...]]] = [stage for stage in planned if stage]
        self.groups: Sequence[tuple[str, ...]] = [group for stage in planned for group in stage]
        self.records: dict[str, dict[str, Any]] = {full: {} for full in self.linears}
        self._memo: dict[str, dict[int, Any]] = {}  # part -> batch -> its output
        self._tails: dict[str, dict[int, Tensor]] = {}  # child -> batch -> input of its closing linear
        self._final: dict[str, QuantizedWeight] = {}  # what `replace` gave each linear last
        self._observing = 0  # the batch that `observe` shows, numbered among all
        self._agreed: set[str] = set()  # linears whose weight all processes have from `spread`

    def _linear(self, name: str, config: QuantConfig, dtype_of: Callable[[str], torch.dtype]) -> Linear:
        module = self._module(name)
        bias = getattr(module, "bias", None)
        bias = None if bias is None else bias.detach().to("cpu", dtype_of(f"{name}.bias"))
        return Linear(name, weight_of(module).detach().contiguous(), bias, config)

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

            def note(_: str, args: tuple[Any, ...], mask: Tensor | None = mask) -> None:
                nonlocal total
                chosen = _tokens(args[1], mask)  # [tokens, k]
                total += len(chosen)
                for index in range(len(counts)):
                    counts[index] += int((chosen == index).sum())
                raise Enough

            with watching({"": experts}, note), contextlib.suppress(Enough):
                self.forward(hidden, kwargs)
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

    def drop_original(self, name: str) -> None:
        """Let go of a linear's float weight, which nothing asks for any more."""
        linear = self.linears[name]
        self.linears = {**self.linears, name: replace(linear, weight=linear.weight.to("meta"))}

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
            yield hidden, own(self.kwargs[number], self.device), self.masks[number]

    def batch(self, number: int, *, float_stream: bool = False) -> tuple[Tensor, dict[str, Any], Tensor | None]:
        hidden = self._source(float_stream).hidden[number].to(self.device)
        return hidden, own(self.kwargs[number], self.device), self.masks[number]

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

    @contextlib.contextmanager
    def original_weights(self) -> Iterator[None]:
        """Within it every linear has its float weight again."""
        current: dict[str, Any] = {}
        for name, linear in self.linears.items():
            current[name] = self._module(name).weight
            set_weight(self._module(name), linear.weight)
        try:
            yield
        finally:
            for name, weight in current.items():
                self._module(name).weight = weight

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
            hidden, arguments = stream.hidden[number], own(self.kwargs[number], self.device)
            if original:

                def note(name: str, args: tuple[Any, ...], mask: Tensor | None = self.masks[number]) -> None:
                    visit(name, _tokens(args[0], mask))  # type: ignore[misc]

                with watching(self._modules(names if visit else ()), note):
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

    def _module(self, name: str) -> nn.Module:
        return self.module.get_submodule(name.removeprefix(f"{self.name}."))

    def _modules(self, names: Iterable[str]) -> dict[str, nn.Module]:
        return {name: self._module(name) for name in names}

    @torch.no_grad()
    def _inputs(
        self, names: Sequence[str], hidden: Tensor, kwargs: dict[str, Any], mask: Tensor | None, memo_for: int | None
    ) -> dict[str, Tensor]:
        """Run one batch until every named linear has been called; return their inputs as [tokens, in]."""
        seen: dict[str, list[Tensor]] = {}
        last: dict[str, Tensor] = {}

        def note(name: str, args: tuple[Any, ...]) -> None:
            seen.setdefault(name, []).append(_tokens(args[0], mask))
            last[name] = args[0]
            if len(seen) == len(names):
                raise Enough

        memoised = contextlib.nullcontext() if memo_for is None else _Memoised(self, memo_for)
        with watching(self._modules(names), note), contextlib.suppress(Enough), memoised:
            self.forward(hidden, kwargs)
        if memo_for is not None and len(last) == 1 and len(seen[name := next(iter(last))]) == 1:
            self._keep_tail(name, last[name], memo_for)
        return {name: torch.cat(parts) if len(parts) > 1 else parts[0] for name, parts in seen.items()}


def _run(module: nn.Module, weights: dict[str, Tensor], hidden: Tensor, kwargs: dict[str, Any]) -> Tensor:
    """Call a block with some parameters replaced; knows no block by name, so that one compilation serves all."""
    if weights:
        output = torch.func.functional_call(module, weights, (hidden,), kwargs)
    else:
        output = module(hidden, **kwargs)
    return first_output(output)


@cache
def _compiled_run() -> Callable[..., Tensor]:
    """`_run`, compiled soon: kernels are not picked by how long they took, which also keeps equal runs equal, and no patterns are looked
    for, of which blocks hold none that pays (half of the compilation; the steps of a Llama block are as fast).
    """
    options: dict[str, Any] = {"triton.autotune_pointwise": False, "pattern_matcher": False, "deterministic": True}
    known = torch._inductor.list_options()
    return torch.compile(_run, options={name: value for name, value in options.items() if name in known})


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
    noted = {f"{FACT}{key}": fact.to(device) for key, fact in facts.items() if isinstance(fact, Tensor)}
    return {name: tensor.contiguous() for name, tensor in {**weight.to_tensors(device), **noted}.items()}


def _described(parts: Mapping[str, Tensor], config: QuantConfig, facts: Mapping[str, Any]) -> tuple[Any, ...]:
    """Return what another process needs to know to receive `_parts`; facts that are tensors stand as None."""
    layout = {name: (tensor.shape, tensor.dtype) for name, tensor in parts.items()}
    return layout, config, {key: None if isinstance(fact, Tensor) else fact for key, fact in facts.items()}


def _from_parts(parts: dict[str, Tensor], config: QuantConfig) -> QuantizedWeight:
    if "bias" in parts:
        parts["bias"] = parts["bias"].cpu()
    return QuantizedWeight.from_tensors(parts, config)


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

        def note(inner: str, _: Any, output: Tensor) -> None:
            outputs[inner] = output, _versions(output)

        linears = {inner: linear for inner, linear in module.named_modules() if is_linear(linear)}
        with watching(linears, note, after=True):
            output = compute(module, *args, **kwargs)
        first, width = first_output(output), len(output) if isinstance(output, tuple) else 0
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
        return value.nbytes
    if isinstance(value, (list, tuple)):
        return sum(_size(item) for item in value)
    return sum(_size(item) for item in value.values()) if isinstance(value, dict) else 0
