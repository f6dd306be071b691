"""AutoRound: rounding learned block by block with signed gradients (arXiv 2309.05516, 2512.04746).

For each block the output error |block(X; Q) - Y|^2 is made small, Y being the float block's outputs in the float model and X the
inputs as the quantized blocks before leave them. Learned are V, what is added to each weight (in steps of its grid) before it is
rounded, and per group alpha and beta, what the ends of the grid's range are multiplied with. SignSGD needs of a gradient only its
sign, so the derivatives through rounding and clipping (straight-through) are written out here: autograd ends at the quantized
weight, and a step is one pass over the weights. What differs from the authors' implementation, and the ablation that decided each
default, is in docs/algorithms/autoround.md. Where tuning starts is in autoround_start.py, what depends on the device in autoround_device.py, the
step as one kernel in autoround_triton.py and autoround_native.py.
"""

from __future__ import annotations

import contextlib
import importlib.util
import itertools
import math
import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Annotated, Any, Literal

import torch
from pydantic import Field, model_validator
from torch import Tensor, nn

from qcore import (
    Algorithm,
    BlockContext,
    CalibrationError,
    ModelError,
    Options,
    Override,
    QuantConfig,
    QuantizedWeight,
    grid,
    hookimpl,
)
from qcore.ranks import Ranks

from . import autoround_device as machine
from . import gptq_native
from .autoround_start import Start, covering_start, find_starts, gptq_start
from .gptq import Gptq, Hessian, solver_for

# ---- the parameters of one linear ------------------------------------------------------------------------------------

CACHED = 2**17  # weights that a CPU's caches hold with what is computed from them
Frozen = tuple[Tensor, Tensor, Tensor]  # codes, scales, zeros


class Rounding:
    """What is learned for one linear, weights laid out as [out, groups, g]; a shorter last group is filled up with zeros.

    The quantized weight is s * clip(round(W / s + V), -z, maxq - z). Asymmetric: s = (beta * high - alpha * low) / maxq
    and z = round(-alpha * low / s), low and high being the ends of the start's grid. Symmetric: z is fixed and
    s = beta * (the start's scale), for one end decides the other. s is what float16 stores, z within [1, maxq].

    On a GPU V is kept as float16: its steps near the bounds, 2^-12, are those of the last few iterations in a thousand.
    """

    def __init__(self, start: Start, config: QuantConfig) -> None:
        self.config = config
        self.out, self.columns = start.W.shape
        groups = start.scales.shape[1]
        self.size = self.columns if config.group_size == -1 else config.group_size
        self.padding = groups * self.size - self.columns
        self.W = self._grouped(start.W.float())
        self.V = torch.zeros_like(self.W, dtype=torch.float16 if self.W.is_cuda else torch.float32)
        scales, zeros = (x.float().contiguous()[..., None] for x in (start.scales, start.zeros))  # [out, groups, 1]
        self.low, self.high = -zeros * scales, (config.maxq - zeros) * scales
        self.alpha, self.beta = torch.ones_like(scales), torch.ones_like(scales)
        self.fused = fused_step(self.W.device)

    def _grouped(self, x: Tensor) -> Tensor:
        """[rows, in] -> [rows, groups, g]."""
        return nn.functional.pad(x, (0, self.padding)).view(len(x), -1, self.size)

    def _flat(self, x: Tensor) -> Tensor:
        """[rows, groups, g] -> [rows, in]."""
        return x.reshape(len(x), -1)[:, : self.columns]

    def learned(self) -> tuple[Tensor, Tensor, Tensor]:
        """V, alpha and beta, as they change."""
        return self.V, self.alpha, self.beta

    def grid(self) -> tuple[Tensor, Tensor]:
        """Return s and z, float32 [out, groups, 1]."""
        return ranged_grid(self.low, self.high, self.alpha, self.beta, self.config)

    def weight(self, dtype: torch.dtype) -> Tensor:
        """Return the quantized weight [out, in], computed in float32."""
        weight = self.W.new_empty(self.out, self.columns, dtype=dtype)
        for rows in self._spans():
            self._rows(rows)._write(weight[rows])
        return weight

    def update(self, G: Tensor, lr: float, minmax_lr: float | None, weight: Tensor) -> None:
        """Take one step of SignSGD and write the quantized weight that follows.

        G [out, in] is the gradient of the quantized weight, weight [out, in] its place. minmax_lr None: ranges stay.
        """
        if self.fused is not None and (self.W.is_cuda or G.dtype == weight.dtype == self.V.dtype):
            ranges = self.low, self.high, self.alpha, self.beta
            self.fused(self.W, self.V, ranges, G, weight, lr, minmax_lr, self.config.bits, self.config.sym)
            return
        for rows in self._spans():
            part = self._rows(rows)
            signed_step(self._grouped(G[rows].float()), part, lr, minmax_lr)
            part._write(weight[rows])

    def _write(self, weight: Tensor) -> None:
        """Write the quantized weight [rows, in]."""
        s, z = self.grid()
        levels, _ = rounded(self.W / s, self.V, z, self.config.maxq)
        weight.copy_(self._flat(levels.mul_(s)))

    def _spans(self) -> list[slice]:
        """Cut the rows: on a CPU into pieces that stay in its caches, else not at all."""
        step = self.out if self.W.is_cuda else max(1, CACHED // (self.W.numel() // self.out))
        return [slice(start, start + step) for start in range(0, self.out, step)]

    def _rows(self, rows: slice) -> Rounding:
        """The same parameters, seen through some of the rows."""
        part = object.__new__(Rounding)
        part.config, part.columns = self.config, self.columns
        for name in ("W", "V", "low", "high", "alpha", "beta"):
            setattr(part, name, getattr(self, name)[rows])
        return part

    def freeze(self) -> Frozen:
        """Return what was learned as codes uint8 [out, in], scales float16 and zeros int32 [out, groups]."""
        s, z = self.grid()
        codes = torch.empty(self.out, self.columns, dtype=torch.uint8, device=s.device)
        for rows in self._spans():
            part = self._rows(rows)
            levels, _ = rounded(part.W / s[rows], part.V, z[rows], self.config.maxq)
            codes[rows] = self._flat(levels.add_(z[rows]))
        return codes, s[..., 0].to(torch.float16), z[..., 0].to(torch.int32)

    def canonical(self, frozen: Frozen, bias: Tensor | None) -> QuantizedWeight:
        """Return what `freeze` gave in the canonical form."""
        g_idx = grid.group_index(self.columns, self.config.group_size, frozen[0].device)
        return QuantizedWeight(*frozen, g_idx=g_idx, config=self.config, bias=bias)


def fused_step(device: torch.device) -> Callable[..., None] | None:
    """Return the step that is one kernel, in Triton on a GPU, compiled on a CPU, or None where there is none: torch takes it."""
    interpreted = os.environ.get("TRITON_INTERPRET") == "1"
    if device.type == "cuda" or interpreted:
        if importlib.util.find_spec("triton") is None:
            return None
        from . import autoround_triton  # which imports triton

        return autoround_triton.step
    if gptq_native.why_not(device) is not None:
        return None
    from . import autoround_native

    return autoround_native.step


def step_label(device: torch.device) -> str:
    """Which code takes the steps."""
    fused = fused_step(device)
    kind = "torch" if fused is None else fused.__module__.rpartition("_")[2]
    return gptq_native.label() if kind == "native" else kind


def ranged_grid(low: Tensor, high: Tensor, alpha: Tensor, beta: Tensor, config: QuantConfig) -> tuple[Tensor, Tensor]:
    """Return (s, z) of the range from alpha * low to beta * high (see Rounding)."""
    maxq = low.new_full(
        (), config.maxq
    )  # a GPU multiplies with the inverse of what is no tensor, which the kernels do not
    if config.sym:
        s = stored(beta * (high - low) / maxq)
        return s, torch.full_like(s, grid.symmetric_zero(config.bits))
    s = stored((beta * high - alpha * low) / maxq)
    return s, torch.round(-alpha * low / s).clamp_(1, config.maxq)


def stored(s: Tensor) -> Tensor:
    """Round scales to float16's values, never to zero or beyond its range: `grid.store_scale` without its check, which waits."""
    return torch.copysign(s.abs().clamp_(2.0**-24, 65504.0), s).half().float()


def rounded(ratio: Tensor, V: Tensor, z: Tensor, maxq: int) -> tuple[Tensor, Tensor]:
    """Return the levels clip(round(ratio + V), -z, maxq - z) and the same before clipping; ratio is W / s."""
    free = torch.add(ratio, V).round_()
    return torch.clamp(free, -z, maxq - z), free


def signed_step(G: Tensor, r: Rounding, lr: float, minmax_lr: float | None) -> None:
    """Move V, alpha and beta against the signs of their gradients, given G [out, groups, g], that of the quantized weight.

    Rounding passes gradients straight through, clipping stops them. So d(s * level)/dV = s where nothing was clipped;
    d/ds = level - W / s there, and level where it was; d/dz = -s where it was clipped, and 0 elsewhere.
    """
    s, z = r.grid()
    ratio = r.W / s
    levels, free = rounded(ratio, r.V, z, r.config.maxq)
    passed = torch.eq(levels, free, out=free).mul_(
        G
    )  # as float: comparing into bool costs several times as much on a CPU
    if minmax_lr is not None:
        grad_s = levels.mul_(G).addcmul_(passed, ratio, value=-1).sum(-1, keepdim=True)  # [out, groups, 1]
        if r.config.sym:
            r.beta.sub_(torch.sign(grad_s * (r.high - r.low)) * minmax_lr)
        else:
            step = r.config.maxq
            grad_z = s * (passed - G).sum(-1, keepdim=True)
            through_s = grad_s + grad_z * r.alpha * r.low / (s * s)  # z = -alpha * low / s moves with s as well
            r.alpha.sub_(torch.sign((-through_s / step - grad_z / s) * r.low) * minmax_lr).clamp_(0, 2)
            r.beta.sub_(torch.sign(through_s / step * r.high) * minmax_lr)
        r.beta.clamp_(0, 2)
    r.V.addcmul_(passed.sign_(), s.sign().mul_(-lr)).clamp_(-0.5, 0.5)


# ---- tuning one block ------------------------------------------------------------------------------------------------


@dataclass
class Outcome:
    """How tuning went: the loss on the fixed subset before it and of the parameters kept, and the step they are from."""

    before: float
    after: float
    step: int
    note: str = ""


class Tuning:
    """The loop over one block: SignSGD on random batches, the best parameters on a fixed subset of them kept.

    Nothing in a step makes the host wait for a GPU.
    """

    def __init__(self, block: BlockContext, params: AutoRound.Params) -> None:
        self.block, self.params = block, params
        self.dtype, self.autocast = machine.precision(block, params.amp)
        self.compiled = block.device.type == "cuda" if params.compile is None else params.compile
        self.rough = self._rough_modules() if params.rough_gradients is not False else []

    def rehearse(self) -> None:
        """Compile what a step runs, by a pass whose result nobody wants."""
        weights = {
            name: linear.weight.detach().to(self.dtype).requires_grad_() for name, linear in self.block.linears.items()
        }
        hidden, kwargs, _ = self.block.batch(0)
        with self._surroundings():
            output = self._forward(hidden, kwargs, weights)
            output.backward(torch.zeros_like(output))

    def run(
        self, roundings: Mapping[str, Rounding], inputs: Sequence[Tensor] | None, targets: Sequence[Tensor]
    ) -> tuple[Outcome, dict[str, Frozen]]:
        """Tune; return how it went and the best parameters seen, frozen.

        inputs: hidden states to use in place of the quantized stream's, or None. targets: what the block should give, one per batch.
        """
        self.roundings, self.inputs, self.targets = roundings, inputs, targets
        iters, checks = self.params.iters, self.params.checks
        wanted = min(len(targets), max(1, iters // 100))
        self.subset = [i * len(targets) // wanted for i in range(wanted)]
        self.losses = torch.zeros(iters, device=self.block.device)  # of each step, looked at only at the end
        #: the processes that share each batch of a step; batches may be whole ones, and then each does the same
        self.ranks = Ranks()
        if len(targets[0]) * self.ranks.size != self.params.bs:
            self.ranks = Ranks.alone()
        self.rates, unmatched = rates_by_linear(self.params.layer_lr, list(roundings))
        for each in roundings.values():
            for tensor in (each.W, each.low, each.high):  # one by one: together they would be copied first
                self.ranks.send([tensor], 0)
        #: the quantized weights as they are: what each step's gradients are of
        self.weights = {name: each.weight(self.dtype).requires_grad_() for name, each in roundings.items()}
        with self._surroundings():
            best = before = self.judge()
            if not math.isfinite(before):
                raise ModelError(
                    f"block {self.block.name} gives NaN or Inf with its starting weights; its activations overflow."
                )
            best_step, kept, note = 0, self._frozen(), ""
            self.unit = 64 * math.sqrt(before) or 1.0  # errors in units of their typical size fit every float type
            batches = self._drawn()
            for step in range(iters):
                self._step(step, batches)
                if step + 1 == iters or (checks and (step + 1) % -(-iters // checks) == 0):
                    loss = self.judge()
                    if not math.isfinite(loss):
                        note = self._failed(step + 1, best_step)
                        break
                    if loss < best or not checks:
                        best, best_step, kept = loss, step + 1, self._frozen()
        return Outcome(before, best, best_step, "; ".join(filter(None, (note, unmatched)))), kept

    @contextlib.contextmanager
    def _surroundings(self) -> Iterator[None]:
        """What the block needs around it to be run in steps."""
        widened = machine.full_precision(self.block.module) if self.dtype == torch.float32 else contextlib.nullcontext()
        with widened, machine.rough_gradients(self.rough), machine.reproducible(self.block.device):
            yield

    def _step(self, step: int, batches: Iterator[Batch]) -> None:
        """One step of SignSGD on `gradient_accumulate_steps` batches."""
        params = self.params
        decay = 1 - step / params.iters
        for _ in range(params.gradient_accumulate_steps):
            output, error, _ = self._error(next(batches), self.weights)
            self.losses[step] += mean_square(error)
            output.backward(error.div_(self.unit).to(output.dtype))
        self._add_up()
        for name, rounding in self.roundings.items():
            weight, rate = self.weights[name], decay * self.rates[name]
            if weight.grad is not None:  # else an expert that no token of these batches went to
                minmax_lr = params.minmax_step_size * rate if params.enable_minmax_tuning else None
                rounding.update(weight.grad, params.step_size * rate, minmax_lr, weight.detach())
                weight.grad = None

    def _add_up(self) -> None:
        """Add up gradients over the processes; a weight that none of this one's tokens went to counts as 0."""
        for weight in self.weights.values() if self.ranks.size > 1 else ():
            weight.grad = torch.zeros_like(weight) if weight.grad is None else weight.grad
            self.ranks.sum([weight.grad])

    def _rough_modules(self) -> list[nn.Module]:
        """Return the linears whose gradients are to be products of shorter numbers."""
        device, prefix = self.block.device, f"{self.block.name}."
        if machine.rough_type(device) is None or isinstance(self.autocast, torch.autocast):
            return []  # under autocast weights are cast first, which an op of one's own is left out of
        tokens = self.block.batch(0)[0][..., 0].numel()
        modules = [self.block.module.get_submodule(name.removeprefix(prefix)) for name in self.block.linears]
        return [module for module in modules if machine.can_be_rough(module, self.dtype, tokens, device)]

    def _drawn(self) -> Iterator[Batch]:
        """Yield the batches that the steps work on."""
        numbers = shuffled(len(self.targets), torch.Generator().manual_seed(self.block.seed))
        batches = map(self._batch, itertools.islice(numbers, self.ranks.rank, None, self.ranks.size))
        return machine.beside(batches, self.block.device) if self.block.device.type == "cuda" else batches

    def _batch(self, number: int) -> Batch:
        """Return a batch's hidden states, keyword arguments, mask and target, on the device."""
        device = self.block.device
        hidden, kwargs, mask = self.block.batch(number)
        if self.inputs is not None:
            hidden = self.inputs[number].to(device)
        return hidden, kwargs, None if mask is None else mask.to(device), self.targets[number].to(device)

    def _error(self, batch: Batch, weights: Mapping[str, Tensor]) -> tuple[Tensor, Tensor, float]:
        """Return the block's outputs on a batch, their error, 0 where it does not count, and the share that counts."""
        hidden, kwargs, mask, target = batch
        output = self._forward(hidden, kwargs, weights)
        error = output.detach() - target  # of two halves it is right to the last bit of a half
        if mask is not None:
            error = error.masked_fill(~mask[..., None], 0)  # what padding gives may be NaN
        if self.params.outliers:
            magnitude = error.abs()
            largest = magnitude.flatten().topk(max(1, round(error.numel() * self.params.outliers))).values
            error *= magnitude < largest[-1]
        return output, error, 1.0 if mask is None or torch.is_grad_enabled() else float(mask.float().mean())

    def _forward(self, hidden: Tensor, kwargs: dict[str, Any], weights: Mapping[str, Tensor]) -> Tensor:
        """Return the block's outputs with these weights, in the precision of the tuning."""
        if self.dtype != hidden.dtype:
            hidden, kwargs = machine.cast(hidden, self.dtype), machine.cast(kwargs, self.dtype)
        with self.autocast:
            return self.block.forward(hidden, kwargs, weights, compiled=self.compiled and torch.is_grad_enabled())

    @torch.no_grad()
    def judge(self) -> float:
        """Return the loss of the parameters as they are on the fixed subset."""
        found = [self._error(self._batch(number), self.weights)[1:] for number in self.subset]
        total = sum(mean_square(error) * error.numel() for error, _ in found)
        loss = total / max(1.0, sum(error.numel() * share for error, share in found))
        self.ranks.send([loss], 0)
        return float(loss)

    def _failed(self, step: int, best_step: int) -> str:
        bad = (~torch.isfinite(self.losses[:step])).nonzero()
        first = int(bad[0]) + 1 if len(bad) else step
        return f"the loss became NaN or Inf at step {first}; kept the parameters of step {best_step}"

    def _frozen(self) -> dict[str, Frozen]:
        return {name: rounding.freeze() for name, rounding in self.roundings.items()}


Batch = tuple[Tensor, dict[str, Any], Tensor | None, Tensor]  # hidden states, keyword arguments, mask, target


def rates_by_linear(layer_lr: Mapping[str, float], names: Sequence[str]) -> tuple[dict[str, float], str]:
    """Return what multiplies each linear's lr, of several patterns the last that fits, and a word on those that fit none."""
    rates, unmatched = dict.fromkeys(names, 1.0), []
    for pattern, factor in layer_lr.items():
        fitting = [name for name in names if Override(pattern=pattern).matches(name)]
        rates.update(dict.fromkeys(fitting, factor))
        unmatched += [] if fitting else [pattern]
    return rates, f"layer_lr: {', '.join(map(repr, unmatched))} fits no linear of this block" if unmatched else ""


def mean_square(x: Tensor) -> Tensor:
    """Return the mean square, in float32 without a float32 copy of x."""
    return torch.linalg.vector_norm(x, dtype=torch.float32).square() / x.numel()


def shuffled(count: int, generator: torch.Generator) -> Iterator[int]:
    """Yield 0 to count - 1 in a random order, for ever, each time another one."""
    while True:
        yield from torch.randperm(count, generator=generator).tolist()


# ---- the algorithm ---------------------------------------------------------------------------------------------------

PRESETS = {"light": 50, "default": 200, "best": 1000}  # iterations


class AutoRound(Algorithm):
    """AutoRound, by default from GPTQ's solution on."""

    class Params(Options):
        """The options of AutoRound, under the names of its version 0.1 where it has them.

        preset: "light", "default" or "best": 50, 200 or 1000 iterations unless `iters` says otherwise.
        iters: steps per block. 0 is plain rounding (or, where `start` is given, that start as it is).
        lr: how far a rounding offset moves in the first step, in steps of the grid; falls linearly to 0. None: 1 / iters.
        minmax_lr: the same for the ends of the range, in shares of them. None: lr with start "rtn"; lr / 20 with the others, whose
            grids were searched already.
        enable_minmax_tuning: learn the ends of the range at all.
        use_quant_input: tune on what the quantized blocks before leave, rather than on the float model's hidden states.
        bs: sequences per batch (the run's batch_size, where given, takes its place).
        gradient_accumulate_steps: batches per step.
        amp: compute float32 models in bfloat16 where the device multiplies it natively; off, compute in float32 whatever the model's own type.
        low_gpu_mem_usage: keep hidden states in host memory between uses.
        n_blocks: consecutive blocks tuned together; a shorter last group where that does not divide the depth.
        start: "gptq", GPTQ's codes and grids; "weighted", a scale search weighted by activations; "rtn", the paper's min/max.
        damp_percent, shrink, float_targets: GPTQ's, of start "gptq".
        checks: how often parameters are judged on a fixed subset of the batches, from step 0 on, to keep the best; 0 keeps the last.
        outliers: share of the largest errors left out of the loss.
        layer_lr: factors of lr and minmax_lr for some linears, {"down_proj": 0.5}, by the patterns that overrides take.
        rough_gradients: find the weights' gradients, of which only signs count, by products of shorter numbers: of 8-bit floats on
            GPUs, of bfloat16 on CPUs. None: where the device multiplies them faster.
        compile: torch.compile the block. None: on a GPU.
        """

        preset: Literal["light", "default", "best"] = "default"
        iters: int = Field(200, ge=0, le=10**6)
        lr: float | None = Field(None, gt=0, allow_inf_nan=False)
        minmax_lr: float | None = Field(None, gt=0, allow_inf_nan=False)
        enable_minmax_tuning: bool = True
        use_quant_input: bool = True
        bs: int = Field(8, ge=1)
        gradient_accumulate_steps: int = Field(1, ge=1)
        amp: bool = True
        low_gpu_mem_usage: bool = False
        n_blocks: int = Field(1, ge=1)
        start: Literal["gptq", "weighted", "rtn"] = "gptq"
        damp_percent: float = Field(0.1, gt=0, le=10)
        shrink: float = Field(0.1, ge=0, le=10)
        float_targets: float = Field(0.0, ge=0, le=1)
        checks: int = Field(5, ge=0)
        outliers: float = Field(0.0, ge=0, lt=1)
        layer_lr: dict[str, Annotated[float, Field(gt=0, allow_inf_nan=False)]] = Field(default_factory=dict)
        rough_gradients: bool | None = None
        compile: bool | None = None

        @model_validator(mode="before")
        @classmethod
        def _what_follows(cls, values: Any) -> Any:
            """Fill in what a preset, or no tuning at all, means for the options not given."""
            values = dict(values)
            if isinstance(values.get("preset"), str) and values["preset"] in PRESETS:
                values.setdefault("iters", PRESETS[values["preset"]])
            if values.get("iters") == 0:
                values.setdefault("start", "rtn")
            return values

        @property
        def step_size(self) -> float:
            """lr, decided."""
            return self.lr if self.lr is not None else 1 / max(1, self.iters)

        @property
        def minmax_step_size(self) -> float:
            """minmax_lr, decided."""
            if self.minmax_lr is not None:
                return self.minmax_lr
            return self.step_size if self.start == "rtn" else self.step_size / 20

        @property
        def recipe(self) -> Gptq.Params:
            """GPTQ's options, of the start."""
            return Gptq.Params(damp_percent=self.damp_percent, shrink=self.shrink, float_targets=self.float_targets)

    params: Params
    name = "autoround"
    description = "AutoRound: rounding and ranges learned by signed gradient descent, from GPTQ's solution on"

    @property
    def uses_calibration(self) -> bool:
        """Plain rounding needs none."""
        return self.params.iters > 0 or self.params.start != "rtn"

    @property
    def float_stream(self) -> bool:
        """For the targets."""
        return self.params.iters > 0 or (self.params.start == "gptq" and self.params.float_targets > 0)

    @property
    def batch_size(self) -> int | None:
        """A step works on whole batches, or, in a run of several processes that divide one, each of them on its part."""
        whole, rest = divmod(self.params.bs, self.processes)
        return self.params.bs if rest else whole

    @property
    def blocks_at_once(self) -> int:
        """n_blocks."""
        return self.params.n_blocks

    @property
    def keep_on_host(self) -> bool:
        """low_gpu_mem_usage."""
        return self.params.low_gpu_mem_usage

    def facts(self, device: torch.device) -> dict[str, Any]:
        """GPTQ's solver, where ties fall; which code takes the steps; what float32 models and their gradients are computed in; whether
        equal runs on a GPU give equal bits.
        """
        facts: dict[str, Any] = {"solver_used": solver_for("auto", device)[0]} if self.params.start == "gptq" else {}
        if self.params.iters:
            amp = "bfloat16" if self.params.amp and machine.has_bfloat16(device) else None
            exact = self.params.rough_gradients is False or (amp is not None and device.type == "cpu")
            rough = None if exact else machine.rough_type(device)
            facts |= {"step": step_label(device), "amp": amp, "rough_gradients": rough}
            if device.type == "cuda":
                facts["deterministic"] = machine.can_reproduce(device)
        return facts

    def quantize_block(self, block: BlockContext) -> dict[str, QuantizedWeight]:
        """Find a start for every linear, then tune them all together."""
        tuning = Tuning(block, self.params) if self.params.iters else None
        if tuning and tuning.compiled and block.index == 0:
            rehearse(tuning, block, self.params)
        inputs = None
        if self.params.iters and not self.params.use_quant_input:
            inputs = [hidden.clone() for hidden, _, _ in block.batches(float_stream=True)]
        starts, targets = find_starts(block, self.params.start, self.params.recipe, tuned=tuning is not None)
        roundings = {name: Rounding(starts[name], linear.config) for name, linear in block.linears.items()}
        outcome, frozen = None, {}
        if tuning:
            self._check_batches(targets)
            outcome, frozen = tuning.run(roundings, inputs, targets)
        results = {}
        for name, linear in block.linears.items():
            results[name] = roundings[name].canonical(frozen.get(name) or roundings[name].freeze(), linear.bias)
            W = linear.weight.float()
            block.record(name, error=float((results[name].dequantize() - W).norm() / W.norm().clamp_min(1e-30)))
            notes = [starts[name].note]
            if outcome is None:
                notes.append(f"iters=0: not tuned, the start {self.params.start!r} as it is")
            else:
                block.record(name, loss_before=outcome.before, loss=outcome.after, step=outcome.step)
                notes += [
                    outcome.note,
                    self._without_amp(block),
                    self._without_rough_gradients(block),
                    machine.without_determinism(block.device),
                ]
            if any(notes):
                block.record(name, note="; ".join(note for note in notes if note))
        return results

    def _check_batches(self, targets: Sequence[Tensor]) -> None:
        sequences = sum(len(target) for target in targets)
        uncut = len({target.shape[1] for target in targets}) == len(targets)  # no smaller batch_size was given
        if uncut and sequences < (self.batch_size or 1):
            raise CalibrationError(
                f"a step of autoround takes bs={self.params.bs} sequences, the calibration has {sequences * self.processes}. "
                "Give more samples, or a smaller bs."
            )

    def _without_rough_gradients(self, block: BlockContext) -> str:
        if not self.params.rough_gradients or machine.rough_type(block.device):
            return ""
        return f"rough_gradients: this {block.device.type} multiplies nothing shorter faster, gradients are in the type of the block"

    def _without_amp(self, block: BlockContext) -> str:
        float32 = next(iter(block.linears.values())).weight.dtype == torch.float32
        if (
            "amp" in self.params.model_fields_set
            and self.params.amp
            and float32
            and not machine.has_bfloat16(block.device)
        ):
            return f"amp: {block.device.type} has no native bfloat16, computed in float32"
        return ""


def rehearse(tuning: Tuning, block: BlockContext, params: AutoRound.Params) -> None:
    """Compile and load everything that the first block needs: the block's step here, all else beside it.

    What torch.compile does is mostly Python, what a kernel's compiler does is not, so the two hardly wait for each other. A
    failure of the latter is not looked at here: it comes again where it counts.
    """

    def small_things() -> None:
        with torch.cuda.device(block.device) if block.device.type == "cuda" else contextlib.nullcontext():
            W = torch.linspace(-1, 1, 256 * 512, device=block.device).reshape(256, 512)
            machine.rehearse(tuning.rough, tuning.dtype)
            for config in dict.fromkeys(linear.config for linear in block.linears.values()):
                start = covering_start(W, config)
                if params.start == "gptq":
                    start = gptq_start(W, torch.eye(512, device=W.device), None, config, params.recipe) or start
                rounding = Rounding(start, config)
                weight = rounding.weight(tuning.dtype)
                rounding.update(torch.ones_like(weight), 1e-3, 1e-5 if params.enable_minmax_tuning else None, weight)
                rounding.freeze()

    def plain_pass() -> None:
        """As the float targets are found, the inputs' Hessians on the way; a GPU loads each kernel when it is first used."""
        hidden, kwargs, _ = block.batch(0)
        with torch.no_grad():
            block.forward(hidden, kwargs)
            for columns in {linear.weight.shape[1] for linear in block.linears.values()}:
                Hessian(columns, block.device).add(hidden.new_zeros(hidden[..., 0].numel(), columns))

    with ThreadPoolExecutor(2) as aside:
        aside.submit(plain_pass)  # done with its memory by the time the compiler is loaded
        aside.submit(small_things)
        compiler = importlib.import_module("torch._inductor.async_compile")  # takes seconds
        getattr(compiler, "maybe_warm_pool", lambda: None)()  # so do its processes, to start
        tuning.rehearse()


@hookimpl
def qcore_algorithms() -> list[type[Algorithm]]:
    return [AutoRound]
