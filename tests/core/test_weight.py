import dataclasses

import pytest
import torch

from qcore import CheckpointError, QuantConfig, QuantizedWeight
from qcore.testing import random_weight

CONFIG = QuantConfig(bits=4, group_size=16, sym=False)


def parts(**changes):
    """The arguments of a sound weight, 8 x 40 in three groups, the last one shorter; some of them changed."""
    good = random_weight(8, 40, CONFIG, bias=True)
    return {**{field.name: getattr(good, field.name) for field in dataclasses.fields(good)}, **changes}


def put(tensor, place, value):
    changed = tensor.clone()
    changed[place] = value
    return changed


GOOD = parts()
PROBLEMS = {
    "codes must be a matrix": {"codes": GOOD["codes"].flatten()},
    "codes must be uint8, found torch.int32": {"codes": GOOD["codes"].int()},
    "code 16 is beyond 15 (4 bits)": {"codes": put(GOOD["codes"], (3, 3), 16)},
    "scales must be [8, 3], found [8, 2]": {"scales": GOOD["scales"][:, :2]},
    "scales must be floating point": {"scales": GOOD["zeros"]},
    "scales hold NaN or Inf": {"scales": put(GOOD["scales"], (0, 0), float("nan"))},
    "zeros must be [8, 3], found [3, 8]": {"zeros": GOOD["zeros"].t()},
    "zeros must be int32 or floating point": {"zeros": GOOD["zeros"].long()},
    "g_idx must be [40], found [39]": {"g_idx": GOOD["g_idx"][:39]},
    "g_idx must be int32": {"g_idx": GOOD["g_idx"].long()},
    "g_idx spans 0 to 3, expected 0 to 2": {"g_idx": put(GOOD["g_idx"], 0, 3)},
    "g_idx spans -1 to 2": {"g_idx": put(GOOD["g_idx"], 0, -1)},
    "bias must be [8], found [7]": {"bias": GOOD["bias"][:7]},
    "sym promises zeros of 8": {"config": QuantConfig(bits=4, group_size=16, sym=True)},
}


@pytest.mark.parametrize("problem", PROBLEMS)
def test_a_contradiction_is_named(problem):
    with pytest.raises(CheckpointError) as error:
        QuantizedWeight(**parts(**PROBLEMS[problem]))
    assert problem in str(error.value)


def test_an_empty_weight_is_refused():
    empty = torch.zeros(0, 40)
    with pytest.raises(CheckpointError, match="empty"):
        QuantizedWeight(empty.to(torch.uint8), torch.zeros(0, 3), torch.zeros(0, 3), GOOD["g_idx"], CONFIG)


@pytest.mark.parametrize("bits", range(2, 9))
@pytest.mark.parametrize("act_order", [False, True])
def test_journal_form_comes_back_bit_for_bit(bits, act_order):
    weight = random_weight(8, 40, QuantConfig(bits=bits, group_size=16, sym=False), act_order, bias=True)
    again = QuantizedWeight.from_tensors(weight.to_tensors(), weight.config)
    assert again.equal(weight)
    assert again.act_order is act_order


def test_a_journal_form_of_another_width_is_refused():
    with pytest.raises(CheckpointError, match="4 words for 40 columns"):
        QuantizedWeight.from_tensors(random_weight(8, 40, QuantConfig(bits=3, group_size=16)).to_tensors(), CONFIG)


def test_dequantize_follows_g_idx():
    weight = random_weight(8, 40, CONFIG, act_order=True)
    W = weight.dequantize()
    for column in (0, 17, 39):
        group = int(weight.g_idx[column])
        step, zero = weight.scales[:, group].float(), weight.zeros[:, group]
        assert torch.equal(W[:, column], step * (weight.codes[:, column].float() - zero))
    assert torch.equal(weight.dequantize(torch.float16), W.half())


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
def test_some_rows_at_a_time_give_the_same_bits(monkeypatch, dtype):
    weight = QuantizedWeight(**GOOD)
    whole = weight.dequantize(dtype)
    monkeypatch.setattr("qcore.weight.AT_ONCE", 3 * 40)
    assert torch.equal(weight.dequantize(dtype), whole)


@pytest.mark.parametrize("name", ["codes", "scales", "zeros", "g_idx", "bias"])
def test_a_difference_is_named_by_its_part(name):
    weight = random_weight(8, 40, CONFIG, act_order=True, bias=True)
    value = getattr(weight, name)
    changed = dataclasses.replace(weight, **{name: value.flip(0)})
    assert weight.difference(changed) == name
    assert not weight.equal(changed)


def test_another_dtype_or_a_missing_bias_is_a_difference():
    weight = random_weight(8, 40, CONFIG, bias=True)
    assert weight.difference(dataclasses.replace(weight, scales=weight.scales.float())) == "scales"
    assert weight.difference(dataclasses.replace(weight, bias=None)) == "bias"
    assert "config" in weight.difference(
        dataclasses.replace(weight, config=QuantConfig(bits=4, group_size=17, sym=False))
    )
