"""Tables for READMEs and CI summaries, made from run folders."""

import re
from collections.abc import Sequence
from pathlib import Path

from mambench.harness.analysis import loading
from mambench.harness.analysis.runs import Source, flatten
from mambench.reports import recorded, rows, summary, units
from mambench.reports.recorded import Recorded
from mambench.reports.rows import Report, Row
from mambench.reports.summary import SliceSummary


def tables(run_folders: Sequence[Path]) -> str:
    """Return the Markdown of one or several runs: provenance, then one table per selection."""
    return render(rows.make(loading.load(run_folders)))


def render(report: Report, *, most: int | None = None) -> str:
    """Return provenance and the tables of at most `most` selections, the most informative first."""
    blocks = [provenance(source) for source in report.sources]
    blocks += [block(entry) for entry in summary.summarise(report)[:most]]
    return "\n\n".join(blocks) + "\n"


def provenance(source: Source) -> str:
    """Return what was measured on what, with which versions, by which commands."""
    lines = [f"Measured on {escape(source.label)}."]
    for run in source.runs:
        flat = flatten(run.environment)
        versions = [("Python", flat.get("python")), ("CUDA", flat.get("torch_cuda"))]
        versions += [("driver", flat.get("gpu.driver"))]
        versions += [(n, flat.get(f"libraries.{n}")) for n in ("torch", "triton", "flash-attn-4")]
        stack = ", ".join(f"{name} {escape(text)}" for name, text in versions if text)
        when = f"{escape(run.created_at[:10])}, code {escape(run.code_version)}"
        lines.append(f"{when}, {stack}: {code(_repeatable(run.command))}")
    return "  \n".join(lines)


def _repeatable(command: str) -> str:
    """Leave out where the run was written: a folder of the machine that made it."""
    return re.sub(r""" (?:-o|--output)[ =](?:'[^']*'|"[^"]*"|\S+)""", "", command)


def block(entry: SliceSummary) -> str:
    """Return one selection: its sentences and the table of times, the fastest of a row in bold."""
    part = entry.part
    parts = [entry.crossing, entry.headline, entry.evidence, entry.weights or ""]
    text = escape(" ".join(sentence for sentence in parts if sentence))
    said = f"**{escape(part.device)}: {escape(part.title)}.** {text}"
    if entry.recorded:
        return "\n".join([said, "", *_recorded(entry.recorded)])
    names = [f"{escape(s.series.label)}{_state(s.d_state)}" for s in entry.series]
    lines = [
        said,
        "",
        f"| L | {' | '.join(names)} |",
        f"|---:|{'---:|' * len(names)}",
    ]
    for length in entry.lengths:
        cells = " | ".join(_cell(cell, length.fastest) for cell in length.cells)
        where = "any" if length.seqlen is None else units.count(length.seqlen)
        lines.append(f"| {where} | {cells} |")
    return "\n".join(lines)


def escape(text: str) -> str:
    """Return a record's text so that Markdown shows it as it is, on one line."""
    flat = " ".join(str(text).split())
    flat = flat.replace("&", "&amp;").replace("<", "&lt;").replace(">", "&gt;")
    return re.sub(r"([\\`*{}\[\]|#~])", r"\\\1", flat)


def code(text: str) -> str:
    """Return a code span, whatever backticks the text holds."""
    flat = " ".join(text.split())
    fence = "`" * (max((len(run) for run in re.findall(r"`+", flat)), default=0) + 1)
    pad = " " if flat.startswith("`") or flat.endswith("`") else ""
    return f"{fence}{pad}{flat}{pad}{fence}" if flat else ""


def _recorded(found: Recorded) -> list[str]:
    names = [escape(metric.name) for metric in found.metrics]
    lines = [f"| | {' | '.join(names)} |", f"|---|{'---:|' * len(names)}"]
    return lines + [
        f"| {' | '.join([escape(recorded.named(row)), *found.cells(row)])} |" for row in found.rows
    ]


def _state(d_state: int | None) -> str:
    return f" (N = {d_state})" if d_state else ""


def _cell(row: Row | None, fastest: Row | None) -> str:
    if row is None:
        return units.MISSING
    if not row.ok:
        return row.outcome.value
    text = units.seconds(row.time_s)
    return f"**{text}**" if row is fastest else text
