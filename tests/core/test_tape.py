"""A tape runs again what a function ran, on the same tensors, to the bit."""

from __future__ import annotations

import pytest
import torch

from qcore import tape


def test_it_runs_again_what_the_function_did_with_new_values():
    weight, x, state = torch.randn(8, 8), torch.randn(3, 8), torch.zeros(3, 8)

    def function():
        scale = (weight * 2).sum()  # of constants alone
        y = torch.nn.functional.silu(x @ weight.t()).view(3, 2, 4).transpose(1, 2).reshape(3, 8) / scale
        state.add_(y)
        values, places = torch.topk(state, 3)
        y = y.bfloat16().float()
        return torch.cat([values, places.float(), torch.nn.functional.layer_norm(y, (8,))], 1)

    replay = tape.record(function, [weight])
    for _ in range(3):
        x.normal_()
        before = state.clone()
        expected = function()
        after = state.clone()
        state.copy_(before)
        assert torch.equal(replay(), expected)
        assert torch.equal(state, after)


def test_only_what_changes_is_run_again():
    weight, x, calls = torch.randn(4, 4), torch.randn(4), []
    keep = tape._changing
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(tape, "_changing", lambda *given: calls.extend(keep(*given)) or keep(*given))
        tape.record(lambda: (weight.t().exp() * x.view(1, 4)[0]).transpose(0, 1) + torch.ones(4), [weight])
    assert [str(call[0]) for call in calls] == ["aten.mul.Tensor", "aten.add.Tensor"]


def test_a_constant_that_the_function_writes_to_is_none():
    weight, x = torch.zeros(4), torch.ones(4)

    def function():
        made = torch.zeros(4)
        made.add_(x)
        weight.add_(made)
        return weight * 2

    replay = tape.record(function, [weight])
    start = float(weight[0])
    assert replay().tolist() == [2 * (start + 1)] * 4
    assert replay().tolist() == [2 * (start + 2)] * 4


@pytest.mark.parametrize(
    ("function", "reason"),
    [
        (lambda x: x * float(x.sum()), "depends on values"),
        (lambda x: x[x > 0], "depends on values"),
        (lambda x: torch.nn.functional.dropout(x, 0.5), "draws random numbers"),
    ],
)
def test_what_cannot_be_replayed_is_refused(function, reason):
    with pytest.raises(tape.Unfit, match=reason):
        tape.record(lambda: function(torch.randn(8)), [])


def test_indices_may_be_numbers():
    x, places = torch.randn(8), torch.tensor([3, 1])
    replay = tape.record(lambda: x[places], [])
    places.copy_(torch.tensor([7, 0]))
    assert torch.equal(replay(), x[[7, 0]])
