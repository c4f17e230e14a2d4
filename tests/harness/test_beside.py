"""A second process makes the same, and whatever happens to it the result is right or an error."""

import os
import signal
import threading

import psutil
import pytest

from mambench.harness import beside

LARGE = 1 << 20  # more than a pipe holds


def test_another_process_makes_it():
    make = lambda: b"%d:%s" % (os.getpid(), b"x" * LARGE)  # noqa: E731
    with beside.making(make, fork=True) as wait:
        there = wait()
    with beside.making(make, fork=False) as wait:
        here = wait()
    assert here == make()
    assert there.partition(b":")[0] != here.partition(b":")[0]
    assert there.partition(b":")[2] == here.partition(b":")[2]


@pytest.mark.parametrize("end", ["raises", "killed"])
def test_what_the_other_process_could_not_make_is_made_here(end):
    parent = os.getpid()

    def make() -> bytes:
        if os.getpid() == parent:
            return b"made here"
        if end == "killed":
            os.kill(os.getpid(), signal.SIGKILL)
        raise RuntimeError("planted")

    with beside.making(make, fork=True) as wait:
        assert wait() == b"made here"


def test_what_goes_wrong_in_both_is_raised_and_no_process_is_left():
    def make() -> bytes:
        raise RuntimeError("planted")

    def children() -> set[int]:  # also those that have ended and were not waited for
        return {child.pid for child in psutil.Process().children()}

    before = children()  # of tests that ran in this process earlier: a browser
    with pytest.raises(RuntimeError, match="planted"), beside.making(make, fork=True) as wait:
        wait()
    assert children() == before


def test_a_result_that_nobody_waits_for_holds_nothing_up():
    with (
        pytest.raises(KeyError),
        beside.making(lambda: b"x" * LARGE, fork=True),
    ):
        raise KeyError("planted")


def test_small_reports_are_made_in_one_process(monkeypatch):
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: {0, 1})
    monkeypatch.setattr(threading, "active_count", lambda: 1)
    assert beside.worthwhile(2000, 2000)
    assert not beside.worthwhile(1999, 2000)
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: {0})
    assert not beside.worthwhile(2000, 2000)


def test_beside_other_threads_there_is_one_process(monkeypatch):
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: {0, 1})
    monkeypatch.setattr(threading, "active_count", lambda: 2)
    assert not beside.worthwhile(2000, 2000)
