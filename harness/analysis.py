"""Fold observations into one result per machine and case. Imports neither torch nor triton.

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
import shlex
from collections import defaultdict
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field, fields, replace
from enum import Enum
from functools import cache
from itertools import chain
from pathlib import Path
from statistics import median
from typing import Any, TypeVar, cast

from mambench.harness.records import Observation, written
from mambench.harness.spec import METRICS, Case, DeviceKind, Outcome, digest

ROUNDS_FOR_INTERVAL = 5
LAUNCH_GAPS = "timed by eager calls, gaps between launches included"  # begins such a flag
QUANTILES = (0.0, 0.05, 0.25, 0.5, 0.75, 0.95, 1.0)
_TAGS = tuple(metric.tag for metric in METRICS)
_MODELLED = tuple(metric.tag for metric in METRICS if metric.modelled)
_MEASURED_BY = {metric.tag: metric.measured_by for metric in METRICS}
# What a case that ended `ok` has a value of, or a reason for having none.
_ASKED = tuple(t for t in _TAGS if t not in _MODELLED and t not in ("time_s", "tokens_per_s"))
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
# Entries of a manifest's environment that keep results apart when they differ, as dotted prefixes.
_IDENTITY = ("python", "libraries.", "torch_cuda", "gpu.uuid", "gpu.driver", "variables.")


@dataclass(frozen=True, kw_only=True)
class Interval:
    """A confidence interval of a median, and what it is over: "rounds", "samples" or "hull"."""

    low: float
    high: float
    coverage: float  # of the median, by order statistics; "hull": of each round's own
    over: str


@dataclass(frozen=True, kw_only=True)
class Run:
    """The part of a run folder's manifest that reports show."""

    run_id: str
    path: Path | None
    source: str  # key of the Source that it belongs to
    created_at: str
    suite: str
    command: str
    settings: Mapping[str, Any]
    environment: Mapping[str, Any]
    code: Mapping[str, Any]
    device: Mapping[str, Any]
    notes: tuple[str, ...] = ()
    plugins: tuple[str, ...] = ()
    ceilings: Mapping[str, Any] = field(default_factory=dict[str, Any])  # measured, by name

    @property
    def code_version(self) -> str:
        """Commit or version, with a mark where the working tree differed from it."""
        return code_version(self.code)


@dataclass(frozen=True, kw_only=True)
class Source:
    """Runs that are pooled: of one device, one software stack and one code version."""

    key: str
    label: str
    kind: DeviceKind
    device_name: str
    runs: tuple[Run, ...]


@dataclass(frozen=True, kw_only=True)
class Result:
    """The fold of one case's observations on one source."""

    source: str
    run_id: str  # of the newest observation
    case: Case
    outcome: Outcome
    reason: str | None = None
    time_s: float | None = None
    interval: Interval | None = None
    method: str | None = None
    rounds: int = 0
    samples_s: tuple[float, ...] = field(default=(), repr=False)  # pooled over rounds
    round_medians_s: tuple[float, ...] = ()
    converged: bool | None = None
    call_time_s: float | None = None
    first_call_s: float | None = None
    peak_memory_bytes: int | None = None
    extra_memory_bytes: int | None = None
    model_flop: int | None = None
    compulsory_bytes: int | None = None
    weight_count: int | None = None
    state_bytes: int | None = None
    values: Mapping[str, float] = field(
        default_factory=dict[str, float]
    )  # by tag, of metrics that have no field of their own
    missing: Mapping[str, str] = field(
        default_factory=dict[str, str]
    )  # metric tag -> why it is None
    flags: tuple[str, ...] = ()  # what a reader should distrust
    telemetry: Mapping[str, Any] = field(default_factory=dict[str, Any])
    details: Mapping[str, Any] = field(default_factory=dict[str, Any])
    found: Mapping[str, Mapping[str, Any]] = field(
        default_factory=dict[str, Mapping[str, Any]], repr=False
    )  # newest details by measurement: kernels, traces, configurations
    measured_at: str | None = None

    @property
    def tokens_per_s(self) -> float | None:
        """Tokens of one pass over its time."""
        return None if self.time_s is None else self.case.tokens / self.time_s

    def value(self, tag: str) -> float | None:
        """Return a metric by its tag, None where it is missing."""
        return self.values.get(tag) if tag not in _OWN_FIELDS else getattr(self, tag)

    @property
    def launch_gaps(self) -> bool:
        """Whether the time holds gaps between launches: it is more than what the GPU worked."""
        return any(flag.startswith(LAUNCH_GAPS) for flag in self.flags)

    @property
    def flop_per_s(self) -> float | None:
        """Modelled FLOP over measured time."""
        return _ratio(self.model_flop, self.time_s)

    @property
    def modelled_bytes_per_s(self) -> float | None:
        """Compulsory (modelled) bytes over measured time; not a measurement of traffic."""
        return _ratio(self.compulsory_bytes, self.time_s)

    @property
    def quantiles_s(self) -> tuple[float, ...] | None:
        """Quantiles of the pooled samples at `QUANTILES`."""
        if not self.samples_s:
            return None
        ordered = sorted(self.samples_s)
        return tuple(quantile(ordered, at) for at in QUANTILES)


_OWN_FIELDS = {f.name for f in fields(Result)} | {"tokens_per_s"}


@dataclass(frozen=True, kw_only=True)
class Analysis:
    """Everything a report is made from."""

    sources: tuple[Source, ...]
    results: tuple[Result, ...]

    @property
    def runs(self) -> tuple[Run, ...]:
        """All runs, source by source."""
        return tuple(run for source in self.sources for run in source.runs)


def load(run_folders: Sequence[Path]) -> Analysis:
    """Read run folders and fold them, large ones in two processes.

    Raises RunFolderError where one is not a sound run folder.
    """
    from mambench.harness import loading  # which folds by what is below

    return cast("Analysis", loading.load(run_folders))


Content = TypeVar("Content")
Loaded = tuple[Run, Content, Mapping[str, Any]]  # a run, what its folder holds, and its manifest


def combine(loaded: Sequence[Loaded[Sequence[Observation]]]) -> Analysis:
    """Fold the observations of several runs; runs of one source are pooled."""
    by_source = pooled(loaded)
    folded = {
        key: fold([(run.run_id, o) for run, observations, _ in entries for o in observations], key)
        for key, entries in by_source.items()
    }
    return assembled(by_source, folded)


def pooled(loaded: Sequence[Loaded[Content]]) -> dict[str, list[Loaded[Content]]]:
    """Return the runs by source, in the order that they were begun in, each once."""
    by_source: dict[str, list[Loaded[Content]]] = {}
    seen: set[str] = set()
    for entry in sorted(loaded, key=lambda entry: (entry[0].created_at, entry[0].run_id)):
        if entry[0].run_id not in seen:  # a folder that was named twice
            seen.add(entry[0].run_id)
            by_source.setdefault(entry[0].source, []).append(entry)
    return by_source


def assembled(
    by_source: Mapping[str, Sequence[Loaded[Any]]], folded: Mapping[str, Sequence[Result]]
) -> Analysis:
    """Return the analysis of each source's folded results and of what was planned beside them."""
    results: list[Result] = []
    for key, entries in by_source.items():
        planned: list[Mapping[str, Any]] = []
        for _, _, manifest in entries:
            planned += manifest.get("plan") or []
        results += folded[key]
        if planned:
            known = {result.case for result in folded[key]}
            results += _unmeasured(planned, known, key, entries[-1][0].run_id)
    sources = [
        _make_source(key, [run for run, _, _ in entries]) for key, entries in by_source.items()
    ]
    return Analysis(sources=_distinct_labels(sources), results=tuple(results))


def make_run(
    manifest: Mapping[str, Any], path: Path | None = None, *, notes: Sequence[str] = ()
) -> Run:
    """Take from a manifest what reports show; absent entries are empty."""
    command = manifest.get("command") or ""
    code = _mapping(manifest.get("code"))
    environment = _mapping(manifest.get("environment"))
    device = _mapping(manifest.get("device"))
    return Run(
        run_id=str(manifest.get("run_id") or (path.name if path else "run")),
        path=path,
        source=_source_key(device, environment, code),
        created_at=str(manifest.get("created_at") or ""),
        suite=str(manifest.get("suite") or ""),
        command=command if isinstance(command, str) else shlex.join(str(c) for c in command),
        settings=_mapping(manifest.get("settings")),
        environment=environment,
        code=code,
        device=device,
        notes=(*(str(note) for note in manifest.get("notes") or ()), *notes),
        plugins=tuple(str(plugin) for plugin in manifest.get("plugins") or ()),
        ceilings=_mapping(_mapping(manifest.get("ceilings")).get("ceilings")),
    )


def code_version(code: Mapping[str, Any]) -> str:
    """Return the commit (ten digits) that a manifest's `code` names, else the package's version.

    Uncommitted changes show as `+` and the start of their digest.
    """
    text = str(code.get("commit") or code.get("version") or "unknown")[:10]
    if not code.get("dirty"):
        return text
    return f"{text}+{str(code.get('diff_digest') or 'changes')[:7]}"


def flatten(values: Mapping[str, Any], prefix: str = "") -> dict[str, str]:
    """Return nested manifest entries as dotted keys and texts, for tables of environments."""
    flat: dict[str, str] = {}
    for key, value in values.items():
        if isinstance(value, Mapping):
            flat |= flatten(_mapping(value), f"{prefix}{key}.")
        elif isinstance(value, list | tuple):
            flat[f"{prefix}{key}"] = ", ".join(str(v) for v in cast("Sequence[Any]", value))
        else:
            flat[f"{prefix}{key}"] = "" if value is None else str(value)
    return flat


def fold(observations: Iterable[tuple[str, Observation]], source: str) -> list[Result]:
    """Return one result per case of (run id, observation) pairs, in the order of their first."""
    # By the case itself: making its case_id is the dearer of the two by far.
    grouped: dict[Case, list[tuple[str, Observation]]] = defaultdict(list)
    for entry in observations:
        grouped[entry[1].case].append(entry)
    return [_fold_case(source, entries) for entries in grouped.values()]


def median_interval(
    values: Sequence[float], over: str = "samples", level: float = 0.95
) -> Interval | None:
    """Return the distribution-free interval of the median, or None for fewer than five values.

    The narrowest pair of order statistics, symmetric in rank, that covers the median with at least
    `level`; with five values the extremes, which cover 93.75 %.
    """
    n = len(values)
    if n < 5:
        return None
    ordered = sorted(values)
    low_rank, coverage = _ranks(n, level)
    return Interval(
        low=ordered[low_rank], high=ordered[n - 1 - low_rank], coverage=coverage, over=over
    )


def frame(analysis: Analysis) -> Any:
    """Return the results as a pandas DataFrame, one row per result, quantities in SI."""
    import pandas as pd  # pyright: ignore[reportMissingTypeStubs]

    labels = {source.key: source.label for source in analysis.sources}
    return pd.DataFrame(columns(analysis.results, labels))


def record(result: Result, labels: Mapping[str, str] | None = None) -> dict[str, Any]:
    """Return a result as flat plain values: what CSV and JSON exports hold."""
    return {name: values[0] for name, values in columns([result], labels).items()}


def columns(
    results: Sequence[Result], labels: Mapping[str, str] | None = None
) -> dict[str, list[Any]]:
    """Return results as flat plain values, column by column: as records, but much sooner."""
    names = labels or {}
    cases = [result.case for result in results]
    problems = [vars(case.problem) for case in cases]
    intervals = [result.interval for result in results]
    return {
        "device": [names.get(result.source, result.source) for result in results],
        "run_id": [result.run_id for result in results],
        "case_id": [case.case_id for case in cases],
        "implementation": [case.implementation for case in cases],
        "variant": [case.variant for case in cases],
        **{
            name: [_plain(problem[name]) for problem in problems]
            for name in (problems[0] if problems else ())
        },
        "pass": [_plain(case.pass_) for case in cases],
        "dtype": [_plain(case.dtype) for case in cases],
        "outcome": [_plain(result.outcome) for result in results],
        "reason": [result.reason for result in results],
        "time_s": [result.time_s for result in results],
        "time_low_s": [interval and interval.low for interval in intervals],
        "time_high_s": [interval and interval.high for interval in intervals],
        "interval_coverage": [interval and interval.coverage for interval in intervals],
        "interval_over": [interval and interval.over for interval in intervals],
        "method": [result.method for result in results],
        "rounds": [result.rounds for result in results],
        "samples": [len(result.samples_s) for result in results],
        "converged": [result.converged for result in results],
        **{tag: values_of(results, tag) for tag in _TAGS if tag != "time_s"},
        "model_flop_per_s": [result.flop_per_s for result in results],
        "modelled_bytes_per_s": [result.modelled_bytes_per_s for result in results],
        "measured_at": [result.measured_at for result in results],
    }


def values_of(results: Sequence[Result], tag: str) -> list[float | None]:
    """Return `Result.value` of every result."""
    if tag in _OWN_FIELDS:
        return [getattr(result, tag) for result in results]
    return [result.values.get(tag) for result in results]


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
        values = {"missing": {t: why for t in _TAGS if t not in _MODELLED}}
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
        own = values if tag in _OWN_FIELDS else others
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
        "telemetry": _merged({"time": timed}, lambda o: _mapping(o.details.get("telemetry"))),
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
        stopped = _mapping(observation.details.get("convergence")).get("stopped_by") or "its limit"
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
    why = _mapping(observation.details.get("missing_values")).get(tag)
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
        value = _mapping(details.get("convergence")).get("converged")
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


def _unmeasured(
    planned: Iterable[Mapping[str, Any]], known: set[Case], source: str, run_id: str
) -> list[Result]:
    """Planned cases that have no observation: outcomes known beforehand, or not run yet."""
    results: list[Result] = []
    done = {written(case.to_dict()) for case in known}
    for entry in planned:
        asked = entry.get("case") or entry
        if written(asked) in done:  # most are, and to make a case of each would be dear
            continue
        case = Case.from_dict(asked)
        if case in known:
            continue
        known.add(case)
        outcome = Outcome(entry.get("outcome") or Outcome.SKIPPED)
        reason = entry.get("reason") or "planned, but not run: the run was interrupted"
        missing = dict.fromkeys(_TAGS, "the case was not run")
        results.append(
            Result(
                source=source,
                run_id=run_id,
                case=case,
                outcome=outcome,
                reason=reason,
                missing=missing,
            )
        )
    return results


@cache
def _ranks(n: int, level: float) -> tuple[int, float]:
    """Index of the lower order statistic, and what it and its mirror image cover."""
    best = (0, 1 - 2 * 0.5**n)
    below = 0.0
    for rank in range(n // 2):
        below += math.exp(_log_choose(n, rank) - n * math.log(2))
        coverage = 1 - 2 * below
        if coverage < level:
            break
        best = (rank, coverage)
    return best


def _log_choose(n: int, k: int) -> float:
    return math.lgamma(n + 1) - math.lgamma(k + 1) - math.lgamma(n - k + 1)


def _source_key(
    device: Mapping[str, Any], environment: Mapping[str, Any], code: Mapping[str, Any]
) -> str:
    """Identity of what must be equal for two runs' results to stand in one curve."""
    versions = {
        key: value for key, value in flatten(environment).items() if key.startswith(_IDENTITY)
    }
    name = [device.get(key) for key in ("kind", "name", "compute_capability")]
    return digest([name, versions, code_version(code)])


def _make_source(key: str, runs: Sequence[Run]) -> Source:
    device = runs[-1].device
    name = str(device.get("name") or "unknown device")
    kind = DeviceKind(device.get("kind") or DeviceKind.CPU)
    return Source(key=key, label=name, kind=kind, device_name=name, runs=tuple(runs))


def _distinct_labels(sources: Sequence[Source]) -> tuple[Source, ...]:
    """Where devices have one name add the code version, and if need be the newest run."""
    labelled = list(sources)
    for attribute in ("code_version", "run_id"):
        names = [source.label for source in labelled]
        labelled = [
            replace(s, label=f"{s.label} · {getattr(s.runs[-1], attribute)}")
            if names.count(s.label) > 1
            else s
            for s in labelled
        ]
    return tuple(labelled)


def _mapping(value: Any) -> Mapping[str, Any]:
    # What was read from JSON is a dict, and to ask for an abstract class is dear.
    known = type(value) is dict or isinstance(value, Mapping)
    return cast("Mapping[str, Any]", value) if known else {}


@cache
def _value(member: Enum) -> Any:
    return member.value


def _plain(value: Any) -> Any:
    # To ask a member for its value is ten times as dear as to look it up.
    return _value(value) if isinstance(value, Enum) else value


def quantile(ordered: Any, at: float) -> Any:
    """Interpolate linearly between order statistics, as numpy does by default.

    Args:
        ordered: numbers, or arrays of them, in ascending order.
        at: from 0 to 1.
    """
    place = at * (len(ordered) - 1)
    below = min(int(place), len(ordered) - 2) if len(ordered) > 1 else 0
    above = min(below + 1, len(ordered) - 1)
    return ordered[below] + (place - below) * (ordered[above] - ordered[below])


def _ratio(numerator: float | None, denominator: float | None) -> float | None:
    return None if numerator is None or denominator is None else numerator / denominator
