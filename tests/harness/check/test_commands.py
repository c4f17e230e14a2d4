"""What a check refuses, and says in its report; stored noise; two runs side by side."""

import json
import shutil
from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from check_rounds import ALL, CASES, side

from mambench.harness import machine, machine_cache
from mambench.harness.check import accept, budgets, explain, noise, side_plan, sides
from mambench.harness.check import commands as checking
from mambench.harness.check.commands import Request
from mambench.harness.check.conclusion import CheckReport
from mambench.harness.check.judge import assess
from mambench.harness.check.measure import Measured
from mambench.harness.check.progress import make
from mambench.harness.check.rounds import AA
from mambench.harness.check.rule import Rule
from mambench.harness.check.sides import Side, Wanted
from mambench.harness.errors import DeviceBusyError, RunFolderError, UsageError
from mambench.harness.plan import Plan, PlannedCase
from mambench.harness.records import Observation
from mambench.harness.spec import Settings
from mambench.harness.store import RunFolder
from mambench.harness.verdict import Assessment, Kind, Verdict
from mambench.harness.workers.pool import Code

CPU = machine.cpu()
SETTINGS = Settings()
PLAN = Plan(
    suite="planted",
    device=CPU,
    settings=Settings(),
    cases=tuple(PlannedCase(case=c) for c in CASES),
)


def stored(path: Path, observations: list[Observation], **changes: Any) -> Path:
    manifest = {
        "schema": 1,
        "run_id": "x",
        "created_at": "2026-01-01T00:00:00+00:00",
        "command": [],
        **PLAN.to_dict(),
        "environment": machine.environment(CPU),
        "code": {"id": "x", "version": "0", "commit": None},
    }
    with RunFolder.create(path, {**manifest, **changes}) as folder:
        for observation in observations:
            folder.append(observation)
    return path


@pytest.fixture
def check(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Callable[..., CheckReport]:
    both = [Side(name=n, ref=n, root=tmp_path, code=Code()) for n in ("base", "head")]
    monkeypatch.setattr(sides, "prepared", lambda wanted, folder, note: nullcontext(both))
    monkeypatch.setattr(side_plan, "ask", lambda side, asked: PLAN)

    def run(baseline: Path | None, **more: Any) -> CheckReport:
        request = Request(
            asked={},
            wanted=Wanted(repository=tmp_path, base="main"),
            baseline=baseline,
            output=tmp_path / "out",
            store=tmp_path / "store",
            **more,
        )
        return checking.check(request, make(quiet=True, environment={}))[0]

    return run


def five(path: Path, **changes: Any) -> Path:
    return stored(path, side(range(1, 6)), **changes)


def test_a_baseline_that_is_not_there(check: Callable[..., CheckReport], tmp_path: Path):
    report = check(tmp_path / "nothing")
    assert report.exit_code == 4
    assert "there is no baseline" in report.conclusion


def test_a_baseline_of_another_machine(check: Callable[..., CheckReport], tmp_path: Path):
    environment = machine.environment(CPU)
    environment["cpu"] = {**environment["cpu"], "model": "another processor"}
    report = check(five(tmp_path / "run", environment=environment))
    assert report.exit_code == 4
    assert "was made on another machine" in report.conclusion


def test_a_baseline_of_another_schema(check: Callable[..., CheckReport], tmp_path: Path):
    path = five(tmp_path / "run")
    manifest = json.loads((path / "manifest.json").read_text())
    (path / "manifest.json").write_text(json.dumps({**manifest, "schema": 99}))
    report = check(path)
    assert report.exit_code == 4
    assert "schema version 99" in report.conclusion


def test_a_baseline_that_is_broken(check: Callable[..., CheckReport], tmp_path: Path):
    path = five(tmp_path / "run")
    lines = (path / "results.jsonl").read_text().splitlines()
    (path / "results.jsonl").write_text("\n".join(["{", *lines]) + "\n")
    report = check(path)
    assert report.exit_code == 4
    assert "line 1" in report.conclusion


def test_a_baseline_of_one_round_says_nothing_of_noise(
    check: Callable[..., CheckReport], tmp_path: Path
):
    report = check(stored(tmp_path / "run", side(range(1, 2))))
    assert report.exit_code == 4
    assert "1 rounds" in report.conclusion


def test_a_busy_device_is_not_measured(
    check: Callable[..., CheckReport], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    def busy(*_: Any, **__: Any) -> None:
        raise DeviceBusyError("the CPU is in use by another run")

    monkeypatch.setattr(checking.Check, "run", busy)
    report = check(None)
    assert report.exit_code == 4
    assert "in use by another run" in report.conclusion


def test_what_is_measured_and_not_judged_is_named():
    asked = ("time", "call_time", "memory", "traffic", "launches", "energy", "cold_time")
    plan = replace(PLAN, settings=replace(PLAN.settings, measurements=asked))
    assert side_plan.unjudged(plan) == ["energy", "cold_time"]


def test_a_mistake_stays_a_mistake(
    check: Callable[..., CheckReport], monkeypatch: pytest.MonkeyPatch
):
    def wrong(*_: Any) -> None:
        raise UsageError("the head: unknown implementation 'x'.")

    monkeypatch.setattr(side_plan, "ask", wrong)
    with pytest.raises(UsageError, match="unknown implementation"):
        check(None)


def test_an_earlier_check_serves_as_a_baseline_by_its_candidate(tmp_path: Path):
    (tmp_path / "check").mkdir()
    five(tmp_path / "check/head")
    assert checking.open_baseline(tmp_path / "check").path == tmp_path / "check/head"


def test_two_runs_are_shown_without_a_verdict(tmp_path: Path):
    first = five(tmp_path / "a")
    second = stored(tmp_path / "b", side(range(1, 6), factor=lambda _: 1.5, seed=1))
    report = checking.compare(first, second)
    assert report.exit_code == 0
    assert not report.judged
    changes = [p.change_frac for p in report.assessment.points if p.metric == "time_s"]
    assert changes[0] == pytest.approx(0.5, abs=0.05)
    kinds = {p.kind for p in report.assessment.points}
    assert kinds == {Kind.CASE, Kind.FAMILY, Kind.EXPONENT}


def test_runs_of_one_round_can_be_shown(tmp_path: Path):
    first, second = (stored(tmp_path / n, side(range(1, 2), seed=i)) for i, n in enumerate("ab"))
    report = checking.compare(first, second)
    assert all(p.change_frac is not None for p in report.assessment.points)


def test_the_fingerprint_of_a_run_is_the_machines(tmp_path: Path):
    folder = RunFolder.open(five(tmp_path / "run"))
    assert noise.of_manifest(folder.manifest) == machine_cache.fingerprint(CPU)


def aa(pairs: int) -> AA:
    values = [[float(-7 + 0.001 * i), float(-7 - 0.001 * i)] for i in range(pairs)]
    return AA(pairs={c.case_id: {"time_s": values} for c in CASES})


def test_noise_is_kept_and_grows_to_the_newest_rounds(tmp_path: Path):
    assert noise.load(CPU, SETTINGS, tmp_path) is None
    noise.keep(aa(5), CPU, SETTINGS, tmp_path)
    known = noise.load(CPU, SETTINGS, tmp_path)
    assert known is not None
    assert not known.knows(CASES)
    for _ in range(8):
        noise.keep(aa(5), CPU, SETTINGS, tmp_path)
    known = noise.load(CPU, SETTINGS, tmp_path)
    assert known is not None
    assert known.knows(CASES)
    assert len(known.pairs.pairs[CASES[0].case_id]["time_s"]) == noise.KEPT_PAIRS
    rate = noise.alarm_rate(known.pairs, CASES, Rule())
    assert rate is not None
    assert (rate["alarms"], rate["aa_rounds"]) == (0, noise.KEPT_PAIRS)


def test_noise_is_of_conditions_and_of_the_times_that_are_asked_for(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    noise.keep(aa(9), CPU, SETTINGS, tmp_path)
    known = noise.load(CPU, SETTINGS, tmp_path)
    assert known is not None
    assert known.knows(CASES)
    assert not known.knows(CASES, ["time_s", "call_time_s"])
    longer = replace(SETTINGS, target_s=SETTINGS.target_s * 2, time_limit_s=1.0)
    assert noise.load(CPU, longer, tmp_path) is None
    assert "(target_s: 0.5 -> 1.0)" in noise.unknown(CPU, longer, tmp_path)
    assert noise.load(CPU, replace(SETTINGS, time_limit_s=1.0), tmp_path) is not None
    noise.keep(aa(8), CPU, longer, tmp_path)
    assert noise.load(CPU, longer, tmp_path) is not None
    assert "not known for all cases" in noise.unknown(CPU, SETTINGS, tmp_path)
    here = machine.environment(CPU)
    other = {**here, "libraries": {**here["libraries"], "torch": "0.1"}}
    monkeypatch.setattr(machine, "environment", lambda device=None: other)
    assert noise.load(CPU, SETTINGS, tmp_path) is None
    assert "torch" in noise.unknown(CPU, SETTINGS, tmp_path)


def test_rounds_that_were_timed_in_another_way_are_forgotten(tmp_path: Path):
    def timed(way: str) -> AA:
        return replace(aa(9), methods={c.case_id: {"time_s": way} for c in CASES})

    noise.keep(timed("events"), CPU, SETTINGS, tmp_path)
    for count in (9, 18):
        noise.keep(timed("cuda-graph"), CPU, SETTINGS, tmp_path)
        known = noise.load(CPU, SETTINGS, tmp_path)
        assert known is not None
        assert len(known.pairs.rows(CASES[0], "time_s", {"cuda-graph"})) == count
        assert known.pairs.rows(CASES[0], "time_s", {"events"}) == ()


@pytest.mark.parametrize("text", ["{", "[]", '{"version": 99}', '{"version": 1}'])
def test_noise_that_cannot_be_read_is_refused(tmp_path: Path, text: str):
    noise.path(CPU, tmp_path).write_text(text)
    with pytest.raises(RunFolderError, match="calibrate again"):
        noise.load(CPU, SETTINGS, tmp_path)


def test_a_regression_is_explained_and_can_be_reproduced(tmp_path: Path):
    from check_rounds import evidence, observation

    def with_details(observations: list[Observation], clock: float, warps: int):
        return [
            replace(
                o,
                details={
                    "telemetry": {"after": {"sm_clock_hz": clock}},
                    "throttled": ["power_cap"] if clock < 1.5e9 else [],
                    "config": {"num_warps": warps},
                },
            )
            for o in observations
        ]

    base = with_details(side(ALL), 1.98e9, 4)
    head = with_details(side(ALL, seed=1, factor=lambda c: 1 + 0.2 * (c == CASES[0])), 1.4e9, 8)
    extra = observation(CASES[0], {"peak_memory_bytes": 2**27}, measurement="memory", round=0)
    found = evidence(base, [*head, extra])
    assert assess(found, Rule()).points
    notes = explain.differences(CASES[0], found.base, found.head)
    assert any("SM clock: 1980 -> 1400 MHz" in note for note in notes)
    assert any(note.startswith("throttled in 0 of 21") for note in notes)
    assert any("config.num_warps: 4 -> 8" in note for note in notes)
    assert any(note.startswith("peak_memory_bytes") for note in notes)
    request = Request(asked={}, wanted=Wanted(repository=tmp_path, base="main"), program=("mb",))
    point = assess(found, Rule()).points[0]
    command = checking.command(point, PLAN, request, "main")
    assert command.startswith("mb check --base main --head worktree --suite custom -i ")
    assert f"seqlen={CASES[0].problem.seqlen}" in command


def test_a_kernel_of_another_configuration_is_named():
    from check_rounds import evidence, observation

    def launches(warps: int, registers: int) -> Observation:
        constants = {"BLOCK": 64, "WIDE": "True"}
        kernel = {"name": "_scan", "shared_bytes": 8 * registers, "warps": warps}
        kernel |= {"constants": constants, "registers": registers}
        details = {"triton_kernels": [kernel], "kernels": [{"name": "_scan", "time_s": registers}]}
        return observation(CASES[0], {}, measurement="launches", round=0, details=details)

    base, head = [*side(ALL), launches(4, 128)], [*side(ALL, seed=1), launches(8, 168)]
    found = evidence(base, head)
    (note,) = checking._annotated(Assessment(points=()), found).notes
    assert CASES[0].label in note
    assert note.endswith("launches.triton_kernels._scan.warps: 4 -> 8")
    assert checking._annotated(Assessment(points=()), evidence(base, base)).notes == ()
    assert explain.differences(CASES[0], found.base, found.head) == (
        "launches.triton_kernels._scan.registers: 128 -> 168",
        "launches.triton_kernels._scan.shared_bytes: 1024 -> 1344",
        "launches.triton_kernels._scan.warps: 4 -> 8",
    )


def test_budgets_are_judged_explained_and_accepted_with_the_rest(
    check: Callable[..., CheckReport], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    from check_rounds import evidence

    slower = side(ALL, seed=1, factor=lambda c: 1 + 0.2 * (c == CASES[0]))
    found = evidence(side(ALL), slower)
    libraries = ["fastlib: 1.0 -> 1.1"]

    class Measures:
        def __init__(self, arms: Any, path: Path, *_: Any) -> None:
            if not (path / "head").exists():
                stored(path / "head", slower)

        def run(self, *, wait: bool) -> Measured:
            return Measured(assessment=assess(found, Rule()), evidence=found, wall_s=1.0)

    monkeypatch.setattr(checking, "Check", Measures)
    monkeypatch.setattr(checking.imports, "differences", lambda *_: tuple(libraries))
    (tmp_path / "budgets.yaml").write_text(
        "budgets:\n"
        "  - {name: fast, cases: [implementation=a, seqlen=256], at_most: 1.0e-9}\n"
        "  - {name: slow, cases: [implementation=a, seqlen=256], at_most: 1.0}\n"
    )
    meant = "[{case: 'fast: *', reason: meant, expires: 2999-01-01}]"
    (tmp_path / "accepted.yaml").write_text(meant)
    made = check(
        None,
        budgets=budgets.read(tmp_path / "budgets.yaml"),
        accepted=accept.read(tmp_path / "accepted.yaml"),
    )
    told = {p.name: p for p in made.assessment.points if p.metric == "time_s"}
    label = CASES[0].label
    assert told[f"fast: {label}"].accepted == "meant (until 2999-01-01)"
    assert told[f"slow: {label}"].verdict is Verdict.SAME
    assert told[label].verdict is Verdict.REGRESSED
    for name in (label, f"fast: {label}"):
        assert told[name].notes == tuple(libraries)
        assert told[name].command
    assert "changed: fastlib: 1.0 -> 1.1" in made.assessment.notes
    assert not any("covers no regression" in note for note in made.assessment.notes)
    libraries.clear()
    again = next(p for p in check(None).assessment.points if p.name == label)
    assert again.notes == (explain.NOTHING,)
    against = check(five(tmp_path / "stored"))
    assert "judged against a stored run" in against.assessment.notes[0]
    assert "not known: two sessions differ" in against.alarms


def test_a_busy_machine_is_told():
    from check_rounds import evidence

    found = evidence(side(ALL), side(ALL, seed=1))
    measured = Measured(
        assessment=Assessment(points=()), evidence=found, wall_s=61.0, loads=(0.5, 9.25)
    )
    facts = checking._facts(PLAN, found.stages, Rule(), measured)
    assert facts["load"].startswith("0.5 before, 9.2 after; ")
    assert "load" not in checking._facts(PLAN, found.stages, Rule(), replace(measured, loads=()))


def test_equal_environments_are_not_mentioned(tmp_path: Path):

    manifest = RunFolder.open(five(tmp_path / "run")).manifest
    other = json.loads(json.dumps(manifest, default=str))
    other["environment"]["libraries"]["torch"] = "0.1"
    assert explain.environments(manifest, manifest) == ()
    assert [line.split(":")[0] for line in explain.environments(manifest, other)] == ["torch"]
    shutil.rmtree(tmp_path / "run")
