"""The roofline of one selection: work rate against arithmetic intensity, under measured ceilings.

Intensity is modelled FLOP over bytes measured by hardware counters where the selection has them,
else over the compulsory (modelled) bytes; the two never share a chart. Ceilings are the machine's
own, from the run's manifest; the datasheet's stand beside them and never in their place.
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from mambench.harness.analysis.runs import Source
from mambench.harness.instruments import datasheets
from mambench.reports import figures, units
from mambench.reports.figures import Figure
from mambench.reports.rows import Report, Row, Series, Slice
from mambench.reports.style import styles

COPY, MATRIX = "copy", "matrix"  # names of ceilings in a manifest


@dataclass(frozen=True, kw_only=True)
class Limits:
    """Memory and matrix rates of a machine, in bytes/s and FLOP/s; None is not known."""

    name: str  # "measured" or "datasheet"
    bytes_per_s: float | None
    flop_per_s: float | None


def limits(source: Source, dtype: str) -> tuple[Limits, ...]:
    """Return what is known of a machine: measured first, then its datasheet's."""
    found: list[Limits] = []
    none: Mapping[str, Any] = {}
    recorded = next((run.ceilings for run in reversed(source.runs) if run.ceilings), none)
    names = (COPY, f"{MATRIX}-{dtype}")
    rates: dict[str, list[float | None]] = {
        key: [(recorded.get(name) or none).get(key) for name in names]
        for key in ("value", "datasheet")
    }
    if any(rates["value"]):
        found.append(
            Limits(name="measured", bytes_per_s=rates["value"][0], flop_per_s=rates["value"][1])
        )
    stated = rates["datasheet"]
    if not any(stated) and (sheet := datasheets.find(source.device_name)) is not None:
        stated = [sheet.memory_bytes_per_s, sheet.matrix_flop_per_s.get(dtype)]
    if any(stated):
        found.append(Limits(name="datasheet", bytes_per_s=stated[0], flop_per_s=stated[1]))
    return tuple(found)


def figure(report: Report, part: Slice) -> Figure | None:
    """Return the chart, or None where no case has both work and bytes."""
    measured = any(report.column("intensity_measured")[row.index] for row in part.rows)
    column = "intensity_measured" if measured else "intensity_modelled"
    intensities, rates = report.column(column), report.column("flop_rate")
    looks = styles(report.implementations)
    shown: list[Row] = []
    traces: list[Figure] = []
    for series in part.series:
        rows = [r for r in series.at_state(series.usual_state) if r.ok and intensities[r.index]]
        if rows and not series.is_level:
            shown += rows
            traces.append(_points(part, series, rows, column, looks))
    if not shown:
        return None
    x = sorted(intensities[row.index] or 0.0 for row in shown)
    source = next(s for s in report.sources if s.key == part.key.source)
    roofs = [_roof(found, x[0] / 2, x[-1] * 2) for found in limits(source, part.key.dtype)]
    roofs = [roof for roof in roofs if roof is not None]
    y = [rates[row.index] or 0.0 for row in shown] + [v for roof in roofs for v in roof["y"]]
    unit = "byte moved (measured)" if measured else "compulsory byte (modelled)"
    return {
        "data": traces + roofs,
        "layout": {
            "xaxis": figures.log_axis(f"model FLOP per {unit}", [x[0] / 2, x[-1] * 2], _plain),
            "yaxis": figures.log_axis("model FLOP per second", sorted(y), _flops),
        },
    }


def _points(
    part: Slice, series: Series, rows: Sequence[Row], column: str, looks: figures.Looks
) -> Figure:
    return {
        "type": "scatter",
        "mode": "lines+markers",
        "name": series.label,
        "rows": [row.index for row in rows],
        "x": {"column": column},
        "y": {"column": "flop_rate"},
        "line": {"dash": figures.series_dash(part, series, looks), "width": 1},
        "marker": {"symbol": figures.series_symbol(part, series, looks), "size": 8},
        "meta": {"implementation": series.key.implementation, "series": series.label},
    }


def _roof(found: Limits, low: float, high: float) -> Figure | None:
    """Return a line that rises with the memory's rate up to the matrix units'."""
    if found.bytes_per_s is None or found.flop_per_s is None:
        return None
    ridge = found.flop_per_s / found.bytes_per_s
    x = [low, *([ridge] if low < ridge < high else []), high]
    rates = units.si(found.bytes_per_s, "B/s"), units.si(found.flop_per_s, "FLOP/s")
    text = f"{found.name}: {', '.join(rates)}"
    return {
        "type": "scatter",
        "mode": "lines",
        "name": text,
        "rows": [],
        "x": [_short(value) for value in x],
        "y": [_short(min(found.flop_per_s, value * found.bytes_per_s)) for value in x],
        "line": {"dash": "solid" if found.name == "measured" else "dot", "width": 1.5},
        "marker": {"symbol": "circle"},
        "meta": {"roof": text},
    }


def _short(value: float) -> float:
    return float(f"{value:.6g}") if math.isfinite(value) else value


def _plain(value: float | None) -> str:
    if value is None:
        return units.MISSING
    return units.count(value) if value >= 1000 else units.digits(value)


def _flops(value: float | None) -> str:
    return units.si(value, "FLOP/s")
