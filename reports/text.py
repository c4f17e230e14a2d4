"""The report for a terminal: the answer, and one table with a sparkline per selection."""

import math
import textwrap
from collections.abc import Sequence

from mambench.reports import names, recorded, summary, units
from mambench.reports.rows import Report, Row
from mambench.reports.summary import SeriesSummary, SliceSummary

_BARS = "▁▂▃▄▅▆▇█"
_ABSENT = "\u00b7"  # middle dot: not asked
_WIDTH = 100


def render(report: Report) -> str:
    """Return plain text without colours or control characters, whatever the records hold."""
    blocks = [_block(entry) for entry in summary.summarise(report)]
    for run in (run for source in report.sources for run in source.runs):
        blocks += [textwrap.fill(f"Note on {run.suite}: {note}.", _WIDTH) for note in run.notes]
    failed = summary.failures(report)
    if failed:
        lines = [
            f"  {f.outcome.value:<12} {f.label}  {_lengths(f.seqlens)}  {f.reason}" for f in failed
        ]
        blocks.append("\n".join(["Cases that did not end ok:", *lines]))
    if report.slices:
        blocks.append(textwrap.fill(names.explain(report.slices), _WIDTH))
    text = "\n\n".join(blocks) or "These runs hold no case yet."
    text = text.replace("\u00a0", " ")
    return "".join(c for c in text if c == "\n" or c.isprintable()) + "\n"


def sparkline(values: Sequence[float | None]) -> str:
    """Return one bar per value on a logarithmic scale; None is a cross, NaN (not asked) a dot."""
    known = [math.log(v) for v in values if v and not math.isnan(v)]
    low, span = min(known, default=0), (max(known, default=0) - min(known, default=0)) or 1

    def bar(value: float | None) -> str:
        if not value:
            return units.TIMES
        if math.isnan(value):
            return _ABSENT
        return _BARS[round((math.log(value) - low) / span * (len(_BARS) - 1))]

    return "".join(map(bar, values))


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
    said = [entry.crossing, entry.headline, entry.evidence, entry.weights or ""]
    head = [f"{entry.part.device}: {entry.part.title}"]
    head += [textwrap.indent(textwrap.fill(text, _WIDTH - 2), "  ") for text in said if text]
    if entry.recorded:
        rows = [["", *(metric.name for metric in entry.recorded.metrics)]]
        rows += [[recorded.named(row), *entry.recorded.cells(row)] for row in entry.recorded.rows]
        return "\n".join([*head, "", table(rows)])
    lengths = ["any L" if n.seqlen is None else units.length(n.seqlen) for n in entry.lengths]
    rows = [["time at L =" if len(lengths) > 1 else "time", *lengths, ""]]
    for i, series in enumerate(entry.series):
        cells = [length.cells[i] for length in entry.lengths]
        line = sparkline([cell.time_s if cell else math.nan for cell in cells])
        rows.append([_named(series), *map(_cell, cells), line])
    return "\n".join([*head, "", table(rows)])


def _named(series: SeriesSummary) -> str:
    return series.series.label + (f" (N = {series.d_state})" if series.d_state else "")


def _lengths(seqlens: Sequence[int | None]) -> str:
    return f"L = {'; '.join(map(units.count, seqlens))}"


def _cell(row: Row | None) -> str:
    if row is None:
        return units.MISSING
    return units.seconds(row.time_s) if row.ok else row.outcome.value
