"""Fold observations into one result per machine and case.

What a person reads (report, tables, verdicts) is computed from these results. The rules:

- Of the observations of one (case, measurement, round) the last line counts, and of several
  runs the one that was begun last; the others were retries.
- A time is the median over rounds of each round's median. Its interval is the distribution-free one
  of the median (order statistics): over rounds from five rounds on, else within a round. The second
  does not include what differs between processes, and says so by its name.
- A case is `ok` when all rounds are. Otherwise it has its worst round's outcome, and no values.
- A missing value is None with a reason in `missing`, never zero.
"""

import math
from collections import defaultdict
from collections.abc import Callable, Iterable, Mapping, Sequence
from itertools import chain
from statistics import median
from typing import Any, cast

from mambench.harness.analysis.intervals import ROUNDS_FOR_INTERVAL, Interval, median_interval
from mambench.harness.analysis.results import LAUNCH_GAPS, OWN_FIELDS, TAGS, Result
from mambench.harness.analysis.runs import mapping
from mambench.harness.records import Observation
from mambench.harness.spec import METRICS, Case, Outcome

_MODELLED = tuple(metric.tag for metric in METRICS if metric.modelled)
_MEASURED_BY = {metric.tag: metric.measured_by for metric in METRICS}
# What a case that ended `ok` has a value of, or a reason for having none.
_ASKED = tuple(t for t in TAGS if t not in _MODELLED and t not in ("time_s", "tokens_per_s"))
_UNMEASURED = dict.fromkeys(_ASKED, "not measured")
_HOLDS: Mapping[str, tuple[str, ...]] = {
    name: tuple(tag for tag in _ASKED if _MEASURED_BY[tag] == name)
    for name in dict.fromkeys(_MEASURED_BY.values())
}
# The first that occurs among a case's rounds is the case's outcome.
_SEVERITY = (
    Outcome.WRONG,
    Outcome.CRASHED,
    Outcome.ERROR,
    Outcome.OOM,
    Outcome.TIMEOUT,
    Outcome.UNSUPPORTED,
    Outcome.UNAVAILABLE,
    Outcome.SKIPPED,
    Outcome.OK,
)


def fold(observations: Iterable[tuple[str, Observation]], source: str) -> list[Result]:
    """Return one result per case of (run id, observation) pairs, in the order of their first."""
    # By the case itself: making its case_id is the dearer of the two by far.
    grouped: dict[Case, list[tuple[str, Observation]]] = defaultdict(list)
    for entry in observations:
        grouped[entry[1].case].append(entry)
    return [_fold_case(source, entries) for entries in grouped.values()]


def _fold_case(source: str, entries: Sequence[tuple[str, Observation]]) -> Result:
    # Later lines replace earlier ones, as `RunFolder.newest` has it.
    latest = {(o.measurement, o.round): o for _, o in entries}
    owner, newest = entries[-1]
    by_measurement: dict[str, list[Observation]] = defaultdict(list)
    for measurement, round in sorted(latest):
        by_measurement[measurement].append(latest[measurement, round])
    outcome, reason = _outcome(by_measurement)
    values: dict[str, Any]
    if outcome is Outcome.OK:
        values = _values(by_measurement)
    else:
        why = f"the case ended as {outcome}"
        values = {"missing": {t: why for t in TAGS if t not in _MODELLED}}
    return Result(
        source=source,
        run_id=owner,
        case=newest.case,
        outcome=outcome,
        reason=reason,
        measured_at=newest.started_at,
        details=_merged(by_measurement, lambda o: o.details),
        found={name: observed[-1].details for name, observed in by_measurement.items()},
        **_modelled(by_measurement),
        **values,
    )


def _outcome(by_measurement: Mapping[str, list[Observation]]) -> tuple[Outcome, str | None]:
    everything = list(chain.from_iterable(by_measurement.values()))
    if all(o.outcome is Outcome.OK for o in everything):
        return Outcome.OK, None
    # A wrong result found in any measurement condemns the case; other failures of an
    # additional measurement (memory) leave only that one's values missing.
    wrong = [o for o in everything if o.outcome is Outcome.WRONG]
    deciding = wrong or by_measurement.get("time") or everything
    worst = min(deciding, key=lambda o: _SEVERITY.index(o.outcome))
    if worst.outcome is Outcome.OK:
        return Outcome.OK, None
    reason = worst.reason or "no reason recorded"
    affected = sum(o.outcome is worst.outcome for o in deciding)
    if affected < len(deciding):
        reason = f"in {affected} of {len(deciding)} rounds: {reason}"
    return worst.outcome, reason


def _values(by_measurement: Mapping[str, list[Observation]]) -> dict[str, Any]:
    """Return measured values, the reasons of those that are missing, and the time's interval."""
    values: dict[str, Any] = {}
    others: dict[str, float] = {}
    missing = dict(_UNMEASURED)
    for tag, rounds in _recorded(by_measurement).items():
        if missing.pop(tag, None) is None:
            continue
        number = max(rounds) if "memory" in tag or len(rounds) == 1 else median(rounds)
        own = values if tag in OWN_FIELDS else others
        own[tag] = int(number) if "bytes" in tag else number
    for tag in (tag for name in by_measurement for tag in _HOLDS.get(name, ())):
        if tag in missing:
            missing[tag] = _why_none(tag, by_measurement)
    timed = by_measurement.get("time", [])
    medians = [m for m in (_round_median(o) for o in timed) if m is not None]
    flags = [flag for o in timed for flag in _suspicions(o)]
    if medians and len(medians) == len(timed):
        samples = tuple(chain.from_iterable(o.samples_s or () for o in timed))
        values |= {"time_s": median(medians), "samples_s": samples}
    else:
        missing |= dict.fromkeys(("time_s", "tokens_per_s"), _why_no_time(timed))
    converged = [c for c in (_converged(o) for o in timed) if c is not None]
    return values | {
        "values": others,
        "interval": _time_interval(timed, medians),
        "method": ", ".join(sorted({o.method for o in timed if o.method})) or None,
        "rounds": len(timed),
        "round_medians_s": tuple(medians),
        "converged": all(converged) if converged else None,
        "missing": missing,
        "flags": tuple(dict.fromkeys(flags)),
        "telemetry": _merged({"time": timed}, lambda o: mapping(o.details.get("telemetry"))),
    }


def _time_interval(timed: Sequence[Observation], medians: Sequence[float]) -> Interval | None:
    if len(medians) >= ROUNDS_FOR_INTERVAL:
        return median_interval(medians, "rounds")
    inner = [median_interval(o.samples_s or ()) for o in timed]
    known = [i for i in inner if i is not None]
    if not known or len(known) < len(inner) or len(medians) < len(timed):
        return None
    if len(known) == 1:
        return known[0]
    # Two to four rounds say little about their spread: show at least all of their intervals.
    return Interval(
        low=min(i.low for i in known),
        high=max(i.high for i in known),
        coverage=min(i.coverage for i in known),
        over="hull",
    )


def _round_median(observation: Observation) -> float | None:
    value = observation.values.get("time_s")
    if value is None and observation.samples_s:
        value = median(observation.samples_s)
    return float(value) if value is not None and math.isfinite(value) and value > 0 else None


def _suspicions(observation: Observation) -> list[str]:
    found: list[str] = []
    samples, value = observation.samples_s, observation.values.get("time_s")
    if samples and value and abs(median(samples) / value - 1) > 0.01:
        found.append("the recorded time is not the median of its samples")
    if _converged(observation) is False:
        stopped = mapping(observation.details.get("convergence")).get("stopped_by") or "its limit"
        found.append(f"stopped by {stopped} before its interval was as narrow as asked for")
    throttled = observation.details.get("throttled")
    if isinstance(throttled, list | tuple) and throttled:
        names = ", ".join(str(reason) for reason in cast("Sequence[Any]", throttled))
        found.append(f"the device was slowed down: {names}")
    if observation.method == "events" and observation.details.get("launch_gaps", True):
        reason = observation.details.get("not_captured") or "no graph could be captured"
        found.append(f"{LAUNCH_GAPS}: {reason}")
    return found


def _why_no_time(timed: Sequence[Observation]) -> str:
    if not timed:
        return "time was not measured"
    return "the record holds no time that is finite and above zero"


def _recorded(by_measurement: Mapping[str, list[Observation]]) -> dict[str, list[float]]:
    """Return the sound values of every round by tag, from whichever measurement holds them."""
    found: dict[str, list[float]] = defaultdict(list)
    for observations in by_measurement.values():
        for o in observations:
            if o.outcome is Outcome.OK:
                for tag, value in o.values.items():
                    if value is not None and math.isfinite(value):
                        found[tag].append(float(value))
    return found


def _why_none(tag: str, by_measurement: Mapping[str, list[Observation]]) -> str:
    measurement = _MEASURED_BY.get(tag, "")
    for o in by_measurement.get(measurement, ()):
        if o.outcome is not Outcome.OK:
            return f"{measurement} ended as {o.outcome}: {o.reason}"
        if why := _why_missing(o, tag):
            return why
    return "not measured"


def _why_missing(observation: Observation, tag: str) -> str | None:
    """Return why an observation lacks a value: the reason of all of them, or this one's own."""
    why = mapping(observation.details.get("missing_values")).get(tag)
    return str(why or observation.details.get("missing") or "") or None


def _modelled(by_measurement: Mapping[str, list[Observation]]) -> dict[str, int | None]:
    found: dict[str, int | None] = dict.fromkeys(_MODELLED)
    for observations in by_measurement.values():
        for observation in observations:
            for tag in _MODELLED:
                value = observation.values.get(tag)
                if value is not None:
                    found[tag] = int(value)
    return found


def _converged(observation: Observation) -> bool | None:
    details = observation.details
    value = details.get("converged")
    if value is None:
        value = mapping(details.get("convergence")).get("converged")
    return None if value is None else bool(value)


def _merged(
    by_measurement: Mapping[str, list[Observation]],
    pick: Callable[[Observation], Mapping[str, Any]],
) -> dict[str, Any]:
    merged: dict[str, Any] = {}
    for observations in by_measurement.values():
        for observation in observations:
            merged |= pick(observation)
    return merged
