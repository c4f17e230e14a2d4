"""Profilers as the runner and its workers use them: planted ones, with one fault each."""

import importlib.util
from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path

import pytest

from mambench.harness import runner
from mambench.harness.lock import device_lock
from mambench.harness.plan import Plan
from mambench.harness.records import Observation
from mambench.harness.spec import Outcome
from mambench.harness.store import RunFolder
from mambench.harness.workers.pool import WorkerPool

FAULTS = Path(__file__).parents[2] / "faults"
_SPEC = importlib.util.spec_from_file_location("planning", FAULTS / "planning.py")
assert _SPEC is not None
assert _SPEC.loader is not None
planning = importlib.util.module_from_spec(_SPEC)
_SPEC.loader.exec_module(planning)


@pytest.fixture(scope="module")
def pool() -> Iterator[WorkerPool]:
    with WorkerPool(threads=1) as opened:
        yield opened


@pytest.fixture(autouse=True)
def _own_lock(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(
        runner, "device_lock", lambda key, **options: device_lock(key, folder=tmp_path, **options)
    )


def plan(measurements: Sequence[str], seqlens: Sequence[int] = (8,), name: str = "good") -> Plan:
    settings = replace(planning.QUICK, measurements=tuple(measurements))
    made = planning.plan([planning.case(name, seqlen=n) for n in seqlens], settings)
    return replace(made, plugins=(str(planning.PLUGIN), str(FAULTS / "profilers.py")))


def run(path: Path, made: Plan, pool: WorkerPool) -> tuple[list[Observation], runner.RunSummary]:
    exists = path.exists()
    folder = RunFolder.open(path, for_append=True) if exists else planning.folder(path, made)
    with folder:
        summary = runner.run(made, folder, pool=pool)
    return folder.observations(), summary


def test_a_plugin_s_profiler_measures_and_says_what_it_did_not_find(
    tmp_path: Path, pool: WorkerPool
) -> None:
    found, summary = run(tmp_path / "run", plan(["time", "outputs"]), pool)
    outputs = next(o for o in found if o.measurement == "outputs")
    assert outputs.values["outputs_1"] == 1
    assert outputs.values["outputs_never_found_1"] is None
    assert outputs.method == "counted"
    assert summary.counts == {Outcome.OK: 1}


def test_a_profiler_that_raises_fails_alone(tmp_path: Path, pool: WorkerPool) -> None:
    found, summary = run(tmp_path / "run", plan(["time", "raises", "outputs"]), pool)
    by_name = {o.measurement: o for o in found}
    assert by_name["raises"].outcome is Outcome.ERROR
    assert by_name["raises"].reason == "ValueError: planted profiler (in raises)"
    assert "second line" in by_name["raises"].details["traceback"]
    assert not by_name["raises"].values
    assert by_name["time"].values["time_s"] > 0
    assert by_name["outputs"].values["outputs_1"] == 1
    assert summary.failed


def test_a_profiler_that_kills_the_process_fails_alone(tmp_path: Path, pool: WorkerPool) -> None:
    found, _ = run(tmp_path / "run", plan(["time", "dies", "outputs", "memory"]), pool)
    by_name = {o.measurement: o for o in found}
    assert {name: o.outcome for name, o in by_name.items()} == {
        "dies": Outcome.CRASHED,
        "time": Outcome.OK,
        "outputs": Outcome.OK,
        "memory": Outcome.OK,
    }
    assert "status 9" in (by_name["dies"].reason or "")
    # The gate was passed before the profiler died, and is not repeated for the others.
    assert "gate" not in by_name["time"].details


def test_a_failed_profiler_does_not_fail_what_a_resumed_run_measures(
    tmp_path: Path, pool: WorkerPool
) -> None:
    made = plan(["time", "raises", "memory"])
    run(tmp_path / "run", made, pool)
    results = tmp_path / "run" / "results.jsonl"
    lines = results.read_text().splitlines(keepends=True)
    results.write_text("".join(line for line in lines if '"measurement":"raises"' in line))
    found, _ = run(tmp_path / "run", made, pool)
    assert [(o.measurement, o.outcome) for o in found[1:]] == [
        ("time", Outcome.OK),
        ("memory", Outcome.OK),
    ]


def test_what_a_device_cannot_give_is_recorded_with_its_reason(
    tmp_path: Path, pool: WorkerPool
) -> None:
    found, summary = run(tmp_path / "run", plan(["time", "elsewhere", "call_time"]), pool)
    absent = {o.measurement: o for o in found if o.measurement != "time"}
    assert absent["elsewhere"].values["elsewhere_1"] is None
    assert absent["elsewhere"].details["missing"] == "elsewhere is measured on cuda only"
    assert absent["call_time"].values["call_time_s"] is None
    assert summary.counts == {Outcome.OK: 1}


def test_a_wrong_case_fails_in_all_its_measurements(tmp_path: Path, pool: WorkerPool) -> None:
    made = plan(["time", "outputs", "elsewhere", "batched"], name="wrong")
    found, _ = run(tmp_path / "run", made, pool)
    assert {o.measurement: o.outcome for o in found} == dict.fromkeys(
        ("time", "outputs", "elsewhere", "batched"), Outcome.WRONG
    )


def test_a_batch_is_measured_after_the_sweep_and_resumed(tmp_path: Path, pool: WorkerPool) -> None:
    made = plan(["time", "batched"], seqlens=(8, 9, 10, 11, 12))
    found, _ = run(tmp_path / "run", made, pool)
    assert [o.measurement for o in found] == ["time"] * 5 + ["batched"] * 5
    ended = {o.case.problem.seqlen: o for o in found[5:]}
    assert [ended[n].values.get("batched_1") for n in (8, 9)] == [5, 5]
    assert (ended[10].outcome, ended[10].reason) == (Outcome.TIMEOUT, "planted timeout")
    for n in (11, 12):  # the exception is theirs, in whose measurement it was raised
        assert ended[n].outcome is Outcome.ERROR
        assert ended[n].reason == "RuntimeError: planted batch (in batched)"
    lines = (tmp_path / "run" / "results.jsonl").read_text().splitlines(keepends=True)
    (tmp_path / "run" / "results.jsonl").write_text("".join(lines[:6]))  # 8 was measured
    again, _ = run(tmp_path / "run", made, pool)
    assert [(o.case.problem.seqlen, o.values.get("batched_1")) for o in again[6:8]] == [
        (9, 4),
        (10, None),
    ]
