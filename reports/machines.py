"""The same questions on several machines, side by side, and divided by what the machines can do."""

import math
from collections import Counter, defaultdict
from collections.abc import Hashable, Iterator, Sequence
from dataclasses import dataclass
from statistics import geometric_mean

from mambench.harness import curves
from mambench.harness.analysis.runs import Source
from mambench.reports import roofline, units
from mambench.reports.rows import Report, Row


@dataclass(frozen=True, kw_only=True)
class Machine:
    """What normalises a machine's times; None where neither measured nor stated."""

    key: str
    label: str
    bytes_per_s: float | None
    flop_per_s: float | None
    origin: str  # "measured" or "datasheet"; empty where nothing is known


@dataclass(frozen=True, kw_only=True)
class Shared:
    """One question and its row on each machine, in the order of the report's sources."""

    rows: tuple[Row | None, ...]

    @property
    def first(self) -> Row:
        """Any row: the question is the same in all."""
        return next(row for row in self.rows if row is not None)

    @property
    def differs(self) -> bool:
        """Whether the implementation took another variant on another machine."""
        return len({row.series.variant for row in self.rows if row is not None}) > 1

    @property
    def label(self) -> str:
        """The rows' label, without the variant if that is not one."""
        parts = self.first.label.split(" · ")
        own = self.first.series.variant
        return " · ".join(part for part in parts if not self.differs or part != own)

    def speedup(self, machine: int, reference: int = 0) -> curves.Speedup | None:
        """How many times faster the case is on one machine than on another; None if not both."""
        ours, theirs = self.rows[machine], self.rows[reference]
        if ours is None or theirs is None or not ours.ok or not theirs.ok:
            return None
        return ratio(ours, theirs)


def ratio(ours: Row, theirs: Row) -> curves.Speedup | None:
    """Return their time over ours with an interval combined from both rows' own intervals.

    The limits on the logarithm are combined as by the method of variance estimates recovery (Zou
    and Donner 2008): the distances to the near ends, added in quadrature. The page does the same.
    """
    if not ours.time_s or not theirs.time_s:
        return None
    value = theirs.time_s / ours.time_s
    if (
        not ours.time_low_s
        or not theirs.time_low_s
        or not ours.time_high_s
        or not theirs.time_high_s
    ):
        return curves.Speedup(ratio=value, low=None, high=None)
    down = math.hypot(
        math.log(theirs.time_s / theirs.time_low_s), math.log(ours.time_high_s / ours.time_s)
    )
    up = math.hypot(
        math.log(theirs.time_high_s / theirs.time_s), math.log(ours.time_s / ours.time_low_s)
    )
    return curves.Speedup(ratio=value, low=value * math.exp(-down), high=value * math.exp(up))


def describe(report: Report, dtype: str) -> tuple[Machine, ...]:
    """Return every machine with its limits of one dtype.

    They are measured ones if all machines have those: a measured limit over a datasheet's would
    be no ratio of machines. A machine of which only the other kind is known has that, and says so.
    """
    known = [{found.name: found for found in roofline.limits(s, dtype)} for s in report.sources]
    first = "measured" if all("measured" in found for found in known if found) else "datasheet"
    chosen = [found.get(first) or next(iter(found.values()), None) for found in known]
    return tuple(
        Machine(
            key=source.key,
            label=source.label,
            bytes_per_s=limits.bytes_per_s if limits else None,
            flop_per_s=limits.flop_per_s if limits else None,
            origin=limits.name if limits else "",
        )
        for source, limits in zip(report.sources, chosen, strict=True)
    )


def shared(report: Report) -> tuple[Shared, ...]:
    """Return the questions that two machines or more were asked, in the order of the rows.

    Implementations choose their variant by the machine. Where each has one, the question decides
    what stands side by side; where one has several, variants stand beside their own.
    """
    places = {source.key: place for place, source in enumerate(report.sources)}
    asked: dict[Hashable, list[Row]] = defaultdict(list)
    for row in report.rows:
        case = row.result.case
        asked[case.implementation, case.problem, case.pass_, case.dtype].append(row)
    found: list[Shared] = []
    for rows in asked.values():
        for members in _side_by_side(rows):
            by_place = {places[row.slice.source]: row for row in members}
            if len(by_place) > 1:
                found.append(Shared(rows=tuple(by_place.get(i) for i in range(len(places)))))
    return tuple(found)


def _side_by_side(rows: Sequence[Row]) -> Iterator[Sequence[Row]]:
    """Split the rows of one question so that no machine has two."""
    if len({row.slice.source for row in rows}) == len(rows):
        yield rows
        return
    variants = dict.fromkeys(row.series.variant for row in rows)
    yield from ([row for row in rows if row.series.variant == name] for name in variants)


def sentences(report: Report, found: Sequence[Shared]) -> tuple[str, ...]:
    """Say of every machine but the first how it stands against that one over what both ran."""
    said: list[str] = []
    for place, source in enumerate(report.sources[1:], start=1):
        both = [case for case in found if case.speedup(place)]
        names = f"{source.label} against {report.sources[0].label}"
        if not both:
            said.append(f"{names}: no question was measured on both.")
            continue
        # Where variants differ, so does more than the machine.
        alike = [case for case in both if not case.differs]
        counted = alike or both
        values = [one.ratio for case in counted if (one := case.speedup(place))]
        middle = geometric_mean(values)
        word = "faster" if middle >= 1 else "slower"
        ends = sorted(v if middle >= 1 else 1 / v for v in (min(values), max(values)))
        which = "with the same variant" if alike else "each with a variant of its own"
        said.append(
            f"{names}: {units.ratio(max(middle, 1 / middle))} {word} over {len(counted)} questions "
            f"that both answered {which} (geometric mean; {' to '.join(map(units.ratio, ends))})."
            + _code(report.sources[0], source)
            + _hardware(report, place, counted)
        )
    return tuple(said)


def _code(first: Source, other: Source) -> str:
    """Say where more than the machine differs."""
    here, there = ({run.code_version for run in source.runs} for source in (first, other))
    if here == there:
        return ""
    return f" Their code differs: {', '.join(sorted(here))} and {', '.join(sorted(there))}."


def _hardware(report: Report, place: int, both: Sequence[Shared]) -> str:
    """Set the machines' limits beside their times, where both are known in the same way."""
    dtype = Counter(case.first.slice.dtype for case in both).most_common(1)[0][0]
    known = describe(report, dtype)
    first, other = known[0], known[place]
    if first.origin != other.origin:
        return ""
    parts: list[str] = []
    for name, ours, theirs in (
        ("memory bandwidth", other.bytes_per_s, first.bytes_per_s),
        (f"{dtype} matrix rate", other.flop_per_s, first.flop_per_s),
    ):
        if ours and theirs:
            parts.append(f"{name} is {units.ratio(ours / theirs)}")
    return f" Its {', its '.join(parts)} the other's ({first.origin})." if parts else ""
