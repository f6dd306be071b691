"""The compiled solver against the torch reference, in float32 and float64; what changes its bits and what must not."""

from __future__ import annotations

import logging
import re

import pytest
import torch
from qcore_plugins import cpu_library
from qcore_plugins.algorithms import gptq, gptq_native
from qcore_plugins.csrc import build as recipe

import qcore
from qcore import BackendError, ConfigError, ModelError, QuantConfig, RunError
from qcore.testing import TinyModel, tiny_tokens

needs_compiler = pytest.mark.skipif(recipe.compiler() is None, reason="no C compiler is found ($CC, cc, gcc, clang)")


@pytest.fixture(scope="module")
def library(tmp_path_factory):
    """The library, compiled for these tests."""
    path = tmp_path_factory.mktemp("native") / recipe.LIBRARY
    assert recipe.compile_cpu(path) is None
    return path


@pytest.fixture
def native(library, monkeypatch):
    """The native inner loop, from the library compiled here."""
    monkeypatch.setenv("QCORE_CPU_LIBRARY", str(library))
    cpu_library.load.cache_clear()
    yield gptq_native.quantize_columns
    cpu_library.load.cache_clear()


def problem(rows=70, columns=200, seed=0):
    """W [rows, columns] and H of inputs that move together, some strong and some weak."""
    generator = torch.Generator().manual_seed(seed)
    W = torch.randn(rows, columns, generator=generator) * 0.05
    mixing = torch.eye(columns) + 0.3 * torch.randn(columns, columns, generator=generator) / columns**0.5
    X = torch.randn(4 * columns, columns, generator=generator) @ mixing * torch.logspace(-1, 1, columns)
    return W, X.t() @ X / len(X)


def solve(quantize, W, H, params=None, **config):
    solution = gptq.solve(W, H, QuantConfig(**config), gptq.Gptq.Params(**(params or {})), quantize)
    assert solution is not None
    return solution


def loss(W, H, solution):
    Q = solution.scales[:, solution.g_idx].double() * (solution.codes.double() - solution.zeros[:, solution.g_idx])
    E = W.double() - Q
    return float(((E @ H.double()) * E).sum())


def agree(one, other):
    return float((one.codes == other.codes).float().mean())


def same_bits(one, other):
    return all(torch.equal(getattr(one, part), getattr(other, part)) for part in ("codes", "scales", "zeros", "g_idx"))


ORDERS = [
    {},
    {"order": "none"},
    {"desc_act": True},
    {"desc_act": True, "static_groups": True},
    {"static_groups": True},
    {"block_size": 40},
    {"block_size": 1},
    {"block_size": 500},
]


@needs_compiler
@pytest.mark.parametrize("params", [*ORDERS, *({**each, "grid": "minmax"} for each in ORDERS[:5])], ids=str)
@pytest.mark.parametrize("group_size", [16, 48, 150, -1])
@pytest.mark.parametrize(
    ("bits", "sym"), [(2, True), (2, False), (3, True), (4, True), (4, False), (5, False), (8, True)]
)
def test_it_finds_what_the_reference_finds_but_for_ties(native, bits, sym, group_size, params):
    """Sums in another order: two grids or two codes as good as each other may swap, and a row then goes on from there."""
    W, H = problem()
    config = {"bits": bits, "sym": sym, "group_size": group_size}
    exact = solve(None, W.double(), H.double(), params, **config)
    found = solve(native, W, H, params, **config)
    assert agree(found, exact) > (0.99 if bits < 8 else 0.9)
    assert loss(W, H, found) == pytest.approx(loss(W, H, exact), rel=5e-3 if bits < 8 else 1.5e-2)
    assert torch.equal(found.g_idx, exact.g_idx)
    assert torch.equal(found.scales, found.scales.half().float())


@needs_compiler
@pytest.mark.parametrize(("bits", "fraction"), [(2, 3e-4), (3, 3e-4), (4, 3e-4), (8, 0.05)])
def test_ties_are_as_rare_as_between_float32_and_float64(native, bits, fraction):
    """Over many weights; at 8 bits many grids are within a rounding error of each other, for the reference too."""
    strayed, reference_strayed, losses = [], [], []
    for seed in range(4):
        for group_size, sym in ((16, True), (48, False), (150, True), (-1, False)):
            W, H = problem(seed=seed)
            config = {"bits": bits, "sym": sym, "group_size": group_size}
            exact, reference = solve(None, W.double(), H.double(), **config), solve(None, W, H, **config)
            found = solve(native, W, H, **config)
            strayed.append(1 - agree(found, exact))
            reference_strayed.append(1 - agree(reference, exact))
            losses.append(loss(W, H, found) / loss(W, H, exact))
    assert sum(strayed) / len(strayed) < fraction
    assert sum(strayed) < 2 * sum(reference_strayed) + len(strayed) * fraction / 2
    assert sum(losses) / len(losses) == pytest.approx(1, rel=1e-3)


@needs_compiler
@pytest.mark.parametrize("shape", [(1, 1), (1, 33), (31, 16), (32, 16), (33, 17), (257, 64)])
def test_odd_shapes(native, shape):
    W, H = problem(*shape, seed=3)
    found = solve(native, W, H, bits=4, group_size=16)
    assert agree(found, solve(None, W, H, bits=4, group_size=16)) > 0.999


@needs_compiler
@pytest.mark.parametrize(
    "config", [{"sym": True}, {"sym": False}, {"bits": 2, "sym": False, "group_size": -1}], ids=str
)
def test_neither_threads_nor_the_instruction_set_change_a_bit(native, config):
    W, H = problem(rows=150)
    config = {"bits": 4, "group_size": 48, **config}
    level = cpu_library.load().qc_cpu_level()
    names = [name for name, number in gptq_native.LEVELS.items() if number <= level]
    assert "portable" in names
    at_level = {name: (lambda *a, name=name: gptq_native.quantize_columns(*a, level=name)) for name in names}
    one = solve(native, W, H, **config)
    for quantize in at_level.values():
        assert same_bits(one, solve(quantize, W, H, **config))
    for threads in (2, 3, 7):
        assert same_bits(one, solve(lambda *a, threads=threads: native(*a, threads=threads), W, H, **config))


@needs_compiler
def test_an_instruction_set_that_is_not_here_is_refused(native):
    level = cpu_library.load().qc_cpu_level()
    missing = [name for name, number in gptq_native.LEVELS.items() if number > level]
    if not missing:
        pytest.skip("this CPU has every instruction set there is code for")
    W, H = problem()
    with pytest.raises(BackendError, match="lacks that instruction set"):
        solve(lambda *a: native(*a, level=missing[0]), W, H)


@needs_compiler
@pytest.mark.parametrize("search", ["minmax", "mse"])
@pytest.mark.parametrize("static", [False, True])
@pytest.mark.parametrize("solver", ["torch", "native"])
def test_weights_beyond_any_scale_are_refused_by_both(native, solver, static, search):
    W, H = problem()
    W[40, 100] = 1e9
    with pytest.raises(ModelError, match=r"a scale of more than torch\.float16 holds"):
        solve(native if solver == "native" else None, W, H, {"static_groups": static, "grid": search}, group_size=32)


@needs_compiler
def test_scales_are_rounded_as_torch_rounds_them(native):
    """Over all of float16's range, subnormal scales too: weights of one group that need a scale of that size."""
    exponents = torch.arange(-30, 15).repeat_interleave(40).float()
    W = torch.exp2(exponents + torch.rand(len(exponents), generator=torch.Generator().manual_seed(0)))[:, None] * 7
    H = torch.eye(1)
    config, params = {"bits": 4, "group_size": -1}, {"grid": "minmax"}
    assert torch.equal(solve(native, W, H, params, **config).scales, solve(None, W, H, params, **config).scales)


@needs_compiler
def test_tensors_that_do_not_fit_are_refused_before_the_call(native):
    W, H = problem()
    with pytest.raises(BackendError, match=r"needs W as torch\.float32"):
        solve(native, W.double(), H.double())
    few = torch.zeros(4, 2)
    arguments = (
        few,
        few[:0, :0],
        few[:, 0],
        torch.zeros(4),
        few[:1],
        few[:1],
        few[:0],
        few[:0],
        4,
        QuantConfig(),
        "mse",
    )
    with pytest.raises(BackendError, match=r"needs codes as torch\.uint8 \[0, 2\] on the CPU, rows contiguous"):
        native(*arguments)


@needs_compiler
@pytest.mark.parametrize(
    "change",
    [{"bits": 1}, {"bits": 9}, {"search": 3}, {"rows": 0}, {"columns": -1}, {"extent": 3}, {"group_size": 0}, {"groups": 1},
     {"ldw": 4}, {"ldu": 3}, {"ldg": 4}, {"ldc": 4}, {"lde": 4}, {"W": 0}, {"U": 0}, {"importance": 0}, {"group_of": 0},
     {"scales": 0}, {"zeros": 0}, {"codes": 0}, {"Err": 0}, {"extent": 1 << 40}, {"columns": 1 << 16}, {"extent": 5}],
    ids=str,
)  # fmt: skip
def test_arguments_that_would_reach_beyond_memory_are_refused(native, change):
    names = [name.rstrip("#*") for name in cpu_library.CPU.functions["qc_gptq_block"][1].split()]
    floats, bytes_ = torch.ones(64), torch.zeros(64, dtype=torch.uint8)
    group_of = torch.tensor([0, 0, 1, 1, 1, 1], dtype=torch.int32)
    good = dict.fromkeys(("W", "U", "importance", "scales", "zeros", "Err"), floats.data_ptr())
    good |= {"bits": 4, "sym": 1, "search": 2, "rows": 5, "columns": 4, "extent": 4, "group_size": 2, "groups": 2, "ldw": 5,
             "ldu": 4, "ldg": 5, "ldc": 5, "lde": 5, "group_of": group_of.data_ptr(), "codes": bytes_.data_ptr(),
             "threads": 1, "level": 0}  # fmt: skip
    library = cpu_library.load()
    assert library.qc_gptq_block(*({**good, "threads": 0}[name] for name in names)) == 0
    with pytest.raises(BackendError, match=r"cpu: qc_gptq_block failed with status 1: an argument is out of range"):
        cpu_library.CPU.call(library, "qc_gptq_block", *({**good, **change}[name] for name in names))


# ---- which solver runs ---------------------------------------------------------------------------------------------


@pytest.fixture
def unbuilt(monkeypatch, tmp_path):
    """As if nothing were built."""
    monkeypatch.setattr(type(cpu_library.CPU), "sources", property(lambda self: tmp_path / "none"))
    monkeypatch.setenv("QCORE_CACHE", str(tmp_path))
    monkeypatch.delenv("QCORE_CPU_LIBRARY", raising=False)
    cpu_library.load.cache_clear()
    gptq._say_once.cache_clear()
    yield
    cpu_library.load.cache_clear()


def test_without_a_library_torch_solves_and_says_so_once(unbuilt, caplog):
    with caplog.at_level(logging.WARNING, "qcore"):
        model = qcore.quantize(TinyModel(), "gptq", group_size=32, calibration=tiny_tokens())
    assert qcore.report(model)["facts"] == {"solver_used": "torch"}
    assert [record.message for record in caplog.records if "build-kernels" in record.message] == [
        "gptq: the CPU kernels are not built; run `qcore build-kernels` (needs a C compiler, takes seconds). Until then torch "
        "solves, several times slower."
    ]


def test_a_solver_that_cannot_run_is_refused_when_it_is_asked_for(unbuilt):
    with pytest.raises(ConfigError, match=r"solver='native' cannot run here: the CPU kernels are not built"):
        qcore.quantize(TinyModel(), "gptq", group_size=32, calibration=tiny_tokens(), solver="native")
    with pytest.raises(ConfigError, match="cannot run here: it runs on the CPU, not on cuda"):
        gptq.solver_for("native", torch.device("cuda"))


def test_a_library_that_is_named_and_cannot_be_used_is_an_error(unbuilt, monkeypatch, tmp_path):
    monkeypatch.setenv("QCORE_CPU_LIBRARY", str(tmp_path / "none.so"))
    with pytest.raises(BackendError, match=r"none\.so is not a file"):
        gptq.solver_for("auto", torch.device("cpu"))


@needs_compiler
def test_the_report_names_the_solver(native):
    model = qcore.quantize(TinyModel(), "gptq", group_size=32, calibration=tiny_tokens())
    assert re.fullmatch(r"native [0-9a-f]{16}", qcore.report(model)["facts"]["solver_used"])
    forced = qcore.quantize(TinyModel(), "gptq", group_size=32, calibration=tiny_tokens(), solver="torch")
    assert qcore.report(forced)["facts"]["solver_used"] == "torch"


@needs_compiler
def test_a_run_is_not_resumed_by_another_solver(native, llama_folder, tmp_path, tokens, monkeypatch):
    settings = {"algo": "gptq", "group_size": 32, "calibration": tokens, "output": tmp_path / "out"}
    quantize, done = gptq.Gptq.quantize_block, []

    def stop_after_one(self, block):
        if done:
            raise KeyboardInterrupt
        done.append(block.name)
        return quantize(self, block)

    with monkeypatch.context() as patch:
        patch.setattr(gptq.Gptq, "quantize_block", stop_after_one)
        with pytest.raises(KeyboardInterrupt):
            qcore.quantize(llama_folder, **settings)
    with monkeypatch.context() as patch:
        patch.setattr(gptq_native, "why_not", lambda device: "not built")
        with pytest.raises(RunError, match=r"differs in algorithm: solver_used was 'native \w+', now 'torch'"):
            qcore.quantize(llama_folder, **settings)
    assert qcore.quantize(llama_folder, **settings).exists()
