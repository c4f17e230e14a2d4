"""Threads that take turns: their order, a failure of one, an interruption of all."""

import threading

import pytest

from mambench.harness.check.turns import AbortedError, Turns, together


def never() -> None:
    raise AssertionError("nothing was aborted")


def test_turns_come_in_their_order_whatever_the_threads_do():
    order = ["a", "b", "b", "a", "a", "b", "c", "c"]
    turns, seen = Turns(order), []

    def work(name: str) -> None:
        for _ in range(order.count(name)):
            turns.begin(name)
            seen.append(name)
            turns.end(name)

    together(turns, {name: lambda name=name: work(name) for name in "abc"}, on_abort=never)
    assert seen == order


def test_who_fails_loses_its_turns_and_the_others_go_on():
    turns, seen = Turns(["a", "b"] * 3), []

    def failing() -> None:
        turns.begin("a")
        raise ValueError("planted")

    def other() -> None:
        for _ in range(3):
            turns.begin("b")
            seen.append("b")
            turns.end("b")

    with pytest.raises(ValueError, match="planted"):
        together(turns, {"a": failing, "b": other}, on_abort=never)
    assert seen == ["b"] * 3


def test_an_interruption_ends_everybody(monkeypatch: pytest.MonkeyPatch):
    turns, ended = Turns(["a", "b"]), []

    def waiting() -> None:
        try:
            turns.begin("b")
        except AbortedError:
            ended.append("b")
            raise

    join = threading.Thread.join

    def interrupted(thread: threading.Thread, timeout: float | None = None) -> None:
        monkeypatch.setattr(threading.Thread, "join", join)
        raise KeyboardInterrupt

    monkeypatch.setattr(threading.Thread, "join", interrupted)
    with pytest.raises(KeyboardInterrupt):
        together(turns, {"b": waiting}, on_abort=lambda: ended.append("pools"))
    assert sorted(ended) == ["b", "pools"]


def test_a_turn_that_is_not_there_is_not_waited_for():
    Turns(["a"]).begin("b")
