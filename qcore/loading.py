"""A quantized model built from a stream: layer by layer, each on the backend chosen for it."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from .backend import Backend
from .checkpoint import ModelFolder
from .errors import CheckpointError, ConfigError, ModelError, name_list
from .exporter import Content
from .linear import quant_linears, replace_module, weight_of
from .model import compute_dtype, skeleton, stored_dtype, transformers_errors
from .packing import roomy
from .streaming import Names, check_finite, get_tensor, locate, set_tensor


def load_quantized(
    content: Content,
    folder: Path,
    backends: Mapping[str, Backend],
    *,
    backend: str = "auto",
    device: torch.device,
    dtype: torch.dtype | None = None,
    device_map: Any = None,
    trust_remote_code: bool = False,
    together: Callable[[nn.Module], Iterable[Sequence[str]]] = lambda model: (),
    tokens: int = 1,
) -> nn.Module:
    """Build an ordinary transformers model from a quantized folder, layer by layer.

    dtype: of everything that is not quantized; None keeps what is stored, float32 in place of half on a CPU.
    device_map: as in accelerate ("auto" or a mapping); it overrides `device`. together: names the linears of the model that share
    an input, group by group; those of a group are multiplied as one where their grids allow it. tokens: see MatmulSpec.
    """
    files = content.source or ModelFolder(folder)
    floats = {name: files.tensors[name] for name in content.tensors}
    stored = stored_dtype(files)
    target = dtype or compute_dtype(stored, device)
    model = skeleton(files, trust_remote_code, target)
    places = Placement(_balanced_map(model) if device_map == "auto" else device_map or {"": device})
    declared = [list(group) for group in together(model)]  # which looks at linears that are taken out next
    layers = take_out(model, content, folder)
    groups = _grouped(layers, declared, places)
    keys, pieces = locate(model, floats)
    for name, key in keys.items():
        tensor = content.tensor(key)
        check_finite(tensor, key)
        tensor = pieces[name].take(tensor) if name in pieces else tensor
        if tensor.shape != get_tensor(model, name).shape:
            raise CheckpointError(
                f"{folder}: tensor {key} has shape {list(tensor.shape)}, the model asks for {list(get_tensor(model, name).shape)}."
            )
        set_tensor(model, name, _moved(tensor, places(name), target if tensor.is_floating_point() else tensor.dtype))
    model.tie_weights()  # type: ignore[operator]
    for group in groups:
        place = places(group[0])
        weights = [content.weight(layers[name]).to(place) for name in group]
        sources = [partial(content.weight, layers[name]) for name in group]
        linears = quant_linears(weights, sources, backends.values(), place, target, backend, tokens)
        for name, linear in zip(group, linears, strict=True):
            replace_module(model, name, linear)
    for module_name, module in model.named_modules():
        for key, buffer in module.named_buffers(recurse=False):
            module._buffers[key] = buffer.to(places(f"{module_name}.{key}"))
    _set_generation_config(model, folder)
    if device_map is not None:
        from accelerate import dispatch_model

        model = dispatch_model(model, dict(places.device_map))
    return model.eval().requires_grad_(False)


def take_out(model: nn.Module, content: Content, folder: Path) -> dict[str, str]:
    """Put nothing in the place of the linears that are quantized; return their names in the model -> those on disk.

    Raises CheckpointError for those that the model has not, or in another shape.
    """
    names = Names(model)
    layers = {names.layer_in_model(key): key for key in content.layers}
    for name, key in layers.items():
        shape = [content.layers[key].out_features, content.layers[key].in_features]
        try:
            wanted = list(weight_of(model.get_submodule(name)).shape)
        except AttributeError:
            raise CheckpointError(f"{folder}: quantized layer {key} is not in {type(model).__name__}.") from None
        if shape != wanted:
            raise CheckpointError(f"{folder}: quantized layer {key} has shape {shape}, the model asks for {wanted}.")
        replace_module(model, name, nn.Identity())
    return layers


def _moved(tensor: Tensor, device: torch.device, dtype: torch.dtype) -> Tensor:
    """Return a tensor on a device as a dtype; a new one in large pages, as the float weights are the largest of all."""
    if tensor.device == device and tensor.dtype == dtype:
        return tensor
    return roomy(tensor.shape, dtype, device).copy_(tensor)


def _grouped(
    layers: Iterable[str], together: Iterable[Sequence[str]], places: Callable[[str], torch.device]
) -> list[list[str]]:
    """Put every layer in one group: those of `together` that are layers and on one device, the others alone."""
    single = dict.fromkeys(layers)
    groups = []
    for names in together:
        group = [name for name in names if name in single]
        if len(group) > 1 and len({places(name) for name in group}) == 1:
            groups.append(group)
            for name in group:
                del single[name]
    return groups + [[name] for name in single]


class Placement:
    """Tells the device of each parameter, by the longest matching prefix of a device map."""

    def __init__(self, device_map: Mapping[str, Any]) -> None:
        if not isinstance(device_map, Mapping):
            raise ConfigError(f'device_map={device_map!r}: expected "auto", or devices by name of module.')
        self.device_map = device_map

    def __call__(self, name: str) -> torch.device:
        fits = [prefix for prefix in self.device_map if prefix in ("", name) or name.startswith(f"{prefix}.")]
        if not fits:
            raise ModelError(f"device_map gives no device for {name}. It has {name_list(map(str, self.device_map))}.")
        return torch.device(self.device_map[max(fits, key=len)])


def _balanced_map(model: nn.Module) -> dict[str, Any]:
    """Let accelerate spread the skeleton over the GPUs; one byte a weight is an upper bound for what is quantized."""
    from accelerate import infer_auto_device_map
    from accelerate.utils import get_balanced_memory

    kept_whole = list(getattr(model, "_no_split_modules", None) or [])
    memory = get_balanced_memory(model, dtype=torch.int8, no_split_module_classes=kept_whole)
    return dict(infer_auto_device_map(model, memory, no_split_module_classes=kept_whole, dtype=torch.int8))


def _set_generation_config(model: nn.Module, folder: Path) -> None:
    from transformers import GenerationConfig

    if (folder / "generation_config.json").is_file():
        with transformers_errors(f"{folder}/generation_config.json"):
            model.generation_config = GenerationConfig.from_pretrained(folder)
