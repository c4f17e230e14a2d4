import importlib.util
import json
import os
import signal
import statistics
import subprocess
import sys
import time
import uuid
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import psutil
import pytest

import mambench
from mambench.harness import machine, progress, runner
from mambench.harness.errors import DeviceBusyError, RunFolderError
from mambench.harness.lock import device_lock
from mambench.harness.plan import PlannedCase
from mambench.harness.records import Observation
from mambench.harness.spec import Case, Outcome, Pass
from mambench.harness.store import RunFolder
from mambench.harness.workers.pool import WorkerPool
from mambench.harness.workers.protocol import Done, Precompile, WorkerConfig

_PATH = Path(__file__).parent.parent / "faults" / "planning.py"
_SPEC = importlib.util.spec_from_file_location("planning", _PATH)
assert _SPEC is not None
assert _SPEC.loader is not None
planning = importlib.util.module_from_spec(_SPEC)
_SPEC.loader.exec_module(planning)

DEADLINE_S = 60.0


@pytest.fixture(scope="module")
def pool() -> Iterator[WorkerPool]:
    with WorkerPool(threads=1) as opened:
        yield opened


@pytest.fixture(autouse=True)
def _own_lock(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """Let tests run while something else holds the machine's lock."""
    monkeypatch.setattr(
        runner, "device_lock", lambda key, **options: device_lock(key, folder=tmp_path, **options)
    )


class Listener(progress.SilentListener):
    """Remembers what it was told; can act when a case starts."""

    def __init__(self, at_start: Callable[[Case], None] | None = None) -> None:
        self.notes: list[str] = []
        self.plan: tuple[int, int] | None = None
        self.phases: list[tuple[str, str]] = []
        self.ended: list[tuple[Case, Sequence[Observation]]] = []
        self._at_start = at_start

    def on_plan(self, n_total: int, n_left: int) -> None:
        self.plan = (n_total, n_left)

    def on_case_start(self, case: Case) -> None:
        if self._at_start:
            self._at_start(case)

    def on_phase(self, case: Case, phase: str) -> None:
        self.phases.append((case.implementation, phase))

    def on_case_end(self, case: Case, observations: Sequence[Observation]) -> None:
        self.ended.append((case, observations))

    def on_note(self, text: str) -> None:
        self.notes.append(text)


FAULTS = {
    "wrong": (Outcome.WRONG, "y"),
    "raises": (Outcome.ERROR, "ValueError: planted fault (in compile)"),
    "leaves": (Outcome.ERROR, "SystemExit: 3 (in compile)"),
    "refuses": (Outcome.UNSUPPORTED, "headdim 8 is too small"),
    "runs_out": (Outcome.OOM, "MemoryError"),
    "hoards": (Outcome.OOM, "over the limit of 0.6 GiB"),
    "segfaults": (Outcome.CRASHED, "SIGSEGV"),
    "kills_itself": (Outcome.CRASHED, "SIGKILL"),
    "prints": (Outcome.CRASHED, "SIGABRT"),
    "exits": (Outcome.CRASHED, "status 7"),
    "leaves_child": (Outcome.CRASHED, "status 8"),
    "hangs_at_once": (Outcome.TIMEOUT, "compile_limit_s"),
    "hangs_later": (Outcome.TIMEOUT, "time_limit_s"),
}


# Only what hangs needs short limits; anything else may be slow on a busy machine.
LIMITS = {
    False: {"memory_limit_bytes": 640 << 20},
    True: {"time_limit_s": 5.0, "compile_limit_s": 5.0},
}


@dataclass
class FaultyRun:
    """All faults, each followed by the good implementation at a length of its own."""

    observations: list[Observation]
    summaries: list[runner.RunSummary]


@pytest.fixture(scope="module")
def faulty_run(pool: WorkerPool, tmp_path_factory: pytest.TempPathFactory) -> FaultyRun:
    path = tmp_path_factory.mktemp("faulty")
    done = FaultyRun([], [])
    for hanging, limits in LIMITS.items():
        cases: list[Case] = []
        for number, name in enumerate(FAULTS):
            if name.startswith("hangs") is hanging:
                cases += [planning.case(name), planning.case("good", seqlen=20 + number)]
        made = planning.plan(cases, replace(planning.QUICK, **limits))
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(
                runner,
                "device_lock",
                lambda key, **options: device_lock(key, folder=path, **options),
            )
            with planning.folder(path / str(hanging), made) as folder:
                done.summaries.append(runner.run(made, folder, pool=pool))
        done.observations += folder.observations()
    return done


@pytest.mark.parametrize("name", FAULTS)
def test_each_fault_ends_as_its_outcome_and_the_next_case_is_ok(
    name: str, faulty_run: FaultyRun
) -> None:
    outcome, says = FAULTS[name]
    observations = faulty_run.observations
    found = [o for o in observations if o.case.implementation == name]
    assert {o.measurement for o in found} == {"time", "memory"}
    for o in found:
        assert o.outcome is outcome, o.reason
        assert says in (o.reason or "")
        assert not o.values
        assert o.samples_s is None
    after = observations[observations.index(found[-1]) + 1 :][:2]
    assert [(o.case.implementation, o.outcome) for o in after] == [("good", Outcome.OK)] * 2


def test_summary_counts_every_case_once(
    faulty_run: FaultyRun,
) -> None:
    expected = Counter(outcome for outcome, _ in FAULTS.values())
    expected[Outcome.OK] += len(FAULTS)
    counts = sum((Counter(summary.counts) for summary in faulty_run.summaries), Counter())
    assert counts == expected
    assert all(summary.failed for summary in faulty_run.summaries)
    assert not any(summary.interrupted for summary in faulty_run.summaries)


def test_evidence_of_a_failure_is_kept(faulty_run: FaultyRun) -> None:
    details = {o.case.implementation: o.details for o in faulty_run.observations}
    assert "second line" in details["raises"]["traceback"]
    assert details["prints"]["output"].count("last words") == 1
    assert len(details["prints"]["output"]) <= 4000
    assert "attention" in details["segfaults"]["output"]  # where it was, from faulthandler
    assert details["wrong"]["gate"]["passed"] is False


def test_good_case_records_what_was_measured(
    faulty_run: FaultyRun,
) -> None:
    good = [o for o in faulty_run.observations if o.case.implementation == "good"][:2]
    time_, memory = sorted(good, key=lambda o: o.measurement, reverse=True)
    assert time_.method == "perf_counter"
    assert time_.samples_s
    assert time_.values["time_s"] == statistics.median(time_.samples_s)
    tokens = time_.case.problem.tokens
    assert time_.values["tokens_per_s"] == pytest.approx(tokens / time_.values["time_s"])
    assert time_.values["first_call_s"] > 0
    assert time_.values["model_flop"] > 0
    assert time_.details["gate"]["passed"] is True
    assert time_.details["threads"] == 1
    assert set(time_.details["telemetry"]) == {"before", "after"}
    assert memory.method == "VmHWM"
    assert memory.values["peak_memory_bytes"] >= memory.values["extra_memory_bytes"]


def run(
    path: Path, cases: Sequence[Case | PlannedCase], pool: WorkerPool, **options: object
) -> tuple[RunFolder, runner.RunSummary]:
    made = planning.plan(cases)
    folder = RunFolder.open(path, for_append=True) if path.exists() else planning.folder(path, made)
    with folder:
        return folder, runner.run(made, folder, pool=pool, **options)


def test_memory_of_a_pass_is_that_of_the_pass(tmp_path: Path, pool: WorkerPool) -> None:
    cases = [planning.case("good", seqlen=64), planning.case("allocates", seqlen=64)]
    folder, _ = run(tmp_path / "run", cases, pool)
    extra = {
        o.case.implementation: o.values["extra_memory_bytes"]
        for o in folder.observations()
        if o.measurement == "memory"
    }
    assert extra["allocates"] - extra["good"] == pytest.approx(64 << 20, abs=1 << 20)
    assert extra["good"] < 1 << 20  # though the gate has just used more


def test_all_passes_are_measured(tmp_path: Path, pool: WorkerPool) -> None:
    passes = (Pass.FORWARD, Pass.BACKWARD, Pass.TRAINING)
    cases = [planning.case("good", pass_=pass_) for pass_ in passes]
    _, summary = run(tmp_path / "run", cases, pool)
    assert summary.counts == {Outcome.OK: 3}


def test_an_implementation_begins_each_case_once(tmp_path: Path, pool: WorkerPool) -> None:
    cases = [planning.case("tunes", seqlen=64), planning.case("tunes", seqlen=128)]
    _, summary = run(tmp_path / "run", cases, pool)
    assert summary.counts == {Outcome.OK: 2}


def test_nothing_finished_is_run_again(tmp_path: Path, pool: WorkerPool) -> None:
    cases = [planning.case("good"), planning.case("raises")]
    run(tmp_path / "run", cases, pool)
    before = (tmp_path / "run" / "results.jsonl").read_bytes()
    listener = Listener()
    _, summary = run(tmp_path / "run", cases, pool, listener=listener)
    assert (tmp_path / "run" / "results.jsonl").read_bytes() == before
    assert listener.plan == (2, 0)
    assert summary.counts == {Outcome.OK: 1, Outcome.ERROR: 1}


def test_retry_failed_runs_failures_only(tmp_path: Path, pool: WorkerPool) -> None:
    cases = [planning.case("good"), planning.case("raises"), planning.case("refuses")]
    run(tmp_path / "run", cases, pool)
    listener = Listener()
    run(tmp_path / "run", cases, pool, listener=listener, retry_failed=True)
    assert [case.implementation for case, _ in listener.ended] == ["raises"]


def test_only_the_missing_measurement_is_repeated(tmp_path: Path, pool: WorkerPool) -> None:
    cases = [planning.case("good"), planning.case("raises")]
    run(tmp_path / "run", cases, pool)
    results = tmp_path / "run" / "results.jsonl"
    lines = results.read_text().splitlines(keepends=True)
    kept = [line for line in lines if json.loads(line)["measurement"] == "time"]
    results.write_text("".join(kept))
    listener = Listener()
    folder, summary = run(tmp_path / "run", cases, pool, listener=listener)
    assert results.read_text().startswith("".join(kept))
    added = folder.observations()[len(kept) :]
    assert [(o.case.implementation, o.measurement) for o in added] == [
        ("good", "memory"),
        ("raises", "memory"),
    ]
    assert summary.counts == {Outcome.OK: 1, Outcome.ERROR: 1}
    # The good case was proven right before, and the other is known to fail.
    ahead = progress.PRECOMPILE  # followed by how far it has come
    phases = {phase for _, phase in listener.phases if not phase.startswith(ahead)}
    assert phases == {"build", "compile", "memory"}


def test_interruption_keeps_what_is_finished_and_says_how_to_go_on(
    tmp_path: Path, pool: WorkerPool
) -> None:
    cases = [planning.case("good", seqlen=n) for n in (8, 9, 10)]

    def interrupt(case: Case) -> None:
        if case == cases[1]:
            raise KeyboardInterrupt

    listener = Listener(interrupt)
    folder, summary = run(tmp_path / "run", cases, pool, listener=listener)
    assert summary.interrupted
    assert len(folder.observations()) == 2
    assert f"--resume {tmp_path / 'run'}" in listener.notes[-1]
    resumed = Listener()
    folder, summary = run(tmp_path / "run", cases, pool, listener=resumed)
    assert resumed.plan == (3, 2)
    assert summary.counts == {Outcome.OK: 3}
    assert len(folder.observations()) == 6


def test_decided_cases_are_recorded_once(tmp_path: Path, pool: WorkerPool) -> None:
    decided = PlannedCase(
        case=planning.case("good", seqlen=9), outcome=Outcome.UNAVAILABLE, reason="pip install it"
    )
    cases = [planning.case("good"), decided]
    for _ in range(2):
        folder, summary = run(tmp_path / "run", cases, pool)
        found = [o for o in folder.observations() if o.outcome is Outcome.UNAVAILABLE]
        assert [(o.measurement, o.reason) for o in found] == [
            ("time", "pip install it"),
            ("memory", "pip install it"),
        ]
        assert summary.counts == {Outcome.OK: 1, Outcome.UNAVAILABLE: 1}
        assert not summary.failed


def test_time_budget_skips_and_resume_catches_up(tmp_path: Path, pool: WorkerPool) -> None:
    dear = PlannedCase(case=planning.case("good", seqlen=9), estimate_s=1e6)
    cases = [dear, planning.case("good")]
    folder, summary = run(tmp_path / "run", cases, pool, time_budget_s=500.0)
    assert summary.counts == {Outcome.OK: 1, Outcome.SKIPPED: 1}
    skipped = folder.observations()[0]
    assert "time budget" in (skipped.reason or "")
    _, summary = run(tmp_path / "run", cases, pool)
    assert summary.counts == {Outcome.OK: 2}


def test_failing_to_compile_ahead_is_told_and_harmless(tmp_path: Path, pool: WorkerPool) -> None:
    cases = [planning.case("compiles_badly"), planning.case("dies_compiling")]
    listener = Listener()
    _, summary = run(tmp_path / "run", cases, pool, listener=listener)
    assert summary.counts == {Outcome.OK: 2}
    assert {n for n, phase in listener.phases if phase.startswith(progress.PRECOMPILE)} == {
        "compiles_badly",
        "dies_compiling",
    }
    assert any("planted compiler" in note for note in listener.notes)
    assert any("dies_compiling" in note for note in listener.notes)


def test_a_worker_compiles_its_share_ahead(pool: WorkerPool) -> None:
    worker = pool.worker(
        WorkerConfig(
            device=machine.cpu(),
            settings=planning.QUICK,
            threads=1,
            plugins=(str(planning.PLUGIN),),
        )
    )

    def told(name: str, share: int) -> str | None:
        worker.send(Precompile(cases=(planning.case(name),), share=share, shares=3))
        done = None
        while done is None:
            done = worker.receive(60.0)
        assert isinstance(done, Done)
        return done.reason

    assert "planted compiler, 1 of 3" in (told("compiles_badly", 1) or "")
    assert told("compiles_whole", 1) is None
    assert "planted whole compiler" in (told("compiles_whole", 0) or "")
    worker.kill()


def test_code_that_is_older_than_a_hook_is_measured_without_it(
    tmp_path: Path, pool: WorkerPool
) -> None:
    _, summary = run(tmp_path / "run", [planning.case("older")], pool)
    assert summary.counts == {Outcome.OK: 1}


def test_busy_device_is_refused(tmp_path: Path, pool: WorkerPool) -> None:
    with (
        device_lock("cpu", holder="runs/other", folder=tmp_path),
        pytest.raises(DeviceBusyError, match="runs/other"),
    ):
        run(tmp_path / "run", [planning.case("good")], pool)


def test_folder_of_another_plan_is_refused(tmp_path: Path, pool: WorkerPool) -> None:
    planning.folder(tmp_path / "run", planning.plan([planning.case("good")])).close()
    with pytest.raises(RunFolderError, match="other cases"):
        run(tmp_path / "run", [planning.case("raises")], pool)


def test_torn_last_line_is_measured_again(tmp_path: Path, pool: WorkerPool) -> None:
    cases = [planning.case("good")]
    run(tmp_path / "run", cases, pool)
    results = tmp_path / "run" / "results.jsonl"
    results.write_bytes(results.read_bytes()[:-10])
    listener = Listener()
    folder, summary = run(tmp_path / "run", cases, pool, listener=listener)
    assert "torn" in listener.notes[0]
    assert [o.measurement for o in folder.observations()] == ["time", "memory"]
    assert summary.counts == {Outcome.OK: 1}


def test_kill_of_the_runner_leaves_nothing_and_resume_loses_nothing(
    tmp_path: Path, pool: WorkerPool
) -> None:
    path, mark = tmp_path / "run", f"MAMBENCH_TEST_{uuid.uuid4().hex}"
    process = start_run(path, mark)
    try:
        wait_for(lambda: lines(path) >= 5 or process.poll() is not None)
        assert process.poll() is None, "the run ended before it could be killed"
        process.send_signal(signal.SIGKILL)
        process.wait()
    finally:
        process.kill()
        process.wait()
    wait_for(lambda: not marked(mark))
    survived = (path / "results.jsonl").read_text()
    survived = survived[: survived.rfind("\n") + 1]

    folder, summary = run(path, planning.many(), pool)
    assert summary.counts == {Outcome.OK: len(planning.many())}
    assert (path / "results.jsonl").read_text().startswith(survived)
    times = Counter((o.case.case_id, o.measurement) for o in folder.observations())
    assert set(times.values()) == {1}
    assert len(times) == 2 * len(planning.many())


def start_run(path: Path, mark: str) -> subprocess.Popen[bytes]:
    start = Path(mambench.__file__).with_name("_start.py")
    script = (
        "import runpy, sys; from pathlib import Path;"
        f"runpy.run_path({str(start)!r})['load_package'](Path({str(start.parent)!r}));"
        f"runpy.run_path({planning.__file__!r})['main']({str(path)!r})"
    )
    environment = os.environ | {mark: "1", "TMPDIR": str(path.parent)}
    return subprocess.Popen([sys.executable, "-P", "-c", script], env=environment)


def wait_for(condition: Callable[[], bool]) -> None:
    deadline = time.monotonic() + DEADLINE_S
    while not condition():
        assert time.monotonic() < deadline, "waited too long"
        time.sleep(0.01)


def lines(path: Path) -> int:
    results = path / "results.jsonl"
    return results.read_bytes().count(b"\n") if results.exists() else 0


def marked(mark: str) -> list[int]:
    """Return the processes that inherited an environment variable."""
    found: list[int] = []
    for process in psutil.process_iter():
        try:
            if mark in process.environ():
                found.append(process.pid)
        except psutil.Error:
            continue
    return found
