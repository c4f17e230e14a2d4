"""The GPU's part of the selftest. Imports torch at module level; loaded when a GPU is tested.

Time is held against a kernel that waits and keeps a record of its own by the GPU's global timer,
and that timer against the host's clock. Measured times hold one thing more than what a kernel does:
what the GPU needs to start it. That is constant; it is found as the median difference over the
short waits, shown, bounded, and taken off before a time is judged. A call time holds the host's
launch too, which is not constant: it is longer after the host has waited for long, and on a busy
host. So a call of nothing is timed after a wait of the same length, before and after each wait is
timed, and what the call time exceeds the wait by must lie between half of such a call (launching
the kernel takes more of it than recording the event behind) and the whole, the quartiles of their
samples allowed for, with the timer's own tolerance.

A host that other work keeps from launching in time spoils call times and what another timer sees,
for a moment. So these are measured again where they do not agree, twice at most, and the check says
so; a timer that is off is off each time.

What other timers see is in `gpu_timers`.
"""

import math
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from functools import partial
from statistics import median, quantiles

import torch
from torch import Tensor

from mambench.harness.counters import count as counters
from mambench.harness.instruments import cuda_timing, timing
from mambench.harness.selftest import cache as selftest_cache
from mambench.harness.selftest import energy as selftest_energy
from mambench.harness.selftest import run as selftest
from mambench.harness.selftest.run import Check
from mambench.harness.spec import Device, Outcome
from mambench.harness.text import binary_bytes, si_time

RULE = timing.StopRule(target_s=0.2, min_samples=20, max_samples=200, relative_error=5e-4)
WAITS_S = (5e-6, 10e-6, 20e-6, 50e-6, 100e-6, 500e-6, 1e-3, 5e-3)
SHORT_S = 100e-6  # the start of a kernel is found from waits up to this long
LAUNCH_RULE = timing.StopRule(target_s=0.05, min_samples=20, max_samples=50, relative_error=5e-4)
LAUNCH_SHARE = 0.5  # of a call of nothing, at least, precedes its kernel
ATTEMPTS = 3  # at what a busy host may have spoilt
WARM_UP_S = 0.3
HOST_SPAN_S = 0.5
HOST_RATE = 1e-3
TIMER_STEP_S = 2e-6
CALL_TIME = "call time"
MOST_LAUNCH_S = (
    200e-6  # of a call of nothing; more is no launch, but a fault or a host at its limit
)
# Largest cost of starting a kernel that is plausible; more hides an error of the timer.
STARTS_S = {"graph replay": 3e-6, "profiler sum": 3e-6}
TRAFFIC = 0.02
COPIES_IN_L2_SIZES = (5, 16)


def on(device: Device, part: str) -> Iterator[Check]:
    """Yield the checks of a part on a device, on a stream that can be captured."""
    from mambench.harness.selftest import gpu_timers

    made: dict[str, Callable[[Device], Iterator[Check]]] = {
        "clock": clock,
        "timer": timer,
        "two_timers": gpu_timers.two_timers,
        "cold_and_hot": selftest_cache.cold_and_hot,
        "traffic": traffic,
        "energy": selftest_energy.known_load,
    }
    torch.cuda.set_device(device.index)
    with torch.cuda.stream(torch.cuda.Stream()):
        yield from made[part](device)
    torch.cuda.synchronize()
    torch.cuda.empty_cache()


def clock(device: Device) -> Iterator[Check]:
    """Check the GPU's global timer: how fine it is, and that it runs as fast as the host's."""
    from mambench.kernels import probes

    probes.timer_steps()
    yield selftest.between(
        "GPU clock",
        "step of the global timer",
        low=None,
        high=TIMER_STEP_S,
        got=timer_step_s(),
        show=si_time,
        unit="s",
    )
    now = torch.zeros(1, dtype=torch.int64, device="cuda")
    probes.read_timer(now)
    begin, begin_s = _timer_and_host(now)
    time.sleep(HOST_SPAN_S)
    end, end_s = _timer_and_host(now)
    yield selftest.near(
        "GPU clock",
        "global timer against the host's clock",
        expected=end_s - begin_s,
        got=(end - begin) / 1e9,
        tolerance=HOST_RATE * HOST_SPAN_S,
        show=si_time,
        unit="s",
    )


def timer_step_s() -> float:
    """Return the step of the global timer; what reading it takes bounds it from below."""
    from mambench.kernels import probes

    return float(probes.timer_steps().double().median()) / 1e9


def _timer_and_host(now: Tensor) -> tuple[int, float]:
    """Read both clocks at one moment, as nearly as a launch allows: the quickest of several."""
    from mambench.kernels import probes

    readings: list[tuple[float, int, float]] = []
    for _ in range(20):
        torch.cuda.synchronize()
        begin = time.perf_counter()
        probes.read_timer(now)
        torch.cuda.synchronize()
        end = time.perf_counter()
        readings.append((end - begin, int(now.item()), (begin + end) / 2))
    _, ticks, at_s = min(readings)
    return ticks, at_s


@dataclass(frozen=True, kw_only=True)
class Wait:
    """One wait: what the kernel says of itself, and what was measured."""

    asked_s: float
    own_s: float
    uncertainty_s: float  # of `own_s`, from the steps of the global timer; three deviations
    measured_s: float
    launches_s: tuple[float, ...] = ()  # quartiles of calls of nothing after waits as long


Measure = Callable[[Callable[[], object], timing.StopRule], float | None]


def timer(device: Device) -> Iterator[Check]:
    """Check the three ways to time a kernel on waits of known length."""
    from mambench.kernels import probes

    record = probes.new_record()
    cycles_per_s = settled_clock(record)
    step_s = timer_step_s()

    def measured(method: str, asked_s: float) -> Wait | None:
        wait = partial(probes.spin, record, round(cycles_per_s * asked_s))
        launches = _launches_after_s(wait) if method == CALL_TIME else ()
        record.zero_()
        measured_s = METHODS[method](wait, RULE)
        if measured_s is None:
            return None
        executions, own_ns, _ = probes.read_record(record)
        return Wait(
            asked_s=asked_s,
            own_s=own_ns / executions / 1e9,
            # Begin and end are each off by up to one step, evenly.
            uncertainty_s=3 * step_s / math.sqrt(6 * executions),
            measured_s=measured_s,
            launches_s=(*launches, *_launches_after_s(wait)) if launches else (),
        )

    for method, measure in METHODS.items():
        if method == CALL_TIME:
            yield _judge_launch(measure(partial(probes.spin, record, 0), RULE) or 0.0)
            for asked_s in WAITS_S:
                yield again(lambda asked_s=asked_s: judge_call(measured(CALL_TIME, asked_s)))
            continue
        waits = [wait for asked_s in WAITS_S if (wait := measured(method, asked_s)) is not None]
        if len(waits) < len(WAITS_S):
            yield selftest.skipped("GPU timer", method, "the profiler sees no kernels here")
        else:
            yield from judge_waits(method, waits)


def again(check: Callable[[], Check]) -> Check:
    """Make a check that a busy host can spoil, and say so if the first attempt did not pass."""
    made = check()
    for attempt in range(2, ATTEMPTS + 1):
        if made.passed is not False:
            break
        before, made = made, check()
        made = replace(made, got=f"{made.got}; attempt {attempt}, before: {before.got}")
    return made


def _launches_after_s(wait: Callable[[], object]) -> tuple[float, float]:
    """Return the quartiles of the call time of nothing where the host has just waited so."""
    from mambench.kernels import probes

    nothing = partial(probes.spin, probes.new_record(), 0)
    run = cuda_timing.Run(nothing, LAUNCH_RULE)
    with timing.collector_paused():
        run.warm_up()
        low_s, _, high_s = quantiles(cuda_timing.time_eager(run, wait).samples_s, n=4)
    return low_s, high_s


def _judge_launch(launch_s: float) -> Check:
    return selftest.between(
        "GPU timer",
        f"{CALL_TIME}: call of nothing",
        low=0.0,
        high=MOST_LAUNCH_S,
        got=launch_s,
        show=si_time,
        unit="s",
    )


def judge_call(wait: Wait | None) -> Check:
    """Check that a call of a wait takes the wait and the launch that the host then needs."""
    assert wait is not None  # a call always takes some time
    tolerance_s = selftest.time_tolerance_s(wait.own_s) + wait.uncertainty_s
    least_s, most_s = min(wait.launches_s), max(wait.launches_s)
    return selftest.between(
        "GPU timer",
        f"{CALL_TIME}: wait of {si_time(wait.asked_s)}",
        low=wait.own_s + LAUNCH_SHARE * least_s - tolerance_s,
        high=wait.own_s + most_s + tolerance_s,
        got=wait.measured_s,
        show=si_time,
        unit="s",
        note=f"a call of nothing after as long takes {si_time(least_s)} to {si_time(most_s)}",
    )


def judge_waits(method: str, waits: list[Wait]) -> Iterator[Check]:
    """Check the start that measured times share, and what is left of each without it."""
    short = [wait for wait in waits if wait.asked_s <= SHORT_S]
    start_s = median(wait.measured_s - wait.own_s for wait in short)
    yield selftest.between(
        "GPU timer",
        f"{method}: start of a kernel",
        low=-selftest.ABSOLUTE_S,
        high=STARTS_S[method],
        got=start_s,
        show=signed_time,
        unit="s",
    )
    for wait in waits:
        yield selftest.near(
            "GPU timer",
            f"{method}: wait of {si_time(wait.asked_s)}",
            expected=wait.own_s,
            got=wait.measured_s - start_s,
            tolerance=selftest.time_tolerance_s(wait.own_s) + wait.uncertainty_s,
            show=si_time,
            unit="s",
            note=f"{si_time(wait.measured_s)} with the start",
        )


def signed_time(time_s: float) -> str:
    """Write a time that may be below zero."""
    return si_time(time_s) if time_s >= 0 else f"-{si_time(-time_s)}"


def settled_clock(record: Tensor) -> float:
    """Return the SM clock's rate once it has settled, by the global timer."""
    from mambench.kernels import probes

    begin = time.monotonic()
    while time.monotonic() - begin < WARM_UP_S:
        record.zero_()
        for _ in range(5):
            probes.spin(record, 10_000_000)
        torch.cuda.synchronize()
    _, own_ns, cycles = probes.read_record(record)
    return cycles / own_ns * 1e9


def by_graph(execute: Callable[[], object], rule: timing.StopRule) -> float:
    """Return the time by graph replay; raises RuntimeError if it was taken otherwise."""
    taken, _ = cuda_timing.time_gpu(execute, rule)
    if taken.method != "cuda-graph":
        raise RuntimeError(f"timed by {taken.method}: {taken.details.get('not_captured')}")
    return taken.median_s


def _call(execute: Callable[[], object], rule: timing.StopRule) -> float:
    return cuda_timing.time_calls(execute, rule).median_s


def _profiler(execute: Callable[[], object], rule: timing.StopRule) -> float | None:
    taken = cuda_timing.time_profiler(execute, rule)
    return None if taken is None else taken.median_s


METHODS: dict[str, Measure] = {
    "graph replay": by_graph,
    CALL_TIME: _call,
    "profiler sum": _profiler,
}


def multiple(count: int, of: int) -> int:
    """Return the multiple of a number that is nearest to a count, at least once the number."""
    return max(1, round(count / of)) * of


def traffic(device: Device) -> Iterator[Check]:
    """Check the counters on copies of more bytes than L2 holds, where they are permitted."""
    from mambench.kernels import probes

    sizes = [multiple(n * probes.l2_bytes(), 1 << 20) for n in COPIES_IN_L2_SIZES]
    found = counters.count_copies(sizes, counters.Request(device=device))
    for size in sizes:
        yield from judge_traffic(size, found[size])


def judge_traffic(size_bytes: int, counted: counters.Counted) -> Iterator[Check]:
    """Check the bytes read and written by a kernel that does so many of each."""
    what = f"copy of {binary_bytes(size_bytes)}"
    reason = counted.reason or "no reason given"
    if counted.outcome is Outcome.UNAVAILABLE:
        yield selftest.skipped("counters", what, reason)
        return
    if counted.outcome is not Outcome.OK:
        raise RuntimeError(f"{what}: {counted.outcome}: {reason}")
    for name, tag in (("read", "dram_read_bytes"), ("written", "dram_write_bytes")):
        yield selftest.near(
            "counters",
            f"{what}: bytes {name}",
            expected=size_bytes,
            got=float(counted.values[tag] or math.nan),
            tolerance=TRAFFIC * size_bytes,
            show=binary_bytes,
            unit="bytes",
        )
