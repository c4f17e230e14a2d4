"""`selftest`: proof on this machine that the instrument is right. Imports no torch.

Parts are run one after the other; each yields checks of something that is known against what the
harness measures of it. A part that raises is a failed check and stops no other. What this machine
cannot show (no GPU, counters not permitted) is skipped with the reason, and never counts as passed.
"""

import time
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from datetime import UTC, datetime
from typing import Any

from mambench.harness import machine
from mambench.harness.spec import Device, DeviceKind
from mambench.harness.text import table

RESULT_SCHEMA = 1
ABSOLUTE_S = 1e-6  # a known time is measured within 1 % or 1 us, whichever is more
RELATIVE = 0.01


@dataclass(frozen=True, kw_only=True)
class Check:
    """One thing that is known, and what was got of it."""

    part: str
    what: str
    expected: str
    got: str
    passed: bool | None  # None: skipped
    reason: str | None = None  # why it failed or was skipped
    values: Mapping[str, float] = field(default_factory=dict[str, float])  # SI, unit in the name

    @property
    def verdict(self) -> str:
        """`pass`, `FAIL` or `skipped`."""
        return {True: "pass", False: "FAIL", None: "skipped"}[self.passed]

    def to_dict(self) -> dict[str, Any]:
        """Return plain JSON values."""
        return {
            "part": self.part,
            "what": self.what,
            "expected": self.expected,
            "got": self.got,
            "verdict": self.verdict.lower(),
            "reason": self.reason,
            "values": dict(self.values),
        }


@dataclass(frozen=True, kw_only=True)
class Part:
    """A group of checks.

    `run` yields them; it imports what is heavy. `missing` says why it cannot be run here, or None.
    """

    name: str
    run: Callable[[Device], Iterator[Check]]
    missing: Callable[[Device], str | None] = lambda device: None


@dataclass(frozen=True, kw_only=True)
class Result:
    """All checks of one selftest."""

    device: Device
    checks: tuple[Check, ...]
    wall_s: float
    ran_at: str  # ISO 8601, UTC
    code: str  # machine.code_version()["id"]

    @property
    def passed(self) -> bool:
        """Whether nothing failed and something was shown."""
        verdicts = {check.passed for check in self.checks}
        return True in verdicts and False not in verdicts

    @property
    def counts(self) -> dict[str, int]:
        """How many checks passed, failed and were skipped."""
        found = Counter(check.verdict.lower() for check in self.checks)
        return {
            "passed": found["pass"], "failed": found["fail"], "skipped": found["skipped"]
        }  # fmt: skip

    def to_dict(self) -> dict[str, Any]:
        """Return plain JSON values."""
        return {
            "schema": RESULT_SCHEMA,
            "ran_at": self.ran_at,
            "code": self.code,
            "device": {"name": self.device.name, "torch_name": self.device.torch_name},
            "passed": self.passed,
            "counts": self.counts,
            "wall_s": self.wall_s,
            "checks": [check.to_dict() for check in self.checks],
        }

    def text(self) -> str:
        """Return the table, the failures at the end again, and one line that sums up."""
        rows = [
            (c.verdict, c.part, c.what, c.expected, (c.passed is None and c.reason) or c.got)
            for c in self.checks
        ]
        header = ("", "part", "what", "expected", "got")
        counts = ", ".join(f"{count} {verdict}" for verdict, count in self.counts.items())
        lines = [
            f"Selftest on {self.device.torch_name} ({self.device.name}), code {self.code}",
            "",
            table(rows, header=header),
            "",
            *(f"FAIL  {c.part}: {c.what}: {c.reason}" for c in self.checks if c.passed is False),
            f"{counts} in {self.wall_s:.0f} s",
        ]
        return "\n".join(lines)


def parts() -> tuple[Part, ...]:
    """Return every part, those of any machine first; what they import is loaded when they run."""
    return (
        Part(name="intervals", run=_intervals),
        Part(name="CPU clock", run=_cpu_clock),
        Part(name="CPU timer", run=_cpu_timer),
        *(
            Part(name=name, run=_on_gpu(function), missing=_no_gpu)
            for name, function in _GPU_PARTS.items()
        ),
    )


def run(
    device: Device,
    *,
    chosen: Sequence[Part] | None = None,
    on_part: Callable[[str], None] = lambda name: None,
) -> Result:
    """Run the parts and return all checks; never raises what a part raises.

    Args:
        device: where the GPU's parts run; on the CPU they are skipped.
        chosen: the parts; all if None.
        on_part: told the name of each part before it runs.
    """
    begin, ran_at = time.monotonic(), datetime.now(UTC).isoformat(timespec="seconds")
    checks: list[Check] = []
    for part in parts() if chosen is None else chosen:
        on_part(part.name)
        checks += _guarded(part, device)
    return Result(
        device=device,
        checks=tuple(checks),
        wall_s=time.monotonic() - begin,
        ran_at=ran_at,
        code=machine.code_version()["id"],
    )


def near(
    part: str,
    what: str,
    *,
    expected: float,
    got: float,
    tolerance: float,
    show: Callable[[float], str],
    unit: str,
    note: str = "",
) -> Check:
    """Check that a quantity is within a tolerance of what is known; NaN is not.

    Args:
        part: name of the part.
        what: what is measured.
        expected: what is known.
        got: what was measured.
        tolerance: the largest difference that passes, in the same unit.
        show: how the quantity is written.
        unit: suffix of the names in `values`.
        note: said after what was got.
    """
    passed = abs(got - expected) <= tolerance
    difference = f"{got / expected - 1:+.2%}" if expected else show(got - expected)
    return Check(
        part=part,
        what=what,
        expected=f"{show(expected)} ± {show(tolerance)}",
        got=f"{show(got)} ({difference})" + (f", {note}" if note else ""),
        passed=passed,
        reason=None if passed else f"off by {difference}, allowed {show(tolerance)}",
        values={f"expected_{unit}": expected, f"got_{unit}": got, f"tolerance_{unit}": tolerance},
    )


def between(
    part: str,
    what: str,
    *,
    low: float | None,
    high: float | None,
    got: float,
    show: Callable[[float], str],
    unit: str,
    note: str = "",
) -> Check:
    """Check that a quantity lies within bounds, ends included; None is no bound, NaN fails."""
    passed = (low is None or got >= low) and (high is None or got <= high)
    if low is not None and high is not None:
        expected = f"{show(low)} to {show(high)}"
    else:
        expected = f"at least {show(low)}" if low is not None else f"at most {show(high or 0.0)}"
    values = {f"low_{unit}": low, f"high_{unit}": high, f"got_{unit}": got}
    return Check(
        part=part,
        what=what,
        expected=expected,
        got=show(got) + (f", {note}" if note else ""),
        passed=passed,
        reason=None if passed else f"{show(got)} is not {expected}",
        values={name: value for name, value in values.items() if value is not None},
    )


def skipped(part: str, what: str, reason: str) -> Check:
    """Return a check that this machine cannot make."""
    return Check(part=part, what=what, expected="", got="", passed=None, reason=reason)


def time_tolerance_s(time_s: float) -> float:
    """Return how far a measured time may be from a known one: 1 %, or 1 us if that is more."""
    return max(RELATIVE * time_s, ABSOLUTE_S)


def percent(fraction: float) -> str:
    """Write a fraction as per cent."""
    return f"{fraction:.1%}"


def _guarded(part: Part, device: Device) -> list[Check]:
    made: list[Check] = []
    try:
        if (missing := part.missing(device)) is not None:
            return [skipped(part.name, part.name, missing)]
        made.extend(part.run(device))
    except Exception as error:  # whatever a part raises is its own failure
        lines = str(error).strip().splitlines()
        reason = f"{type(error).__name__}: {lines[0]}" if lines else type(error).__name__
        made.append(
            Check(
                part=part.name,
                what=f"after {len(made)} checks",
                expected="to end",
                got="raised",
                passed=False,
                reason=reason,
            )
        )
    return made


def _no_gpu(device: Device) -> str | None:
    if device.kind is DeviceKind.CUDA:
        return None
    return machine.gpus().problem or "the CPU was asked for: --device cuda shows this"


def _intervals(device: Device) -> Iterator[Check]:
    from mambench.harness.selftest import statistics as selftest_statistics

    return selftest_statistics.coverage()


def _cpu_clock(device: Device) -> Iterator[Check]:
    from mambench.harness.selftest import cpu as selftest_cpu

    return selftest_cpu.clock()


def _cpu_timer(device: Device) -> Iterator[Check]:
    from mambench.harness.selftest import cpu as selftest_cpu

    return selftest_cpu.timer()


_GPU_PARTS: Mapping[str, str] = {
    "GPU clock": "clock",
    "GPU timer": "timer",
    "two timers": "two_timers",
    "L2": "cold_and_hot",
    "counters": "traffic",
    "energy": "energy",
}


def _on_gpu(function: str) -> Callable[[Device], Iterator[Check]]:
    def run(device: Device) -> Iterator[Check]:
        from mambench.harness.selftest import gpu as selftest_gpu

        yield from selftest_gpu.on(device, function)

    return run
