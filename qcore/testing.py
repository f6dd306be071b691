"""The conformance kit: what plugin authors call from their own tests, and what qcore's own plugins are tested with.

    from qcore.testing import check_algorithm
    def test_conforms():
        check_algorithm(MyAlgorithm)

Each check raises AssertionError with what was expected. Nothing here needs a network, a GPU or a real model.
"""

from __future__ import annotations

import importlib.metadata
import sys
import types
from collections.abc import Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any, get_args

import torch
from torch import Tensor, nn

from . import discovery, grid
from .adapter import ModelAdapter, _stars, linears_in
from .algorithm import Algorithm
from .api import quantize
from .backend import Backend, MatmulSpec
from .calibration import CalibrationDataset, CalibrationRequest
from .capture import capture_inputs
from .config import QuantConfig
from .content import content_of
from .errors import QcoreError
from .evaluation import EvalTask
from .experts import unfuse
from .exporter import Exporter
from .files import complete_folder
from .linear import QuantLinear, weight_of
from .plugins import KINDS, Plugins, installed
from .streaming import ModuleWeights
from .target import Finding, Level, Subject, Target
from .weight import QuantizedWeight


class TinyBlock(nn.Module):
    """A decoder block in miniature: causal mixing with shared inputs, then a gated MLP, both residual."""

    def __init__(self, width: int, inner: int) -> None:
        super().__init__()
        self.left, self.right = nn.Linear(width, width, bias=False), nn.Linear(width, width)
        self.out = nn.Linear(width, width)
        self.gate, self.up = nn.Linear(width, inner), nn.Linear(width, inner)
        self.down = nn.Linear(inner, width, bias=False)

    def forward(self, hidden_states: Tensor, scale: float = 1.0) -> Tensor:
        x = nn.functional.layer_norm(hidden_states, hidden_states.shape[-1:])
        length = torch.arange(1, x.shape[1] + 1, device=x.device)[:, None]
        mixed = torch.cumsum(self.left(x), 1) / length
        hidden_states = hidden_states + scale * self.out(mixed * torch.sigmoid(self.right(x)))
        x = nn.functional.layer_norm(hidden_states, hidden_states.shape[-1:])
        output: Tensor = hidden_states + self.down(nn.functional.silu(self.gate(x)) * self.up(x))
        return output


class TinyModel(nn.Module):
    """A causal language model of a few thousand weights, shaped as qcore expects models to be."""

    adapter = ModelAdapter(
        name="tiny",
        model_types=("tiny",),
        blocks="blocks",
        before_blocks=("embed",),
        linear_groups=(("left", "right"), ("out",), ("gate", "up"), ("down",)),
    )

    def __init__(self, depth: int = 2, width: int = 64, inner: int = 96, vocabulary: int = 50, seed: int = 0) -> None:
        super().__init__()
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            self.embed = nn.Embedding(vocabulary, width)
            self.blocks = nn.ModuleList(TinyBlock(width, inner) for _ in range(depth))
            self.head = nn.Linear(width, vocabulary, bias=False)
        self.config = types.SimpleNamespace(
            model_type="tiny", vocab_size=vocabulary, hidden_size=width, to_dict=lambda: {"model_type": "tiny"}
        )
        self.requires_grad_(False)

    def get_input_embeddings(self) -> nn.Module:
        return self.embed

    def get_output_embeddings(self) -> nn.Module:
        return self.head

    def forward(self, input_ids: Tensor, attention_mask: Tensor | None = None, use_cache: bool = False) -> Any:
        hidden = self.embed(input_ids)
        for block in self.blocks:
            hidden = block(hidden, scale=0.5)
        return types.SimpleNamespace(logits=self.head(hidden))


def tiny_tokens(count: int = 8, length: int = 32, vocabulary: int = 50, seed: int = 0) -> list[Tensor]:
    """Token sequences for a TinyModel: random, but drawn from few tokens, so that inputs are correlated."""
    generator = torch.Generator().manual_seed(seed)
    return [torch.randint(0, vocabulary // 3, (length,), generator=generator) for _ in range(count)]


def tiny_transformer(model_type: str, **overrides: Any) -> Any:
    """Build a small randomly initialised transformers model of a type; overrides go to its config."""
    from transformers import AutoConfig, AutoModelForCausalLM

    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(overrides.pop("seed", 0))
        config = AutoConfig.for_model(model_type, **overrides)
        return AutoModelForCausalLM.from_config(config).eval()


def tiny_language_model() -> Any:
    """A transformers model of some thousand weights that generates; its vocabulary is that of `tiny_tokenizer`."""
    from transformers import LlamaConfig, LlamaForCausalLM

    config = LlamaConfig(
        vocab_size=258, hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=2,
        max_position_embeddings=256, bos_token_id=0, eos_token_id=1,
    )  # fmt: skip
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        return LlamaForCausalLM(config).eval()


def tiny_tokenizer() -> Any:
    """A tokenizer of 258 tokens, one for each byte, that needs no file."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    names = ["<s>", "</s>", *sorted(pre_tokenizers.ByteLevel.alphabet())]
    bpe = Tokenizer(models.BPE({name: number for number, name in enumerate(names)}, []))
    bpe.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    bpe.decoder = decoders.ByteLevel()
    return PreTrainedTokenizerFast(tokenizer_object=bpe, bos_token="<s>", eos_token="</s>", pad_token="</s>")


def random_weight(
    out: int, columns: int, config: QuantConfig, act_order: bool = False, bias: bool = False, seed: int = 0
) -> QuantizedWeight:
    """Draw a QuantizedWeight that every format of its kind can hold: zeros in [1, maxq], scales of both signs."""
    generator = torch.Generator().manual_seed(seed)
    groups = grid.num_groups(columns, config.group_size)
    codes = torch.randint(0, config.maxq + 1, (out, columns), generator=generator).to(torch.uint8)
    signs = torch.randint(0, 2, (out, groups), generator=generator) * 2 - 1
    scales = ((torch.rand(out, groups, generator=generator) + 0.1) * 0.02 * signs).to(torch.float16)
    zeros = torch.randint(1, config.maxq + 1, (out, groups), generator=generator, dtype=torch.int32)
    if config.sym:
        zeros = torch.full_like(zeros, grid.symmetric_zero(config.bits))
    g_idx = grid.group_index(columns, config.group_size)
    if act_order:
        g_idx = g_idx[torch.randperm(columns, generator=generator)].contiguous()
    offsets = torch.randn(out, generator=generator).to(torch.float16) if bias else None
    return QuantizedWeight(codes, scales, zeros, g_idx, config, offsets)


def entry_point(folder: Path, name: str, source: str, distribution: str = "a-plugin") -> importlib.metadata.EntryPoint:
    """Write a plugin's source and return an entry point to it, as if `distribution` 1.0 were installed."""
    folder.mkdir(parents=True, exist_ok=True)
    module = f"{name}_{abs(hash((str(folder), distribution, source))):x}"
    (folder / f"{module}.py").write_text(source)
    if str(folder) not in sys.path:
        sys.path.insert(0, str(folder))

    class Distribution(importlib.metadata.Distribution):
        def read_text(self, filename: str) -> str | None:
            return f"Name: {distribution}\nVersion: 1.0\n" if filename == "METADATA" else None

        def locate_file(self, path: Any) -> Any:
            return folder / path

    point = importlib.metadata.EntryPoint(name, module, "qcore")
    vars(point)["dist"] = Distribution()
    return point


def check_algorithm(kind: type[Algorithm], **params: Any) -> None:
    """Check that an algorithm quantizes every linear, repeatably, better than noise, leaving the floats alone.

    Bits 2, 3, 4 and 8, symmetric and not, group sizes that divide the width, do not, and -1.
    """
    for config in (
        QuantConfig(bits=4, group_size=32),
        QuantConfig(bits=3, group_size=24, sym=False),
        QuantConfig(bits=2, group_size=16, sym=False),
        QuantConfig(bits=8, group_size=-1),
    ):
        first, again = (_quantize_tiny(kind(**params), config) for _ in range(2))
        original = TinyModel()
        for name, weight in first.items():
            assert weight.config == config, f"{name}: config {weight.config}, asked for {config}"
            assert weight.equal(again[name]), f"{name}: two equal runs differ in {weight.difference(again[name])}"
            W = weight_of(original.get_submodule(name))
            error = float((weight.dequantize() - W).norm() / W.norm())
            limit = {2: 1.0, 3: 0.5, 4: 0.25, 8: 0.03}[config.bits]
            assert error < limit, f"{name}: relative error {error:.3f} at {config}, expected below {limit}"
        for name, parameter in original.named_parameters():
            owner = name.rpartition(".")[0]
            kept = first[owner].bias if owner in first and name.endswith("bias") else None
            assert kept is None or torch.equal(kept, parameter), f"{name} was changed"


def _quantize_tiny(algorithm: Algorithm, config: QuantConfig) -> dict[str, QuantizedWeight]:
    model = quantize(
        TinyModel(), algorithm, **config.model_dump(), calibration=tiny_tokens(), adapter="tiny", device="cpu",
        plugins=with_tiny_adapter(),
    )  # fmt: skip
    modules = model.named_modules()
    return {name: module.weight_source() for name, module in modules if isinstance(module, QuantLinear)}


def with_tiny_adapter() -> Plugins:
    """The installed plugins and an adapter for TinyModel."""
    plugins = Plugins()
    plugins.all[0].offers.append(("model", "tiny", TinyModel.adapter))
    return plugins


def check_adapter(adapter: ModelAdapter, model: nn.Module) -> None:
    """Check a declaration against a (small) model: all linears covered, shared inputs and order as a forward pass shows them.

    Raises AssertionError (or ModelError when the declared blocks or linears are not there).
    """
    found = adapter.find_blocks(unfuse(model))
    ids = torch.arange(8).reshape(1, 8) % int(model.config.vocab_size)  # type: ignore[union-attr, arg-type]
    captured = capture_inputs(model, ModuleWeights(model), adapter, [(ids, None)], torch.device("cpu"), torch.float32)
    for index, (name, block) in enumerate(found):
        with discovery.all_experts(block):
            numbers = discovery.inputs_of(block, captured.stream.hidden[0], captured.kwargs[index][0])
            shown = discovery.order_of_use(block, captured.stream.hidden[0], captured.kwargs[index][0])
        where, when = f"{adapter.name}: {name}", {linear: at for at, linear in enumerate(numbers)}
        order = []
        for stage in adapter.stages_in(block):
            for group in stage:
                inputs = {numbers[linear] for linear in group if linear in numbers}
                assert len(inputs) <= 1, (
                    f"{where}: {sorted(group)} do not share one input; a forward pass shows {shown}"
                )
            order.append(
                min((when[linear] for group in stage for linear in group if linear in when), default=len(when))
            )
        assert order == sorted(order), f"{where}: groups run in the order {shown}, not as declared"
    present = {linear for _, block in found for linear in linears_in(block)}
    for patterns in filter(None, (*adapter.linear_groups, adapter.keep_float)):
        assert any(_stars(pattern, linear) is not None for pattern in patterns for linear in present), (
            f"{adapter.name}: no block of {type(model).__name__} has a linear {patterns}; they have {sorted(present)}"
        )
    for outside in (*adapter.before_blocks, *adapter.after_blocks):
        assert _named(model, outside), f"{adapter.name}: {type(model).__name__} has no module {outside}"


def _named(model: nn.Module, name: str) -> bool:
    """Whether a dotted name leads to a module, or to None where a model may lack it."""
    place: Any = model
    for part in name.split("."):
        if not hasattr(place, part):
            return False
        place = getattr(place, part)
    return True


def check_backend(
    backend: Backend, device: str = "cpu", dtypes: Sequence[torch.dtype] = (torch.float32,), tolerance: float = 1e-5,
    widths: Sequence[int] = (2, 3, 4, 8),
) -> int:  # fmt: skip
    """Check a backend's products and gradients against float64 on every layer it says it serves; return how many.

    Odd shapes, all widths, act-order, asymmetric grids, group sizes with a shorter last group, no tokens, strided
    inputs, and torch.compile(fullgraph=True). tolerance: of the relative error, for float32; half types get what their
    rounding allows.
    """
    reason = backend.unavailable()
    assert reason is None, f"{backend.name} cannot run here: {reason}"
    served, compiled = 0, set()
    for bits in widths:
        for group_size, sym, act_order in ((32, True, False), (32, False, True), (-1, False, False), (48, True, False)):
            for dtype in dtypes:
                config = QuantConfig(bits=bits, group_size=group_size, sym=sym)
                for out, columns in ((64, 128), (40, 96)):
                    spec = MatmulSpec(config, columns, out, act_order, dtype, torch.device(device))
                    if backend.why_not(spec) is None:
                        _check_matmul(backend, spec, tolerance, compiles=spec.dtype not in compiled)
                        compiled.add(spec.dtype)
                        served += 1
    assert served, f"{backend.name} served none of the layers tried"
    return served


def _check_matmul(backend: Backend, spec: MatmulSpec, tolerance: float, compiles: bool) -> None:
    weight = random_weight(spec.out_features, spec.in_features, spec.config, spec.act_order)
    buffers = backend.prepare(weight, spec)
    W = weight.to(spec.device).dequantize(torch.float64)
    limit = tolerance if spec.dtype == torch.float32 else 8 * torch.finfo(spec.dtype).eps
    for shape in ((1,), (3,), (2, 5), (0,)):
        x = torch.randn(*shape, 2 * spec.in_features, dtype=spec.dtype, device=spec.device)[..., ::2]  # strided
        x.requires_grad_()
        y = backend.matmul(x, buffers, spec)
        assert y.shape == (*shape, spec.out_features), f"{backend.name}: shape {tuple(y.shape)} for x {tuple(x.shape)}"
        assert y.dtype == spec.dtype, f"{backend.name}: returns {y.dtype} for {spec.dtype}"
        _assert_close(f"{backend.name}: matmul {spec}", y, x.double() @ W.t(), limit)
        grad = torch.randn_like(y)
        (found,) = torch.autograd.grad(y, x, grad)
        _assert_close(f"{backend.name}: gradient {spec}", found, grad.double() @ W, limit)
    if compiles:
        torch.compiler.reset()
        compiled = torch.compile(lambda x: backend.matmul(x, buffers, spec) + 1, fullgraph=True, backend="aot_eager")
        x = torch.randn(3, spec.in_features, dtype=spec.dtype, device=spec.device)
        _assert_close(f"{backend.name}: compiled {spec}", compiled(x), x.double() @ W.t() + 1, limit)


def _assert_close(what: str, found: Tensor, expected: Tensor, limit: float) -> None:
    if expected.numel():
        error = float((found.detach().double() - expected.detach()).norm() / expected.detach().norm())
        assert error <= limit, f"{what}: relative error {error:.2e}, expected at most {limit:.2e}"


def check_exporter(exporter: Exporter, folder: Path) -> int:
    """Check that whatever a format says it can hold comes back bit for bit, and the rest is refused; return how many.

    The reading half is checked only for formats that can be read.
    """
    held = 0
    for number, config in enumerate(
        QuantConfig(bits=bits, group_size=size, sym=sym)
        for bits in (2, 3, 4, 5, 8)
        for size in (32, -1)
        for sym in (True, False)
    ):
        for act_order in (False, True) if config.group_size == 32 else (False,):
            model = _quantized_tiny(config, act_order)
            target = folder / f"{exporter.name}-{number}-{act_order}"
            with content_of(model) as content:
                refused = [layer.name for layer in content.layers.values() if exporter.why_not(layer)]
                try:
                    with complete_folder(target) as draft:
                        exporter.save(content, draft)
                except QcoreError:
                    assert refused, f"{exporter.name} says it holds {config}, and then refuses to save it"
                    assert not target.exists(), f"{exporter.name} left {target} behind after refusing"
                    continue
                assert not refused, f"{exporter.name} cannot hold {refused[0]} at {config}, yet saved it"
                held += 1
                _check_read_back(exporter, target, content.layers, content.weight)
    assert held, f"{exporter.name} held none of the weights tried"
    return held


def _check_read_back(exporter: Exporter, folder: Path, layers: Any, weight: Any) -> None:
    if type(exporter).open is Exporter.open:
        return
    again = exporter.open(folder)
    assert set(again.layers) == set(layers), f"{exporter.name} reads back {sorted(again.layers)}"
    for name in layers:
        difference = weight(name).difference(again.weight(name))
        assert difference is None, f"{exporter.name}: {name} comes back with a different {difference}"


def _quantized_tiny(config: QuantConfig, act_order: bool) -> nn.Module:
    """A TinyModel whose linears hold random quantized weights."""
    model = TinyModel(depth=1, width=64, inner=96)
    backends = list(installed().usable("backend").values())
    for number, name in enumerate(linears_in(model.blocks)):
        linear = model.blocks.get_submodule(name)
        out, columns = weight_of(linear).shape
        weight = random_weight(out, columns, config, act_order, linear.bias is not None, number)
        parent, _, child = f"blocks.{name}".rpartition(".")
        module = QuantLinear(weight, backends, torch.device("cpu"), torch.float32, partial(replace, weight))
        setattr(model.get_submodule(parent), child, module)
    return model


def check_dataset(dataset: CalibrationDataset, samples: int = 4, seqlen: int = 16) -> None:
    """Check that a dataset gives documents or token ids, and the same ones twice."""
    tokenizer = tiny_tokenizer()

    request = CalibrationRequest(tokenizer, samples, seqlen, 0, torch.device("cpu"), tiny_language_model)
    first, again = (list(dataset.load(request)) for _ in range(2))
    assert first, f"{dataset.name}: it gives nothing"
    assert first == again, f"{dataset.name}: two equal requests give different data"
    kinds = {str if isinstance(row, str) else list for row in first}
    assert len(kinds) == 1, f"{dataset.name}: it mixes text and token ids"
    assert kinds == {str} or all(isinstance(token, int) for row in first for token in row), (
        f"{dataset.name}: no token ids"
    )


def check_task(task: EvalTask, argument: str = "", **params: Any) -> dict[str, float]:
    """Check that a task gives numbers, the same twice, and leaves model and random state alone; return the numbers."""
    model, tokenizer = tiny_language_model(), tiny_tokenizer()
    options = task.Params.parse(params, f"task {task.name!r}")
    before, state = [tensor.clone() for tensor in model.parameters()], torch.random.get_rng_state()
    first = task.run(model, tokenizer, options, argument)
    assert torch.equal(torch.random.get_rng_state(), state), f"{task.name}: it changed the process's random state"
    assert first, f"{task.name}: it measured nothing"
    for name, value in first.items():
        assert isinstance(name, str), f"{task.name}: metric {name!r} is no name"
        assert isinstance(value, (int, float)), f"{task.name}: {name} is {value!r}, expected a number"
    assert task.run(model, tokenizer, options, argument) == first, f"{task.name}: two equal runs differ"
    changed = [a for a, b in zip(model.parameters(), before, strict=True) if not torch.equal(a, b)]
    assert not changed, f"{task.name}: it changed the model"
    return first


def check_target(target: Target, subject: Subject) -> list[Finding]:
    """Check that a target judges a subject in known words, names only its layers and says where each rule is from.

    Returns what it found.
    """
    found = target.check(subject)
    for finding in found:
        where = f"{target.name}: {finding.rule}"
        assert finding.level in get_args(Level), f"{where}: level {finding.level!r}, expected one of {get_args(Level)}"
        assert finding.message, f"{where}: it says nothing"
        assert finding.source, f"{where}: no source"
        strange = set(finding.layers) - set(subject.layers)
        assert not strange, f"{where}: it names layers that the subject does not have: {sorted(strange)}"
    assert target.check(subject) == found, f"{target.name}: two equal questions have different answers"
    return found


def check_plugin(point: importlib.metadata.EntryPoint) -> None:
    """Check that an entry point loads cleanly and offers something."""
    plugins = Plugins([point], disabled=(), only=None)
    (plugin,) = plugins.all
    assert plugin.status == "loaded", f"{plugin.label}: {plugin.reason}"
    hooks = {
        caller.name
        for module in plugins.manager.get_plugins()
        for caller in plugins.manager.get_hookcallers(module) or []
    }
    assert hooks, f"{plugin.label}: it implements no hook"
    assert plugin.offers or hooks.isdisjoint(KINDS), f"{plugin.label}: it offers nothing"
