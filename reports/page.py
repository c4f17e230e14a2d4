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
import os
import re
import shlex
from collections.abc import Callable, Generator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import fields, replace
from functools import cache
from pathlib import Path
from typing import Any, cast

import jinja2
import markupsafe

from mambench.harness import beside, reproduce
from mambench.harness.analysis import loading, results
from mambench.harness.analysis.results import LAUNCH_GAPS
from mambench.harness.analysis.runs import Run
from mambench.harness.spec import METRICS, DeviceKind, Outcome, Settings
from mambench.reports import (
    figures,
    machines,
    names,
    packing,
    recorded,
    roofline,
    rows,
    summary,
    svg,
    units,
    verdicts,
)
from mambench.reports.rows import Report, Row, Slice
from mambench.reports.style import Style, styles

HERE = Path(__file__).resolve().parent
PLOTLY = "plotly-parts-4.1.1.min.js.gz"
LARGE = 2000  # rows, from which on two processes are sooner done
SHARED = 300  # cases in the static table of several machines
STATIC = 60  # selections with static tables
# Runs where scripts run at all: what is for those without is then never laid out.
EARLY = 'document.documentElement.dataset.script = "on";'
# The script makes these from time and what it is divided by.
DERIVED = ("tokens_per_s", "model_flop_per_s", "modelled_bytes_per_s")


def build(run_folders: Sequence[Path], output: Path) -> Path:
    """Write the report of one or several runs and return its path.

    Raises RunFolderError where a folder is not a sound run; a half-written file is never left.
    """
    with _uncollected():
        html = render(rows.make(loading.load(run_folders)))
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
    except BaseException as error:
        temporary.unlink(missing_ok=True)
        if isinstance(error, OSError):
            error.filename = str(path)  # what was asked for, and not what stood for it
        raise


def render(report: Report) -> str:
    """Return the page."""
    fork = beside.worthwhile(len(report.rows), LARGE)
    with beside.making(lambda: packing.begun(_json(_numbers(report))[:-1]), fork=fork) as numbers:
        summaries, shared = summary.summarise(report), machines.shared(report)
        others = b"," + _json(_others(report))[1:]
        html = _page(report, summaries, shared, lambda: packing.ended(numbers(), others))
    return _smaller(html)


def _page(
    report: Report,
    summaries: Sequence[summary.SliceSummary],
    shared: Sequence[machines.Shared],
    data: Callable[[], str],
) -> str:
    script = (HERE / "assets" / "report.js").read_text(encoding="utf-8")
    return (
        environment()
        .get_template("report.html.j2")
        .render(
            report=report,
            summaries=summaries,
            failures=summary.failures(report),
            crossed=summary.CROSSED,
            shared=shared,
            compared=machines.sentences(report, shared),
            shared_most=SHARED,
            verdicts=verdicts.load(report.analysis.runs),
            environment=rows.environment(report.analysis.runs),
            metrics=METRICS,
            looks=styles(report.implementations),
            css=stylesheet("report.css", "plotly.css"),
            script=script,
            early=EARLY,
            still=_still(report),
            static_most=STATIC,
            policy=_policy(script),
            payload=data,
            plotly=base64.b64encode((HERE / "assets" / PLOTLY).read_bytes()).decode(),
        )
    )


def _smaller(html: str) -> str:
    """Drop the template's indents and the end tags that HTML lets one leave out, not scripts'."""
    markup, script, rest = html.partition('<script type="application')
    markup = re.sub(r"\n\s+", "\n", markup)
    return re.sub(r"</(?:td|th|tr|tbody|thead|dt|dd)>\s*", "", markup) + script + rest


def _still(report: Report) -> str:
    """Return the first chart as a picture: there at once, and without script."""
    for part in report.slices[:1]:
        drawn = figures.over_length(report, part, figures.CHARTS[0])["data"]
        lines = [trace for trace in drawn if not trace["meta"].get("failure")]
        if any(row.seqlen is not None for trace in lines for row in _rows(report, trace)):
            return svg.chart(report, part, inline=True)
    return ""


def _rows(report: Report, trace: figures.Figure) -> list[Row]:
    return [report.rows[index] for index in trace["rows"]]


def payload(report: Report) -> dict[str, Any]:
    """Return everything the page's script needs, as plain JSON values."""
    return _numbers(report) | _others(report)


def _json(values: Any) -> bytes:
    return json.dumps(values, separators=(",", ":")).encode()


def _numbers(report: Report) -> dict[str, Any]:
    """Return what is of each row: half of the work that a page is."""
    return {
        "columns": {
            name: packing.repeated(values) for name, values in columns(report.rows).items()
        },
        "notes": {name: packing.repeated(values) for name, values in notes(report.rows).items()},
    }


def _others(report: Report) -> dict[str, Any]:
    looks = styles(report.implementations)
    return {
        "slices": [_slice(report, part, looks) for part in report.slices],
        "looks": {name: [look.light, look.dark, look.dash] for name, look in looks.items()},
        "runs": {
            run.run_id: {
                "suite": run.suite,
                "started": run.created_at,
                "commit": run.code_version,
                "repeat": _repeat(run),
            }
            for run in report.analysis.runs
        },
        "charts": [
            [chart.name, chart.title, chart.metric, chart.note, chart.interval, chart.decode_note]
            for chart in figures.CHARTS
        ],
        "derived": rows.DERIVED,
        "gaps": LAUNCH_GAPS,
        "timed": figures.TIMED,
        "machines": {
            dtype: [vars(machine) for machine in machines.describe(report, dtype)]
            for dtype in sorted({part.key.dtype for part in report.slices})
        },
        "extras": _extras(report.rows),
    }


def _repeat(run: Run) -> str:
    """Return what a command that repeats one of the run's cases ends with."""
    known = {field.name for field in fields(Settings)}
    settings: dict[str, Any] = {k: v for k, v in run.settings.items() if k in known}
    if "measurements" in settings:
        settings["measurements"] = tuple(settings["measurements"])
    gpu = run.device.get("kind") == DeviceKind.CUDA
    device = f"cuda:{run.device.get('index') or 0}" if gpu else "cpu"
    return shlex.join(reproduce.run_words(device, run.plugins, Settings(**settings)))


def _extras(found: Sequence[Row]) -> dict[str, dict[str, Any]]:
    """Return what only some cases have, by row: kernels, configurations, traces of power."""
    return {str(row.index): extra for row in found if row.found and (extra := extras(row))}


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
    devices = {row.slice.source: row.device for row in found}
    for key, values in results.columns([row.result for row in found], devices).items():
        if key not in DERIVED:
            table[key] = packing.numbers(values)
    table = {name: values for name, values in table.items() if any(v is not None for v in values)}
    table["coverage"] = table.pop("interval_coverage", [None] * len(found))
    for name in ("time_low_s", "time_high_s"):
        if name in table:
            table[name] = [packing.beside_time(getattr(row, name), row.time_s) for row in found]
    table["quantiles_s"] = packing.beside_medians(
        [row.result.samples_s for row in found], [row.time_s for row in found]
    )
    table["case_id"] = [packing.short_id(row.case_id) for row in found]
    table["missing"] = [_missing(row) for row in found]
    table["flags"] = [list(row.result.flags) for row in found]
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
        "rows": [packing.packed([row.index for row in series.rows]) for series in part.series],
        "legend": [
            {
                "label": series.label,
                "implementation": series.key.implementation,
                "symbol": figures.series_symbol(part, series, looks),
                "dash": figures.series_dash(part, series, looks),
                "state": series.usual_state,
            }
            for series in part.series
            # What is not on this device has no curve; the table of what did not end ok says why.
            if any(row.outcome is not Outcome.UNAVAILABLE for row in series.rows)
        ],
        "over_length": [_over_length(report, part, state) for state in choices],
        "roofline": (drawn := roofline.figure(report, part)) and _packed_rows(drawn),
        "over_state": _over_state(report, part, lengths),
    }


def _packed_rows(figure: figures.Figure) -> figures.Figure:
    data = [trace | {"rows": packing.packed(trace["rows"])} for trace in figure["data"]]
    return figure | {"data": data}


def _missing(row: Row) -> dict[str, str]:
    """Return why values are missing that were asked for."""
    missing = row.result.missing.items() if row.found else ()
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
            place = shared.setdefault(repr(look), len(styles_of))
            if place == len(styles_of):
                styles_of.append(look)
            named = {key: _name_of(value) for key, value in own.items()}
            data.append([place, named | {"rows": packing.packed(trace["rows"])}])
        found.append({"seqlen": length, "data": data, "layout": packing.rounded(figure["layout"])})
    return found and [{"looks": styles_of, "lengths": found}]


def _name_of(axis: Any) -> Any:
    """Return the name of a column that an axis refers to, or the axis' own values."""
    return cast("figures.Figure", axis)["column"] if isinstance(axis, dict) else axis


# Draws every row that ended ok: what the charts over length have in common.
_ANY = replace(figures.CHARTS[0], metric="tokens", interval=None)


def _over_length(report: Report, part: Slice, state: int | None) -> dict[str, Any]:
    """Return the curves once, and of each chart that has a point its layout."""
    return {
        "d_state": state,
        "data": _packed_rows(figures.over_length(report, part, _ANY, state))["data"],
        "layouts": {
            name: packing.rounded(layout)
            for name, layout in figures.layouts_over_length(report, part, state).items()
        },
    }


def notes(found: Sequence[Row]) -> dict[str, list[Any]]:
    """Return what surrounded each measurement, and what its check found, by dotted key."""
    return packing.flat(
        [
            (("", row.result.telemetry), ("gate.", row.result.details.get("gate") or {}))
            for row in found
        ]
    )


def _policy(script: str) -> str:
    hashes = [EARLY, script, _plotly_source()]
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


def stylesheet(first: str, *others: str) -> str:
    """Return the style that assets hold."""
    return "\n".join(
        _minified((HERE / "assets" / name).read_text("utf-8")) for name in (first, *others)
    )


def powers(text: str) -> markupsafe.Markup:
    """Return a text as markup in which `L^1.97` has a raised exponent."""
    return markupsafe.Markup(
        re.sub(r"\bL\^(\d[\d.]*\d)", r"L<sup>\1</sup>", str(markupsafe.escape(text)))
    )


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
        "brief": names.brief,
        "named": recorded.named,
        "explain": names.explain,
        "powers": powers,
    }
    made.filters.update(filters)
    return made
