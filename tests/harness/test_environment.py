"""What differs between two runs, on manifests made for the purpose, and on the command line."""

import importlib.util
import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from mambench.harness import environment
from mambench.harness.environment import Entry, State

ROOT = Path(__file__).resolve().parents[2]
_SPEC = importlib.util.spec_from_file_location(
    "planning", ROOT / "tests" / "faults" / "planning.py"
)
assert _SPEC is not None
assert _SPEC.loader is not None
planning = importlib.util.module_from_spec(_SPEC)
_SPEC.loader.exec_module(planning)

A = {
    "code": {"id": "1", "commit": "aaaa", "dirty": False},
    "device": "GPU",
    "gpu": {
        "driver": "580",
        "mig": None,
        "temperature_c": 30,
        "clocks_hz": {"sm": {"max": 1.98e9}},
        "missing": {"mig": "Not Supported"},
    },
    "libraries": {"torch": "2.11", "triton": "3.6", "fla-core": None},
    "variables": {"OMP_NUM_THREADS": "8"},
    "platform": "Linux",
    "missing": {"cpu.turbo": "no file"},
    "cpu": {"turbo": None},
}
B = {
    "code": {"id": "2", "commit": "bbbb", "dirty": False},
    "device": "GPU",
    "gpu": {
        "driver": "590",
        "mig": False,
        "temperature_c": 60,
        "clocks_hz": {"sm": {"max": 1.98e9}},
    },
    "libraries": {"torch": "2.11", "triton": "3.7", "fla-core": None},
    "variables": {},
    "platform": "Linux",
    "cpu": {"turbo": None},
}


def by_key(entries: list[Entry]) -> dict[str, Entry]:
    return {f"{e.group}.{e.key}": e for e in entries}


def test_each_key_is_same_different_missing_or_momentary():
    found = by_key(environment.compare(A, B))
    states = {key: entry.state for key, entry in found.items()}
    assert states["gpu.driver"] is State.DIFFERENT
    assert states["libraries.triton"] is State.DIFFERENT
    assert states["code.commit"] is State.DIFFERENT
    assert states["libraries.torch"] is State.SAME
    assert states["libraries.fla-core"] is State.SAME  # neither has it
    assert states["gpu.clocks_hz.sm.max"] is State.SAME
    assert states["gpu.mig"] is State.MISSING  # not supported is not the same as off
    assert states["variables.OMP_NUM_THREADS"] is State.MISSING
    assert states["gpu.temperature_c"] is State.MOMENTARY
    assert states["other.platform"] is State.SAME
    assert found["variables.OMP_NUM_THREADS"].right is None
    assert not any("Supported" in str(vars(entry)) for entry in found.values())


def test_the_text_shows_only_what_differs():
    text = environment.comparison(environment.compare(A, B), ("runs/a", "runs/b"))
    lines = text.splitlines()
    assert lines[:2] == ["A  runs/a", "B  runs/b"]
    assert lines.index("code") < lines.index("gpu") < lines.index("libraries")
    assert any(line.split() == ["triton", "3.6", "3.7", "different"] for line in lines)
    assert not any("2.11" in line for line in lines)
    assert "(missing)" in text
    assert lines[-1] == "7 same, 4 different, 2 missing, 1 momentary"
    assert "\x1b" not in text


def test_nothing_recorded_is_no_other_than_nothing_there():
    entries = environment.compare({"libraries": {"x": None}}, {"libraries": {}})
    assert [entry.state for entry in entries] == [State.SAME]


def test_a_long_value_does_not_push_the_columns_apart():
    left = {"code": {"changed_files": [f"folder/file{i}.py" for i in range(40)]}}
    (entry,) = environment.compare(left, {"code": {"changed_files": []}})
    assert (entry.state, entry.right) == (State.DIFFERENT, "(empty)")
    text = environment.comparison([entry], ("a", "b"))
    assert "folder/file0.py, folder/file1.py" in text
    assert max(map(len, text.splitlines())) < 100


def test_a_terminal_gets_colours():
    text = environment.comparison(environment.compare(A, B), ("a", "b"), colour=True)
    coloured = [line for line in text.splitlines() if "\x1b[" in line]
    assert all(line.endswith("\x1b[0m") for line in coloured)
    assert any("triton" in line and line.startswith("\x1b[33m") for line in coloured)


def test_equal_environments_have_no_difference():
    entries = environment.compare(A, A)
    assert {entry.state for entry in entries} == {State.SAME}
    assert environment.comparison(entries, ("a", "b")).splitlines()[3] == f"{len(entries)} same"


def test_a_listing_gives_reasons():
    text = environment.listing(A, "this machine")
    assert any(line.split() == ["mig", "none:", "Not", "Supported"] for line in text.splitlines())
    assert "turbo  none: no file" in text


def run_folder(path: Path, **changes: Any) -> Path:
    made = planning.plan([planning.case("good")])
    planning.store.RunFolder.create(path, planning.manifest(made, **changes)).close()
    return path


def env(*arguments: object) -> "subprocess.CompletedProcess[str]":
    command = [sys.executable, str(ROOT / "run_bench.py"), "env", *map(str, arguments)]
    return subprocess.run(command, capture_output=True, text=True)


def test_the_command_compares_two_runs(tmp_path: Path):
    a = run_folder(tmp_path / "a", environment={"libraries": {"torch": "1"}})
    b = run_folder(tmp_path / "b", environment={"libraries": {"torch": "2"}}, code={"id": "other"})
    done = env(a, b)
    assert done.returncode == 0, done.stderr
    assert "\x1b" not in done.stdout  # not a terminal
    assert any(
        line.split() == ["torch", "1", "2", "different"] for line in done.stdout.splitlines()
    )
    document = json.loads(env(a, b, "--json").stdout)
    states = {f"{e['group']}.{e['key']}": e["state"] for e in document["entries"]}
    assert states["libraries.torch"] == "different"
    assert states["code.id"] == "different"
    assert states["settings.seed"] == "same"


def test_the_command_prints_one_run_or_this_machine(tmp_path: Path):
    a = run_folder(tmp_path / "a", environment={"libraries": {"torch": "1.2.3"}})
    assert "1.2.3" in env(a).stdout
    assert json.loads(env(a, "--json").stdout)["libraries"] == {"torch": "1.2.3"}
    here = json.loads(env("--json").stdout)
    assert here["cpu"]["model"]
    assert here["code"]["version"]


@pytest.mark.parametrize("arguments", [("nowhere",), ("a", "b", "c")])
def test_a_mistake_is_one_line(tmp_path: Path, arguments: tuple[str, ...]):
    done = env(*(tmp_path / name for name in arguments))
    assert done.returncode in (2, 3)
    assert done.stderr.startswith("error: ")
    assert len(done.stderr.splitlines()) == 1
