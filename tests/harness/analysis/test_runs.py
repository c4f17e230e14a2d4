"""What reports show of a run, and which runs' results may be pooled."""

from typing import Any

import pytest

from mambench.harness.analysis.runs import make_run, sources_of


def manifest(run_id: str, **changes: Any) -> dict[str, Any]:
    base = {
        "run_id": run_id,
        "created_at": run_id,
        "command": ["run_bench.py", "run", "--suite", "a b"],
        "suite": "quick",
        "device": {"kind": "cuda", "name": "Fixture GPU", "memory_bytes": 1},
        "environment": {"libraries": {"torch": "2.11"}, "memory": {"available_bytes": run_id}},
        "code": {"commit": "c" * 40},
    }
    return base | changes


def test_a_command_can_be_pasted_into_a_shell():
    assert make_run(manifest("a")).command == "run_bench.py run --suite 'a b'"


def test_what_is_absent_is_empty():
    run = make_run({})
    assert (run.run_id, run.command, run.code_version) == ("run", "", "unknown")
    assert not run.settings
    assert not run.ceilings


def test_warnings_follow_a_runs_own_notes():
    run = make_run(manifest("a", notes=["its own"]), notes=["a torn line was dropped"])
    assert run.notes == ("its own", "a torn line was dropped")


def test_runs_of_one_machine_have_one_source():
    assert make_run(manifest("a")).source == make_run(manifest("b")).source


@pytest.mark.parametrize(
    "other",
    [
        {"device": {"kind": "cuda", "name": "Other", "memory_bytes": 1}},
        {"environment": {"libraries": {"torch": "2.12"}}},
        {"environment": {"libraries": {"torch": "2.11"}, "gpu": {"uuid": "another"}}},
        {"code": {"commit": "d" * 40}},
        {"code": {"commit": "c" * 40, "dirty": True}},
    ],
)
def test_runs_that_differ_in_device_software_or_code_stay_apart(other: dict[str, Any]):
    made = [make_run(manifest("a")), make_run(manifest("b", **other))]
    sources = sources_of({run.source: [run] for run in made})
    assert len(sources) == 2
    assert len({source.label for source in sources}) == 2
