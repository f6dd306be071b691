"""The backends `triton` and `rocm`: arithmetic in Triton's interpreter, code for GPUs compiled ahead of time, layout."""

from __future__ import annotations

import os
import subprocess
import sys
import types

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from qcore_plugins.backends import triton as backend_module
from qcore_plugins.backends import triton_configs
from qcore_plugins.native import cache_folder

from qcore import BackendError, MatmulSpec, QuantConfig
from qcore.plugins import installed
from qcore.testing import check_backend, random_weight

pytest.importorskip("triton", reason="triton is not installed")

BACKEND = installed().get("backend", "triton")

INTERPRETED = """
import torch
from qcore import MatmulSpec, QuantConfig
from qcore.plugins import installed
from qcore.testing import check_backend, random_weight

backend = installed().get("backend", "triton")
assert backend.unavailable() is None
print("served", check_backend(backend, "cpu", (torch.float16,)))
for bits, group_size, sym, act_order, out, columns, m in [
    (4, 64, True, False, 130, 576, 3), (3, 32, False, True, 70, 320, 17), (2, -1, True, False, 1, 48, 5),
    (8, 128, False, False, 200, 1024, 40), (4, 128, True, False, 128, 2048, 1), (4, 32, False, False, 64, 96, 80),
]:
    config = QuantConfig(bits=bits, group_size=group_size, sym=sym)
    weight = random_weight(out, columns, config, act_order)
    spec = MatmulSpec(config, columns, out, act_order, torch.float16, torch.device("cpu"))
    buffers = backend.prepare(weight, spec)
    x = torch.randn(m, columns, generator=torch.Generator().manual_seed(1)).half()
    first = backend.matmul(x, buffers, spec)
    exact = x.double() @ weight.dequantize().double().t()
    error = float((first.double() - exact).norm() / exact.norm())
    assert error < 2e-3, (bits, m, error)
    assert torch.equal(first, backend.matmul(x, buffers, spec)), "the same input gives the same bits"
    assert not buffers["arrived"].any()
    print("ok", bits, m, error)
"""


def test_the_kernels_are_right_in_tritons_interpreter() -> None:
    environment = {**os.environ, "TRITON_INTERPRET": "1", "OMP_NUM_THREADS": "1"}
    result = subprocess.run([sys.executable, "-c", INTERPRETED], env=environment, capture_output=True, text=True)
    assert result.returncode == 0, result.stdout + result.stderr[-3000:]
    assert result.stdout.count("ok") == 6


@settings(max_examples=30, deadline=None)
@given(bits=st.sampled_from([2, 3, 4, 8]), out=st.integers(1, 140), columns=st.integers(1, 300))
def test_tiles_hold_every_code_once(bits: int, out: int, columns: int) -> None:
    codes = torch.randint(0, 2**bits, (out, columns), dtype=torch.uint8)
    sub = backend_module.lanes(bits, columns)
    words = backend_module.pack_tiles(codes, bits, sub)
    per_word, per_lane = backend_module._shape(bits)
    assert words.shape[1:3] == (per_word, sub)
    stream = (words.long() & 0xFFFFFFFF).permute(3, 0, 2, 1)  # [outputs, tiles, sub, words]
    for _ in range(20):
        row, column = int(torch.randint(out, ())), int(torch.randint(columns, ()))
        tile, inside = divmod(column, sub * per_lane)
        j, lane = divmod(inside, sub)
        word, shift = divmod(j * bits, 32)
        lane_words = [*stream[row, tile, lane].tolist(), 0]
        code = ((lane_words[word] | lane_words[word + 1] << 32) >> shift) & (2**bits - 1)
        assert code == codes[row, column]


COMPILE = """
import sys, triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource
from qcore_plugins.backends import triton_kernels

kind, arch, warp, dtype, bits, block_m = sys.argv[1], sys.argv[2], int(sys.argv[3]), sys.argv[4], int(sys.argv[5]), int(sys.argv[6])
words, codes = {4: (1, 8), 8: (1, 4), 2: (1, 16), 3: (3, 32)}[bits]
kernel = triton_kernels.matmul
scale = "fp16" if dtype == "fp16" else "fp32"
types = dict(x=f"*{dtype}", words="*i32", scales=f"*{scale}", zeros="*fp16", y=f"*{dtype}", sums="*fp32", arrived="*i32")
constants = dict(BITS=bits, WORDS=words, CODES=codes, SUB=32, ZERO=8, RUN=2, BLOCK_M=block_m, BLOCK_N=64, SPLIT=True)
signature = {name: types.get(name, "constexpr" if name in constants else "i32") for name in kernel.arg_names}
target = GPUTarget(kind, int(arch) if kind == "cuda" else arch, warp)
compiled = triton.compile(ASTSource(kernel, signature, constants), target=target, options={"num_warps": 4, "num_stages": 2})
text = compiled.asm["ptx" if kind == "cuda" else "amdgcn"]
print(sorted({word for word in ("mma.sync", "wgmma", "v_mfma", "v_wmma") if word in text}), compiled.metadata.shared)
"""


@pytest.mark.parametrize(
    ("kind", "arch", "warp", "dtype", "bits", "instruction"),
    [
        ("cuda", "80", 32, "fp16", 4, "mma.sync"),
        ("cuda", "90", 32, "bf16", 3, "mma.sync"),
        ("hip", "gfx90a", 64, "fp16", 4, "v_mfma"),
        ("hip", "gfx942", 64, "bf16", 8, "v_mfma"),
        ("hip", "gfx1100", 32, "fp16", 2, "v_wmma"),
    ],
)
def test_the_kernel_compiles_to_matrix_instructions(
    kind: str, arch: str, warp: int, dtype: str, bits: int, instruction: str
) -> None:
    arguments = [kind, arch, str(warp), dtype, str(bits), "16"]
    environment = {**os.environ, "TRITON_INTERPRET": "0"}
    result = subprocess.run(
        [sys.executable, "-c", COMPILE, *arguments], env=environment, capture_output=True, text=True
    )
    assert result.returncode == 0, result.stderr[-3000:]
    assert instruction in result.stdout


def spec(**changes: object) -> MatmulSpec:
    config = QuantConfig(**{"bits": 4, "group_size": 128, "sym": True, **changes.pop("config", {})})  # type: ignore[arg-type]
    return MatmulSpec(
        config, 256, 256, False, changes.pop("dtype", torch.float16), torch.device(changes.pop("device", "cuda"))
    )  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("changes", "says"),
    [
        ({"device": "cpu"}, "serves GPUs, not cpu"),
        ({"dtype": torch.float32}, "not torch.float32"),
        ({"config": {"bits": 5}}, "not 5"),
        ({"config": {"group_size": 8}}, "saves no memory"),
    ],
)
def test_what_it_cannot_serve_is_said(changes: dict[str, object], says: str) -> None:
    assert says in BACKEND.why_not(spec(**changes))


def test_amd_and_nvidia_are_told_apart() -> None:
    reasons = {name: installed().get("backend", name).unavailable() for name in ("triton", "rocm")}
    if torch.version.hip is None:
        assert reasons["rocm"] == "needs an AMD GPU and a torch built for it"
    if not torch.cuda.is_available():
        assert all(reasons.values())


def test_tensors_that_do_not_fit_are_refused_before_a_launch() -> None:
    weight = random_weight(64, 256, QuantConfig(bits=4, group_size=128, sym=True))
    buffers = BACKEND.prepare(weight, MatmulSpec(weight.config, 256, 64, False, torch.float16, torch.device("cpu")))
    arguments = [buffers[name] for name in ("words", "scales", "zeros", "perm", "arrived")]
    x = torch.zeros(2, 256, dtype=torch.float16)
    for wrong, says in [
        ((x.float(), *arguments), "expected float16 or bfloat16"),
        ((x[:, :255], *arguments), r"\[\.\.\., 256\]"),
        ((x, arguments[0][:, :, :16].contiguous(), *arguments[1:]), "words are"),
        ((x, arguments[0], arguments[1][:, :64].contiguous(), *arguments[2:]), "scales are"),
    ]:
        with pytest.raises(BackendError, match=says):
            torch.ops.qcore.triton_matmul(*wrong, 4, 128, 256, 64)


@pytest.mark.gpu
@pytest.mark.parametrize(
    "bits", [2, 3, 4, 8]
)  # each compiles some dozen kernels: minutes where Triton's cache is empty
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_it_is_right_on_a_gpu(bits: int, dtype: torch.dtype) -> None:
    assert check_backend(BACKEND, "cuda", (dtype,), widths=(bits,)) == 8


@pytest.mark.gpu
def test_a_graph_repeats_the_same_bits() -> None:
    weight = random_weight(4096, 4096, QuantConfig(bits=4, group_size=128, sym=True))
    layer = MatmulSpec(weight.config, 4096, 4096, False, torch.float16, torch.device("cuda"))
    buffers = BACKEND.prepare(weight, layer)
    x = torch.randn(1, 4096, device="cuda", dtype=torch.float16)
    expected = BACKEND.matmul(x, buffers, layer)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        y = BACKEND.matmul(x, buffers, layer)
    for _ in range(20):
        graph.replay()
        assert torch.equal(y, expected)


@pytest.mark.gpu
@pytest.mark.parametrize("bits", [2, 3, 4, 8])
def test_every_number_of_tokens_is_right_on_a_gpu(bits: int) -> None:
    weight = random_weight(512, 1024, QuantConfig(bits=bits, group_size=128, sym=True))
    layer = MatmulSpec(weight.config, 1024, 512, False, torch.float16, torch.device("cuda"))
    buffers, W = BACKEND.prepare(weight, layer), weight.to("cuda").dequantize(torch.float64)
    for m in (1, 16, 17, 32, 33, 64, 65, 300):
        x = torch.randn(m, 1024, device="cuda", dtype=torch.float16)
        y, expected = BACKEND.matmul(x, buffers, layer), x.double() @ W.t()
        assert (y.double() - expected).norm() <= 2e-3 * expected.norm(), m
        assert torch.equal(BACKEND.matmul(x, buffers, layer), y), m


@pytest.mark.parametrize("bits", [2, 3, 4, 8])
@pytest.mark.parametrize("limit", [227, 163, 99, 64])  # KiB: sm_90, sm_80, sm_89, gfx942
def test_configurations_are_made_to_fit_the_shared_memory_there_is(bits: int, limit: int) -> None:
    for m in (1, 17, 64):
        found = backend_module.fitting(triton_configs.SOUND[triton_configs.bucket_of(m)], bits, 32, limit * 1024)
        words, codes = backend_module._shape(bits)
        held = found.stages * 32 * (2 * codes * found.block_m + 4 * words * found.block_n)
        assert held <= limit * 1024 or (found.stages, found.block_m) == (1, 16)
        assert found.block_m >= 16


# ---- configurations ----------------------------------------------------------------------------------------------------


@pytest.fixture
def another_gpu(monkeypatch, tmp_path):
    """A GPU that nothing is shipped for, with an empty cache; returned: what takes seconds, by configuration."""
    monkeypatch.setenv("QCORE_CACHE", str(tmp_path))
    monkeypatch.delenv("QCORE_TRITON_SEARCH", raising=False)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda *_: (8, 0))
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda *_: "NVIDIA A100-SXM4/80GB")
    monkeypatch.setattr(
        torch.cuda, "get_device_properties", lambda *_: types.SimpleNamespace(multi_processor_count=108)
    )
    triton_configs._kept.cache_clear()
    yield torch.device("cuda", 0)
    triton_configs._kept.cache_clear()


def found_by_search(device, seconds, m=1, bits=4):
    """Search with a clock of its own: `seconds` of a configuration, or what it raises; returns the best and what was tried."""
    tried = []

    def run(config):
        tried.append(config)
        taken = seconds(config)
        if isinstance(taken, Exception):
            raise taken
        return taken

    return triton_configs.search(m, bits, device, run, timed=lambda call: call()), tried


def test_what_was_measured_is_shipped_and_never_searched(another_gpu, monkeypatch):
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda *_: (9, 0))
    assert not triton_configs.is_needed(1, 4, another_gpu)
    small, large = (triton_configs.config_for(1, size, 4, another_gpu) for size in (1 << 24, 1 << 28))
    assert small == triton_configs.SHIPPED[9, 0][16]
    assert large == small._replace(programs=2 * small.programs, stages=small.stages + 1)
    assert triton_configs.config_for(17, 1 << 24, 4, another_gpu) == triton_configs.SHIPPED[9, 0][32]


def test_a_search_on_another_gpu_is_kept_for_later_processes(another_gpu):
    assert triton_configs.is_needed(1, 4, another_gpu)
    assert triton_configs.config_for(1, 1 << 24, 4, another_gpu) == triton_configs.SOUND[16]
    best, tried = found_by_search(another_gpu, lambda config: abs(config.block_n - 128) + config.warps)
    assert best == triton_configs.CANDIDATES[16][4]._replace(programs=4 * 108)
    assert len(tried) == len(triton_configs.CANDIDATES[16])
    found_by_search(another_gpu, lambda config: -config.stages, m=64, bits=8)
    triton_configs._kept.cache_clear()  # as a new process
    assert not triton_configs.is_needed(16, 4, another_gpu)
    assert triton_configs.is_needed(32, 4, another_gpu)
    assert triton_configs.is_needed(1, 8, another_gpu)
    assert triton_configs.config_for(3, 1 << 24, 4, another_gpu) == best
    assert triton_configs.config_for(64, 1 << 24, 8, another_gpu).stages == 3
    assert [path.name for path in (cache_folder()).iterdir()] == [triton_configs.kept_in(another_gpu).name]
    assert "nvidia-a100-sxm4-80gb" in triton_configs.kept_in(another_gpu).name


def test_a_search_passes_over_what_does_not_run_and_ends_in_time(another_gpu, monkeypatch):
    out_of_memory = RuntimeError("out of resource: shared memory")
    best, _ = found_by_search(another_gpu, lambda config: 1.0 if config.warps == 8 else out_of_memory)
    assert best.warps == 8
    assert found_by_search(another_gpu, lambda config: out_of_memory, m=64)[0] == triton_configs.SOUND[64]
    monkeypatch.setattr(triton_configs, "SEARCH_SECONDS", -1.0)
    best, tried = found_by_search(another_gpu, lambda config: 1.0, m=32)
    assert [best] == tried


@pytest.mark.parametrize(
    "text", ["", "{", "[]", '{"4,16": [16, 64, 4]}', '{"4,16": [7, 7, 7, 7, 7]}', '{"4": 1}', '{"4,16": null}']
)
def test_a_broken_file_of_configurations_is_as_none(another_gpu, text):
    path = triton_configs.kept_in(another_gpu)
    path.parent.mkdir(parents=True)
    path.write_text(text)
    assert triton_configs.is_needed(1, 4, another_gpu)
    best, _ = found_by_search(another_gpu, lambda config: 1.0)
    triton_configs._kept.cache_clear()
    assert triton_configs.config_for(1, 1 << 24, 4, another_gpu) == best


def test_a_cache_that_cannot_be_written_costs_only_the_next_process_a_search(another_gpu, monkeypatch, tmp_path):
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("QCORE_CACHE", str(tmp_path / "file"))
    best, _ = found_by_search(another_gpu, lambda config: 1.0)
    assert triton_configs.config_for(1, 1 << 24, 4, another_gpu) == best


def test_the_search_can_be_left_out(another_gpu, monkeypatch):
    monkeypatch.setenv("QCORE_TRITON_SEARCH", "0")
    assert not triton_configs.is_needed(1, 4, another_gpu)
    assert not triton_configs.is_needed(65, 4, another_gpu)


@pytest.mark.gpu
def test_a_search_runs_when_a_layer_is_prepared(monkeypatch, tmp_path):
    monkeypatch.setenv("QCORE_CACHE", str(tmp_path))
    monkeypatch.setattr(triton_configs, "SHIPPED", {})
    monkeypatch.setattr(triton_configs, "CANDIDATES", {16: triton_configs.CANDIDATES[16][:2]})
    triton_configs._kept.cache_clear()
    weight = random_weight(512, 1024, QuantConfig(bits=4, group_size=128, sym=True))
    layer = MatmulSpec(weight.config, 1024, 512, False, torch.float16, torch.device("cuda", 0))
    buffers = BACKEND.prepare(weight, layer)
    assert triton_configs.kept_in(layer.device).is_file()
    x = torch.randn(3, 1024, device="cuda", dtype=torch.float16)
    expected = x.double() @ weight.to("cuda").dequantize(torch.float64).t()
    assert (BACKEND.matmul(x, buffers, layer).double() - expected).norm() <= 2e-3 * expected.norm()
    triton_configs._kept.cache_clear()
