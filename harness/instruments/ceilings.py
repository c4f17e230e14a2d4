"""What this machine can do at most, measured, and how near to it a case comes. No torch.

A ceiling is a rate that a simple program reaches on this machine: a large copy, a large matrix
product, a kernel of nothing but exponentials. Datasheet values stand beside them and are never used
in their place. `harness.instruments.calibration` measures them, in a process of its own; they are
kept in the user's cache, and in each run's manifest.

`sol_frac` is the time that the work would take at the ceiling that binds, over the measured time.
"""

import json
import subprocess
import sys
import tempfile
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import mambench
from mambench.harness import machine, machine_cache
from mambench.harness.errors import MeasurementError
from mambench.harness.instruments import datasheets
from mambench.harness.spec import Case, Device, DeviceKind, DType, Family, Level, digest
from mambench.harness.text import si_time, table
from mambench.harness.workers.pool import thread_environment
from mambench.implementations.cost import case_cost
from mambench.implementations.exponentials import case_exponentials

SCHEMA = 1
KIND = "ceilings"  # in the cache of what is known of this machine
CALIBRATION_S = 25.0  # estimate; most of it is importing torch and compiling two kernels
LIMIT_S = 300.0
HOW = "measure them with `run_bench.py ceilings`"

COPY, EXP, VECTOR, MATRIX = "copy", "exp", "vector", "matrix"  # matrix-bf16, ...
LAUNCH_EAGER, LAUNCH_GRAPH = "launch-eager", "launch-graph"
UNITS: Mapping[str, str] = {
    COPY: "bytes/s",
    MATRIX: "FLOP/s",
    VECTOR: "FLOP/s",
    EXP: "exp/s",
    LAUNCH_EAGER: "s",
    LAUNCH_GRAPH: "s",
}


@dataclass(frozen=True, kw_only=True)
class Ceiling:
    """One measured limit of a machine, and what its maker states."""

    name: str
    unit: str
    value: float | None  # None: see reason
    reason: str | None = None
    method: str | None = None
    datasheet: float | None = None
    source: str | None = None  # of the datasheet's value


@dataclass(frozen=True, kw_only=True)
class Ceilings:
    """All limits of one machine, as measured at one time."""

    device: str
    fingerprint: str
    measured_at: str
    ceilings: Mapping[str, Ceiling]
    details: Mapping[str, Any]  # samples, sizes, telemetry

    def value(self, name: str) -> float | None:
        """Return a measured ceiling, None where it is missing."""
        found = self.ceilings.get(name)
        return None if found is None else found.value

    def to_dict(self) -> dict[str, Any]:
        """Return plain JSON values."""
        return {
            "schema": SCHEMA,
            "device": self.device,
            "fingerprint": self.fingerprint,
            "measured_at": self.measured_at,
            "ceilings": {name: vars(ceiling) for name, ceiling in self.ceilings.items()},
            "details": self.details,
        }

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> "Ceilings":
        """Rebuild from `to_dict`'s values; raises KeyError, TypeError or ValueError for others."""
        if values["schema"] != SCHEMA:
            raise ValueError(f"schema version {values['schema']!r}, this version reads {SCHEMA}")
        return cls(
            device=values["device"],
            fingerprint=values["fingerprint"],
            measured_at=values["measured_at"],
            ceilings={name: Ceiling(**found) for name, found in values["ceilings"].items()},
            details=values["details"],
        )

    def text(self) -> str:
        """Return a table: measured, stated by the maker, and the share of it that is reached."""
        rows = [_row(ceiling) for ceiling in self.ceilings.values()]
        header = ("ceiling", "measured", "datasheet", "share", "method")
        sources = dict.fromkeys(c.source for c in self.ceilings.values() if c.source)
        return "\n".join(
            [
                f"Ceilings of {self.device}, measured {self.measured_at}",
                "",
                table(rows, header=header, right=" rrr"),
                *([""] if sources else []),
                *(f"datasheet: {source}" for source in sources),
            ]
        )


def _row(ceiling: Ceiling) -> tuple[str, ...]:
    if ceiling.value is None:
        return (ceiling.name, "none", "", "", ceiling.reason or "")
    stated = ceiling.datasheet
    return (
        ceiling.name,
        _amount(ceiling.value, ceiling.unit),
        "" if stated is None else _amount(stated, ceiling.unit),
        "" if stated is None else f"{100 * ceiling.value / stated:.0f} %",
        ceiling.method or "",
    )


def _amount(value: float, unit: str) -> str:
    if unit == "s":
        return si_time(value)
    for factor, prefix in ((1e12, "T"), (1e9, "G"), (1e6, "M")):
        if value >= factor:
            return f"{value / factor:.4g} {prefix}{unit}"
    return f"{value:.4g} {unit}"


@dataclass(frozen=True, kw_only=True)
class Bound:
    """The least time of a case on a machine, and what binds."""

    time_s: float
    ceiling: str
    times_s: Mapping[str, float]  # by ceiling


def fingerprint(device: Device, threads: int) -> str:
    """Return what identifies the settings and the software that ceilings depend on."""
    versions = {name: machine.library_version(name) for name in ("torch", "triton")}
    identity: dict[str, Any] = {"kind": device.kind.value, "name": device.name, **versions}
    if device.kind is DeviceKind.CPU:
        identity |= {"threads": threads, "quota": machine.cgroup_cpus()}
        return digest(identity)
    state = machine.gpu_environment(device) or {}
    for name in ("uuid", "driver", "mig", "ecc", "power_limit_w"):
        identity[name] = state.get(name)
    return digest(identity)


def load(device: Device, threads: int) -> Ceilings | None:
    """Return what was measured earlier on this machine as it is now; None if nothing was."""
    kept = machine_cache.kept(KIND, device)
    try:
        found = None if kept is None else Ceilings.from_dict(kept)
    except (ValueError, KeyError, TypeError):
        return None  # of another version: it is measured again
    return found if found and found.fingerprint == fingerprint(device, threads) else None


def save(found: Ceilings, device: Device) -> str | None:
    """Keep ceilings for later runs; returns why that could not be done, or None."""
    return machine_cache.keep(KIND, device, found.to_dict())


def measure(device: Device, threads: int, *, sizes: Mapping[str, float] | None = None) -> Ceilings:
    """Measure a machine's ceilings in a process of its own; the caller holds the device's lock.

    Args:
        sizes: overrides of `calibration.SIZES`.

    Raises MeasurementError if the process fails or takes too long.
    """
    start = Path(mambench.__file__).with_name("_start.py")
    with tempfile.TemporaryDirectory(prefix="mambench-ceilings-") as folder:
        answer = Path(folder) / "answer.json"
        request = {
            "kind": device.kind.value,
            "index": device.index,
            "name": device.name,
            "compute_capability": device.compute_capability,
            "memory_bytes": device.memory_bytes,
            "threads": threads,
            "sizes": dict(sizes or {}),
        }
        command = [sys.executable, "-P", str(start), "harness.instruments.calibration", str(answer)]
        try:
            done = subprocess.run(
                [*command, json.dumps(request)],
                capture_output=True,
                text=True,
                stdin=subprocess.DEVNULL,
                timeout=LIMIT_S,
                env=thread_environment(threads),
            )
        except subprocess.TimeoutExpired:
            raise MeasurementError(f"calibration took longer than {LIMIT_S:g} s.") from None
        if done.returncode != 0:
            tail = (done.stderr.strip() or "it printed nothing").splitlines()[-1]
            raise MeasurementError(f"calibration ended with {done.returncode}: {tail}")
        measured: dict[str, Any] = json.loads(answer.read_text())
    return _with_datasheet(device, threads, measured)


def _with_datasheet(device: Device, threads: int, measured: Mapping[str, Any]) -> Ceilings:
    stated = _stated(device, measured.get("sm_count"))
    ceilings: dict[str, Ceiling] = {}
    for name, found in measured["ceilings"].items():
        value, source = stated.get(name, (None, None))
        ceilings[name] = Ceiling(
            name=name,
            unit=UNITS[name if name in UNITS else name.split("-")[0]],
            value=found.get("value"),
            reason=found.get("reason"),
            method=found.get("method"),
            datasheet=value,
            source=source,
        )
    details = {name: found.get("details", {}) for name, found in measured["ceilings"].items()}
    return Ceilings(
        device=device.name,
        fingerprint=fingerprint(device, threads),
        measured_at=measured["measured_at"],
        ceilings=ceilings,
        details={**details, "telemetry": measured["telemetry"], "threads": threads},
    )


def _stated(device: Device, sm_count: int | None) -> dict[str, tuple[float, str]]:
    """Return the maker's values and their sources, by ceiling."""
    stated: dict[str, tuple[float, str]] = {}
    sheet = datasheets.find(device.name) if device.kind is DeviceKind.CUDA else None
    if sheet is not None:
        if sheet.memory_bytes_per_s is not None:
            stated[COPY] = (sheet.memory_bytes_per_s, sheet.source)
        for dtype, rate in sheet.matrix_flop_per_s.items():
            stated[f"{MATRIX}-{dtype}"] = (rate, sheet.source)
        if "fp32" in sheet.matrix_flop_per_s:
            stated[VECTOR] = (sheet.matrix_flop_per_s["fp32"], sheet.source)
    per_clock = datasheets.exp_per_clock(device.compute_capability)
    clock_hz = _max_clock_hz(device)
    if per_clock and sm_count and clock_hz:
        source = f"{datasheets.EXP_SOURCE}, at the highest clock that NVML names"
        stated[EXP] = (per_clock * sm_count * clock_hz, source)
    return stated


def _max_clock_hz(device: Device) -> float | None:
    state: dict[str, Any] = machine.gpu_environment(device) or {}
    clocks: dict[str, dict[str, float | None]] = state.get("clocks_hz") or {}
    return clocks.get("sm", {}).get("max")


def bound(case: Case, found: Ceilings) -> Bound | str:
    """Return the least time that the case's modelled work takes at the measured ceilings.

    Returns why there is none where a ceiling that the case needs is missing.
    """
    cost = case_cost(case)
    work: dict[str, float] = {COPY: cost.compulsory_bytes, EXP: case_exponentials(case)}
    if case.problem.family is Family.S6 and case.problem.level is Level.OP:
        work[VECTOR] = cost.model_flop  # a decay for each channel and state: no matrix product
    else:
        work[_matrix_name(case.dtype, found)] = cost.model_flop
    times_s: dict[str, float] = {}
    for name, amount in work.items():
        rate = found.value(name)
        if rate is None:
            ceiling = found.ceilings.get(name)
            why = ceiling.reason if ceiling and ceiling.reason else "it was not measured"
            return f"the ceiling '{name}' is missing: {why}"
        times_s[name] = amount / rate
    binding = max(times_s, key=lambda name: times_s[name])
    return Bound(time_s=times_s[binding], ceiling=binding, times_s=times_s)


def _matrix_name(dtype: DType, found: Ceilings) -> str:
    """Return the rate that binds products of a dtype: of fp32 the tensor cores' if faster."""
    name = f"{MATRIX}-{dtype.value}"
    if dtype is DType.FP32:
        tf32 = f"{MATRIX}-tf32"
        if (found.value(tf32) or 0) > (found.value(name) or 0):
            return tf32
    return name
