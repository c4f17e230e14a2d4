"""Ours against the best peer, question by question, as typed rows and as a Markdown table.

A question is a problem, pass and dtype that one of ours and a peer were both asked on one machine.
Best is the one with the least of the metric among those that ended ok. The ratio is the peer's
value over ours, so above one ours is ahead. Its interval takes the ends of both intervals that lie
farthest apart. The table names no winner where it contains one, nor where it comes as near to one
as two processes differ anyhow, unless both were measured in enough processes to know. Nor does it
where one of the two times holds gaps between launches, because no graph could be captured, and the
other does not.
"""

import fnmatch
from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from statistics import median

from mambench.harness.analysis.intervals import ROUNDS_FOR_INTERVAL
from mambench.harness.analysis.results import Analysis, Result
from mambench.harness.curves import PROCESS_FRAC
from mambench.harness.errors import UsageError, unknown_name
from mambench.harness.spec import METRICS, DType, Family, Outcome, Pass, Problem
from mambench.reports import units
from mambench.reports.markdown import escape

OURS = ("selective_scan", "ssd")
PEERS = ("mamba_ssm_*", "fla_*", "flashinfer_*")
_GAPS = "\u2021"  # double dagger
_UNITS = {metric.tag: metric.unit for metric in METRICS if metric.better == "lower"}


@dataclass(frozen=True, kw_only=True)
class Ratio:
    """One question: the best of ours, the best peer, and how everyone else asked it ended."""

    problem: Problem
    pass_: Pass
    dtype: DType
    metric: str
    ours: Result  # the best, or one that did not end ok
    peer: Result | None  # None: no peer ended ok
    others: tuple[Result, ...]  # peers that did not end ok

    @property
    def ours_value(self) -> float | None:
        """The metric of ours; None where it is missing."""
        return _value(self.ours, self.metric)

    @property
    def peer_value(self) -> float | None:
        """The metric of the best peer; None where there is none."""
        return None if self.peer is None else _value(self.peer, self.metric)

    @property
    def value(self) -> float | None:
        """The best peer's value over ours."""
        ours, peer = self.ours_value, self.peer_value
        return peer / ours if ours and peer is not None else None

    @property
    def interval(self) -> tuple[float, float] | None:
        """Ends of the ratio's interval; None for metrics without intervals and few samples."""
        ours, peer = self.ours.interval, self.peer.interval if self.peer else None
        if self.metric != "time_s" or self.value is None or ours is None or peer is None:
            return None
        return peer.low / ours.high, peer.high / ours.low

    @property
    def unlike(self) -> bool:
        """Whether gaps between launches are in one of two times that are compared."""
        if self.metric != "time_s" or self.value is None or self.peer is None:
            return False
        return _has_gaps(self.ours) != _has_gaps(self.peer)

    @property
    def winner(self) -> Result | None:
        """The one that is ahead; None where that cannot be told."""
        if self.value is None or self.unlike:
            return None
        low, high = self.interval or (self.value, self.value)
        results = (self.ours, self.peer)
        if self.interval and any(r is None or r.rounds < ROUNDS_FOR_INTERVAL for r in results):
            low, high = low / (1 + PROCESS_FRAC), high * (1 + PROCESS_FRAC)
        return self.ours if low > 1 else self.peer if high < 1 else None

    @property
    def label(self) -> str:
        """Operation and sizes."""
        p = self.problem
        what = "state update" if self.pass_ is Pass.DECODE else self.pass_.value
        sizes = [f"B={p.batch}"]
        sizes += [f"L={units.count(p.seqlen)}"] if p.seqlen is not None else []
        if p.headdim is None:
            sizes += [f"D={units.count(p.d_inner)}"]
        else:
            sizes += [f"H={p.nheads}", f"P={p.headdim}"]
        sizes += [f"N={p.d_state}"] if p.d_state is not None else []
        sizes += [f"G={p.ngroups}"] if (p.ngroups or 1) > 1 else []
        return " ".join((p.family.value, what, *sizes, *(["gated"] if p.gated else [])))


def make(
    analysis: Analysis,
    *,
    ours: Sequence[str] = OURS,
    peers: Sequence[str] = PEERS,
    metric: str = "time_s",
) -> tuple[Ratio, ...]:
    """Return the questions that ours and a peer were asked, by family, pass, batch and length.

    Args:
        analysis: of one run or several; machines are never mixed.
        ours, peers: names or globs of implementations; a name in both is ours.
        metric: the tag of a metric of which less is better.

    Raises UsageError for another metric.
    """
    if metric not in _UNITS:
        raise UsageError(unknown_name("metric of which less is better", metric, _UNITS))
    asked: dict[tuple[str, Problem, Pass, DType], list[Result]] = defaultdict(list)
    for result in analysis.results:
        case = result.case
        asked[result.source, case.problem, case.pass_, case.dtype].append(result)
    found: list[Ratio] = []
    for (_, problem, pass_, dtype), results in asked.items():
        own = [r for r in results if _named(r, ours)]
        foreign = [r for r in results if _named(r, peers) and not _named(r, ours)]
        if own and foreign:
            ended = [r for r in foreign if _value(r, metric) is not None]
            found.append(
                Ratio(
                    problem=problem,
                    pass_=pass_,
                    dtype=dtype,
                    metric=metric,
                    ours=_best(own, metric),
                    peer=_best(ended, metric) if ended else None,
                    others=tuple(r for r in foreign if r not in ended),
                )
            )
    return tuple(sorted(found, key=_order))


def table(ratios: Sequence[Ratio]) -> str:
    """Return sentences that say who is ahead where, and the table; peers that win are in bold."""
    lines = [escape(sentences(ratios)), ""]
    lines += [
        "| operation | ours | best peer | its name | peer / ours |",
        "|---|---:|---:|---|---:|",
    ]
    lines += [_line(ratio) for ratio in ratios]
    declined = _declined(ratios)
    return "\n".join([*lines, *(["", escape(declined)] if declined else [])])


def sentences(ratios: Sequence[Ratio]) -> str:
    """Say in how many rows ours is ahead, by how much, and plainly where a peer is."""
    if not ratios:
        return "No question was asked of ours and of a peer."
    ahead = [r for r in ratios if r.winner is r.ours]
    behind = [r for r in ratios if r.peer is not None and r.winner is r.peer]
    compared = [r for r in ratios if r.value is not None]
    whole = 1 < len(ahead) == len(ratios)
    said = [f"Ours is ahead in {'all' if whole else f'{len(ahead)} of'} {len(ratios)} rows"]
    if ahead:
        values = [r.value for r in ahead if r.value is not None]
        said[0] += (
            f", {'' if whole else 'there '}by {units.digits(min(values))} to "
            f"{units.digits(max(values))} times (median {units.digits(median(values))})"
        )
    said[0] += "."
    for ratio in behind:
        by = units.digits(1 / ratio.value) if ratio.value else units.MISSING
        said.append(f"{_who(ratio.peer)} wins at {ratio.label}, by {by} times.")
    open_ = [r.label for r in compared if r.winner is None and not r.unlike]
    if open_:
        said.append(f"No difference shows at {'; '.join(open_)}.")
    unlike = [r.label for r in compared if r.unlike]
    if unlike:
        said.append(
            f"Gaps between launches are in the time of {_GAPS}, which no graph was captured of; no "
            f"winner is named at {'; '.join(unlike)}."
        )
    unasked = [r for r in ratios if r.value is None]
    if unasked:
        said.append(f"Not compared: {'; '.join(r.label for r in unasked)}.")
    return " ".join(said)


def described(ratio: Ratio) -> str:
    """Return both values and the peer's name, as short as a chart's label."""
    if ratio.ours_value is None or ratio.peer_value is None:
        return units.MISSING
    unit = _UNITS[ratio.metric]
    ours, peer = (units.quantity(v, unit) for v in (ratio.ours_value, ratio.peer_value))
    name = "" if ratio.peer is None else f" ({ratio.peer.case.implementation})"
    return f"{ours}, {peer}{name}"


def _line(ratio: Ratio) -> str:
    unit = _UNITS[ratio.metric]
    ours, peer = (units.quantity(v, unit) for v in (ratio.ours_value, ratio.peer_value))
    if ratio.ours_value is None:
        ours = _ending(ratio.ours)
    name = units.MISSING if ratio.peer is None else escape(_who(ratio.peer))
    if ratio.unlike:
        ours, peer = (
            f"{text} {_GAPS}" if side is not None and _has_gaps(side) else text
            for text, side in ((ours, ratio.ours), (peer, ratio.peer))
        )
    text = units.MISSING
    if ratio.value is not None:
        text = f"{units.digits(ratio.value)}{units.TIMES}"
        if ratio.interval is not None:
            low, high = ratio.interval
            text += f" ({units.digits(low)} to {units.digits(high)})"
    if ratio.peer is not None and ratio.winner is ratio.peer:
        peer, name = f"**{peer}**", f"**{name}**"
    elif ratio.winner is ratio.ours:
        ours = f"**{ours}**"
    return f"| {escape(ratio.label)} | {ours} | {peer} | {name} | {text} |"


def _declined(ratios: Iterable[Ratio]) -> str:
    """Say once for each reason which peers did not end ok, and in how many rows."""
    counts: dict[tuple[str, str, str], int] = defaultdict(int)
    for ratio in ratios:
        for result in ratio.others:
            counts[_who(result), _ending(result), result.reason or ""] += 1
    return " ".join(
        f"{who}: {outcome} in {count} {'row' if count == 1 else 'rows'}"
        f"{f' ({reason})' if reason else ''}."
        for (who, outcome, reason), count in sorted(counts.items())
    )


def _ending(result: Result) -> str:
    """How a result without the metric ended; `ok` has a time but lacks this metric."""
    return "not measured" if result.outcome is Outcome.OK else result.outcome.value


def _has_gaps(result: Result) -> bool:
    """Whether the time is that of eager calls; a record that does not say so may be."""
    by_events = "events" in (result.method or "")
    return by_events and bool(result.found.get("time", {}).get("launch_gaps", True))


def _who(result: Result | None) -> str:
    return "" if result is None else f"{result.case.implementation}:{result.case.variant}"


def _value(result: Result, metric: str) -> float | None:
    return result.value(metric) if result.outcome is Outcome.OK else None


def _best(results: Sequence[Result], metric: str) -> Result:
    """Return the result with the least of the metric; one without only if all are without."""
    values: Mapping[int, float | None] = {id(r): _value(r, metric) for r in results}
    return min(results, key=lambda r: (values[id(r)] is None, values[id(r)] or 0.0))


def _named(result: Result, patterns: Sequence[str]) -> bool:
    return any(fnmatch.fnmatchcase(result.case.implementation, text) for text in patterns)


def _order(ratio: Ratio) -> tuple[int, int, int, int, int, int, str]:
    p = ratio.problem
    place = list(Family).index(p.family), list(Pass).index(ratio.pass_)
    return (*place, p.d_inner, p.batch, p.d_state or 0, p.seqlen or 0, ratio.dtype.value)
