"""What the shims share."""

from __future__ import annotations

import logging
import os
import shutil
from pathlib import Path
from typing import Any

import torch
from torch import nn

from .. import api
from ..errors import ConfigError, suggest
from ..saving import PROVENANCE

logger = logging.getLogger("qcore.compat")


def pick_device(device: Any) -> str:
    """The device meant; a GPU that a script names on a machine without one becomes the CPU, and the log says so."""
    if device is None:
        return "auto"
    if torch.device(device).type == "cuda" and not torch.cuda.is_available():
        logger.warning("device %r: there is no GPU here; the CPU is used, slower and with the same results.", device)
        return "cpu"
    return str(device)


def save_again(model: nn.Module, folder: str | Path, format: str, tokenizer: Any = None) -> Path:
    """Save, in place of what an earlier save of qcore left in the folder; anything else there is refused."""
    target = Path(folder)
    if not (target / PROVENANCE).is_file():
        return api.save(model, target, format, tokenizer=tokenizer)
    draft = target.with_name(f"{target.name}.again")
    shutil.rmtree(draft, ignore_errors=True)
    api.save(model, draft, format, tokenizer=tokenizer)
    shutil.rmtree(target)
    os.replace(draft, target)
    return target


def without_effect(what: str, given: dict[str, Any], known: dict[str, str]) -> None:
    """Log each option that has no effect in qcore, with why; refuse options that never existed."""
    for name in given:
        if name not in known:
            raise ConfigError(f"{what} has no option {name!r}. {suggest(name, known)}")
        logger.info("%s: %s has no effect in qcore: %s.", what, name, known[name])
