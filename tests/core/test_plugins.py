import importlib.metadata
from dataclasses import replace

import pytest

import qcore
from qcore import CheckpointError, PluginError, QcoreError, hookspecs
from qcore.plugins import Plugins, installed
from qcore.testing import check_plugin

RTN = """
import qcore
class Mine(qcore.Algorithm):
    name = {name!r}
    description = "does nothing"
    def quantize_block(self, block):
        return {{}}
@qcore.hookimpl
def qcore_algorithms():
    return [Mine]
"""

ADAPTER = """
import qcore
@qcore.hookimpl
def qcore_model_adapters():
    return [qcore.ModelAdapter(name={name!r}, model_types=({model_type!r},), blocks="b", linear_groups=(("x",),))]
"""

BROKEN = {
    "import": ("import no_such_module_anywhere", "ModuleNotFoundError: No module named 'no_such_module_anywhere'"),
    "syntax": ("def f(:", "SyntaxError"),
    "exit": ("raise SystemExit('bye')", "SystemExit: bye"),
    "signature": (
        "import qcore\n@qcore.hookimpl\ndef qcore_block_finished(index, record): ...",
        "record",
    ),
    "unknown hook": (
        "import qcore\n@qcore.hookimpl\ndef qcore_algoritms(): return []",
        "there is no hook 'qcore_algoritms'. Did you mean 'qcore_algorithms'",
    ),
    "raising hook": (
        "import qcore\n@qcore.hookimpl\ndef qcore_backends(): return [1 / 0]",
        "ZeroDivisionError: division by zero",
    ),
    "no list": (
        "import qcore\n@qcore.hookimpl\ndef qcore_exporters(): return None",
        "qcore_exporters must return a list, it returned NoneType",
    ),
    "wrong type": (
        "import qcore\n@qcore.hookimpl\ndef qcore_exporters(): return ['gguf']",
        "qcore_exporters must offer instances of qcore.Exporter, it offered 'gguf'",
    ),
    "class for instance": (
        "import qcore\nclass B(qcore.Backend): name = 'b'\n@qcore.hookimpl\ndef qcore_backends(): return [B]",
        "qcore_backends must offer instances of qcore.Backend",
    ),
    "instance for class": (
        RTN.format(name="mine").replace("[Mine]", "[Mine()]"),
        "qcore_algorithms must offer subclasses of qcore.Algorithm",
    ),
    "no name": (RTN.format(name="mine").replace("    name = 'mine'\n", ""), "which has no name"),
    "another version": (
        "PLUGIN_API_VERSION = 99\n" + RTN.format(name="mine"),
        f"written for plugin API 99; this qcore has {hookspecs.PLUGIN_API_VERSION}",
    ),
}


@pytest.mark.parametrize("kind", BROKEN)
def test_a_broken_plugin_is_listed_with_its_reason_and_breaks_nothing_else(plugin, kind):
    source, reason = BROKEN[kind]
    plugins = Plugins([plugin("bad", source, "bad-dist"), plugin("good", RTN.format(name="good"), "good-dist")])
    bad, good = plugins.all
    assert (bad.name, bad.distribution, bad.version, bad.status) == ("bad", "bad-dist", "1.0", "failed")
    assert reason in bad.reason
    assert bad.offers == []
    assert good.status == "loaded"
    assert plugins.get("algorithm", "good").name == "good"
    assert [row["status"] for row in plugins.table()] == ["failed", "loaded"]


def test_a_broken_plugin_is_quoted_only_to_whom_found_nothing(plugin):
    broken = plugin("broken", "import no_such_module_anywhere", "broken-dist")
    plugins = Plugins([broken, plugin("good", RTN.format(name="good"))])
    with pytest.raises(PluginError) as error:
        plugins.get("algorithm", "mine")
    assert "failed: broken-dist:broken (ModuleNotFoundError: No module named" in str(error.value)
    assert plugins.get("algorithm", "good")


def test_an_unknown_name_gets_close_matches(plugin):
    plugins = Plugins([plugin("p", RTN.format(name="autoround"))])
    with pytest.raises(PluginError, match=r"no algorithm is called 'auto_round'. Did you mean 'autoround'\?"):
        plugins.get("algorithm", "auto_round")
    with pytest.raises(PluginError, match=r"no backend is called 'auto_round'. Known: none"):
        plugins.get("backend", "auto_round")


def test_a_name_offered_twice_is_nobodys(plugin):
    source = RTN.format(name="same")
    plugins = Plugins([plugin("one", source, "dist-one"), plugin("two", source, "dist-two")])
    with pytest.raises(PluginError) as error:
        plugins.get("algorithm", "same")
    message = str(error.value)
    assert "dist-one:one" in message
    assert "dist-two:two" in message
    assert "QCORE_DISABLE_PLUGINS=dist-two:two" in message
    assert "same" not in plugins.usable("algorithm")
    assert {row["status"] for row in plugins.table()} == {"clash"}


def test_disabling_one_of_two_gives_the_name_to_the_other(plugin):
    source = RTN.format(name="same")
    points = [plugin("one", source, "dist-one"), plugin("two", source, "dist-two")]
    assert Plugins(points, disabled=["dist-two:two"]).get("algorithm", "same").name == "same"


def test_one_name_for_two_kinds_is_no_clash(plugin):
    points = [plugin("a", RTN.format(name="same")), plugin("m", ADAPTER.format(name="same", model_type="t"))]
    plugins = Plugins(points)
    assert plugins.get("algorithm", "same").name == plugins.get("model", "same").name == "same"


def test_two_entry_points_of_one_name_from_two_distributions_both_load(plugin):
    points = [plugin("p", RTN.format(name="first"), "dist-one"), plugin("p", RTN.format(name="second"), "dist-two")]
    plugins = Plugins(points)
    assert [each.label for each in plugins.all] == ["dist-one:p", "dist-two:p"]
    assert set(plugins.usable("algorithm")) == {"first", "second"}


def test_a_distribution_seen_twice_on_the_path_counts_once(plugin):
    point = plugin("p", RTN.format(name="mine"))
    plugins = Plugins([point, point])
    assert len(plugins.all) == 1
    assert plugins.get("algorithm", "mine")


def test_a_model_type_claimed_twice_is_refused_naming_both(plugin):
    points = [plugin(n, ADAPTER.format(name=n, model_type="llama"), f"dist-{n}") for n in ("one", "two")]
    plugins = Plugins(points)
    with pytest.raises(PluginError) as error:
        plugins.adapter_for("llama")
    assert "model type 'llama'" in str(error.value)
    assert "dist-one:one, dist-two:two" in str(error.value)
    assert plugins.get("model", "one").name == "one"  # by name there is no doubt
    assert plugins.adapter_for("opt") is None


@pytest.mark.parametrize("token", ["p", "dist-p", "dist-p:p"])
def test_a_plugin_is_disabled_by_name_distribution_or_both(plugin, token):
    points = [plugin("p", RTN.format(name="mine"), "dist-p"), plugin("q", RTN.format(name="other"), "dist-q")]
    plugins = Plugins(points, disabled=[token])
    assert [each.status for each in plugins.all] == ["disabled", "loaded"]
    with pytest.raises(PluginError, match=r"disabled: dist-p:p \(named by QCORE_DISABLE_PLUGINS\)"):
        plugins.get("algorithm", "mine")


@pytest.mark.parametrize("token", ["p", "dist-p", "dist-p:p"])
def test_an_allowed_set_disables_all_others(plugin, token):
    points = [plugin("p", RTN.format(name="mine"), "dist-p"), plugin("q", RTN.format(name="other"), "dist-q")]
    plugins = Plugins(points, only=[token])
    assert [each.status for each in plugins.all] == ["loaded", "disabled"]
    assert plugins.all[1].reason == "not named by QCORE_ONLY_PLUGINS"


def test_a_disabled_plugin_is_not_even_imported(plugin):
    (disabled,) = Plugins([plugin("p", "raise RuntimeError('imported')")], disabled=["p"]).all
    assert disabled.status == "disabled"


def test_the_variables_of_the_environment_are_read(plugin, monkeypatch):
    points = [plugin(name, RTN.format(name=name)) for name in ("p", "q", "r")]
    monkeypatch.setenv("QCORE_ONLY_PLUGINS", "p, q")
    monkeypatch.setenv("QCORE_DISABLE_PLUGINS", "q,")
    assert [each.status for each in Plugins(points).all] == ["loaded", "disabled", "disabled"]
    monkeypatch.setenv("QCORE_ONLY_PLUGINS", "")  # set and empty: none allowed
    assert {each.status for each in Plugins(points).all} == {"disabled"}


def test_the_table_has_a_row_per_offer_and_one_for_plugins_without(plugin):
    both = RTN.format(name="mine") + ADAPTER.format(name="family", model_type="t").replace("import qcore", "")
    plugins = Plugins([plugin("both", both, "dist"), plugin("none", "", "dist"), plugin("off", "", "dist")],
                      disabled=["off"])  # fmt: skip
    rows = {(row["kind"], row["name"], row["plugin"]): row["status"] for row in plugins.table()}
    assert rows == {
        ("", "", "none"): "loaded",
        ("", "", "off"): "disabled",
        ("algorithm", "mine", "both"): "loaded",
        ("model", "family", "both"): "loaded",
    }


def test_first_party_plugins_come_through_the_same_door_and_all_load():
    plugins = Plugins(disabled=[])
    ours = [each for each in plugins.all if each.distribution == "qcore"]
    assert {point.name for point in importlib.metadata.entry_points(group="qcore")} >= {each.name for each in ours}
    assert [(each.name, each.reason) for each in ours if each.status != "loaded"] == []


@pytest.mark.parametrize(
    "point",
    [point for point in importlib.metadata.entry_points(group="qcore") if point.dist.name == "qcore"],
    ids=lambda point: point.name,
)
def test_each_first_party_plugin_conforms(point):
    check_plugin(point)


def test_check_plugin_tells_a_plugin_that_offers_nothing(plugin):
    with pytest.raises(AssertionError, match="implements no hook"):
        check_plugin(plugin("empty", "def qcore_algorithms(): return []"))
    with pytest.raises(AssertionError, match="ModuleNotFoundError"):
        check_plugin(plugin("broken", "import no_such_module_anywhere"))


def test_a_plugin_of_a_third_party_serves_its_algorithm(plugin, tokens, llama):
    source = """
import qcore
from qcore import grid
class Coarse(qcore.Algorithm):
    name = "coarse"
    needs_calibration = False
    def quantize_block(self, block):
        results = {}
        for name, linear in block.linears.items():
            W, config = linear.weight, linear.config
            scale, zero = grid.minmax_grid(W, config.bits, config.sym)
            codes = grid.quantize(W, scale[:, None], zero[:, None], config.bits).byte()
            g_idx = grid.group_index(W.shape[1], -1)
            results[name] = qcore.QuantizedWeight(codes, scale[:, None].half(), zero[:, None].int(), g_idx, config)
        return results
@qcore.hookimpl
def qcore_algorithms():
    return [Coarse]
"""
    plugins = Plugins([*importlib.metadata.entry_points(group="qcore"), plugin("coarse", source)])
    model = qcore.quantize(llama, "coarse", bits=8, group_size=-1, plugins=plugins)
    assert qcore.report(model)["algorithm"] == "coarse"
    assert {layer["bits"] for layer in qcore.report(model)["layers"]} == {8}
    assert model(tokens[0][None]).logits.isfinite().all()


def test_events_reach_every_plugin_in_order(llama, watched):
    seen = []

    class Watcher:
        @qcore.hookimpl
        def qcore_run_started(self, plan):
            seen.append(("started", plan["algorithm"], plan["blocks"], plan["linears"], plan["resumed_at"]))

        @qcore.hookimpl
        def qcore_block_finished(self, index, records):
            seen.append(("block", index, len(records)))

        @qcore.hookimpl
        def qcore_run_finished(self, report):
            seen.append(("finished", len(report["layers"])))

    qcore.quantize(llama, "rtn", group_size=32, plugins=watched(Watcher()))
    assert seen == [("started", "rtn", 3, 21, 0), ("block", 0, 7), ("block", 1, 7), ("block", 2, 7), ("finished", 21)]


def test_a_watcher_that_fails_is_warned_of_and_the_run_goes_on(llama, watched):
    class Failing:
        @qcore.hookimpl
        def qcore_block_finished(self, index):
            raise ValueError(f"no line for block {index}")

    with pytest.warns(RuntimeWarning, match="failed in qcore_block_finished: ValueError: no line for block") as caught:
        model = qcore.quantize(llama, "rtn", group_size=32, plugins=watched(Failing()))
    assert len(caught) == 3
    assert len(qcore.report(model)["layers"]) == 21


def test_a_watcher_may_stop_a_run_with_an_error_of_ours(llama, watched):
    class Strict:
        @qcore.hookimpl
        def qcore_block_finished(self, index):
            raise QcoreError("that is enough")

    with pytest.raises(QcoreError, match="that is enough"):
        qcore.quantize(llama, "rtn", group_size=32, plugins=watched(Strict()))


def test_an_algorithm_that_forgets_a_linear_is_named(llama):
    class Lazy(qcore.Algorithm):
        name = "lazy"
        needs_calibration = False

        def quantize_block(self, block):
            return {}

    with pytest.raises(qcore.RunError, match=r"algorithm 'lazy' returned 0 of 7 linears of block model.layers.0"):
        qcore.quantize(llama, Lazy())


def test_an_algorithm_that_returns_something_else_is_named(llama):
    class Wrong(qcore.Algorithm):
        name = "wrong"
        needs_calibration = False

        def quantize_block(self, block):
            return {name: linear.weight for name, linear in block.linears.items()}

    with pytest.raises(qcore.RunError, match=r"'wrong' returned no fitting QuantizedWeight for model.layers.0"):
        qcore.quantize(llama, Wrong())


def test_an_algorithm_that_returns_nothing_is_named(llama):
    class Silent(qcore.Algorithm):
        name = "silent"
        needs_calibration = False

        def quantize_block(self, block):
            return None

    with pytest.raises(qcore.RunError, match=r"'silent' returned NoneType for block model.layers.0, expected names"):
        qcore.quantize(llama, Silent())


def test_a_weight_that_is_none_is_told_with_its_block(llama):
    rtn = installed().get("algorithm", "rtn")

    class Broken(rtn):
        def quantize_block(self, block):
            done = super().quantize_block(block)
            return {name: replace(weight, scales=weight.scales * float("nan")) for name, weight in done.items()}

    with pytest.raises(CheckpointError, match=r"block model.layers.0: not a quantized weight: scales hold NaN"):
        qcore.quantize(llama, Broken(), group_size=32)


def test_what_a_watcher_does_to_its_records_stays_with_it(llama_folder, watched, tmp_path):
    class Untidy:
        @qcore.hookimpl
        def qcore_block_finished(self, records):
            for record in records:
                record.clear()
            records.clear()

    out = qcore.quantize(llama_folder, "rtn", group_size=32, plugins=watched(Untidy()), output=tmp_path / "out")
    assert [layer["bits"] for layer in qcore.inspect(out)["layers"]] == [4] * 21


def test_two_adapters_of_one_model_type_are_listed_as_a_clash(plugin):
    names = ("one", "two", "other")
    sources = [ADAPTER.format(name=name, model_type="other" if name == "other" else "shared") for name in names]
    rows = Plugins([plugin(name, source) for name, source in zip(names, sources, strict=True)]).table()
    assert {row["name"]: row["status"] for row in rows} == {"one": "clash", "two": "clash", "other": "loaded"}
    assert "model type shared is claimed by more than one plugin" in rows[0]["reason"]
