import pytest
import torch
from torch import nn

import qcore
from qcore import ModelAdapter, ModelError
from qcore.adapter import linears_in
from qcore.discovery import find_adapter, find_block_list
from qcore.plugins import installed
from qcore.streaming import ModuleWeights
from qcore.testing import TinyModel, check_adapter

CPU = torch.device("cpu")


def experts():
    """A block with two experts, whose linears share inputs only inside one expert."""
    block = nn.Module()
    block.gate = nn.Linear(4, 2)
    block.experts = nn.ModuleList()
    for _ in range(2):
        expert = nn.Module()
        expert.up, expert.gate, expert.down = nn.Linear(4, 8), nn.Linear(4, 8), nn.Linear(8, 4)
        block.experts.append(expert)
    return block


def test_a_star_makes_one_group_per_expert():
    adapter = ModelAdapter("moe", (), "layers", (("gate",), ("experts.*.gate", "experts.*.up"), ("experts.*.down",)))
    assert adapter.groups_in(experts()) == [
        ("gate",),
        ("experts.0.gate", "experts.0.up"),
        ("experts.1.gate", "experts.1.up"),
        ("experts.0.down",),
        ("experts.1.down",),
    ]


def test_a_linear_in_no_group_is_named():
    adapter = ModelAdapter("moe", (), "layers", (("gate",), ("experts.*.gate", "experts.*.up")))
    with pytest.raises(ModelError) as error:
        adapter.groups_in(experts())
    assert "adapter 'moe'" in str(error.value)
    assert "experts.0.down" in str(error.value)


def test_names_a_block_lacks_are_skipped_so_that_blocks_may_differ():
    adapter = ModelAdapter("one", (), "layers", (("gate", "absent"), ("also.absent",), ("experts.*.*",)))
    assert adapter.groups_in(experts())[0] == ("gate",)


def test_blocks_that_are_not_there_are_named():
    adapter = ModelAdapter("lost", (), "model.layers", (("gate",),))
    with pytest.raises(
        ModelError, match=r"adapter 'lost' expects decoder blocks at 'model.layers'; TinyModel has none"
    ):
        adapter.find_blocks(TinyModel())


def test_a_model_without_decoder_blocks_is_refused():
    class Plain(nn.Module):
        def __init__(self):
            super().__init__()
            self.body = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4))

    with pytest.raises(ModelError, match="Plain has no decoder blocks"):
        qcore.quantize(Plain(), "rtn")


def test_the_heaviest_list_of_alike_blocks_is_taken():
    model = TinyModel()
    model.heads = nn.ModuleList(nn.Linear(64, 4) for _ in range(5))
    model.odd = nn.ModuleList([nn.Linear(640, 640), nn.LayerNorm(640)])
    assert find_block_list(model) == "blocks"


def test_the_generic_adapter_finds_shared_inputs_and_says_what_it_assumed():
    model = TinyModel()
    adapter = find_adapter(model, ModuleWeights(model), installed(), CPU)
    assert adapter.name == "generic"
    assert adapter.blocks == "blocks"
    assert adapter.linear_groups == TinyModel.adapter.linear_groups
    assert any("blocks" in note for note in adapter.notes)
    check_adapter(adapter, TinyModel())


def test_an_adapter_may_be_asked_for_by_name(llama):
    model = qcore.quantize(llama, "rtn", group_size=32, adapter="generic")
    assert qcore.report(model)["adapter"] == "generic"
    assert qcore.report(model)["assumed"]
    with pytest.raises(qcore.PluginError, match=r"no model is called 'lama'. Did you mean 'llama'"):
        qcore.quantize(TinyModel(), "rtn", adapter="lama")


@pytest.mark.parametrize(
    ("groups", "says"),
    [
        ((("left", "right"), ("out",), ("gate", "up", "down")), r"do not share one input"),
        ((("left", "right"), ("gate", "up"), ("out",), ("down",)), r"groups run in the order"),
        ((("left", "right"), ("out",), ("gate",), ("up",)), r"down"),
    ],
)
def test_check_adapter_tells_a_wrong_declaration(groups, says):
    wrong = ModelAdapter("wrong", (), "blocks", groups, before_blocks=("embed",))
    with pytest.raises((AssertionError, ModelError), match=says):
        check_adapter(wrong, TinyModel())


def test_linears_are_listed_in_module_order():
    assert linears_in(TinyModel().blocks[0]) == ["left", "right", "out", "gate", "up", "down"]
