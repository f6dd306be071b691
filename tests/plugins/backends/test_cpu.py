"""The backend `cpu`: its kernels against float64 for every instruction set of this machine, threads, checks, reasons."""

from __future__ import annotations

import contextlib
import ctypes

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from qcore_plugins import cpu_library
from qcore_plugins.backends import cpu
from qcore_plugins.backends.columns import packed_group_size

import qcore
from qcore import BackendError, MatmulSpec, QuantConfig, QuantizedWeight, grid
from qcore.plugins import installed
from qcore.testing import check_backend, random_weight

BACKEND = cpu.CpuBackend()
LIBRARY = cpu_library.load() if cpu_library.unavailable() is None else None
LEVELS = cpu_library.LEVELS[1 : LIBRARY.qc_matmul_level() + 1] if LIBRARY else ()  # that this machine has
DTYPES = tuple(cpu.DTYPES)

pytestmark = pytest.mark.skipif(cpu_library.unavailable() is not None, reason=f"{cpu_library.unavailable()}")


def spec_for(weight, dtype=torch.float32):
    shape = weight.in_features, weight.out_features
    return MatmulSpec(weight.config, *shape, weight.act_order, dtype, torch.device("cpu"))


def product(weight, x):
    spec = spec_for(weight, x.dtype)
    return BACKEND.matmul(x, BACKEND.prepare(weight, spec), spec)


def through_python(weight, x):
    """The same kernel by the way that serves where torch cannot call it itself."""
    return cpu._matmul(x, *arguments(BACKEND.prepare(weight, spec_for(weight, x.dtype)), weight))


def arguments(buffers, weight):
    """Those of the op after x."""
    config = weight.config
    group_size = packed_group_size(config.group_size, weight.in_features)
    numbers = (config.bits, group_size, not config.sym, weight.in_features, weight.out_features)
    return *(buffers[name] for name in ("packed", "meta", "perm")), *numbers


def any_weight(out, columns, config, order, scale_dtype=torch.float16):
    """A random weight whose columns lie in order, shuffled, or in groups of any size."""
    weight = random_weight(out, columns, config, order == "act-order")
    g_idx = weight.g_idx
    if order == "any":
        g_idx = torch.randint(0, weight.scales.shape[1], (columns,), dtype=torch.int32)
    scales = weight.scales.to(scale_dtype) * 1.001  # float32 scales are then none that float16 holds
    return QuantizedWeight(weight.codes, scales, weight.zeros, g_idx, config)


def assert_within_bound(weight, x, y):
    """The bound that docs/cpu.md states: float32 sums of exact products, then one rounding to the dtype of x; where x is multiplied as
    integers, half of what each group counts in beside them."""
    W, x64 = weight.dequantize(torch.float64), x.double()
    middle = grid.symmetric_zero(weight.bits)
    size = (weight.codes.double() - middle).abs() + grid.spread(weight.zeros.double() - middle, weight.g_idx).abs()
    size *= grid.spread(weight.scales.double(), weight.g_idx).abs()
    expected, terms = x64 @ W.t(), x64.abs() @ size.t()
    info = torch.finfo(x.dtype)
    rounding = 0.0 if x.dtype == torch.float32 else info.eps / 2
    bound = (weight.in_features + 8) * 2.0**-24 * terms + rounding * expected.abs() * 1.001 + info.smallest_normal
    if multiplies_integers(x.dtype):
        largest = torch.stack([(x64.abs() * (weight.g_idx == g)).amax(1) for g in range(weight.scales.shape[1])], 1)
        bound += 2.0**-15 * grid.spread(largest, weight.g_idx) @ size.t()
    assert y.dtype == x.dtype
    assert y.shape == expected.shape
    assert y.is_contiguous()
    assert bool(((y.double() - expected).abs() <= bound).all())


def multiplies_integers(dtype):
    """Whether products of this dtype are those of integers, with the instruction set in use."""
    level = cpu_library.LEVELS[LIBRARY.qc_matmul_level()]
    return (level, dtype) in {
        ("avx512_vnni", torch.float16), ("avx512_vnni", torch.bfloat16), ("avx512_bf16", torch.float16)
    }  # fmt: skip


@contextlib.contextmanager
def limited_to(level):
    cpu_library.limit_level(LIBRARY, level)
    try:
        yield
    finally:
        cpu_library.limit_level(LIBRARY, "best")


@pytest.fixture(params=LEVELS)
def level(request):
    """Each instruction set that this machine has."""
    with limited_to(request.param):
        yield request.param


# ---- the kernels ---------------------------------------------------------------------------------------------------


def test_every_instruction_set_conforms(level):
    assert check_backend(BACKEND, "cpu", DTYPES) == 4 * 4 * 2 * 3


@settings(deadline=None, max_examples=150)
@given(st.data())
def test_any_layer_and_input_is_within_the_stated_bound(data):
    bits = data.draw(st.integers(2, 8), "bits")
    config = QuantConfig(
        bits=bits, group_size=data.draw(st.sampled_from([-1, 16, 32, 48, 64, 100, 128])), sym=data.draw(st.booleans())
    )
    out, columns = data.draw(st.integers(1, 70), "out"), data.draw(st.integers(1, 300), "columns")
    order = data.draw(st.sampled_from(["plain", "act-order", "any"]), "order")
    dtype = data.draw(st.sampled_from(DTYPES), "dtype")
    m = data.draw(st.sampled_from([0, 1, 2, 3, 4, 5, 8, 9, 17, 33]), "m")
    way = data.draw(st.sampled_from(["plain", "strided", "offset", "rows apart", "transposed", "overlapping"]), "x")
    torch.manual_seed(data.draw(st.integers(0, 99)))
    scale_dtype = data.draw(st.sampled_from([torch.float16, torch.float32]))
    weight = any_weight(out, columns, config, order, scale_dtype)
    x = {
        "plain": lambda: torch.randn(m, columns),
        "strided": lambda: torch.randn(m, 2 * columns)[:, ::2],
        "offset": lambda: torch.randn(m * columns + 1)[1:].view(m, columns),
        "rows apart": lambda: torch.randn(m, columns + 3)[:, 1 : columns + 1],
        "transposed": lambda: torch.randn(columns, m).t(),
        "overlapping": lambda: torch.randn(columns).expand(m, columns),
    }[way]().to(dtype)
    with limited_to(data.draw(st.sampled_from(LEVELS), "level")):
        y = product(weight, x)
        assert_within_bound(weight, x, y)
        assert torch.equal(y, through_python(weight, x))


def test_one_output_and_no_tokens(level):
    weight = random_weight(1, 33, QuantConfig(bits=4, group_size=32, sym=False))
    for shape in ((33,), (1, 33), (0, 33), (2, 0, 33), (3, 5, 33)):
        x = torch.randn(shape)
        y = product(weight, x)
        assert y.shape == (*shape[:-1], 1)
        assert torch.allclose(y, x @ weight.dequantize().t(), atol=1e-5)


def test_floating_zeros_are_served(level):
    plain = random_weight(24, 96, QuantConfig(bits=4, group_size=32, sym=False))
    weight = QuantizedWeight(plain.codes, plain.scales, plain.zeros.float() + 0.3, plain.g_idx, plain.config)
    x = torch.randn(5, 96)
    assert_within_bound(weight, x, product(weight, x))


def test_extreme_scales_and_inputs_keep_their_values(level):
    """Subnormal float16 scales, float16 overflow to infinity, and NaN where x has one."""
    plain = random_weight(16, 64, QuantConfig(bits=4, group_size=32))
    weight = QuantizedWeight(plain.codes, torch.full_like(plain.scales, 6e-8), plain.zeros, plain.g_idx, plain.config)
    x = torch.randn(2, 64)
    assert_within_bound(weight, x, product(weight, x))
    large = torch.full((1, 64), 60000.0, dtype=torch.float16)
    assert product(plain, large).isinf().any()
    assert torch.equal(product(plain, large), product(plain, large.float()).half())
    for dtype in DTYPES:
        x = torch.ones(1, 64, dtype=dtype)
        x[0, 3] = torch.nan
        assert product(plain, x).isnan().all()


@pytest.mark.parametrize("group_size", [32, 128, -1])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_halves_of_like_size_lose_nothing(dtype, group_size, level):
    """Down to 2^-8 (bfloat16) or 2^-5 (float16) of a power of two above the largest, they are integers of one unit."""
    plain = random_weight(20, 640, QuantConfig(bits=4, group_size=group_size))
    codes = torch.tensor([9, 7], dtype=torch.uint8).repeat(20, 320)  # 1 and -1
    weight = QuantizedWeight(codes, torch.full_like(plain.scales, 0.25), plain.zeros, plain.g_idx, plain.config)
    smallest = 2.0 ** (-8 if dtype == torch.bfloat16 else -5)
    x = (torch.rand(3, 320) * (0.99 - smallest) + smallest).to(dtype) * torch.tensor([[1.0], [2.0**4], [2.0**9]]).to(
        dtype
    )
    following = (x.view(torch.int16) + 1).view(dtype)  # what is left when each is taken from the next is its last bit
    pairs = torch.stack([x, following], 2).flatten(1)
    expected = pairs.double() @ weight.dequantize(torch.float64).t()
    assert torch.equal(product(weight, pairs), expected.to(dtype))


@pytest.mark.parametrize("bits", [2, 4, 8])
def test_sums_of_integers_do_not_overflow(bits, level):
    """The largest codes times the largest x, all of one sign, over a group longer than any."""
    config = QuantConfig(bits=bits, group_size=-1)
    plain = random_weight(16, 4096, config)
    codes = torch.zeros_like(plain.codes)
    weight = QuantizedWeight(codes, torch.full_like(plain.scales, 2.0**-12), plain.zeros, plain.g_idx, config)
    for dtype in DTYPES:
        x = torch.full((2, 4096), 32640 / 32768, dtype=dtype)
        assert_within_bound(weight, x, product(weight, x))


@pytest.mark.parametrize("wrong", [torch.nan, torch.inf, -torch.inf])
@pytest.mark.parametrize("dtype", DTYPES)
def test_a_token_with_a_number_that_is_none_spoils_no_other(dtype, wrong, level):
    weight = random_weight(16, 640, QuantConfig(bits=4, group_size=128))
    x = torch.randn(9, 640).to(dtype)
    expected = product(weight, x)
    x[4, 300] = wrong
    y = product(weight, x)
    assert not y[4].isfinite().any()
    assert torch.equal(y[[0, 1, 2, 3, 5, 6, 7, 8]], expected[[0, 1, 2, 3, 5, 6, 7, 8]])


@pytest.mark.parametrize("dtype", DTYPES)
def test_buffers_may_lie_anywhere(dtype, level):
    weight = random_weight(40, 96, QuantConfig(bits=3, group_size=32, sym=False), act_order=True)
    spec = spec_for(weight, dtype)
    held = BACKEND.prepare(weight, spec)

    def moved(tensor):
        by = 4 if tensor.dtype == torch.uint8 else 1  # codes are read as words
        return (
            torch.cat([tensor.flatten()[:by], tensor.flatten()])[by:].view(tensor.shape) if tensor.numel() else tensor
        )

    x = torch.randn(3, 96, dtype=dtype)
    expected = BACKEND.matmul(x, held, spec)
    assert torch.equal(BACKEND.matmul(x, {name: moved(each) for name, each in held.items()}, spec), expected)


def test_threads_do_not_change_a_bit(level, monkeypatch):
    weight = random_weight(700, 640, QuantConfig(bits=4, group_size=128, sym=False), act_order=True)
    before = torch.get_num_threads()
    try:
        for m in (1, 2, 3, 70):
            x, found = torch.randn(m, 640), []
            for runtime in (cpu_library.openmp(), None):
                monkeypatch.setattr(cpu_library, "openmp", lambda runtime=runtime: runtime)
                for threads in (1, 2, 3, 7):
                    torch.set_num_threads(threads)
                    found.append(through_python(weight, x))
                    found.append(product(weight, x))
            assert all(torch.equal(each, found[0]) for each in found)
    finally:
        torch.set_num_threads(before)


def test_calls_from_several_threads_at_once_are_independent():
    from concurrent.futures import ThreadPoolExecutor

    weight = random_weight(256, 512, QuantConfig(bits=4, group_size=128))
    spec = spec_for(weight)
    buffers = BACKEND.prepare(weight, spec)
    inputs = [torch.randn(4, 512) for _ in range(24)]
    expected = [BACKEND.matmul(x, buffers, spec) for x in inputs]
    with ThreadPoolExecutor(4) as pool:
        found = list(pool.map(lambda x: BACKEND.matmul(x, buffers, spec), inputs))
    assert all(torch.equal(a, b) for a, b in zip(found, expected, strict=True))


def test_packed_codes_take_the_bits_they_are_stored_in():
    for bits, stored in ((2, 2), (3, 3), (4, 4), (5, 8), (8, 8)):
        weight = random_weight(64, 128, QuantConfig(bits=bits, group_size=64))
        buffers = BACKEND.prepare(weight, spec_for(weight))
        assert buffers["packed"].numel() == 64 * 128 * stored // 8
        assert buffers["meta"].dtype == torch.float16
        assert buffers["meta"].numel() == 64 * 2
        assert not buffers["perm"].numel()


def test_scales_that_float16_cannot_hold_stay_float32():
    weight = any_weight(16, 64, QuantConfig(bits=4, group_size=32), "plain", torch.float32)
    buffers = BACKEND.prepare(weight, spec_for(weight))
    assert buffers["meta"].dtype == torch.float32
    assert torch.equal(buffers["meta"].flatten().sort().values, weight.scales.flatten().sort().values)


def test_an_instruction_set_can_be_asked_for(monkeypatch):
    weight, x = random_weight(40, 320, QuantConfig(bits=4, group_size=64)), torch.randn(1, 320)
    with limited_to("portable"):
        plain = product(weight, x)
    cpu_library.load.cache_clear()
    monkeypatch.setenv("QCORE_CPU_LEVEL", "portable")
    assert cpu_library.load().qc_matmul_level() == 1
    assert torch.equal(product(weight, x), plain)
    for name, words in (("avx1024", "expected one of best, portable, avx2"), ("avx512_bf16", "its best is")):
        monkeypatch.setenv("QCORE_CPU_LEVEL", name)
        cpu_library.load.cache_clear()
        if name in LEVELS:
            assert cpu_library.load().qc_matmul_level() == 5
        else:
            with pytest.raises(BackendError, match=words):
                cpu_library.load()
    monkeypatch.delenv("QCORE_CPU_LEVEL")
    cpu_library.limit_level(LIBRARY, "best")
    cpu_library.load.cache_clear()


# ---- as a torch op -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("act_order", [False, True])
def test_the_op_passes_torchs_own_checks(act_order):
    weight = random_weight(8, 96, QuantConfig(bits=4, group_size=48, sym=False), act_order)
    b = BACKEND.prepare(weight, spec_for(weight))
    x = torch.randn(3, 96, requires_grad=True)
    torch.library.opcheck(torch.ops.qcore.cpu_matmul, (x, b["packed"], b["meta"], b["perm"], 4, 64, True, 96, 8))
    y = torch.ops.qcore.cpu_matmul(x, b["packed"], b["meta"], b["perm"], 4, 64, True, 96, 8)
    (found,) = torch.autograd.grad(y.square().sum(), x)
    W = weight.dequantize()
    torch.testing.assert_close(found, 2 * (x @ W.t()) @ W, rtol=1e-4, atol=1e-4)


def test_it_compiles_whole_with_inductor():
    weight = random_weight(48, 64, QuantConfig(bits=4, group_size=32))
    spec = spec_for(weight)
    buffers = BACKEND.prepare(weight, spec)
    torch.compiler.reset()
    compiled = torch.compile(lambda x: BACKEND.matmul(torch.relu(x), buffers, spec) + 1, fullgraph=True)
    for m in (1, 3, 40):
        x = torch.randn(m, 64)
        assert torch.allclose(compiled(x), torch.relu(x) @ weight.dequantize().t() + 1, atol=1e-5)


@pytest.mark.skipif(cpu_library.register() is not None, reason=f"{cpu_library.register()}")
def test_torch_calls_the_kernel_itself_and_is_refused_what_does_not_fit(monkeypatch):
    weight, op = random_weight(24, 64, QuantConfig(bits=4, group_size=32)), torch.ops.qcore.cpu_matmul
    op_out = torch.ops.qcore.cpu_matmul_out
    b, x = BACKEND.prepare(weight, spec_for(weight)), torch.randn(2, 64)
    monkeypatch.setattr(cpu_library.CPU.__class__, "call", None)  # what the binding in Python goes through
    given = arguments(b, weight)
    y = op(x, *given)
    assert torch.allclose(y, x @ weight.dequantize().t(), atol=1e-5)
    for out in (torch.empty(2, 24), torch.empty(2, 1, 24)[:, 0]):
        assert op_out(x, *given, out=out) is out
        assert torch.equal(out, y)
    for changed, words in (
        ((torch.randn(2, 64).double(), *given), "expected x of float32"),
        ((torch.randn(2, 65), *given), "expected x of shape"),
        ((torch.tensor(1.0), *given), "expected x of shape"),
        ((x, b["packed"][:-1], *given[1:]), "do not have the sizes of such a layer"),
        ((x, b["packed"], b["meta"].double(), *given[2:]), "meta float32 or float16"),
        ((x, torch.empty(2 * b["packed"].numel(), dtype=torch.uint8)[::2], *given[1:]), "must be contiguous"),
        ((x, torch.cat([b["packed"][:1], b["packed"]])[1:], *given[1:]), "argument is out of range"),
        ((x, *given[:3], 9, *given[4:]), "argument is out of range"),
        ((x, *given[:4], 0, *given[5:]), "argument is out of range"),
    ):
        with pytest.raises(RuntimeError, match=words):
            op(*changed)
        with pytest.raises(RuntimeError, match=words):
            op_out(*changed, out=torch.empty(2, 24))
    for out in (torch.empty(2, 25), torch.empty(2, 48)[:, ::2], torch.empty(2, 24).double()):
        with pytest.raises(RuntimeError, match="expected a contiguous out"):
            op_out(x, *given, out=out)


def test_a_layer_says_what_is_wrong_with_its_input():
    weight = random_weight(24, 64, QuantConfig(bits=4, group_size=32))
    for x in (torch.randn(2, 64).double(), torch.randn(2, 65), torch.tensor(1.0)):
        with pytest.raises(BackendError, match=r"expected float32, bfloat16 or float16 \[\.\.\., 64\]"):
            product(weight, x)


def test_in_autocast_x_takes_autocasts_dtype():
    weight = random_weight(24, 64, QuantConfig(bits=4, group_size=32))
    x = torch.randn(2, 64)
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(product(weight, x), product(weight, x.bfloat16()))
        assert product(weight, x).dtype == torch.bfloat16


def test_what_does_not_fit_is_refused_in_words():
    weight = random_weight(24, 64, QuantConfig(bits=4, group_size=32))
    b = BACKEND.prepare(weight, spec_for(weight))
    numbers = (4, 32, False, 64, 24)

    x = torch.randn(2, 64)
    torch.ops.qcore.cpu_matmul(x, b["packed"], b["meta"], b["perm"], *numbers)
    unaligned = torch.cat([b["packed"][:1], b["packed"]])[1:]
    for given_x, changed, words in (
        (torch.randn(2, 64, dtype=torch.float64), {}, r"x is torch\.float64"),
        (torch.randn(2, 65), {}, r"x has the shape \[2, 65\], expected \[\.\.\., 64\]"),
        (torch.tensor(1.0), {}, r"x has the shape \[\]"),
        (x.to("meta"), {}, "x is on meta"),
        (x, {"packed": b["packed"][:-1]}, "packed and meta have"),
        (x, {"meta": b["meta"].double()}, r"meta torch\.float64"),
        (x, {"perm": torch.arange(64)}, r"perm torch\.int64"),
        (x, {"packed": torch.empty(2 * b["packed"].numel(), dtype=torch.uint8)[::2]}, "must be contiguous"),
        (x, {"packed": unaligned}, "argument is out of range"),
    ):
        with pytest.raises(BackendError, match=words):
            cpu._matmul(given_x, *(b | changed).values(), *numbers)


def test_the_library_checks_its_arguments_itself():
    library = cpu_library.load()
    x, y, packed, meta = (
        torch.zeros(4096, dtype=dtype) for dtype in (torch.float32,) * 2 + (torch.uint8, torch.float32)
    )
    perm = torch.arange(64, dtype=torch.int32)
    names = [name.rstrip("#*") for name in cpu_library.CPU.functions["qc_cpu_matmul"][1].split()]
    good = [
        4,
        0,
        2,
        16,
        64,
        64,
        32,
        0,
        0,
        x.data_ptr(),
        64,
        packed.data_ptr(),
        meta.data_ptr(),
        perm.data_ptr(),
        y.data_ptr(),
        16,
        1,
        0,
        None,
    ]
    assert library.qc_cpu_matmul(*good) == 0
    for name, value in (
        ("bits", 1), ("bits", 9), ("dtype", 3), ("dtype", -1), ("m", -1), ("n", 0), ("columns", 0), ("k", 0), ("n", 1 << 40),
        ("group_size", 0), ("group_size", 33), ("group_size", -2), ("x", None), ("packed", None), ("meta", None), ("y", None),
        ("ldx", 63), ("ldy", 15), ("threads", 0), ("level", 9), ("level", -1),
    ):  # fmt: skip
        assert library.qc_cpu_matmul(
            *[value if each == name else old for each, old in zip(names, good, strict=True)]
        ), name
    for name in ("columns", "k"):  # without a perm both are one number
        call = [65 if each == name else None if each == "perm" else old for each, old in zip(names, good, strict=True)]
        assert library.qc_cpu_matmul(*call)
    codes = torch.zeros(16, 64, dtype=torch.uint8)
    for wrong in (-2, 64):
        perm[5] = wrong
        assert library.qc_cpu_pack(4, 16, 64, 64, codes.data_ptr(), perm.data_ptr(), packed.data_ptr(), 1, None)
        assert library.qc_cpu_dequantize(
            4, 0, 16, 64, 64, 32, 0, 0, packed.data_ptr(), meta.data_ptr(), perm.data_ptr(), y.data_ptr(), 64, 1, None
        )
        x.fill_(1)
        assert library.qc_cpu_matmul(*good) == 0, "a column that is nowhere counts as zero"


def test_a_failure_is_told_with_all_the_numbers():
    with pytest.raises(BackendError, match=r"qc_cpu_pack failed with status 1(.|\n)*bits=4, n=0, columns=8"):
        cpu_library.CPU.call(cpu_library.load(), "qc_cpu_pack", 4, 0, 8, 8, None, None, None, 1, None)


# ---- the choice ----------------------------------------------------------------------------------------------------


def test_auto_takes_it_on_a_cpu_and_says_why_not_elsewhere():
    backends = list(installed().usable("backend").values())
    spec = MatmulSpec(QuantConfig(bits=4, group_size=128), 256, 64, True, torch.bfloat16, torch.device("cpu"))
    assert qcore.backend.choose(backends, spec).name == "cpu"
    for changed, reason in (
        ({"device": torch.device("cuda")}, "serves CPUs, not cuda"),
        ({"dtype": torch.float64}, "float32, bfloat16 and float16 activations, not torch.float64"),
        ({"config": QuantConfig(bits=4, group_size=8)}, "pads groups of 8 columns to 32"),
    ):
        other = MatmulSpec(**(vars(spec) | changed))
        assert reason in BACKEND.why_not(other)


def test_without_a_library_the_reference_serves_and_the_reason_is_told(monkeypatch):
    def missing():
        raise BackendError("the CPU kernels are not built; run `qcore build-kernels`")

    monkeypatch.delenv("QCORE_CPU_LIBRARY", raising=False)
    monkeypatch.setattr(cpu_library, "find", missing)
    cpu_library.load.cache_clear()  # as in a process that has not used it
    backends = list(installed().usable("backend").values())
    spec = MatmulSpec(QuantConfig(bits=4, group_size=128), 256, 64, False, torch.float32, torch.device("cpu"))
    assert qcore.backend.choose(backends, spec).name == "torch_reference"
    with pytest.raises(BackendError, match="cpu: the CPU kernels are not built; run `qcore build-kernels`"):
        qcore.backend.choose(backends, spec, "cpu")


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("m", [1, 16, 64])
def test_auto_never_walks_into_torchs_own_int4_product(dtype, m, monkeypatch):
    """It takes tens of milliseconds on float32 and is slower than floats from 16 tokens on; here it does not run at all."""

    def refused(*given):
        raise AssertionError("torch's int4 product was called")

    for name in ("_weight_int4pack_mm_for_cpu", "_convert_weight_to_int4pack_for_cpu"):
        monkeypatch.setattr(torch, name, refused)
    weight = random_weight(64, 128, QuantConfig(bits=4, group_size=32))
    backends = list(installed().usable("backend").values())
    (linear,) = qcore.linear.quant_linears([weight], [lambda: weight], backends, torch.device("cpu"), dtype, tokens=m)
    with torch.profiler.profile() as profile:
        y = linear(torch.randn(m, 128).to(dtype))
    assert y.shape == (m, 64)
    assert not [event.name for event in profile.events() if "int4" in event.name]


# ---- weights that are not quantized --------------------------------------------------------------------------------


@pytest.mark.parametrize("stored", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("dtype", DTYPES)
def test_a_float_weight_is_multiplied_from_the_16_bits_that_hold_it(stored, dtype, level):
    for n, k in ((70, 100), (16, 32), (1, 33)):
        weight = torch.randn(n, k).to(stored).to(dtype)
        product = BACKEND.float_product(weight)
        for m in (1, 2, 3, 4, 9):
            x = torch.randn(m, k).to(dtype)
            expected = x.double() @ weight.double().t()
            terms = x.double().abs() @ weight.double().abs().t()
            rounding = 0.0 if dtype == torch.float32 else torch.finfo(dtype).eps / 2
            y = product(x)
            assert y.dtype == dtype
            assert bool(
                (
                    (y.double() - expected).abs()
                    <= (k + 8) * 2.0**-24 * terms + rounding * expected.abs() * 1.001 + 1e-7
                ).all()
            )


def test_a_float_weight_that_16_bits_do_not_hold_is_left_to_torch():
    assert BACKEND.float_product(torch.randn(16, 32)) is None
    assert BACKEND.float_product(torch.randn(16, 32).double()) is None
    assert BACKEND.float_product(torch.empty(16, 32, device="meta")) is None
    assert BACKEND.float_product(torch.full((16, 32), torch.inf)) is not None


def test_the_threads_are_those_of_torchs_openmp_where_there_is_one():
    found = hasattr(ctypes.CDLL(None), "GOMP_parallel")
    assert bool(cpu_library.openmp()) == found
    assert found or "OpenMP" not in torch.__config__.parallel_info().split("ATen parallel backend:")[1]
