"""The energy of a known steady load: against sampled power, and twice the work against once.

Imports torch only inside functions. The load is a chain of exponentials without a pause, measured
as a run measures energy (`harness.instruments.energy`). It begins well before it is judged, because
the power that a GPU reports may be a mean over the last second.
"""

import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import TYPE_CHECKING

from mambench.harness.instruments import energy
from mambench.harness.instruments.telemetry import Sensors, Telemetry
from mambench.harness.selftest import run as selftest
from mambench.harness.selftest.run import Check
from mambench.harness.spec import Device

if TYPE_CHECKING:
    from torch import Tensor

PART = "energy"
SETTLE_S = 1.5
REGION_S = 2.5
CEILING_S = 5.0
EXECUTION_S = 2e-3
AGREEMENT = 0.05  # NVML states 5 % for power
DOUBLE = 0.05

Clock = Callable[[], float]


@dataclass(frozen=True, kw_only=True)
class Observed:
    """What the harness said of a load, and the power that was sampled meanwhile."""

    energy_j: float  # of one execution
    power_w: float  # by the counter
    sampled_w: float  # mean over time
    samples: int
    region_s: float


def known_load(device: Device) -> Iterator[Check]:
    """Load the GPU with executions of once the work, of twice, and of once again.

    A device's power drifts with its temperature, and evenly enough: the mean of what came before
    and after is what it was in between.
    """
    telemetry = Telemetry(device)
    sensors = telemetry.sensors
    if sensors is None:
        yield selftest.skipped(PART, PART, telemetry.missing or "there are no sensors")
        return
    if sensors.energy_j() is None or sensors.snapshot().get("power_w") is None:
        yield selftest.skipped(PART, PART, "NVML gives no energy counter or no power on this GPU")
        return
    yield from judge(*(_on_gpu(sensors, work) for work in (1, 2, 1)))


def judge(once: Observed, twice: Observed, again: Observed) -> Iterator[Check]:
    """Check the counter's power against the sampled one, and the energy of twice the work."""
    each_j = (once.energy_j + again.energy_j) / 2
    yield selftest.near(
        PART,
        "power by the counter against sampled power",
        expected=once.sampled_w,
        got=once.power_w,
        tolerance=AGREEMENT * once.sampled_w,
        show=_watts,
        unit="w",
        note=f"{once.region_s:.1f} s, {once.samples} samples",
    )
    yield selftest.near(
        PART,
        "energy of twice the work over that of once",
        expected=2.0,
        got=twice.energy_j / each_j,
        tolerance=2.0 * DOUBLE,
        show=_ratio,
        unit="ratio",
        note=f"{once.energy_j:.3g} J, {twice.energy_j:.3g} J and {again.energy_j:.3g} J",
    )


def observe(burst: energy.Burst, sensors: Sensors, *, clock: Clock = time.perf_counter) -> Observed:
    """Repeat a load until it is steady, then measure its energy and sample its power.

    Raises RuntimeError if the harness cannot tell the energy of a load this long.
    """
    begin = clock()
    while clock() - begin < SETTLE_S:
        burst(lambda: None)
    sampled: list[tuple[float, float]] = []

    def sampling(poll: energy.Poll) -> int:
        ended = burst(poll)
        power_w = sensors.snapshot().get("power_w")
        if power_w is not None:
            sampled.append((clock(), power_w))
        return ended

    meter = energy.Meter(sensors.energy_j, sensors.snapshot, clock=clock)
    reading = energy.measure(sampling, meter, region_s=REGION_S, ceiling_s=CEILING_S, clock=clock)
    if reading.energy_j is None or reading.power_w is None:
        raise RuntimeError(f"no energy of a steady load: {reading.missing}")
    return Observed(
        energy_j=reading.energy_j,
        power_w=reading.power_w,
        sampled_w=mean_power_w(sampled),
        samples=len(sampled),
        region_s=meter.region_s,
    )


def mean_power_w(sampled: Sequence[tuple[float, float]]) -> float:
    """Return the integral of power over time, divided by the time."""
    if len(sampled) < 2:
        raise RuntimeError("power was sampled less than twice")
    integral_j = sum((a[1] + b[1]) / 2 * (b[0] - a[0]) for a, b in pairwise(sampled))
    return integral_j / (sampled[-1][0] - sampled[0][0])


def _on_gpu(sensors: Sensors, work: int) -> Observed:
    from mambench.harness.instruments.cuda_load import Load
    from mambench.kernels import probes

    out = probes.chain_out()
    rounds = work * _rounds(out)
    load = Load(lambda: probes.chain(out, rounds), work * EXECUTION_S, not_capturable=None)
    try:
        return observe(load.burst, sensors)
    finally:
        load.close()


def _rounds(out: "Tensor") -> int:
    """Return how many rounds of the chain take about EXECUTION_S."""
    from mambench.harness.selftest import gpu_timers
    from mambench.kernels import probes

    trial = 2000
    each_s = gpu_timers.seconds(lambda: probes.chain(out, trial)) / trial
    return max(1, round(EXECUTION_S / each_s))


def _watts(value: float) -> str:
    return f"{value:.1f} W"


def _ratio(value: float) -> str:
    return f"{value:.3f}"
