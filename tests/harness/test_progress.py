"""The progress display: the ETA's arithmetic, the plain lines, and a bar on a real terminal."""

import io
import os
import pty
import re
import threading
from collections.abc import Mapping
from contextlib import suppress

import pytest

from mambench.harness.progress import (
    PRECOMPILE,
    PRIOR_S,
    BarProgress,
    Eta,
    PlainProgress,
    QuietProgress,
    case_line,
    make_listener,
)
from mambench.harness.records import Observation
from mambench.harness.spec import Case, DType, Family, Outcome, Pass, Problem


class Clock:
    def __init__(self) -> None:
        self.now = 100.0

    def __call__(self) -> float:
        return self.now


def case(seqlen: int) -> Case:
    problem = Problem(family=Family.S6, batch=1, seqlen=seqlen, d_inner=64, d_state=16)
    return Case(
        implementation="scan", variant="v", problem=problem, pass_=Pass.FORWARD, dtype=DType.FP32
    )


def observation(
    of: Case,
    outcome: Outcome = Outcome.OK,
    values: Mapping[str, float] | None = None,
    measurement: str = "time",
) -> Observation:
    return Observation(
        case=of,
        measurement=measurement,
        outcome=outcome,
        reason=None if outcome is Outcome.OK else "it [bold]broke[/bold]",
        observation_id="x",
        started_at="",
        duration_s=1,
        values=values or {},
    )


CASES = [case(2**n) for n in range(4)]
ESTIMATES = {each.case_id: 10.0 for each in CASES}


def test_what_passes_before_the_first_case_is_no_case_s():
    clock = Clock()
    eta = Eta(ESTIMATES, {each.case_id: each.case_id for each in CASES}, clock=clock)
    progress = PlainProgress(eta, io.StringIO())
    progress.on_plan(4, 4)
    clock.now += 50  # imports, and compiling ahead
    progress.on_case_start(CASES[0])
    clock.now += 10
    progress.on_case_end(CASES[0], [observation(CASES[0])])
    assert eta.remaining_s() == pytest.approx(30)
    clock.now += 20  # what passes between cases is theirs
    progress.on_case_start(CASES[1])
    clock.now += 10
    progress.on_case_end(CASES[1], [observation(CASES[1])])
    assert eta.remaining_s() > 30


def test_the_eta_starts_from_the_estimates_and_follows_what_is_measured():
    clock = Clock()
    eta = Eta(ESTIMATES, clock=clock)
    assert eta.remaining_s() == 40
    clock.now += 20  # the first case took twice its estimate
    eta.end(CASES[0].case_id)
    assert eta.correction == pytest.approx((PRIOR_S + 20) / (PRIOR_S + 10))
    assert 30 < eta.remaining_s() < 60
    clock.now += 60
    for each in CASES[1:]:
        eta.end(each.case_id)
    assert eta.remaining_s() == 0


def test_the_first_case_of_a_kind_multiplies_nothing():
    clock = Clock()
    estimates = {f"{kind}{n}": 1.0 for kind in "abc" for n in range(10)}
    kinds = {case_id: case_id[0] for case_id in estimates}
    eta = Eta(estimates, kinds, clock)
    for kind in "ab":
        for n in range(10):
            clock.now += 31 if n == 0 else 1  # 30 s of compiling, once
            eta.end(f"{kind}{n}")
        if kind == "a":
            assert eta.remaining_s() == pytest.approx(20 + 2 * 30)
    assert eta.remaining_s() == pytest.approx(10 + 30)


def test_the_eta_converges_to_the_true_ratio():
    clock = Clock()
    cases = {str(n): 10.0 for n in range(100)}
    eta = Eta(cases, clock=clock)
    for n in range(99):
        clock.now += 2.5
        eta.end(str(n))
    assert eta.remaining_s() == pytest.approx(2.5, rel=0.05)


def test_an_unknown_case_counts_nothing():
    clock = Clock()
    eta = Eta(ESTIMATES, clock=clock)
    eta.end("unknown")
    assert eta.remaining_s() == 40
    assert eta.correction == 1


def test_plain_lines():
    stream = io.StringIO()
    listener = make_listener(ESTIMATES, stream=stream, environment={"TERM": "xterm"})
    assert type(listener) is PlainProgress
    with listener:
        listener.on_plan(6, 4)
        listener.on_phase(CASES[0], PRECOMPILE)
        listener.on_case_start(CASES[0])
        listener.on_phase(CASES[0], "gate")
        memory = observation(CASES[0], values={"peak_memory_bytes": 3.0}, measurement="memory")
        timed = observation(CASES[0], values={"time_s": 0.00123456})
        listener.on_case_end(CASES[0], [timed, memory])
        listener.on_case_end(CASES[1], [observation(CASES[1], Outcome.TIMEOUT)])
        listener.on_note("careful")
    first, ahead, second, third, fourth = stream.getvalue().splitlines()
    assert first == "4 cases to run (2 of 6 need no run), about 40 s"
    assert ahead == "compiling ahead: scan:v s6/op forward D=64 N=16 fp32"
    assert second.startswith("[1/4] ok          scan:v s6/op forward B=1 L=1 ")
    assert " 1.235 ms | " in second
    assert second.endswith(" left")
    assert "timeout" in third
    assert "it [bold]broke[/bold]" in third
    assert fourth == "note: careful"
    assert "\x1b" not in stream.getvalue()


def test_a_case_whose_time_is_known_already_says_what_was_measured():
    done, memory = observation(CASES[0]), observation(CASES[0], measurement="memory")
    assert case_line(CASES[0], [memory]).endswith(": memory")
    assert case_line(CASES[0], [done, memory]).endswith(": no time")


def test_quiet_shows_failures_and_notes_only():
    stream = io.StringIO()
    listener = make_listener(ESTIMATES, quiet=True, stream=stream, environment={})
    assert type(listener) is QuietProgress
    with listener:
        listener.on_plan(4, 4)
        listener.on_case_end(CASES[0], [observation(CASES[0])])
        listener.on_case_end(CASES[1], [observation(CASES[1], Outcome.CRASHED)])
        listener.on_case_end(CASES[2], [observation(CASES[2], Outcome.SKIPPED)])
        listener.on_note("careful")
    assert [line.split()[0] for line in stream.getvalue().splitlines()] == ["crashed", "note:"]


def read_all(terminal: int, written: list[bytes]) -> None:
    """Read until the other end is closed, as a terminal does; it holds only a few KB."""
    with suppress(OSError):  # EIO: closed
        while part := os.read(terminal, 4096):
            written.append(part)


def on_a_terminal(environment: dict[str, str], monkeypatch: pytest.MonkeyPatch) -> str:
    """Return what a run writes to a terminal of 100 columns."""
    for name in ("NO_COLOR", "FORCE_COLOR", "TERM", "COLORTERM", "COLUMNS"):
        monkeypatch.delenv(name, raising=False)
    for name, value in {"COLUMNS": "100", **environment}.items():
        monkeypatch.setenv(name, value)
    ours, theirs = pty.openpty()
    written: list[bytes] = []
    reader = threading.Thread(target=read_all, args=(ours, written))
    reader.start()
    with open(theirs, "w") as stream:
        listener = make_listener(ESTIMATES, stream=stream, environment=os.environ)
        expected = PlainProgress if environment["TERM"] == "dumb" else BarProgress
        assert type(listener) is expected
        with listener:
            listener.on_plan(4, 4)
            listener.on_phase(CASES[0], "gate")
            listener.on_case_end(CASES[0], [observation(CASES[0], values={"time_s": 1.0})])
            listener.on_case_end(CASES[1], [observation(CASES[1], Outcome.CRASHED)])
            listener.on_case_start(CASES[2])
    reader.join()
    os.close(ours)
    return b"".join(written).decode()


def test_a_bar_on_a_terminal(monkeypatch: pytest.MonkeyPatch):
    written = on_a_terminal({"TERM": "xterm-256color"}, monkeypatch)
    plain = re.sub(r"\x1b\[[0-9;?]*[A-Za-z]", "", written)
    assert "2/4" in plain
    assert "left" in plain
    assert "L=4" in plain  # the case that is running
    assert "crashed" in plain
    assert "it [bold]broke[/bold]" in plain  # a record's text is never markup
    assert re.search(r"\x1b\[[0-9;]*3[0-9]", written)  # coloured


def test_no_color(monkeypatch: pytest.MonkeyPatch):
    written = on_a_terminal({"TERM": "xterm-256color", "NO_COLOR": "1"}, monkeypatch)
    assert "2/4" in written
    assert not re.search(r"\x1b\[([0-9;]*;)?(3[0-9]|38;[0-9;]+)m", written)


def test_a_dumb_terminal_gets_lines(monkeypatch: pytest.MonkeyPatch):
    assert "\x1b" not in on_a_terminal({"TERM": "dumb"}, monkeypatch)
