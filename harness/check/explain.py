"""What else changed where something got slower: read from the observations of both sides."""

import math
import re
from collections.abc import Iterable, Mapping, Sequence
from statistics import median
from typing import Any, cast

from mambench.harness.check.rounds import Rounds
from mambench.harness.records import Observation
from mambench.harness.spec import Case

MAX_NOTES = 8
NOTABLE_FRAC = 0.02
NOTHING = "nothing else that is recorded (clocks, memory, kernels, configuration, libraries)"
# Details that explain a time, as parts of their dotted names.
_TELLING = re.compile(
    r"config|tuning|tuned|num_warps|num_stages|block|registers|spill|shared|kernel|launch|method"
    r"|executions_per_sample|threads|not_captured|binary|hash",
    re.IGNORECASE,
)
# Of these, what a tuner chooses.
_TUNING = re.compile(r"config|tuning|tuned|warps|stages|constants", re.IGNORECASE)
_NOISY = re.compile(r"duration|elapsed|time|_s$|samples|\bshare\b|frac|started|ended")
_CLOCKS = {
    "sm_clock_hz": "SM clock",
    "memory_clock_hz": "memory clock",
    "cpu_clock_hz": "CPU clock",
}
_TIMES = ("time_s", "call_time_s", "tokens_per_s", "first_call_s")


def differences(case: Case, base: Rounds, head: Rounds) -> tuple[str, ...]:
    """Return what differs between the sides beside the time, most telling first."""
    before, after = base.observations(case), head.observations(case)
    found = [
        *_throttling(before, after),
        *_clocks(before, after),
        *_values(before, after),
        *_details(before, after),
    ]
    if len(found) > MAX_NOTES:
        found = [
            *found[:MAX_NOTES],
            f"and {len(found) - MAX_NOTES} more differences in the records",
        ]
    return tuple(found)


def tuning(case: Case, base: Rounds, head: Rounds) -> tuple[str, ...]:
    """Return how the tuning configurations of the sides differ."""
    before, after = base.observations(case), head.observations(case)
    return tuple(line for line in _details(before, after) if _TUNING.search(line.split(":")[0]))


def environments(base: Mapping[str, Any], head: Mapping[str, Any]) -> tuple[str, ...]:
    """Return how the libraries, the driver and the like of two manifests differ."""
    old, new = (dict(_flat(manifest["environment"])) for manifest in (base, head))
    telling = ("libraries.", "python", "torch_cuda", "gpu.driver", "gpu.power_limit", "variables.")
    return tuple(
        f"{name.removeprefix('libraries.')}: {old.get(name)} -> {new.get(name)}"
        for name in sorted({*old, *new})
        if name.startswith(telling) and old.get(name) != new.get(name)
    )


def _throttling(before: Sequence[Observation], after: Sequence[Observation]) -> list[str]:
    counts = [
        [sum(bool(o.details.get("throttled")) for o in side), len(_timed(side))]
        for side in (before, after)
    ]
    if counts[0][0] == counts[1][0] == 0:
        return []
    return [
        f"throttled in {counts[0][0]} of {counts[0][1]} measurements of the base, "
        f"{counts[1][0]} of {counts[1][1]} of the candidate"
    ]


def _clocks(before: Sequence[Observation], after: Sequence[Observation]) -> list[str]:
    found: list[str] = []
    for key, name in _CLOCKS.items():
        old, new = _clock(before, key), _clock(after, key)
        if old and new and abs(new / old - 1) > NOTABLE_FRAC:
            found.append(f"{name}: {old / 1e6:.0f} -> {new / 1e6:.0f} MHz")
    return found


def _clock(side: Sequence[Observation], key: str) -> float | None:
    read: list[float] = []
    for observation in _timed(side):
        telemetry: dict[str, Any] = observation.details.get("telemetry") or {}
        snapshot: dict[str, Any] = telemetry.get("after") or {}
        if snapshot.get(key):
            read.append(snapshot[key])
    return median(read) if read else None


def _timed(side: Sequence[Observation]) -> list[Observation]:
    return [o for o in side if o.measurement in ("time", "call_time") and o.round > 0]


def _values(before: Sequence[Observation], after: Sequence[Observation]) -> list[str]:
    old, new = _medians(before), _medians(after)
    found: list[str] = []
    for tag in sorted({*old, *new} - set(_TIMES)):
        was, now = old.get(tag), new.get(tag)
        if was is None or now is None or abs(now - was) > NOTABLE_FRAC * max(abs(was), abs(now)):
            found.append(f"{tag}: {_number(was)} -> {_number(now)}")
    return found


def _medians(side: Sequence[Observation]) -> dict[str, float]:
    gathered: dict[str, list[float]] = {}
    for observation in side:
        for tag, value in observation.values.items():
            if value is not None and math.isfinite(value):
                gathered.setdefault(tag, []).append(value)
    return {tag: median(values) for tag, values in gathered.items()}


def _details(before: Sequence[Observation], after: Sequence[Observation]) -> list[str]:
    """Return details whose sets of values over all rounds have nothing in common."""
    old, new = _telling(before), _telling(after)
    return [
        f"{name}: {_some(old.get(name))} -> {_some(new.get(name))}"
        for name in sorted({*old, *new})
        if not old.get(name, set()) & new.get(name, set())
    ]


def _telling(side: Sequence[Observation]) -> dict[str, set[str]]:
    found: dict[str, set[str]] = {}
    for observation in side:
        flat = [*_flat(observation.details), ("method", observation.method)]
        for name, value in flat:
            if _TELLING.search(name) and not _NOISY.search(name) and "gate." not in name:
                found.setdefault(f"{observation.measurement}.{name}", set()).add(str(value))
    return found


def _flat(values: Mapping[str, Any], prefix: str = "") -> Iterable[tuple[str, Any]]:
    for name, value in values.items():
        if isinstance(value, Mapping):
            yield from _flat(cast("Mapping[str, Any]", value), f"{prefix}{name}.")
        elif isinstance(value, list) and _named(cast("list[Any]", value)):  # such as kernels
            for item in cast("list[Mapping[str, Any]]", value):
                rest = {key: each for key, each in item.items() if key != "name"}
                yield from _flat(rest, f"{prefix}{name}.{item['name']}.")
        else:
            yield f"{prefix}{name}", value


def _named(values: list[Any]) -> bool:
    return bool(values) and all(isinstance(v, Mapping) and "name" in v for v in values)


def _some(values: set[str] | None) -> str:
    if not values:
        return "none"
    text = " or ".join(sorted(values)[:2])
    return text if len(text) <= 80 else text[:79] + "…"


def _number(value: float | None) -> str:
    return "none" if value is None else f"{value:,.6g}"
