"""Training adapters on a quantized model with the `peft` library.

    model = qcore.compat.peft.get_peft_model(qcore.load("out"), peft.LoraConfig(target_modules=["q_proj", "v_proj"]))

peft adapts any `nn.Linear`. A QuantLinear is none, so `prepare` puts a `TrainableLinear` in the place of each: the same
buffers and the same product, as a subclass of `nn.Linear`. Nothing of peft is patched or private, and every method that
adapts linears works (LoRA, AdaLoRA, AdaptionPrompt, IA3, …), as do saving, loading, several adapters and disabling them.

What a quantized weight cannot do is take in an adapter. To merge one, merge it into the float model and quantize that again:

    merged = peft.PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained("float"), "adapter").merge_and_unload()
    qcore.save(qcore.quantize(merged, …), "out")
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor, nn

from ..errors import BackendError, ConfigError, ModelError, PluginError, first_line, name_list, suggest
from ..linear import QuantLinear, replace_module


class QuantizedParameter(Tensor):
    """Stands where a linear keeps its weight: tells shape, dtype and device, and holds no values.

    Other libraries look there for the dtype and device that an adapter must have. Whoever goes on to compute with it would
    lose the result, so that raises ModelError.
    """

    @staticmethod
    def __new__(cls, shape: torch.Size, dtype: torch.dtype, device: torch.device) -> QuantizedParameter:
        made: QuantizedParameter = torch.Tensor._make_wrapper_subclass(
            cls, shape, dtype=dtype, device=device, requires_grad=False
        )
        return made

    def __repr__(self) -> str:  # type: ignore[override]
        return f"QuantizedParameter({list(self.shape)}, {self.dtype}, {self.device})"

    @classmethod
    def __torch_dispatch__(cls, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:  # type: ignore[override]
        """Allow what copies or moves a module; refuse what reads or writes values."""
        aten = torch.ops.aten
        if function in (aten.detach.default, aten.clone.default, aten.alias.default, aten._to_copy.default):
            source, options = args[0], kwargs or {}
            return cls(source.shape, options.get("dtype") or source.dtype, options.get("device") or source.device)
        raise ModelError(
            f"{function} needs the values of a quantized weight, which cannot be changed in place. To merge an adapter, merge it "
            "into the float model and quantize that; initialisations that read weights (PiSSA, OLoRA, DoRA) need it as well."
        )


class TrainableLinear(QuantLinear, nn.Linear):  # type: ignore[misc]
    """A QuantLinear that is an nn.Linear too: shares everything with the one it is made from."""

    def __init__(self, linear: QuantLinear) -> None:
        nn.Module.__init__(self)
        vars(self).update(
            {name: value for name, value in vars(linear).items() if name not in ("_buffers", "_parameters")}
        )
        self._buffers, self._parameters = dict(linear._buffers), dict(linear._parameters)
        shape = torch.Size((linear.out_features, linear.in_features))
        stand_in = QuantizedParameter(shape, linear.spec.dtype, linear.spec.device)
        self.register_parameter("weight", nn.Parameter(stand_in, requires_grad=False))


def prepare(model: nn.Module, use_gradient_checkpointing: bool = False) -> nn.Module:
    """Make a quantized model ready for peft, in place, and return it. Calling it again does nothing.

    use_gradient_checkpointing: compute activations again in the backward pass rather than keep them.

    Raises ModelError when nothing in the model is quantized, BackendError when a backend has no gradient.
    """
    linears = {name: module for name, module in model.named_modules() if isinstance(module, QuantLinear)}
    if not linears:
        raise ModelError(f"{type(model).__name__} has no quantized linears; peft itself is enough for a float model.")
    _check_gradients(linears.values())
    for name, linear in linears.items():
        if not isinstance(linear, TrainableLinear):
            replace_module(model, name, TrainableLinear(linear))
    model.requires_grad_(False)
    if use_gradient_checkpointing:
        model.gradient_checkpointing_enable({"use_reentrant": False})  # type: ignore[operator]
        model.enable_input_require_grads()  # type: ignore[operator]
    return model


def _check_gradients(linears: Iterable[QuantLinear]) -> None:
    """Try one token through one linear of each backend, and back."""
    for linear in {each.backend.name: each for each in linears}.values():
        x = torch.ones(1, linear.in_features, dtype=linear.spec.dtype, device=linear.spec.device, requires_grad=True)
        problem = None
        try:
            with torch.enable_grad():
                y = linear(x)
                found = torch.autograd.grad(y.float().sum(), x)[0] if y.requires_grad else None
            if found is None or not bool(torch.isfinite(found).all()):
                problem = "its product has none" if found is None else "it is not finite"
        except (RuntimeError, NotImplementedError) as error:
            problem = first_line(error)
        if problem:
            raise BackendError(
                f"backend {linear.backend.name!r} has no gradient, so nothing can be trained on it ({problem}). "
                "Load the model on another, for instance qcore.load(…, backend='torch_reference')."
            )


def get_peft_model(model: nn.Module, peft_config: Any, adapter_name: str = "default", **options: Any) -> Any:
    """`prepare` and `peft.get_peft_model` in one; options go to the latter.

    Raises ConfigError for target modules that the model does not have.
    """
    peft = peft_library()
    _check_targets(model, getattr(peft_config, "target_modules", None))
    return peft.get_peft_model(prepare(model), peft_config, adapter_name, **options)


def load_peft_model(model: nn.Module, adapter: Any, **options: Any) -> Any:
    """`prepare` and `peft.PeftModel.from_pretrained` in one; options (`is_trainable=True`, …) go to the latter."""
    return peft_library().PeftModel.from_pretrained(prepare(model), adapter, **options)


def peft_library() -> Any:
    """The module `peft`; PluginError where it is not installed."""
    try:
        import peft
    except ImportError:
        raise PluginError("training adapters needs the peft library: pip install 'qcore[peft]'.") from None
    return peft


def _check_targets(model: nn.Module, targets: Any) -> None:
    """Refuse a list of target modules when one is the end of no module's name."""
    if targets is None or isinstance(targets, str):  # peft's own choice, or a pattern of its own
        return
    names = [name for name, _ in model.named_modules()]
    for target in targets:
        if not any(name == target or name.endswith(f".{target}") for name in names):
            linears = {
                name.rpartition(".")[2] for name, module in model.named_modules() if isinstance(module, QuantLinear)
            }
            raise ConfigError(
                f"target_modules: no module is called {target!r}. {suggest(target, linears)} "
                f"Quantized here: {name_list(sorted(linears))}."
            )


__all__ = ["get_peft_model", "load_peft_model", "prepare"]
