"""A tape: the torch ops that a function ran on a CPU, replayed on the tensors they ran on, without the function's own Python.

What CUDA graphs are to a GPU, with the same limits: tensors stay where they are, and numbers that Python read are those of the
recording. Views need no replay, constants need none either, and every other op writes to where its result was. The
same kernels run in the same order on the same memory, so the results are the same bits. Nothing is compiled.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterable, Iterator, Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

#: ops with one of these tags cannot be replayed: they hand a number to Python, or have results of any shape
_UNFIT = (torch.Tag.data_dependent_output, torch.Tag.dynamic_output_shape)

Call = tuple[Any, tuple[Any, ...], dict[str, Any], Any]  # overload, arguments, keywords, result


class Unfit(Exception):
    """A function cannot be recorded; the message says why."""


def record(function: Callable[[], Tensor], constants: Iterable[Tensor]) -> Callable[[], Tensor]:
    """Run a function and return one that does the same again.

    constants: tensors that change neither in the function nor between calls, such as weights. What comes back returns the tensor that
    the recorded call returned, with new values.

    Raises Unfit if the function reads numbers from tensors or is random.
    """
    recorder, luck = _Recorder(), torch.get_rng_state()
    with recorder:
        result = function()
    if not torch.equal(luck, torch.get_rng_state()):
        raise Unfit("its code draws random numbers")
    kept = _changing(recorder.calls, constants)
    read = _places([[args, kwargs] for _, args, kwargs, _ in kept] + [result])
    plan = [_again(*call, read) for call in kept]
    for call in plan:
        call()  # whatever is allocated or chosen on first use

    def replay() -> Tensor:
        for call in plan:
            call()
        return result

    return replay


class _Recorder(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Keeps every op that runs, with its tensors."""

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.calls: list[Call] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None) -> Any:
        if any(tag in func.tags for tag in _UNFIT) and not _by_numbers(func, args):
            raise Unfit(f"its code calls {func}, which depends on values")
        result = func(*args, **(kwargs or {}))
        self.calls.append((func, args, kwargs or {}, result))
        return result


def _by_numbers(func: Any, args: tuple[Any, ...]) -> bool:
    """Whether an op is indexing by integers: the shape of its result depends on values only where indices are masks."""
    masks = (torch.bool, torch.uint8)
    return func is torch.ops.aten.index.Tensor and all(each.dtype not in masks for each in _tensors(args[1]))


def _tensors(values: Any) -> Iterator[Tensor]:
    """All tensors in arguments or results."""
    if isinstance(values, Tensor):
        yield values
    elif isinstance(values, (tuple, list)):
        for value in values:
            yield from _tensors(value)
    elif isinstance(values, dict):
        yield from _tensors(list(values.values()))


def _places(values: Any) -> set[int]:
    """Where tensors keep their values: an address each, the same for views."""
    return {tensor.untyped_storage().data_ptr() for tensor in _tensors(values)}


def _changing(calls: Sequence[Call], constants: Iterable[Tensor]) -> list[Call]:
    """Leave out views and what comes of constants alone."""
    written: set[int] = set()
    for func, args, kwargs, _ in calls:
        if func._schema.is_mutable:
            written |= _places([args, kwargs])
    fixed = _places(list(constants)) - written
    kept = []
    for call in calls:
        func, args, kwargs, result = call
        given, made = _places([args, kwargs]), _places(result)
        if not func._schema.is_mutable:
            if made <= given:
                continue  # a view
            if given <= fixed and not made & written:
                fixed |= made
                continue
        fixed -= made
        kept.append(call)
    return kept


def _again(func: Any, args: tuple[Any, ...], kwargs: dict[str, Any], result: Any, read: set[int]) -> Callable[[], Any]:
    """Return a call that runs an op once more, its result written to where it was. read: places that anything is read from."""
    if func._schema.is_mutable:
        return partial(func._op, *args, **kwargs)
    results = list(_tensors(result))
    if func is torch.ops.aten._to_copy.default:
        return partial(result.copy_, args[0])
    out = _out_variant(func)
    if out is None:
        wanted = [(index, tensor) for index, tensor in enumerate(results) if _places(tensor) <= read]
        return partial(_copied, partial(func._op, *args, **kwargs), wanted)
    names = [argument.name for argument in out._schema.arguments if argument.is_out]
    if len(names) == 1:  # torch's own bindings are faster than those of ops
        binding = partial(getattr(torch, func._opname, None) or _missing, *args, **kwargs, out=results[0])
        with contextlib.suppress(TypeError):
            binding()
            return binding
    return partial(out._op, *args, **kwargs, **dict(zip(names, results, strict=True)))


def _missing(*args: Any, **kwargs: Any) -> None:
    raise TypeError


def _copied(call: Callable[[], Any], wanted: Sequence[tuple[int, Tensor]]) -> None:
    """Run an op that writes nowhere of ours, and copy what is wanted of its results."""
    made = list(_tensors(call()))
    for index, tensor in wanted:
        tensor.copy_(made[index])


def _out_variant(func: Any) -> Any:
    """The op that takes the same arguments and writes to given tensors, or None: an overload, or an op NAME_out of its own."""
    arguments = [(argument.name, str(argument.type)) for argument in func._schema.arguments]
    own = getattr(getattr(torch.ops, func.namespace), f"{func._opname}_out", None)
    for packet, name in [(each, name) for each in (func._overloadpacket, own) if each for name in each.overloads()]:
        overload = getattr(packet, name)
        found = overload._schema.arguments
        if any(each.is_out for each in found) and arguments == [(e.name, str(e.type)) for e in found if not e.is_out]:
            return overload
    return None
