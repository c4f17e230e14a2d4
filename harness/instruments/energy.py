"""Energy of an execution, from a counter that ticks slowly, while it is repeated without a pause.

Imports neither torch nor pynvml. A counter such as NVML's advances only about every 100 ms, so its
value at an arbitrary moment is old. Here it is read all the time while the device works, and the
moments at which it advances are kept: between two of them the energy and the time are both known.
The region is as long as it takes to know its length to `RESOLUTION_FRAC`; it begins when the device
has worked for `RAMP_S`. The mean power over it, divided by executions per second, is the energy of
one execution. Idle power is part of it: a device cannot work without it.
"""

import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

RAMP_S = 0.05
REGION_S = 0.3  # at least; a run's `target_s` if that is longer
TICKS = 3  # at least
RESOLUTION_FRAC = 0.02
SILENT_S = 1.0  # a counter that has not advanced for so long does not count
CEILING_S = 4.0
TRACE_S = 0.05
MAX_TRACE = 64

Poll = Callable[[], None]
Burst = Callable[[Poll], int]
"""Executes for some milliseconds, polls meanwhile, returns how many executions have ended."""


@dataclass(frozen=True, kw_only=True)
class EnergyReading:
    """Mean power and the energy of one execution, or why there is none."""

    energy_j: float | None = None
    power_w: float | None = None
    missing: str | None = None
    details: dict[str, Any] = field(default_factory=dict[str, Any])


@dataclass(frozen=True, kw_only=True)
class _Tick:
    at_s: float
    energy_j: float
    uncertain_s: float


class Meter:
    """Reads a counter and keeps the moments at which it advanced, and a trace of the state."""

    def __init__(
        self,
        counter: Callable[[], float | None],
        snapshot: Callable[[], Mapping[str, Any]],
        *,
        tick_s: float = float("inf"),
        clock: Callable[[], float] = time.perf_counter,
    ) -> None:
        """Take the counter's state.

        Args:
            counter: joules since some moment; None where it cannot be read.
            snapshot: the device's state, for the trace.
            tick_s: the counter advances at least this often, if that is known.
            clock: seconds.
        """
        self._counter, self._snapshot, self._clock = counter, snapshot, clock
        self._tick_s = tick_s
        self.begun_s = self._polled_s = self._traced_s = clock()
        self._last_j = counter()
        self.unreadable = self._last_j is None
        self.advanced_s = self.begun_s
        self.ticks: list[_Tick] = []
        self.trace: list[dict[str, Any]] = []

    def poll(self) -> None:
        """Look whether the counter has advanced."""
        before_s, value_j = self._polled_s, self._counter()
        self._polled_s = now_s = self._clock()
        if value_j is not None and value_j != self._last_j:
            uncertain_s = min(now_s - before_s, self._tick_s)
            self.advanced_s, self._last_j = now_s, value_j
            if now_s - self.begun_s >= RAMP_S:
                self.ticks.append(_Tick(at_s=now_s, energy_j=value_j, uncertain_s=uncertain_s))
        if now_s - self._traced_s >= TRACE_S and len(self.trace) < MAX_TRACE:
            self._traced_s = now_s
            state = self._snapshot()
            kept = {key: state.get(key) for key in ("power_w", "sm_clock_hz", "temperature_c")}
            self.trace.append({"at_s": round(now_s - self.begun_s, 4), **kept})

    @property
    def region_s(self) -> float:
        """The seconds between the first and the last advance."""
        return self.ticks[-1].at_s - self.ticks[0].at_s if self.ticks else 0.0

    @property
    def resolution_frac(self) -> float:
        """How badly the region's length is known, relative to it."""
        if self.region_s <= 0:
            return float("inf")
        return (self.ticks[0].uncertain_s + self.ticks[-1].uncertain_s) / self.region_s

    def enough(self, region_s: float) -> bool:
        """Whether the region is long enough and its length known well enough."""
        return (
            len(self.ticks) > TICKS
            and self.region_s >= region_s
            and self.resolution_frac <= RESOLUTION_FRAC
        )


def measure(
    burst: Burst,
    meter: Meter,
    *,
    region_s: float = REGION_S,
    ceiling_s: float = CEILING_S,
    clock: Callable[[], float] = time.perf_counter,
) -> EnergyReading:
    """Repeat an execution until its energy is known, or it is clear that it will not be."""
    if meter.unreadable:
        return EnergyReading(missing="the device's energy counter cannot be read")
    ended, first_s, last_s = 0, None, clock()
    before_first = 0
    while True:
        ended += burst(meter.poll)
        last_s = clock()
        if first_s is None and last_s - meter.begun_s >= RAMP_S:
            first_s, before_first = last_s, ended
        if meter.enough(region_s) and ended > before_first:
            break
        if last_s - meter.advanced_s > SILENT_S:
            silent_s = last_s - meter.advanced_s
            return EnergyReading(
                missing=f"the energy counter did not advance in {silent_s:.1f} s of work",
                details={"trace": meter.trace},
            )
        if last_s - meter.begun_s > ceiling_s and (ended > before_first or first_s is None):
            break
    return _reading(meter, ended - before_first, last_s - (first_s or meter.begun_s))


def _reading(meter: Meter, executions: int, taken_s: float) -> EnergyReading:
    details: dict[str, Any] = {
        "region_s": meter.region_s,
        "ticks": max(0, len(meter.ticks) - 1),
        "resolution_frac": meter.resolution_frac if meter.region_s else None,
        "executions": executions,
        "executions_s": taken_s,
        "idle_power": "included",
        "trace": meter.trace,
    }
    if not meter.region_s or meter.resolution_frac > RESOLUTION_FRAC or executions == 0:
        return EnergyReading(
            missing=f"the energy counter advanced too seldom to be resolved to "
            f"{RESOLUTION_FRAC:.0%} within {taken_s:.1f} s",
            details=details,
        )
    used_j = meter.ticks[-1].energy_j - meter.ticks[0].energy_j
    power_w = used_j / meter.region_s
    details["counted_j"] = used_j
    return EnergyReading(energy_j=power_w * taken_s / executions, power_w=power_w, details=details)


class Rapl:
    """The processor packages' energy, as Linux' powercap shows it; they wrap around."""

    tick_s = 0.001
    root = Path("/sys/class/powercap")

    def __init__(self, root: Path | None = None) -> None:
        self._zones = sorted(
            zone for zone in (root or self.root).glob("intel-rapl:*") if _is_package(zone)
        )
        self._before: dict[Path, int] = {}
        self._total_uj = 0

    def missing(self) -> str | None:
        """Return why the energy cannot be read, or None."""
        if not self._zones:
            return "the system has no RAPL counter in /sys/class/powercap (usual in a VM)"
        try:
            for zone in self._zones:
                int((zone / "energy_uj").read_text())
        except PermissionError:
            return (
                "RAPL's energy_uj can be read by root only: "
                "chmod o+r /sys/class/powercap/intel-rapl:*/energy_uj"
            )
        except (OSError, ValueError) as error:
            return f"RAPL's energy_uj cannot be read: {error}"
        return None

    def energy_j(self) -> float:
        """Return the joules of all packages since the first call."""
        for zone in self._zones:
            now = int((zone / "energy_uj").read_text())
            step = now - self._before.setdefault(zone, now)
            if step < 0:
                step += int((zone / "max_energy_range_uj").read_text())
            self._before[zone] = now
            self._total_uj += step
        return self._total_uj / 1e6


def _is_package(zone: Path) -> bool:
    try:
        return (zone / "name").read_text().startswith("package")
    except OSError:
        return False
