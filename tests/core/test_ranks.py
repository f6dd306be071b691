"""Runs of several processes, on the CPU through gloo, against those of one."""

import importlib.util
import json
import os
import socket
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch

import qcore
from qcore import ConfigError, RunError
from qcore.ranks import Ranks, Sums, _merge, _spans, assign, connect
from qcore.testing import TinyModel, tiny_tokens, with_tiny_adapter

SCRIPT = Path(__file__).with_name("two_processes.py")
_spec = importlib.util.spec_from_file_location("two_processes", SCRIPT)
two = importlib.util.module_from_spec(_spec)
_spec.loader.exec_module(two)


def environment(rank, port, size=2, **more):
    told = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": size, "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
    return {**os.environ, **{key: str(value) for key, value in {**told, **more}.items()}}


def free_port():
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        return listener.getsockname()[1]


def start(scenario, folder, **more):
    """Start two processes of a scenario."""
    port = free_port()
    return [
        subprocess.Popen(
            [sys.executable, str(SCRIPT), scenario, str(folder)],
            env=environment(rank, port, **more),
            stderr=subprocess.PIPE,
            text=True,
        )
        for rank in (0, 1)
    ]


@pytest.fixture(scope="module")
def folder(save_llama, tmp_path_factory):
    """A folder with a model, and what two processes made of it."""
    place = tmp_path_factory.mktemp("ranks")
    save_llama(place / "model")
    for process in start("runs", place):
        _, errors = process.communicate(timeout=600)
        assert process.returncode == 0, errors
    return place


@pytest.fixture
def alone(folder, tmp_path):
    """A function that makes the same run in this process."""

    def run(algorithm, **changes):
        return qcore.quantize(folder / "model", algorithm, output=tmp_path / "alone", **{**two.SETTINGS, **changes})

    return run


@pytest.mark.parametrize(
    ("name", "algorithm", "changes"),
    [
        ("exact", "gptq", {}),
        ("together", "gptq", {"true_sequential": False}),
        ("weighted", "rtn", {"activation_weighting": True}),
        ("rounded", "autoround", {"batch_size": None, "bs": 2, "iters": 4}),
    ],
)
def test_two_processes_write_the_bytes_of_one(folder, alone, same_files, name, algorithm, changes):
    same_files(folder / name, alone(algorithm, deterministic=True, **changes))


def test_without_the_flag_they_agree_but_for_the_order_of_additions(folder, alone):
    one, other = qcore.report(alone("gptq"))["layers"], qcore.report(folder / "near")["layers"]
    assert [layer["name"] for layer in one] == [layer["name"] for layer in other]
    for mine, theirs in zip(one, other, strict=True):
        assert mine["error"] == pytest.approx(theirs["error"], rel=0.02)


def test_an_algorithm_that_knows_nothing_of_processes_gives_what_it_gives_alone(folder, alone, same_files):
    same_files(folder / "unaware", alone(two.Means()))


def test_a_model_in_memory_is_quantized_on_every_process(folder):
    settings = {"calibration": tiny_tokens(), "adapter": "tiny", "device": "cpu", "plugins": with_tiny_adapter()}
    model = qcore.quantize(TinyModel(), "gptq", group_size=32, batch_size=1, deterministic=True, **settings)
    for rank in (0, 1):
        codes = torch.load(folder / f"tiny-{rank}.pt")
        assert len(codes) == 12
        for name, found in codes.items():
            assert torch.equal(found, model.get_submodule(name).weight_source().codes)


def test_only_the_first_process_tells_of_the_run_and_all_refuse_what_does_not_fit(folder):
    first, second = (json.loads((folder / f"seen-{rank}.json").read_text()) for rank in (0, 1))
    assert first.pop("events") == ["resumed at 0", "block 0", "block 1", "block 2"]
    assert second.pop("events") == []
    assert first == second
    assert "RunError: rank 1 was started with something else than rank 0: linears" in first["settings"]
    assert "RunError: rank 1 was started with something else than rank 0: calibration: digest is" in first["tokens"]
    assert "ConfigError: 2 processes cannot share 1 calibration batches of 7" in first["few"]
    assert not (folder / "differs").exists()


@pytest.mark.parametrize("doom", ["killed", "fails"])
def test_a_dead_process_ends_the_run_which_resumes_with_one_or_two(save_llama, tmp_path, same_files, doom):
    save_llama(tmp_path / "model")
    first, second = start("dies", tmp_path, DOOM=doom)
    _, last_words = second.communicate(timeout=300)
    died = time.monotonic()
    _, errors = first.communicate(timeout=300)
    assert time.monotonic() - died < 60  # it notices at once; its own timeout is half an hour
    assert first.returncode == 1
    assert "rank 0 of 2 lost contact with the others" in errors
    if doom == "fails":
        assert "rank 1 failed: block model.layers.1: rank 1 has had enough." in errors
        assert "rank 1 has had enough." in last_words
    assert [path.name for path in (tmp_path / "dies.partial").glob("block-*")] == ["block-00000.safetensors"]
    if doom == "killed":
        qcore.quantize(tmp_path / "model", two.Doomed(), output=tmp_path / "dies", deterministic=True, **two.SETTINGS)
    else:
        for process in start("dies", tmp_path, DOOM="none"):
            _, errors = process.communicate(timeout=300)
            assert process.returncode == 0, errors
    whole = qcore.quantize(tmp_path / "model", "gptq", output=tmp_path / "whole", deterministic=True, **two.SETTINGS)
    same_files(tmp_path / "dies", whole)


def test_of_processes_that_share_a_batch_one_dies_and_one_resumes(save_llama, tmp_path):
    save_llama(tmp_path / "model")
    first, second = start("dies", tmp_path, TUNED=1)
    second.communicate(timeout=300)
    _, errors = first.communicate(timeout=300)
    assert first.returncode == 1
    assert "rank 0 of 2 lost contact with the others" in errors
    assert "Traceback" not in errors
    assert [path.name for path in (tmp_path / "dies.partial").glob("block-*")] == ["block-00000.safetensors"]
    done = qcore.quantize(tmp_path / "model", two.DoomedTuning(bs=2, iters=4), output=tmp_path / "dies", **two.TUNING)
    assert {layer["block"] for layer in qcore.report(done)["layers"]} == {0, 1, 2}


class Spelled:
    """A sum that spells out its additions, so that equal text is equal order."""

    def __init__(self, text=""):
        self.text = text

    def tensors(self):
        return [self]

    def __iadd__(self, other):
        self.text = f"({self.text} {other.text})"
        return self


class Post(Ranks):
    """A process that gets what others send from a list made beforehand."""

    def __init__(self, rank, size):
        super().__init__(deterministic=True)
        self.rank, self.size, self.letters = rank, size, []

    def send(self, tensors, source):
        tensors[0].text = self.letters.pop(0)


def added(size, batches):
    """What each of `size` processes has in the end."""
    letters, sums = [], [Sums(Post(rank, size), batches, Spelled) for rank in range(size)]
    for each in sums:
        for number in each.ranks.share(batches):
            each.of(number).text = str(number)
        _merge(each.nodes)
        assert [node[:2] for node in each.nodes] == list(_spans(each.ranks.share(batches)))
        letters += [total.text for _, _, total in each.nodes]
    for each in sums:
        each.ranks.letters = list(letters)
    return {each.finish().text for each in sums}


@pytest.mark.parametrize("processes", [2, 3, 4, 7, 13])
@pytest.mark.parametrize("batches", [13, 16])
def test_the_tree_adds_the_same_whoever_adds(processes, batches):
    assert added(processes, batches) == added(1, batches)
    assert added(1, 6) == {"(((0 1) (2 3)) (4 5))"}


def test_shares_are_neighbours_and_nearly_equal():
    ranks = [Ranks() for _ in range(3)]
    for number, each in enumerate(ranks):
        each.rank, each.size = number, 3
    assert [list(each.share(7)) for each in ranks] == [[0, 1], [2, 3], [4, 5, 6]]


def test_the_dearest_work_goes_first_and_to_the_one_with_least():
    assert assign([1, 1, 5, 3], 2) == [1, 1, 0, 1]
    assert assign([2, 2], 4) == [0, 1]


def test_a_group_that_cannot_be_says_so(monkeypatch):
    monkeypatch.setenv("WORLD_SIZE", "2")
    with pytest.raises(ConfigError, match="Start with torchrun"), connect("cpu"):
        pass
    for name, value in environment(0, 1).items():
        monkeypatch.setenv(name, value)
    monkeypatch.setenv("QCORE_RANK_TIMEOUT", "soon")
    with pytest.raises(ConfigError, match="QCORE_RANK_TIMEOUT='soon'"), connect("cpu"):
        pass
    monkeypatch.setenv("QCORE_RANK_TIMEOUT", "0.5")
    monkeypatch.setenv("MASTER_PORT", str(free_port()))
    monkeypatch.setenv("RANK", "1")
    with pytest.raises(RunError, match="cannot find each other"), connect("cpu"):
        pass
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 0)
    with pytest.raises(ConfigError, match="process 0 of this machine has no GPU: 0 are visible"), connect("auto"):
        pass
    with pytest.raises(ConfigError, match="--device cuda:1: each process takes a GPU of its own"), connect("cuda:1"):
        pass
