"""Shows how a run goes, on stderr: a bar with an ETA on a terminal, else one line per case.

Colour appears only on a terminal and never with NO_COLOR set. The ETA starts from the plan's
estimates and is corrected by how long the finished cases really took, first cases of a kind apart.
"""

import sys
import time
from collections.abc import Callable, Hashable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Protocol, TextIO, cast

from mambench.harness.records import Observation
from mambench.harness.spec import Case, Outcome
from mambench.harness.text import duration, si_time

if TYPE_CHECKING:
    from rich.progress import TaskID

# How many seconds of estimates the correction trusts before it believes the measured ratio: one
# slow first case (imports, caches) must not multiply the ETA of everything after it.
PRIOR_S = 5.0
PRECOMPILE = "compiling ahead"  # how the phase before any case begins, in which compilers work


class Listener(Protocol):
    """What the runner tells while it works."""

    def on_plan(self, n_total: int, n_left: int) -> None:
        """The run begins: all cases, and those still to run."""

    def on_case_start(self, case: Case) -> None:
        """A case begins."""

    def on_phase(self, case: Case, phase: str) -> None:
        """A case enters a phase: compile, gate, time, memory."""

    def on_case_end(self, case: Case, observations: Sequence[Observation]) -> None:
        """A case has ended and is on disk."""

    def on_note(self, text: str) -> None:
        """Something a person should know."""


class SilentListener:
    """A listener that tells nobody."""

    def on_plan(self, n_total: int, n_left: int) -> None:
        """Ignore it."""

    def on_case_start(self, case: Case) -> None:
        """Ignore it."""

    def on_phase(self, case: Case, phase: str) -> None:
        """Ignore it."""

    def on_case_end(self, case: Case, observations: Sequence[Observation]) -> None:
        """Ignore it."""

    def on_note(self, text: str) -> None:
        """Ignore it."""


class Eta:
    """Seconds left: estimates of what is left, times how wrong the estimates have been so far.

    The first case of a kind loads and compiles what the others of its kind find ready. What it
    took beyond its share is expected once of every kind still to come, and multiplies nothing. What
    passes before the first case begins (imports, compiling ahead) is no case's.
    """

    def __init__(
        self,
        estimates_s: Mapping[str, float],
        kinds: Mapping[str, Hashable] | None = None,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._left = dict(estimates_s)
        self._kinds = {case_id: (kinds or {}).get(case_id) for case_id in estimates_s}
        self._clock = clock
        self._last = clock()
        self._begun = False
        self._warm = _Spent()
        self._first: dict[Hashable, _Spent] = {}

    def begin(self) -> None:
        """Count from now if no case has begun yet."""
        if not self._begun:
            self._begun, self._last = True, self._clock()

    def end(self, case_id: str) -> None:
        """Count a case as finished; unknown ones count nothing."""
        now = self._clock()
        took_s, self._last = now - self._last, now
        if case_id not in self._left:
            return
        estimated_s = self._left.pop(case_id)
        kind = self._kinds[case_id]
        if kind is None or kind in self._first:
            self._warm = self._warm.plus(took_s, estimated_s)
        else:
            self._first[kind] = _Spent(took_s=took_s, estimated_s=estimated_s)

    @property
    def correction(self) -> float:
        """Measured over estimated seconds, drawn towards 1 while little has been measured."""
        return (PRIOR_S + self._warm.took_s) / (PRIOR_S + self._warm.estimated_s)

    @property
    def start_s(self) -> float:
        """What the first case of a kind takes beyond its corrected estimate, on average."""
        if not self._first:
            return 0.0
        beyond = (s.took_s - self.correction * s.estimated_s for s in self._first.values())
        return sum(max(0.0, seconds) for seconds in beyond) / len(self._first)

    def remaining_s(self) -> float:
        """Return the expected seconds until the last case ends."""
        to_come = {self._kinds[case_id] for case_id in self._left} - {None} - self._first.keys()
        return sum(self._left.values()) * self.correction + len(to_come) * self.start_s


@dataclass(frozen=True, kw_only=True)
class _Spent:
    took_s: float = 0.0
    estimated_s: float = 0.0

    def plus(self, took_s: float, estimated_s: float) -> "_Spent":
        return _Spent(took_s=self.took_s + took_s, estimated_s=self.estimated_s + estimated_s)


def make_listener(
    estimates_s: Mapping[str, float],
    kinds: Mapping[str, Hashable] | None = None,
    *,
    quiet: bool = False,
    stream: TextIO | None = None,
    environment: Mapping[str, str],
) -> "QuietProgress":
    """Return the listener that fits the stream (stderr if None).

    Args:
        estimates_s: seconds of each case still to run, by case_id.
        kinds: what is alike, by case_id: the first case of a kind compiles for the others.
        quiet: show notes and failures only.
        stream: where to write.
        environment: its TERM decides, beside the stream, whether a bar can be drawn.
    """
    stream = stream or cast("TextIO", sys.stderr)
    if quiet:
        return QuietProgress(stream)
    if stream.isatty() and environment.get("TERM", "dumb") not in ("dumb", ""):
        return BarProgress(Eta(estimates_s, kinds), stream)
    return PlainProgress(Eta(estimates_s, kinds), stream)


class QuietProgress(SilentListener):
    """Notes and failed cases only."""

    def __init__(self, stream: TextIO) -> None:
        self._stream = stream

    def __enter__(self) -> "QuietProgress":
        return self

    def __exit__(self, *_: object) -> None:
        """Leave the stream as it was found."""

    def on_case_end(self, case: Case, observations: Sequence[Observation]) -> None:
        """Print a failed case."""
        if any(observation.outcome.failed for observation in observations):
            self._print(case_line(case, observations))

    def on_note(self, text: str) -> None:
        """Print the note."""
        self._print(f"note: {text}")

    def _print(self, line: str) -> None:
        print(line, file=self._stream, flush=True)


class PlainProgress(QuietProgress):
    """One line per case, for logs and pipes."""

    def __init__(self, eta: Eta, stream: TextIO) -> None:
        super().__init__(stream)
        self._eta = eta
        self._done = self._total = 0

    def on_plan(self, n_total: int, n_left: int) -> None:
        """Print what is to come."""
        self._total = n_left
        self._print(plan_line(n_total, n_left, self._eta.remaining_s()))

    def on_case_start(self, case: Case) -> None:
        """Count the time."""
        self._eta.begin()

    def on_phase(self, case: Case, phase: str) -> None:
        """Print what takes minutes while no case ends: compiling ahead, measuring in batches."""
        if phase.startswith(PRECOMPILE):
            self._print(f"{phase}: {case.without_sizes}")
        elif " of " in phase:
            self._print(f"{phase}: {case.label}")

    def on_case_end(self, case: Case, observations: Sequence[Observation]) -> None:
        """Print how the case ended and what is left."""
        self._done += 1
        self._eta.end(case.case_id)
        width = len(str(self._total))
        left = duration(self._eta.remaining_s())
        line = case_line(case, observations)
        self._print(f"[{self._done:>{width}}/{self._total}] {line} | {left} left")


class Bar:
    """A bar of one task at a time, gone when it has stopped; what is printed stays above it."""

    def __init__(self, stream: TextIO) -> None:
        from rich.console import Console
        from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn
        from rich.table import Column

        self._task: TaskID | None = None
        # The label takes what is left of the line, so that a narrow terminal cuts only it.
        label = Column(ratio=1, no_wrap=True)
        self._progress = Progress(
            BarColumn(bar_width=24),
            MofNCompleteColumn(),
            TextColumn("{task.fields[left]}", markup=False),
            TextColumn("{task.description}", markup=False, table_column=label),
            console=Console(file=stream, highlight=False),
            expand=True,
            transient=True,
        )

    def __enter__(self) -> "Bar":
        self._progress.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._progress.stop()

    def begin(self, total: int, left: str = "") -> None:
        """Begin a task of so many steps, in place of the one before."""
        if self._task is not None:
            self._progress.remove_task(self._task)
        self._task = self._progress.add_task("starting", total=total, left=left)

    def update(self, **changes: Any) -> None:
        """Change the task's `description` or `left`, or `advance` it; before the first, nothing."""
        if self._task is not None:
            self._progress.update(self._task, **changes)

    def print(self, line: str) -> None:
        """Print a line above the bar."""
        self._progress.console.print(line, markup=False, soft_wrap=True)


class BarProgress(QuietProgress):
    """A bar with the case, its phase, what is left and an ETA; failures stay above it."""

    def __init__(self, eta: Eta, stream: TextIO) -> None:
        super().__init__(stream)
        self._eta = eta
        self._bar = Bar(stream)

    def __enter__(self) -> "BarProgress":
        self._bar.__enter__()
        return self

    def __exit__(self, *_: object) -> None:
        self._bar.__exit__()

    def on_plan(self, n_total: int, n_left: int) -> None:
        """Draw the bar."""
        self._print(plan_line(n_total, n_left, self._eta.remaining_s()))
        self._bar.begin(n_left, self._left())

    def on_case_start(self, case: Case) -> None:
        """Name the case."""
        self._eta.begin()
        self._update(description=case.label)

    def on_phase(self, case: Case, phase: str) -> None:
        """Name the case and its phase."""
        self._update(description=f"{phase}: {case.label}")

    def on_case_end(self, case: Case, observations: Sequence[Observation]) -> None:
        """Advance; a failure stays on the screen."""
        self._eta.end(case.case_id)
        self._update(advance=1)
        super().on_case_end(case, observations)

    def _update(self, **changes: Any) -> None:
        self._bar.update(left=self._left(), **changes)

    def _left(self) -> str:
        return f"{duration(self._eta.remaining_s())} left"

    def _print(self, line: str) -> None:
        self._bar.print(line)


def plan_line(n_total: int, n_left: int, remaining_s: float) -> str:
    """Return the first line of a run."""
    finished = f" ({n_total - n_left} of {n_total} need no run)" if n_left < n_total else ""
    return f"{n_left} cases to run{finished}, about {duration(remaining_s)}"


def case_line(case: Case, observations: Sequence[Observation]) -> str:
    """Return one line: outcome, label, and the time, what else was measured, or the reason."""
    worst = next((o for o in observations if o.outcome is not Outcome.OK), None)
    if worst is not None:
        return f"{worst.outcome:<11} {case.label}: {worst.reason}"
    found = {o.measurement: o.values.get("time_s") for o in observations}
    if "time" in found:
        time_s = found["time"]
        said = "no time" if time_s is None else si_time(time_s)
    else:  # it was measured before the run was cut off
        said = ", ".join(found)
    return f"{'ok':<11} {case.label}: {said}"
