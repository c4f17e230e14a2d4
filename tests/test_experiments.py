"""The experiments' scripts stay runnable as far as that shows without a GPU."""

import ast
from pathlib import Path

import pytest

FOLDER = Path(__file__).resolve().parents[1] / "published" / "experiments"
SCRIPTS = sorted(FOLDER.glob("*.py"))


def defined(tree: ast.Module) -> set[str]:
    """Return what a module defines at its top level."""
    targets = [t for n in tree.body if isinstance(n, ast.Assign) for t in n.targets]
    values = {n.id for t in targets for n in ast.walk(t) if isinstance(n, ast.Name)}
    return values | {n.name for n in tree.body if isinstance(n, ast.FunctionDef | ast.ClassDef)}


def lacking(source: str) -> set[str]:
    """Return what a script imports from a script beside it that does not define it."""
    found: set[str] = set()
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.ImportFrom) and (FOLDER / f"{node.module}.py").exists():
            beside = ast.parse((FOLDER / f"{node.module}.py").read_text(encoding="utf-8"))
            found |= {alias.name for alias in node.names} - defined(beside)
    return found


@pytest.mark.parametrize("script", SCRIPTS, ids=lambda path: path.stem)
def test_a_script_takes_what_the_one_beside_it_has(script: Path):
    assert lacking(script.read_text(encoding="utf-8")) == set()


def test_a_name_that_is_gone_is_noticed():
    assert lacking("from parts import kernels, gone") == {"gone"}
