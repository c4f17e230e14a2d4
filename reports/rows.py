"""Plain typed rows, and how they group: slices (one set of charts) of series (one curve) of rows.

Everything that is drawn or tabulated starts here, so tests check these rows and not markup.
"""

from collections import Counter, defaultdict
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from typing import Any, NamedTuple, cast

from mambench.harness.analysis.results import Analysis, Result, values_of
from mambench.harness.analysis.runs import Run, Source, flatten
from mambench.harness.spec import METRICS, Family, Level, Outcome, Pass
from mambench.reports import units

_ORDER = {
    **{p.value: i for i, p in enumerate(Pass)},
    **{level.value: i for i, level in enumerate(Level)},
}


# Quotients of metrics that charts show: numerator and denominator.
DERIVED: Mapping[str, tuple[str, str]] = {
    "time_per_token_s": ("time_s", "tokens"),
    "call_ratio": ("call_time_s", "time_s"),
    "flop_rate": ("model_flop", "time_s"),
    "byte_rate": ("compulsory_bytes", "time_s"),
    "intensity_measured": ("model_flop", "dram_bytes"),
    "intensity_modelled": ("model_flop", "compulsory_bytes"),
}
_MODELLED = frozenset(metric.tag for metric in METRICS if metric.modelled)


class SliceKey(NamedTuple):
    """What the filters choose: within one slice every time is the same job at the same width."""

    source: str
    level: str
    pass_: str
    dtype: str
    batch: int
    width: int  # d_model at block level, else d_inner

    @property
    def text(self) -> str:
        """The key as it stands in the page's address."""
        return "~".join(str(part) for part in self)


class SeriesKey(NamedTuple):
    """What is one curve over seqlen or d_state (`d_state` None: over both)."""

    implementation: str
    variant: str
    family: str
    headdim: int | None
    ngroups: int | None
    gated: bool


@dataclass(frozen=True, kw_only=True, eq=False)
class Row:
    """One case on one machine. Quantities are SI with the unit in the name; None is missing."""

    index: int
    result: Result = field(repr=False)
    case_id: str  # identity of the question
    device: str
    commit: str
    slice: SliceKey
    series: SeriesKey
    label: str
    seqlen: int | None  # None: the case has no length (an SSM's decode)
    d_state: int | None
    outcome: Outcome
    reason: str | None
    time_s: float | None
    time_low_s: float | None
    time_high_s: float | None
    tokens_per_s: float | None
    peak_memory_bytes: int | None

    @property
    def ok(self) -> bool:
        """Whether it has a time that counts."""
        return self.outcome is Outcome.OK and self.time_s is not None

    @property
    def found(self) -> bool:
        """Whether it ended ok and something was measured of it, if not its time."""
        return self.outcome is Outcome.OK and any(
            self.result.value(metric.tag) is not None for metric in METRICS if not metric.modelled
        )

    def value(self, tag: str) -> float | None:
        """Return a metric or one of `DERIVED` by its tag, None where it is missing."""
        if tag in DERIVED:
            above, below = (self.value(name) for name in DERIVED[tag])
            return above / below if above is not None and below else None
        if tag == "tokens":
            return float(self.result.case.tokens)
        if self.outcome is not Outcome.OK and tag not in _MODELLED:
            return None
        return self.result.value(tag)

    def at(self, seqlen: int) -> "Row":
        """Return this row at a length: what holds whatever the length holds there too."""
        case = self.result.case
        placed = replace(case, problem=replace(case.problem, seqlen=seqlen))
        return replace(self, seqlen=seqlen, result=replace(self.result, case=placed))


@dataclass(frozen=True, kw_only=True)
class Series:
    """The rows of one curve, and how a person tells it from the others of its slice."""

    key: SeriesKey
    label: str
    rows: tuple[Row, ...]
    lengths: tuple[int, ...] = ()  # of the slice, over which a series without lengths is level

    @cached_property
    def is_attention(self) -> bool:
        """Whether this is the reference that has no d_state."""
        return self.key.family == Family.ATTENTION.value

    @cached_property
    def _by_state(self) -> Mapping[int | None, Sequence[Row]]:
        found: dict[int | None, list[Row]] = defaultdict(list)
        for row in self.rows:
            found[row.d_state].append(row)
        return dict(found)

    def at_state(self, d_state: int | None) -> tuple[Row, ...]:
        """Rows over seqlen at one d_state (attention: all).

        A row without a length stands at every length of the slice.
        """
        chosen = self.rows if self.is_attention else self._by_state.get(d_state, ())
        if self.is_level and self.lengths:
            chosen = [row.at(length) for row in chosen for length in self.lengths]
        return tuple(sorted(chosen, key=lambda row: row.seqlen or 0))

    @cached_property
    def is_level(self) -> bool:
        """Whether its cases have no length: what an SSM's decode costs does not depend on it."""
        return all(row.seqlen is None for row in self.rows)

    def at_length(self, seqlen: int) -> tuple[Row, ...]:
        """Rows over d_state at one seqlen."""
        chosen = [row for row in self.rows if row.seqlen == seqlen]
        return tuple(sorted(chosen, key=lambda row: row.d_state or 0))

    @cached_property
    def usual_state(self) -> int | None:
        """The d_state that was measured at most lengths, of several the smallest."""
        lengths: dict[int, set[int]] = defaultdict(set)
        for row in self.rows:
            if row.d_state is not None:
                lengths[row.d_state].add(row.seqlen or 0)
        if not lengths:
            return None
        return min(lengths, key=lambda state: (-len(lengths[state]), state))


@dataclass(frozen=True, kw_only=True)
class Slice:
    """All series of one device, level, pass, dtype, batch and width."""

    key: SliceKey
    device: str
    series: tuple[Series, ...]

    @property
    def rows(self) -> tuple[Row, ...]:
        """All rows, series by series."""
        return tuple(row for series in self.series for row in series.rows)

    @cached_property
    def timed(self) -> bool:
        """Whether some case has a time."""
        return any(row.ok for row in self.rows)

    @property
    def size_label(self) -> str:
        """Batch and width, in words."""
        name = "model width" if self.key.level == Level.BLOCK.value else "mixer width"
        return f"batch {self.key.batch}, {name} {units.count(self.key.width)}"

    @property
    def title(self) -> str:
        """One line that says which slice this is."""
        return f"{self.key.level}, {self.key.pass_}, {self.key.dtype}, {self.size_label}"

    @cached_property
    def ranks(self) -> Mapping[SeriesKey, tuple[int, int]]:
        """Place of a series among its implementation's families, and variants of its family."""
        found: dict[SeriesKey, tuple[int, int]] = {}
        for series in self.series:
            key = series.key
            own = [s.key for s in self.series if s.key.implementation == key.implementation]
            families = sorted({k.family for k in own})
            variants = sorted({k[1:2] + k[3:] for k in own if k.family == key.family}, key=str)
            found[key] = families.index(key.family), variants.index(key[1:2] + key[3:])
        return found

    @cached_property
    def states(self) -> tuple[int, ...]:
        """Values of d_state that some series has at two lengths or more."""
        found = Counter(
            (series.key, row.d_state)
            for series in self.series
            for row in series.rows
            if row.d_state is not None
        )
        return tuple(sorted({state for (_, state), n in found.items() if state and n > 1}))

    @property
    def state_lengths(self) -> tuple[int, ...]:
        """Lengths at which some series was measured with two values of d_state or more."""
        found: set[int] = set()
        for series in self.series:
            counts = Counter(row.seqlen for row in series.rows if row.d_state is not None)
            found |= {length for length, n in counts.items() if length is not None and n > 1}
        return tuple(sorted(found))


@dataclass(frozen=True, kw_only=True)
class Report:
    """Everything the page, the text and the exports are made from."""

    analysis: Analysis
    rows: tuple[Row, ...]
    slices: tuple[Slice, ...]  # the most informative first

    @property
    def sources(self) -> tuple[Source, ...]:
        """The machines."""
        return self.analysis.sources

    @cached_property
    def _columns(self) -> dict[str, list[float | None]]:
        return {}

    def column(self, tag: str) -> Sequence[float | None]:
        """Return `Row.value` of every row by its index: charts ask for each many times."""
        if tag not in self._columns:
            self._columns[tag] = self._made(tag)
        return self._columns[tag]

    def _made(self, tag: str) -> list[float | None]:
        if tag in DERIVED:
            above, below = (self.column(name) for name in DERIVED[tag])
            pairs = zip(above, below, strict=True)
            return [a / b if a is not None and b else None for a, b in pairs]
        results = [row.result for row in self.rows]
        if tag == "tokens":
            return [float(result.case.tokens) for result in results]
        values = values_of(results, tag)
        if tag in _MODELLED:
            return values
        pairs = zip(results, values, strict=True)
        return [value if result.outcome is Outcome.OK else None for result, value in pairs]

    @cached_property
    def implementations(self) -> tuple[str, ...]:
        """Names in alphabetical order."""
        return tuple(sorted({row.series.implementation for row in self.rows}))


def make(analysis: Analysis) -> Report:
    """Return rows, slices and series of an analysis; rows are numbered curve by curve."""
    keyed: dict[SliceKey, dict[SeriesKey, list[Result]]] = defaultdict(lambda: defaultdict(list))
    for result in analysis.results:
        keyed[_slice_key(result)][_series_key(result)].append(result)
    devices = {source.key: source.label for source in analysis.sources}
    commits = {run.run_id: run.code_version for run in analysis.runs}
    rows: list[Row] = []
    slices: list[Slice] = []
    for key in sorted(keyed, key=lambda k: _slice_order(k, list(devices))):
        labels = _labels(keyed[key])
        found: list[Series] = []
        for series_key in sorted(keyed[key], key=_series_order):
            made: list[Row] = []
            for result in sorted(keyed[key][series_key], key=_row_order):
                place = (len(rows) + len(made), key, series_key, labels[series_key])
                made.append(_row(result, place, devices[key.source], commits))
            rows += made
            found.append(
                Series(
                    key=series_key,
                    label=labels[series_key],
                    rows=tuple(made),
                    lengths=_lengths(keyed[key]),
                )
            )
        found.sort(key=_speed)
        slices.append(Slice(key=key, device=devices[key.source], series=tuple(found)))
    slices.sort(key=_information, reverse=True)  # stable: equals keep the order above
    return Report(analysis=analysis, rows=tuple(rows), slices=tuple(slices))


def environment(runs: Sequence[Run]) -> list[tuple[str, tuple[str, ...]]]:
    """Return (entry, value per run) of all runs' device, code and environment; absent is a dash."""
    columns = [_environment(run) for run in runs]
    keys = dict.fromkeys(key for column in columns for key in column)
    return [(key, tuple(c.get(key) or units.MISSING for c in columns)) for key in keys]


def _environment(run: Run) -> Mapping[str, str]:
    device = dict(run.device)
    capability = device.get("compute_capability")
    if isinstance(capability, list | tuple):
        parts = cast("Sequence[Any]", capability)
        device["compute_capability"] = ".".join(str(part) for part in parts)
    return {
        "run": run.run_id,
        "suite": run.suite,
        "started": run.created_at,
        "command": run.command,
        **_readable(flatten(device, "device.")),
        **flatten(run.code, "code."),
        **_readable(flatten(run.environment)),
        **_readable(flatten(run.settings, "settings.")),
    }


def _readable(values: Mapping[str, str]) -> dict[str, str]:
    return {key: units.entry(key, text) for key, text in values.items()}


def _row(
    result: Result,
    place: tuple[int, SliceKey, SeriesKey, str],
    device: str,
    commits: Mapping[str, str],
) -> Row:
    index, slice_key, series_key, label = place
    problem, interval = result.case.problem, result.interval
    return Row(
        index=index,
        result=result,
        case_id=result.case.case_id,
        device=device,
        commit=commits.get(result.run_id, ""),
        slice=slice_key,
        series=series_key,
        label=label,
        seqlen=problem.seqlen,
        d_state=problem.d_state,
        outcome=result.outcome,
        reason=result.reason,
        time_s=result.time_s,
        time_low_s=interval.low if interval else None,
        time_high_s=interval.high if interval else None,
        tokens_per_s=result.tokens_per_s,
        peak_memory_bytes=result.peak_memory_bytes,
    )


def _slice_key(result: Result) -> SliceKey:
    problem = result.case.problem
    width = problem.d_model if problem.level is Level.BLOCK else None
    return SliceKey(
        source=result.source,
        level=problem.level.value,
        pass_=result.case.pass_.value,
        dtype=result.case.dtype.value,
        batch=problem.batch,
        width=width or problem.d_inner,
    )


def _series_key(result: Result) -> SeriesKey:
    problem = result.case.problem
    return SeriesKey(
        implementation=result.case.implementation,
        variant=result.case.variant,
        family=problem.family.value,
        headdim=problem.headdim,
        ngroups=problem.ngroups,
        gated=problem.gated,
    )


def _labels(keys: Iterable[SeriesKey]) -> dict[SeriesKey, str]:
    """Name every series of a slice by its implementation and whatever tells it from the others."""
    keys = list(keys)
    labels: dict[SeriesKey, str] = {}
    for key in keys:
        same = [other for other in keys if other.implementation == key.implementation]
        parts = [key.implementation]
        if len({other.family for other in same}) > 1:
            parts.append(key.family)
        same = [other for other in same if other.family == key.family]
        if key.family == Family.ATTENTION.value or len({o.variant for o in same}) > 1:
            parts.append(key.variant)
        if len({other.headdim for other in same}) > 1:
            parts.append(f"headdim {key.headdim}")
        if len({other.ngroups for other in same}) > 1:
            parts.append(f"{key.ngroups} groups")
        if len({other.gated for other in same}) > 1:
            parts.append("gated" if key.gated else "not gated")
        labels[key] = " · ".join(parts)
    return labels


def _information(part: Slice) -> tuple[bool, int]:
    """Slices that hold both attention and SSMs come first, then those with more measured points."""
    measured = [series for series in part.series if any(row.ok for row in series.rows)]
    both = len({series.is_attention for series in measured}) == 2
    return both, sum(row.ok for series in measured for row in series.rows)


def _slice_order(key: SliceKey, sources: Sequence[str]) -> tuple[Any, ...]:
    order = (_ORDER.get(key.level, 9), _ORDER.get(key.pass_, 9))
    return (sources.index(key.source), *order, key.dtype, key.batch, key.width)


def _series_order(key: SeriesKey) -> tuple[Any, ...]:
    attention = key.family == Family.ATTENTION.value
    return (not attention, key.family, key.implementation, key.variant, str(key[3:]))


def _speed(series: Series) -> tuple[bool, int, float]:
    """Attention first, then what reaches the greatest length, then what is fastest there."""
    measured = [row for row in series.at_state(series.usual_state) if row.ok]
    if not measured:
        return not series.is_attention, 0, 0.0
    return not series.is_attention, -(measured[-1].seqlen or 0), measured[-1].time_s or 0.0


def _row_order(result: Result) -> tuple[int, int]:
    return result.case.problem.d_state or 0, result.case.problem.seqlen or 0


def _lengths(keyed: Mapping[SeriesKey, Sequence[Result]]) -> tuple[int, ...]:
    found = {result.case.problem.seqlen for results in keyed.values() for result in results}
    return tuple(sorted(length for length in found if length is not None))
