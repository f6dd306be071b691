"""The pure functions that GPTQ is made of, against float64 and plain formulas."""

import pytest
import torch
from qcore_plugins.algorithms import gptq

from qcore import QuantConfig


def spd(n, seed=0):
    X = torch.randn(3 * n, n, generator=torch.Generator().manual_seed(seed))
    return X.t() @ X / (3 * n)


@pytest.mark.parametrize("n", [1, 2, 127, 128, 129, 300, 515, 700])
def test_the_factor_is_that_of_the_inverse(n):
    H = spd(n)
    kept, perm = H.clone(), torch.randperm(n, generator=torch.Generator().manual_seed(1))
    U, damp = gptq.inverse_factor(H, perm, 0.1, 0.2)
    assert torch.equal(H, kept)
    assert damp == 0.1
    damped = H.double()[perm][:, perm]
    damped.diagonal().mul_(1.2).add_(0.1 * H.double().diagonal().mean())
    exact = torch.linalg.cholesky(torch.linalg.inv(damped), upper=True)
    assert torch.equal(U, U.triu())
    assert float((U - exact).norm() / exact.norm()) < 1e-6


def test_no_damping_saves_a_hessian_of_nan():
    assert gptq.inverse_factor(torch.full((4, 4), torch.nan), torch.arange(4), 0.1, 0.1) is None


@pytest.mark.parametrize("columns", [5, 256, 300, 600])
def test_the_hessian_is_the_whole_symmetric_product(columns):
    X = torch.randn(70, columns, generator=torch.Generator().manual_seed(0))
    Y = X + 1
    hessian = gptq.Hessian(columns, torch.device("cpu"), with_cross=True)
    for rows in (slice(0, 30), slice(30, 70)):
        hessian.add(X[rows], Y[rows])
    H, C = hessian.finish()
    torch.testing.assert_close(H, X.t() @ X / 70)
    torch.testing.assert_close(C, Y.t() @ X / 70)
    assert torch.equal(H, H.t())


@pytest.mark.parametrize("n", [1, 2, 5, 100, 513, 1024])
def test_turning_reverses_rows_and_columns(n):
    A = torch.arange(n * n, dtype=torch.float64).view(n, n)
    assert torch.equal(gptq.turn_(A.clone(), panel=64), A.flip(0, 1))


@pytest.mark.parametrize("block_size", [1, 16, 100, 128, 5000])
@pytest.mark.parametrize("size", [1, 16, 48, 128, 200, 1100])
def test_panels_cover_all_columns_and_never_cut_a_group_that_begins_inside(size, block_size):
    columns = 1100
    panels = gptq._panels(columns, size, block_size)
    spans = [span for panel in panels for span in panel]
    assert spans == gptq._spans(columns, size, block_size)
    assert [start for start, _ in spans] == [0, *(stop for _, stop in spans[:-1])]
    assert spans[-1][1] == columns
    for panel in panels:
        begin, end = panel[0][0], panel[-1][1]
        begun = [start for start in range(0, columns, size) if begin < start < end]
        assert all(min(start + size, columns) <= end for start in begun)


@pytest.mark.parametrize("columns", [1, 7, 256, 300, 2100])
@pytest.mark.parametrize("rows_at_once", [4, 100])
def test_the_error_is_that_of_the_outputs(monkeypatch, columns, rows_at_once):
    monkeypatch.setattr(gptq, "AT_ONCE", rows_at_once * columns)
    generator = torch.Generator().manual_seed(0)
    X, W = torch.randn(40, columns, generator=generator), torch.randn(9, columns, generator=generator)
    Q = W + 0.1 * torch.randn(9, columns, generator=generator)
    expected = float(((W - Q) @ X.t()).norm() / (W @ X.t()).norm())
    assert float(gptq.relative_error(W, Q, X.t() @ X / 40)) == pytest.approx(expected, rel=1e-4)


def test_an_error_of_a_ten_thousandth_in_the_hessian_is_harmless():
    generator = torch.Generator().manual_seed(0)
    mixing = torch.randn(256, 16, generator=generator)
    X = torch.randn(2000, 16, generator=generator) @ mixing.t() + torch.randn(2000, 256, generator=generator)
    W, H = torch.randn(64, 256, generator=generator), X.t() @ X / len(X)
    config, params = QuantConfig(bits=4, group_size=32), gptq.Gptq.Params()

    def loss(relative):
        """Of what is found with errors of that size, by the exact Hessian."""
        noise = torch.randn(256, 256, generator=generator).triu()
        noise = noise + noise.triu(1).t()
        found = gptq.solve(W, H + relative * float(H.norm() / noise.norm()) * noise, config, params)
        group = found.g_idx.long()
        return float(gptq.energy(W - found.scales[:, group] * (found.codes - found.zeros[:, group]), H))

    exact = loss(0.0)
    assert loss(1e-4) == pytest.approx(exact, rel=0.005)
    assert loss(1e-1) > 1.02 * exact  # an error that matters shows


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_a_hessian_from_tensor_cores_is_right_to_a_ten_thousandth(dtype):
    X = (torch.randn(20000, 1000, device="cuda") * torch.logspace(-1, 1, 1000, device="cuda")).to(dtype)
    hessian = gptq.Hessian(1000, X.device, with_cross=True)
    for part in X.split(7000):
        hessian.add(part, part)
    H, C = hessian.finish()
    exact = X.double().t() @ X.double() / len(X)
    for found in (H, C):
        assert float((found.double() - exact).norm() / exact.norm()) < 3e-4


@pytest.mark.gpu
def test_a_hessian_on_the_host_gives_the_same_factor_in_the_memory_of_one_copy():
    X = torch.randn(20000, 9000, device="cuda")
    H, perm = X.t() @ X / len(X), torch.randperm(9000, device="cuda")
    del X
    expected, good = gptq.try_factor(H, perm, 0.1, 0.1)
    assert bool(good)
    H = H.cpu().pin_memory()
    before = torch.cuda.memory_allocated()
    torch.cuda.reset_peak_memory_stats()
    U, good = gptq.try_factor(H, perm, 0.1, 0.1)
    assert torch.equal(U, expected)
    assert torch.cuda.max_memory_allocated() - before < 1.6 * H.numel() * H.element_size()
