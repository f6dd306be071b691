import pytest
import torch

import qcore
from qcore import grid
from qcore.plugins import installed
from qcore.testing import TinyModel, check_algorithm, tiny_tokens

RTN = installed().get("algorithm", "rtn")


@pytest.mark.parametrize("params", [{}, {"grid": "mse"}, {"grid": "mse", "activation_weighting": True}])
def test_conforms(params):
    check_algorithm(RTN, **params)


@pytest.mark.parametrize("bits", [2, 3, 4, 8])
@pytest.mark.parametrize("group_size", [16, 24, -1])
@pytest.mark.parametrize("sym", [True, False])
def test_every_code_is_the_nearest_on_its_grid(weights_of, bits, group_size, sym):
    original = TinyModel(depth=1)
    found = weights_of(qcore.quantize(TinyModel(depth=1), "rtn", bits=bits, group_size=group_size, sym=sym))
    for name, weight in found.items():
        W = original.get_submodule(name).weight
        scale, zero = (grid.spread(each.float(), weight.g_idx) for each in (weight.scales, weight.zeros))
        assert torch.equal(weight.codes.float(), grid.quantize(W, scale, zero, bits))
        assert not weight.act_order


def error_of(model, original, power=None):
    """Square error of all linears, each input column counted by its power."""
    total = 0.0
    for name, module in model.named_modules():
        if isinstance(module, qcore.QuantLinear):
            difference = module.weight_source().dequantize() - original.get_submodule(name).weight
            total += float((difference.square() * (1 if power is None else power[name])).sum())
    return total


@pytest.mark.parametrize("bits", [2, 3, 4])
@pytest.mark.parametrize("sym", [True, False])
def test_the_search_rounds_closer_than_minmax(bits, sym):
    settings = {"bits": bits, "group_size": 32, "sym": sym}
    plain, searched = (qcore.quantize(TinyModel(), "rtn", grid=each, **settings) for each in ("minmax", "mse"))
    assert error_of(searched, TinyModel()) < error_of(plain, TinyModel())


def test_activation_weighting_favours_the_inputs_that_are_there():
    original, power = TinyModel(depth=1), {}

    def note(name):
        def hook(module, args):
            power[name] = args[0].reshape(-1, args[0].shape[-1]).square().sum(0)

        return hook

    for name, module in original.named_modules():
        if name.startswith("blocks.0."):
            module.register_forward_pre_hook(note(name))
    original(torch.stack(tiny_tokens()))
    settings = {"bits": 2, "group_size": 32, "calibration": tiny_tokens(), "grid": "mse"}
    plain = qcore.quantize(TinyModel(depth=1), "rtn", **settings)
    weighted = qcore.quantize(TinyModel(depth=1), "rtn", activation_weighting=True, **settings)
    assert error_of(weighted, original, power) < error_of(plain, original, power)
    assert qcore.report(plain)["calibration"] is None
    assert qcore.report(weighted)["calibration"]["used"]["samples"] == 8


def test_no_calibration_is_asked_for():
    assert qcore.report(qcore.quantize(TinyModel(), "rtn", calibration="no such source"))["calibration"] is None
