"""The report for a terminal: the answer, and one table with a sparkline per selection."""

import math
from collections.abc import Sequence

from mambench.reports import summary, units
from mambench.reports.rows import Report, Row
from mambench.reports.summary import SliceSummary

_BARS = "▁▂▃▄▅▆▇█"


def render(report: Report) -> str:
    """Return plain text without colours or control characters, whatever the records hold."""
    blocks = [_block(entry) for entry in summary.summarise(report)]
    failed = summary.failures(report)
    if failed:
        lines = [
            f"  {f.outcome.value:<12} {f.label}  {_lengths(f.seqlens)}  {f.reason}" for f in failed
        ]
        blocks.append("\n".join(["Cases that did not end ok:", *lines]))
    text = "\n\n".join(blocks) or "These runs hold no case yet."
    text = text.replace("\u00a0", " ")
    return "".join(c for c in text if c == "\n" or c.isprintable()) + "\n"


def sparkline(values: Sequence[float | None]) -> str:
    """Return one bar per value on a logarithmic scale; a missing value is a cross."""
    known = [math.log(v) for v in values if v]
    low, span = min(known, default=0), (max(known, default=0) - min(known, default=0)) or 1
    return "".join(
        units.TIMES if not v else _BARS[round((math.log(v) - low) / span * (len(_BARS) - 1))]
        for v in values
    )


def table(rows: Sequence[Sequence[str]], *, left: int = 1) -> str:
    """Return columns aligned: the first `left` to the left, the others to the right."""
    widths = [max(len(row[i]) for row in rows) for i in range(len(rows[0]))]
    lines = [
        "  ".join(
            c.ljust(w) if i < left else c.rjust(w)
            for i, (c, w) in enumerate(zip(row, widths, strict=True))
        )
        for row in rows
    ]
    return "\n".join(f"  {line.rstrip()}" for line in lines)


def _block(entry: SliceSummary) -> str:
    head = [
        f"{entry.part.device}: {entry.part.title}",
        f"  {entry.crossing}",
        f"  {entry.headline}",
    ]
    head += [f"  {text}" for text in (entry.evidence, entry.weights) if text]
    lengths = [length.seqlen for length in entry.lengths]
    rows = [["", *map(units.length, lengths), ""]]
    for i, series in enumerate(entry.series):
        cells = [length.cells[i] for length in entry.lengths]
        line = sparkline([cell.time_s if cell else None for cell in cells])
        rows.append([series.series.label, *map(_cell, cells), line])
    return "\n".join([*head, "", table(rows)])


def _lengths(seqlens: Sequence[int | None]) -> str:
    return f"L = {'; '.join(map(units.count, seqlens))}"


def _cell(row: Row | None) -> str:
    if row is None:
        return units.MISSING
    return units.seconds(row.time_s) if row.ok else row.outcome.value
