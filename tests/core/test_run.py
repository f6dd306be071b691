import json
import multiprocessing
import os
import random
import shutil
import signal
import subprocess
import threading

import pytest
import torch

import qcore
from qcore import CheckpointError, ConfigError, ModelFolder, PluginError, RunError, blocks, run
from qcore.journal import Journal
from qcore.testing import random_weight

TEXT = " ".join(f"The {n} quick brown foxes jump over {n * n} lazy dogs, and then they sleep." for n in range(60))

#: everything of a run that a resumed one must repeat
SETTINGS = {"algo": "gptq", "bits": 4, "group_size": 32, "samples": 8, "seqlen": 32, "calibration": [TEXT]}


def partial_of(output):
    return output.with_name(f"{output.name}.partial")


def blocks_in(output):
    return sorted(path.name for path in partial_of(output).glob("block-*"))


class Killer:
    """Interrupts a run, as Ctrl-C does, when a block is finished."""

    def __init__(self, after):
        self.after = after

    @qcore.hookimpl
    def qcore_block_finished(self, index):
        if index == self.after:
            raise KeyboardInterrupt


@pytest.fixture
def interrupted(watched):
    """A function that starts a run and interrupts it after a block: interrupted(model, output, after, **settings)."""

    def start(model, output, after=0, **changes):
        with pytest.raises(KeyboardInterrupt):
            qcore.quantize(model, output=output, plugins=watched(Killer(after)), **{**SETTINGS, **changes})
        assert not output.exists()

    return start


@pytest.fixture(scope="module")
def uninterrupted(llama_folder, tmp_path_factory):
    """The output of a run that was never interrupted."""
    return qcore.quantize(llama_folder, output=tmp_path_factory.mktemp("runs") / "whole", **SETTINGS)


@pytest.mark.parametrize("after", [0, 1, 2])
def test_a_run_killed_after_any_block_resumes_to_the_same_bytes(
    llama_folder, uninterrupted, interrupted, watched, tmp_path, same_files, after
):
    output = tmp_path / "out"
    interrupted(llama_folder, output, after)
    assert len(blocks_in(output)) == after + 1
    again = []

    class Watcher:
        @qcore.hookimpl
        def qcore_run_started(self, plan):
            again.append(plan["resumed_at"])

        @qcore.hookimpl
        def qcore_block_finished(self, index):
            again.append(f"block {index}")

    qcore.quantize(llama_folder, output=output, plugins=watched(Watcher()), **SETTINGS)
    assert again == [after + 1, *(f"block {index}" for index in range(after + 1, 3))]
    same_files(output, uninterrupted)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["out"]


def test_a_run_killed_again_and_again_ends_in_the_same_bytes(
    llama_folder, uninterrupted, interrupted, tmp_path, same_files
):
    output = tmp_path / "out"
    for after in range(3):
        interrupted(llama_folder, output, after)
    qcore.quantize(llama_folder, output=output, **SETTINGS)
    same_files(output, uninterrupted)


def test_a_run_killed_while_the_output_is_written_resumes(
    llama_folder, uninterrupted, tmp_path, same_files, monkeypatch
):
    from qcore import checkpoint

    output = tmp_path / "out"
    add = checkpoint.ShardWriter.add

    def interrupt(self, name, tensor):
        add(self, name, tensor)
        if "layers.1" in name:
            raise KeyboardInterrupt

    monkeypatch.setattr(checkpoint.ShardWriter, "add", interrupt)
    with pytest.raises(KeyboardInterrupt):
        qcore.quantize(llama_folder, output=output, **SETTINGS)
    monkeypatch.undo()
    assert not output.exists()
    assert len(blocks_in(output)) == 3
    qcore.quantize(llama_folder, output=output, **SETTINGS)
    same_files(output, uninterrupted)


def test_a_run_whose_memory_ran_out_resumes_with_the_batches_it_had(
    llama_folder, interrupted, tmp_path, same_files, monkeypatch
):
    forward, lengths = blocks.Block.forward, []

    def noted(self, hidden, *inputs, **more):
        lengths.append((self.index, len(hidden)))
        return forward(self, hidden, *inputs, **more)

    def full(self, hidden, *inputs, **more):
        if self.index == 1 and len(hidden) > 1:
            raise torch.OutOfMemoryError("CUDA out of memory.")
        return forward(self, hidden, *inputs, **more)

    with monkeypatch.context() as patched:
        patched.setattr(blocks.Block, "forward", full)
        whole = qcore.quantize(llama_folder, output=tmp_path / "whole", batch_size=4, **SETTINGS)
        interrupted(llama_folder, tmp_path / "out", 1, batch_size=4)
    monkeypatch.setattr(blocks.Block, "forward", noted)
    same_files(qcore.quantize(llama_folder, output=tmp_path / "out", batch_size=4, **SETTINGS), whole)
    assert {length for index, length in lengths if index == 0} == {4}
    assert {length for index, length in lengths if index > 0} == {1}
    monkeypatch.undo()
    interrupted(llama_folder, tmp_path / "other", 1, batch_size=4)
    assert not (partial_of(tmp_path / "other") / "batches.json").exists()


class SecondThoughts(qcore.Algorithm):
    """Tries one weight in replays and returns another."""

    name = "second_thoughts"

    def quantize_block(self, block):
        results = {}
        for name, linear in block.linears.items():
            block.replace(name, random_weight(*linear.weight.shape, linear.config, seed=1))
            means = []
            block.observe([name], lambda _, x, means=means: means.append(float(x.mean())))
            results[name] = random_weight(*linear.weight.shape, linear.config, seed=int(abs(means[0]) * 1e6))
        return results


def test_what_an_algorithm_returns_is_what_later_blocks_see(llama_folder, interrupted, tmp_path, same_files):
    whole = qcore.quantize(llama_folder, output=tmp_path / "whole", **{**SETTINGS, "algo": SecondThoughts()})
    interrupted(llama_folder, tmp_path / "out", 1, algo=SecondThoughts())
    qcore.quantize(llama_folder, output=tmp_path / "out", **{**SETTINGS, "algo": SecondThoughts()})
    same_files(tmp_path / "out", whole)


def test_a_process_killed_at_random_moments_ends_in_the_same_bytes(save_llama, tmp_path, same_files):
    model = save_llama(tmp_path / "model", num_hidden_layers=12)
    whole = qcore.quantize(model, output=tmp_path / "whole", **SETTINGS)
    processes = multiprocessing.get_context("forkserver")
    processes.set_forkserver_preload(["torch", "transformers.models.llama", "qcore.api"])
    output, chance, killed = tmp_path / "out", random.Random(0), 0
    while not output.exists():
        # killed 5 times a little after it got further than last time, once about when the output is written
        enough = 12 if killed == 5 else len(blocks_in(output)) + 1
        process = processes.Process(target=qcore.quantize, args=(model,), kwargs={"output": output, **SETTINGS})
        process.start()
        while process.is_alive() and (killed > 5 or len(blocks_in(output)) < enough):
            process.join(0.01)
        process.join(chance.random() * 0.05)
        process.kill()
        process.join()
        assert process.exitcode in (0, -signal.SIGKILL)
        assert output.exists() or process.exitcode
        killed += process.exitcode != 0
    assert killed >= 3
    same_files(output, whole)


def changed_copy(folder, target, change):
    """Copy a model folder, one weight changed."""
    from safetensors.torch import load_file, save_file

    shutil.copytree(folder, target)
    tensors = load_file(target / "model.safetensors")
    change(tensors)
    save_file(tensors, target / "model.safetensors", {"format": "pt"})
    return target


@pytest.mark.parametrize(
    ("changes", "named"),
    [
        ({"bits": 3}, "linears"),
        ({"group_size": 16}, "linears"),
        ({"sym": False}, "linears"),
        ({"overrides": ["down_proj:skip"]}, "model.layers.0.mlp.down_proj"),
        ({"damp_percent": 0.5}, "damp_percent"),
        ({"algo": "rtn"}, "algorithm"),
        ({"seed": 1}, "seed"),
        ({"samples": 4}, "samples"),
        ({"seqlen": 16}, "seqlen"),
        ({"calibration": "self"}, "calibration"),
        ({"batch_size": 2}, "batch_size"),
        ({"adapter": "generic"}, "adapter"),
    ],
)
def test_a_run_with_other_settings_than_the_journals_is_refused_with_the_difference(
    llama_folder, interrupted, tmp_path, changes, named
):
    output = tmp_path / "out"
    interrupted(llama_folder, output)
    with pytest.raises(RunError) as error:
        qcore.quantize(llama_folder, output=output, **{**SETTINGS, **changes})
    assert named in str(error.value)
    assert "--fresh" in str(error.value)
    assert len(blocks_in(output)) == 1
    assert not output.exists()


def test_an_output_that_another_run_finished_meanwhile_ends_this_one_before_any_work(
    llama_folder, tmp_path, monkeypatch
):
    from qcore import api

    output = tmp_path / "out"
    made = api.Job

    def slowly(*args, **settings):  # the other run is there first, after this one looked
        monkeypatch.setattr(api, "Job", made)
        qcore.quantize(llama_folder, "rtn", group_size=32, output=output)
        return made(*args, **settings)

    monkeypatch.setattr(api, "Job", slowly)
    with pytest.raises(CheckpointError, match="exists already"):
        qcore.quantize(llama_folder, output=output, **SETTINGS)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["out"]


def test_another_model_is_refused(llama_folder, interrupted, tmp_path):
    output = tmp_path / "out"
    interrupted(llama_folder, output)
    other = changed_copy(llama_folder, tmp_path / "other", lambda t: t["lm_head.weight"].mul_(2))
    with pytest.raises(RunError, match="differs in model"):
        qcore.quantize(other, output=output, **SETTINGS)
    config = json.loads((other / "config.json").read_text())
    shutil.copy(llama_folder / "model.safetensors", other)
    (other / "config.json").write_text(json.dumps({**config, "rms_norm_eps": 0.5}))
    with pytest.raises(RunError, match=r"differs in model: config.*rms_norm_eps"):
        qcore.quantize(other, output=output, **SETTINGS)


def test_calibration_text_that_changed_is_refused(llama_folder, interrupted, tmp_path):
    file, output = tmp_path / "text.txt", tmp_path / "out"
    file.write_text(TEXT)
    interrupted(llama_folder, output, calibration=str(file))
    file.write_text(TEXT.replace("quick", "slow"))
    with pytest.raises(RunError, match="calibration"):
        qcore.quantize(llama_folder, output=output, **{**SETTINGS, "calibration": str(file)})


def test_calibration_tokens_that_changed_are_refused_though_they_print_alike(llama_folder, interrupted, tmp_path):
    output = tmp_path / "out"
    ids = torch.zeros(1, 2000, dtype=torch.int64)  # too long to be printed whole
    other = ids.clone()
    other[0, 20] = 1
    assert repr(ids) == repr(other)
    interrupted(llama_folder, output, calibration=ids)
    with pytest.raises(RunError, match="calibration"):
        qcore.quantize(llama_folder, output=output, **{**SETTINGS, "calibration": other})


def test_text_sampled_from_one_model_is_not_used_for_another(llama_folder, tmp_path, monkeypatch):
    from qcore.algorithm import Algorithm

    class Stopping(Algorithm):
        name = "stopping"

        def quantize_block(self, block):
            raise KeyboardInterrupt

    settings = {"calibration": "self", "samples": 2, "seqlen": 8, "group_size": 32}
    output = tmp_path / "out"
    with pytest.raises(KeyboardInterrupt):
        qcore.quantize(llama_folder, Stopping(), output=output, **settings)
    other = changed_copy(
        llama_folder, tmp_path / "other", lambda t: t["lm_head.weight"].copy_(t["lm_head.weight"].flip(0))
    )
    qcore.quantize(other, output=output, **settings)
    qcore.quantize(other, output=tmp_path / "clean", **settings)
    assert (output / "model.safetensors").read_bytes() == (tmp_path / "clean" / "model.safetensors").read_bytes()


def test_self_sampled_text_is_not_sampled_again_on_resuming(llama_folder, interrupted, tmp_path, monkeypatch):
    from qcore_plugins.datasets.self_sampled import SelfSampled

    output = tmp_path / "out"
    interrupted(llama_folder, output, calibration="self")
    monkeypatch.setattr(SelfSampled, "load", lambda self, request: pytest.fail("sampled again"))
    qcore.quantize(llama_folder, output=output, **{**SETTINGS, "calibration": "self"})
    assert output.exists()


def test_fresh_starts_over(llama_folder, uninterrupted, interrupted, tmp_path, same_files):
    output = tmp_path / "out"
    interrupted(llama_folder, output, bits=3)
    qcore.quantize(llama_folder, output=output, fresh=True, **SETTINGS)
    same_files(output, uninterrupted)


def test_a_journal_without_blocks_does_not_bind(llama_folder, uninterrupted, tmp_path, same_files):
    output = tmp_path / "out"

    class Stopping(qcore.Algorithm):
        name = "stopping"

        def quantize_block(self, block):
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        qcore.quantize(llama_folder, output=output, **{**SETTINGS, "algo": Stopping(), "seed": 5, "samples": 3})
    qcore.quantize(llama_folder, output=output, **SETTINGS)
    same_files(output, uninterrupted)


@pytest.mark.parametrize("fresh", [False, True])
def test_two_runs_on_one_output_are_refused(llama_folder, interrupted, tmp_path, fresh):
    output = tmp_path / "out"
    interrupted(llama_folder, output)
    held = Journal(output)
    with pytest.raises(RunError, match="another run is writing"):  # and it takes nothing from the one that works
        qcore.quantize(llama_folder, output=output, fresh=fresh, **SETTINGS)
    assert len(blocks_in(output)) == 1
    held.close()
    qcore.quantize(llama_folder, output=output, fresh=fresh, **SETTINGS)
    assert output.exists()


def test_an_output_that_exists_is_refused_before_any_work(llama_folder, tmp_path):
    output = tmp_path / "out"
    output.mkdir()
    (output / "precious").write_text("")
    with pytest.raises(CheckpointError, match="exists already"):
        qcore.quantize(llama_folder, output=output, fresh=True, **SETTINGS)
    assert [path.name for path in tmp_path.rglob("*")] == ["out", "precious"]


@pytest.mark.parametrize(
    ("changes", "kind"),
    [
        ({"bits": 99}, ConfigError),
        ({"algo": "gtpq"}, PluginError),
        ({"format": "gtpq"}, PluginError),
        ({"damp": 0.1}, ConfigError),
        ({"overrides": ["nothing_like_it:bits=8"]}, ConfigError),
        ({"bits": 5}, ConfigError),
        ({"calibration": "topcs"}, qcore.CalibrationError),
        ({"calibration": [[999]]}, qcore.CalibrationError),
        ({"device": "cuda:99"}, ConfigError),
    ],
)
def test_a_run_that_cannot_start_leaves_nothing_behind(llama_folder, tmp_path, changes, kind):
    with pytest.raises(kind):
        qcore.quantize(llama_folder, output=tmp_path / "out", **{**SETTINGS, **changes})
    assert list(tmp_path.iterdir()) == []


class Unwatchful(qcore.Algorithm):
    """Asks for calibration and never looks at it."""

    name = "unwatchful"

    def quantize_block(self, block):
        return {name: random_weight(*linear.weight.shape, linear.config) for name, linear in block.linears.items()}


@pytest.mark.parametrize(
    "algorithm",
    [{"algo": "gptq"}, {"algo": "rtn", "grid": "mse", "activation_weighting": True}, {"algo": Unwatchful()}],
)
def test_activations_that_overflow_name_the_block(llama_folder, tmp_path, tokens, algorithm):
    name = "model.layers.1.post_attention_layernorm.weight"
    damaged = changed_copy(llama_folder, tmp_path / "damaged", lambda tensors: tensors[name].fill_(3e38))
    settings = {**SETTINGS, "calibration": tokens, **algorithm}
    with pytest.raises(qcore.QcoreError, match=r"model\.layers\.1.*NaN or Inf"):
        qcore.quantize(damaged, output=tmp_path / "out", **settings)
    assert not (tmp_path / "out").exists()


def test_calibration_may_hold_the_same_tensor_twice(llama_folder, tmp_path, tokens):
    settings = {**SETTINGS, "calibration": [tokens[0], tokens[0], tokens[0][:16]]}
    assert qcore.quantize(llama_folder, output=tmp_path / "out", **settings).exists()


def test_overrides_reach_the_linears_they_name(llama_folder, tmp_path):
    overrides = [
        "down_proj:bits=8,group_size=-1",
        "model.layers.0.self_attn.*:sym=false",
        "layers.2.mlp.gate_proj:skip",
    ]
    output = qcore.quantize(llama_folder, "rtn", group_size=32, overrides=overrides, output=tmp_path / "out")
    layers = {
        layer["name"]: (layer["bits"], layer["group_size"], layer["sym"]) for layer in qcore.inspect(output)["layers"]
    }
    assert len(layers) == 20
    assert layers["model.layers.1.mlp.down_proj"] == (8, -1, True)
    assert layers["model.layers.0.self_attn.q_proj"] == (4, 32, False)
    assert layers["model.layers.1.self_attn.q_proj"] == (4, 32, True)
    skipped = "model.layers.2.mlp.gate_proj"
    assert qcore.report(output)["skipped"] == [skipped]
    assert torch.equal(
        ModelFolder(output).tensor(f"{skipped}.weight"), ModelFolder(llama_folder).tensor(f"{skipped}.weight")
    )
    model = qcore.load(output)
    assert torch.equal(model.get_submodule(skipped).weight, ModelFolder(llama_folder).tensor(f"{skipped}.weight"))


def test_a_whole_block_may_be_skipped(llama_folder, tmp_path, tokens):
    settings = {**SETTINGS, "calibration": tokens, "overrides": ["model.layers.1.*:skip"]}
    output = qcore.quantize(llama_folder, output=tmp_path / "out", **settings)
    names = {layer["name"] for layer in qcore.inspect(output)["layers"]}
    assert len(names) == 14
    assert not any("layers.1." in name for name in names)


def test_the_journal_is_beside_the_output_and_gone_afterwards(llama_folder, interrupted, tmp_path):
    output = tmp_path / "deep" / "out"
    interrupted(llama_folder, output)
    assert sorted(path.name for path in partial_of(output).iterdir()) == [
        "block-00000.safetensors", "calibration.safetensors", "lock", "run.json",
    ]  # fmt: skip
    qcore.quantize(llama_folder, output=output, **SETTINGS)
    assert [path.name for path in output.parent.iterdir()] == ["out"]


def test_a_damaged_journal_is_named(llama_folder, interrupted, tmp_path):
    output = tmp_path / "out"
    interrupted(llama_folder, output)
    os.truncate(partial_of(output) / "block-00000.safetensors", 50)
    with pytest.raises(CheckpointError, match=r"block-00000.safetensors"):
        qcore.quantize(llama_folder, output=output, **SETTINGS)


def test_a_sharded_model_gives_the_same_weights(sharded_folder, uninterrupted, tmp_path):
    output = qcore.quantize(sharded_folder, output=tmp_path / "out", **SETTINGS)
    one, many = ModelFolder(uninterrupted), ModelFolder(output)
    assert set(one.tensors) == set(many.tensors)
    assert all(torch.equal(one.tensor(name), tensor) for name, tensor in many.read(many.tensors))


@pytest.fixture
def small_disk(tmp_path):
    """A file system of its own, and a function that changes its size."""
    disk = tmp_path / "disk"
    disk.mkdir()
    mounted = subprocess.run(["mount", "-t", "tmpfs", "-o", "size=200k", "tmpfs", disk], capture_output=True)
    if mounted.returncode:
        pytest.skip("mounting a tmpfs needs root")

    def resize(options):
        subprocess.run(["mount", "-o", f"remount,{options}", disk], check=True)

    yield disk, resize
    resize("rw")
    subprocess.run(["umount", disk], check=True)


@pytest.mark.parametrize("size", ["16k", "100k", "200k"])  # full at the first block, at a later one, at the output
def test_a_full_disk_is_said_so_and_the_run_resumes_when_there_is_space(
    llama_folder, uninterrupted, small_disk, same_files, size
):
    disk, resize = small_disk
    resize(f"size={size}")
    output = disk / "out"
    with pytest.raises(CheckpointError, match="the disk is full"):
        qcore.quantize(llama_folder, output=output, **SETTINGS)
    assert not output.exists()
    assert not list(disk.rglob("*.tmp"))
    assert not list(disk.rglob("*.part"))
    kept = len(blocks_in(output))
    resize("size=10m")
    qcore.quantize(llama_folder, output=output, **SETTINGS)
    same_files(output, uninterrupted)
    assert kept == {"16k": 0, "100k": kept, "200k": 3}[size]


def test_a_full_disk_leaves_no_half_written_save(llama, small_disk):
    disk, resize = small_disk
    model = qcore.quantize(llama, "rtn", group_size=32)
    resize("size=64k")
    with pytest.raises(CheckpointError, match="the disk is full"):
        qcore.save(model, disk / "out")
    assert list(disk.iterdir()) == []
    resize("size=10m")
    assert qcore.inspect(qcore.save(model, disk / "out"))["format"] == "gptq"


def test_a_disk_that_cannot_be_written_is_said_so(llama_folder, small_disk):
    disk, resize = small_disk
    resize("ro")
    with pytest.raises(CheckpointError, match=r"cannot be made|[Rr]ead-only"):
        qcore.quantize(llama_folder, output=disk / "out", **SETTINGS)


class OutOfOrder(qcore.Algorithm):
    """GPTQ's stand-in: rounds plainly, and fails at the block that it is told."""

    name = "out-of-order"
    needs_calibration = False

    def __init__(self, fails_at=None):
        super().__init__()
        self.fails_at = fails_at

    def quantize_block(self, block):
        if block.index == self.fails_at:
            raise RuntimeError("the GPU fell off")
        return {name: random_weight(*linear.weight.shape, linear.config) for name, linear in block.linears.items()}


def test_a_run_ahead_of_its_writing_writes_what_was_finished_whatever_ends_it(
    llama_folder, tmp_path, same_files, monkeypatch
):
    output = tmp_path / "out"
    settings = {"bits": 4, "group_size": 32, "format": "gptq"}
    whole = qcore.quantize(llama_folder, OutOfOrder(), output=tmp_path / "whole", **settings)
    monkeypatch.setattr(run, "_lead", lambda job: 2)
    write, waiting = Journal.write_block, threading.Event()

    def slow(journal, *inputs):
        waiting.wait(30)
        write(journal, *inputs)

    with monkeypatch.context() as patched:
        patched.setattr(Journal, "write_block", slow)
        threading.Timer(1, waiting.set).start()
        with pytest.raises(RuntimeError, match="fell off"):
            qcore.quantize(llama_folder, OutOfOrder(fails_at=2), output=output, **settings)
    assert len(blocks_in(output)) == 2
    qcore.quantize(llama_folder, OutOfOrder(), output=output, **settings)
    same_files(whole, output)


def test_what_goes_wrong_behind_a_run_ends_it(llama_folder, tmp_path, monkeypatch):
    def full(journal, *inputs):
        raise CheckpointError("writing block: the disk is full.")

    monkeypatch.setattr(run, "_lead", lambda job: 2)
    monkeypatch.setattr(Journal, "write_block", full)
    with pytest.raises(CheckpointError, match="the disk is full"):
        qcore.quantize(llama_folder, OutOfOrder(), output=tmp_path / "out", bits=4, group_size=32)
    assert not (tmp_path / "out").exists()


def test_a_block_is_packed_on_the_host_when_the_device_has_no_room_for_it(
    llama_folder, tmp_path, same_files, monkeypatch
):
    settings = {"bits": 4, "group_size": 32}
    whole = qcore.quantize(llama_folder, OutOfOrder(), output=tmp_path / "whole", **settings)
    write, refused = Journal.write_block, set()

    def tight(journal, index, *inputs):
        if index not in refused:
            refused.add(index)
            raise torch.OutOfMemoryError("CUDA out of memory.")
        write(journal, index, *inputs)

    monkeypatch.setattr(Journal, "write_block", tight)
    same_files(whole, qcore.quantize(llama_folder, OutOfOrder(), output=tmp_path / "out", **settings))
    assert refused == {0, 1, 2}
