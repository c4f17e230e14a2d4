"""Lets the processes of a round measure in turn, case by case.

What disturbs a CPU comes and goes within seconds. Processes that run one after the other see
different disturbances; where they take turns, what is compared is apart by one case only. Each is a
fresh process all the same, and while one measures the others wait for their turn.
"""

import threading
from collections.abc import Callable, Mapping, Sequence

from mambench.harness.progress import SilentListener
from mambench.harness.records import Observation
from mambench.harness.spec import Case


class AbortedError(Exception):
    """The round is over before its time: nobody's turn comes any more."""


class Turns:
    """Whose turn it is; safe to use from many threads."""

    def __init__(self, order: Sequence[str]) -> None:
        """Take the names in the order of all their turns."""
        self._left = list(order)
        self._changed = threading.Condition()
        self._aborted = False

    def begin(self, name: str) -> None:
        """Wait for a turn; returns at once if none is left. Raises AbortedError."""
        with self._changed:
            self._changed.wait_for(
                lambda: self._aborted or name not in self._left or self._left[0] == name
            )
            if self._aborted:
                raise AbortedError

    def end(self, name: str) -> None:
        """Pass the turn on."""
        with self._changed:
            if self._left[:1] == [name]:
                del self._left[0]
            self._changed.notify_all()

    def leave(self, name: str) -> None:
        """Give up all turns that are left."""
        with self._changed:
            self._left = [other for other in self._left if other != name]
            self._changed.notify_all()

    def abort(self) -> None:
        """Let everybody who waits raise."""
        with self._changed:
            self._aborted = True
            self._changed.notify_all()


class TurnListener(SilentListener):
    """Waits for its turn before each case."""

    def __init__(self, name: str, turns: Turns, listener: SilentListener) -> None:
        self._name, self._turns, self._listener = name, turns, listener

    def on_case_start(self, case: Case) -> None:
        """Wait."""
        self._turns.begin(self._name)
        self._listener.on_case_start(case)

    def on_case_end(self, case: Case, observations: Sequence[Observation]) -> None:
        """Let the next one measure."""
        self._turns.end(self._name)

    def on_note(self, text: str) -> None:
        """Pass it on."""
        self._listener.on_note(text)


def together(
    turns: Turns, work: Mapping[str, Callable[[], None]], *, on_abort: Callable[[], None]
) -> None:
    """Do everybody's work, each in a thread of its own; raises what the first to fail raised.

    Who fails loses the turns that it has left, and the others go on. If this thread is interrupted,
    the round is aborted: `on_abort` ends what threads wait for other than their turns.
    """
    failed: list[BaseException] = []

    def one(name: str) -> None:
        try:
            work[name]()
        except BaseException as error:
            failed.append(error)
        finally:
            turns.leave(name)

    threads = [threading.Thread(target=one, args=(name,), name=name) for name in work]
    for thread in threads:
        thread.start()
    try:
        for thread in threads:
            thread.join()
    except BaseException:
        turns.abort()
        on_abort()
        for thread in threads:
            thread.join()
        raise
    if failed:
        raise failed[0]
