"""The store of results, series over commits and change points."""

import json
import re

import numpy as np
import pytest
from click.testing import CliRunner

from mambench.harness import history
from mambench.harness.cli.history import make
from mambench.harness.errors import RunFolderError, UsageError
from mambench.harness.history import Entry
from mambench.harness.records import Observation
from mambench.harness.spec import SCHEMA_VERSION, Case, DType, Family, Outcome, Pass, Problem
from mambench.harness.store import RunFolder
from mambench.reports import history as drawn

command = make(lambda: drawn)


def case(seqlen: int = 256) -> Case:
    problem = Problem(family=Family.ATTENTION, batch=1, seqlen=seqlen, d_inner=64, headdim=32)
    return Case(
        implementation="a", variant="v", problem=problem, pass_=Pass.FORWARD, dtype=DType.FP32
    )


def entry(day: int, time_s: float, *, machine: str = "one", seqlen: int = 256, **more) -> Entry:
    values = {
        "run_id": f"r{day}{machine}", "created_at": f"2026-01-01T00:{day:02}:00+00:00",
        "code": f"c{day}", "fingerprint": machine, "machine": f"CPU {machine}",
        "case": case(seqlen), "outcome": Outcome.OK, "values": {"time_s": time_s},
    }  # fmt: skip
    return Entry(**(values | more))


@pytest.fixture
def run(tmp_path):
    """Return a maker of run folders."""

    def make(run_id: str, time_s: float, model: str = "Some CPU", outcome=Outcome.OK):
        manifest = {
            "schema": SCHEMA_VERSION, "run_id": run_id, "created_at": "2026-01-01T00:00:00+00:00",
            "command": [], "suite": "s", "plan": [], "plan_hash": "", "settings": {},
            "device": {"kind": "cpu", "name": model, "torch_name": "cpu"},
            "environment": {"cpu": {"model": model, "logical_cores": 2}},
            "code": {"commit": f"{run_id}0123456789"}, "plugins": [], "notes": [],
        }  # fmt: skip
        ok = outcome is Outcome.OK
        with RunFolder.create(tmp_path / run_id, manifest) as folder:
            folder.append(
                Observation(
                    case=case(), measurement="time", outcome=outcome, duration_s=1.0,
                    reason=None if ok else "broke", observation_id=run_id,
                    started_at="2026-01-01T00:00:00+00:00",
                    values={"time_s": time_s} if ok else {},
                    samples_s=(time_s,) * 9 if ok else None,
                )
            )  # fmt: skip
        return tmp_path / run_id

    return make


@pytest.mark.parametrize("name", ["folder", "file.jsonl"])
def test_runs_are_added_once_and_read_back(tmp_path, run, name):
    store = tmp_path / name
    assert history.add(store, run("aaa", 1e-3)) == 1
    assert history.add(store, run("bbb", 2e-3)) == 1
    found = history.read(store)
    assert [e.run_id for e in found] == ["aaa", "bbb"]
    assert [e.values["time_s"] for e in found] == pytest.approx([1e-3, 2e-3])
    assert found[0].case == case()
    assert found[0].code.startswith("aaa")
    with pytest.raises(UsageError, match=r"aaa is in .* already"):
        history.add(store, tmp_path / "aaa")


def test_a_failed_case_is_kept_and_not_drawn(tmp_path, run):
    store = tmp_path / "store"
    history.add(store, run("aaa", 1.0, outcome=Outcome.OOM))
    (found,) = history.read(store)
    assert (found.outcome, dict(found.values)) == (Outcome.OOM, {})
    assert history.series([found]) == []


def test_a_torn_last_line_is_dropped_and_a_broken_one_refused(tmp_path, run):
    store = tmp_path / "h.jsonl"
    history.add(store, run("aaa", 1e-3))
    whole = store.read_text()
    store.write_text(whole + whole[:50])
    assert len(history.read(store)) == 1
    history.add(store, run("bbb", 1e-3))
    assert [e.run_id for e in history.read(store)] == ["aaa", "bbb"]
    store.write_text("{\n" + whole)
    with pytest.raises(RunFolderError, match=r"h.jsonl:1"):
        history.read(store)
    store.write_text(json.dumps({"schema": 9}) + "\n")
    with pytest.raises(RunFolderError, match="schema version 9"):
        history.read(store)


def test_a_store_that_is_not_there_is_a_mistake(tmp_path):
    with pytest.raises(UsageError, match="no history"):
        history.read(tmp_path / "nothing")


def test_machines_are_kept_apart():
    entries = [
        entry(day, 1.0 + (day >= 10), machine="old" if day < 10 else "new") for day in range(20)
    ]
    found = history.series(entries)
    assert [(s.machine, len(s.values), s.changes) for s in found] == [
        ("CPU old", 10, ()),
        ("CPU new", 10, ()),
    ]


def test_cases_are_in_the_order_of_their_names_and_sizes():
    entries = [entry(0, 1.0, seqlen=seqlen) for seqlen in (1024, 256, 512)]
    assert [s.case.problem.seqlen for s in history.series(entries)] == [256, 512, 1024]


def test_another_processor_or_driver_is_another_machine():
    manifest = {
        "device": {"name": "GPU"},
        "environment": {
            "cpu": {"model": "a", "logical_cores": 4},
            "gpu": {"uuid": "u", "driver": "1"},
        },
    }
    first = history.fingerprint(manifest)
    assert history.fingerprint(json.loads(json.dumps(manifest))) == first
    for path, value in (("driver", "2"), ("uuid", "v"), ("model", "b")):
        changed = json.loads(json.dumps(manifest))
        part = "cpu" if path == "model" else "gpu"
        changed["environment"][part][path] = value
        assert history.fingerprint(changed) != first


# --- change points -------------------------------------------------------------------------------


def noise(kind: str, n: int, spread: float, rng) -> np.ndarray:
    if kind == "heavy":
        return rng.standard_t(3, n) * spread / 3**0.5
    drawn_ = rng.normal(0, spread, n)
    if kind == "bimodal":
        return drawn_ / 2 + np.where(rng.random(n) < 0.3, 2 * spread, 0)
    return drawn_ + np.where(rng.random(n) < 0.03, 0.3, 0) if kind == "outliers" else drawn_


KINDS = ("normal", "heavy", "bimodal", "outliers")


@pytest.mark.parametrize("kind", KINDS)
def test_equal_code_has_hardly_ever_a_change(kind):
    rng = np.random.default_rng(1)
    for spread, most in ((0.01, 0.02), (0.03, 0.03)):
        alarms = [
            bool(history.change_points(np.exp(noise(kind, 60, spread, rng)))) for _ in range(200)
        ]
        assert np.mean(alarms) <= most


@pytest.mark.parametrize("kind", KINDS)
def test_a_step_of_five_percent_is_found_where_it_is(kind):
    rng = np.random.default_rng(2)
    found = 0
    for _ in range(60):
        logs = noise(kind, 60, 0.01, rng)
        logs[40:] += np.log(1.05)
        changes = history.change_points(np.exp(logs))
        found += len(changes) == 1 and abs(changes[0].at - 40) <= 2
    assert found >= 57


def test_steps_that_are_small_or_too_near_to_an_end_are_none():
    level = [1.0] * 20
    assert history.change_points([*level, *[1.029] * 20]) == ()
    (change,) = history.change_points([*level, *[1.04] * 20])
    assert change.at == 20
    assert change.change_frac == pytest.approx(0.04)
    assert history.change_points([*level, *[1.5] * 4]) == ()
    assert len(history.change_points([*level, *[1.5] * 5])) == 1
    assert history.change_points([1.0] * 9) == ()
    two = history.change_points([*level, *[1.1] * 10, *[0.9] * 10])
    assert [c.at for c in two] == [20, 30]


# --- drawing -------------------------------------------------------------------------------------


def test_a_terminal_shows_levels_and_names_the_commit_of_a_change():
    found = history.series([entry(day, 1e-3 * (1.2 if day >= 8 else 1.0)) for day in range(16)])
    text = drawn.text(found)
    assert "▁▁▁▁▁▁▁▁████████  16 runs, now 1.2 ms" in text
    assert "change: +20.0% from c8 on (2026-01-01, before it c7)" in text


def test_noise_is_drawn_flat():
    assert set(drawn.sparkline([1.0, 1.001, 0.999])) <= set("▁▂")


def test_the_page_has_a_chart_for_each_series_and_loads_nothing(tmp_path):
    entries = [entry(day, 1.0 + (day >= 8), code="<b>") for day in range(16)]
    entries += [entry(day, 1.0, seqlen=512) for day in range(16)]
    page = drawn.build(history.series(entries), tmp_path / "h.html").read_text()
    assert page.count("<svg") == 2
    assert page.count("<circle") == 32
    assert page.count("<line ") == 1
    assert "<b>" not in page
    assert not re.search(r"src=|href=|@import|url\(", page)


def test_the_commands(tmp_path, run):
    store = ["--store", str(tmp_path / "store")]
    runs = [str(run(f"r{i}", 1e-3)) for i in range(3)]
    runner = CliRunner()
    done = runner.invoke(command, ["add", *runs, *store], catch_exceptions=False)
    assert done.exit_code == 0
    shown = runner.invoke(command, ["show", *store], catch_exceptions=False).output
    assert "3 runs, now 1 ms" in shown
    shown = runner.invoke(command, ["show", *store, "--filter", "seqlen>300"]).output
    assert "nothing is stored that fits" in shown
    rows = json.loads(runner.invoke(command, ["show", *store, "-f", "json"]).output)
    assert rows[0]["values"] == pytest.approx([1e-3] * 3)
    page = tmp_path / "page.html"
    runner.invoke(command, ["show", *store, "-f", "html", "-o", str(page)], catch_exceptions=False)
    assert page.is_file()
    with pytest.raises(UsageError, match="'time_s'"):
        runner.invoke(command, ["show", *store, "--metric", "times"], catch_exceptions=False)
