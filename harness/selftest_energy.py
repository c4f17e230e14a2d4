"""The energy counter against sampled power, and twice the work against once.

Imports torch only inside functions. The load is steady, a chain of exponentials without a pause,
and begins well before it is judged: the power that a GPU reports may be a mean over a second. The
counter steps about ten times a second, so spans run from one of its steps to another.
"""

import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

from mambench.harness import selftest
from mambench.harness.selftest import Check
from mambench.harness.spec import Device
from mambench.harness.telemetry import Sensors, Telemetry

PART = "energy"
SETTLE_S = 1.5
SPAN_S = 2.5
CHUNK_S = 0.01
AGREEMENT = 0.05  # counter against integral: NVML states 5 % for power
DOUBLE = 0.05
MIN_STEPS = 5


@dataclass(frozen=True, kw_only=True)
class Reading:
    """What was read at one moment of a steady load."""

    at_s: float
    energy_j: float
    power_w: float
    done: int  # executions that had ended


def energy(device: Device) -> Iterator[Check]:
    """Load the GPU twice, the second time with executions of twice the work."""
    telemetry = Telemetry(device)
    sensors = telemetry.sensors
    if sensors is None:
        yield selftest.skipped(PART, PART, telemetry.missing or "there are no sensors")
        return
    if sensors.energy_j() is None or sensors.snapshot().get("power_w") is None:
        yield selftest.skipped(PART, PART, "NVML gives no energy counter or no power on this GPU")
        return
    once, twice = (_load(sensors, work) for work in (1, 2))
    yield judge_power(once)
    yield judge_work(once, twice)


def judge_power(readings: Sequence[Reading]) -> Check:
    """Check the counter's joules against the integral of power between the same two steps."""
    first, last = _steps(readings)
    span = [r for r in readings if first.at_s <= r.at_s <= last.at_s]
    integral_j = sum((a.power_w + b.power_w) / 2 * (b.at_s - a.at_s) for a, b in pairwise(span))
    return selftest.near(
        PART,
        f"counter against sampled power, {last.at_s - first.at_s:.1f} s",
        expected=integral_j,
        got=last.energy_j - first.energy_j,
        tolerance=AGREEMENT * integral_j,
        show=_joules,
        unit="j",
        note=f"{len(span)} samples of power",
    )


def judge_work(once: Sequence[Reading], twice: Sequence[Reading]) -> Check:
    """Check that an execution of twice the work takes twice the energy."""
    return selftest.near(
        PART,
        "energy of twice the work over that of once",
        expected=2.0,
        got=per_execution_j(twice) / per_execution_j(once),
        tolerance=2.0 * DOUBLE,
        show=_ratio,
        unit="ratio",
        note=f"{per_execution_j(once):.3g} J and {per_execution_j(twice):.3g} J",
    )


def per_execution_j(readings: Sequence[Reading]) -> float:
    """Return the joules of one execution, between two steps of the counter."""
    first, last = _steps(readings)
    return (last.energy_j - first.energy_j) / (last.done - first.done)


def _steps(readings: Sequence[Reading]) -> tuple[Reading, Reading]:
    """Return the first and the last reading at which the counter had just stepped."""
    stepped = [b for a, b in pairwise(readings) if b.energy_j > a.energy_j]
    if len(stepped) < MIN_STEPS:
        raise RuntimeError(f"the energy counter stepped {len(stepped)} times only")
    return stepped[0], stepped[-1]


def _load(sensors: Sensors, work: int) -> list[Reading]:
    """Execute without a pause; returns what was read once the load was steady."""
    import torch

    from mambench.kernels import probes

    out = probes.chain_out()
    rounds = work * _rounds(out)
    readings: list[Reading] = []
    queued: list[Any] = []
    done, begin = 0, time.perf_counter()
    while (now := time.perf_counter() - begin) < SETTLE_S + SPAN_S:
        while len(queued) < 3:  # two wait while one runs: the GPU is never idle
            probes.chain(out, rounds)
            event = torch.cuda.Event()
            event.record()
            queued.append(event)
        queued.pop(0).synchronize()
        done += 1
        if now >= SETTLE_S:
            readings.append(_reading(sensors, done))
    torch.cuda.synchronize()
    return readings


def _reading(sensors: Sensors, done: int) -> Reading:
    energy_j, power_w = sensors.energy_j(), sensors.snapshot().get("power_w")
    if energy_j is None or power_w is None:
        raise RuntimeError("a sensor fell silent under load")
    return Reading(at_s=time.perf_counter(), energy_j=energy_j, power_w=power_w, done=done)


def _rounds(out: Any) -> int:
    """Return how many rounds of the chain take about CHUNK_S."""
    from mambench.kernels import probes

    trial = 2000
    each_s = _seconds(lambda: probes.chain(out, trial)) / trial
    return max(1, round(CHUNK_S / each_s))


def _seconds(execute: Callable[[], None]) -> float:
    import torch

    for _ in range(20):
        execute()
    torch.cuda.synchronize()
    begin = time.perf_counter()
    for _ in range(20):
        execute()
    torch.cuda.synchronize()
    return (time.perf_counter() - begin) / 20


def _joules(value: float) -> str:
    return f"{value:.1f} J"


def _ratio(value: float) -> str:
    return f"{value:.3f}"
