"""How fast: products of one linear on each backend, and generation end to end. `qcore bench matmul` and `qcore bench generate`."""

from __future__ import annotations

import gc
import statistics
import time
import zlib
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from .. import api, grid
from ..backend import Backend, MatmulSpec
from ..checkpoint import resolve_model
from ..config import QuantConfig
from ..errors import BackendError, ConfigError
from ..fast import accelerate
from ..linear import QuantLinear, quant_linears, replace_module, weight_of
from ..plugins import Plugins, installed
from ..weight import QuantizedWeight

SHAPES = ((4096, 4096), (4096, 11008), (11008, 4096), (8192, 28672))  # in x out features
TOKENS = (1, 2, 4, 8, 16, 32, 64, 128, 256, 1024)
ROTATED = 300e6  # bytes of weights gone through in turn, so that none is still in a cache
REPLAYS = 9
TINYGEMM_MAX = 64  # tokens; beyond, torch's own int4 product takes milliseconds on a GPU
SHORT_NAMES = {torch.float32: "fp32", torch.float16: "fp16", torch.bfloat16: "bf16"}

Product = Callable[[Tensor], Tensor]  # x [m, in] -> [m, out]


# ---- one linear ----------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Row:
    """The times of one kind of product on one shape: microseconds per number of tokens, None where it was not measured."""

    in_features: int
    out_features: int
    kind: str
    microseconds: list[float | None]
    why_not: str | None = None


@torch.inference_mode()
def matmul(
    shapes: Sequence[tuple[int, int]] = SHAPES,
    tokens: Sequence[int] = TOKENS,
    backends: Sequence[str] = (),
    *,
    config: QuantConfig | None = None,
    act_order: bool = False,
    dtype: torch.dtype = torch.float16,
    device: str | torch.device = "auto",
    plugins: Plugins | None = None,
) -> Iterator[Row]:
    """Time products of a float weight, of torch's own int4 product, and of each backend; by default of all that can serve.

    A time is the median for one product among many weights, together larger than the caches: what a decoding model pays. On a
    GPU they are replayed as a CUDA graph, so Python is not in it.
    """
    plugins, place = plugins or installed(), api.pick_device(device)
    config = config or QuantConfig(bits=4, group_size=128)
    names = list(backends) or list(plugins.usable("backend"))
    for columns, out in shapes:
        spec = MatmulSpec(config, columns, out, act_order, dtype, place)
        yield _timed(SHORT_NAMES[dtype], _float_products(spec), spec, tokens)
        if config.bits == 4:
            yield _timed("tinygemm", _tinygemm_products(spec), spec, [m for m in tokens if m <= TINYGEMM_MAX], tokens)
        for name in names:
            backend: Backend = plugins.get("backend", name)
            reason = backend.unavailable() or backend.why_not(spec)
            if reason is None:
                yield _timed(name, packed_products(backend, spec), spec, tokens, checked=True)
            elif backends:
                yield Row(columns, out, name, [None] * len(tokens), reason)


def _timed(
    kind: str, products: list[Product] | None, spec: MatmulSpec, tokens: Sequence[int], asked: Sequence[int] | None = None,
    checked: bool = False,
) -> Row:  # fmt: skip
    """Time the products for each number of tokens; `asked` has those too that are left out."""
    times: dict[int, float] = {}
    for m in tokens if products else ():
        dtype = torch.bfloat16 if kind == "tinygemm" else spec.dtype
        x = torch.randn(m, spec.in_features, device=spec.device, dtype=dtype)
        if checked:
            _check(kind, products[0], x)  # type: ignore[index]
        times[m] = microseconds([lambda p=p, x=x: p(x) for p in products or ()], spec.device)  # type: ignore[misc]
    del products
    if spec.device.type == "cuda":
        torch.cuda.empty_cache()
    return Row(spec.in_features, spec.out_features, kind, [times.get(m) for m in asked or tokens])


def _check(kind: str, product: Product, x: Tensor) -> None:
    """The same input twice gives the same numbers, all of them finite: a benchmark of a broken kernel is none."""
    first = product(x)
    if not (torch.equal(first, product(x)) and bool(first.isfinite().all())):
        raise BackendError(f"{kind}: its product is not repeatable or not finite for x {list(x.shape)}.")


def microseconds(calls: Sequence[Callable[[], object]], device: torch.device, least: int = 40) -> float:
    """Median time of one of these calls when all are made in turn, at least `least` of them."""
    calls = list(calls) * max(1, least // len(calls))
    if device.type != "cuda":
        calls[0]()
        times = []
        for call in calls:
            started = time.perf_counter()
            call()
            times.append((time.perf_counter() - started) * 1e6)
        return statistics.median(times)
    calls[0]()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        for call in calls:
            call()
    graph.replay()
    times = []
    for _ in range(REPLAYS):
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))  # type: ignore[no-untyped-call]
        start.record()
        graph.replay()
        end.record()
        torch.cuda.synchronize(device)
        times.append(start.elapsed_time(end) * 1e3 / len(calls))
    return statistics.median(times)


def _copies(nbytes: float) -> int:
    """How many weights of a size to go through."""
    return int(min(48, max(2, ROTATED // nbytes)))


def _float_products(spec: MatmulSpec) -> list[Product]:
    def product() -> Product:
        weight = torch.randn(spec.out_features, spec.in_features, device=spec.device, dtype=spec.dtype) * 0.02
        return lambda x: torch.matmul(x, weight.t())

    return [product() for _ in range(_copies(spec.dtype.itemsize * spec.in_features * spec.out_features))]


def _tinygemm_products(spec: MatmulSpec) -> list[Product] | None:
    """torch's int4 product, bfloat16, groups of 128; None where this torch or shape has none."""
    columns, out, on_gpu = spec.in_features, spec.out_features, spec.device.type == "cuda"
    if columns % 1024 or out % 64:
        return None
    pack = torch._convert_weight_to_int4pack if on_gpu else torch._convert_weight_to_int4pack_for_cpu
    multiply = torch._weight_int4pack_mm if on_gpu else torch._weight_int4pack_mm_for_cpu

    def product() -> Product:
        codes = torch.randint(0, 256, (out, columns // 2), dtype=torch.uint8, device=spec.device)
        if not on_gpu:
            codes = torch.randint(0, 16, (out, columns), dtype=torch.int32)
        packed = pack(codes, 8)
        meta = torch.randn(columns // 128, out, 2, device=spec.device, dtype=torch.bfloat16)
        return lambda x: multiply(x, packed, 128, meta)

    return [product() for _ in range(_copies(columns * out / 2))]


def packed_products(backend: Backend, spec: MatmulSpec) -> list[Product]:
    """A backend as a QuantLinear calls it; one weight is packed, the others are copies of its buffers."""
    first = backend.prepare(random_weight(spec), spec)
    nbytes = sum(tensor.numel() * tensor.itemsize for tensor in first.values())
    held = [first] + [{name: t.clone() for name, t in first.items()} for _ in range(_copies(nbytes) - 1)]
    return [lambda x, b=b: backend.matmul(x, b, spec) for b in held]  # type: ignore[misc]


def random_weight(spec: MatmulSpec, seed: int = 0) -> QuantizedWeight:
    """A weight of the layer's shape and kind with random codes, made on its device; the same one for a seed."""
    config, out, columns = spec.config, spec.out_features, spec.in_features
    groups = grid.num_groups(columns, config.group_size)
    where: dict[str, Any] = {"device": spec.device, "generator": torch.Generator(spec.device).manual_seed(seed)}
    codes = torch.randint(0, config.maxq + 1, (out, columns), dtype=torch.uint8, **where)
    scales = (torch.rand(out, groups, **where) + 0.5) * (3 * columns**-0.5 / config.maxq)
    zeros = torch.full((out, groups), grid.symmetric_zero(config.bits), dtype=torch.int32, device=spec.device)
    if not config.sym:
        zeros = torch.randint(1, config.maxq + 1, (out, groups), dtype=torch.int32, **where)
    g_idx = grid.group_index(columns, config.group_size, spec.device)
    if spec.act_order:
        g_idx = g_idx[torch.randperm(columns, **where)]
    return QuantizedWeight(codes, scales.half(), zeros, g_idx, config)


def copy_bandwidth(device: torch.device) -> float:
    """Bytes read and written by a large copy, in TB/s: what to compare products with (reading alone is a bit faster)."""
    source = torch.empty(1 << (30 if device.type == "cuda" else 28), dtype=torch.uint8, device=device).random_()
    target = torch.empty_like(source)
    return 2 * source.numel() / microseconds([lambda: target.copy_(source)], device, least=5) / 1e6


def device_facts(device: torch.device) -> dict[str, Any]:
    """What figures are to be read with: the machine, torch, threads, bandwidth."""
    if device.type == "cuda":
        return {"device": torch.cuda.get_device_name(device), "torch": torch.__version__}
    return {"device": "cpu", "torch": torch.__version__, "threads": torch.get_num_threads()}


def matmul_as_asked(
    shapes: str | None, tokens: Sequence[int], dtype: str | None, device: torch.device, bits: int, group_size: int,
    sym: bool, act_order: bool, backends: Sequence[str],
) -> Iterator[Row]:  # fmt: skip
    """`matmul` for options as the command line has them; None for the defaults."""
    chosen = getattr(torch, dtype) if dtype else torch.float32 if device.type == "cpu" else torch.float16
    return matmul(
        parse_shapes(shapes) if shapes else SHAPES, tokens, backends, config=QuantConfig.parse({"bits": bits, "group_size": group_size, "sym": sym}, "bench"),
        act_order=act_order, dtype=chosen, device=device,
    )  # fmt: skip


def parse_tokens(text: str) -> list[int]:
    """Read 1,16,64."""
    if not all(each.isdecimal() and int(each) for each in text.split(",")):
        raise ConfigError(f"{text!r} are no numbers of tokens: expected some separated by commas: 1,16,64.")
    return [int(each) for each in text.split(",")]


def parse_shapes(text: str) -> list[tuple[int, int]]:
    """Read 4096x11008,11008x4096: in x out features."""
    try:
        shapes = [(int(each.split("x")[0]), int(each.split("x")[1])) for each in text.split(",")]
    except (ValueError, IndexError):
        shapes = []
    if not shapes or min(map(min, shapes)) < 1:
        raise ConfigError(f"{text!r} are no shapes: expected IN x OUT, separated by commas: 4096x4096,4096x11008.")
    return shapes


# ---- generation ----------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Speed:
    """How fast a model generates, batch 1, greedily, exactly so many tokens."""

    model: str
    backends: str  # of its quantized linears
    num_beams: int
    new_tokens: int
    tokens_per_second: float  # all of them by the whole time, the prompt's included
    first_token_seconds: float
    memory: int  # bytes: the peak on the GPUs, on a CPU the size of the tensors
    load_seconds: float  # from the folder to a model ready to generate


SPEED_COLUMNS = ("model", "backend", "beams", "tokens/s", "first token, ms", "memory, GB", "loaded in, s")


def speed_cells(speed: Speed) -> list[str]:
    """One row of the table whose columns are SPEED_COLUMNS."""
    numbers = (f"{speed.tokens_per_second:.1f}", f"{speed.first_token_seconds * 1e3:.1f}", f"{speed.memory / 1e9:.2f}")
    return [speed.model, speed.backends, str(speed.num_beams), *numbers, f"{speed.load_seconds:.1f}"]


class FloatBackend(Backend):
    """Not quantized at all: the weight as a float matrix. What quantized products are compared with, in the same model."""

    rank = 0

    def __init__(self, dtype: torch.dtype) -> None:
        self.name = SHORT_NAMES[dtype]  # type: ignore[misc]

    def why_not(self, spec: MatmulSpec) -> str | None:
        """It serves everything."""
        return None

    def prepare(self, weight: QuantizedWeight, spec: MatmulSpec) -> dict[str, Tensor]:
        """Make the weight [out, in]."""
        return {"weight": weight.to(spec.device).dequantize(spec.dtype)}

    def matmul(self, x: Tensor, buffers: dict[str, Tensor], spec: MatmulSpec) -> Tensor:
        """Multiply as nn.Linear does."""
        return nn.functional.linear(x, buffers["weight"])


def generation(
    openers: Iterable[tuple[str, Callable[[], Any]]],
    *,
    new_tokens: int = 512,
    prompt_tokens: int = 128,
    num_beams: Sequence[int] = (1,),
    repeat: int = 1,
) -> Iterator[Speed]:
    """Open models one after the other and measure each; the fastest of `repeat` runs counts."""
    for name, open_model in openers:
        _reset_peak()
        started = time.perf_counter()
        model = open_model()
        _wait()
        loaded = time.perf_counter() - started
        for beams in num_beams:
            total, first = speed(model, new_tokens, prompt_tokens, beams, repeat)
            yield Speed(
                name, _backends_of(model), beams, new_tokens, new_tokens / total, first, _memory(model), loaded
            )  # fmt: skip
        del model
        gc.collect()
        if torch.cuda.is_available():
            torch.cuda.empty_cache()


@torch.no_grad()
def speed(
    model: Any, new_tokens: int, prompt_tokens: int = 16, num_beams: int = 1, repeat: int = 1
) -> tuple[float, float]:
    """Generate greedily from a prompt of arbitrary tokens; return the seconds for all tokens and those for the first alone."""
    embeddings = model.get_input_embeddings()
    device = embeddings.weight.device
    ids = torch.arange(1, prompt_tokens + 1, device=device)[None] % embeddings.num_embeddings

    def seconds(tokens: int, **settings: Any) -> float:
        _wait()
        started = time.perf_counter()
        model.generate(
            ids, attention_mask=torch.ones_like(ids), do_sample=False, num_beams=num_beams, max_new_tokens=tokens,
            eos_token_id=embeddings.num_embeddings, pad_token_id=0, **settings,  # no such token: none ends it
        )  # fmt: skip
        _wait()
        return time.perf_counter() - started

    def soon(ids: Tensor, scores: Any, **_: Any) -> Tensor:
        return torch.full((ids.shape[0],), ids.shape[1] >= prompt_tokens + 4, device=ids.device)

    seconds(new_tokens, stopping_criteria=[soon])  # to warm up: a step made for all the tokens, and a few of them
    seconds(1)
    return min(seconds(new_tokens) for _ in range(repeat)), min(seconds(1) for _ in range(max(2, repeat)))


def tokens_per_second(model: Any, new_tokens: int) -> float:
    """Tokens per second of greedy generation from a prompt of 16 tokens."""
    return new_tokens / speed(model, new_tokens)[0]


def openers(
    model: str, reference: str | None = None, *, backend: str = "auto", device: str = "auto", device_map: Any = None,
    dtype: torch.dtype | None = None, fast: bool = True, trust_remote_code: bool = False, plugins: Plugins | None = None,
) -> list[tuple[str, Callable[[], Any]]]:  # fmt: skip
    """Name and open what `qcore bench generate` compares: the reference, then the quantized model.

    reference: fp16, bf16 or fp32 for the quantized model with its weights made float, or a folder or name of a float model.
    """
    shared: dict[str, Any] = {
        "device": device, "device_map": device_map, "fast": fast, "trust_remote_code": trust_remote_code, "plugins": plugins,
    }  # fmt: skip
    found: list[tuple[str, Callable[[], Any]]] = [
        (model, partial(api.load, model, backend=backend, dtype=dtype, **shared))
    ]
    if reference in SHORT_NAMES.values():
        chosen = next(each for each, name in SHORT_NAMES.items() if name == reference)
        found.insert(
            0,
            (f"{model} in {reference}", partial(api.load, model, backend=FloatBackend(chosen), dtype=chosen, **shared)),
        )
    elif reference is not None:
        if device_map is not None:
            raise ConfigError("--device-map spreads quantized models and --reference fp16, not a float folder.")
        found.insert(0, (reference, lambda: api.open_any(reference, device, trust_remote_code, plugins, fast)[0]))
    return found


def _backends_of(model: nn.Module) -> str:
    used = {module.backend.name for module in model.modules() if isinstance(module, QuantLinear)}
    return ", ".join(sorted(used)) or "-"


def _memory(model: nn.Module) -> int:
    if torch.cuda.is_available() and next(model.parameters()).is_cuda:
        return sum(torch.cuda.max_memory_allocated(index) for index in range(torch.cuda.device_count()))
    return sum(tensor.numel() * tensor.itemsize for tensor in [*model.parameters(), *model.buffers()])


def _reset_peak() -> None:
    for index in range(torch.cuda.device_count()):
        torch.cuda.reset_peak_memory_stats(index)


def _wait() -> None:
    for index in range(torch.cuda.device_count()):
        torch.cuda.synchronize(index)


@dataclass(frozen=True)
class LoadTimes:
    """Seconds from a folder to a model that generates; the files are in the system's cache, as they were read just before."""

    model: str
    bytes: int
    read_seconds: float  # of the same files, from end to end and into nothing
    first_load_seconds: float  # what Python imports for it included
    load_seconds: float  # once more, after that
    first_token_seconds: float  # then, of transformers' own loop, which compiles nothing


def load_times(model: str | Path, plugins: Plugins | None = None, **settings: Any) -> LoadTimes:
    """Measure how long a quantized model takes to open, beside reading its files. settings: of `qcore.load`."""
    folder = resolve_model(str(model), plugins or installed())
    files = sorted(folder.glob("*.safetensors"))
    _read(files)
    started = time.perf_counter()
    size = _read(files)
    read = time.perf_counter() - started
    loads = []
    for _ in range(2):
        started = time.perf_counter()
        network = api.load(model, plugins=plugins, **settings)
        _wait()
        loads.append(time.perf_counter() - started)
    started = time.perf_counter()
    ids = torch.arange(1, 17, device=network.get_input_embeddings().weight.device)[None]
    type(network).generate(
        network, ids, attention_mask=torch.ones_like(ids), max_new_tokens=1, do_sample=False, pad_token_id=0
    )
    _wait()
    return LoadTimes(str(model), size, read, loads[0], loads[1], time.perf_counter() - started)


def _read(files: Iterable[Path]) -> int:
    """Read files from end to end; return their size."""
    buffer, size = bytearray(1 << 24), 0
    for file in files:
        with file.open("rb", buffering=0) as stream:
            while count := stream.readinto(buffer):
                size += count
    return size


@torch.no_grad()
def random_model(
    settings: Mapping[str, Any], config: QuantConfig, backend: str | Backend = "auto", *, dtype: torch.dtype = torch.float16,
    device: str | torch.device = "auto", fast: bool = True, plugins: Plugins | None = None,
) -> Any:  # fmt: skip
    """Build a model of a shape with random weights right on a device, the linears of its blocks quantized as `config` says.

    settings: of a transformers config, model_type among them. Nothing is read or quantized, so size costs little time.
    """
    from accelerate import init_empty_weights
    from transformers import AutoConfig, AutoModelForCausalLM

    plugins, place = plugins or installed(), api.pick_device(device)
    backends, wanted = api.backends_for(backend, plugins)
    with init_empty_weights(include_buffers=False):
        model: Any = AutoModelForCausalLM.from_config(AutoConfig.for_model(**settings), dtype=dtype).eval()
    for names in api.shared_inputs(model, plugins):
        shapes = [weight_of(model.get_submodule(name)).shape for name in names]
        specs = [MatmulSpec(config, k, n, False, dtype, place) for n, k in shapes]
        sources = [
            partial(random_weight, spec, zlib.crc32(name.encode())) for spec, name in zip(specs, names, strict=True)
        ]
        for part in [slice(None)] if fast else [slice(index, index + 1) for index in range(len(names))]:
            weights = [source() for source in sources[part]]
            linears = quant_linears(weights, sources[part], backends.values(), place, dtype, wanted)
            for name, linear in zip(names[part], linears, strict=True):
                replace_module(model, name, linear)
    for module in model.modules():
        for name, parameter in module.named_parameters(recurse=False):
            value = torch.empty(parameter.shape, dtype=dtype, device=place)
            value = value.fill_(1) if parameter.ndim == 1 else value.normal_(std=parameter.shape[-1] ** -0.5)
            setattr(module, name, nn.Parameter(value, requires_grad=False))
        for name, buffer in module.named_buffers(recurse=False):
            module._buffers[name] = buffer.to(place)
    model.tie_weights()
    return accelerate(model, plugins=plugins) if fast else model
