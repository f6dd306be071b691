"""What each of two processes does for test_ranks.py: python two_processes.py SCENARIO FOLDER, with torchrun's environment."""

import json
import os
import signal
import sys
from datetime import timedelta
from pathlib import Path

import torch
import torch.distributed as dist

import qcore
from qcore.plugins import installed
from qcore.testing import TinyModel, tiny_tokens, with_tiny_adapter

RANK = int(os.environ.get("RANK", "0"))
TOKENS = list(torch.randint(0, 320, (7, 32), generator=torch.Generator().manual_seed(0)))
SETTINGS = {"bits": 4, "group_size": 32, "calibration": TOKENS, "samples": 7, "seqlen": 32, "batch_size": 1}
GPTQ, AUTOROUND = (installed().get("algorithm", name) for name in ("gptq", "autoround"))
TUNING = {**SETTINGS, "batch_size": None}


class Means(qcore.Algorithm):
    """Sums what `observe` shows by itself and knows nothing of processes; its grids follow from the inputs' means."""

    name = "means"

    def quantize_block(self, block):
        results = {}
        for name, linear in block.linears.items():
            total = torch.zeros(linear.weight.shape[1])
            block.observe([name], lambda _, x, total=total: total.add_(x.square().sum(0)))
            scale = total.mean().sqrt() / 100 + 1e-3
            groups = -(-linear.weight.shape[1] // linear.config.group_size)
            scales = torch.full((len(linear.weight), groups), float(scale)).half()
            g_idx = qcore.grid.group_index(linear.weight.shape[1], linear.config.group_size)
            codes = (linear.weight / scales.float()[:, g_idx.long()] + 8).round().clamp(0, 15).byte()
            results[name] = qcore.QuantizedWeight(
                codes, scales, torch.full_like(scales, 8, dtype=torch.int32), g_idx, linear.config, linear.bias
            )
            block.replace(name, results[name])
        return results


class Doomed(GPTQ):
    """GPTQ, but rank 1 is killed, or fails, in its second block, where DOOM says so."""

    def quantize_block(self, block):
        if RANK == 1 and block.index == 1:
            if os.environ["DOOM"] == "fails":
                raise qcore.ModelError("rank 1 has had enough.")
            if os.environ["DOOM"] == "killed":
                os.kill(os.getpid(), signal.SIGKILL)
        return super().quantize_block(block)


class DoomedTuning(AUTOROUND):
    """AutoRound, but rank 1 is killed when it is about to tune its second block."""

    begun = 0

    def _check_batches(self, targets):
        if RANK == 1 and self.begun == 1:
            os.kill(os.getpid(), signal.SIGKILL)
        self.begun += 1
        super()._check_batches(targets)


class Count:
    """Notes the events of a run."""

    def __init__(self):
        self.seen = []

    @qcore.hookimpl
    def qcore_run_started(self, plan):
        self.seen.append(f"resumed at {plan['resumed_at']}")

    @qcore.hookimpl
    def qcore_block_finished(self, index):
        self.seen.append(f"block {index}")


def error_of(call):
    try:
        call()
    except qcore.QcoreError as error:
        return f"{type(error).__name__}: {error}"
    return None


def runs(folder):
    """Runs of all kinds, one after another in one process group; what each process saw goes to seen-RANK.json."""
    model, notes = folder / "model", {}
    plugins = qcore.plugins.Plugins()
    counted = Count()
    plugins.manager.register(counted)
    qcore.quantize(model, "gptq", output=folder / "exact", deterministic=True, plugins=plugins, **SETTINGS)
    notes["events"] = counted.seen
    together = {**SETTINGS, "true_sequential": False}
    qcore.quantize(model, "gptq", output=folder / "together", deterministic=True, **together)
    qcore.quantize(model, "gptq", output=folder / "near", **SETTINGS)
    qcore.quantize(model, "rtn", activation_weighting=True, output=folder / "weighted", deterministic=True, **SETTINGS)
    qcore.quantize(model, Means(), output=folder / "unaware", **SETTINGS)
    qcore.quantize(model, "autoround", output=folder / "rounded", deterministic=True, bs=2, iters=4, **TUNING)
    settings = {"calibration": tiny_tokens(), "adapter": "tiny", "device": "cpu", "plugins": with_tiny_adapter()}
    tiny = qcore.quantize(TinyModel(), "gptq", group_size=32, batch_size=1, deterministic=True, **settings)
    torch.save({n: m.weight_source().codes for n, m in tiny.named_modules() if isinstance(m, qcore.QuantLinear)},
               folder / f"tiny-{RANK}.pt")  # fmt: skip
    notes["settings"] = error_of(
        lambda: qcore.quantize(model, "rtn", output=folder / "differs", **{**SETTINGS, "bits": 4 + RANK})
    )
    other = [tokens.roll(RANK) for tokens in TOKENS]
    notes["tokens"] = error_of(
        lambda: qcore.quantize(model, "gptq", output=folder / "differs", **{**SETTINGS, "calibration": other})
    )
    few = {**SETTINGS, "batch_size": 7}
    notes["few"] = error_of(lambda: qcore.quantize(model, "gptq", output=folder / "few", **few))
    (folder / f"seen-{RANK}.json").write_text(json.dumps(notes))


def dies(folder):
    """A run in which one process dies."""
    if os.environ.get("TUNED"):
        qcore.quantize(folder / "model", DoomedTuning(bs=2, iters=4), output=folder / "dies", **TUNING)
    else:
        qcore.quantize(folder / "model", Doomed(), output=folder / "dies", deterministic=True, **SETTINGS)


if __name__ == "__main__":
    torch.set_num_threads(1)
    scenario, place = sys.argv[1:]
    if scenario == "runs":  # a group of the caller's own
        dist.init_process_group("gloo", timeout=timedelta(seconds=300))
        runs(Path(place))
        dist.destroy_process_group()
    else:  # as the command line does it
        from qcore.ranks import connect

        try:
            with connect("cpu"):
                dies(Path(place))
        except qcore.QcoreError as error:
            sys.exit(str(error))
