"""AutoRound's step compiled for CPUs: the reference's, whatever the number of threads."""

import pytest
import torch
from qcore_plugins.algorithms import autoround, autoround_native, autoround_start, gptq_native

from qcore import BackendError, QuantConfig

needs_library = pytest.mark.skipif(
    gptq_native.why_not(torch.device("cpu")) is not None, reason="the CPU kernels are not built"
)


def made(bits: int, sym: bool, group_size: int, columns: int) -> tuple[autoround.Rounding, autoround.Rounding]:
    """Return the same parameters twice, some of the weights clipped."""
    config = QuantConfig(bits=bits, sym=sym, group_size=group_size)
    start = autoround_start.covering_start(torch.randn(40, columns, generator=torch.Generator().manual_seed(0)), config)
    start.scales, start.zeros = (x.t().contiguous().t() for x in (start.scales, start.zeros))  # as GPTQ leaves them
    pair = []
    for _ in range(2):
        generator = torch.Generator().manual_seed(1)
        r = autoround.Rounding(start, config)
        for x, low, high in ((r.alpha, 0.7, 1.0), (r.beta, 0.7, 1.0), (r.V, -0.4, 0.4)):
            x.uniform_(low, high, generator=generator)
        pair.append(r)
    return pair[0], pair[1]


@needs_library
@pytest.mark.parametrize("bits", [2, 3, 4, 8])
@pytest.mark.parametrize("sym", [True, False])
@pytest.mark.parametrize(("group_size", "columns"), [(32, 96), (20, 90), (-1, 77)])
@pytest.mark.parametrize("minmax_lr", [0.001, None])
def test_it_takes_the_references_step(
    bits: int, sym: bool, group_size: int, columns: int, minmax_lr: float | None
) -> None:
    """Sums over a group come in another order, so a range whose gradient is nearly zero may go the other way."""
    ours, reference = made(bits, sym, group_size, columns)
    assert ours.fused is autoround_native.step
    reference.fused = None
    G = torch.randn(40, columns, generator=torch.Generator().manual_seed(2))
    weights = torch.empty(40, columns), torch.empty(40, columns)
    for r, weight in zip((ours, reference), weights, strict=True):
        r.update(G, 0.01, minmax_lr, weight)
    assert torch.equal(ours._flat(ours.V), reference._flat(reference.V))
    for x, y in zip(ours.learned()[1:], reference.learned()[1:], strict=True):
        assert float((x != y).float().mean()) < 0.02
    assert torch.equal(ours.weight(torch.float32), weights[0])
    if minmax_lr is None:
        assert torch.equal(*weights)


@needs_library
def test_threads_do_not_change_a_bit() -> None:
    one, many = made(4, False, 32, 96)
    G = torch.randn(40, 96, generator=torch.Generator().manual_seed(2))
    weights = torch.empty(40, 96), torch.empty(40, 96)
    for r, weight, threads in zip((one, many), weights, (1, 3), strict=True):
        ranges = (r.low, r.high, r.alpha, r.beta)
        autoround_native.step(r.W, r.V, ranges, G, weight, 0.01, 0.001, 4, False, threads)
    assert torch.equal(*weights)
    assert all(torch.equal(x, y) for x, y in zip(one.learned(), many.learned(), strict=True))


@needs_library
def test_what_does_not_fit_is_refused() -> None:
    r, _ = made(4, True, 32, 96)
    ranges = (r.low, r.high, r.alpha, r.beta)
    with pytest.raises(BackendError, match=r"needs Q as float32 on the CPU, contiguous; found torch\.float16"):
        autoround_native.step(r.W, r.V, ranges, torch.zeros(40, 96), torch.zeros(40, 96).half(), 0.01, None, 4, True)
    with pytest.raises(BackendError, match="qc_autoround_step failed"):
        autoround_native.step(r.W, r.V, ranges, torch.zeros(40, 96), torch.zeros(40, 96), 0.01, None, 9, True)
