"""What a check shows while it works."""

import io

from check_rounds import CASES

from mambench.harness.check import progress as check_progress


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


def test_a_line_per_process_with_what_is_left():
    now = [0.0]
    stream = io.StringIO()
    shown = check_progress.PlainProgress(stream, clock=lambda: now[0])
    shown.on_work(3)
    for seconds, failed in ((10, 0), (20, 2)):
        shown.on_process("base", "round 1", 12)
        now[0] += seconds
        shown.on_process_end(failed)
    assert stream.getvalue().splitlines() == [
        "base, round 1: 12 cases in 10 s | 20 s left",
        "base, round 1: 12 cases in 20 s, 2 failed | 15 s left",
    ]


def test_quiet_shows_notes_only():
    stream = io.StringIO()
    with check_progress.make(quiet=True, environment={"TERM": "xterm"}, stream=stream) as shown:
        shown.on_work(1)
        shown.on_process("head", "round 1", 1)
        shown.on_process_end(0)
        shown.on_note("something")
    assert stream.getvalue() == "note: something\n"


def test_a_terminal_gets_a_bar_and_a_dumb_one_lines():
    with check_progress.make(
        quiet=False, environment={"TERM": "xterm"}, stream=Terminal()
    ) as shown:
        assert isinstance(shown, check_progress.BarProgress)
        shown.on_work(2)
        shown.on_process("head", "round 1", 1)
        shown.on_case(CASES[0])
        shown.on_process_end(0)
        shown.on_work(1)
    dumb = check_progress.make(quiet=False, environment={"TERM": "dumb"}, stream=Terminal())
    assert type(dumb) is check_progress.PlainProgress
