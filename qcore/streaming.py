"""Weights that come to a module and leave it again, from a folder or from the memory they are in, and what they are called there."""

from __future__ import annotations

from collections.abc import Iterable
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from .checkpoint import ModelFolder
from .errors import CheckpointError, ModelError, name_list
from .experts import Piece, conversions, pieces_of


class Weights(Protocol):
    """Weights that come to a module when it is worked on and leave it afterwards."""

    def bring(self, name: str, device: torch.device, dtype: torch.dtype) -> None:
        """Put the module's parameters and buffers on `device`, floating ones as `dtype`."""

    def expect(self, name: str, device: torch.device) -> None:
        """Hear that this module comes to `device` next: reading it may begin."""

    def send(self, name: str, device: torch.device) -> None:
        """Hear that `device` has room for it now: copying what was read may begin, beside the work."""

    def let_go(self, name: str) -> None:
        """Undo `bring`."""

    def dtype_of(self, parameter: str) -> torch.dtype:
        """The dtype a parameter is stored in."""


class FolderWeights:
    """Weights streamed from a folder into a skeleton; letting go returns them to the meta device.

    Raises ModelError for parameters the folder lacks, CheckpointError for shapes that differ from the model's.
    """

    def __init__(self, model: nn.Module, folder: ModelFolder) -> None:
        self.model, self.folder = model, folder
        self._reader = ThreadPoolExecutor(1)
        self._ahead: dict[str, Future[list[tuple[str, Tensor]]]] = {}
        self._copying: torch.cuda.Stream | None = None
        self.keys, self.pieces = locate(model, folder.tensors)
        for name, key in self.keys.items():
            shape, found = tuple(get_tensor(model, name).shape), folder.tensors[key].shape
            if name in self.pieces:
                found = tuple(self.pieces[name].take(torch.empty(found, device="meta")).shape)
            if shape != found:
                raise CheckpointError(
                    f"{folder.path}/{folder.tensors[key].file}: tensor {key} has shape {list(found)}, "
                    f"the model's config asks for {list(shape)}."
                )

    def bring(self, name: str, device: torch.device, dtype: torch.dtype) -> None:
        """See Weights. Every floating weight is checked for NaN and Inf on the way."""
        wanted = self._stored_in(name)
        ahead = self._ahead.pop(name, None)
        finite: dict[str, Tensor] = {}
        if self._copying is not None:
            torch.cuda.current_stream(device).wait_stream(self._copying)
        for key, tensor in ahead.result() if ahead else self.folder.read(wanted):
            target = dtype if tensor.is_floating_point() else tensor.dtype
            tensor = tensor.to(device, non_blocking=True)
            finite[key] = torch.isfinite(tensor).all()
            tensor = tensor.to(target)
            for full in wanted[key]:
                set_tensor(self.model, full, self.part(full, tensor))
        if finite and not bool(torch.stack(list(finite.values())).all()):
            for key in wanted:
                check_finite(self.folder.tensor(key), key)
        module = self.model.get_submodule(name)
        for submodule in module.modules():
            for key, buffer in submodule.named_buffers(recurse=False):
                if not buffer.is_meta:
                    submodule._buffers[key] = buffer.to(device)

    def expect(self, name: str, device: torch.device) -> None:
        """See Weights: reads on a thread of its own, into memory that a GPU fetches from without the host's help."""
        if device.type == "cuda":
            wanted = self._stored_in(name)
            self._ahead[name] = self._reader.submit(lambda: list(self.folder.read(wanted, pinned=True)))

    def send(self, name: str, device: torch.device) -> None:
        """See Weights: copies on a stream of their own, into memory that the device's work until now is done with."""
        ahead = self._ahead.get(name)
        if device.type != "cuda" or ahead is None or not ahead.done():
            return
        try:
            there = [(key, torch.empty_like(tensor, device=device)) for key, tensor in ahead.result()]
        except torch.OutOfMemoryError:
            return  # `bring` copies them, once this block's are gone
        self._copying = self._copying or torch.cuda.Stream(device)  # type: ignore[no-untyped-call]
        self._copying.wait_stream(torch.cuda.current_stream(device))
        with torch.cuda.stream(self._copying):
            for (_, tensor), (_, read) in zip(there, ahead.result(), strict=True):
                tensor.copy_(read, non_blocking=True)
        self._ahead[name] = Future()
        self._ahead[name].set_result(there)

    def _stored_in(self, name: str) -> dict[str, list[str]]:
        """The stored tensors that a module needs, each with the parameters it serves."""
        prefix = f"{name}." if name else ""
        wanted: dict[str, list[str]] = {}
        for full, key in self.keys.items():
            if full == name or full.startswith(prefix):
                wanted.setdefault(key, []).append(full)
        return wanted

    def let_go(self, name: str) -> None:
        """See Weights."""
        for full in (full for names in self._stored_in(name).values() for full in names):
            set_tensor(self.model, full, get_tensor(self.model, full).to("meta"))

    def dtype_of(self, parameter: str) -> torch.dtype:
        """See Weights."""
        return self.folder.tensors[self.keys[parameter]].dtype

    def part(self, parameter: str, tensor: Tensor) -> Tensor:
        """Return a parameter's part of the tensor it is stored in: all of it, or one expert's piece of a fused one."""
        return self.pieces[parameter].take(tensor) if parameter in self.pieces else tensor

    def tensor(self, parameter: str) -> Tensor:
        """Read one parameter as it is stored."""
        return self.part(parameter, self.folder.tensor(self.keys[parameter]))


class ModuleWeights:
    """Weights of a model that is in memory already; letting go restores the very tensors it had."""

    def __init__(self, model: nn.Module) -> None:
        self.model = model
        self._home: dict[str, dict[str, Tensor]] = {}

    def bring(self, name: str, device: torch.device, dtype: torch.dtype) -> None:
        """See Weights."""
        home: dict[str, Tensor] = {}
        finite: dict[str, Tensor] = {}
        self._home[name] = home
        prefix = f"{name}." if name else ""
        module = self.model.get_submodule(name)
        for full, tensor in [*module.named_parameters(prefix=name), *module.named_buffers(prefix=name)]:
            assert full.startswith(prefix)
            home[full] = tensor
            is_weight = isinstance(tensor, nn.Parameter) and tensor.is_floating_point()
            moved = tensor.detach().to(device)
            finite[full] = torch.isfinite(moved).all()
            set_tensor(self.model, full, moved.to(dtype if is_weight else tensor.dtype))
        if finite and not bool(torch.stack(list(finite.values())).all()):
            self.let_go(name)
            for full, tensor in home.items():
                check_finite(tensor, full)

    def expect(self, name: str, device: torch.device) -> None:
        """See Weights: they are there."""

    def send(self, name: str, device: torch.device) -> None:
        """See Weights: `bring` copies them."""

    def let_go(self, name: str) -> None:
        """See Weights."""
        for full, tensor in self._home.pop(name, {}).items():
            set_tensor(self.model, full, tensor)

    def dtype_of(self, parameter: str) -> torch.dtype:
        """See Weights."""
        for home in self._home.values():
            if parameter in home:
                return home[parameter].dtype
        return get_tensor(self.model, parameter).dtype


def check_finite(tensor: Tensor, name: str) -> None:
    """Raise ModelError when a floating tensor holds NaN or Inf."""
    if not tensor.is_floating_point() or not tensor.numel():
        return
    # NaN wherever there is one; forty times as fast as looking at each value's bits
    ends = torch.stack(tensor.aminmax())
    if not bool(torch.isfinite(ends).all()):
        bad = int((~torch.isfinite(tensor)).sum())
        raise ModelError(f"{name} holds {bad} values that are NaN or Inf; the model file is damaged or diverged.")


class Names:
    """How a model's tensors are called on disk, where transformers renames them while loading (embed_out -> lm_head).

    Folders are written with the names on disk: those that other programs read.
    """

    def __init__(self, model: nn.Module) -> None:
        from transformers.core_model_loading import PrefixChange, WeightRenaming

        found = conversions(model)
        rules = [rule for rule in found if isinstance(rule, WeightRenaming)]
        others = [rule for rule in found if not isinstance(rule, WeightRenaming)]
        self.one_to_one = all("experts" in source for rule in others for source in rule.source_patterns)
        self._rules = [rule for rule in rules if not isinstance(rule, PrefixChange)]
        self._back = [rule.reverse_transform() for rule in reversed(self._rules)]
        self._own = set(model.state_dict())

    def in_model(self, key: str) -> str:
        """The model's name of a tensor on disk."""
        return key if key in self._own else _apply(self._rules, key)

    def on_disk(self, name: str) -> str:
        """The name on disk of a model's tensor; its own where the rules do not lead back."""
        key = _apply(self._back, name)
        return key if _apply(self._rules, key) == name else name

    def layer_in_model(self, layer: str) -> str:
        """As `in_model`, for a linear: rules may ask for the `.weight`."""
        return self.in_model(f"{layer}.weight").removesuffix(".weight")

    def layer_on_disk(self, layer: str) -> str:
        """As `on_disk`, for a linear."""
        return self.on_disk(f"{layer}.weight").removesuffix(".weight")


def _apply(rules: list[Any], name: str) -> str:
    for rule in rules:
        name = rule.rename_source_key(name)[0]
    return name


def match_keys(model: nn.Module, available: Iterable[str], partial: bool = False) -> dict[str, str]:
    """Map the model's parameter and persistent buffer names to a checkpoint's tensor names.

    A checkpoint of the bare base model lacks the prefix ("transformer."), one of a wrapper may carry it, and some have
    names that transformers changes; all are understood. Tied parameters may be absent, and with `partial` any other. The
    linears of experts that a checkpoint keeps fused all map to the fused tensor.

    Raises ModelError naming parameters that have no tensor.
    """
    return locate(model, available, partial)[0]


def locate(
    model: nn.Module, available: Iterable[str], partial: bool = False
) -> tuple[dict[str, str], dict[str, Piece]]:
    """Return name -> tensor name, and name -> piece for those that are part of a fused tensor."""
    names, prefix = Names(model), f"{getattr(model, 'base_model_prefix', '')}."
    tensors: dict[str, str] = {}
    for key in available:
        tensors.setdefault(names.in_model(key), key)
    tensors |= {key: key for key in available}
    tied = set(getattr(model, "all_tied_weights_keys", None) or {})
    pieces = pieces_of(model)

    def find(name: str) -> str | None:
        spellings = (name, name.removeprefix(prefix), prefix + name)
        return next((tensors[spelling] for spelling in spellings if spelling in tensors), None)

    keys: dict[str, str] = {}
    fused: dict[str, Piece] = {}
    missing = []
    for name in model.state_dict():
        found = find(name)
        if found is None and name in pieces:
            found = find(pieces[name].fused)
            fused |= {name: pieces[name]} if found else {}
        if found is not None:
            keys[name] = found
        elif name not in tied and not _is_buffer(model, name):
            missing.append(name)
    if missing and not partial:
        merged = (
            ""
            if names.one_to_one
            else (
                " Or transformers makes them of other tensors while loading: then quantize the model in memory, as a module."
            )
        )
        raise ModelError(
            f"the checkpoint has no tensor for {len(missing)} parameters of {type(model).__name__}: "
            f"{name_list(missing, 5)}. It is incomplete or of another architecture.{merged}"
        )
    return keys, fused


def _is_buffer(model: nn.Module, name: str) -> bool:
    parent, _, child = name.rpartition(".")
    return child in model.get_submodule(parent)._buffers


def get_tensor(model: nn.Module, name: str) -> Tensor:
    parent, _, child = name.rpartition(".")
    value = getattr(model.get_submodule(parent), child)
    assert isinstance(value, Tensor)
    return value


def set_tensor(model: nn.Module, name: str, value: Tensor) -> None:
    parent, _, child = name.rpartition(".")
    module = model.get_submodule(parent)
    if child in module._buffers:
        module._buffers[child] = value
    else:
        module._parameters[child] = (
            value if isinstance(value, nn.Parameter) else nn.Parameter(value, requires_grad=False)
        )
