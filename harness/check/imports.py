"""What the sides of a check would import: whether it is their own, and which libraries differ.

A package that is installed elsewhere than a side looks for its own is the same on both sides, and
the check would compare it with itself and pass. So each side is asked, in a process that imports
nothing of it, where the names come from that its plugin or inventory imports.
"""

import ast
import importlib.util
import json
import subprocess
import sys
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from importlib.metadata import distributions
from pathlib import Path

import mambench
from mambench.harness.check.sides import Side
from mambench.harness.errors import MeasurementError, UsageError
from mambench.harness.registry import beside
from mambench.harness.workers.pool import environment

LIMIT_S = 60.0
# Where a tree may hold a package or module, from its root.
_PLACES = ("{}/__init__.py", "{}.py", "*/{}/__init__.py", "*/{}.py", "*/*/{}/__init__.py")


@dataclass(frozen=True, kw_only=True)
class Imports:
    """What one side would import."""

    origins: Mapping[str, str]  # of the names that the files import and the tree holds: the file
    versions: Mapping[str, str]  # of every installed distribution, by name


def differences(
    base: Side, head: Side, base_files: Sequence[str], head_files: Sequence[str]
) -> tuple[str, ...]:
    """Return which installed libraries differ between the sides, `name: version -> version`.

    Raises UsageError if both sides would import one copy of what the repository holds.
    """
    if base.root == head.root:
        return ()
    found = ask(base, base_files), ask(head, head_files)
    refuse_shared(*found)
    return changed(*found)


def ask(side: Side, files: Sequence[str]) -> Imports:
    """Return what a side would import, by its plugins' or inventory's files."""
    start = Path(mambench.__file__).with_name("_start.py")
    request = {"root": str(side.root), "files": [name for name in files if name.endswith(".py")]}
    try:
        done = subprocess.run(
            [sys.executable, "-P", str(start), "harness.check.imports"],
            input=json.dumps(request).encode(),
            capture_output=True,
            env=environment(1, side.code),
            timeout=LIMIT_S,
            check=True,
        )
    except (subprocess.TimeoutExpired, subprocess.CalledProcessError) as error:
        raise MeasurementError(f"what the {side.name} imports cannot be told: {error}") from error
    return Imports(**json.loads(done.stdout))


def refuse_shared(base: Imports, head: Imports) -> None:
    """Raise UsageError if both sides would import one copy of what the repository holds."""
    for name, origin in head.origins.items():
        if base.origins.get(name) == origin:
            raise UsageError(
                f"both sides would import '{name}' from {origin}, and the check would compare it "
                f"with itself. Name the folder of each side that holds it (--path python), or "
                f"build each: --build 'pip install --no-deps --upgrade -t .bench .' --path .bench."
            )


def changed(base: Imports, head: Imports) -> tuple[str, ...]:
    """Return which installed libraries differ between the sides."""
    names = sorted({*base.versions, *head.versions})
    return tuple(
        f"{name}: {base.versions.get(name, 'absent')} -> {head.versions.get(name, 'absent')}"
        for name in names
        if base.versions.get(name) != head.versions.get(name)
    )


def imported(source: str) -> set[str]:
    """Return the top-level names that a source file imports, in functions too."""
    found: set[str] = set()
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            found.update(alias.name.partition(".")[0] for alias in node.names)
        elif isinstance(node, ast.ImportFrom) and node.module and not node.level:
            found.add(node.module.partition(".")[0])
    return found


def _held(root: Path, name: str) -> bool:
    return any(any(root.glob(place.format(name))) for place in _PLACES)


def _origins(root: Path, files: Iterable[str]) -> dict[str, str]:
    """Return where the names come from that the files import and the tree holds."""
    found: dict[str, str] = {}
    for path in map(Path, files):
        try:
            names = imported(path.read_text(encoding="utf-8"))
        except (OSError, SyntaxError, ValueError):
            continue  # who imports it says what is wrong with it
        sys.path.extend(beside(path))
        for name in sorted(names - {"mambench"}):
            spec = importlib.util.find_spec(name) if _held(root, name) else None
            if spec is not None and spec.origin is not None:
                found[name] = spec.origin
    return found


def main() -> None:
    """Answer the request on standard input with JSON on standard output."""
    asked = json.load(sys.stdin)
    installed = ((d.metadata["Name"], d.version) for d in distributions())
    versions: dict[str, str] = {}
    for name, version in installed:  # the first on sys.path is what would be imported
        if name:  # of a broken installation there is none
            versions.setdefault(name, version)
    json.dump({"origins": _origins(Path(asked["root"]), asked["files"]), "versions": versions},
              sys.stdout)  # fmt: skip


if __name__ == "__main__":
    main()
