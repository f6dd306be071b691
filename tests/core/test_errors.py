import pytest

import qcore
from qcore.errors import name_list, suggest


@pytest.mark.parametrize(
    "name",
    ["BackendError", "CalibrationError", "CheckpointError", "ConfigError", "ModelError", "PluginError", "RunError"],
)
def test_every_error_is_a_qcore_error_and_no_key_error(name):
    kind = getattr(qcore, name)
    assert issubclass(kind, qcore.QcoreError)
    assert not issubclass(kind, (KeyError, ValueError))
    assert str(kind("a layer: what is wrong")) == "a layer: what is wrong"


def test_close_matches_are_suggested():
    assert suggest("gropu_size", ["bits", "group_size"]) == "Did you mean 'group_size'?"


def test_without_close_matches_all_known_names_are_given_sorted():
    assert suggest("zzz", ["sym", "bits"]) == "Known: bits, sym."


def test_nothing_known_reads_as_none():
    assert suggest("anything", []) == "Known: none."


def test_long_lists_are_cut_short_and_counted():
    assert name_list("abcdef", limit=2) == "a, b and 4 more"
    assert name_list("ab", limit=2) == "a, b"
    assert name_list([]) == "none"
