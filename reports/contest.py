"""Who is the fastest at each length, among those that were measured there."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import groupby

from mambench.reports import units
from mambench.reports.rows import Row, Series, Slice

CLOSE = " At L = "
# A series that is slower than this everywhere is no rival where it was not measured.
_RIVAL = 2.0


@dataclass(frozen=True, kw_only=True)
class LengthSummary:
    """One length of a slice: each series' row (None: not asked), and the fastest.

    There is no fastest where a rival was not asked: it might have been that one.
    """

    seqlen: int | None  # None: of cases that have no length
    cells: tuple[Row | None, ...]  # in the order of the slice's series
    fastest: Row | None
    tied: tuple[Row, ...] = ()  # others whose interval overlaps the fastest's
    unasked: tuple[str, ...] = ()  # rivals that were not asked here


def by_length(part: Slice, reference: Series | None = None) -> tuple[LengthSummary, ...]:
    """Return the summary of every length; `reference` is a rival wherever it stands."""
    columns = [{row.seqlen: row for row in s.at_state(s.usual_state)} for s in part.series]
    lengths = sorted({seqlen for column in columns for seqlen in column}, key=ascending)
    rivals = _rivals(columns, lengths)
    rivals |= {i for i, series in enumerate(part.series) if series is reference}
    names = {s.key.implementation for s in part.series}
    found: list[LengthSummary] = []
    for seqlen in lengths:
        cells = tuple(column.get(seqlen) for column in columns)
        unasked = tuple(part.series[i].label for i in sorted(rivals) if cells[i] is None)
        # Where only one of several was asked there is no race, and so no winner.
        race = not unasked and (_asked(cells) > 1 or len(names) == 1)
        measured = [row for row in cells if race and row is not None and row.ok]
        fastest = min(measured, key=lambda row: row.time_s or 0, default=None)
        tied = tuple(row for row in measured if fastest is not None and _tied(row, fastest))
        found.append(
            LengthSummary(seqlen=seqlen, cells=cells, fastest=fastest, tied=tied, unasked=unasked)
        )
    return tuple(found)


def headline(lengths: Sequence[LengthSummary]) -> str:
    """Say who is the fastest where, and at which lengths that was not asked of all rivals."""
    measured = [entry for entry in lengths if entry.fastest is not None]
    cells = [cell for entry in lengths for cell in entry.cells if cell is not None]
    if not any(cell.ok for cell in cells):
        return "No case of this selection was measured."
    if not measured:
        return "No length was asked of all rivals, so that none is the fastest."
    if len(cells) == len(lengths) and len({e.fastest.label for e in measured if e.fastest}) == 1:
        return f"Only {measured[0].fastest.label if measured[0].fastest else ''} was asked for."
    if all(entry.seqlen is None for entry in measured):
        return f"{measured[0].fastest.label if measured[0].fastest else ''} is the fastest."
    stretches = [
        (label, [entry.seqlen or 0 for entry in group])
        for label, group in groupby(measured, key=lambda e: e.fastest.label if e.fastest else "")
    ]
    rest = _undecided(measured) + _open(lengths)
    if len(stretches) == 1:
        label, inside = stretches[0]
        if len(inside) == 1:
            return f"{label} is the fastest {_at(inside)}.{rest}"
        every = "every such length" if _open(lengths) else "every measured length"
        return f"{label} is the fastest at {every}, {span(inside[0], inside[-1])}.{rest}"
    parts = [f"{label} {_at(inside)}" for label, inside in stretches]
    return f"Fastest: {'; '.join(parts)}.{rest}"


def ascending(seqlen: int | None) -> int:
    """Sort lengths; cases without one come first."""
    return seqlen or 0


def span(low: int, high: int) -> str:
    """Return a range of lengths."""
    return f"{units.count(low)} to {units.count(high)}"


def _rivals(columns: Sequence[Mapping[int | None, Row]], lengths: Sequence[int | None]) -> set[int]:
    """Return the places of the series that come near the fastest at some length."""
    found: set[int] = set()
    for seqlen in lengths:
        cells = [column.get(seqlen) for column in columns]
        times = {i: row.time_s or 0.0 for i, row in enumerate(cells) if row is not None and row.ok}
        if times and _asked(cells) > 1:
            found |= {i for i, time in times.items() if time <= _RIVAL * min(times.values())}
    return found


def _asked(cells: Sequence[Row | None]) -> int:
    return len({row.series.implementation for row in cells if row is not None})


def _tied(row: Row, fastest: Row) -> bool:
    if row is fastest or row.time_low_s is None or fastest.time_high_s is None:
        return False
    return row.time_low_s <= fastest.time_high_s


def _undecided(lengths: Sequence[LengthSummary]) -> str:
    """Name the lengths at which the fastest is not told apart from others."""
    close = [units.count(entry.seqlen) for entry in lengths if entry.tied]
    return f"{CLOSE}{', '.join(close)} intervals overlap." if close else ""


def _open(lengths: Sequence[LengthSummary]) -> str:
    """Name the lengths at which some rival was not asked."""
    partly = [entry for entry in lengths if entry.unasked]
    if not partly:
        return ""
    where = ", ".join(units.count(entry.seqlen) for entry in partly)
    return f" Left out: L = {where}, where not all rivals were measured."


def _at(lengths: Sequence[int]) -> str:
    if len(lengths) == 1:
        return f"at L = {units.count(lengths[0])}"
    return f"from L = {span(lengths[0], lengths[-1])}"
