"""The public functions: quantize, save, load, convert's parts, evaluate, report, inspect.

Each is a short list of steps; the steps live in the files this one imports.
"""

from __future__ import annotations

import os
from collections.abc import Collection, Iterator, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from .adapter import ModelAdapter
from .algorithm import Algorithm
from .backend import Backend
from .calibration import Calibration, CalibrationRequest, identify, prepare
from .checkpoint import ModelFolder, folder_config, resolve_model
from .config import LEAST_MEMORY, Override, QuantConfig, RunSizes, parse_bytes
from .content import Info, content_of, info_of, open_content, plain_record, tell_model
from .errors import ConfigError, ModelError, first_line, suggest
from .evaluation import EvalTask, measure, windows_of
from .experts import unfuse
from .exporter import Exporter
from .fast import accelerate
from .files import check_manifest, check_output, complete_folder, disk_errors, local_path, read_json, write_manifest
from .journal import Journal, calibration_facts, fingerprint, model_digest, renamed, same_everywhere
from .linear import QuantLinear, replace_module
from .loading import load_quantized
from .model import compute_dtype, load_float, load_tokenizer, longest, skeleton, stored_dtype, vocabulary
from .plan import Job, check_format, check_model
from .plugins import Plugins, installed
from .ranks import Ranks
from .run import quantize_blocks, quantize_to_folder
from .saving import PROVENANCE, in_shards
from .streaming import FolderWeights, ModuleWeights, Names
from .weight import QuantizedWeight

DEFAULT_ALGORITHM = "gptq"
DEFAULT_FORMAT = "gptq"
DEFAULT_CALIBRATION = "topics,self"  # measured best without a network (docs/benchmarks.md)
DEFAULT_CALIBRATION_OF_LARGE = "topics"  # sampling needs the float model whole


def quantize(
    model: nn.Module | str | Path,
    algo: str | Algorithm = DEFAULT_ALGORITHM,
    *,
    bits: int = 4,
    group_size: int = 128,
    sym: bool = True,
    overrides: Sequence[Override | str | Mapping[str, Any]] = (),
    calibration: Any = None,
    samples: int = 128,
    seqlen: int = 2048,
    batch_size: int | None = None,
    max_memory: int | str | None = None,
    seed: int = 0,
    device: str | torch.device = "auto",
    tokenizer: Any = None,
    adapter: str | ModelAdapter | None = None,
    output: str | Path | None = None,
    format: str = DEFAULT_FORMAT,
    fresh: bool = False,
    deterministic: bool = False,
    trust_remote_code: bool = False,
    revision: str | None = None,
    plugins: Plugins | None = None,
    **params: Any,
) -> Any:
    """Quantize the linears of a model's decoder blocks.

    model: an nn.Module (changed in place; pass tokenizer= for text calibration), a folder, a hub name, or a name a
        plugin resolves ("demo").
    algo: an algorithm's name or an Algorithm object; its own options go in as further keywords.
    bits, group_size, sym: see QuantConfig. overrides: Override objects, their command-line text, or mappings.
    calibration: see `qcore.calibration.prepare`; samples sequences of seqlen tokens. batch_size: sequences per forward
        pass (None: chosen by size). max_memory: bytes of the device to use, or "4GiB": smaller batches, hidden states kept on the
        host or the disk. When memory runs out all the same, batches are halved. seed: for everything random.
    device: "auto" takes a GPU when there is one. adapter: an adapter's name, or a ModelAdapter; None goes by the model's type.
    output: write a folder in `format` instead, streaming block by block, resuming an interrupted run unless `fresh`.
    deterministic: give the same bytes whatever the number of processes (docs/scaling.md).

    Where torch.distributed has a process group, its processes share the run; each must make this call. The first one writes.

    Returns the model with QuantLinears in place, an ordinary transformers model; with `output`, its Path.
    Raises a QcoreError child for everything the caller can cause.

    Example: `model = qcore.quantize("demo", bits=4, group_size=64, desc_act=True)`
    """
    plugins = plugins or installed()
    config = QuantConfig.parse({"bits": bits, "group_size": group_size, "sym": sym}, "quantize")
    sizes = RunSizes.parse({"samples": samples, "seqlen": seqlen, "batch_size": batch_size, "seed": seed}, "quantize")
    samples, seqlen, batch_size, seed = sizes.samples, sizes.seqlen, sizes.batch_size, sizes.seed
    algorithm = _algorithm(plugins, algo, params)
    exporter: Exporter = plugins.get("format", format)
    target = None if output is None else local_path(output, "output")
    if target is not None:
        check_output(target)
    place, limit = pick_device(device), parse_bytes(max_memory, "max_memory", LEAST_MEMORY)
    network, folder = open_unquantized(model, target is not None, place, trust_remote_code, revision, plugins)
    if folder:
        tokenizer = tokenizer or load_tokenizer(folder.path, trust_remote_code)
    weights = FolderWeights(network, folder) if folder and target else ModuleWeights(network)
    if calibration is None:
        fits = folder is None or target is None or _fits(folder, place)
        calibration = DEFAULT_CALIBRATION if fits else DEFAULT_CALIBRATION_OF_LARGE
    label = str(model) if folder else type(model).__name__
    job = Job(
        network, weights, folder, label, algorithm, config, plugins, overrides=overrides, seqlen=seqlen,
        batch_size=batch_size, tokens=samples * seqlen, limit=limit, seed=seed, device=place, adapter=adapter,
        ranks=Ranks(deterministic),
    )  # fmt: skip

    def float_model() -> nn.Module:
        if folder is None or (target is None and place.type == "cpu"):
            return network
        return load_float(folder, trust_remote_code, job.dtype).to(place)

    def make_calibration() -> Calibration:
        request = CalibrationRequest(tokenizer, samples, seqlen, seed, place, float_model)
        return prepare(calibration, request, vocabulary(network), plugins, longest(network))

    calibrates, source = algorithm.uses_calibration, identify(calibration)
    given = make_calibration() if calibrates and source is None else None  # in memory: every process has its own copy
    used = {"calibration": calibration_facts(given) if given else source, "samples": samples, "seqlen": seqlen}
    if job.ranks.size > 1:
        same_everywhere(job.ranks, {**fingerprint(job, folder), **(used if calibrates else {})})

    if target is None:
        if calibrates:
            job.calibration = job.ranks.first(lambda: given or make_calibration())
        return _quantize_in_place(job, plugins.usable("backend").values(), tokenizer, folder)
    assert folder is not None
    check_format(job, exporter)
    journal = Journal(target, fresh, job.ranks)
    try:
        if calibrates:
            asked = {
                "source": source,
                "samples": samples,
                "seqlen": seqlen,
                "seed": seed,
                "model": model_digest(folder),
            }
            job.calibration = journal.calibration(lambda: given or make_calibration(), asked)
        report = quantize_to_folder(job, folder, journal, exporter)
    finally:
        journal.close()
    _LAST_REPORTS[target.resolve()] = report
    return target


#: reports of runs of this process, which know the times that folders do not hold
_LAST_REPORTS: dict[Path, dict[str, Any]] = {}


def _algorithm(plugins: Plugins, algo: str | Algorithm, params: Mapping[str, Any]) -> Algorithm:
    if isinstance(algo, Algorithm):
        if params:
            raise ConfigError(
                f"unknown option {next(iter(params))!r}: an Algorithm object has its own options already."
            )
        return algo
    kind: type[Algorithm] = plugins.get("algorithm", algo)
    for name in params:
        if name not in kind.Params.model_fields:
            known = {*kind.Params.model_fields, *(quantize.__kwdefaults__ or {})} - {"plugins"}
            raise ConfigError(f"neither quantize nor algorithm {algo!r} has an option {name!r}. {suggest(name, known)}")
    return kind(**params)


def open_unquantized(
    model: nn.Module | str | Path,
    streamed: bool,
    device: torch.device,
    trust_remote_code: bool,
    revision: str | None,
    plugins: Plugins,
) -> tuple[nn.Module, ModelFolder | None]:
    """Return a float model, experts taken apart, and the folder it is in, if it is; streamed: without its weights.

    Raises ModelError for one that is quantized already or cannot be, ConfigError for a module that is to be streamed.
    """
    folder = None
    if not isinstance(model, nn.Module):
        folder = ModelFolder(resolve_model(str(model), plugins, revision))
        if folder.config.get("quantization_config"):
            check_model(nn.Module(), folder)
        working = compute_dtype(stored_dtype(folder), device)
        model = skeleton(folder, trust_remote_code) if streamed else load_float(folder, trust_remote_code, working)
    elif streamed:
        raise ConfigError("output= streams from a folder; for an nn.Module leave it out and call qcore.save.")
    check_model(model, folder)
    return unfuse(model.eval()), folder


def pick_device(device: str | torch.device) -> torch.device:
    """Return the device meant; "auto" is the current GPU, the first one unless a run of several processes gave out others, or
    the CPU.

    Raises ConfigError for a device this machine has not.
    """
    if device == "auto":
        device = "cuda" if torch.cuda.is_available() else "cpu"
    try:
        chosen = torch.device(device)
        torch.empty(1, device=chosen)
    except (RuntimeError, AssertionError, TypeError, ValueError) as error:
        raise ConfigError(f"device {str(device)!r} cannot be used here: {first_line(error)}") from None
    if chosen == torch.device("cuda") and torch.cuda.current_device():  # which other threads do not know
        return torch.device("cuda", torch.cuda.current_device())
    return chosen


def _fits(folder: ModelFolder, device: torch.device) -> bool:
    """Whether the float model takes at most half of the device's memory, so that it can be brought in whole."""
    width = compute_dtype(stored_dtype(folder), device).itemsize
    size = sum(info.count for info in folder.tensors.values()) * width
    if device.type == "cuda":
        return size <= torch.cuda.get_device_properties(device).total_memory / 2
    return size <= os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 2


def _quantize_in_place(
    job: Job, backends: Collection[Backend], tokenizer: Any, folder: ModelFolder | None
) -> nn.Module:
    """Quantize a model in memory, putting a QuantLinear in the place of each linear as its block is finished."""
    info = info_of(job.model, tokenizer, folder, folder.tensors if folder else ())
    records: list[dict[str, Any]] = []
    for _, results, found in quantize_blocks(job):
        records += found
        for name, weight in results.items():
            original = job.model.get_submodule(name).weight
            assert isinstance(original, Tensor)
            kept = partial(QuantizedWeight.from_tensors, weight.to_tensors(), weight.config)  # packed, on the host
            linear = QuantLinear(weight, backends, original.device, original.dtype, kept)
            replace_module(job.model, name, linear)
    info.report = {**job.describe(), "layers": records}
    tell_model(job.model, info)
    job.tell("qcore_run_finished", report=info.report)
    return job.model


def save(
    model: nn.Module,
    folder: str | Path,
    format: str = DEFAULT_FORMAT,
    *,
    tokenizer: Any = None,
    manifest: bool = False,
    shard_bytes: int | str | None = None,
    plugins: Plugins | None = None,
) -> Path:
    """Write a quantized model as a folder, complete or not at all, and verify it by reading it back.

    manifest: write SHA256SUMS too, which `qcore inspect` and `sha256sum -c` check. shard_bytes: the most a weight file
    holds, as a number or "2GB" (None: 5 GB).

    Raises ModelError when the model has no quantized linears, CheckpointError when the format cannot hold them or
    the folder cannot be written.
    """
    plugins = plugins or installed()
    exporter = in_shards(plugins.get("format", format), shard_bytes)
    target = local_path(folder, "folder")
    with content_of(model, tokenizer) as content, complete_folder(target) as draft:
        exporter.save(content, draft)
        if manifest:
            write_manifest(draft)
    return target


def load(
    model: str | Path,
    *,
    backend: str | Backend = "auto",
    device: str | torch.device = "auto",
    dtype: torch.dtype | None = None,
    device_map: Any = None,
    fast: bool = False,
    tokens: int = 1,
    trust_remote_code: bool = False,
    revision: str | None = None,
    plugins: Plugins | None = None,
) -> Any:
    """Open a quantized folder or hub repository as an ordinary transformers model.

    backend: a backend's name, a Backend object, or "auto": the fastest that can serve each layer; the
    environment variable QCORE_BACKEND says what "auto" means. dtype: of activations and of
    what is not quantized (None: as stored; float32 in place of half types on a CPU). device_map: as in accelerate.
    fast: generate by a step that is compiled and captured on a GPU and recorded on a CPU, and multiply linears of one input as one (qcore.fast).
    tokens: how many most products will have, for the choice of backends: 1 for generation, many for batches and evaluation.

    Raises CheckpointError for a damaged or unknown folder, BackendError when no backend can serve a layer, ModelError when
    the model cannot be made fast.
    """
    plugins = plugins or installed()
    if not isinstance(dtype, (torch.dtype, type(None))):
        raise ConfigError(f"dtype={dtype!r}: expected a torch.dtype, for instance torch.float16.")
    if not isinstance(tokens, int) or tokens < 1:
        raise ConfigError(f"tokens={tokens!r}: expected a whole number from 1, how many a product will mostly have.")
    folder = resolve_model(str(model), plugins, revision)
    exporter, content = open_content(folder, plugins)
    backends, wanted = backends_for(backend, plugins)
    place = pick_device(device)
    network = load_quantized(
        content, folder, backends, backend=wanted, device=place, dtype=dtype, device_map=device_map, tokens=tokens,
        trust_remote_code=trust_remote_code, **({"together": partial(shared_inputs, plugins=plugins)} if fast else {}),
    )  # fmt: skip
    if fast:
        accelerate(network, plugins=plugins)
    tokenizer = load_tokenizer(folder, trust_remote_code)
    found = dict(content.provenance)
    layers = found.pop("layers", None) or [plain_record(layer) for layer in content.layers.values()]
    found, layers = renamed(found, layers, Names(network).layer_in_model)
    report = {**found, "format": exporter.name, "layers": layers, "notes": list(content.notes)}
    files = content.source or ModelFolder(folder)
    tell_model(network, info_of(network, tokenizer, files, content.tensors, report))
    return network


def backends_for(backend: str | Backend, plugins: Plugins) -> tuple[Mapping[str, Backend], str]:
    """Return the backends to choose from, by name, and the name wanted of them, or "auto".

    QCORE_BACKEND names one wherever a caller leaves it to "auto".
    """
    if isinstance(backend, Backend):
        return {backend.name: backend}, backend.name
    wanted = os.environ.get("QCORE_BACKEND", "auto") if backend == "auto" else backend
    return plugins.usable("backend") if wanted == "auto" else {wanted: plugins.get("backend", wanted)}, wanted


def shared_inputs(model: nn.Module, plugins: Plugins) -> Iterator[list[str]]:
    """Names of the linears that share an input, as the adapter declared for the model's type has them."""
    adapter = plugins.adapter_for(str(getattr(model.config, "model_type", "")))
    if adapter is None:
        return
    for name, block in adapter.find_blocks(model):
        for group in adapter.groups_in(block):
            yield [f"{name}.{linear}" for linear in group]


def open_any(
    model: nn.Module | str | Path,
    device: str | torch.device = "auto",
    trust_remote_code: bool = False,
    plugins: Plugins | None = None,
    fast: bool = False,
) -> tuple[nn.Module, Any]:
    """Return (model, tokenizer) for a module, a float folder or a quantized one; fast: see `load`."""
    plugins = plugins or installed()
    if isinstance(model, nn.Module):
        info: Info | None = getattr(model, "qcore_info", None)
        return model.eval(), info.tokenizer if info else None
    path = resolve_model(str(model), plugins)
    place = pick_device(device)
    if folder_config(path).get("quantization_config"):
        network = load(path, device=place, trust_remote_code=trust_remote_code, plugins=plugins, fast=fast)
    else:
        folder = ModelFolder(path)
        network = load_float(folder, trust_remote_code, compute_dtype(stored_dtype(folder), place)).to(place)
        network = accelerate(network, plugins=plugins) if fast else network
    return network, load_tokenizer(path, trust_remote_code)


def evaluate(
    model: nn.Module | str | Path,
    text: str | Tensor | None = None,
    *,
    task: str | EvalTask | None = None,
    reference: nn.Module | str | Path | None = None,
    seqlen: int = 512,
    windows: int | None = None,
    tokenizer: Any = None,
    device: str | torch.device = "auto",
    trust_remote_code: bool = False,
    plugins: Plugins | None = None,
    **params: Any,
) -> dict[str, float]:
    """Measure a model on held-out text (perplexity, and KL divergence to a reference model), or by an evaluation task.

    text: a string, or token ids. windows: how many to use at most. See qcore.evaluation for the definitions.
    task: an evaluation task in place of text: its name, NAME:ARGUMENT for tasks that take one, or an EvalTask; its
        options go in as further keywords (`qcore tasks` lists them).

    Returns {"perplexity": …, "kl": …, "reference_perplexity": …, "windows": …, "seqlen": …, "tokens": …}; or the task's
    metrics, each again as "reference_…" where a reference is given.

    Example: `qcore.evaluate("out", task="language_modeling", data_name_or_path="chats.jsonl", reference="demo")`
    """
    plugins = plugins or installed()
    if task is not None:
        chosen, argument = _task(task, text, plugins)
        options = chosen.Params.parse(params, f"task {chosen.name!r}")
    elif text is None or params:
        what = f"no option {next(iter(params))!r} without a task" if params else "nothing to measure on"
        raise ConfigError(f"evaluate has {what}. Give text, or task= and its options (`qcore tasks` lists them).")
    network, own_tokenizer = open_any(model, device, trust_remote_code, plugins)
    other, other_tokenizer = (None, None)
    if reference is not None:
        other, other_tokenizer = open_any(reference, device, trust_remote_code, plugins)
    tokenizer = tokenizer or own_tokenizer or other_tokenizer
    if task is None:
        assert text is not None
        return measure(network, windows_of(text, tokenizer, seqlen, windows), other)
    result = chosen.run(network, tokenizer, options, argument)
    if other is not None:
        before = chosen.run(other, tokenizer, options, argument)
        result = {**result, **{f"reference_{name}": value for name, value in before.items()}}
    return result


def _task(task: str | EvalTask, text: Any, plugins: Plugins) -> tuple[EvalTask, str]:
    """Return the task meant, and what stands behind the colon of its name."""
    if text is not None:
        raise ConfigError("text and task= exclude each other: a task brings its own data.")
    if isinstance(task, EvalTask):
        return task, ""
    name, _, argument = task.partition(":")
    found: EvalTask = plugins.get("task", name)
    return found, argument


def report(model: nn.Module | str | Path) -> dict[str, Any]:
    """Return how a model or folder was quantized: algorithm, parameters, calibration, and per layer name, bits, error, seconds.

    seconds are known only in the process that ran; folders hold no times.
    """
    if isinstance(model, nn.Module):
        info: Info | None = getattr(model, "qcore_info", None)
        if info is None:
            raise ModelError(f"{type(model).__name__} was not made by qcore, so there is no report.")
        return info.report
    path = local_path(model, "model").resolve()
    if path in _LAST_REPORTS:
        return _LAST_REPORTS[path]
    if not (path / PROVENANCE).is_file():
        raise ModelError(f"{model} has no {PROVENANCE}: qcore did not write it. `qcore inspect` shows what is in it.")
    return read_json(path / PROVENANCE)


def inspect(folder: str | Path, plugins: Plugins | None = None) -> dict[str, Any]:
    """Describe a quantized folder: format, sizes, bits per weight, every layer, where it came from.

    Raises CheckpointError when the folder is damaged or not quantized.
    """
    path = local_path(folder, "folder")
    exporter, content = open_content(path, plugins)
    files = content.source or ModelFolder(path)
    weights = sum(layer.in_features * layer.out_features for layer in content.layers.values())
    floats = set(content.tensors)
    quantized_bytes = sum(info.nbytes for name, info in files.tensors.items() if name not in floats)
    records = {record["name"]: record for record in content.provenance.get("layers", [])}
    order = {name: number for number, name in enumerate(records)}  # as they ran, where that is known
    names = sorted(content.layers, key=lambda name: order.get(name, len(order)))
    with disk_errors(f"reading {path}"):
        size = files.size()
    return {
        "format": exporter.name,
        "model_type": files.config.get("model_type"),
        "size": size,
        "size_float16": 2 * (weights + sum(files.tensors[name].count for name in floats)),
        "quantized_weights": weights,
        "bits_per_weight": 8 * quantized_bytes / weights if weights else None,
        "layers": [{**plain_record(content.layers[name]), **records.get(name, {})} for name in names],
        "float_tensors": sorted(floats),
        "provenance": {key: value for key, value in content.provenance.items() if key != "layers"},
        "notes": list(content.notes),
        "manifest": check_manifest(path),
    }
