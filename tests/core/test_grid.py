import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from qcore import ModelError, grid

BITS = st.sampled_from([2, 3, 4, 8])


def groups(seed, size, spread=1.0, shift=0.0):
    """Six groups of `size` weights, some all positive, all negative or all zero."""
    generator = torch.Generator().manual_seed(seed)
    w = torch.randn(6, size, generator=generator) * spread + shift
    w[3] = w[3].abs()
    w[4] = -w[4].abs()
    w[5] = 0
    return w


def choose(method, w, bits, sym):
    return grid.minmax_grid(w, bits, sym) if method == "minmax" else grid.search_grid(w, bits, sym)


def loss(w, grids, bits, importance=1.0):
    """The weighted square error of each group."""
    scale, zero = (each[:, None] for each in grids)
    return ((grid.dequantize(grid.quantize(w, scale, zero, bits), scale, zero) - w).square() * importance).sum(-1)


@given(st.sampled_from(["minmax", "mse"]), BITS, st.booleans(), st.integers(0, 99), st.integers(1, 40),
       st.sampled_from([1e-4, 0.02, 1.0, 300.0]), st.sampled_from([0.0, 5.0, -5.0]))  # fmt: skip
def test_every_grid_can_be_stored(method, bits, sym, seed, size, spread, shift):
    w = groups(seed, size, spread, shift)
    scale, zero = choose(method, w, bits, sym)
    assert torch.equal(scale, scale.half().float())  # rounded to float16 before any code is chosen
    assert bool(torch.isfinite(scale).all())
    assert bool((scale != 0).all())
    assert bool((zero == zero.round()).all())
    assert float(zero.min()) >= 1
    assert float(zero.max()) <= 2**bits - 1
    if sym:
        assert bool((zero == 2 ** (bits - 1)).all())


@given(BITS, st.booleans(), st.integers(0, 99))
def test_codes_are_the_nearest(bits, sym, seed):
    w = groups(seed, 16)
    scale, zero = (each[:, None] for each in grid.minmax_grid(w, bits, sym))
    codes = grid.quantize(w, scale, zero, bits)
    levels = grid.dequantize(torch.arange(2.0**bits), scale, zero)  # [groups, levels]
    nearest = (w[..., None] - levels[:, None]).abs().amin(-1)
    # a weight half way between two levels may take either: float32 rounding decides
    assert torch.allclose((grid.dequantize(codes, scale, zero) - w).abs(), nearest, atol=1e-6)
    assert float(codes.min()) >= 0
    assert float(codes.max()) <= 2**bits - 1


@given(BITS, st.booleans(), st.integers(0, 99))
def test_a_quantized_weight_quantizes_to_itself(bits, sym, seed):
    w = groups(seed, 16)
    scale, zero = (each[:, None] for each in grid.search_grid(w, bits, sym))
    codes = grid.quantize(w, scale, zero, bits)
    assert torch.equal(grid.quantize(grid.dequantize(codes, scale, zero), scale, zero, bits), codes)


@given(BITS, st.booleans(), st.integers(0, 99), st.booleans())
def test_a_search_is_never_worse_than_minmax(bits, sym, seed, weighted):
    w = groups(seed, 24)
    importance = torch.rand(24, generator=torch.Generator().manual_seed(seed)) + 0.01 if weighted else None
    weights = 1.0 if importance is None else importance
    plain = loss(w, grid.minmax_grid(w, bits, sym), bits, weights)
    searched = loss(w, grid.search_grid(w, bits, sym, importance), bits, weights)
    # the search sums its errors in another order: equal up to float32 rounding of about 24 terms
    assert bool((searched <= plain * (1 + 1e-5) + 1e-12).all())


@pytest.mark.parametrize("sym", [True, False])
@pytest.mark.parametrize("bits", [2, 3])
def test_a_search_gains_on_heavy_tails(bits, sym):
    w = groups(0, 128)[:3] ** 3
    plain = loss(w, grid.minmax_grid(w, bits, sym), bits).sum()
    searched = loss(w, grid.search_grid(w, bits, sym), bits).sum()
    assert float(searched) < 0.95 * float(plain)  # measured: 0.58 to 0.90


def test_a_search_favours_the_columns_that_matter():
    w = groups(1, 32)[:3]
    importance = torch.full((32,), 1e-3)
    importance[:4] = 1
    matter = (importance == 1).float()
    weighted = loss(w, grid.search_grid(w, 3, False, importance), 3, matter)
    assert float(weighted.sum()) < float(loss(w, grid.search_grid(w, 3, False), 3, matter).sum())


def test_a_symmetric_search_may_take_a_negative_scale():
    w = torch.tensor([[1.0, -0.9, 0.5, 0.1]])  # the largest weight is positive: only -8 of -8 … 7 reaches it
    scale, zero = grid.search_grid(w, 4, True)
    assert float(scale) < 0
    assert float(zero) == 8


@pytest.mark.parametrize("spread", [1e-2, 1e-3, 1e-4])
def test_small_weights_keep_their_precision_at_eight_bits(spread):
    w = groups(0, 64, spread)[:3]
    scale, zero = (each[:, None] for each in grid.minmax_grid(w, 8, True))
    error = (grid.dequantize(grid.quantize(w, scale, zero, 8), scale, zero) - w).norm() / w.norm()
    # uniform rounding of 255 steps over +-3 sigma gives 0.7 %; 2 % leaves room for a scale of few significant bits
    assert float(error) < 0.02


def test_weights_beyond_the_scale_type_are_refused():
    with pytest.raises(ModelError, match="scale of"):
        grid.minmax_grid(torch.tensor([[1e9, -1e9]]), 4, True)


@pytest.mark.parametrize(
    ("columns", "size", "count", "last"),
    [(64, 16, 4, 16), (40, 16, 3, 8), (40, -1, 1, 40), (8, 128, 1, 8), (5, 1, 5, 1)],
)
def test_groups_cover_every_column_and_the_last_may_be_shorter(columns, size, count, last):
    g_idx = grid.group_index(columns, size)
    assert g_idx.dtype == torch.int32
    assert grid.num_groups(columns, size) == count == int(g_idx.max()) + 1
    assert int((g_idx == count - 1).sum()) == last
    assert bool((g_idx.diff() >= 0).all())


def test_spread_gives_each_column_its_groups_value():
    per_group = torch.tensor([[1.0, 2.0], [3.0, 4.0]])
    assert grid.spread(per_group, torch.tensor([1, 0, 1], dtype=torch.int32)).tolist() == [[2, 1, 2], [4, 3, 4]]
