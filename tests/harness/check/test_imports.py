"""A check that would compare code with itself is refused, and libraries that differ are told."""

import sys
from pathlib import Path

import pytest

from mambench.harness.check import imports
from mambench.harness.check.sides import Side
from mambench.harness.errors import UsageError
from mambench.harness.workers.pool import Code

PLUGIN = """
import json
from fastmix.inner import op

def late():
    import lazily
"""


@pytest.fixture
def both(tmp_path: Path) -> list[Side]:
    """Return two trees, each with the package below python/, where nobody looks by itself."""
    for name in ("base", "head"):
        (tmp_path / name / "python/fastmix").mkdir(parents=True)
        (tmp_path / name / "python/fastmix/__init__.py").write_text("")
        (tmp_path / name / "bench.py").write_text(PLUGIN)
    return [side(tmp_path / name) for name in ("base", "head")]


def side(root: Path, *folders: Path) -> Side:
    path = tuple(map(str, folders or (root,)))
    return Side(name=root.name, ref=root.name, root=root, code=Code(path=path))


def differences(*sides: Side) -> tuple[str, ...]:
    return imports.differences(*sides, *[[str(s.root / "bench.py")] for s in sides])


def test_a_package_that_both_sides_share_is_refused(both, monkeypatch: pytest.MonkeyPatch):
    # As an editable installation has it.
    monkeypatch.setenv("PYTHONPATH", str(both[1].root / "python"))
    with pytest.raises(UsageError, match=r"both sides would import 'fastmix' from .*head/python"):
        differences(*both)


def test_each_with_its_own_passes(both, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setenv("PYTHONPATH", str(both[1].root / "python"))
    own = [side(s.root, s.root / "python") for s in both]
    assert differences(*own) == ()
    found = imports.ask(own[0], [str(own[0].root / "bench.py")])
    assert found.origins == {"fastmix": str(own[0].root / "python/fastmix/__init__.py")}


def test_what_only_the_environment_has_may_be_shared(both, monkeypatch: pytest.MonkeyPatch):
    for one in both:  # the tree has none of this name any more
        (one.root / "python/fastmix/__init__.py").unlink()
    assert differences(*both) == ()


def test_libraries_that_differ_are_told(both):
    for one, version in zip(both, ("1.0", "1.1"), strict=True):
        info = one.root / f"fastlib-{version}.dist-info"
        info.mkdir()
        (info / "METADATA").write_text(f"Metadata-Version: 2.1\nName: fastlib\nVersion: {version}")
    assert differences(*both) == ("fastlib: 1.0 -> 1.1",)


def test_imports_in_functions_count_and_relative_ones_do_not():
    assert imports.imported(PLUGIN + "from . import near") == {"json", "fastmix", "lazily"}


def test_one_tree_is_compared_with_itself_on_purpose(both, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(sys, "executable", "/nonexistent")  # nobody is asked
    assert differences(both[0], both[0]) == ()
