"""Two processes fold what one does, in its order, and whatever is odd leaves it to one."""

import json
import os
import random
from dataclasses import replace
from pathlib import Path

import pytest

from mambench.harness import beside
from mambench.harness.analysis import folding, loading
from mambench.harness.analysis.results import Analysis, Result
from mambench.harness.analysis.runs import make_run
from mambench.harness.errors import RunFolderError
from mambench.harness.records import Observation
from mambench.harness.spec import Case, DType, Family, Outcome, Pass, Problem
from mambench.harness.store import MANIFEST_KEYS, RESULTS, RunFolder

MANIFEST = {
    key: {str: "x", int: 1, list: [], dict: {}}[kind] for key, kind in MANIFEST_KEYS.items()
}


def case(seqlen: int) -> Case:
    problem = Problem(family=Family.SSD, batch=1, seqlen=seqlen, d_inner=64, d_state=16, headdim=32)
    return Case(
        implementation="ssd", variant="v", problem=problem, pass_=Pass.FORWARD, dtype=DType.FP32
    )


def observations(seed: int) -> list[Observation]:
    """Three rounds of eleven cases in an order of their own each, some of which ran out of time."""
    rng = random.Random(seed)
    found: list[Observation] = []
    for round in range(3):
        for seqlen in rng.sample(range(1, 12), 11):
            samples = tuple(seqlen * rng.uniform(1, 1.1) for _ in range(7))
            late = rng.random() < 0.2
            made = Observation(
                case=case(seqlen),
                measurement=rng.choice(("time", "memory")),
                round=round,
                outcome=Outcome.TIMEOUT if late else Outcome.OK,
                reason="late" if late else None,
                observation_id=f"{seed}-{round}-{seqlen}",
                started_at="2026-01-01T00:00:00Z",
                duration_s=1.0,
                values={} if late else {"time_s": sorted(samples)[3], "peak_memory_bytes": seqlen},
                samples_s=None if late else samples,
                details={"gate": {"passed": True}, "telemetry": {"after": {"power_w": seed}}},
            )
            found.append(made)
    return found


@pytest.fixture
def runs(tmp_path: Path) -> list[Path]:
    """Two runs of one machine, the later named first, and one of another, with planned cases."""
    made: list[Path] = []
    for place, (created, device) in enumerate((("2", "a"), ("1", "a"), ("3", "b"))):
        plan = [
            {"case": case(n).to_dict(), "outcome": None, "reason": None} for n in range(14, 9, -1)
        ]
        own = {
            "run_id": str(place),
            "created_at": created,
            "device": {"name": device},
            "plan": plan,
        }
        with RunFolder.create(tmp_path / str(place), MANIFEST | own) as folder:
            for observation in observations(place):
                folder.append(observation)
        made.append(tmp_path / str(place))
    return made


@pytest.fixture
def two(monkeypatch):
    """Have two processes load runs however small."""
    monkeypatch.setattr(beside, "worthwhile", lambda count, least: True)


def alone(runs: list[Path]) -> Analysis:
    """What one process makes of runs that it reads line by line."""
    opened = [(path, RunFolder.open(path)) for path in runs]
    runs_of = [(make_run(f.manifest, path, notes=f.warnings), f) for path, f in opened]
    folders = loading.pooled(runs_of)
    folded: dict[str, list[Result]] = {}
    for source, entries in folders.items():
        found = [(run.run_id, o) for run, folder in entries for o in folder.observations()]
        folded[source] = folding.fold(found, source)
    return loading.assembled(folders, folded)


def test_runs_of_one_machine_pool_and_the_newer_observation_wins(tmp_path: Path):
    measured = (o for o in observations(0) if o.measurement == "time" and o.outcome is Outcome.OK)
    made = replace(next(measured), samples_s=None)
    for run_id in ("b", "a"):
        own = {"run_id": run_id, "created_at": run_id}
        with RunFolder.create(tmp_path / run_id, MANIFEST | own) as folder:
            folder.append(replace(made, values={"time_s": {"a": 0.01, "b": 0.02}[run_id]}))
    found = loading.load([tmp_path / "b", tmp_path / "a"])
    assert len(found.sources) == 1
    assert [run.run_id for run in found.runs] == ["a", "b"]
    (only,) = found.results
    assert (only.time_s, only.run_id) == (0.02, "b")


def test_planned_cases_without_observation_are_visible(tmp_path: Path):
    made = observations(0)[0]
    other, third = (replace(made.case, variant=name) for name in ("other", "third"))
    plan = [
        {"case": made.case.to_dict(), "outcome": None},
        {"case": other.to_dict(), "outcome": "unavailable", "reason": "pip install it"},
        {"case": third.to_dict(), "outcome": None, "reason": None},
    ]
    with RunFolder.create(tmp_path / "run", MANIFEST | {"plan": plan}) as folder:
        folder.append(made)
    results = loading.load([tmp_path / "run"]).results
    found = {r.case.variant: (r.outcome, r.reason) for r in results}
    assert found[made.case.variant] == (made.outcome, made.reason)
    assert found["other"] == (Outcome.UNAVAILABLE, "pip install it")
    assert found["third"][0] is Outcome.SKIPPED
    assert "interrupted" in (found["third"][1] or "")


def test_what_is_no_run_is_refused(tmp_path: Path):
    with pytest.raises(RunFolderError, match="not a run"):
        loading.load([tmp_path])


def test_two_processes_load_what_one_does(runs, two, monkeypatch):
    # What the other process makes is not seen here, so that what is must be a part.
    here: list[str] = []
    fold = folding._fold_case
    monkeypatch.setattr(folding, "_fold_case", lambda s, e: here.append(s) or fold(s, e))
    found = loading.load(runs)
    seen = len(here)
    expected = alone(runs)
    assert found == expected
    assert [r.case.problem.seqlen for r in found.results][-3:] == [14, 13, 12]
    assert 0 < seen < len({(r.source, r.case) for r in expected.results if r.measured_at})


def test_small_runs_are_loaded_by_one_process(runs, monkeypatch):
    monkeypatch.setattr(os, "fork", lambda: pytest.fail("a process was started"))
    assert loading.load(runs) == alone(runs)


def test_a_folder_named_twice_counts_once(runs, two):
    assert loading.load([*runs, runs[0]]) == alone(runs)


def test_a_broken_line_in_either_half_is_refused_by_its_number(runs, two):
    path = runs[0] / RESULTS
    sound = path.read_bytes().splitlines(keepends=True)
    for number in (2, len(sound) - 1):
        broken = [*sound]
        broken[number - 1] = broken[number - 1].replace(b'"outcome":', b'"outcome",')
        path.write_bytes(b"".join(broken))
        with pytest.raises(RunFolderError, match=f"line {number}: not JSON"):
            loading.load(runs)


def test_a_torn_last_line_is_noted(runs, two):
    with (runs[1] / RESULTS).open("ab") as file:
        file.write(b'{"case_id":"')
    found = loading.load(runs)
    assert found == alone(runs)
    assert any("torn" in note for run in found.runs for note in run.notes)


@pytest.mark.parametrize("fault", ["without", "of several cases", "of one case each"])
def test_lines_whose_identities_do_not_tell_cases_are_folded_right(runs, two, fault):
    path = runs[0] / RESULTS
    rewritten: list[str] = []
    for number, line in enumerate(path.read_text().splitlines()):
        record = json.loads(line)
        if fault == "of several cases":
            record["case_id"] = "0" * 11 + str(number % 2)
        if fault == "of one case each":
            record["case_id"] = f"{number:012}"
        spaced = fault == "without"  # as another writer's JSON may be
        rewritten.append(json.dumps(record, separators=None if spaced else (",", ":")))
    path.write_text("\n".join(rewritten) + "\n")
    found, expected = loading.load(runs), alone(runs)
    assert found.sources == expected.sources
    by_case = lambda made: {(r.source, r.case): r for r in made.results}  # noqa: E731
    assert by_case(found) == by_case(expected)
    assert len(found.results) == len(expected.results)


def test_the_first_half_holds_what_comes_first(runs):
    opened = [RunFolder.unparsed(path) for path in runs[:1]]
    entries = [(make_run(f.manifest), f) for f in opened]
    first = loading._first_half({"s": entries})
    lines = opened[0].lines
    order = list(dict.fromkeys(json.loads(line)["case_id"] for line in lines))
    assert first == {("s", name.encode()) for name in order[: len(first)]}
    assert abs(len(first) - loading.OURS * len(order)) <= 1
    blank = replace_ids(opened[0])
    assert loading._first_half({"s": [(entries[0][0], blank)]}) is None


def replace_ids(folder: RunFolder) -> RunFolder:
    folder.lines = [*folder.lines[:-1], folder.lines[-1].replace(b'"case_id":"', b'"case":"')]
    return folder
