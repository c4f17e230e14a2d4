"""Shows how a check goes, on stderr: a bar with an ETA on a terminal, else one line per process."""

import sys
import time
from collections.abc import Callable, Mapping
from typing import TextIO, cast

from mambench.harness.progress import Bar
from mambench.harness.spec import Case
from mambench.harness.text import duration


def make(
    *, quiet: bool, environment: Mapping[str, str], stream: TextIO | None = None
) -> "PlainProgress":
    """Return the progress that fits the stream (stderr if None)."""
    stream = stream or cast("TextIO", sys.stderr)
    if not quiet and stream.isatty() and environment.get("TERM", "dumb") not in ("dumb", ""):
        return BarProgress(stream)
    return PlainProgress(stream, quiet=quiet)


class PlainProgress:
    """One line per process, for logs and pipes."""

    def __init__(
        self,
        stream: TextIO,
        *,
        quiet: bool = False,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._stream = stream
        self._quiet = quiet
        self._clock = clock
        self._left = self._done = 0
        self._taken_s = 0.0  # by all processes of the present stage
        self._begun = 0.0
        self._line = ""

    def __enter__(self) -> "PlainProgress":
        return self

    def __exit__(self, *_: object) -> None:
        """Leave the stream as it was found."""

    def on_note(self, text: str) -> None:
        """Print the note."""
        self._print(f"note: {text}")

    def on_work(self, processes: int) -> None:
        """Begin a stage."""
        self._left, self._done, self._taken_s = processes, 0, 0.0

    def on_process(self, arm: str, what: str, cases: int) -> None:
        """Remember what begins."""
        self._begun = self._clock()
        self._line = f"{arm}, {what}: {cases} cases"

    def on_case(self, case: Case) -> None:
        """Say nothing."""

    def on_process_end(self, failed: int) -> None:
        """Print what it took and what is left."""
        took_s = self._clock() - self._begun
        self._taken_s += took_s
        self._done += 1
        self._left -= 1
        if not self._quiet:
            bad = f", {failed} failed" if failed else ""
            self._print(f"{self._line} in {duration(took_s)}{bad} | {self._eta()}")

    def _eta(self) -> str:
        each_s = self._taken_s / max(self._done, 1)
        return f"{duration(max(self._left, 0) * each_s)} left"

    def _print(self, line: str) -> None:
        print(line, file=self._stream, flush=True)


class BarProgress(PlainProgress):
    """A bar over the processes of a stage with the present case and an ETA."""

    def __init__(self, stream: TextIO) -> None:
        super().__init__(stream)
        self._bar = Bar(stream)

    def __enter__(self) -> "BarProgress":
        self._bar.__enter__()
        return self

    def __exit__(self, *_: object) -> None:
        self._bar.__exit__()

    def on_work(self, processes: int) -> None:
        """Draw a new bar."""
        super().on_work(processes)
        self._bar.begin(processes)

    def on_process(self, arm: str, what: str, cases: int) -> None:
        """Name the process."""
        super().on_process(arm, what, cases)
        self._bar.update(description=f"{arm}, {what}")

    def on_case(self, case: Case) -> None:
        """Name the case."""
        self._bar.update(description=f"{self._line.partition(':')[0]}: {case.label}")

    def on_process_end(self, failed: int) -> None:
        """Advance."""
        self._quiet = True
        super().on_process_end(failed)
        self._bar.update(advance=1, left=self._eta())

    def _print(self, line: str) -> None:
        self._bar.print(line)
