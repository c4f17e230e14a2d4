"""The CPU's clock and timer against work of known mean and noise. Imports no torch.

The work keeps a record of its own, by another clock than the timer's: a machine that is busy makes
a wait longer than was asked for, and the timer is right if it says so.
"""

import random
import time
from collections.abc import Callable, Iterator
from statistics import median, quantiles

from mambench.harness.instruments import timing
from mambench.harness.selftest import run as selftest
from mambench.harness.text import si_time

RULE = timing.StopRule(target_s=0.4, min_samples=30, max_samples=150, relative_error=0.0)
CLOCK_SPAN_S = 0.25
CLOCK_RATE = 1e-3  # clocks that a network disciplines differ by at most half of this
RESOLUTION_S = 1e-6
SPREAD_TOLERANCE = 0.10
ASKED = 1009

Draw = Callable[[random.Random], float]


def own_clock_ns() -> int:
    """Read a clock that is not the timer's: the processor's, not adjusted, where there is one."""
    if hasattr(time, "CLOCK_MONOTONIC_RAW"):
        return time.clock_gettime_ns(time.CLOCK_MONOTONIC_RAW)
    return time.monotonic_ns()


def clock(read: Callable[[], int] = time.perf_counter_ns) -> Iterator[selftest.Check]:
    """Check the timer's clock: how fine it is, and that it runs as fast as another."""
    yield selftest.between(
        "CPU clock",
        "smallest step",
        low=None,
        high=RESOLUTION_S,
        got=timing.clock_resolution_s(read),
        show=si_time,
        unit="s",
    )
    own, begin = own_clock_ns(), read()
    while own_clock_ns() - own < CLOCK_SPAN_S * 1e9:
        pass
    spent_s, own_s = (read() - begin) / 1e9, (own_clock_ns() - own) / 1e9
    yield selftest.near(
        "CPU clock",
        "against the unadjusted clock",
        expected=own_s,
        got=spent_s,
        tolerance=CLOCK_RATE * own_s,
        show=si_time,
        unit="s",
    )


def timer() -> Iterator[selftest.Check]:
    """Check the timer on waits of known length and noise, shorter and longer than a sample."""
    for asked_s in (20e-6, 200e-6, 5e-3):
        yield from _measured(f"busy wait of {si_time(asked_s)}", lambda r, a=asked_s: a, _spin)
    yield from _measured(
        "busy wait of 1 ms ± 5 % (normal)", lambda r: r.gauss(1e-3, 5e-5), _spin, noisy=True
    )
    yield from _measured(
        "busy wait of 1 ms, lognormal by 10 %",
        lambda r: 1e-3 * r.lognormvariate(0, 0.1),
        _spin,
        noisy=True,
    )
    yield from _measured("sleep of 2 ms", lambda r: 2e-3, time.sleep)
    yield from _measured(
        "sleep of 2 ms ± 10 % (normal)", lambda r: r.gauss(2e-3, 2e-4), time.sleep, noisy=True
    )


def _measured(
    what: str, draw: Draw, wait: Callable[[float], None], *, noisy: bool = False
) -> Iterator[selftest.Check]:
    source = random.Random(what)
    asked_s = [draw(source) for _ in range(ASKED)]  # drawn ahead: drawing takes a microsecond
    begun_ns: list[int] = []
    ended_ns: list[int] = []

    def execute() -> None:
        begun_ns.append(own_clock_ns())
        wait(asked_s[len(ended_ns) % ASKED])
        ended_ns.append(own_clock_ns())

    measured = timing.time_cpu(execute, RULE)
    inner = measured.details["executions_per_sample"]
    taken_s = [(end - begin) / 1e9 for begin, end in zip(begun_ns, ended_ns, strict=True)]
    own = _of_samples(taken_s, inner, len(measured.samples_s))
    yield selftest.near(
        "CPU timer",
        what,
        expected=median(own),
        got=measured.median_s,
        tolerance=selftest.time_tolerance_s(median(own)),
        show=si_time,
        unit="s",
        note=f"{len(own)} samples of {inner}",
    )
    if noisy:
        yield selftest.near(
            "CPU timer",
            f"spread of the {what}",
            expected=spread_s(own),
            got=spread_s(measured.samples_s),
            tolerance=max(SPREAD_TOLERANCE * spread_s(own), selftest.ABSOLUTE_S),
            show=si_time,
            unit="s",
        )


def _of_samples(taken_s: list[float], inner: int, samples: int) -> list[float]:
    """Return the work's own samples: what was taken before them was warm-up."""
    taken_s = taken_s[-inner * samples :]
    return [sum(taken_s[i * inner : (i + 1) * inner]) / inner for i in range(samples)]


def spread_s(samples_s: list[float] | tuple[float, ...]) -> float:
    """Return the distance between the quartiles."""
    low, _, high = quantiles(samples_s, n=4)
    return high - low


def _spin(wait_s: float) -> None:
    end = own_clock_ns() + round(1e9 * wait_s)
    while own_clock_ns() < end:
        pass
