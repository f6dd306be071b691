"""Which configuration a Triton product takes: shipped where it was measured, elsewhere found by a short search and kept on disk.

The search runs when a layer is prepared on a GPU of a kind that has no shipped configurations: a few candidates for the tokens that the
layer is meant for, timed on the layer itself, seconds once for each kind of GPU, width and number of tokens. QCORE_TRITON_SEARCH=0
leaves it out; then, and for other numbers of tokens, a sound configuration is taken.
"""

from __future__ import annotations

import json
import logging
import math
import os
import re
import tempfile
import time
from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import NamedTuple

import torch

from ..native import cache_folder

log = logging.getLogger(__name__)

SEARCH_SECONDS = 30.0  # after so long the best so far is taken
FORMAT = 1  # of what is kept: another number is not read


class Config(NamedTuple):
    """How a product is cut up: outputs and tokens a program makes, warps it has, loads in flight, programs along K."""

    block_m: int
    block_n: int
    warps: int
    stages: int
    programs: int  # aimed at in all; how many share an output tile follows from it


BUCKETS = (16, 32, 64)  # numbers of tokens up to which a configuration serves

#: the best over four shapes (benchmarks/triton_tune.py), by compute capability: an H200
SHIPPED: dict[tuple[int, int], dict[int, Config]] = {
    (9, 0): {16: Config(16, 64, 4, 2, 528), 32: Config(32, 64, 4, 2, 528), 64: Config(64, 128, 4, 2, 264)},
}
SOUND = SHIPPED[9, 0]
LARGE = 1 << 27  # weights of more codes take twice the programs, and a stage more for few tokens

#: what a search tries; `programs` in programs for each of the GPU's processors
CANDIDATES: dict[int, tuple[Config, ...]] = {
    16: (
        Config(16, 64, 4, 2, 4), Config(16, 64, 4, 3, 4), Config(16, 64, 4, 3, 8), Config(16, 64, 2, 3, 8),
        Config(16, 128, 4, 2, 4), Config(16, 32, 2, 3, 8), Config(16, 128, 8, 3, 4),
    ),
    32: (Config(32, 64, 4, 2, 4), Config(32, 64, 4, 3, 4), Config(32, 128, 4, 2, 2), Config(32, 128, 8, 3, 2)),
    64: (Config(64, 128, 4, 2, 2), Config(64, 64, 4, 3, 2), Config(64, 128, 8, 3, 2), Config(64, 64, 4, 2, 4)),
}  # fmt: skip


def bucket_of(m: int) -> int:
    """The bucket that so many tokens are in.

    >>> bucket_of(1), bucket_of(17), bucket_of(64)
    (16, 32, 64)
    """
    return next(bucket for bucket in BUCKETS if m <= bucket)


def config_for(m: int, size: int, bits: int, device: torch.device) -> Config:
    """The configuration for a product of m tokens on a device. size: codes in the weight."""
    bucket = bucket_of(m)
    shipped = _shipped(device)
    config = shipped[bucket] if shipped else _kept(device).get((bits, bucket), SOUND[bucket])
    if size <= LARGE:
        return config
    return config._replace(programs=2 * config.programs, stages=config.stages + (bucket == BUCKETS[0]))


def is_needed(m: int, bits: int, device: torch.device) -> bool:
    """Whether a search would tell something: a GPU without shipped configurations, and nothing kept for it yet."""
    if device.type != "cuda" or os.environ.get("QCORE_TRITON_SEARCH") == "0" or _shipped(device):
        return False
    return m <= BUCKETS[-1] and (bits, bucket_of(m)) not in _kept(device)


def search(
    m: int, bits: int, device: torch.device, run: Callable[[Config], object],
    timed: Callable[[Callable[[], object]], float] | None = None,
) -> Config:  # fmt: skip
    """Time the candidates for m tokens, keep the fastest for this kind of GPU, and return it.

    run: makes the product with a configuration; one that it refuses is out. timed: seconds that a call takes.
    """
    bucket, timed = bucket_of(m), timed or seconds_on_gpu
    processors = torch.cuda.get_device_properties(device).multi_processor_count
    log.warning("triton: measuring configurations for %s, once, a few seconds", torch.cuda.get_device_name(device))
    started, best, least = time.monotonic(), SOUND[bucket], math.inf
    for candidate in CANDIDATES[bucket]:
        config = candidate._replace(programs=candidate.programs * processors)
        try:
            taken = timed(lambda config=config: run(config))  # type: ignore[misc]
        except Exception as error:  # whatever Triton's compiler and launcher raise
            log.info("triton: %s does not run here: %s", config, error)
            continue
        best, least = (config, taken) if taken < least else (best, least)
        if time.monotonic() - started > SEARCH_SECONDS:
            break
    _keep(device, (bits, bucket), best)
    return best


def seconds_on_gpu(call: Callable[[], object], repeats: int = 30) -> float:
    """Seconds that a call takes on the current GPU, the median of three rounds, after one that compiles."""
    call()
    rounds = []
    for _ in range(3):
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        start.record()
        for _ in range(repeats):
            call()
        end.record()
        end.synchronize()
        rounds.append(start.elapsed_time(end) / repeats / 1e3)
    return sorted(rounds)[1]


def _shipped(device: torch.device) -> dict[int, Config] | None:
    """Those measured on such a GPU; where there is none, as in Triton's interpreter, the sound ones."""
    if device.type != "cuda":
        return SOUND
    return None if torch.version.hip else SHIPPED.get(torch.cuda.get_device_capability(device))


# ---- on disk -------------------------------------------------------------------------------------------------------


def kept_in(device: torch.device) -> Path:
    """The file of a kind of GPU and a version of Triton."""
    import triton

    name = re.sub(r"[^A-Za-z0-9]+", "-", torch.cuda.get_device_name(device)).strip("-").lower()
    return cache_folder() / f"triton-{FORMAT}-{name}-{triton.__version__}.json"


@cache
def _kept(device: torch.device) -> dict[tuple[int, int], Config]:
    """What earlier searches found, by bits and bucket."""
    return _read(kept_in(device))


def _read(path: Path) -> dict[tuple[int, int], Config]:
    """What a file holds; a missing, foreign or broken one holds nothing."""
    try:
        found = json.loads(path.read_text())
        configs = {tuple(map(int, key.split(","))): Config(*map(int, value)) for key, value in found.items()}
    except (OSError, ValueError, TypeError, AttributeError):
        return {}
    return {key: config for key, config in configs.items() if _sane(key, config)}  # type: ignore[misc]


def _sane(key: tuple[int, ...], config: Config) -> bool:
    return len(key) == 2 and key[1] in BUCKETS and 0 < config.programs < 1 << 20 and any(
        config[:4] == candidate[:4] for candidate in CANDIDATES[key[1]]
    )  # fmt: skip


def _keep(device: torch.device, key: tuple[int, int], config: Config) -> None:
    """Add to what is kept, for this process and, where the cache can be written, for later ones."""
    path = kept_in(device)
    everything = {**_read(path), **_kept(device), key: config}
    _kept(device).update(everything)
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.NamedTemporaryFile("w", dir=path.parent, prefix=".triton-", delete=False) as draft:
            json.dump({f"{bits},{bucket}": list(value) for (bits, bucket), value in everything.items()}, draft)
        os.replace(draft.name, path)
    except OSError as error:
        log.warning("triton: what was measured cannot be kept: %s", error)
