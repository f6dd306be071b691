"""What is asked for: bits, group size and symmetry, per model and per linear.

Both kinds of options, `QuantConfig` here and the `Params` of each algorithm, are frozen pydantic models
built through `Options.parse`, so an unknown or impossible option always reads the same.
"""

from __future__ import annotations

import fnmatch
import re
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, ClassVar, TypeVar

from pydantic import BaseModel, ConfigDict, Field, ValidationError, field_validator

from .errors import ConfigError, suggest

OptionsT = TypeVar("OptionsT", bound="Options")


class Options(BaseModel):
    """A frozen set of validated options; subclass it for an algorithm's parameters."""

    model_config = ConfigDict(frozen=True, extra="forbid", validate_default=True)

    @classmethod
    def parse(cls: type[OptionsT], values: Mapping[str, Any], what: str) -> OptionsT:
        """Build the options from keywords.

        Raises ConfigError naming the option, the value and what was expected; `what` names the owner
        in the message ("algorithm 'rtn'").
        """
        for name in values:
            if name not in cls.model_fields:
                raise ConfigError(f"{what} has no option {name!r}. {suggest(name, cls.model_fields)}")
        try:
            return cls(**values)
        except ValidationError as error:
            first = error.errors()[0]
            name = ".".join(str(part) for part in first["loc"]) or "options"
            raise ConfigError(f"{what}: {name}={first.get('input')!r} is not valid: {first['msg']}.") from None


class QuantConfig(Options):
    """The grid of one linear: what every algorithm, backend and format must know.

    bits: width of a code, 2 to 8.
    group_size: consecutive input columns that share a scale; -1 for one group per row.
    sym: symmetric grid (zero point fixed at 2**(bits-1)) or an integer zero point per group.
    """

    bits: int = Field(4, ge=2, le=8)
    group_size: int = Field(128, lt=2**31)
    sym: bool = True

    FIELDS: ClassVar[tuple[str, ...]] = ("bits", "group_size", "sym")

    @field_validator("group_size")
    @classmethod
    def _positive_or_whole_row(cls, value: int) -> int:
        if value != -1 and value < 1:
            raise ValueError("expected -1 (one group per row) or a positive number of columns")
        return value

    @property
    def maxq(self) -> int:
        """The largest code, 2**bits - 1."""
        return int(2**self.bits - 1)

    def __str__(self) -> str:
        return f"{self.bits} bits, group {self.group_size}, {'sym' if self.sym else 'asym'}"


class RunSizes(Options):
    """Sizes of a run that a caller gives.

    samples: calibration sequences, of seqlen tokens. batch_size: sequences per forward pass, None to choose. seed: for all
    that is random.
    """

    samples: int = Field(ge=1)
    seqlen: int = Field(ge=2)
    batch_size: int | None = Field(ge=1)
    seed: int = Field(ge=0, lt=2**63)


class Override(Options):
    """A change of the grid for the linears whose name matches.

    pattern: a glob (`*.down_proj`, `model.layers.0.*`) or, after `re:`, a regular expression searched in the
        full name. A glob without a leading `*` also matches from any dot on, so `down_proj` is enough.
    skip: keep these linears in float.
    bits, group_size, sym: replace the run's own; None leaves it.
    """

    pattern: str = Field(min_length=1)
    skip: bool = False
    bits: int | None = Field(None, ge=2, le=8)
    group_size: int | None = None
    sym: bool | None = None

    @field_validator("pattern")
    @classmethod
    def _compiles(cls, value: str) -> str:
        if value.startswith("re:"):
            try:
                re.compile(value[3:])
            except re.error as error:
                raise ValueError(f"not a regular expression ({error})") from None
        return value

    @classmethod
    def of(cls, value: Override | str | Mapping[str, Any]) -> Override:
        """Return an override given as such, in the command-line form, or as a mapping of its fields."""
        if isinstance(value, Override):
            return value
        if not isinstance(value, (str, Mapping)):
            raise ConfigError(f"override {value!r}: expected an Override, PATTERN:bits=8 or a mapping of its fields.")
        return cls.from_text(value) if isinstance(value, str) else cls.parse(value, "override")

    @classmethod
    def from_text(cls, text: str) -> Override:
        """Read the command-line form `PATTERN:bits=8,group_size=32` or `PATTERN:skip`.

        >>> Override.from_text("*.down_proj:bits=8").bits
        8
        """
        pattern, colon, changes = text.rpartition(":")
        if not colon or not pattern or pattern == "re":
            raise ConfigError(
                f"override {text!r} has no changes. Expected PATTERN:bits=8,group_size=32 or PATTERN:skip."
            )
        values: dict[str, Any] = {"pattern": pattern}
        for change in changes.split(","):
            key, equals, value = change.strip().partition("=")
            values[key] = value if equals else True
        return cls.parse(values, f"override {text!r}")

    def matches(self, name: str) -> bool:
        """Whether the linear of this full dotted name is meant."""
        if self.pattern.startswith("re:"):
            return re.search(self.pattern[3:], name) is not None
        return fnmatch.fnmatchcase(name, self.pattern) or fnmatch.fnmatchcase(name, f"*.{self.pattern}")

    def apply(self, config: QuantConfig) -> QuantConfig:
        """Return the config with this override's changes."""
        changes = {field: getattr(self, field) for field in QuantConfig.FIELDS if getattr(self, field) is not None}
        return QuantConfig.parse({**config.model_dump(), **changes}, f"override {self.pattern!r}")


def resolve(names: Iterable[str], config: QuantConfig, overrides: Sequence[Override]) -> dict[str, QuantConfig | None]:
    """Give every linear its config; None keeps it in float. Later overrides win over earlier ones.

    Raises ConfigError for an override that matches no linear, naming the closest.
    """
    plan: dict[str, QuantConfig | None] = {}
    unused = list(overrides)
    for name in names:
        chosen: QuantConfig | None = config
        for override in overrides:
            if override.matches(name):
                chosen = None if override.skip else override.apply(chosen or config)
                unused = [other for other in unused if other is not override]
        plan[name] = chosen
    if unused:
        raise ConfigError(
            f"override {unused[0].pattern!r} matches none of the {len(plan)} linears. "
            f"{suggest(unused[0].pattern, plan)}"
        )
    return plan


_UNITS = {"": 1, "B": 1, **{f"{p}B": 1000**n for n, p in enumerate("KMGT", 1)}, **{f"{p}IB": 1024**n for n, p in enumerate("KMGT", 1)}}  # fmt: skip
LEAST_MEMORY = 2**20  # bytes that a run takes at the very least


def parse_bytes(value: int | str | None, name: str, least: int = 1) -> int | None:
    """Return a number of bytes given as such or as text: "4GiB", "500 MB". name: of the option; least: the fewest that make sense.

    >>> parse_bytes("4GiB", "max_memory")
    4294967296
    """
    if value is None:
        return None
    found = re.fullmatch(r"\s*(\d+(?:\.\d+)?)\s*([KMGT]?I?B?)\s*", str(value).upper())
    if isinstance(value, bool) or found is None or found[2] not in _UNITS:
        raise ConfigError(f'{name}={value!r}: expected bytes, or a size such as "4GiB" or "500MB".')
    size = int(float(found[1]) * _UNITS[found[2]])
    if size < least:
        raise ConfigError(f"{name}={value!r} is {size} bytes, expected {least} at least.")
    return size
