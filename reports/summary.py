"""What the rows say, in words and small tables: who is fastest where, and where curves cross.

Every sentence is computed; nothing here knows which implementation ought to win.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from itertools import groupby

from mambench.harness import curves
from mambench.harness.curves import Crossover, CrossoverKind, Exponent, Speedup
from mambench.harness.spec import Level, Outcome
from mambench.reports import contest, recorded, units
from mambench.reports.contest import LengthSummary
from mambench.reports.recorded import Recorded
from mambench.reports.rows import Report, Row, Series, Slice

CROSSED: Mapping[str, str] = {
    "peak_memory_bytes": "peak memory",
    "energy_j": "energy",
    "dram_bytes": "HBM traffic",
}


_EQUAL = 0.005  # shares of one that differ by less would read as 1.00


@dataclass(frozen=True, kw_only=True)
class SeriesSummary:
    """One curve over length: how it scales, and how it compares to attention."""

    series: Series
    d_state: int | None
    exponent: Exponent
    crossover: Crossover | None  # over attention; None for attention itself or without one
    speedup: Speedup | None  # over attention at `speedup_at`
    speedup_at: int | None
    memory_ratio: float | None  # attention's peak memory over this one's, at `speedup_at`
    others: Mapping[str, Crossover]  # over attention in further metrics, those that were recorded


@dataclass(frozen=True, kw_only=True)
class SliceSummary:
    """Everything a person wants to know about a slice without looking at its charts."""

    part: Slice
    lengths: tuple[LengthSummary, ...]
    series: tuple[SeriesSummary, ...]
    reference: Series | None  # the attention that the others are held against
    headline: str  # who is fastest where
    crossing: str  # where the best SSM overtakes attention, or that none does
    evidence: str  # the crossing's interval and the advantage at the longest common length
    weights: str | None  # block level: what stands against what
    recorded: Recorded | None  # what was measured where no case has a time

    @cached_property
    def further(self) -> tuple[str, ...]:
        """What else than time some series was held against the reference in, of `CROSSED`."""
        return tuple(tag for tag in CROSSED if any(tag in one.others for one in self.series))


@dataclass(frozen=True, kw_only=True)
class Failure:
    """Cases of one series that ended alike."""

    part: Slice
    label: str
    outcome: Outcome
    reason: str
    seqlens: tuple[int | None, ...]
    case_ids: tuple[str, ...]


def summarise(report: Report) -> tuple[SliceSummary, ...]:
    """Return a summary of every slice."""
    return tuple(summarise_slice(part) for part in report.slices)


def summarise_slice(part: Slice) -> SliceSummary:
    """Return what one slice says."""
    reference = _reference(part)
    lengths = contest.by_length(part, reference)
    rival = _Rival(reference) if reference is not None else None
    series = tuple(_series(s, rival) for s in part.series)
    crossing, evidence = _crossing(series, reference)
    headline = contest.headline(lengths)
    if other := recorded.of(part):
        crossing, headline = other.headline, ""
    elif reference is None:  # without a rival the best news is who is fastest
        said, close, where = headline.partition(contest.CLOSE)
        crossing, headline = said, f"{crossing}{close}{where}"
    return SliceSummary(
        part=part,
        lengths=lengths,
        series=series,
        reference=reference,
        headline=headline,
        crossing=crossing,
        evidence=evidence,
        weights=_weights(part),
        recorded=other,
    )


def failures(report: Report) -> tuple[Failure, ...]:
    """Return all cases that did not end `ok`, those of one series, outcome and reason together."""
    found: list[Failure] = []
    for part in report.slices:
        bad = [row for row in part.rows if row.outcome is not Outcome.OK]
        for (label, outcome, reason), rows in groupby(
            sorted(bad, key=_failure_key), key=_failure_key
        ):
            members = list(rows)
            found.append(
                Failure(
                    part=part,
                    label=label,
                    outcome=Outcome(outcome),
                    reason=reason,
                    seqlens=tuple(sorted({r.seqlen for r in members}, key=contest.ascending)),
                    case_ids=tuple(row.case_id for row in members),
                )
            )
    return tuple(found)


def crossing_text(found: Crossover | None, ahead: str = "faster") -> str:
    """Return a crossover for a table's cell; `ahead` says what it means to have less."""
    if found is None:
        return units.MISSING
    if found.kind is CrossoverKind.AT and found.seqlen:
        return _length(found.seqlen)
    return {
        CrossoverKind.CHALLENGER_FASTER: f"none: {ahead} throughout",
        CrossoverKind.INCUMBENT_FASTER: "none in range",
        CrossoverKind.NO_OVERLAP: "too few lengths in common",
        CrossoverKind.SEVERAL: "crosses at "
        + ", ".join(units.about(length) for length in found.crossings),
    }[found.kind]


def crossing_note(found: Crossover | None) -> str:
    """Return the interval of a crossover, or the range in which there is none."""
    if found is None or found.range is None:
        return ""
    if found.kind is CrossoverKind.AT:
        said = _interval_text(found).strip().strip("()")
        return said or (f"between {_both(*found.bracket)}" if found.bracket else "")
    return f"L = {contest.span(*found.range)}"


def factor_text(value: float | None) -> str:
    """Return a speed-up, and below 1 how many times slower."""
    if value is None:
        return units.MISSING
    return units.ratio(value) if value >= 1 else f"{units.ratio(1 / value)} slower"


def saving_text(value: float | None) -> str:
    """Return how many times less or more memory."""
    if value is None:
        return units.MISSING
    return f"{units.ratio(value)} less" if value >= 1 else f"{units.ratio(1 / value)} more"


def exponent_text(found: Exponent) -> str:
    """Return a fitted exponent for a table's cell, such as `1.02 ± 0.03`."""
    if found.value is None or found.low is None:
        return units.MISSING
    return f"{found.value:.2f} ± {found.value - found.low:.2f}"


def _reference(part: Slice) -> Series | None:
    """The attention series that reaches furthest, of several the fastest there."""
    candidates: list[tuple[int, float, Series]] = []
    for series in part.series:
        measured = [row for row in series.rows if row.ok]
        if series.is_attention and measured:
            last = max(measured, key=lambda row: row.seqlen or 0)
            candidates.append((last.seqlen or 0, -(last.time_s or 0), series))
    return max(candidates, key=lambda c: c[:2])[2] if candidates else None


class _Rival:
    """The series that the others of its slice are held against."""

    def __init__(self, series: Series) -> None:
        self.rows = {row.seqlen: row for row in series.at_state(None) if row.ok}
        self._curves: dict[str, tuple[curves.Point, ...]] = {}

    def curve(self, tag: str = "time_s") -> tuple[curves.Point, ...]:
        """Return its points in one metric, made once."""
        if tag not in self._curves:
            found = [row.result for row in self.rows.values()]
            self._curves[tag] = curves.curve(found, tag)
        return self._curves[tag]


def _series(series: Series, rival: _Rival | None) -> SeriesSummary:
    state = series.usual_state
    rows = series.at_state(state)
    points = curves.curve([row.result for row in rows])
    found = ratio = memory = at = None
    others: dict[str, Crossover] = {}
    if rival is not None and not series.is_attention:
        found = curves.crossover(points, rival.curve())
        others = _others(rows, rival)
        common = [row for row in rows if row.ok and row.seqlen in rival.rows]
        if common:
            at = common[-1].seqlen
            ratio = curves.speedup(common[-1].result, rival.rows[at].result)
            memory = _memory_ratio(rival.rows[at], common[-1])
    return SeriesSummary(
        series=series,
        d_state=state,
        exponent=curves.exponent(points),
        crossover=found,
        speedup=ratio,
        speedup_at=at,
        memory_ratio=memory,
        others=others,
    )


def _others(rows: Sequence[Row], rival: _Rival) -> dict[str, Crossover]:
    """Crossovers in what has one value per case, hence no interval but the lengths around."""
    measured = [row.result for row in rows if row.ok]
    found: dict[str, Crossover] = {}
    for tag in CROSSED:
        other = rival.curve(tag)
        if len(other) > 1 and len(ours := curves.curve(measured, tag)) > 1:
            values = {point.seqlen: point.value for point in other}
            both = [p.value / values[p.seqlen] for p in ours if p.seqlen in values]
            if not both or any(abs(ratio - 1) >= _EQUAL for ratio in both):
                found[tag] = curves.crossover(ours, other)
    return found


def _memory_ratio(theirs: Row, ours: Row) -> float | None:
    if not theirs.peak_memory_bytes or not ours.peak_memory_bytes:
        return None
    return theirs.peak_memory_bytes / ours.peak_memory_bytes


def _crossing(series: Sequence[SeriesSummary], reference: Series | None) -> tuple[str, str]:
    """Say how the SSM that is fastest at the longest common length stands against attention."""
    rivals = [s for s in series if s.crossover is not None and s.speedup is not None]
    if reference is None:
        return "No attention was measured here, so no crossover is given.", ""
    if not rivals:
        return f"No state-space model was measured at a length of {reference.label}.", ""
    best = max(rivals, key=lambda s: (s.speedup_at or 0, s.speedup.ratio if s.speedup else 0))
    found = best.crossover
    assert found is not None
    own = next((s for s in series if s.series is reference), None)
    said = f"{_found_by(found)}{_advantage(best)}{_why(best, own)}{_further(best, reference.label)}"
    return _verdict(best, found, reference.label), said.strip()


def _further(best: SeriesSummary, attention: str) -> str:
    """Say where the same one needs less of what else was measured."""
    name = best.series.label
    parts = [
        f" {CROSSED[tag][0].upper()}{CROSSED[tag][1:]}: {_less(name, attention, found)}."
        for tag, found in best.others.items()
    ]
    return "".join(parts)


def _less(name: str, attention: str, found: Crossover) -> str:
    if found.kind is CrossoverKind.AT and found.seqlen:
        note = f" ({text})" if (text := crossing_note(found)) else ""
        return f"{name} takes less from {_length(found.seqlen)} on{note}"
    if found.kind is CrossoverKind.SEVERAL:
        lengths = " and ".join(_length(length) for length in found.crossings)
        return f"neither takes less throughout; they cross at {lengths}"
    if found.kind is CrossoverKind.NO_OVERLAP or found.range is None:
        return "too few lengths in common"
    less = name if found.kind is CrossoverKind.CHALLENGER_FASTER else attention
    return f"{less} takes less at every length from {contest.span(*found.range)}"


def _why(best: SeriesSummary, reference: SeriesSummary | None) -> str:
    """Say how both grow, if a straight line was fitted to both."""
    if reference is None or best.exponent.value is None or reference.exponent.value is None:
        return ""
    ours, theirs = (f"L^{one.exponent.value:.2f}" for one in (best, reference))
    return (
        f" Why: at long lengths the time of {reference.series.label} grows as {theirs}, "
        f"that of {best.series.label} as {ours}."
    )


def _verdict(best: SeriesSummary, found: Crossover, attention: str) -> str:
    name = best.series.label
    if found.kind is CrossoverKind.AT and found.seqlen:
        return f"{name} overtakes {attention} at {_length(found.seqlen)}."
    return {
        CrossoverKind.CHALLENGER_FASTER: f"{name} is faster than {attention} {_where(found)}.",
        CrossoverKind.INCUMBENT_FASTER: f"{attention} is faster than {name} {_where(found)}.",
        CrossoverKind.SEVERAL: f"{name} and {attention} cross at "
        + " and ".join(_length(length) for length in found.crossings)
        + ".",
        CrossoverKind.NO_OVERLAP: f"{name} and {attention} share too few lengths for a crossover.",
    }[found.kind]


def _where(found: Crossover) -> str:
    """Say over which lengths both were measured."""
    return f"from L = {contest.span(*found.range)}" if found.range else "at every length"


def _found_by(found: Crossover) -> str:
    """The crossover's interval, and the measured lengths between which it was interpolated."""
    none = (CrossoverKind.CHALLENGER_FASTER, CrossoverKind.INCUMBENT_FASTER)
    if found.kind in none and found.range is not None:
        return "Crossover: none in the range that both were measured in."
    if found.kind is not CrossoverKind.AT:
        return ""
    parts = [_interval_text(found).strip().strip("()")]
    if found.bracket is not None:
        parts.append(f"interpolated between {_both(*found.bracket)}")
    text = "; ".join(part for part in parts if part)
    return f"Crossover: {text}." if text else ""


def _advantage(best: SeriesSummary) -> str:
    if best.speedup is None or best.speedup_at is None:
        return ""
    ratio = best.speedup.ratio
    word = "faster" if ratio >= 1 else "slower"
    text = f" At L = {units.count(best.speedup_at)} {_with_state(best)} is "
    text += f"{units.ratio(max(ratio, 1 / ratio))} {word}"
    if best.speedup.low is not None and not best.speedup.significant:
        text += " (not significant)"
    if best.memory_ratio is not None:
        text += f", its peak memory {_against(best.memory_ratio)}"
    return text + "."


def _against(share: float) -> str:
    if abs(share - 1) < _EQUAL:
        return "the same"
    return f"{units.ratio(max(share, 1 / share))} {'lower' if share >= 1 else 'higher'}"


def _weights(part: Slice) -> str | None:
    """Say what one pass of a block slice consists of, from the records' weight counts."""
    if part.key.level != Level.BLOCK.value:
        return None
    said: dict[str, None] = {}
    for series in part.series:
        row = next((r for r in series.rows if r.result.weight_count), None)
        if row is None or not row.result.weight_count:
            continue
        blocks = row.result.case.problem.nblocks or 1
        what = "one transformer layer" if series.is_attention else f"{blocks} Mamba blocks"
        said[f"{series.label}: {what}, {units.si(row.result.weight_count, '')} weights"] = None
    return "; ".join(said) + "." if said else None


def _with_state(summary: SeriesSummary) -> str:
    if summary.d_state is None:
        return summary.series.label
    return f"{summary.series.label} (d_state {summary.d_state})"


def _interval_text(found: Crossover) -> str:
    if found.interval is None:
        return ""
    low, high = found.interval
    if low == 0 or high == float("inf"):
        return " (its interval leaves the measured range)"
    return f" (95 % interval {units.about(low)} to {units.about(high)})"


def _length(seqlen: float) -> str:
    return f"L\u00a0≈\u00a0{units.about(seqlen)}"  # not broken over lines


def _both(low: int, high: int) -> str:
    return units.count(low) if low == high else f"{units.count(low)} and {units.count(high)}"


def _failure_key(row: Row) -> tuple[str, str, str]:
    return row.label, row.outcome.value, row.reason or "no reason recorded"
