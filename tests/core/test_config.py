import pydantic
import pytest

from qcore import ConfigError, Override, QuantConfig
from qcore.config import resolve

NAMES = ["model.layers.0.self_attn.q_proj", "model.layers.0.mlp.down_proj", "model.layers.1.mlp.down_proj"]


def test_the_default_is_four_bits_in_groups_of_128():
    config = QuantConfig()
    assert (config.bits, config.group_size, config.sym, config.maxq) == (4, 128, True, 15)
    assert str(config) == "4 bits, group 128, sym"


@pytest.mark.parametrize(
    ("values", "named"),
    [
        ({"bits": 1}, "bits=1"),
        ({"bits": 9}, "bits=9"),
        ({"bits": "four"}, "bits='four'"),
        ({"bits": 3.5}, "bits=3.5"),
        ({"bits": None}, "bits=None"),
        ({"group_size": 0}, "group_size=0"),
        ({"group_size": -2}, "group_size=-2"),
        ({"group_size": "all"}, "group_size='all'"),
        ({"sym": "maybe"}, "sym='maybe'"),
    ],
)
def test_an_impossible_value_is_named_with_its_owner(values, named):
    with pytest.raises(ConfigError) as error:
        QuantConfig.parse(values, "the checkpoint")
    assert named in str(error.value)
    assert str(error.value).startswith("the checkpoint")


def test_an_unknown_option_gets_close_matches():
    with pytest.raises(ConfigError, match=r"no option 'gropu_size'. Did you mean 'group_size'"):
        QuantConfig.parse({"gropu_size": 64}, "quantize")


def test_a_config_cannot_be_changed():
    with pytest.raises(pydantic.ValidationError):
        QuantConfig().bits = 8


@pytest.mark.parametrize(
    ("pattern", "hits"),
    [
        ("*.down_proj", [1, 2]),
        ("down_proj", [1, 2]),
        ("mlp.*", [1, 2]),
        ("model.layers.0.*", [0, 1]),
        ("own_proj", []),
        (r"re:layers\.1\.", [2]),
        ("re:q_proj$", [0]),
        ("DOWN_PROJ", []),
    ],
)
def test_patterns_match_whole_parts_of_names(pattern, hits):
    override = Override(pattern=pattern)
    assert [i for i, name in enumerate(NAMES) if override.matches(name)] == hits


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("*.down_proj:bits=8", Override(pattern="*.down_proj", bits=8)),
        ("mlp.*:bits=8,group_size=-1", Override(pattern="mlp.*", bits=8, group_size=-1)),
        ("q_proj: sym=false", Override(pattern="q_proj", sym=False)),
        ("q_proj:skip", Override(pattern="q_proj", skip=True)),
        (r"re:layers\.[01]:skip", Override(pattern=r"re:layers\.[01]", skip=True)),
    ],
)
def test_the_command_line_form_says_the_same(text, expected):
    assert Override.from_text(text) == expected


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("down_proj", "has no changes"),
        (":bits=8", "has no changes"),
        ("re:down", "has no changes"),
        ("down_proj:bit=8", "Did you mean 'bits'"),
        ("down_proj:bits=99", "bits='99'"),
        ("re:(:skip", "not a regular expression"),
    ],
)
def test_a_malformed_override_is_quoted(text, says):
    with pytest.raises(ConfigError) as error:
        Override.from_text(text)
    assert says in str(error.value)
    assert text.split(":")[0] in str(error.value)


def test_later_overrides_win_and_untouched_fields_stay():
    plan = resolve(NAMES, QuantConfig(bits=4, group_size=32), [Override(pattern="down_proj", bits=8, sym=False),
                   Override(pattern="model.layers.1.*", bits=3), Override(pattern="q_proj", skip=True)])  # fmt: skip
    assert plan == {
        NAMES[0]: None,
        NAMES[1]: QuantConfig(bits=8, group_size=32, sym=False),
        NAMES[2]: QuantConfig(bits=3, group_size=32, sym=False),
    }


def test_a_linear_skipped_by_one_override_can_be_taken_back_by_a_later_one():
    plan = resolve(NAMES[:1], QuantConfig(), [Override(pattern="*", skip=True), Override(pattern="q_proj", bits=8)])
    assert plan[NAMES[0]] == QuantConfig(bits=8)


def test_an_override_that_matches_nothing_is_refused_with_the_closest_name():
    with pytest.raises(ConfigError) as error:
        resolve(NAMES, QuantConfig(), [Override(pattern="model.layers.0.mlp.down_prj", bits=8)])
    assert "matches none of the 3 linears" in str(error.value)
    assert NAMES[1] in str(error.value)


def test_an_override_to_an_impossible_group_names_its_pattern():
    with pytest.raises(ConfigError, match="override 'down_proj': group_size=0"):
        resolve(NAMES, QuantConfig(), [Override(pattern="down_proj", group_size=0)])
