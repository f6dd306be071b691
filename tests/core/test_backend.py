import pytest
import torch

from qcore import Backend, BackendError, MatmulSpec, QuantConfig, speed_at
from qcore.backend import choose, judge

SPEC = MatmulSpec(QuantConfig(bits=4, group_size=32), 64, 128, False, torch.float16, torch.device("cpu"))


def backend(name, rank, missing=None, reason=None):
    class Some(Backend):
        def unavailable(self):
            return missing

        def why_not(self, spec):
            assert missing is None, "asked about a layer although it cannot run at all"
            return reason

        def prepare(self, weight, spec):
            return {}

        def matmul(self, x, buffers, spec):
            return x

    Some.name, Some.rank = name, rank
    return Some()


def test_the_highest_rank_that_can_serve_a_layer_is_taken():
    backends = [backend("slow", 0), backend("fast", 9, reason="only 2 bits"), backend("middle", 5)]
    assert choose(backends, SPEC).name == "middle"
    assert choose(reversed(backends), SPEC).name == "middle"


def test_equal_ranks_are_settled_by_name_and_never_by_order():
    backends = [backend("b", 1), backend("a", 1)]
    assert choose(backends, SPEC).name == choose(reversed(backends), SPEC).name == "a"


def test_a_backend_asked_for_by_name_is_taken_or_nothing_is():
    backends = [backend("slow", 0), backend("fast", 9, reason="only 2 bits")]
    assert choose(backends, SPEC, "slow").name == "slow"
    with pytest.raises(BackendError) as error:
        choose(backends, SPEC, "fast")
    assert "fast: only 2 bits" in str(error.value)
    assert "slow" not in str(error.value)


def test_every_reason_is_given_when_none_can_serve():
    backends = [backend("cuda", 9, missing="no GPU"), backend("narrow", 5, reason="group 32")]
    with pytest.raises(BackendError) as error:
        choose(backends, SPEC)
    message = str(error.value)
    assert "64 -> 128, 4 bits, group 32, sym, torch.float16 on cpu" in message
    assert "cuda: no GPU" in message
    assert "narrow: group 32" in message


def test_no_backend_at_all_reads_so():
    with pytest.raises(BackendError, match="none installed"):
        choose([], SPEC)


def test_measured_speeds_go_before_ranks_where_the_leader_has_one():
    def measured(name, rank, speed):
        found = backend(name, rank)
        found.speed = lambda spec: speed
        return found

    fast, leader, unknown = measured("fast", 1, 2.0), measured("leader", 9, 1.5), backend("unknown", 5)
    assert choose([leader, unknown, fast], SPEC).name == "fast"
    assert choose([leader, unknown], SPEC).name == "leader"
    assert choose([unknown, fast], SPEC).name == "unknown"  # nobody measured the leader
    assert [verdict.backend.name for verdict in judge([unknown, leader, fast], SPEC)] == ["fast", "leader", "unknown"]


@pytest.mark.parametrize(("tokens", "speed"), [(1, 4.0), (4, 3.0), (16, 2.0), (64, 2.0)])
def test_a_table_of_speeds_is_read_between_its_entries(tokens, speed):
    assert speed_at({1: 4.0, 16: 2.0}, tokens) == pytest.approx(speed)
