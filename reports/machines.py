"""The same cases on several machines, side by side, and divided by what the machines can do."""

import math
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass

from mambench.harness import curves
from mambench.reports import roofline
from mambench.reports.rows import Report, Row

NORMALISERS = ("bandwidth", "peak")


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
    """One case and its row on each machine, in the order of the report's sources."""

    rows: tuple[Row | None, ...]

    @property
    def first(self) -> Row:
        """Any row: the question is the same in all."""
        return next(row for row in self.rows if row is not None)

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
    """Return every machine with its measured limits, else its datasheet's, of one dtype."""
    found: list[Machine] = []
    for source in report.sources:
        known = next(iter(roofline.limits(source, dtype)), None)
        found.append(
            Machine(
                key=source.key,
                label=source.label,
                bytes_per_s=known.bytes_per_s if known else None,
                flop_per_s=known.flop_per_s if known else None,
                origin=known.name if known else "",
            )
        )
    return tuple(found)


def shared(report: Report) -> tuple[Shared, ...]:
    """Return the cases that two machines or more were asked, in the order of the rows."""
    places = {source.key: place for place, source in enumerate(report.sources)}
    cases: dict[str, list[Row | None]] = defaultdict(lambda: [None] * len(places))
    for row in report.rows:
        cases[row.case_id][places[row.slice.source]] = row
    return tuple(Shared(rows=tuple(rows)) for rows in cases.values() if _count(rows) > 1)


def _count(rows: Sequence[Row | None]) -> int:
    return sum(row is not None for row in rows)
