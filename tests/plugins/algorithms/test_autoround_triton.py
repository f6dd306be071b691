"""AutoRound's step in Triton: the reference's bits in the interpreter, and compilable ahead of time without a GPU."""

import os
import subprocess
import sys

import pytest
import torch
from qcore_plugins.algorithms import autoround, autoround_device, autoround_start

from qcore import QuantConfig

pytest.importorskip("triton")

INTERPRETED = """
import torch
from qcore import QuantConfig
from qcore_plugins.algorithms import autoround, autoround_device, autoround_start

def made(W, config, dtype, fused):
    generator = torch.Generator().manual_seed(1)
    start = autoround_start.covering_start(W, config)
    start.scales, start.zeros = (x.t().contiguous().t() for x in (start.scales, start.zeros))  # as GPTQ leaves them
    r = autoround.Rounding(start, config)
    r.alpha.uniform_(0.7, 1, generator=generator)
    r.beta.uniform_(0.7, 1, generator=generator)
    r.V.uniform_(-0.4, 0.4, generator=generator)
    r.V[r._grouped(torch.ones_like(W)) == 0] = 0
    r.V = r.V.to(dtype)
    assert r.fused is not None
    r.fused = r.fused if fused else None
    return r

for bits in (2, 3, 4, 8):
    for sym in (True, False):
        for size in (8, 12, -1):
            for minmax_lr in (0.001, None):
                for dtype in (torch.float32, torch.float16):
                    config = QuantConfig(bits=bits, sym=sym, group_size=size)
                    generator = torch.Generator().manual_seed(bits)
                    W, G = (torch.randn(6, 20, generator=generator) for _ in range(2))
                    found = []
                    for fused in (True, False):
                        r, weight = made(W, config, dtype, fused), torch.empty(6, 20, dtype=torch.float16)
                        for _ in range(3):
                            r.update(G, 0.01, minmax_lr, weight)
                        found.append((weight, *r.learned(), *r.freeze()))
                    print(all(torch.equal(a, b) for a, b in zip(*found)), config, minmax_lr, dtype)
"""

COMPILED = """
import sys, triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource
from qcore_plugins.algorithms import autoround_triton as kernels

kind, arch, warp = sys.argv[1:]
target = GPUTarget(kind, int(arch) if kind == "cuda" else arch, int(warp))
pointers = dict.fromkeys(("W", "low", "high", "alpha", "beta"), "*fp32") | dict.fromkeys("VGQ", "*fp16")
pointers |= dict.fromkeys(("lr", "minmax_lr", "maxq", "middle"), "fp32")
for constants in (
    {"SYM": True, "MINMAX": True, "C": 128, "R": 16},
    {"SYM": False, "MINMAX": True, "C": 64, "R": 32},
    {"SYM": False, "MINMAX": False, "C": 16384, "R": 1},
):
    signature = {name: pointers.get(name, "i32") for name in kernels.step_kernel.arg_names if name not in constants}
    source = ASTSource(kernels.step_kernel, signature, constants)
    compiled = triton.compile(source, target=target, options={"num_warps": 4, "enable_fp_fusion": False})
    print(len(compiled.asm["cubin" if kind == "cuda" else "hsaco"]))
for wanted, scaled in (("*fp8e4nv", True), ("*fp8e5", False)) if arch == "90" else ():
    constants = {"SCALED": scaled, "R": 128, "C": 64}
    pointers = {"X": "*fp16", "factor": "*fp32", "Y": wanted, "top": "fp32"}
    signature = {name: pointers.get(name, "i32") for name in kernels.columns8_kernel.arg_names if name not in constants}
    compiled = triton.compile(ASTSource(kernels.columns8_kernel, signature, constants), target=target, options={"num_warps": 4})
    assert "cvt.rn.satfinite.e" in compiled.asm["ptx"]  # to nearest, and the largest there is
    print(len(compiled.asm["cubin"]))
"""

TURNED = """
import torch
from qcore_plugins.algorithms import autoround_device, autoround_triton

for rows, columns in ((200, 70), (128, 64), (3, 5)):
    x = torch.randn(rows, columns, generator=torch.Generator().manual_seed(0)).half() * 3
    x[0, 0], x[1, 1] = 6e4, -6e4
    for dtype, factor in ((torch.float8_e5m2, None), (torch.float8_e4m3fn, torch.tensor(37.0))):
        found, expected = (f(x, factor, dtype).float() for f in (autoround_triton.columns8, autoround_device.columns8))
        # the interpreter rounds ties up and forgets the carry into the exponent; a GPU does not (test below)
        near = ((found - expected).abs() <= expected.abs() / 4) | (found == expected / 2)
        print(bool(near.all()) and float((found == expected).float().mean()) > 0.85 and found.shape == (columns, rows))
"""


def run(code: str, *arguments: str, interpret: bool) -> list[str]:
    environment = {**os.environ, "TRITON_INTERPRET": "1" if interpret else "0", "OMP_NUM_THREADS": "1"}
    done = subprocess.run([sys.executable, "-c", code, *arguments], env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr[-3000:]
    return done.stdout.splitlines()


def test_it_takes_the_references_step_to_the_bit() -> None:
    rows = run(INTERPRETED, interpret=True)
    assert len(rows) == 96
    assert [row for row in rows if not row.startswith("True")] == []


@pytest.mark.parametrize("target", [("cuda", "80", "32"), ("cuda", "90", "32"), ("hip", "gfx942", "64")], ids=str)
def test_it_compiles_ahead_of_time(target: tuple[str, str, str]) -> None:
    sizes = [int(line) for line in run(COMPILED, *target, interpret=False)]
    assert len(sizes) == (5 if target[1] == "90" else 3)
    assert min(sizes) > 1000


def test_it_turns_and_rounds_to_8_bit_floats() -> None:
    assert run(TURNED, interpret=True) == ["True"] * 6


@pytest.mark.gpu
def test_on_a_gpu_8_bit_floats_are_torchs() -> None:
    x = torch.randn(1000, 700, device="cuda").half() * 3
    for dtype, factor in ((torch.float8_e5m2, None), (torch.float8_e4m3fn, torch.tensor(37.0, device="cuda"))):
        found = autoround_device.columns8(x, factor, dtype)
        expected = autoround_device.columns8(x.cpu(), None if factor is None else factor.cpu(), dtype)
        assert torch.equal(found.cpu().view(torch.uint8), expected.view(torch.uint8))


@pytest.mark.gpu
def test_on_a_gpu_a_compiled_product_has_the_gradients_of_an_eager_one() -> None:
    torch.manual_seed(0)
    model = torch.nn.Sequential(torch.nn.Linear(256, 512), torch.nn.SiLU(), torch.nn.Linear(512, 128)).half().cuda()
    x, weights = torch.randn(64, 256, device="cuda").half(), list(model.parameters())
    exact = torch.autograd.grad(model(x).float().square().mean() * 64, weights)
    with autoround_device.rough_gradients([model[0], model[2]]):
        compiled = torch.compile(lambda x: model(x).float().square().mean() * 64, fullgraph=True)
        found = torch.autograd.grad(compiled(x), weights)
    for ours, theirs in zip(found, exact, strict=True):
        assert float((ours - theirs).float().norm() / theirs.float().norm()) < 0.1


@pytest.mark.gpu
@pytest.mark.parametrize("sym", [True, False])
@pytest.mark.parametrize("group_size", [128, 100, -1])
def test_on_a_gpu_it_is_the_references_step_but_for_sums(sym: bool, group_size: int) -> None:
    """Sums over a group come in another order, so a range whose gradient is nearly zero may go the other way."""
    config = QuantConfig(bits=4, sym=sym, group_size=group_size)
    generator = torch.Generator("cuda").manual_seed(0)
    W, G = (torch.randn(256, 1000, device="cuda", generator=generator) for _ in range(2))
    ours, reference = (autoround.Rounding(autoround_start.covering_start(W, config), config) for _ in range(2))
    reference.fused = None
    weights = torch.empty_like(W), torch.empty_like(W)
    for r, weight in zip((ours, reference), weights, strict=True):
        r.update(G, 0.01, 0.001, weight)
    assert torch.equal(ours.V, reference.V)
    assert float((weights[0] != weights[1]).float().mean()) < 0.02
    assert torch.equal(ours.freeze()[0].float(), ours.canonical(ours.freeze(), None).codes.float())
    assert torch.equal(ours.weight(torch.float32), weights[0])
