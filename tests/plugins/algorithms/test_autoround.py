"""What a user of AutoRound may rely on: each option does what it says, whatever the recipe."""

import math
import os
import socket
import subprocess
import sys
from dataclasses import replace

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from qcore_plugins.algorithms import autoround, autoround_device
from qcore_plugins.algorithms.autoround import Rounding
from qcore_plugins.algorithms.autoround_start import Start, covering_start, gptq_start, searched_start
from qcore_plugins.algorithms.gptq import Gptq, solve, solver_for
from torch import nn

import qcore
from qcore import CalibrationError, ConfigError, QuantConfig, blocks, grid
from qcore.plugins import installed
from qcore.testing import TinyBlock, TinyModel, check_algorithm, tiny_tokens, tiny_transformer, with_tiny_adapter

AutoRound = installed().get("algorithm", "autoround")
QUICK = {"iters": 4, "bs": 4}


@pytest.mark.parametrize(
    "params",
    [
        {},
        {"start": "weighted"},
        {"start": "rtn", "use_quant_input": False},
        {"n_blocks": 2, "outliers": 0.01},
        {"float_targets": 0.5, "checks": 0, "enable_minmax_tuning": False},
    ],
)
def test_conforms(params):
    check_algorithm(AutoRound, **QUICK, **params)


def test_conforms_without_tuning():
    check_algorithm(AutoRound, iters=0)


# ---- the step --------------------------------------------------------------------------------------------------------


def autograd_signs(r, G):
    """Signs of the gradients of V, alpha and beta by autograd, through straight-through rounding."""

    def straight(x, value):
        return x + (value - x).detach()

    V, alpha, beta = (x.clone().requires_grad_() for x in r.learned())
    maxq = r.config.maxq
    if r.config.sym:
        s = beta * (r.high - r.low) / maxq
        z = torch.full_like(s, grid.symmetric_zero(r.config.bits))
    else:
        s = (beta * r.high - alpha * r.low) / maxq
        s = straight(s, s.half().float())
        z = straight(-alpha * r.low / s, torch.round(-alpha * r.low / s))
    s = straight(s, s.half().float()) if r.config.sym else s
    t = r.W / s + V
    level = torch.clamp(straight(t, torch.round(t)) + z, 0, maxq) - z
    (G * s * level).sum().backward()
    return [torch.zeros_like(x) if x.grad is None else x.grad for x in (V, alpha, beta)]


@given(
    bits=st.sampled_from([2, 3, 4, 8]),
    sym=st.booleans(),
    group_size=st.sampled_from([8, 12, -1]),
    seed=st.integers(0, 10**6),
)
def test_a_step_goes_against_the_signs_autograd_finds(bits, sym, group_size, seed):
    generator = torch.Generator().manual_seed(seed)
    config = QuantConfig(bits=bits, sym=sym, group_size=group_size)
    W = torch.randn(6, 20, generator=generator)
    r = Rounding(covering_start(W, config), config)
    r.alpha.uniform_(0.7, 1.0, generator=generator)  # so that some weights are clipped
    r.beta.uniform_(0.7, 1.0, generator=generator)
    r.V.uniform_(-0.4, 0.4, generator=generator)
    G = torch.randn(6, 20, generator=generator)
    expected = autograd_signs(r, r._grouped(G))
    before = [x.clone() for x in r.learned()]
    weight = torch.empty(6, 20)
    r.update(G, 0.01, 0.001, weight)
    assert torch.equal(weight, r.weight(torch.float32))
    for old, new, grad, lr in zip(before, r.learned(), expected, (0.01, 0.001, 0.001), strict=True):
        clear = grad.abs() > 1e-4 * grad.abs().max()  # below that, rounding errors decide
        assert torch.allclose((new - old)[clear], -lr * grad.sign()[clear], atol=1e-6)
    padding = r._grouped(torch.ones(6, 20)) == 0
    assert not r.V[padding].any() or torch.equal(r.V[padding], before[0][padding])


def test_offsets_and_ranges_stay_within_their_bounds():
    config = QuantConfig(bits=3, sym=False, group_size=8)
    r = Rounding(covering_start(torch.randn(4, 16), config), config)
    for _ in range(8):
        r.update(torch.randn(4, 16), 0.3, 0.7, torch.empty(4, 16))
    assert float(r.V.abs().max()) <= 0.5
    assert all(float(x.min()) >= 0 and float(x.max()) <= 2 for x in (r.alpha, r.beta))


@given(bits=st.integers(2, 8), sym=st.booleans(), group_size=st.sampled_from([7, 16, 64, -1]), seed=st.integers(0, 999))
def test_what_is_frozen_is_what_was_tuned(bits, sym, group_size, seed):
    generator = torch.Generator().manual_seed(seed)
    config = QuantConfig(bits=bits, sym=sym, group_size=group_size)
    r = Rounding(covering_start(torch.randn(5, 24, generator=generator), config), config)
    for x, spread in zip(r.learned(), (0.5, 0.3, 0.3), strict=True):
        x.add_((torch.rand(x.shape, generator=generator) * 2 - 1) * spread)
    weight = r.canonical(r.freeze(), None)
    assert torch.equal(weight.dequantize(), r.weight(torch.float32))
    assert not weight.act_order
    assert int(weight.zeros.min()) >= 1
    assert int(weight.zeros.max()) <= config.maxq


@pytest.mark.parametrize("sym", [True, False])
def test_the_papers_start_covers_every_weight(sym):
    config = QuantConfig(bits=4, sym=sym, group_size=10)
    W = torch.randn(8, 24, generator=torch.Generator().manual_seed(0))
    W[:, [0, 10, 20]], W[:, [1, 11, 21]] = -1.0, 1.0  # both signs in every group: zero is never clamped
    W[:, 3] = 0.0
    W[0] = 0.0
    off = (Rounding(covering_start(W, config), config).weight(torch.float32) - W).abs()
    step = covering_start(W, config).scales.abs()[:, grid.group_index(24, 10).long()]
    assert bool((off <= step * (1.001 if sym else 0.502)).all())  # a full signed range has one code less on one side


# ---- where tuning starts ---------------------------------------------------------------------------------------------


def frozen(start, config):
    rounding = Rounding(start, config)
    return rounding.canonical(rounding.freeze(), None)


@pytest.mark.parametrize("bits", [2, 3, 4])
@pytest.mark.parametrize("group_size", [16, 40, -1])
def test_gptqs_compensated_weights_round_to_gptqs_codes(bits, group_size):
    X = torch.randn(300, 96) @ torch.randn(96, 96)
    H, W = X.t() @ X / 300, torch.randn(32, 96)
    config, recipe = QuantConfig(bits=bits, group_size=group_size, sym=False), Gptq.Params()
    expected = solve(
        W, H, config, recipe, solver_for(recipe.solver, W.device)[1]
    )  # the start's: grids nearly tie at 3 bits
    start = gptq_start(W, H, None, config, recipe)
    found = frozen(start, config)
    assert float((found.codes.float() != expected.codes).float().mean()) < 1e-3  # a tie may fall either way
    assert torch.equal(found.scales.float(), expected.scales)
    plain = frozen(Start(W, expected.scales, expected.zeros), config)
    assert float((plain.codes != found.codes).float().mean()) > 0.02, "nothing was compensated: the test shows nothing"


def test_without_tuning_the_gptq_start_is_gptq(weights_of):
    settings = {"bits": 3, "group_size": 32, "calibration": tiny_tokens(), "batch_size": 8}
    ours = weights_of(qcore.quantize(TinyModel(), "autoround", iters=0, start="gptq", **settings))
    theirs = weights_of(qcore.quantize(TinyModel(), "gptq", true_sequential=False, **settings))
    for name in ours:
        assert float((ours[name].codes != theirs[name].codes).float().mean()) < 0.002


@pytest.mark.parametrize("change", [{"damp_percent": 1.0}, {"shrink": 1.0}, {"float_targets": 1.0}])
def test_gptqs_options_change_its_start(weights_of, change):
    settings = {"bits": 2, "group_size": 32, "calibration": tiny_tokens(), "iters": 0, "start": "gptq"}
    one, other = (weights_of(qcore.quantize(TinyModel(), "autoround", **settings, **each)) for each in ({}, change))
    assert not one["blocks.1.down"].equal(other["blocks.1.down"])


def test_a_weighted_start_fits_strong_columns_better():
    W, importance = torch.randn(16, 64), torch.ones(64)
    importance[:8] = 1000.0
    config = QuantConfig(bits=2, group_size=64)
    off = [
        (Rounding(start, config).weight(torch.float32) - W)[:, :8].norm()
        for start in (searched_start(W, config, importance), searched_start(W, config, None))
    ]
    assert float(off[0]) < 0.8 * float(off[1])


# ---- a run -----------------------------------------------------------------------------------------------------------


def layers_of(model):
    return {layer["name"]: layer for layer in qcore.report(model)["layers"]}


def quantize(model=None, **settings):
    settings = {"bits": 3, "group_size": 32, "calibration": tiny_tokens(16), "bs": 4, **settings}
    return qcore.quantize(TinyModel() if model is None else model, "autoround", **settings)


@torch.no_grad()
def output_error(model, original=None):
    ids = torch.stack(tiny_tokens(4, seed=9))
    expected = (original or TinyModel())(ids).logits
    return float((model(ids).logits - expected).norm() / expected.norm())


@pytest.mark.parametrize("sym", [True, False])
@pytest.mark.parametrize("bits", [2, 3, 4])
def test_outputs_are_closer_than_gptqs_and_roundings(bits, sym):
    settings = {"bits": bits, "sym": sym, "group_size": 32, "calibration": tiny_tokens(16)}
    ours = output_error(quantize(**settings, iters=100))
    assert ours < 0.9 * output_error(qcore.quantize(TinyModel(), "gptq", **settings))
    assert ours < 0.9 * output_error(qcore.quantize(TinyModel(), "rtn", bits=bits, sym=sym, group_size=32))


@pytest.mark.parametrize("start", ["gptq", "weighted", "rtn"])
def test_tuning_improves_every_start(start):
    for layer in layers_of(quantize(start=start, iters=60)).values():
        assert layer["loss"] < 0.9 * layer["loss_before"]
        assert layer["step"] > 0


def test_conv1d_is_tuned_like_linear():
    def gpt2():
        return tiny_transformer("gpt2", n_embd=32, n_layer=2, n_head=2, vocab_size=50, n_positions=64)

    model = quantize(gpt2(), iters=60, group_size=16)
    assert all(layer["loss"] < 0.9 * layer["loss_before"] for layer in layers_of(model).values())
    rounded = qcore.quantize(gpt2(), "rtn", bits=3, group_size=16)
    assert output_error(model, gpt2()) < 0.8 * output_error(rounded, gpt2())


def test_padding_never_matters(weights_of):
    def tuned(token):
        rows = [
            {"input_ids": [*ids[:20].tolist(), *[token] * 12], "attention_mask": [1] * 20 + [0] * 12}
            for ids in tiny_tokens()
        ]
        return weights_of(quantize(calibration=rows, iters=8))

    one, other = tuned(0), tuned(49)
    assert all(one[name].equal(other[name]) for name in one)


def test_a_linear_that_no_token_reaches_is_rounded_and_said_so():
    model = TinyModel(depth=1)
    model.blocks[0].idle = nn.Linear(64, 64).requires_grad_(False)
    declared = replace(TinyModel.adapter, linear_groups=(*TinyModel.adapter.linear_groups, ("idle",)))
    layers = layers_of(quantize(model, iters=4, adapter=declared))
    notes = {name: layer.get("note", "") for name, layer in layers.items()}
    assert "no calibration token" in notes["blocks.0.idle"]
    assert notes["blocks.0.left"] == ""


# ---- options ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("preset", "iters"), [("light", 50), ("default", 200), ("best", 1000)])
def test_presets_are_numbers_of_iterations(preset, iters):
    assert AutoRound(preset=preset).params.iters == iters
    assert AutoRound(preset=preset, iters=7).params.iters == 7
    assert AutoRound().params.iters == 200


def test_steps_are_the_inverse_of_the_iterations_unless_given():
    assert AutoRound(iters=50).params.step_size == 1 / 50
    assert AutoRound(iters=50, lr=0.1).params.step_size == 0.1
    assert AutoRound(start="rtn", iters=50, lr=0.1).params.minmax_step_size == 0.1
    assert AutoRound(iters=50).params.minmax_step_size == 1 / 50 / 20
    assert AutoRound(iters=50, minmax_lr=0.3).params.minmax_step_size == 0.3


@pytest.fixture
def tunings(monkeypatch):
    """Every Tuning of the runs that follow."""
    made = []
    begin = autoround.Tuning.__init__

    def note(self, *args, **kwargs):
        begin(self, *args, **kwargs)
        made.append(self)

    monkeypatch.setattr(autoround.Tuning, "__init__", note)
    return made


def moved(tuning, number):
    """How far V (0), alpha (1) or beta (2) went at most."""
    return max(float((r.learned()[number] - float(number > 0)).abs().max()) for r in tuning.roundings.values())


def test_lr_is_how_far_offsets_go(tunings):
    for lr in (0.001, 0.01):
        quantize(iters=10, lr=lr, checks=0)
        assert 0.9 * lr * 5.5 < moved(tunings[-1], 0) < 1.01 * lr * 5.5  # 1 + 0.9 + ... + 0.1


def test_minmax_lr_is_how_far_ranges_go(tunings):
    for lr in (0.001, 0.01):
        quantize(iters=10, minmax_lr=lr, checks=0, sym=False)
        for number in (1, 2):
            assert 0.9 * lr * 5.5 < moved(tunings[-1], number) < 1.01 * lr * 5.5


def test_layer_lr_is_how_much_further_some_linears_go(tunings):
    layers = layers_of(
        quantize(iters=10, lr=0.01, minmax_lr=0.001, checks=0, layer_lr={"down": 2.0, "blocks.1.up": 0.5})
    )
    far = {name: float(r.V.abs().max()) / (0.01 * 5.5) for name, r in tunings[-1].roundings.items()}
    assert far.pop("blocks.1.down") == pytest.approx(2, rel=0.1)
    assert far.pop("blocks.1.up") == pytest.approx(0.5, rel=0.1)
    assert list(far.values()) == [pytest.approx(1, rel=0.1)] * 4
    ranges = {name: float((r.beta - 1).abs().max()) for name, r in tunings[-1].roundings.items()}
    assert ranges["blocks.1.down"] == pytest.approx(2 * ranges["blocks.1.gate"], rel=0.1)
    assert "'blocks.1.up' fits no linear of this block" in layers["blocks.0.up"]["note"]
    assert "note" not in layers["blocks.1.up"]


def test_without_minmax_tuning_ranges_stay(tunings):
    quantize(iters=10, enable_minmax_tuning=False, checks=0, sym=False)
    assert moved(tunings[-1], 1) == moved(tunings[-1], 2) == 0 < moved(tunings[-1], 0)


@pytest.mark.parametrize("use_quant_input", [True, False])
def test_use_quant_input_decides_whether_earlier_blocks_matter(weights_of, use_quant_input):
    settings = {"iters": 10, "start": "rtn", "use_quant_input": use_quant_input}
    coarse, fine = (
        weights_of(quantize(overrides=[f"blocks.0.*:bits={bits}"], **settings))["blocks.1.down"] for bits in (2, 8)
    )
    assert coarse.equal(fine) == (not use_quant_input)


@pytest.fixture
def forwards(monkeypatch):
    """(batch size, with gradient) of every forward pass with weights of its own."""
    seen = []
    forward = blocks.Block.forward

    def spy(self, hidden, kwargs, weights=None, **options):
        if weights is not None:
            seen.append((len(hidden), torch.is_grad_enabled()))
        return forward(self, hidden, kwargs, weights, **options)

    monkeypatch.setattr(blocks.Block, "forward", spy)
    return seen


@pytest.mark.parametrize(("bs", "steps"), [(4, 1), (2, 1), (2, 3)])
def test_a_step_takes_batches_of_bs_sequences(forwards, bs, steps):
    quantize(TinyModel(depth=1), iters=6, bs=bs, gradient_accumulate_steps=steps)
    assert {size for size, _ in forwards} == {bs}
    assert sum(with_gradient for _, with_gradient in forwards) == 6 * steps


def test_every_batch_is_used_before_any_is_used_again():
    drawn = autoround.shuffled(5, torch.Generator().manual_seed(0))
    rounds = [[next(drawn) for _ in range(5)] for _ in range(3)]
    assert all(sorted(each) == list(range(5)) for each in rounds)
    assert rounds[0] != rounds[1]


def test_a_device_with_bfloat16_is_used_with_amp(monkeypatch, weights_of):
    settings = {"iters": 10, "checks": 0}
    plain = weights_of(quantize(**settings, amp=False))
    monkeypatch.setattr(autoround_device, "has_bfloat16", lambda device: True)
    model = quantize(**settings)
    assert qcore.report(model)["facts"]["amp"] == "bfloat16"
    assert qcore.report(model)["facts"]["rough_gradients"] is None, "they are bfloat16 as all else is"
    with_amp, without = weights_of(model), weights_of(quantize(**settings, amp=False))
    assert not any(with_amp[name].equal(plain[name]) for name in plain)
    assert all(without[name].equal(plain[name]) for name in plain)


def test_without_amp_a_half_model_is_tuned_in_float32():
    block = TinyBlock(8, 8).half()
    with autoround_device.full_precision(block):
        assert {p.dtype for p in block.parameters()} == {torch.float32}
    assert {p.dtype for p in block.parameters()} == {torch.float16}
    mixed = autoround_device.cast(
        {"a": (torch.ones(1, dtype=torch.float16), torch.ones(1, dtype=torch.int64)), "b": None}, torch.float32
    )
    assert [x.dtype for x in mixed["a"]] == [torch.float32, torch.int64]


def test_low_gpu_mem_usage_keeps_hidden_states_on_the_host(monkeypatch):
    places, keeper = [], qcore.run.keeper
    monkeypatch.setattr(qcore.run, "keeper", lambda device, keep: places.append(keep) or keeper(device, keep))
    quantize(iters=2, low_gpu_mem_usage=True, adapter="tiny", plugins=with_tiny_adapter())
    assert set(places) == {"host"}
    places.clear()
    quantize(iters=2, adapter="tiny", plugins=with_tiny_adapter())
    assert set(places) == {"device"}


def test_blocks_may_be_tuned_together(tunings, weights_of):
    together = quantize(TinyModel(depth=3), n_blocks=2, iters=20)
    assert [len(tuning.roundings) for tuning in tunings] == [12, 6]  # the last alone: 2 does not divide 3
    layers = layers_of(together)
    assert [layers[f"blocks.{i}.down"]["block"] for i in range(3)] == [0, 1, 2]
    assert layers["blocks.0.down"]["loss"] == layers["blocks.1.down"]["loss"] != layers["blocks.2.down"]["loss"]
    alone = weights_of(quantize(TinyModel(depth=3), iters=20))
    assert not weights_of(together)["blocks.0.down"].equal(alone["blocks.0.down"])


def test_outliers_do_not_count(monkeypatch):
    """One hopeless output element: with it left out, the rest of the loss decides."""
    losses = [layers_of(quantize(TinyModel(depth=1), iters=1, outliers=share))["blocks.0.down"]["loss_before"]
              for share in (0.0, 0.01, 0.5)]  # fmt: skip
    assert losses[0] > 1.01 * losses[1] > 2 * losses[2]


def test_the_best_parameters_seen_are_kept(weights_of):
    """Steps so large that the end is worse than the beginning."""
    model = quantize(TinyModel(depth=1), bits=8, iters=10, lr=0.5, checks=10)
    layer = layers_of(model)["blocks.0.down"]
    assert (layer["step"], layer["loss"]) == (0, layer["loss_before"])
    start = weights_of(quantize(TinyModel(depth=1), bits=8, iters=10, lr=1e-6, minmax_lr=1e-9, checks=0))
    assert all(weight.equal(start[name]) for name, weight in weights_of(model).items())
    layer = layers_of(quantize(TinyModel(depth=1), bits=8, iters=10, lr=0.5, checks=0))["blocks.0.down"]
    assert layer["step"] == 10
    assert layer["loss"] > layer["loss_before"]


def test_compile_is_asked_for_by_option(monkeypatch):
    seen = []
    forward = blocks.Block.forward
    monkeypatch.setattr(
        blocks.Block, "forward", lambda self, *args, compiled=False: seen.append(compiled) or forward(self, *args)
    )
    quantize(TinyModel(depth=1), iters=2)
    assert not any(seen)
    quantize(TinyModel(depth=1), iters=2, compile=True, checks=0)
    assert sum(seen) == 3, "the rehearsal and the steps, not what is looked at once"


def test_equal_blocks_are_compiled_once_and_whole(monkeypatch):
    """One graph for the steps of all blocks: none is compiled again for the next block, for a check, or in pieces."""
    graphs = []

    def backend(graph, examples):
        graphs.append(graph)
        return graph

    torch._dynamo.reset()
    compiled = torch.compile(blocks._run, backend=backend, fullgraph=True)
    monkeypatch.setattr(blocks, "_compiled_run", lambda: compiled)
    model = tiny_transformer(
        "llama", hidden_size=32, intermediate_size=48, num_hidden_layers=3, num_attention_heads=2, vocab_size=50
    )
    quantize(model, iters=3, group_size=16, compile=True)
    assert len(graphs) == 1


def test_equal_seeds_give_equal_bytes_and_others_do_not(weights_of):
    state = torch.random.get_rng_state()
    one, again, other = (weights_of(quantize(iters=10, bs=2, seed=seed)) for seed in (0, 0, 1))
    assert torch.equal(torch.random.get_rng_state(), state), "the global generator is nobody's"
    assert all(one[name].equal(again[name]) for name in one)
    assert not all(one[name].equal(other[name]) for name in one)


def test_linears_may_differ_in_bits_group_size_and_symmetry(weights_of):
    found = weights_of(quantize(iters=4, overrides=["left:bits=8,group_size=16", "gate:sym=false", "up:skip"]))
    assert (found["blocks.0.left"].bits, found["blocks.0.left"].group_size) == (8, 16)
    assert not found["blocks.0.gate"].sym
    assert "blocks.0.up" not in found


@pytest.mark.parametrize("after", [0, 1])
@pytest.mark.parametrize("n_blocks", [1, 2])
def test_a_run_killed_after_a_block_resumes_to_the_same_bytes(
    llama_folder, tokens, watched, tmp_path, same_files, after, n_blocks
):
    class Killer:
        @qcore.hookimpl
        def qcore_block_finished(self, index):
            if index == after:
                raise KeyboardInterrupt

    settings = {"group_size": 32, "calibration": tokens, "iters": 6, "bs": 2, "n_blocks": n_blocks}
    whole = qcore.quantize(llama_folder, "autoround", output=tmp_path / "whole", **settings)
    with pytest.raises(KeyboardInterrupt):
        qcore.quantize(llama_folder, "autoround", output=tmp_path / "out", plugins=watched(Killer()), **settings)
    assert not (tmp_path / "out").exists()
    same_files(qcore.quantize(llama_folder, "autoround", output=tmp_path / "out", **settings), whole)


def test_any_iterable_of_batches_is_calibration(weights_of):
    """A DataLoader's batches [b, length], as dicts or tensors, are the sequences in them."""
    rows = tiny_tokens(16)
    loader = torch.utils.data.DataLoader([{"input_ids": row} for row in rows], batch_size=8)
    one, other, plain = (
        weights_of(quantize(iters=4, calibration=data))
        for data in (loader, (torch.stack(rows[i : i + 8]) for i in (0, 8)), rows)
    )
    assert all(one[name].equal(plain[name]) and other[name].equal(plain[name]) for name in plain)


# ---- bad input -------------------------------------------------------------------------------------------------------


def test_no_iterations_is_plain_rounding_and_says_so(weights_of):
    model = qcore.quantize(TinyModel(), "autoround", iters=0, sym=False, group_size=32)  # without any calibration
    assert all("iters=0: not tuned, the start 'rtn'" in layer["note"] for layer in layers_of(model).values())
    plain = weights_of(qcore.quantize(TinyModel(), "rtn", grid="minmax", sym=False, group_size=32))
    assert all(weight.equal(plain[name]) for name, weight in weights_of(model).items())


@pytest.mark.parametrize(
    "options",
    [{"iters": -1}, {"lr": 0}, {"lr": -0.1}, {"minmax_lr": 0}, {"bs": 0}, {"gradient_accumulate_steps": 0}, {"n_blocks": 0},
     {"preset": "fast"}, {"start": "awq"}, {"outliers": 1.0}, {"checks": -1}, {"float_targets": 2},
     {"layer_lr": {"down": 0}}, {"layer_lr": {"down": float("inf")}}, {"lr": float("inf")}, {"minmax_lr": float("inf")},
     {"iters": 10**12}, {"preset": ["light"]}],
)  # fmt: skip
def test_impossible_values_are_refused(options):
    with pytest.raises(ConfigError, match=next(iter(options))):
        AutoRound(**options)


def test_options_of_the_run_are_found_by_their_names():
    with pytest.raises(ConfigError, match="Did you mean 'samples'"):
        quantize(n_samples=4)


def test_fewer_samples_than_a_batch_are_refused():
    with pytest.raises(CalibrationError, match=r"bs=8 sequences, the calibration has 3.*smaller bs"):
        quantize(calibration=tiny_tokens(3), bs=8)


def test_a_batch_size_given_takes_the_place_of_bs(forwards):
    quantize(TinyModel(depth=1), calibration=tiny_tokens(4), bs=8, batch_size=2, iters=2)
    assert {size for size, _ in forwards} == {2}


@pytest.mark.parametrize(
    ("batches", "message"),
    [([torch.zeros(2, 3, 8, dtype=torch.int64)], r"\[2, 3, 8\]"), ([torch.rand(2, 8)], "float32"), ([], "empty")],
)
def test_a_dataloader_of_something_else_is_refused(batches, message):
    with pytest.raises(CalibrationError, match=message):
        quantize(calibration=iter(batches))


def test_a_dataloader_that_runs_dry_part_way_is_used_as_far_as_it_went_and_said_so(weights_of):
    rows = tiny_tokens(16)
    model = quantize(iters=4, calibration=(torch.stack(rows[i : i + 4]) for i in (0, 4)), samples=16)
    assert qcore.report(model)["calibration"]["sources"][0]["short"] == "asked for 16 samples, it ended after 8"
    plain = weights_of(quantize(iters=4, calibration=rows[:8], samples=8))
    assert all(weight.equal(plain[name]) for name, weight in weights_of(model).items())


def test_a_dataloader_that_runs_dry_before_one_step_is_refused():
    with pytest.raises(CalibrationError, match=r"bs=4 sequences, the calibration has 2.*Give more samples"):
        quantize(calibration=(row[None] for row in tiny_tokens(2)), samples=16)


def test_a_dataloader_whose_shapes_change_part_way_is_refused():
    batches = [torch.stack(tiny_tokens(4)), torch.zeros(2, 3, 8, dtype=torch.int64)]
    with pytest.raises(
        CalibrationError, match=r"sequence 4: expected integers \[length\].*found torch.int64 \[2, 3, 8\]"
    ):
        quantize(calibration=iter(batches))


def test_overrides_that_name_no_linear_are_refused():
    with pytest.raises(ConfigError, match=r"blocks\.0\.lefft"):
        quantize(overrides=["blocks.0.lefft:bits=8"])


def spoiled(after):
    """A Tuning._error whose training steps give NaN from the `after`-th on, the evaluation after it too."""
    error, calls = autoround.Tuning._error, []

    def spoil(self, number, weights):
        output, found, counted = error(self, number, weights)
        calls.append(torch.is_grad_enabled())
        if sum(calls) >= after:
            found, output = found * math.nan, output * math.nan
        return output, found, counted

    return spoil


def test_a_loss_of_nan_keeps_the_last_good_parameters_and_says_so(monkeypatch):
    monkeypatch.setattr(autoround.Tuning, "_error", spoiled(after=8))
    model = quantize(TinyModel(depth=1), iters=12, checks=12)
    layer = layers_of(model)["blocks.0.down"]
    assert f"NaN or Inf at step 8; kept the parameters of step {layer['step']}" in layer["note"]
    assert layer["step"] <= 7
    assert math.isfinite(output_error(model, TinyModel(depth=1)))


def test_a_block_that_cannot_start_is_named():
    class Loud(TinyBlock):
        def forward(self, hidden_states, scale=1.0):
            return super().forward(hidden_states, scale) + self.down(self.gate(hidden_states) * 1e38) * 1e38

    model = TinyModel(depth=1)
    model.blocks[0] = Loud(64, 96)
    with pytest.raises(qcore.QcoreError, match=r"blocks\.0"):
        quantize(model.requires_grad_(False), start="rtn", iters=2, adapter="generic")


def test_amp_asked_for_where_there_is_no_bfloat16_is_said_so(monkeypatch):
    monkeypatch.setattr(autoround_device, "has_bfloat16", lambda device: False)
    assert "no native bfloat16, computed in float32" in layers_of(quantize(iters=2, amp=True))["blocks.0.left"]["note"]
    assert "note" not in layers_of(quantize(iters=2))["blocks.0.left"]


# ---- rough gradients -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_gradients_in_8_bits_have_nearly_all_signs_right_and_what_flows_on_is_exact(dtype):
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(64, 32, bias=False), nn.SiLU(), nn.Linear(32, 48, bias=False)).to(dtype)
    x, grad = torch.randn(2, 64, 64).to(dtype).requires_grad_(), torch.randn(2, 64, 48).to(dtype)
    wanted = [x, model[0].weight, model[2].weight]
    exact = torch.autograd.grad(model(x), wanted, grad)
    with autoround_device.rough_gradients([model[0], model[2]]):
        output = model(x)
        rounded = torch.autograd.grad(output, wanted, grad)
    assert [type(each) for each in model] == [nn.Linear, nn.SiLU, nn.Linear]
    assert torch.equal(output, model(x))
    assert torch.equal(rounded[0], exact[0])
    for ours, theirs in zip(rounded[1:], exact[1:], strict=True):
        assert not torch.equal(ours, theirs)
        assert float((ours.sign() != theirs.sign()).float().mean()) < 0.05
        assert float((ours - theirs).float().norm() / theirs.float().norm()) < 0.1


def test_products_with_gradients_in_8_bits_are_compiled_in_one_piece():
    model = nn.Sequential(nn.Linear(32, 48), nn.SiLU(), nn.Linear(48, 16, bias=False)).half()
    x, weights = torch.randn(16, 32).half(), list(model.parameters())
    with autoround_device.rough_gradients([model[0], model[2]]):
        plain = torch.autograd.grad(model(x).sum(), weights)
        compiled = torch.compile(lambda x: model(x).sum(), backend="aot_eager", fullgraph=True)
        assert all(torch.equal(a, b) for a, b in zip(torch.autograd.grad(compiled(x), weights), plain, strict=True))


def test_rough_gradients_of_float32_have_nearly_all_signs_right():
    torch.manual_seed(0)
    layer, x, grad = nn.Linear(64, 32), torch.randn(2, 64, 64, requires_grad=True), torch.randn(2, 64, 32)
    exact = torch.autograd.grad(layer(x), [x, layer.weight], grad)
    with autoround_device.rough_gradients([layer]):
        rough = torch.autograd.grad(layer(x), [x, layer.weight], grad)
    assert torch.equal(rough[0], exact[0])
    assert not torch.equal(rough[1], exact[1])
    assert float((rough[1].sign() != exact[1].sign()).float().mean()) < 0.01


@pytest.mark.parametrize("kind", ["bfloat16", None])
def test_rough_gradients_are_taken_where_the_device_can(monkeypatch, tunings, weights_of, kind):
    monkeypatch.setattr(autoround_device, "rough_type", lambda device: kind)
    found = {}
    for rough in (None, True, False):
        model = quantize(TinyModel(depth=1), iters=10, checks=0, rough_gradients=rough, amp=False)
        assert len(tunings[-1].rough) == (6 if kind and rough is not False else 0)
        assert qcore.report(model)["facts"]["rough_gradients"] == (None if rough is False else kind)
        note = layers_of(model)["blocks.0.left"].get("note", "")
        assert ("multiplies nothing shorter faster" in note) == (kind is None and rough is True)
        found[rough] = weights_of(model)
    assert all(found[None][name].equal(found[True][name]) for name in found[None])
    assert all(found[None][name].equal(found[False][name]) for name in found[None]) == (kind is None)


def test_only_plain_linears_that_fit_have_rough_gradients(monkeypatch):
    cpu, gpu = torch.device("cpu"), torch.device("cuda")
    monkeypatch.setattr(autoround_device, "rough_type", lambda device: "float8")
    half, single = torch.float16, torch.float32
    assert autoround_device.can_be_rough(nn.Linear(32, 48), half, 64, gpu)
    assert autoround_device.can_be_rough(nn.Linear(30, 7), single, 5, cpu)
    for module, dtype, tokens, device in (
        (nn.Linear(32, 48), single, 64, gpu),
        (nn.Linear(30, 48), half, 64, gpu),
        (nn.Linear(32, 48), half, 60, gpu),
        (nn.Linear(32, 48), half, 64, cpu),
        (nn.Conv2d(16, 16, 1), single, 64, cpu),
    ):
        assert not autoround_device.can_be_rough(module, dtype, tokens, device)


# ---- several processes -----------------------------------------------------------------------------------------------

SHARED = """
import sys, torch, torch.distributed as dist
import qcore
from qcore import blocks
from qcore.testing import TinyModel, tiny_tokens

rank, count, port = map(int, sys.argv[1:])
if count > 1:
    dist.init_process_group("gloo", init_method=f"tcp://127.0.0.1:{port}", rank=rank, world_size=count)
seen, forward = [], blocks.Block.forward

def spy(self, hidden, kwargs, weights=None, **options):
    if weights is not None and torch.is_grad_enabled():
        seen.append(len(hidden))
    return forward(self, hidden, kwargs, weights, **options)

blocks.Block.forward = spy
torch.manual_seed(rank)
model = qcore.quantize(TinyModel(depth=2), "autoround", bits=3, group_size=32, calibration=tiny_tokens(16), iters=20, bs=4)
codes = torch.cat([m.weight_source().codes.flatten() for m in model.modules() if isinstance(m, qcore.QuantLinear)])
loss = qcore.report(model)["layers"][-1]
print(len(seen), *sorted(set(seen)), int((codes.long() * torch.arange(len(codes))).sum()), loss["loss"] / loss["loss_before"])
"""


def shared(count: int) -> list[list[str]]:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    started = [
        subprocess.Popen(
            [sys.executable, "-c", SHARED, str(rank), str(count), str(port)],
            env=environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
        )
        for rank in range(count)
    ]  # fmt: skip
    outputs = [process.communicate(timeout=600) for process in started]
    assert all(process.returncode == 0 for process in started), outputs
    return [output.split() for output, _ in outputs]


def test_processes_share_each_batch_and_end_with_the_same_codes():
    ((steps, size, _, alone),) = shared(1)
    assert (steps, size) == ("40", "4")
    first, second = shared(2)
    assert first == second
    assert first[:2] == ["40", "2"]
    assert float(first[3]) == pytest.approx(float(alone), rel=0.15)
