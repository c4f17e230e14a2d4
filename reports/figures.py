"""Charts as Plotly's dictionaries, whose numbers are references to rows.

A trace holds `rows` (indices) and names the columns of its axes, so that the page embeds every
number once. `resolve` turns a figure into one that Plotly takes; `assets/report.js` does the same.
Colours are left to the page, which knows the scheme; marker and dash are here.
"""

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

from mambench.harness.spec import Outcome
from mambench.reports import units
from mambench.reports.rows import Report, Row, Series, Slice
from mambench.reports.style import DASHES, Style, marker, styles

Figure = dict[str, Any]
Looks = Mapping[str, Style]
Curves = Sequence[tuple[Series, Sequence[Row]]]
STRIP = 0.055  # share of a chart's height that each line of outcomes takes
_HIDDEN_IN_STRIP = {Outcome.OK, Outcome.UNAVAILABLE}  # the second only in the table


@dataclass(frozen=True, kw_only=True)
class Chart:
    """What is drawn against what."""

    name: str
    title: str
    metric: str
    axis: str
    note: str
    format: Callable[[float | None], str]
    binary: bool = False
    interval: tuple[str, str] | None = None
    decode_note: str | None = None  # of a pass that makes one token whatever L, if it differs


def _tokens(value: float | None) -> str:
    return units.si(value, "tok/s")


def _per_joule(value: float | None) -> str:
    return units.si(value, "tok/J")


def _joules(value: float | None) -> str:
    return units.si(value, "J")


def _percent(value: float | None) -> str:
    return units.MISSING if value is None else f"{units.digits(100 * value)} %"


CHARTS = (
    Chart(
        name="time",
        title="Time",
        metric="time_s",
        axis="time per pass",
        note="median per pass",
        format=units.seconds,
        interval=("time_low_s", "time_high_s"),
    ),
    Chart(
        name="throughput",
        title="Throughput",
        metric="tokens_per_s",
        axis="tokens per second",
        note="tokens per second",
        format=_tokens,
    ),
    Chart(
        name="per_token",
        title="Time per token",
        metric="time_per_token_s",
        axis="time per token",
        note="flat where time grows in proportion to L",
        decode_note="flat where time does not depend on L",
        format=units.seconds,
    ),
    Chart(
        name="memory",
        title="Peak memory",
        metric="peak_memory_bytes",
        axis="peak memory",
        note="inputs and outputs included",
        format=units.memory,
        binary=True,
    ),
    Chart(
        name="traffic",
        title="HBM traffic over compulsory",
        metric="traffic_ratio",
        axis="bytes measured / compulsory",
        note="1 if nothing moves twice; by hardware counters",
        format=units.ratio,
    ),
    Chart(
        name="ceiling",
        title="Share of the binding ceiling",
        metric="sol_frac",
        axis="share of the ceiling",
        note="modelled work at this machine's measured limits over the time",
        format=_percent,
    ),
    Chart(
        name="launch",
        title="Cost of launching",
        metric="call_ratio",
        axis="time of an eager call / GPU time",
        note="an eager call over the GPU's time; near 1 launching costs nothing",
        format=units.ratio,
    ),
    Chart(
        name="energy",
        title="Energy",
        metric="energy_j",
        axis="energy per pass",
        note="per pass, idle power included",
        format=_joules,
    ),
    Chart(
        name="per_joule",
        title="Tokens per joule",
        metric="tokens_per_j",
        axis="tokens per joule",
        note="tokens per joule",
        format=_per_joule,
    ),
)
# What is made from the time, and so from the gaps between launches that it may hold.
TIMED = ("time_s", "tokens_per_s", "time_per_token_s", "sol_frac", "call_ratio", "flop_rate")
HOLLOW = "Hollow: gaps between launches are in the time."
SEQLEN_AXIS = "sequence length L (1K = 1,024 tokens)"
STATE_AXIS = "state size N (d_state)"


def over_length(report: Report, part: Slice, chart: Chart, d_state: int | None = None) -> Figure:
    """Return a chart over seqlen at one d_state, or at each series' usual one."""
    looks = styles(report.implementations)
    curves = [(series, _rows_over_length(series, d_state)) for series in part.series]
    kept = [(series, _shown(report, rows, chart)) for series, rows in curves]
    traces = [_line(series, rows, chart, part, looks) for series, rows in kept if rows]
    shown = [row for _, rows in kept for row in rows]
    return {
        "data": traces + _failures(curves, part, looks),
        "layout": _over_length_layout(report, chart, shown, _failed(curves)),
    }


def layouts_over_length(
    report: Report, part: Slice, d_state: int | None = None
) -> Mapping[str, Figure]:
    """Return the layouts of all charts over seqlen that have a point, by the charts' names."""
    curves = [(series, _rows_over_length(series, d_state)) for series in part.series]
    rows, failed = [row for _, rows in curves for row in rows], _failed(curves)
    found = {chart.name: (chart, _shown(report, rows, chart)) for chart in CHARTS}
    return {
        name: _over_length_layout(report, chart, shown, failed)
        for name, (chart, shown) in found.items()
        if shown
    }


def over_state(report: Report, part: Slice, seqlen: int) -> Figure:
    """Return time over d_state at one length; attention, which has none, as a level line."""
    looks, chart = styles(report.implementations), CHARTS[0]
    curves = [(series, series.at_length(seqlen)) for series in part.series]
    states = sorted({row.d_state for _, rows in curves for row in rows if row.d_state})
    traces: list[Figure] = []
    for series, rows in curves:
        trace = _line(series, _shown(report, rows, chart), chart, part, looks)
        trace["x"] = {"column": "d_state"}
        if series.is_attention and trace["rows"] and states:
            trace |= {"x": [states[0], states[-1]], "rows": trace["rows"][:1] * 2, "mode": "lines"}
            trace["meta"]["reference"] = True
        traces += [trace] if trace["rows"] else []
    mambas = [(series, rows) for series, rows in curves if not series.is_attention]
    failures = _failures(mambas, part, looks, x="d_state")
    shown = _shown(report, [row for _, rows in curves for row in rows], chart)
    return {
        "data": traces + failures,
        "layout": _layout(
            _log_axis(STATE_AXIS, states, powers_of_two(states), str),
            _value_axis(report, chart, shown),
            strips=len(failures),
        ),
    }


def resolve(figure: Figure, rows: Sequence[Row]) -> Figure:
    """Return the figure with every reference replaced by the rows' values, as Plotly takes it."""
    return {
        "data": [_resolve_trace(trace, rows) for trace in figure["data"]],
        "layout": figure["layout"],
    }


def log_axis(title: str, values: Sequence[float], text: Callable[[Any], str]) -> Figure:
    """Return a logarithmic axis over sorted values with round ticks."""
    ticks = decades(values[0], values[-1]) if values else []
    return _log_axis(title, values, ticks, text)


def powers_of_two(values: Sequence[int], most: int = 9) -> list[int]:
    """Return at most `most` powers of two that span the values, evenly apart."""
    if not values:
        return []
    first = math.floor(math.log2(values[0]))
    last = math.ceil(math.log2(values[-1]))
    step = math.ceil((last - first + 1) / most)
    return [2**k for k in range(first, last + 1, step)]


def decades(low: float, high: float) -> list[float]:
    """Return round numbers on a logarithmic axis: 1-2-5 over short ranges, else powers of ten."""
    first, last = math.floor(math.log10(low)), math.ceil(math.log10(high))
    if last - first <= 2:
        ticks = [m * 10.0**k for k in range(first, last + 1) for m in (1, 2, 5)]
        return [tick for tick in ticks if low / 1.3 <= tick <= high * 1.3]
    step = math.ceil((last - first + 1) / 7)
    return [10.0**k for k in range(first, last + 1, step)]


def _rows_over_length(series: Series, d_state: int | None) -> tuple[Row, ...]:
    return series.at_state(series.usual_state if d_state is None else d_state)


def _shown(report: Report, rows: Sequence[Row], chart: Chart) -> list[Row]:
    values = report.column(chart.metric)
    return [row for row in rows if row.outcome is Outcome.OK and (values[row.index] or 0) > 0]


def _failed(curves: Curves) -> Curves:
    """Return what did not end `ok`, of each series that has some."""
    found = [
        (s, [row for row in rows if row.outcome not in _HIDDEN_IN_STRIP]) for s, rows in curves
    ]
    return [(series, rows) for series, rows in found if rows]


def _over_length_layout(
    report: Report, chart: Chart, shown: Sequence[Row], failed: Curves
) -> Figure:
    drawn = [*shown, *(row for _, rows in failed for row in rows)]
    lengths = sorted({row.seqlen for row in drawn if row.seqlen is not None})
    return _layout(
        _log_axis(SEQLEN_AXIS, lengths, powers_of_two(lengths), units.length),
        _value_axis(report, chart, shown),
        strips=len(failed),
    )


def _line(
    series: Series, rows: Sequence[Row], chart: Chart, part: Slice, looks: Mapping[str, Style]
) -> Figure:
    """Return the line through rows that all have a value to show."""
    look = looks[series.key.implementation]
    trace: Figure = {
        "type": "scatter",
        "mode": "lines+markers",
        "name": series.label,
        "rows": [row.index for row in rows],
        "x": {"column": "seqlen"},
        "y": {"column": chart.metric},
        "line": {"dash": series_dash(part, series, looks), "width": 2},
        "marker": {"symbol": _symbol(series, part, look), "size": 8},
        "meta": {"implementation": series.key.implementation, "series": series.label},
    }
    if series.is_level:  # the case has no length of its own to be drawn at
        trace["x"] = [row.seqlen or 1 for row in rows]
        trace["mode"] = "lines" if len(trace["x"]) > 1 else "markers"
    if chart.interval:
        trace["interval"] = list(chart.interval)
    return trace


def _failures(
    curves: Curves,
    part: Slice,
    looks: Mapping[str, Style],
    x: str = "seqlen",
) -> list[Figure]:
    """One line of crosses above the chart for each series that did not end `ok` everywhere."""
    traces: list[Figure] = []
    for series, failed in _failed(curves):
        traces.append(
            {
                "type": "scatter",
                "mode": "markers+text",
                "name": f"{series.label}, not ok",
                "rows": [row.index for row in failed],
                "x": [row.seqlen or 1 for row in failed]
                if series.is_level and x == "seqlen"
                else {"column": x},
                "y": [len(traces)] * len(failed),
                "yaxis": "y2",
                "text": [row.outcome.value for row in failed],
                "textposition": "middle right",
                "marker": {"symbol": "x-thin", "size": 7, "line": {"width": 2}},
                "cliponaxis": False,
                "meta": {
                    "implementation": series.key.implementation,
                    "series": series.label,
                    "failure": True,
                },
            }
        )
    return traces


def series_symbol(part: Slice, series: Series, looks: Mapping[str, Style]) -> str:
    """Return the marker of a series, for legends."""
    return _symbol(series, part, looks[series.key.implementation])


def series_dash(part: Slice, series: Series, looks: Looks) -> str:
    """Return the dash of a series: the implementation's own, of further variants the next ones."""
    own = looks[series.key.implementation].dash
    _, rank = part.ranks[series.key]
    return DASHES[(DASHES.index(own) + rank) % len(DASHES)]


def _symbol(series: Series, part: Slice, look: Style) -> str:
    family, variant = part.ranks[series.key]
    return marker(look, family_rank=family, variant_rank=variant)


def _layout(x: Figure, y: Figure, *, strips: int) -> Figure:
    top = 1 - STRIP * strips
    layout: Figure = {"xaxis": x, "yaxis": y | {"domain": [0, max(top - 0.02 * bool(strips), 0.4)]}}
    if strips:
        layout["yaxis2"] = {
            "domain": [max(top, 0.42), 1],
            "range": [strips - 0.5, -0.5],
            "visible": False,
            "fixedrange": True,
        }
    return layout


def _value_axis(report: Report, chart: Chart, rows: Sequence[Row]) -> Figure:
    if not rows:
        return {"type": "log", "title": {"text": chart.axis}}
    column = report.column(chart.metric)
    found = [column[row.index] or 0.0 for row in rows]
    values = [min(found), max(found)]
    if chart.binary:
        ticks = [float(tick) for tick in powers_of_two([max(1, int(v)) for v in values], most=7)]
    else:
        ticks = decades(values[0], values[-1])
    return _log_axis(chart.axis, values, ticks, chart.format)


def _log_axis(
    title: str,
    values: Sequence[float],
    ticks: Sequence[float],
    text: Callable[[Any], str],
) -> Figure:
    """A logarithmic axis with its range and tick labels spelt out; Plotly's range is in log10."""
    axis: Figure = {"type": "log", "title": {"text": title}}
    if not values:
        return axis
    low, high = math.log10(values[0]), math.log10(values[-1])
    pad = max(0.04 * (high - low), 0.08)
    return axis | {
        "range": [low - pad, high + pad],
        "tickmode": "array",
        "tickvals": list(ticks),
        "ticktext": [_label(text, tick) for tick in ticks],
    }


@lru_cache(maxsize=4096, typed=True)  # thousands of axes have the same ticks
def _label(text: Callable[[Any], str], tick: float) -> str:
    return units.tick(text(tick))


def _resolve_trace(trace: Figure, rows: Sequence[Row]) -> Figure:
    chosen: list[Row] = [rows[index] for index in trace["rows"]]
    resolved = {key: value for key, value in trace.items() if key not in ("rows", "interval")}
    for axis in ("x", "y"):
        if isinstance(trace[axis], dict):
            resolved[axis] = [_column(row, trace[axis]["column"]) for row in chosen]
    resolved["customdata"] = list(trace["rows"])
    if "interval" in trace:
        low, high = trace["interval"]
        resolved["error_y"] = {
            "type": "data",
            "symmetric": False,
            "array": [_less(getattr(row, high), row.time_s) for row in chosen],
            "arrayminus": [_less(row.time_s, getattr(row, low)) for row in chosen],
        }
    return resolved


def _column(row: Row, name: str) -> float | None:
    if name in ("seqlen", "d_state"):
        return getattr(row, name)
    return row.value(name)


def _less(upper: float | None, lower: float | None) -> float:
    """Length of an error bar; a missing interval draws none."""
    return 0.0 if upper is None or lower is None else max(0.0, upper - lower)
