"""A hook of mkdocs: the pages commands.md and api.md, written from the code when the site is built, so they cannot drift."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import click
from mkdocs.structure.files import File, Files

import qcore
from qcore.cli import cli

#: what is public beside the names that `import qcore` gives
MODULES_BESIDE = ("tools.reporting", "tools.page", "compat.auto_gptq.modeling", "compat.auto_gptq.eval_tasks",
                  "compat.auto_gptq.peft_utils", "compat.auto_round", "compat.peft")  # fmt: skip


def commands() -> str:
    """Every command with its arguments and options."""
    lines = ["# Commands", "", "`--json` prints one object and nothing else on stdout. Exit codes: 0, 1 for a failure, 2 for wrong",
             "usage, 130 after Ctrl-C.", ""]  # fmt: skip
    for name, command in _flat(cli):
        arguments = [p for p in command.params if isinstance(p, click.Argument)]
        usage = " ".join(["qcore", name, *(p.make_metavar(click.Context(command)) for p in arguments)])
        lines += [f"## qcore {name}", "", (command.help or "").replace("\n\n", "\n").strip(), "", f"    {usage}", ""]
        options = [p for p in command.params if isinstance(p, click.Option)]
        lines += ["| option | default | meaning |", "|---|---|---|"] if options else []
        for option in options:
            names = ", ".join([*option.opts, *option.secondary_opts])
            value = "" if option.is_flag else f" {option.metavar or option.type.name.upper()}"
            shown = option.default if option.show_default and not callable(option.default) else ""
            if option.secondary_opts:  # a pair of flags
                shown = (option.opts if option.default else option.secondary_opts)[0]
            text = (option.help or "").replace("|", "\\|")
            lines.append(
                f"| `{names}{value.replace('|', chr(92) + '|')}` | {'' if shown in ('', None) else f'`{shown}`'} | {text} |"
            )
        lines.append("")
    return "\n".join(lines).rstrip() + "\n"


def _flat(group: click.Group, prefix: str = "") -> Iterator[tuple[str, click.Command]]:
    """Every command under its full name, those of groups after their group."""
    for name, command in sorted(group.commands.items()):
        yield prefix + name, command
        if isinstance(command, click.Group):
            yield from _flat(command, f"{prefix}{name} ")


def api() -> str:
    """Every public name, rendered from its docstring when the site is built."""
    lines = ["# Python", "", "What is not listed here is not public.", ""]
    for home, names in qcore._HOMES.items():
        lines += [f"## qcore.{home}", ""]
        for name in names:
            lines += [f"::: qcore.{home}.{name}", ""]
    for module in (*qcore._MODULES, *MODULES_BESIDE):
        lines += [f"## qcore.{module}", "", f"::: qcore.{module}", ""]
    return "\n".join(lines).rstrip() + "\n"


def on_files(files: Files, config: Any, **_: Any) -> Files:
    """Add the two pages to those that lie in docs/."""
    for name, content in (("commands.md", commands()), ("api.md", api())):
        files.append(File.generated(config, name, content=content))
    return files
