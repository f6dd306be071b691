"""Attention of one token: the kernel in Triton's interpreter and compiled ahead of time, who it serves, generation with it."""

from __future__ import annotations

import os
import subprocess
import sys

import pytest
import torch
from qcore_plugins.attention import decode

from qcore import fast
from qcore.plugins import installed
from qcore.testing import tiny_transformer

pytest.importorskip("triton", reason="triton is not installed")

SIZES = {"hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 2, "num_attention_heads": 4, "vocab_size": 96}
SHAPES = [  # rows, heads, of the cache, tokens, d, seen
    (1, 4, 4, 200, 64, 77),
    (2, 8, 2, 130, 128, 130),
    (3, 3, 1, 70, 80, 1),
    (1, 2, 2, 700, 16, 650),
    (2, 20, 1, 65, 64, 64),
]


def check(device: str, shapes=SHAPES, dtype=torch.float16) -> None:
    for rows, heads, shared, tokens, d, seen in shapes:
        query = torch.randn(rows, heads, 1, d, device=device).to(dtype)
        cache = torch.randn(2, rows, shared, tokens, d, device=device).to(dtype)
        cache[:, :, :, seen:] = float("nan")  # what nobody sees is never read
        mask = (torch.arange(tokens, device=device) < seen).expand(rows, 1, 1, tokens).clone()
        if seen > 70:
            mask[0, :, :, :65] = False  # padding on the left: a whole block and a piece
            mask[-1, :, :, 3:9] = False
        kept = cache.nan_to_num().double().repeat_interleave(heads // shared, 2)
        expected = torch.nn.functional.scaled_dot_product_attention(query.double(), *kept, attn_mask=mask, scale=0.3)
        cache = cache.nan_to_num() if seen % decode.BLOCK else cache  # a block that is seen in part is read whole
        found = torch.ops.qcore.decode_attention(query, *cache, mask, 0.3)
        assert found.shape == (rows, 1, heads, d)
        error = (found.double().transpose(1, 2) - expected).norm() / expected.norm()
        assert error < 4 * torch.finfo(dtype).eps, (error, rows, heads, shared, tokens, d, seen)
        assert torch.equal(found, torch.ops.qcore.decode_attention(query, *cache, mask, 0.3))
        alone = torch.ops.qcore.decode_attention(query[:1], *cache[:, :1], mask[:1], 0.3)  # of other parts
        assert (alone.double() - found[:1].double()).norm() < 2 * torch.finfo(dtype).eps * alone.double().norm()


def test_it_is_right_in_tritons_interpreter() -> None:
    command = "from test_decode import check; check('cpu'); print('right')"
    environment = {**os.environ, "TRITON_INTERPRET": "1", "OMP_NUM_THREADS": "1"}
    result = subprocess.run(
        [sys.executable, "-c", command], env=environment, capture_output=True, text=True, cwd=os.path.dirname(__file__)
    )
    assert result.stdout == "right\n", result.stderr[-3000:]


COMPILE = """
import sys, triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource
from qcore_plugins.attention.decode_kernel import attend as kernel

kind, arch, warp, dtype = sys.argv[1], sys.argv[2], int(sys.argv[3]), sys.argv[4]
types = {**{name: f"*{dtype}" for name in ("query", "key", "value", "out")}, "mask": "*i1", "sums": "*fp32", "tops": "*fp32",
         "arrived": "*i32", "scale": "fp32"}
constants = dict(GROUP=4, ROWS=16, D=128, BLOCK_D=128, BLOCK=64, HEADS=8, PARTS=16)
signature = {name: types.get(name, "constexpr" if name in constants else "i32") for name in kernel.arg_names}
target = GPUTarget(kind, int(arch) if kind == "cuda" else arch, warp)
compiled = triton.compile(ASTSource(kernel, signature, constants), target=target, options={"num_warps": 4, "num_stages": 2})
print(compiled.metadata.shared, "v_mfma" in compiled.asm.get("amdgcn", ""), "mma.sync" in compiled.asm.get("ptx", ""))
"""


@pytest.mark.parametrize(
    ("kind", "arch", "warp", "dtype", "has"),
    [("cuda", "80", 32, "bf16", "False True"), ("cuda", "90", 32, "fp16", "False True"), ("hip", "gfx942", 64, "fp16", "True False")],
)  # fmt: skip
def test_it_compiles_to_matrix_instructions(kind, arch, warp, dtype, has) -> None:
    environment = {**os.environ, "TRITON_INTERPRET": "0"}
    command = [sys.executable, "-c", COMPILE, kind, arch, str(warp), dtype]
    result = subprocess.run(command, env=environment, capture_output=True, text=True)
    assert result.returncode == 0, result.stderr[-3000:]
    assert result.stdout.split(maxsplit=1)[1].strip() == has
    assert int(result.stdout.split()[0]) <= 64 << 10


def test_what_it_does_not_serve_goes_to_transformers_own(monkeypatch) -> None:
    torch.manual_seed(0)
    q, k, v = torch.randn(2, 4, 1, 16).half(), torch.randn(2, 4, 9, 16).half(), torch.randn(2, 4, 9, 16).half()
    mask = torch.ones(2, 1, 1, 9, dtype=torch.bool)
    served = {"query": q, "key": k, "value": v, "mask": mask, "dropout": 0.0, "extra": {}}
    assert decode._serves(**served)
    for change in (
        {"query": torch.randn(2, 4, 3, 16).half()}, {"mask": None}, {"mask": mask.float()}, {"mask": mask.expand(2, 4, 1, 9)},
        {"query": q.float()}, {"value": torch.randn(2, 4, 9, 8).half()}, {"dropout": 0.1}, {"extra": {"softcap": 30.0}},
        {"extra": {"position_bias": mask}},
    ):  # fmt: skip
        assert not decode._serves(**{**served, **change}), change
    module = torch.nn.Module()
    found, _ = decode.attention(module, q.float(), k.float(), v.float(), mask, scaling=0.5)
    expected = torch.nn.functional.scaled_dot_product_attention(q.float(), k.float(), v.float(), mask, scale=0.5)
    assert torch.allclose(found, expected.transpose(1, 2))


def test_models_elsewhere_keep_their_own() -> None:
    model = tiny_transformer("llama", **SIZES)
    assert "not on a GPU" in decode.why_not(model)
    model.config._attn_implementation = "eager"
    assert "only 'sdpa'" in decode.why_not(model)


GENERATE = """
import torch
from qcore_plugins.attention import decode
from qcore import fast
from qcore.plugins import installed
from qcore.testing import tiny_transformer

SIZES = {"hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 2, "num_attention_heads": 4, "vocab_size": 96}
decode.why_not = lambda model: None
calls = []
op = decode._serves
decode._serves = lambda *arguments: calls.append(op(*arguments)) or calls[-1]
for kind in ("llama", "gpt_neox"):
    model = tiny_transformer(kind, **SIZES).half()
    ids = torch.tensor([[0, 0, 3, 5, 7], [1, 2, 3, 4, 5]])
    how = dict(attention_mask=(ids != 0).long(), do_sample=False, max_new_tokens=4, min_new_tokens=4, pad_token_id=0)
    expected = model.generate(ids, **how)
    calls.clear()
    fast.accelerate(model, compiled=False)
    assert model.config._attn_implementation == decode.NAME
    found = model.generate(ids, **how)
    assert torch.equal(found, expected), (kind, found, expected)
    assert any(calls), kind
    assert decode.NAME not in model.config.to_json_string()
    print("same", kind)
"""


def test_generation_gives_the_same_tokens_with_it() -> None:
    environment = {**os.environ, "TRITON_INTERPRET": "1", "OMP_NUM_THREADS": "1"}
    result = subprocess.run([sys.executable, "-c", GENERATE], env=environment, capture_output=True, text=True)
    assert result.stdout.count("same") == 2, result.stdout + result.stderr[-3000:]


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_it_is_right_on_a_gpu(dtype) -> None:
    check("cuda", [*SHAPES, (1, 32, 32, 640, 128, 640), (4, 32, 8, 2048, 128, 1500)], dtype)


@pytest.mark.gpu
def test_a_fast_model_on_a_gpu_takes_it() -> None:
    model = tiny_transformer("llama", **SIZES).half().cuda()
    fast.accelerate(model, compiled=False)
    assert model.config._attn_implementation == decode.NAME
    assert installed().get  # the plugin is found by its entry point
