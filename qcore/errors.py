"""The errors qcore raises: one family, every message says what, where, expected, and what to do."""

from __future__ import annotations

import difflib
from collections.abc import Iterable


class QcoreError(Exception):
    """Anything the caller can cause. Children only sort the causes; the message carries the facts."""


class ConfigError(QcoreError):
    """An option, a width or a pattern that cannot be meant."""


class PluginError(QcoreError):
    """A plugin that is missing, broken, disabled or offered twice."""


class NotOfferedError(PluginError, ConfigError):
    """A name that no working plugin offers: most often a misspelled argument."""


class ModelError(QcoreError):
    """A model that cannot be opened, or whose structure or weights do not allow quantizing."""


class CheckpointError(QcoreError):
    """Files that contradict themselves, or that cannot be read or written."""


class CalibrationError(QcoreError):
    """Calibration text or tokens that cannot be used."""


class EvaluationError(QcoreError):
    """Evaluation data that cannot be used."""


class BackendError(QcoreError):
    """No kernel can serve a layer, or a kernel was asked for what it cannot do."""


class RunError(QcoreError):
    """A quantization run that cannot start, resume or go on."""


def first_line(error: BaseException) -> str:
    """Return the first line of what an error says, or its kind when it says nothing."""
    said = str(error).strip()
    return said.splitlines()[0] if said else type(error).__name__


def name_list(names: Iterable[str], limit: int = 8) -> str:
    """Join names for a message, cutting long lists short.

    >>> name_list(["b", "a"])
    'b, a'
    """
    found = list(names)
    more = f" and {len(found) - limit} more" if len(found) > limit else ""
    return (", ".join(found[:limit]) or "none") + more


def suggest(name: str, known: Iterable[str]) -> str:
    """Return the sentence that helps after an unknown name: the close matches, else all known names.

    >>> suggest("gropu_size", ["bits", "group_size"])
    "Did you mean 'group_size'?"
    """
    options = sorted(known)
    close = difflib.get_close_matches(name, options, n=3, cutoff=0.6)
    if close:
        return "Did you mean " + " or ".join(repr(match) for match in close) + "?"
    return f"Known: {name_list(options, 40)}."
