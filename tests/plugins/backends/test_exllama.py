"""The backend `exllama`: reasons, checks and the conversion of codes without a GPU; the kernel on one (marked gpu)."""

from __future__ import annotations

import re
import subprocess

import numpy as np
import pytest
import torch
from qcore_plugins.backends import cuda_library, exllama
from qcore_plugins.backends.exllama import EXLLAMA

from qcore import BackendError, MatmulSpec, QuantConfig, QuantizedWeight
from qcore.plugins import installed
from qcore.testing import check_backend, random_weight

BACKEND = exllama.ExllamaBackend()


def spec_for(weight, device="cuda", dtype=torch.float16):
    shape = weight.in_features, weight.out_features
    return MatmulSpec(weight.config, *shape, weight.act_order, dtype, torch.device(device))


# ---- without a GPU -------------------------------------------------------------------------------------------------


def test_the_functions_are_those_of_the_header(declared_in):
    header = EXLLAMA.sources / "qcore_exllama.h"
    text = header.read_text()
    assert f"#define QC_EXLLAMA_ABI {EXLLAMA.abi}\n" in text
    assert declared_in(header) == {name: parameters for name, (_, parameters) in EXLLAMA.functions.items()}


def test_codes_under_the_kernels_exponents_are_exact():
    """What `place` and __hsub2 of exllama.cu do, in numpy's float16: (code - zero) / 16 for every code and zero, nothing lost."""
    source = (EXLLAMA.sources / "exllama.cu").read_text()
    for mask, exponent, base, shift in ((0x000F, 0x5400, 64.0, 0), (0x00F0, 0x4400, 4.0, 4)):
        assert f"0x{mask:04x}{mask:04x}, 0x{exponent:04x}{exponent:04x}" in source
        assert f"__float2half2_rn({base:.0f}.f + zero[j] / 16.f)" in source
        codes = np.arange(16, dtype=np.uint16)
        values = (codes << shift & mask | exponent).view(np.float16)
        for zero in range(17):
            offset = np.float16(base + zero / 16)
            assert float(offset) == base + zero / 16
            assert np.array_equal((values - offset).astype(np.float64), (codes.astype(np.float64) - zero) / 16)


def test_sums_of_half_precision_stay_finite_up_to_the_stated_input():
    """Eight products of (code - zero) / 16, at most one each, with x up to 8188 stay below float16's 65504."""
    assert 8 * 8188 * (16 / 16) <= 65504
    assert "|x| <= 8188" in (EXLLAMA.sources / "exllama.cu").read_text()


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_without_a_gpu_it_is_unavailable():
    assert BACKEND.unavailable() == "needs an NVIDIA GPU and a torch built for CUDA"


@pytest.fixture
def on_a_gpu(monkeypatch, tmp_path):
    """Make it look as if there were one Hopper GPU, and no library anywhere."""
    monkeypatch.delenv("QCORE_EXLLAMA_LIBRARY", raising=False)
    monkeypatch.setenv("QCORE_CACHE", str(tmp_path))
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda *_: (9, 0))
    exllama.load.cache_clear()
    yield
    exllama.load.cache_clear()


def test_an_unbuilt_library_says_how_to_build_it(on_a_gpu):
    assert "not built; run `qcore build-kernels`" in BACKEND.unavailable()


def test_what_it_does_not_serve_is_named(on_a_gpu):
    good = spec_for(random_weight(16, 64, QuantConfig(bits=4, group_size=32)))
    assert BACKEND.why_not(good) is None
    for changed, reason in (
        ({"device": torch.device("cpu")}, "serves CUDA GPUs, not cpu"),
        ({"dtype": torch.bfloat16}, r"serves float16 activations, not torch.bfloat16"),
        ({"config": QuantConfig(bits=8, group_size=32)}, "serves 4 bits, not 8"),
        ({"config": QuantConfig(bits=4, group_size=8)}, "pads groups of 8 columns to 32"),
        ({"out_features": 1 << 25}, "serves weights up to"),
    ):
        assert reason in BACKEND.why_not(MatmulSpec(**(vars(good) | changed)))


def test_grids_it_cannot_hold_are_refused():
    plain = random_weight(16, 64, QuantConfig(bits=4, group_size=32, sym=False))
    for scales, zeros, reason in (
        (plain.scales.float() * 1e9, plain.zeros, "float16 cannot hold its scales"),
        (plain.scales.float() * 1e-9, plain.zeros, "float16 cannot hold its scales"),
        (plain.scales, plain.zeros.float() + 0.5, "no whole numbers from 0 to 16"),
        (plain.scales, plain.zeros - 20, "no whole numbers from 0 to 16"),
    ):
        weight = QuantizedWeight(plain.codes, scales, zeros, plain.g_idx, plain.config)
        with pytest.raises(BackendError, match=reason):
            exllama._grid(weight)


def test_auto_prefers_tensor_cores():
    offered = installed().offers("backend")
    assert {"cuda", "exllama", "triton"} <= set(offered)
    assert BACKEND.rank < min(installed().get("backend", name).rank for name in ("cuda", "triton"))


@pytest.mark.slow
def test_it_compiles_without_spilling_a_register(tmp_path):
    try:
        nvcc = cuda_library.find_nvcc()
    except BackendError as error:
        pytest.skip(str(error))
    for arch in ("80", "90a"):
        command = [nvcc, *exllama.builds.FLAGS, f"-gencode=arch=compute_{arch},code=sm_{arch}", "-Xptxas", "-v", "-c"]
        done = subprocess.run(
            [*command, str(EXLLAMA.sources / "exllama.cu"), "-o", str(tmp_path / "o.o")], capture_output=True, text=True
        )
        assert done.returncode == 0, done.stderr
        found = re.findall(r"(\d+) bytes stack frame, (\d+) bytes spill stores, (\d+) bytes spill loads", done.stderr)
        assert len(found) == 6
        assert set(found) == {("0", "0", "0")}


# ---- on a GPU ------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def backend():
    if (reason := BACKEND.unavailable()) is not None:
        pytest.fail(f"the backend cannot run here: {reason}")
    return BACKEND


def layer(backend, group_size=128, sym=True, act_order=False, columns=1024, out=1536):
    weight = random_weight(out, columns, QuantConfig(bits=4, group_size=group_size, sym=sym), act_order)
    spec = spec_for(weight)
    buffers = backend.prepare(weight, spec)
    return weight.to("cuda").dequantize(torch.float64), lambda x: backend.matmul(x, buffers, spec)


def assert_within_bound(y, x, W):
    """At most eight roundings to float16 for each product (sums of eight columns in half2), one of the output: whatever cancels."""
    unit = torch.finfo(torch.float16).eps / 2
    exact, most = x.double() @ W.t(), x.double().abs() @ W.abs().t()
    assert ((y.double() - exact).abs() <= unit * (exact.abs() + 8 * most) + 1e-7).all()


@pytest.mark.gpu
def test_it_conforms(backend):
    assert check_backend(backend, "cuda", (torch.float16,)) == 4 * 2


@pytest.mark.gpu
@pytest.mark.parametrize(("columns", "out"), [(33, 1), (100, 129), (1024, 1536), (4096, 11008), (11008, 4096)])
@pytest.mark.parametrize(
    ("group_size", "sym", "act_order"),
    [(128, True, False), (32, False, True), (-1, False, False), (48, True, True), (64, False, False)],
)
def test_any_layer_is_right_and_repeats_bit_for_bit(backend, columns, out, group_size, sym, act_order):
    W, multiply = layer(backend, group_size, sym, act_order, columns, out)
    for m in (0, 1, 2, 3, 4, 5, 8, 9, 16, 31, 32, 33, 70):
        x = torch.randn(m, columns, device="cuda", dtype=torch.float16)
        y, expected = multiply(x), x.double() @ W.t()
        assert y.shape == expected.shape
        assert_within_bound(y, x, W)
        if out > 100:  # with few outputs the sum itself may cancel
            assert (y.double() - expected).norm() <= 1.5e-3 * expected.norm(), m
        for _ in range(3):
            assert torch.equal(multiply(x), y), m


@pytest.mark.gpu
def test_any_input_is_right(backend):
    W, multiply = layer(backend, act_order=True)
    for x in (
        torch.randn(3, 2048, device="cuda").half()[:, ::2],
        torch.randn(3 * 1024 + 1, device="cuda").half()[1:].view(3, 1024),
        torch.randn(3, 1027, device="cuda").half()[:, 1:1025],
        torch.randn(1024, 3, device="cuda").half().t(),
        torch.randn(2, 3, 1024, device="cuda").half(),
        torch.full((2, 1024), 8000.0, device="cuda").half(),
    ):
        expected = x.double() @ W.t()
        fits = expected.abs() < 65000
        assert (multiply(x).double() - expected)[fits].norm() <= 1.5e-3 * expected[fits].norm()


@pytest.mark.gpu
@pytest.mark.parametrize("m", [1, 4, 16])
def test_a_captured_graph_replays_what_eager_gives(backend, m):
    _, multiply = layer(backend, act_order=True, columns=4096, out=4096)
    x = torch.randn(m, 4096, device="cuda", dtype=torch.float16)
    multiply(x)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        y = multiply(x)
    for _ in range(5):
        x.normal_()
        graph.replay()
        assert torch.equal(y, multiply(x))


@pytest.mark.gpu
def test_it_compiles_whole_with_its_gradient(backend):
    W, multiply = layer(backend)
    torch.compiler.reset()
    compiled = torch.compile(lambda x: multiply(torch.nn.functional.silu(x)) * 2, fullgraph=True)
    x = torch.randn(2, 1024, device="cuda", dtype=torch.float16, requires_grad=True)
    y = compiled(x)
    expected = torch.nn.functional.silu(x.detach()).double() @ W.t() * 2
    assert (y.detach().double() - expected).norm() <= 3e-3 * expected.norm()
    (grad,) = torch.autograd.grad(y.float().sum(), x)
    assert torch.isfinite(grad).all()


@pytest.mark.gpu
def test_what_does_not_fit_is_refused_in_words(backend):
    _, multiply = layer(backend)
    for x, words in (
        (torch.randn(2, 1024, device="cuda"), r"x is torch\.float32"),
        (torch.randn(2, 1023, device="cuda").half(), r"expected float16 \[\.\.\., 1024\]"),
        (torch.randn(2, 1024).half(), "x is on cpu"),
    ):
        with pytest.raises(BackendError, match=words):
            multiply(x)
