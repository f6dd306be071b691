"""What `qcore new-plugin` writes; that it passes its own tests where it is installed, test_stranger.py shows."""

import pytest
from click.testing import CliRunner

from qcore import ConfigError, cli
from qcore.plugins import KINDS, Plugins
from qcore.testing import check_plugin, entry_point
from qcore.tools import new_plugin


@pytest.fixture(scope="module")
def written(tmp_path_factory):
    """A distribution of each kind."""
    parent = tmp_path_factory.mktemp("new")
    return {kind: new_plugin.write(kind, f"my-{kind}", parent) for kind in sorted(KINDS.values())}


@pytest.mark.parametrize("kind", sorted(KINDS.values()))
def test_it_offers_what_was_asked_for(written, kind, tmp_path):
    (module,) = written[kind].glob("*.py")
    point = entry_point(tmp_path, module.stem, module.read_text(), written[kind].name)
    check_plugin(point)
    assert list(Plugins([point], disabled=(), only=None).offers(kind)) == [f"my-{kind}"]
    assert max(map(len, module.read_text().splitlines())) <= 120


def test_the_command_says_what_to_do_next(tmp_path):
    found = CliRunner().invoke(cli.cli, ["new-plugin", "my_kernel", "--kind", "backend", "--in", str(tmp_path)])
    assert found.exit_code == 0
    assert f"pip install -e '{tmp_path}/qcore-plugin-my-kernel[test]'" in found.output
    assert "class MyKernel(Backend)" in (tmp_path / "qcore-plugin-my-kernel" / "qcore_plugin_my_kernel.py").read_text()


@pytest.mark.parametrize(
    ("kind", "name", "says"),
    [("kernel", "a", "no kind of plugin is called 'kernel'"), ("backends", "a", "Did you mean 'backend'"),
     ("task", "My Task", "expected lower-case letters"), ("task", "2x", "expected lower-case letters"),
     ("task", "../x", "expected lower-case letters"), ("task", "there", "exists already")],
)  # fmt: skip
def test_what_cannot_be_meant_is_said_so(tmp_path, kind, name, says):
    (tmp_path / "qcore-plugin-there").mkdir()
    with pytest.raises(ConfigError, match=says):
        new_plugin.write(kind, name, tmp_path)
