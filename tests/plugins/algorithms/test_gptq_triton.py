"""The Triton solver: right in Triton's interpreter, compiled ahead of time for GPUs, and on a GPU (marked gpu)."""

from __future__ import annotations

import json
import os
import subprocess
import sys

import pytest
import torch
from qcore_plugins.algorithms import gptq

import qcore
from qcore import ConfigError, QuantConfig
from qcore.testing import TinyModel, tiny_tokens, tiny_transformer

pytest.importorskip("triton", reason="triton is not installed")

#: every path through the kernels: groups within a block, across blocks, static; few levels and many; a block of its own size
CASES = [
    ({"bits": 4, "sym": True, "group_size": 32}, {}),
    ({"bits": 4, "sym": False, "group_size": 24}, {"block_size": 40}),
    ({"bits": 2, "sym": False, "group_size": -1}, {"block_size": 16}),
    ({"bits": 3, "sym": True, "group_size": 50}, {"desc_act": True, "block_size": 32}),
    ({"bits": 4, "sym": False, "group_size": 16}, {"desc_act": True, "static_groups": True}),
    ({"bits": 8, "sym": False, "group_size": 64}, {"grid": "minmax"}),
    ({"bits": 5, "sym": True, "group_size": 100}, {"grid": "minmax", "static_groups": True, "order": "none"}),
]

INTERPRETED = """
import json, sys, torch
from qcore import ModelError, QuantConfig
from qcore_plugins.algorithms import gptq

quantize = gptq.solver_for("triton", torch.device("cpu"))[1]
generator = torch.Generator().manual_seed(0)
columns = 72
W = torch.randn(11, columns, generator=generator) * 0.05
X = torch.randn(300, columns, generator=generator) @ (
    torch.eye(columns) + 0.3 * torch.randn(columns, columns, generator=generator) / columns**0.5
) * torch.logspace(-1, 1, columns)
H = X.t() @ X / 300
for config, params in json.loads(sys.argv[1]):
    config, params = QuantConfig(**config), gptq.Gptq.Params(**params)
    exact = gptq.solve(W.double(), H.double(), config, params)
    found = gptq.solve(W, H, config, params, quantize)
    losses = []
    for each in (found, exact):
        g_idx = each.g_idx.long()
        E = W - each.scales[:, g_idx].double() * (each.codes.double() - each.zeros[:, g_idx])
        losses.append(float(((E @ H.double()) * E).sum()))
    print(float((found.codes == exact.codes).float().mean()), losses[0] / losses[1])
W[3, 4] = 1e9
try:
    gptq.solve(W, H, QuantConfig(group_size=16), gptq.Gptq.Params(), quantize)
except ModelError as error:
    print(error)
"""


def run(code: str, *arguments: str, interpret: bool) -> list[str]:
    environment = {**os.environ, "TRITON_INTERPRET": "1" if interpret else "0", "OMP_NUM_THREADS": "1"}
    done = subprocess.run([sys.executable, "-c", code, *arguments], env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr[-3000:]
    return done.stdout.splitlines()


def test_the_arithmetic_is_the_references_in_tritons_interpreter() -> None:
    *rows, refused = run(INTERPRETED, json.dumps(CASES), interpret=True)
    assert len(rows) == len(CASES)
    for (config, _), row in zip(CASES, rows, strict=True):
        agree, ratio = map(float, row.split())
        assert agree > (0.99 if config["bits"] < 8 else 0.9), config
        assert ratio == pytest.approx(1, rel=5e-3), config
    assert "a scale of more than torch.float16 holds" in refused


COMPILED = """
import sys, triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource
from qcore_plugins.algorithms import gptq_triton as kernels

kind, arch, warp = sys.argv[1:]
target = GPUTarget(kind, int(arch) if kind == "cuda" else arch, int(warp))
pointers = {"group_of": "*i32", "codes": "*u8", "maxq": "fp32", "middle": "fp32"}
pointers |= dict.fromkeys(("W", "U", "importance", "scales", "zeros", "Err"), "*fp32")
for kernel, constants in (
    (kernels.columns_kernel, {"SYM": True, "SEARCH": 2, "FEW": False}),
    (kernels.columns_kernel, {"SYM": False, "SEARCH": 2, "FEW": True}),
    (kernels.columns_kernel, {"SYM": False, "SEARCH": 0, "FEW": False}),
    (kernels.grids_kernel, {"SYM": False, "MSE": True, "FEW": False}),
):
    constants = {**constants, "C": 128, "R": kernels.ROWS}
    signature = {name: pointers.get(name, "i32") for name in kernel.arg_names if name not in constants}
    options = {"num_warps": kernels.WARPS, "enable_fp_fusion": True}
    compiled = triton.compile(ASTSource(kernel, signature, constants), target=target, options=options)
    print(len(compiled.asm["cubin" if kind == "cuda" else "hsaco"]))
"""


@pytest.mark.parametrize("target", [("cuda", "80", "32"), ("cuda", "90", "32"), ("hip", "gfx942", "64")], ids=str)
def test_it_compiles_ahead_of_time(target: tuple[str, str, str]) -> None:
    sizes = [int(line) for line in run(COMPILED, *target, interpret=False)]
    assert len(sizes) == 4
    assert min(sizes) > 1000


@pytest.mark.skipif(os.environ.get("TRITON_INTERPRET") == "1", reason="the interpreter runs it on the CPU")
def test_it_is_refused_where_it_cannot_run() -> None:
    with pytest.raises(ConfigError, match=r"solver='triton' cannot run here: it needs a GPU, not cpu"):
        qcore.quantize(TinyModel(), "gptq", group_size=32, calibration=tiny_tokens(), solver="triton", device="cpu")


# ---- on a GPU --------------------------------------------------------------------------------------------------------


def on_gpu(columns: int, rows: int) -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator("cuda").manual_seed(0)
    W = torch.randn(rows, columns, device="cuda", generator=generator) * 0.05
    X = torch.randn(4 * columns, columns, device="cuda", generator=generator)
    X = (X + X[:, :1]) * torch.logspace(-1, 1, columns, device="cuda")
    return W, X.t() @ X / len(X)


@pytest.mark.gpu
@pytest.mark.parametrize(("config", "params"), CASES, ids=str)
def test_on_a_gpu_it_finds_what_the_reference_finds_but_for_ties(config: dict, params: dict) -> None:
    W, H = on_gpu(500, 300)
    quantize = gptq.solver_for("triton", W.device)[1]
    arguments = QuantConfig(**config), gptq.Gptq.Params(**params)
    exact = gptq.solve(W.double(), H.double(), *arguments)
    found, again = (gptq.solve(W, H, *arguments, quantize) for _ in range(2))
    assert exact is not None and found is not None and again is not None  # noqa: PT018
    assert all(torch.equal(getattr(found, part), getattr(again, part)) for part in ("codes", "scales", "zeros"))
    assert float((found.codes == exact.codes).float().mean()) > (0.99 if config["bits"] < 8 else 0.9)
    losses = []
    for each in (found, exact):
        g_idx = each.g_idx.long()
        E = W - each.scales[:, g_idx].double() * (each.codes.double() - each.zeros[:, g_idx])
        losses.append(float(((E @ H.double()) * E).sum()))
    assert losses[0] == pytest.approx(losses[1], rel=5e-3 if config["bits"] < 8 else 1.5e-2)


@pytest.mark.gpu
def test_a_run_on_a_gpu_takes_it() -> None:
    sizes = {"hidden_size": 128, "intermediate_size": 256, "num_hidden_layers": 2, "num_attention_heads": 4}
    model = tiny_transformer("llama", vocab_size=96, **sizes).to("cuda")
    qcore.quantize(model, "gptq", group_size=32, calibration=tiny_tokens(vocabulary=96), device="cuda")
    assert qcore.report(model)["facts"]["solver_used"].startswith("triton ")
