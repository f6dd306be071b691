import pytest
import torch

import qcore
from qcore import ConfigError, RunError, plan
from qcore import memory as room
from qcore.config import parse_bytes
from qcore.memory import Ferry, keeper, plan_room
from qcore.run import _halves
from qcore.testing import TinyModel, tiny_tokens

CPU = torch.device("cpu")
SETTINGS = {"group_size": 32, "calibration": tiny_tokens(), "adapter": TinyModel.adapter}


@pytest.mark.parametrize(
    ("given", "size"),
    [(None, None), (2**30, 2**30), ("4GiB", 4 * 2**30), ("4 gb", 4 * 10**9), ("1.5MiB", 3 * 2**19), ("2000000", 2 * 10**6)],
)  # fmt: skip
def test_sizes_are_bytes_or_text_with_a_unit(given, size):
    assert parse_bytes(given, "max_memory") == size


@pytest.mark.parametrize("given", ["", "GiB", "4 parsecs", "-1GiB", -5, 0, "12", True, 1.5, "1e9", "4GiBs"])
def test_other_sizes_are_refused_with_what_is_expected(given):
    with pytest.raises(ConfigError, match=r"max_memory=.*(expected bytes|expected 1048576 at least)"):
        qcore.quantize(TinyModel(), "gptq", max_memory=given, **SETTINGS)


def test_less_memory_means_smaller_batches_fewer_outputs_kept_and_hidden_states_elsewhere():
    def planned(limit):
        # Llama-2-7B, 128 x 2048 tokens in float16
        return plan_room(torch.device("meta"), limit, 128 * 2048, 2048, 4096, 11008, 2)

    plenty, tight, tighter = planned(100 * 2**30), planned(4 * 2**30), planned(2**30)
    assert (plenty.batch_size, plenty.keep) == (4, "device")
    assert tight.keep != "device"
    assert 4 > tight.batch_size >= tighter.batch_size >= 1
    assert plenty.memo_bytes > tight.memo_bytes > tighter.memo_bytes


def test_a_cpu_keeps_on_disk_what_is_too_much_for_its_memory(monkeypatch):
    monkeypatch.setattr(room, "free_memory", lambda device=None: 2**30)
    assert plan_room(CPU, None, 2**16, 2048, 4096, 11008, 4).keep == "disk"
    assert plan_room(CPU, None, 2**12, 2048, 4096, 11008, 4).keep == "device"


@pytest.mark.parametrize("keep", ["device", "host", "disk"])
def test_a_tensor_kept_anywhere_comes_back_as_it_was_and_takes_results(keep):
    tensors = [torch.randn(2, 3, 4).half() for _ in range(3)]
    kept = [keeper(CPU, keep)(x) for x in tensors]
    ferry = Ferry(CPU)
    assert all(torch.equal(a, b) for a, b in zip(tensors, ferry.bring(kept), strict=True))
    ferry.put(kept[1], wanted := tensors[1] + 1)
    ferry.wait()
    assert torch.equal(next(ferry.bring(kept, 1)), wanted)


def test_a_file_of_hidden_states_has_no_name_that_could_stay_behind(tmp_path, monkeypatch):
    monkeypatch.setattr(room.tempfile, "tempdir", str(tmp_path))
    kept = room.on_disk(torch.arange(6).view(2, 3))
    assert list(tmp_path.iterdir()) == []
    assert kept.tolist() == [[0, 1, 2], [3, 4, 5]]


@pytest.mark.parametrize("keep", ["host", "disk"])
def test_where_hidden_states_stay_changes_no_bit(weights_of, monkeypatch, keep):
    plain = weights_of(qcore.quantize(TinyModel(), "gptq", float_targets=0.5, **SETTINGS))
    with monkeypatch.context() as patched:
        patched.setattr(plan, "plan_room", lambda *_: room.Room(2, 0, keep))
        moved = weights_of(qcore.quantize(TinyModel(), "gptq", float_targets=0.5, **SETTINGS))
    assert all(plain[name].equal(moved[name]) for name in plain)


def test_a_limit_that_leaves_room_for_one_sequence_gives_what_batches_of_one_give(weights_of):
    one = weights_of(qcore.quantize(TinyModel(), "gptq", batch_size=1, **SETTINGS))
    tight = weights_of(qcore.quantize(TinyModel(), "gptq", max_memory="1MiB", seqlen=4096, **SETTINGS))
    assert all(one[name].equal(tight[name]) for name in one)


class Small(TinyModel):
    """Its blocks run out of memory: beyond `most` sequences at a time, or once, at the call numbered `once`."""

    def __init__(self, most=99, once=None):
        super().__init__()
        self.calls = 0
        for block in self.blocks:
            block.left.register_forward_pre_hook(self.check)
        self.most, self.once = most, once

    def check(self, _, args):
        self.calls += 1
        if len(args[0]) > self.most or self.calls - 1 == self.once:
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 20.00 MiB.")


@pytest.mark.parametrize("most", [1, 2])
def test_when_memory_runs_out_batches_are_halved_until_they_fit(weights_of, caplog, most):
    wanted = weights_of(qcore.quantize(TinyModel(), "gptq", batch_size=most, **SETTINGS))
    found = weights_of(qcore.quantize(Small(most), "gptq", batch_size=8, **SETTINGS))
    assert all(wanted[name].equal(found[name]) for name in wanted)
    assert f"batches of {2 * most} sequences are halved" in caplog.text


@pytest.mark.parametrize("float_targets", [0.0, 0.5])
def test_wherever_memory_runs_out_nothing_is_left_out_or_done_twice(float_targets):
    settings = {**SETTINGS, "batch_size": 3, "float_targets": float_targets}  # 8 sequences: 3, 3, 2
    whole = Small()
    wanted = [layer["error"] for layer in qcore.report(qcore.quantize(whole, "gptq", **settings))["layers"]]
    for once in range(0, whole.calls, 2 if float_targets else 1):
        model = Small(once=once)
        found = [layer["error"] for layer in qcore.report(qcore.quantize(model, "gptq", **settings))["layers"]]
        assert found == pytest.approx(wanted, rel=0.03), once
        assert model.calls > whole.calls, once


def test_when_not_even_one_sequence_fits_it_is_said(caplog):
    with pytest.raises(RunError, match=r"memory ran out with batches of 1 sequences \(CUDA out of memory.*seqlen"):
        qcore.quantize(Small(0), "gptq", **SETTINGS)
    assert "hidden states move off the device" in caplog.text


def test_an_algorithm_whose_batches_mean_something_is_not_given_others():
    with pytest.raises(RunError, match="memory ran out with batches of 8 sequences"):
        qcore.quantize(Small(0), "autoround", iters=1, **SETTINGS)


def test_a_model_whose_memory_ran_out_has_its_weights_again():
    model, plain = Small(0), TinyModel()
    with pytest.raises(RunError, match="memory ran out"):
        qcore.quantize(model, "gptq", **SETTINGS)
    assert all(torch.equal(a, b) for a, b in zip(model.parameters(), plain.parameters(), strict=True))


@pytest.mark.parametrize("count", [1, 2, 5])
@pytest.mark.parametrize("layout", [lambda b: (b, 7, 3), lambda b: (7, b, 3), lambda b: (b * 7, 3), lambda b: (b, 7)])
def test_halves_of_a_batch_are_whole_sequences(count, layout):
    ids = torch.arange(count)[:, None].expand(count, 7)
    shape = layout(count)
    x = torch.zeros(shape)
    if shape == (7, count, 3):
        x += torch.arange(count)[None, :, None]
    else:
        x += torch.arange(count).repeat_interleave(shape[0] // count).view(-1, *[1] * (len(shape) - 1))
    seen = [sorted(set(half.flatten().int().tolist())) for half in _halves(x, ids)]
    middle = count - count // 2
    assert seen == [list(range(middle)), list(range(middle, count))][: min(count, 2)]


# ---- on a GPU --------------------------------------------------------------------------------------------------------


@pytest.mark.gpu
@pytest.mark.parametrize("keep", ["device", "host", "disk"])
def test_hidden_states_come_and_go_while_a_gpu_works(keep):
    device = torch.device("cuda")
    tensors = [torch.randn(4, 512, 1024, device=device) for _ in range(8)]
    kept = [keeper(device, keep)(x) for x in tensors]
    wanted = [x.clone() for x in tensors]
    for turn in range(3):
        ferry = Ferry(device)
        for number, x in enumerate(ferry.bring(kept)):
            assert x.is_cuda
            result = (x @ torch.eye(1024, device=device)) + turn + number
            wanted[number] = wanted[number] + turn + number
            ferry.put(kept[number], result)
            del x, result
        ferry.wait()
    assert all(torch.allclose(a.cuda(), b) for a, b in zip(kept, wanted, strict=True))


@pytest.mark.gpu
def test_a_limit_holds_on_a_gpu_and_is_lifted_afterwards():
    device = torch.device("cuda")
    with room.limited(device, 2**30), pytest.raises(torch.OutOfMemoryError):
        torch.empty(2**31, dtype=torch.uint8, device=device)
    assert len(torch.empty(2**31, dtype=torch.uint8, device=device)) == 2**31


@pytest.mark.gpu
@pytest.mark.parametrize("keep", ["host", "disk"])
def test_where_hidden_states_stay_changes_no_bit_on_a_gpu(weights_of, monkeypatch, keep):
    found = []
    for place in ("device", keep):
        with monkeypatch.context() as patched:
            patched.setattr(plan, "plan_room", lambda *_, place=place: room.Room(2, 10**9, place))
            found.append(weights_of(qcore.quantize(TinyModel().cuda(), "gptq", device="cuda", **SETTINGS)))
    assert all(found[0][name].equal(found[1][name]) for name in found[0])
