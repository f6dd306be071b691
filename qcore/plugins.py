"""Finding, loading, isolating and looking up plugins.

One road for everyone: the entry-point group `qcore`. A plugin that fails is kept with its reason and breaks nothing else;
a name that two plugins offer belongs to neither.
"""

from __future__ import annotations

import importlib.metadata
import os
import pkgutil
import warnings
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from functools import cache
from types import MappingProxyType
from typing import Any

import pluggy

from . import hookspecs
from .errors import NotOfferedError, PluginError, QcoreError, name_list, suggest

#: hook that offers a kind -> the kind's name, as users see it
KINDS = MappingProxyType(
    {
        "qcore_algorithms": "algorithm",
        "qcore_model_adapters": "model",
        "qcore_backends": "backend",
        "qcore_exporters": "format",
        "qcore_calibration_datasets": "dataset",
        "qcore_eval_tasks": "task",
        "qcore_targets": "target",
    }
)


#: kind -> the public class that what is offered is an instance of, or, of algorithms, a subclass
_CLASSES = {
    "algorithm": "Algorithm",
    "model": "ModelAdapter",
    "backend": "Backend",
    "format": "Exporter",
    "dataset": "CalibrationDataset",
    "task": "EvalTask",
    "target": "Target",
}


@dataclass
class Plugin:
    """One entry point: where it comes from, what became of it, what it offers."""

    name: str
    distribution: str
    version: str
    status: str = "loaded"  # or "disabled", "failed"
    reason: str = ""
    offers: list[tuple[str, str, Any]] = field(default_factory=list)  # (kind, name, offer)

    @property
    def label(self) -> str:
        return f"{self.distribution}:{self.name}"

    def named_by(self, tokens: Iterable[str]) -> bool:
        return not {self.name, self.distribution, self.label}.isdisjoint(tokens)


class Plugins:
    """The plugins of one process, or of one test.

    entry_points: defaults to the installed ones; disabled, only: names, distributions or `distribution:name`,
    defaulting to the variables QCORE_DISABLE_PLUGINS and QCORE_ONLY_PLUGINS.
    """

    def __init__(
        self,
        entry_points: Iterable[importlib.metadata.EntryPoint] | None = None,
        disabled: Iterable[str] | None = None,
        only: Iterable[str] | None = None,
    ) -> None:
        self.manager = pluggy.PluginManager("qcore")
        self.manager.add_hookspecs(hookspecs)
        if entry_points is None:
            entry_points = importlib.metadata.entry_points(group="qcore")
        disabled = _tokens("QCORE_DISABLE_PLUGINS") if disabled is None else set(disabled)
        only = _tokens("QCORE_ONLY_PLUGINS") if only is None else set(only)
        self.all = [self._load(point, disabled or set(), only) for point in _unique(entry_points)]

    def _load(self, point: importlib.metadata.EntryPoint, disabled: set[str], only: set[str] | None) -> Plugin:
        plugin = Plugin(point.name, point.dist.name if point.dist else "?", point.dist.version if point.dist else "?")
        if plugin.named_by(disabled):
            plugin.status, plugin.reason = "disabled", "named by QCORE_DISABLE_PLUGINS"
        elif only is not None and not plugin.named_by(only):
            plugin.status, plugin.reason = "disabled", "not named by QCORE_ONLY_PLUGINS"
        else:
            self._register(point, plugin)
        return plugin

    def _register(self, point: importlib.metadata.EntryPoint, plugin: Plugin) -> None:
        """Import, register and ask a plugin. Whatever it raises is its own failure, so the net is wide here."""
        module: Any = None
        try:
            module = point.load()
            wanted = getattr(module, "PLUGIN_API_VERSION", hookspecs.PLUGIN_API_VERSION)
            if wanted != hookspecs.PLUGIN_API_VERSION:
                raise PluginError(f"written for plugin API {wanted}; this qcore has {hookspecs.PLUGIN_API_VERSION}")
            self.manager.register(module, name=plugin.label)
            self._check_hooks(module)
            for caller in self.manager.get_hookcallers(module) or []:
                if caller.name in KINDS:
                    plugin.offers += _ask(caller, module)
        except (Exception, SystemExit) as error:
            if module is not None and self.manager.is_registered(module):
                self.manager.unregister(module)
            plugin.offers.clear()
            plugin.status, plugin.reason = "failed", f"{type(error).__name__}: {error}"

    def _check_hooks(self, module: Any) -> None:
        """Refuse an implementation of a hook that does not exist; pluggy itself checks arguments only of known ones."""
        for caller in self.manager.get_hookcallers(module) or []:
            if not caller.has_spec():
                known = [name for name in vars(hookspecs) if name.startswith("qcore_")]
                raise PluginError(f"there is no hook {caller.name!r}. {suggest(caller.name, known)}")

    def offers(self, kind: str) -> dict[str, list[tuple[Plugin, Any]]]:
        """Everything offered of a kind: name -> those who offer it."""
        found: dict[str, list[tuple[Plugin, Any]]] = {}
        for plugin in self.all:
            for offered_kind, name, offer in plugin.offers:
                if offered_kind == kind:
                    found.setdefault(name, []).append((plugin, offer))
        return dict(sorted(found.items()))

    def usable(self, kind: str) -> dict[str, Any]:
        """What exactly one plugin offers: name -> offer."""
        return {name: offers[0][1] for name, offers in self.offers(kind).items() if len(offers) == 1}

    def get(self, kind: str, name: str) -> Any:
        """Return the offer of that kind and name.

        Raises NotOfferedError when nobody offers it (with close matches and the plugins that failed or are disabled) and
        PluginError when more than one does.
        """
        if not isinstance(name, str):
            raise NotOfferedError(
                f"{kind} {name!r} is no name. Give the name of one, or an object of that class, where that is taken."
            )
        offers = self.offers(kind)
        if name not in offers:
            raise NotOfferedError(f"no {kind} is called {name!r}. {suggest(name, offers)}{self._absent()}")
        return self._sole(f"{kind} {name!r}", offers[name])

    def call(self, hook: str, **facts: Any) -> list[Any]:
        """Call a hook of every plugin, or until one answers if it is a firstresult hook; return the answers that are not None.

        A plugin that raises is warned of by name and the others are called all the same. A QcoreError is meant for
        the caller and passes.
        """
        caller = getattr(self.manager.hook, hook)
        answers: list[Any] = []
        for implementation in reversed(caller.get_hookimpls()):
            try:
                answer = implementation.function(*(facts[name] for name in implementation.argnames))
            except QcoreError:
                raise
            except Exception as error:
                message = f"plugin {implementation.plugin_name} failed in {hook}: {type(error).__name__}: {error}"
                warnings.warn(message, RuntimeWarning, stacklevel=2)
                continue
            if answer is not None:
                answers.append(answer)
                if caller.spec.opts["firstresult"]:
                    break
        return answers

    def adapter_for(self, model_type: str) -> Any | None:
        """Return the declared adapter that serves a model type, or None.

        Raises PluginError when two claim it.
        """
        claims = self._claims(model_type)
        return self._sole(f"model type {model_type!r}", claims) if claims else None

    def _claims(self, model_type: str) -> list[tuple[Plugin, Any]]:
        return [
            (plugin, adapter)
            for plugin in self.all
            for kind, _, adapter in plugin.offers
            if kind == "model" and model_type in adapter.model_types
        ]

    def _sole(self, what: str, claims: list[tuple[Plugin, Any]]) -> Any:
        if len(claims) > 1:
            labels = [plugin.label for plugin, _ in claims]
            raise PluginError(
                f"{what} is offered by {len(claims)} plugins: {name_list(labels)}. "
                f"Disable all but one, for instance QCORE_DISABLE_PLUGINS={labels[-1]}"
            )
        return claims[0][1]

    def _absent(self) -> str:
        return "".join(f"\n  {p.status}: {p.label} ({p.reason})" for p in self.all if p.status != "loaded")

    def table(self) -> list[dict[str, str]]:
        """One row per offer, or per plugin that offers nothing: kind, name, plugin, distribution, version, status, reason."""
        rows = []
        for plugin in self.all:
            source = {"plugin": plugin.name, "distribution": plugin.distribution, "version": plugin.version}
            state = {"status": plugin.status, "reason": plugin.reason}
            for kind, name, offer in plugin.offers or [("", "", None)]:
                shared = [each for each in getattr(offer, "model_types", ()) if len(self._claims(each)) > 1]
                clash = f"model type {name_list(shared)} is claimed by more than one plugin" if shared else ""
                if len(self.offers(kind).get(name, ())) > 1:
                    clash = "offered by more than one plugin"
                note = {"status": "clash", "reason": clash} if clash else state
                rows.append({"kind": kind, "name": name, **source, **note})
        return sorted(rows, key=lambda row: (row["kind"], row["name"], row["distribution"], row["plugin"]))


def _ask(caller: Any, module: Any) -> list[tuple[str, str, Any]]:
    """Call one plugin's implementation of an offering hook and check what it returns."""
    kind = KINDS[caller.name]
    expected, as_class = pkgutil.resolve_name(f"qcore:{_CLASSES[kind]}"), kind == "algorithm"
    offers = []
    for implementation in caller.get_hookimpls():
        if implementation.plugin is not module:
            continue
        returned = implementation.function()
        if not isinstance(returned, (list, tuple)):
            raise PluginError(f"{caller.name} must return a list, it returned {type(returned).__name__}")
        for offer in returned:
            fits = isinstance(offer, type) and issubclass(offer, expected) if as_class else isinstance(offer, expected)
            if not fits:
                form = "subclasses" if as_class else "instances"
                raise PluginError(f"{caller.name} must offer {form} of qcore.{expected.__name__}, it offered {offer!r}")
            if not isinstance(getattr(offer, "name", None), str):
                raise PluginError(f"{caller.name} offered {offer!r}, which has no name")
            offers.append((kind, offer.name, offer))
    return offers


def _tokens(variable: str) -> set[str] | None:
    value = os.environ.get(variable)
    return None if value is None else {token.strip() for token in value.split(",") if token.strip()}


def _unique(points: Iterable[importlib.metadata.EntryPoint]) -> list[importlib.metadata.EntryPoint]:
    """Sort entry points and drop repeats of one distribution seen twice on the path."""
    unique: Mapping[tuple[str, str, str], importlib.metadata.EntryPoint] = {
        (point.dist.name if point.dist else "?", point.name, point.value): point for point in points
    }
    return [unique[key] for key in sorted(unique)]


@cache
def installed() -> Plugins:
    """The installed plugins, loaded on first use."""
    return Plugins()
