"""The backend `cuda`: what can be shown without a GPU (layout, reasons, errors, building), then on one (marked gpu).

Without a GPU the binding is run against a library imitated in torch, `Imitation`: it checks what is passed, not the kernels.
"""

from __future__ import annotations

import contextlib
import ctypes
import itertools
import re
import shutil
import stat
import subprocess
import types
from pathlib import Path

import pytest
import torch
from click.testing import CliRunner
from hypothesis import given, settings
from hypothesis import strategies as st
from qcore_plugins.backends import cuda
from qcore_plugins.backends import cuda_library as native
from qcore_plugins.backends.cuda_library import CUDA
from qcore_plugins.native import Native, cache_folder

from qcore import BackendError, ConfigError, MatmulSpec, QuantConfig, QuantizedWeight, cli, grid
from qcore.plugins import installed
from qcore.testing import check_backend, random_weight

HALVES = (torch.float16, torch.bfloat16)


def spec_for(weight, dtype=torch.float16, device="cuda"):
    shape = weight.in_features, weight.out_features
    return MatmulSpec(weight.config, *shape, weight.act_order, dtype, torch.device(device))


# ---- layout --------------------------------------------------------------------------------------------------------


@settings(deadline=None, max_examples=150)
@given(st.data())
def test_packed_columns_hold_the_weight_whatever_the_groups(data):
    columns = data.draw(st.integers(1, 300), "columns")
    group_size = data.draw(st.sampled_from([-1, 1, 7, 16, 32, 48, 64, 100, 128]), "group_size")
    groups = grid.num_groups(columns, group_size)
    order = data.draw(st.sampled_from(["plain", "act-order", "any"]), "order")
    generator = torch.Generator().manual_seed(data.draw(st.integers(0, 99)))
    g_idx = grid.group_index(columns, group_size)
    if order == "act-order":
        g_idx = g_idx[torch.randperm(columns, generator=generator)]
    elif order == "any":  # groups of any sizes, some of them empty
        g_idx = torch.randint(0, groups, (columns,), generator=generator, dtype=torch.int32)
    weight = random_weight(3, columns, QuantConfig(bits=4, group_size=group_size, sym=False))
    weight = QuantizedWeight(weight.codes, weight.scales, weight.zeros, g_idx, weight.config)

    perm, width, sources = cuda.layout(g_idx, group_size)
    assert width == -1 or width % 32 == 0
    k = columns if perm is None else len(perm)
    assert perm is None or k % 8 == 0
    assert len(sources) == (1 if width == -1 else -(-k // width))  # as the C ABI counts the groups
    take = torch.arange(columns) if perm is None else perm.long()
    assert sorted(take[take >= 0].tolist()) == list(range(columns))  # each column once
    group = sources[torch.arange(k) // width if width > 0 else torch.zeros(k, dtype=torch.long)]
    found = torch.zeros(3, columns)
    kept = take >= 0
    value = weight.scales.float()[:, group] * (weight.codes[:, take].float() - weight.zeros[:, group])
    found[:, take[kept]] = value[:, kept]
    assert torch.equal(found, weight.dequantize())


@pytest.mark.parametrize("group_size", [-1, 32, 128, 96, 4096, 300])
def test_plain_groups_of_multiples_of_32_need_no_perm(group_size):
    found = cuda.layout(grid.group_index(300, group_size), group_size)
    assert found.perm is None
    assert found.group_size == (group_size if 0 < group_size < 300 else -1)


# ---- reasons -------------------------------------------------------------------------------------------------------


@pytest.fixture
def on_a_gpu(monkeypatch, tmp_path):
    """Make it look as if there were one Hopper GPU; on_a_gpu(capability) for another. No library anywhere."""
    monkeypatch.delenv("QCORE_CUDA_LIBRARY", raising=False)
    monkeypatch.delenv("QCORE_CUDA_ARCH", raising=False)
    monkeypatch.setenv("QCORE_CACHE", str(tmp_path))
    native.load.cache_clear()

    def pretend(*capability):
        monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
        monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
        monkeypatch.setattr(torch.cuda, "get_device_capability", lambda *_: capability)
        monkeypatch.setattr(torch.cuda, "get_device_name", lambda *_: "a GPU")

    pretend(9, 0)
    yield pretend
    native.load.cache_clear()


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_without_a_gpu_it_is_unavailable_and_never_chosen():
    backend = installed().get("backend", "cuda") if "cuda" in installed().offers("backend") else cuda.CudaBackend()
    assert "no CUDA GPU" in backend.unavailable()


def test_an_old_gpu_is_named(on_a_gpu):
    on_a_gpu(7, 5)
    assert cuda.CudaBackend().unavailable() == "needs a GPU of sm_80 or later, a GPU is sm_75"


def test_an_unbuilt_library_says_how_to_build_it(on_a_gpu):
    assert "not built; run `qcore build-kernels`" in cuda.CudaBackend().unavailable()


def test_a_library_for_other_gpus_is_not_taken(on_a_gpu):
    folder = CUDA.cached("80+86").parent
    folder.mkdir(parents=True)
    (folder / CUDA.file).write_bytes(b"")
    reason = cuda.CudaBackend().unavailable()
    assert "built for 80+86, not for sm_90a" in reason
    assert native.find([(8, 9)]) == folder / CUDA.file


def test_a_library_of_other_sources_is_not_taken(on_a_gpu):
    folder = CUDA.cached("90a").parent.with_name(f"cuda-{CUDA.abi}-{'0' * 16}-90a")
    folder.mkdir(parents=True)
    (folder / CUDA.file).write_bytes(b"")
    assert "not built" in cuda.CudaBackend().unavailable()


def test_a_file_that_is_no_library_is_named(on_a_gpu, monkeypatch, tmp_path):
    monkeypatch.setenv("QCORE_CUDA_LIBRARY", str(tmp_path / "none.so"))
    assert "none.so is not a file" in cuda.CudaBackend().unavailable()
    (tmp_path / "none.so").write_text("text")
    assert "cannot be loaded" in cuda.CudaBackend().unavailable()


def test_a_library_of_another_version_is_refused(monkeypatch):
    class Old:
        def __init__(self, path):
            self.qc_abi_version = lambda: 7

        def __getattr__(self, name):
            return lambda *_: 0

    monkeypatch.setattr(ctypes, "CDLL", Old)
    with pytest.raises(BackendError, match=r"version 7 of the kernels' interface, expected 1"):
        CUDA.open(CUDA.sources / CUDA.file)


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        ({"bits": 5}, "2, 3, 4 and 8 bits, not 5"),
        ({"dtype": torch.float32}, "not torch.float32"),
        ({"device": "cpu"}, "not cpu"),
        ({"group_size": 8}, "pads groups of 8 columns to 32"),
        ({"columns": (1 << 20) + 1}, "1048608"),
        ({}, None),
        ({"group_size": 48}, None),
        ({"group_size": -1}, None),
    ],
)
def test_what_it_does_not_serve_has_a_reason(on_a_gpu, change, reason):
    asked = {"bits": 4, "group_size": 32, "dtype": torch.float16, "device": "cuda", "columns": 128, **change}
    config = QuantConfig(bits=asked["bits"], group_size=asked["group_size"])
    spec = MatmulSpec(config, asked["columns"], 64, False, asked["dtype"], torch.device(asked["device"]))
    found = cuda.CudaBackend().why_not(spec)
    assert found is None if reason is None else reason in found


@pytest.mark.parametrize(
    ("part", "value", "message"),
    [
        ("zeros", torch.full((8, 2), 7.5), "floating point"),
        ("zeros", torch.full((8, 2), 17, dtype=torch.int32), "span 17 to 17"),
        ("scales", torch.full((8, 2), 1e6), "cannot hold its scales"),
        ("scales", torch.full((8, 2), 1e-12), "cannot hold its scales"),
    ],
)
def test_a_weight_that_the_kernels_would_get_wrong_is_refused(part, value, message):
    plain = random_weight(8, 64, QuantConfig(bits=4, group_size=32, sym=False))
    parts = {"scales": plain.scales, "zeros": plain.zeros, part: value}
    weight = QuantizedWeight(plain.codes, parts["scales"], parts["zeros"], plain.g_idx, plain.config)
    with pytest.raises(BackendError, match=message):
        cuda.CudaBackend().prepare(weight, spec_for(weight))


# ---- the interface to C --------------------------------------------------------------------------------------------


def test_the_functions_are_those_of_the_header(declared_in):
    declared = declared_in(CUDA.sources / "qcore_cuda.h")
    assert {name: declared[name] for name in CUDA.functions} == {n: p for n, (_, p) in CUDA.functions.items()}
    header = (CUDA.sources / "qcore_cuda.h").read_text()
    assert f"#define QC_CUDA_ABI {CUDA.abi}\n" in header
    assert f"QC_BAD_VARIANT = {native.BAD_VARIANT}," in header
    assert f"QC_AUTO = {cuda.AUTO}," in header
    assert f"QC_WGMMA = {cuda.WGMMA} " in header


def test_a_status_becomes_words_with_all_the_numbers(monkeypatch):
    library = types.SimpleNamespace(
        qc_gather=lambda *_: 9, qc_error_string=lambda status: {9: b"a row stride is shorter than its row"}[status]
    )
    monkeypatch.setattr(native, "load", lambda: library)
    arguments = (0, 5, 64, 64, 4096, 8, None, 8192, 0)
    with pytest.raises(BackendError) as error:
        native.call("qc_gather", *arguments)
    assert "qc_gather failed with status 9: a row stride is shorter than its row." in str(error.value)
    assert "m=5, k_in=64, k_out=64, x=0x1000, ldx=8, perm=null, out=0x2000" in str(error.value)
    assert native.call("qc_gather", *arguments, accept=9) == 9


def test_other_tensors_than_those_prepared_are_refused():
    packed, meta, perm = torch.empty(8192, dtype=torch.uint8), torch.empty(2048).half(), torch.empty(0).int()
    x = torch.empty(2, 128).half()
    good = (packed[: 4 * 2 * 128 * 4], meta[: 4 * 4 * 16], perm)
    numbers = (4, 64, 128, 32, False)
    cuda._check(x, 128, *good, *numbers)
    wrong = {
        "x is torch.float32": (x.float(), 128, *good),
        "layer torch.float32": (x, 128, good[0], good[1].float(), perm),
        r"\[2, 128\], expected \[..., 64\]": (x, 64, *good),
        "elements": (x, 128, packed, meta, perm),
        "expected uint8 and int32": (x, 128, *good[:2], perm.long()),
        "contiguous": (x, 128, packed[::2], *good[1:]),
    }
    for message, tensors in wrong.items():
        with pytest.raises(BackendError, match=message):
            cuda._check(*tensors, *numbers)


def buffers_of_shape_only():
    return {"packed": torch.empty(1, dtype=torch.uint8), "meta": torch.empty(1).half(), "perm": torch.empty(0).int()}


def test_a_tensor_elsewhere_is_named_in_compiled_code_too():
    weight = random_weight(40, 96, QuantConfig(bits=4, group_size=48))
    buffers, spec, x = buffers_of_shape_only(), spec_for(weight), torch.zeros(3, 96).half()
    with pytest.raises(BackendError, match="x is on cpu"):
        cuda.CudaBackend().matmul(x, buffers, spec)
    compiled = torch.compile(
        lambda x: cuda.CudaBackend().matmul(x, buffers, spec) + 1, fullgraph=True, backend="aot_eager"
    )
    with pytest.raises(BackendError, match="x is on cpu"):
        compiled(x)


def test_the_op_and_its_gradient_have_shapes_without_data():
    from torch._subclasses.fake_tensor import FakeTensorMode

    spec = spec_for(random_weight(40, 96, QuantConfig(bits=4, group_size=48)))
    with FakeTensorMode():
        for shape in ((), (3,), (2, 5), (0,)):
            x = torch.empty(*shape, 96, dtype=torch.float16, requires_grad=True)
            y = cuda.CudaBackend().matmul(x, buffers_of_shape_only(), spec)
            assert y.shape == (*shape, 40)
            assert torch.autograd.grad(y, x, torch.empty_like(y))[0].shape == x.shape


class Imitation:
    """qcore_cuda.h in torch on the CPU, for the functions that prepare and matmul use. Refuses what the C side refuses."""

    def __init__(self, hopper):
        self.hopper, self.codes, self.meta, self.calls = hopper, {}, {}, []

    def __call__(self, function, *arguments, accept=0):
        names = [name.rstrip("#*") for name in CUDA.functions[function][1].split()]
        status = getattr(self, function)(**dict(zip(names, arguments, strict=True))) or 0
        self.calls.append((function, dict(zip(names, arguments, strict=True))))
        assert status in (0, accept)
        return status

    @staticmethod
    def at(pointer, dtype, rows, columns, stride):
        count = (rows - 1) * stride + columns
        memory = (ctypes.c_uint8 * (count * dtype.itemsize)).from_address(pointer)
        return torch.frombuffer(memory, dtype=dtype).as_strided((rows, columns), (stride, 1))

    def perm(self, pointer, k):
        return torch.arange(k) if pointer is None else self.at(pointer, torch.int32, 1, k, k)[0].long()

    def qc_repack(self, bits, n, k_codes, k, codes, perm, packed, stream):
        assert perm is not None or k == k_codes
        self.codes[packed] = self.at(codes, torch.uint8, n, k_codes, k_codes)[:, self.perm(perm, k)].clone()

    def qc_pack_meta(self, bits, dtype, n, groups, scales, zeros, meta, stream):
        middle = torch.full((n, groups), 1 << bits - 1)
        values = middle if zeros is None else self.at(zeros, torch.int32, n, groups, groups).clone()
        self.meta[meta] = self.at(scales, HALVES[dtype], n, groups, groups).double(), values, zeros is not None

    def weight(self, bits, n, k, group_size, asym, packed, meta):
        scales, zeros, has_zeros = self.meta[meta]
        assert has_zeros == asym
        assert group_size == -1 or group_size % 32 == 0
        group = torch.arange(k) // (group_size if group_size > 0 else k)
        assert scales.shape == (n, int(group[-1]) + 1)
        return scales[:, group] * (self.codes[packed].double() - zeros[:, group])

    def qc_dequantize(self, bits, dtype, n, k_out, k, group_size, asym, packed, meta, perm, w, ldw, stream):
        to = self.perm(perm, k)
        values = self.weight(bits, n, k, group_size, asym, packed, meta)
        self.at(w, HALVES[dtype], n, k_out, ldw)[:, to[to >= 0]] = values[:, to >= 0].to(HALVES[dtype])

    def qc_gather(self, dtype, m, k_in, k_out, x, ldx, perm, out, stream):
        assert k_out % 8 == 0
        assert ldx >= k_in
        source = torch.nn.functional.pad(self.at(x, HALVES[dtype], m, k_in, ldx), (0, max(k_out - k_in, 1)))
        self.at(out, HALVES[dtype], m, k_out, k_out)[:] = source[:, self.perm(perm, k_out)]

    def qc_matmul(self, bits, dtype, m, n, k, group_size, asym, x, ldx, packed, meta, bias, y, ldy, workspace,
                  workspace_bytes, kernel, flags, stream):  # fmt: skip
        assert x % 16 == ldx % 8 == 0
        assert ldx >= k
        assert ldy >= n
        assert m <= 32 or bits >= 4
        assert m <= 16 or bits < 4 or workspace
        if kernel == cuda.WGMMA and not self.hopper:
            return native.BAD_VARIANT
        W = self.weight(bits, n, k, group_size, asym, packed, meta)
        self.at(y, HALVES[dtype], m, n, ldy)[:] = (self.at(x, HALVES[dtype], m, k, ldx).double() @ W.t()).to(
            HALVES[dtype]
        )


@pytest.fixture(params=[True, False], ids=["wgmma", "no-wgmma"])
def imitation(request, monkeypatch):
    """The ops run on the CPU through an Imitation, which is returned."""
    imitated = Imitation(request.param)
    monkeypatch.setattr(native, "call", imitated)
    monkeypatch.setattr(cuda, "_reserve", lambda device: None)
    monkeypatch.setattr(cuda, "_workspace", lambda device, stream: torch.zeros(16, dtype=torch.uint8))
    monkeypatch.setattr(cuda, "_without_wgmma", set())
    monkeypatch.setattr(torch.cuda, "device", lambda device: contextlib.nullcontext())
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 0)
    monkeypatch.setattr(torch.cuda, "current_stream", lambda: types.SimpleNamespace(cuda_stream=0))
    return imitated


def strided_inputs(columns, dtype):
    """Activations as models give them: plain, transposed, one row, every second row, misaligned, broadcast, many rows."""
    yield torch.randn(5, columns, dtype=dtype)
    yield torch.randn(columns, 3, dtype=dtype).t()
    yield torch.randn(columns, dtype=dtype)
    yield torch.randn(2, 6, columns, dtype=dtype)[:, ::2]
    yield torch.randn(4, columns + 3, dtype=dtype)[:, 1 : columns + 1]
    yield torch.randn(1, columns, dtype=dtype).expand(4, columns)
    yield torch.randn(20, columns, dtype=dtype)
    yield torch.randn(3, 50, columns, dtype=dtype)
    yield torch.randn(0, columns, dtype=dtype)


@pytest.mark.parametrize("bits", [2, 3, 4, 8])
@pytest.mark.parametrize(
    ("group_size", "sym", "act_order"),
    [(32, True, False), (32, False, True), (-1, False, False), (48, True, False), (48, False, True)],
)
def test_the_binding_passes_what_the_kernels_need(imitation, bits, group_size, sym, act_order):
    for columns, dtype in ((96, torch.float16), (100, torch.bfloat16)):
        weight = random_weight(40, columns, QuantConfig(bits=bits, group_size=group_size, sym=sym), act_order)
        spec = spec_for(weight, dtype, "cpu")
        b = cuda.CudaBackend().prepare(weight, spec)
        numbers = (bits, cuda.packed_group_size(group_size, columns), not sym, columns, 40)
        W = weight.dequantize(torch.float64)
        limit = 4 * torch.finfo(dtype).eps
        for x in strided_inputs(columns, dtype):
            expected = x.double() @ W.t()
            y = cuda._matmul(x, b["packed"], b["meta"], b["perm"], *numbers)
            assert y.shape == expected.shape
            assert y.is_contiguous()
            assert (y.double() - expected).norm() <= limit * expected.norm()
            grad = cuda._matmul_transposed(y, b["packed"], b["meta"], b["perm"], *numbers)
            assert grad.shape == x.shape
            expected = y.double() @ W
            assert (grad.double() - expected).norm() <= limit * expected.norm()


# ---- building ------------------------------------------------------------------------------------------------------


@pytest.fixture
def fake_nvcc(tmp_path, monkeypatch):
    """A shell script for nvcc that notes its arguments, one call a line; fake_nvcc(text) puts `text` first in it."""
    home = tmp_path / "cuda"
    (home / "bin").mkdir(parents=True)
    monkeypatch.setenv("CUDA_HOME", str(home))

    def make(text=""):
        script = home / "bin" / "nvcc"
        script.write_text(
            f'#!/bin/sh\necho "$@" >> {tmp_path}/calls\n{text}\nwhile [ "$1" != -o ]; do shift; done; echo built > "$2"\n'
        )
        script.chmod(script.stat().st_mode | stat.S_IXUSR)
        return lambda: (tmp_path / "calls").read_text().splitlines()

    return make


def test_every_source_is_compiled_then_linked_and_kept(on_a_gpu, fake_nvcc, monkeypatch):
    calls, said = fake_nvcc(), []
    monkeypatch.setattr(Native, "open", lambda self, path: None)
    path = native.build(said.append)
    sources = sorted(CUDA.sources.glob("*.cu"))
    assert path.read_text() == "built\n"
    assert len(calls()) == len(sources) + 1
    assert len(said) == len(sources)
    assert all("-DQC_SM90A" in line and "code=sm_90a" in line for line in calls()[:-1])
    assert "-shared" in calls()[-1]
    assert [each.name for each in path.parent.iterdir()] == [CUDA.file]
    assert native.find([(9, 0)]) == path
    assert native.build(said.append) == path
    assert len(calls()) == len(sources) + 1, "built a second time"


def test_the_architectures_can_be_named(on_a_gpu, fake_nvcc, monkeypatch):
    calls = fake_nvcc()
    monkeypatch.setattr(Native, "open", lambda self, path: None)
    monkeypatch.setenv("QCORE_CUDA_ARCH", "sm_86, 80")
    assert native.build(print).parent.name.endswith("-80+86")
    assert all("QC_SM90A" not in line and "code=sm_80" in line and "code=sm_86" in line for line in calls())
    for wrong in ("75", "hopper", "90a,x"):
        monkeypatch.setenv("QCORE_CUDA_ARCH", wrong)
        with pytest.raises(ConfigError, match="no architecture from sm_80"):
            native.build(print)


@pytest.mark.skipif(not shutil.which("nvcc"), reason="needs nvcc")
@pytest.mark.parametrize("bits", [4, 8])
def test_no_wgmma_waits_for_the_one_before(bits, tmp_path):
    """ptxas says so when it must; the code is right then, and slower by a fifth."""
    done = subprocess.run(
        ["nvcc", *native.FLAGS, "-DQC_SM90A", "-gencode=arch=compute_90a,code=sm_90a", "-Xptxas", "-v", "-c",
         CUDA.sources / f"hopper_{bits}.cu", "-o", tmp_path / "o"], capture_output=True, text=True,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert done.stderr.count("Compiling entry function") == 2 * len(wgmma_shapes())
    assert "serialized" not in done.stderr


def test_a_missing_nvcc_says_where_to_get_it(on_a_gpu, monkeypatch):
    monkeypatch.setattr(native.shutil, "which", lambda name: None)
    with pytest.raises(BackendError, match="Install the CUDA toolkit"):
        native.build(print)


def test_without_a_gpu_the_architecture_must_be_named(on_a_gpu):
    on_a_gpu(7, 0)
    with pytest.raises(BackendError, match="QCORE_CUDA_ARCH=80,90a"):
        native.build(print)


def test_a_failed_build_shows_what_nvcc_said_and_leaves_nothing(on_a_gpu, fake_nvcc):
    fake_nvcc("echo 'decode.cuh(7): error: no such thing' >&2; exit 2")
    with pytest.raises(BackendError, match="no such thing"):
        native.build(print)
    assert not [path for path in cache_folder().rglob("*") if path.is_file()]
    assert "not built" in cuda.CudaBackend().unavailable()


def test_the_command_builds_what_has_native_code(on_a_gpu, fake_nvcc, monkeypatch):
    from qcore import plugins

    offered = {"cuda": cuda.CudaBackend(), "torch_reference": installed().get("backend", "torch_reference")}
    known = types.SimpleNamespace(
        usable=lambda kind: offered if kind == "backend" else {}, get=lambda kind, name: offered[name]
    )
    monkeypatch.setattr(plugins, "installed", lambda: known)
    monkeypatch.setattr(Native, "open", lambda self, path: None)
    fake_nvcc()
    done = CliRunner().invoke(cli.cli, ["build-kernels"])
    assert done.exit_code == 0
    assert re.fullmatch(r"cuda: \S+/libqcore_cuda\.so\n", done.stdout)
    assert "compiled api.cu" in done.stderr
    refused = CliRunner().invoke(cli.cli, ["build-kernels", "torch_reference"])
    assert isinstance(refused.exception, BackendError)
    assert "no native code" in str(refused.exception)


# ---- on a GPU ------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def backend():
    found = cuda.CudaBackend()
    if (reason := found.unavailable()) is not None:
        pytest.fail(f"the backend cannot run here: {reason}")
    return found


def layer(backend, bits=4, group_size=128, columns=1024, out=1536, dtype=torch.float16, act_order=False):
    weight = random_weight(out, columns, QuantConfig(bits=bits, group_size=group_size), act_order)
    spec = spec_for(weight, dtype)
    buffers = backend.prepare(weight, spec)
    return weight.to("cuda").dequantize(torch.float64), lambda x: backend.matmul(x, buffers, spec)


@pytest.mark.gpu
def test_it_conforms(backend):
    assert check_backend(backend, "cuda", HALVES) == 4 * 4 * 2 * 2


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", HALVES)
@pytest.mark.parametrize("bits", [2, 3, 4, 8])
@pytest.mark.parametrize("act_order", [False, True])
def test_any_number_of_tokens_is_right_and_repeats_bit_for_bit(backend, bits, dtype, act_order):
    W, multiply = layer(backend, bits, dtype=dtype, act_order=act_order)
    for m in (1, 8, 9, 16, 17, 32, 33, 64, 128, 129, 300):
        x = torch.randn(m, 1024, device="cuda", dtype=dtype)
        y, expected = multiply(x), x.double() @ W.t()
        assert (y.double() - expected).norm() <= (1e-3 if dtype == torch.float16 else 8e-3) * expected.norm(), m
        for _ in range(3):
            assert torch.equal(multiply(x), y), m


TUNED = (
    "bits dtype m# n# k# group_size# asym x* ldx# packed* meta* bias* y* ldy# workspace* workspace_bytes# kernel flags"
    " row_tiles warps stream*"
)


def wgmma_shapes():
    """Warpgroups, row blocks and tokens of the kernels that are compiled for Hopper."""
    listed = (CUDA.sources / "hopper_instances.cuh").read_text()
    return [tuple(map(int, found)) for found in re.findall(r"X\((\d+), (\d+), (\d+), \d+\)", listed)]


def test_the_launcher_for_tests_is_that_of_the_header(declared_in):
    assert declared_in(CUDA.sources / "qcore_cuda.h")["qc_matmul_tuned"] == TUNED
    assert len(wgmma_shapes()) == 7


@pytest.mark.gpu
@pytest.mark.parametrize("sym", [True, False])
@pytest.mark.parametrize("dtype", HALVES)
@pytest.mark.parametrize("bits", [4, 8])
@pytest.mark.parametrize("shape", wgmma_shapes())
def test_every_wgmma_kernel_is_right_however_its_tiles_are_shared(backend, shape, bits, dtype, sym):
    if torch.cuda.get_device_capability() != (9, 0):
        pytest.skip("needs a Hopper GPU")
    functions = {**CUDA.functions, "qc_matmul_tuned": (ctypes.c_int, TUNED)}
    tuned = Native(name="cuda", abi=CUDA.abi, flags=CUDA.flags, functions=functions)
    library = tuned.open(Path(native.load()._name))
    workspace = torch.zeros(native.load().qc_workspace_bytes(), dtype=torch.uint8, device="cuda")
    stream = torch.cuda.current_stream().cuda_stream
    warpgroups, row_blocks, tokens = shape
    for (out, columns), group_size in itertools.product([(1000, 1096), (40, 96), (4096, 1024)], [32, 64, 128, -1]):
        weight = random_weight(out, columns, QuantConfig(bits=bits, group_size=group_size, sym=sym))
        made = backend.prepare(weight, spec_for(weight, dtype))
        W = weight.to("cuda").dequantize(torch.float64)
        for m, split in itertools.product([1, tokens - 1, tokens + 5], range(6)):
            x = torch.randn(m, columns, device="cuda", dtype=dtype)
            variant = warpgroups * 100000 + row_blocks * 10000 + tokens * 10 + split
            results = []
            for _ in range(2):
                y = torch.full((m + 1, out + 8), 9.0, device="cuda", dtype=dtype)
                status = tuned.call(
                    library, "qc_matmul_tuned", bits, cuda.DTYPES[dtype], m, out, columns, group_size, not sym, x.data_ptr(), columns,
                    made["packed"].data_ptr(), made["meta"].data_ptr(), None, y.data_ptr(), out + 8, workspace.data_ptr(),
                    workspace.numel(), cuda.WGMMA, 0, variant, 0, stream, accept=native.BAD_VARIANT,
                )  # fmt: skip
                results.append(y)
            if status:  # fewer stages than blocks to share them
                assert split > -(-columns // (64 if tokens > 128 else 128)), (m, split)
                continue
            where = (out, columns, group_size, m, split)
            assert torch.equal(*results), where
            y, expected = results[0][:m, :out], x.double() @ W.t()
            assert (y.double() - expected).norm() <= (1e-3 if dtype == torch.float16 else 8e-3) * expected.norm(), where
            assert (results[0][m:] == 9).all(), where
            assert (results[0][:, out:] == 9).all(), where


@pytest.mark.gpu
@pytest.mark.parametrize("bits", [3, 4])
@pytest.mark.parametrize("m", [1, 16, 24, 64, 300])
def test_a_captured_graph_replays_what_eager_gives(backend, bits, m):
    multiplies = [layer(backend, bits, act_order=act_order)[1] for act_order in (False, True)]
    x = torch.randn(m, 1024, device="cuda", dtype=torch.float16)
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        for multiply in multiplies:
            multiply(x)
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        outputs = [multiply(x) for multiply in multiplies]
    for _ in range(3):
        x.normal_()
        graph.replay()
        for multiply, y in zip(multiplies, outputs, strict=True):
            assert torch.equal(y, multiply(x))


@pytest.mark.gpu
def test_streams_without_a_spare_workspace_capture_too(backend):
    _, multiply = layer(backend)
    x = torch.randn(64, 1024, device="cuda", dtype=torch.float16)
    expected = multiply(x)
    for _ in range(cuda.SPARES + 2):
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph, stream=torch.cuda.Stream()):
            y = multiply(x)
        graph.replay()
        graph.replay()
        assert torch.equal(y, expected)


@pytest.mark.gpu
def test_two_streams_at_once_do_not_disturb_each_other(backend):
    _, multiply = layer(backend)
    x = torch.randn(64, 1024, device="cuda", dtype=torch.float16)
    expected, streams, found = multiply(x), [torch.cuda.Stream() for _ in range(3)], []
    torch.cuda.synchronize()
    for _ in range(20):
        for stream in streams:
            with torch.cuda.stream(stream):
                found.append(multiply(x))
    torch.cuda.synchronize()
    assert all(torch.equal(y, expected) for y in found)


@pytest.mark.gpu
@pytest.mark.parametrize("mode", ["default", "reduce-overhead"])
def test_it_compiles_whole_with_its_gradient(backend, mode):
    W, multiply = layer(backend)
    torch.compiler.reset()
    compiled = torch.compile(lambda x: multiply(torch.nn.functional.silu(x)) * 2, fullgraph=True, mode=mode)
    for m in (1, 64):
        x = torch.randn(m, 1024, device="cuda", dtype=torch.float16, requires_grad=True)
        for _ in range(4):  # reduce-overhead warms up, records, replays
            y = compiled(x)
            expected = torch.nn.functional.silu(x.detach()).double() @ W.t() * 2
            assert (y.detach().double() - expected).norm() <= 2e-3 * expected.norm()
            (grad,) = torch.autograd.grad(y.float().square().sum(), x)
            assert torch.isfinite(grad).all()


@pytest.mark.gpu
def test_in_autocast_x_takes_the_layers_dtype_and_otherwise_is_refused(backend):
    _, multiply = layer(backend)
    x = torch.randn(2, 1024, device="cuda")
    with torch.autocast("cuda", torch.float16):
        assert torch.equal(multiply(x), multiply(x.half()))
    with pytest.raises(BackendError, match=r"x is torch\.float32"):
        multiply(x)
