import copy

import pytest
import torch
from torch import nn
from transformers.pytorch_utils import Conv1D

from qcore import QuantConfig, QuantLinear
from qcore.linear import replace_module, set_weight, weight_of
from qcore.plugins import installed
from qcore.testing import TinyModel, random_weight

BACKENDS = installed().usable("backend")


def quant_linear(weight, dtype=torch.float32):
    backends = list(installed().usable("backend").values())
    return QuantLinear(weight, backends, torch.device("cpu"), dtype, lambda: weight)


@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("act_order", [False, True])
def test_it_multiplies_by_the_dequantized_weight(bias, act_order):
    weight = random_weight(24, 40, QuantConfig(bits=3, group_size=16, sym=False), act_order, bias)
    x = torch.randn(2, 5, 40, generator=torch.Generator().manual_seed(0))
    expected = x @ weight.dequantize().t() + (weight.bias.float() if bias else 0)
    # the same product in the same type; only the order of 40 sums may differ
    assert torch.allclose(quant_linear(weight)(x), expected, atol=1e-6)


def test_it_says_what_it_is():
    text = repr(quant_linear(random_weight(24, 40, QuantConfig(bits=3, group_size=16))))
    assert "40 -> 24, 3 bits, group 16, sym, backend=" in text


def test_its_buffers_stay_out_of_the_state_dict():
    state = quant_linear(random_weight(24, 40, QuantConfig(group_size=16), bias=True)).state_dict()
    assert list(state) == ["bias"]


def test_it_can_be_copied_and_moved():
    weight = random_weight(24, 40, QuantConfig(group_size=16), bias=True)
    linear = quant_linear(weight)
    x = torch.randn(3, 40)
    moved = copy.deepcopy(linear).to("cpu")
    assert torch.equal(moved(x), linear(x))
    assert moved.weight_source().equal(weight)


@pytest.mark.parametrize("backend", [name for name, each in BACKENDS.items() if not each.unavailable()])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_a_model_that_changes_its_type_multiplies_by_the_same_weight(backend, dtype):
    weight = random_weight(32, 64, QuantConfig(group_size=32), bias=True)
    linear = QuantLinear(weight, BACKENDS.values(), torch.device("cpu"), torch.float32, lambda: weight, backend)
    before = {name: kept.clone() for name, kept in linear.named_buffers()}
    x = torch.randn(3, 64, generator=torch.Generator().manual_seed(0)).to(dtype)
    expected = x.float() @ weight.dequantize().t() + weight.bias.float()
    found = linear.to(dtype)(x)
    assert found.dtype == dtype
    assert torch.allclose(found.float(), expected, rtol=torch.finfo(dtype).eps, atol=2 * torch.finfo(dtype).eps)
    assert all(torch.equal(kept, before[name]) for name, kept in linear.named_buffers())


def test_weights_of_both_layouts_are_seen_as_out_by_in():
    linear, conv = nn.Linear(4, 6), Conv1D(6, 4)
    assert weight_of(linear).shape == weight_of(conv).shape == (6, 4)
    new = torch.arange(24.0).view(6, 4)
    for module in (linear, conv):
        set_weight(module, new)
        assert torch.equal(weight_of(module), new)
    x = torch.randn(2, 4)
    conv.bias.data.copy_(linear.bias.data)
    assert torch.allclose(linear(x), conv(x), atol=1e-5)


def test_a_module_is_replaced_by_its_dotted_name():
    model = TinyModel()
    replace_module(model, "blocks.1.left", nn.Identity())
    assert isinstance(model.blocks[1].left, nn.Identity)
    replace_module(model, "head", nn.Identity())
    assert isinstance(model.head, nn.Identity)
