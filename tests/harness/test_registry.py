"""Finding implementations: built-ins, plugins, entry points, and what is refused."""

import sys
from importlib.metadata import EntryPoint
from pathlib import Path

import pytest

from mambench.harness import registry
from mambench.harness.errors import PluginError, UsageError
from mambench.implementations.base import Implementation

PLUGIN = """
from mambench.harness.spec import Family
from mambench.implementations.base import Implementation, Variant

class Mine(Implementation):
    name = "mine"
    families = (Family.S6,)
    summary = "a plugin"

    def variants(self, device):
        return (Variant(name="only"),)

    def op(self, family, variant):
        raise NotImplementedError

class _Hidden(Mine):
    name = "hidden"
"""


@pytest.fixture
def plugin(tmp_path: Path) -> Path:
    path = tmp_path / "mine.py"
    path.write_text(PLUGIN)
    return path


def edited(path: Path, old: str, new: str) -> str:
    assert old in PLUGIN
    path.write_text(PLUGIN.replace(old, new))
    return str(path)


def test_the_built_ins_are_what_their_names_say():
    found = registry.load()
    assert list(found) == list(registry.BUILT_IN)
    for name, implementation in found.items():
        assert isinstance(implementation, Implementation)
        assert implementation.name == name
        assert implementation.summary


def test_a_plugin_file_adds_its_public_classes(plugin: Path):
    found = registry.load([str(plugin)])
    assert found["mine"].summary == "a plugin"
    assert "hidden" not in found
    assert registry.load([str(plugin), str(plugin)])["mine"].name == "mine"


def test_a_plugin_module(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    (tmp_path / "mambench_test_module.py").write_text(PLUGIN)
    monkeypatch.syspath_prepend(tmp_path)
    assert "mine" in registry.load(["mambench_test_module"])


def test_an_entry_point(plugin: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    (tmp_path / "mambench_test_entry.py").write_text(PLUGIN)
    monkeypatch.syspath_prepend(tmp_path)
    point = EntryPoint("mine", "mambench_test_entry:Mine", registry.ENTRY_POINT_GROUP)
    monkeypatch.setattr(registry, "entry_points", lambda group: [point])
    assert "mine" in registry.load()
    broken = EntryPoint("mine", "mambench_test_entry:Absent", registry.ENTRY_POINT_GROUP)
    monkeypatch.setattr(registry, "entry_points", lambda group: [broken])
    with pytest.raises(
        PluginError, match="entry point 'mine': mambench_test_entry has no 'Absent'"
    ):
        registry.load()


@pytest.mark.parametrize(
    ("old", "new", "says"),
    [
        ('name = "mine"', 'name = "ssd"', "two implementations are named 'ssd'"),
        ('name = "hidden"', 'name = "mine"\nclass Again(Mine): pass', "two implementations are"),
        ('    name = "mine"\n', "", "class Mine lacks name"),
        ('name = "mine"', 'name = "mi:ne"', "'mi:ne' is not a usable name"),
        ('name = "mine"', 'name = ""', "'' is not a usable name"),
        ("(Family.S6,)", "()", "families must be a tuple of Family members"),
        ("(Family.S6,)", '("s6",)', "families must be a tuple of Family members"),
        (
            "class Mine(Implementation)",
            "class _Mine(Implementation)",
            "cannot be imported: NameErr",
        ),
        ("    def op(", "    def operation(", "defines neither an implementation"),
        ("import Family", "import Familie", "cannot be imported: ImportError"),
        ("class Mine", "raise SystemExit(3)\nclass Mine", "cannot be imported: SystemExit"),
        ("class Mine", "class Mine Mine", "cannot be imported: SyntaxError"),
    ],
)
def test_a_bad_plugin_is_refused(plugin: Path, old: str, new: str, says: str):
    with pytest.raises(PluginError) as caught:
        registry.load([edited(plugin, old, new)])
    assert says in str(caught.value)
    assert "plugin" in str(caught.value)


def test_a_plugin_that_failed_can_be_mended(plugin: Path):
    with pytest.raises(PluginError):
        registry.load([edited(plugin, "import Family", "import Familie")])
    plugin.write_text(PLUGIN)
    assert "mine" in registry.load([str(plugin)])


@pytest.mark.parametrize("folder", ["", "src"])
def test_a_plugin_file_finds_its_package_beside_it(
    plugin: Path, folder: str, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setattr(sys, "path", [*sys.path])
    name = f"mambench_test_beside_{folder or 'it'}"
    (plugin.parent / folder).mkdir(exist_ok=True)
    (plugin.parent / folder / f"{name}.py").write_text("SUMMARY = 'of the package'")
    plugin.write_text(PLUGIN.replace('"a plugin"', f"__import__('{name}').SUMMARY"))
    assert registry.load([str(plugin)])["mine"].summary == "of the package"


def test_a_package_that_is_nowhere_can_be_installed(plugin: Path):
    with pytest.raises(PluginError, match="No module named 'no_such_package'; install it"):
        registry.load([edited(plugin, "class Mine", "import no_such_package\nclass Mine")])


@pytest.mark.parametrize("name", ["absent.py", "./absent.py", "no_such_module_anywhere"])
def test_a_plugin_that_is_not_there(name: str):
    with pytest.raises(PluginError, match=r"absent|no_such_module_anywhere"):
        registry.load([name])


def test_normalise_makes_files_absolute(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.chdir(tmp_path)
    assert registry.normalise("mine.py") == str(tmp_path / "mine.py")
    assert registry.normalise("package.module") == "package.module"


def test_get(plugin: Path):
    assert registry.get("mine", [str(plugin)]).name == "mine"
    assert registry.get("flash_attention").name == "flash_attention"
    with pytest.raises(UsageError, match="Did you mean 'selective_scan'"):
        registry.get("selectiv_scan")


def test_match():
    names = ["naive_recurrence", "associative_scan", "selective_scan"]
    assert registry.match("*_scan", names) == ["associative_scan", "selective_scan"]
    with pytest.raises(UsageError, match="unknown implementation 'scan'"):
        registry.match("scan", names)
