"""Opening models by their config: a skeleton without weights, or whole; tokenizers; what a config tells."""

from __future__ import annotations

import contextlib
import warnings
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from threading import RLock
from typing import Any

import torch
from torch import nn

from .checkpoint import ModelFolder
from .errors import CheckpointError, ModelError, first_line
from .experts import unfuse
from .streaming import FolderWeights

#: held while nn.Module or torch's default type is another one, which all threads see: two that make models would undo each other
_MAKING = RLock()


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
    with transformers_errors(f"the config of {folder.path}"):
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
        _MAKING,
        transformers_errors(f"the model of {folder.path}"),
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
    with _MAKING, transformers_errors(f"a config of model_type {kind!r}"), init_empty_weights():
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
            sizes[info.dtype] = sizes.get(info.dtype, 0) + info.count
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
    with _MAKING, transformers_errors(f"the model of {folder.path}"), quiet_transformers():
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


#: any of these is meant to be a tokenizer
TOKENIZER_FILES = ("tokenizer.json", "tokenizer.model", "spiece.model", "vocab.json", "vocab.txt")


def load_tokenizer(folder: Path, trust_remote_code: bool = False) -> Any | None:
    """Return the folder's tokenizer, or None when it has none, or none that the libraries here can read: a warning says so."""
    from transformers import AutoTokenizer

    try:
        return AutoTokenizer.from_pretrained(folder, trust_remote_code=trust_remote_code)
    except (
        OSError,
        ValueError,
        ImportError,
        TypeError,
    ) as error:  # TypeError: an old kind that looks for files and finds None
        if found := sorted(name for name in TOKENIZER_FILES if (folder / name).is_file()):
            warnings.warn(
                f"{folder} has {', '.join(found)}, but no tokenizer can be made of it: {first_line(error)}",
                stacklevel=2,
            )
        return None
    except Exception as error:  # the tokenizers library knows no other kind
        raise ModelError(f"the tokenizer of {folder} cannot be read: {error}") from error


@contextlib.contextmanager
def transformers_errors(what: str) -> Iterator[None]:
    try:
        yield
    except Exception as error:  # a damaged config makes transformers stumble anywhere, with errors of any kind
        raise ModelError(f"transformers cannot open {what}: {str(error).strip() or type(error).__name__}") from error


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
