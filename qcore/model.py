"""Opening models: a skeleton without weights, weights that come and go, and a quantized model built from a stream."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from functools import partial
from pathlib import Path
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from .backend import Backend
from .checkpoint import ModelFolder
from .errors import CheckpointError, ModelError, name_list
from .experts import Piece, conversions, pieces_of, unfuse
from .exporter import Content
from .linear import quant_linears, replace_module, weight_of
from .packing import roomy


def compute_dtype(stored: torch.dtype, device: torch.device) -> torch.dtype:
    """The dtype a run computes in: the model's own, but float32 for half types on a CPU (exact and no slower)."""
    return torch.float32 if device.type == "cpu" and stored.itemsize < 4 else stored


def load_config(folder: ModelFolder, trust_remote_code: bool) -> Any:
    """Return the transformers config of a folder; remote code only with the caller's word."""
    from transformers import AutoConfig

    if "auto_map" in folder.config and not trust_remote_code:
        from transformers.models.auto.configuration_auto import CONFIG_MAPPING

        if folder.config.get("model_type") not in CONFIG_MAPPING:
            raise ModelError(
                f"{folder.path} needs Python code from its own repository ({folder.config['auto_map']}). "
                "Read it, then pass trust_remote_code=True (--trust-remote-code)."
            )
    with _transformers_errors(f"the config of {folder.path}"):
        config = AutoConfig.from_pretrained(folder.path, trust_remote_code=trust_remote_code)
    depth = getattr(config, "num_hidden_layers", None)
    if isinstance(depth, int) and depth > len(folder.tensors):
        raise CheckpointError(
            f"{folder.path}/config.json: num_hidden_layers is {depth}, but the files hold {len(folder.tensors)} tensors in all."
        )
    return config


def skeleton(folder: ModelFolder, trust_remote_code: bool = False, dtype: torch.dtype | None = None) -> nn.Module:
    """Build the model with parameters on the meta device and real buffers, fused experts taken apart; nothing large is
    allocated.
    """
    from accelerate import init_empty_weights

    config = load_config(folder, trust_remote_code)
    if hasattr(config, "quantization_config"):
        del config.quantization_config
    auto = auto_class(config, str(folder.path))
    with (
        _transformers_errors(f"the model of {folder.path}"),
        torch.random.fork_rng(devices=[]),
        init_empty_weights(include_buffers=False),
        _initialized(),
    ):
        model: nn.Module = auto.from_config(
            config, trust_remote_code=trust_remote_code, dtype=dtype or stored_dtype(folder)
        )
    return unfuse(model.eval())


@contextlib.contextmanager
def _initialized() -> Iterator[None]:
    """Within, parameters of new modules count as initialized: transformers would spend a second on values that are nowhere."""
    register = nn.Module.register_parameter

    def marked(module: nn.Module, name: str, parameter: nn.Parameter | None) -> None:
        register(module, name, parameter)
        if parameter is not None:
            module._parameters[name]._is_hf_initialized = True  # type: ignore[union-attr]

    nn.Module.register_parameter = marked  # type: ignore[method-assign, assignment]
    try:
        yield
    finally:
        nn.Module.register_parameter = register  # type: ignore[method-assign]


def transposed_linears(config: Mapping[str, Any], names: Iterable[str]) -> frozenset[str]:
    """Those of the linears that the model keeps transposed (Conv1D), going by its config.

    A model_type that transformers does not know has code of its own, which is not run; its linears are taken for nn.Linear.
    """
    from accelerate import init_empty_weights
    from transformers import CONFIG_MAPPING, AutoConfig
    from transformers.pytorch_utils import Conv1D

    values = dict(config)
    kind = values.pop("model_type", None)
    if kind not in CONFIG_MAPPING:
        return frozenset()
    with _transformers_errors(f"a config of model_type {kind!r}"), init_empty_weights():
        settled = AutoConfig.for_model(kind, **values)
        model = auto_class(settled, f"a config of model_type {kind!r}").from_config(settled)
    conv = {name for name, module in model.named_modules() if isinstance(module, Conv1D)}
    return frozenset(conv.intersection(names))


def auto_class(config: Any, what: str) -> Any:
    """Return the transformers class that opens a model: a causal language model, or one that also sees images.

    Where both can, the one that its `architectures` names: opening Qwen3.5 as a language model would drop its vision part.

    Raises ModelError for encoder-decoder models and for those that are no language model at all.
    """
    import transformers
    from transformers import MODEL_FOR_CAUSAL_LM_MAPPING, MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING

    refuse_encoder_decoder(config, what)
    known = {"AutoModelForCausalLM": MODEL_FOR_CAUSAL_LM_MAPPING}
    known["AutoModelForImageTextToText"] = MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING
    own, written = getattr(config, "auto_map", None) or {}, getattr(config, "architectures", None) or ()
    opens = [name for name, mapping in known.items() if type(config) in mapping or name in own]
    for name in opens:
        if name not in own and getattr(known[name][type(config)], "__name__", None) in written:
            return getattr(transformers, name)
    if opens:
        return getattr(transformers, opens[0])
    raise ModelError(
        f"{what} is a model of type {config.model_type!r}, for which transformers has no causal language model "
        "(AutoModelForCausalLM, AutoModelForImageTextToText); qcore quantizes those."
    )


def refuse_encoder_decoder(config: Any, what: str) -> None:
    """Raise ModelError when a config is that of an encoder-decoder model."""
    if getattr(config, "is_encoder_decoder", False):
        raise ModelError(f"{what} is an encoder-decoder model ({config.model_type}); qcore quantizes causal ones.")


def stored_dtype(folder: ModelFolder) -> torch.dtype:
    """The dtype most of a folder's floating weights are stored in."""
    sizes: dict[torch.dtype, int] = {}
    for info in folder.tensors.values():
        if info.dtype.is_floating_point:
            sizes[info.dtype] = sizes.get(info.dtype, 0) + torch.Size(info.shape).numel()
    if not sizes:
        raise ModelError(f"{folder.path} holds no floating point weights.")
    return max(sizes, key=lambda dtype: sizes[dtype])


def load_float(folder: ModelFolder, trust_remote_code: bool = False, dtype: torch.dtype | None = None) -> nn.Module:
    """Open a float model whole, by transformers itself.

    A model with code of its own is filled here instead: transformers 5 makes every model without memory and leaves the
    buffers that old code computed when it was made (rotary tables, masks) as it finds them, which is garbage.
    """
    auto = auto_class(load_config(folder, trust_remote_code), str(folder.path))
    if trust_remote_code and "auto_map" in folder.config:
        own = skeleton(folder, trust_remote_code, dtype)
        if not type(own).__module__.startswith("transformers."):
            FolderWeights(own, folder).bring("", torch.device("cpu"), dtype or stored_dtype(folder))
            own.tie_weights()  # type: ignore[operator]
            return own
    with _transformers_errors(f"the model of {folder.path}"), quiet_transformers():
        model: nn.Module = auto.from_pretrained(
            folder.path, dtype=dtype or stored_dtype(folder), trust_remote_code=trust_remote_code
        )
    return model.eval()


def save_own_code(model: nn.Module, folder: Path) -> dict[str, Any]:
    """Write the code of a model that brought its own; return what its config.json must say about it."""
    from transformers.dynamic_module_utils import custom_object_save

    custom_object_save(model, folder, config=model.config)
    return {"auto_map": model.config.auto_map}  # type: ignore[union-attr]


@contextlib.contextmanager
def quiet_transformers() -> Iterator[None]:
    """Hold back transformers' progress bars and warnings, then leave its logging as it was."""
    from transformers.utils import logging

    bars, verbosity = logging.is_progress_bar_enabled(), logging.get_verbosity()
    logging.disable_progress_bar()
    logging.set_verbosity_error()
    try:
        yield
    finally:
        logging.set_verbosity(verbosity)
        if bars:
            logging.enable_progress_bar()


def load_tokenizer(folder: Path, trust_remote_code: bool = False) -> Any | None:
    """Return the folder's tokenizer, or None when it has none."""
    from transformers import AutoTokenizer

    try:
        return AutoTokenizer.from_pretrained(folder, trust_remote_code=trust_remote_code)
    except (OSError, ValueError, ImportError, TypeError):  # TypeError: an old kind that looks for files and finds None
        return None
    except Exception as error:  # the tokenizers library knows no other kind
        raise ModelError(f"the tokenizer of {folder} cannot be read: {error}") from error


@contextlib.contextmanager
def _transformers_errors(what: str) -> Iterator[None]:
    try:
        yield
    except Exception as error:  # a damaged config makes transformers stumble anywhere, with errors of any kind
        raise ModelError(f"transformers cannot open {what}: {str(error).strip() or type(error).__name__}") from error


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
        self.keys, self.pieces = _locate(model, folder.tensors)
        for name, key in self.keys.items():
            shape, found = tuple(_get(model, name).shape), folder.tensors[key].shape
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
                _set(self.model, full, self.part(full, tensor))
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
            _set(self.model, full, _get(self.model, full).to("meta"))

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
            _set(self.model, full, moved.to(dtype if is_weight else tensor.dtype))
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
            _set(self.model, full, tensor)

    def dtype_of(self, parameter: str) -> torch.dtype:
        """See Weights."""
        for home in self._home.values():
            if parameter in home:
                return home[parameter].dtype
        return _get(self.model, parameter).dtype


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
    return _locate(model, available, partial)[0]


def _locate(
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


def _get(model: nn.Module, name: str) -> Tensor:
    parent, _, child = name.rpartition(".")
    value = getattr(model.get_submodule(parent), child)
    assert isinstance(value, Tensor)
    return value


def _set(model: nn.Module, name: str, value: Tensor) -> None:
    parent, _, child = name.rpartition(".")
    module = model.get_submodule(parent)
    if child in module._buffers:
        module._buffers[child] = value
    else:
        module._parameters[child] = (
            value if isinstance(value, nn.Parameter) else nn.Parameter(value, requires_grad=False)
        )


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
    keys, pieces = _locate(model, floats)
    for name, key in keys.items():
        tensor = content.tensor(key)
        check_finite(tensor, key)
        tensor = pieces[name].take(tensor) if name in pieces else tensor
        if tensor.shape != _get(model, name).shape:
            raise CheckpointError(
                f"{folder}: tensor {key} has shape {list(tensor.shape)}, the model asks for {list(_get(model, name).shape)}."
            )
        _set(model, name, _moved(tensor, places(name), target if tensor.is_floating_point() else tensor.dtype))
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
        with _transformers_errors(f"{folder}/generation_config.json"):
            model.generation_config = GenerationConfig.from_pretrained(folder)


def model_dtype(model: nn.Module) -> torch.dtype:
    return next((p.dtype for p in model.parameters() if p.is_floating_point()), torch.float32)


def vocabulary(model: nn.Module) -> int:
    embeddings = getattr(model, "get_input_embeddings", lambda: None)()
    size = getattr(embeddings, "num_embeddings", None) or getattr(model.config, "vocab_size", None)
    if not isinstance(size, int):
        raise ModelError(f"{type(model).__name__} does not tell the size of its vocabulary.")
    return size


def longest(model: nn.Module) -> int | None:
    """The longest sequence the model's positions reach, where its config tells."""
    for name in ("max_position_embeddings", "n_positions", "max_seq_len", "seq_length"):
        value = getattr(model.config, name, None)
        if isinstance(value, int):
            return value
    return None
