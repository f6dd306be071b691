"""Write a new plugin's distribution: package metadata, the plugin, and its conformance test."""

from __future__ import annotations

import re
from pathlib import Path

from ..errors import ConfigError, suggest
from ..plugins import KINDS

TEMPLATES = Path(__file__).parent / "templates"


def write(kind: str, name: str, parent: Path) -> Path:
    """Write `parent/qcore-plugin-NAME` and return it. kind: one of qcore's kinds of plugins.

    Raises ConfigError for an unknown kind, a name that cannot be a module's, or a folder that exists.
    """
    kinds = sorted(KINDS.values())
    if kind not in kinds:
        raise ConfigError(f"no kind of plugin is called {kind!r}. {suggest(kind, kinds)}")
    if not re.fullmatch(r"[a-z][a-z0-9]*([-_][a-z0-9]+)*", name):
        raise ConfigError(f"name {name!r}: expected lower-case letters, digits and single - or _ between them.")
    distribution = f"qcore-plugin-{name.replace('_', '-')}"
    folder = parent / distribution
    if folder.exists():
        raise ConfigError(f"{folder} exists already.")
    module = distribution.replace("-", "_")
    words = {
        "name": name,
        "distribution": distribution,
        "module": module,
        "classname": "".join(part.capitalize() for part in re.split("[-_]", name)),
        "variable": f"{name.replace('-', '_').upper()}_TEXTS",
        "description": f"The {kind} {name!r} for qcore",
    }
    files = {
        "pyproject.toml": "pyproject.toml",
        "README.md": "README.md",
        f"{module}.py": f"{kind}.py",
        f"tests/test_{module}.py": f"{kind}_test.py",
    }
    try:
        for target, template in files.items():
            file = folder / target
            file.parent.mkdir(parents=True, exist_ok=True)
            file.write_text(
                (TEMPLATES / f"{template}.txt").read_text(encoding="utf-8").format(**words), encoding="utf-8"
            )
    except OSError as error:
        raise ConfigError(f"{folder} cannot be written: {error.strerror}.") from None
    return folder
