"""Render one self-contained HTML file: static answers and tables, charts from embedded data.

All data travels as gzip in base64, which cannot end a script element whatever a record contains;
what stands in the markup itself is escaped by Jinja2. A content security policy with the hashes of
the page's own scripts keeps anything else from running or being fetched.
"""

import base64
import gc
import gzip
import hashlib
import json
import math
import os
import re
from collections.abc import Callable, Generator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import replace
from functools import cache
from pathlib import Path
from typing import Any

import jinja2

from mambench.harness import analysis
from mambench.harness.analysis import flatten
from mambench.harness.spec import METRICS
from mambench.reports import figures, machines, roofline, rows, summary, units, verdicts
from mambench.reports.rows import Report, Row, Slice
from mambench.reports.style import Style, styles

HERE = Path(__file__).resolve().parent
PLOTLY = "plotly-cartesian-4.1.1.min.js.gz"
# Digits of embedded numbers: finer than any measurement, and half the size.
SIGNIFICANT = 7
SIGNIFICANT_BOUNDS = 5
SHARED = 300  # cases in the static table of several machines
# The script makes these from time and what it is divided by.
DERIVED = ("tokens_per_s", "model_flop_per_s", "modelled_bytes_per_s")


def build(run_folders: Sequence[Path], output: Path) -> Path:
    """Write the report of one or several runs and return its path.

    Raises RunFolderError where a folder is not a sound run; a half-written file is never left.
    """
    with _uncollected():
        html = render(rows.make(analysis.load(run_folders)))
    write_atomically(output, html)
    return output


@contextmanager
def _uncollected() -> Generator[None]:
    """Hold the cyclic garbage collector: half the time goes to it, and nothing here is cyclic."""
    was = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if was:
            gc.enable()


def write_atomically(path: Path, text: str) -> None:
    """Write a file as a whole or not at all."""
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        temporary.write_text(text, encoding="utf-8")
        temporary.replace(path)
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise


def render(report: Report) -> str:
    """Return the page."""
    script = (HERE / "assets" / "report.js").read_text(encoding="utf-8")
    looks = styles(report.implementations)
    summaries = summary.summarise(report)
    return _without_indents(
        environment()
        .get_template("report.html.j2")
        .render(
            report=report,
            summaries=summaries,
            failures=summary.failures(report),
            crossed=summary.CROSSED,
            shared=machines.shared(report),
            shared_most=SHARED,
            verdicts=verdicts.load(report.analysis.runs),
            environment=rows.environment(report.analysis.runs),
            metrics=METRICS,
            looks=looks,
            css=stylesheet(),
            script=script,
            policy=_policy(script),
            payload=_packed(json.dumps(payload(report), separators=(",", ":")).encode()),
            plotly=base64.b64encode((HERE / "assets" / PLOTLY).read_bytes()).decode(),
        )
    )


def _without_indents(html: str) -> str:
    """Drop the template's indents, a third of the tables' size, but leave the scripts alone."""
    markup, script, rest = html.partition("<script")
    return re.sub(r"\n\s+", "\n", markup) + script + rest


def payload(report: Report) -> dict[str, Any]:
    """Return everything the page's script needs, as plain JSON values."""
    looks = styles(report.implementations)
    return {
        "columns": columns(report.rows),
        "slices": [_slice(report, part, looks) for part in report.slices],
        "looks": {name: [look.light, look.dark, look.dash] for name, look in looks.items()},
        "runs": {
            run.run_id: {"suite": run.suite, "started": run.created_at, "commit": run.code_version}
            for run in report.analysis.runs
        },
        "charts": [
            [chart.name, chart.title, chart.metric, chart.note, chart.interval]
            for chart in figures.CHARTS
        ],
        "derived": rows.DERIVED,
        "machines": {
            dtype: [vars(machine) for machine in machines.describe(report, dtype)]
            for dtype in sorted({part.key.dtype for part in report.slices})
        },
        "extras": _extras(report.rows),
    }


def _extras(found: Sequence[Row]) -> dict[str, dict[str, Any]]:
    """Return what only some cases have, by row: kernels, configurations, traces of power."""
    return {str(row.index): extra for row in found if row.ok and (extra := extras(row))}


def extras(row: Row) -> dict[str, Any]:
    """Return a case's kernels by time and by traffic, Triton's configurations and power trace."""
    observed = row.result.found
    made = {
        "kernels": observed.get("launches", {}).get("kernels"),
        "triton": observed.get("launches", {}).get("triton_kernels"),
        "moved": observed.get("traffic", {}).get("kernels"),
        "trace": observed.get("energy", {}).get("trace"),
        "ceiling": observed.get("sol", {}).get("ceiling"),
    }
    return {name: value for name, value in made.items() if value}


def columns(found: Sequence[Row]) -> dict[str, list[Any]]:
    """Return the rows column by column: SI numbers, texts, and None for missing.

    What is left out (`DERIVED`) the script adds.
    """
    names = [row.label for row in found]
    table: dict[str, list[Any]] = {"label": names, "commit": [row.commit for row in found]}
    records = [analysis.record(row.result, {row.slice.source: row.device}) for row in found]
    for key in records[0] if records else ():
        digits = SIGNIFICANT_BOUNDS if key in ("time_low_s", "time_high_s") else SIGNIFICANT
        if key not in DERIVED:
            table[key] = [_number(record[key], digits) for record in records]
    table = {name: values for name, values in table.items() if any(v is not None for v in values)}
    table["coverage"] = table.pop("interval_coverage", [None] * len(found))
    table["quantiles_s"] = [_beside_median(row.result.quantiles_s) for row in found]
    table["missing"] = [_missing(row) for row in found]
    table["flags"] = [list(row.result.flags) for row in found]
    table["telemetry"] = [_telemetry(row) for row in found]
    return table


def _slice(report: Report, part: Slice, looks: Mapping[str, Style]) -> dict[str, Any]:
    lengths, states = tuple(reversed(part.state_lengths)), part.states
    # With one d_state per family there is nothing to choose.
    usual = {series.usual_state for series in part.series if not series.is_attention}
    choices: list[int | None] = [None, *(states if len(set(states) - usual) else ())]
    return {
        "key": part.key.text,
        "device": part.device,
        "title": part.title,
        "level": part.key.level,
        "pass": part.key.pass_,
        "dtype": part.key.dtype,
        "size": part.size_label,
        "rows": packed([row.index for row in part.rows]),
        "legend": [
            {
                "label": series.label,
                "implementation": series.key.implementation,
                "symbol": figures.series_symbol(part, series, looks),
                "state": series.usual_state,
            }
            for series in part.series
        ],
        "over_length": [_over_length(report, part, state) for state in choices],
        "roofline": (drawn := roofline.figure(report, part)) and _packed_rows(drawn),
        "over_state": _over_state(report, part, lengths),
    }


def _beside_median(quantiles: Sequence[float] | None) -> list[float] | None:
    """Return the median, and each quantile's distance from it in ten-thousandths: half the size."""
    if quantiles is None or not (middle := quantiles[len(quantiles) // 2]):
        return None
    return [_number(middle), *(round((value / middle - 1) * 1e4) for value in quantiles)]


def packed(rows: Sequence[int]) -> list[int]:
    """Return row numbers that follow each other as their first and minus their count."""
    if len(rows) > 2 and list(rows) == list(range(rows[0], rows[0] + len(rows))):
        return [rows[0], -len(rows)]
    return list(rows)


def _packed_rows(figure: figures.Figure) -> figures.Figure:
    data = [trace | {"rows": packed(trace["rows"])} for trace in figure["data"]]
    return figure | {"data": data}


def _missing(row: Row) -> dict[str, str]:
    """Return why values are missing that were asked for."""
    missing = row.result.missing.items() if row.ok else ()
    return {tag: why for tag, why in missing if why != "not measured"}


def _over_state(report: Report, part: Slice, lengths: Sequence[int]) -> list[dict[str, Any]]:
    """Return the charts over d_state; what their traces share is in the first that has it."""
    shared: dict[str, int] = {}
    styles_of: list[figures.Figure] = []
    found: list[dict[str, Any]] = []
    for length in lengths:
        figure = figures.over_state(report, part, length)
        data: list[list[Any]] = []
        for trace in figure["data"]:
            own = {key: trace[key] for key in ("x", "y", "text") if key in trace}
            look = {k: v for k, v in trace.items() if k not in own and k != "rows"}
            place = shared.setdefault(json.dumps(look), len(styles_of))
            if place == len(styles_of):
                styles_of.append(look)
            own = {k: v["column"] if isinstance(v, dict) else v for k, v in own.items()}
            data.append([place, own | {"rows": packed(trace["rows"])}])
        found.append({"seqlen": length, "data": data, "layout": figure["layout"]})
    return found and [{"looks": styles_of, "lengths": found}]


# Draws every row that ended ok: what the charts over length have in common.
_ANY = replace(figures.CHARTS[0], metric="tokens", interval=None)


def _over_length(report: Report, part: Slice, state: int | None) -> dict[str, Any]:
    """Return the curves once, and of each chart that has a point its layout."""
    made = {c.name: figures.over_length(report, part, c, state) for c in figures.CHARTS}
    return {
        "d_state": state,
        "data": _packed_rows(figures.over_length(report, part, _ANY, state))["data"],
        "layouts": {
            name: figure["layout"]
            for name, figure in made.items()
            if any(not trace["meta"].get("failure") for trace in figure["data"])
        },
    }


def _telemetry(row: Row) -> dict[str, str]:
    found = {key: units.entry(key, text) for key, text in flatten(row.result.telemetry).items()}
    gate = row.result.details.get("gate")
    return found | flatten({} if gate is None else {"gate": gate})


def _number(value: Any, digits: int = SIGNIFICANT) -> Any:
    if isinstance(value, float):
        return float(f"{value:.{digits}g}") if math.isfinite(value) else None
    return value


def _packed(data: bytes) -> str:
    """Return gzip in base64; without a time stamp, so that equal runs give equal files."""
    return base64.b64encode(gzip.compress(data, 9, mtime=0)).decode()


def _policy(script: str) -> str:
    hashes = [script, _plotly_source()]
    sources = " ".join(f"'sha256-{_sha256(text)}'" for text in hashes)
    return (
        f"default-src 'none'; script-src {sources}; style-src 'unsafe-inline'; "
        "img-src data: blob:; base-uri 'none'; form-action 'none'"
    )


def _sha256(text: str) -> str:
    return base64.b64encode(hashlib.sha256(text.encode()).digest()).decode()


@cache
def _plotly_source() -> str:
    return gzip.decompress((HERE / "assets" / PLOTLY).read_bytes()).decode()


def _minified(css: str) -> str:
    return re.sub(r"\s*\n\s*", "\n", re.sub(r"/\*.*?\*/", "", css, flags=re.DOTALL)).strip()


def stylesheet() -> str:
    """Return the pages' style."""
    return _minified((HERE / "assets" / "report.css").read_text(encoding="utf-8"))


def environment() -> jinja2.Environment:
    """Return where templates are found; whatever they insert is escaped."""
    made = jinja2.Environment(
        loader=jinja2.FileSystemLoader(HERE / "templates"),
        autoescape=True,
        trim_blocks=True,
        lstrip_blocks=True,
        undefined=jinja2.StrictUndefined,
    )
    filters: dict[str, Callable[..., str]] = {
        "seconds": units.seconds,
        "memory": units.memory,
        "count": units.count,
        "ratio": units.ratio,
        "si": units.si,
        "exponent": summary.exponent_text,
        "crossing": summary.crossing_text,
        "crossing_note": summary.crossing_note,
        "factor": summary.factor_text,
        "saving": summary.saving_text,
    }
    made.filters.update(filters)
    return made
