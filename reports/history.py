"""Draws histories: a line of blocks on a terminal, and one offline HTML page with SVG charts."""

import html
import math
from collections.abc import Sequence
from itertools import groupby
from pathlib import Path

from mambench.harness.history import Series

_BLOCKS = "▁▂▃▄▅▆▇█"
_SHOWN = 48  # points on a terminal's line, the newest
_WIDTH, _HEIGHT, _MARGIN = 720, 120, 8
_STYLE = """
:root { color-scheme: light dark; --line: #2563eb; --change: #dc2626; --soft: #8884; }
body { font: 15px/1.5 system-ui, sans-serif; max-width: 60rem; margin: 2rem auto; padding: 0 1rem; }
h2 { margin-top: 2.5rem; } h3 { font-size: 1rem; margin: 1.5rem 0 .25rem; font-weight: 600; }
svg { width: 100%; height: auto; background: color-mix(in srgb, currentColor 4%, transparent); }
figcaption { font-size: .85rem; opacity: .8; } figure { margin: 0; }
polyline { fill: none; stroke: var(--line); stroke-width: 1.5; }
circle { fill: var(--line); } line { stroke: var(--change); stroke-dasharray: 4 3; }
"""


def sparkline(values: Sequence[float]) -> str:
    """Return the newest values as blocks, from the series' lowest to its highest."""
    shown = values[-_SHOWN:]
    low, high = min(shown), max(shown)
    # Noise alone must not fill the height: a series that varies by less than 5 % is drawn flatter.
    span = max(high - low, 0.05 * high)
    top = len(_BLOCKS) - 1
    return "".join(_BLOCKS[round((value - low) / span * top)] for value in shown)


def text(found: Sequence[Series]) -> str:
    """Return what a terminal shows: machine by machine, each case and each change."""
    lines: list[str] = []
    for machine, kept in _by_machine(found):
        lines += ["", machine] if lines else [machine]
        for one in kept:
            lines.append(f"  {one.case.label}")
            lines.append(f"    {sparkline(one.values)}  {_summary(one)}")
            lines += [f"    change: {said}" for said in changes(one)]
    return "\n".join(lines)


def changes(one: Series) -> list[str]:
    """Return a sentence for each change point."""
    return [
        f"{change.change_frac:+.1%} from {one.codes[change.at]} on "
        f"({one.created_at[change.at][:10]}, before it {one.codes[change.at - 1]})"
        for change in one.changes
    ]


def build(found: Sequence[Series], output: Path) -> Path:
    """Write one HTML file that loads nothing; returns its path."""
    parts: list[str] = []
    for machine, kept in _by_machine(found):
        parts.append(f"<h2>{html.escape(machine)}</h2>")
        parts += [_figure(one) for one in kept]
    page = (
        '<!doctype html><html lang="en"><head><meta charset="utf-8"><title>History</title>'
        '<meta name="viewport" content="width=device-width, initial-scale=1">'
        f"<style>{_STYLE}</style></head><body><main><h1>History</h1>"
        f"{''.join(parts) or '<p>Nothing is stored yet.</p>'}</main></body></html>\n"
    )
    output.write_text(page, encoding="utf-8")
    return output


def _by_machine(found: Sequence[Series]) -> list[tuple[str, list[Series]]]:
    def of(one: Series) -> tuple[str, str]:
        return one.machine, one.fingerprint

    return [
        (f"{machine} ({fingerprint[:6]})", list(kept))
        for (machine, fingerprint), kept in groupby(sorted(found, key=of), key=of)
    ]


def _summary(one: Series) -> str:
    runs = "1 run" if len(one.values) == 1 else f"{len(one.values)} runs"
    return f"{runs}, now {_quantity(one.values[-1], one.metric)}"


def _quantity(value: float, metric: str) -> str:
    if metric.endswith("_s"):
        for factor, unit in ((1.0, "s"), (1e3, "ms"), (1e6, "us")):
            if value * factor >= 1:
                return f"{value * factor:.4g} {unit}"
        return f"{value * 1e9:.4g} ns"
    return f"{value / 2**20:,.1f} MiB" if metric.endswith("_bytes") else f"{value:,.6g}"


def _figure(one: Series) -> str:
    points = _points(one.values)
    dots = "".join(
        f'<circle cx="{x:.1f}" cy="{y:.1f}" r="2.5"><title>{html.escape(code)}, '
        f"{html.escape(created[:10])}: {_quantity(value, one.metric)}</title></circle>"
        for (x, y), code, created, value in zip(
            points, one.codes, one.created_at, one.values, strict=True
        )
    )
    marks = ""
    for change in one.changes:
        x = (points[change.at - 1][0] + points[change.at][0]) / 2
        marks += f'<line x1="{x:.1f}" x2="{x:.1f}" y1="0" y2="{_HEIGHT}"/>'
    path = " ".join(f"{x:.1f},{y:.1f}" for x, y in points)
    said = html.escape("; ".join([_summary(one), *changes(one)]))
    return (
        f'<h3>{html.escape(one.case.label)}</h3><figure><svg viewBox="0 0 {_WIDTH} {_HEIGHT}" '
        f'role="img" aria-label="{said}">{marks}<polyline points="{path}"/>{dots}</svg>'
        f"<figcaption>{said}</figcaption></figure>"
    )


def _points(values: Sequence[float]) -> list[tuple[float, float]]:
    """Place values by the logarithm, at least 5 % high."""
    logs = [math.log(value) for value in values]
    middle = (max(logs) + min(logs)) / 2
    span = max(max(logs) - min(logs), 0.05)
    step = (_WIDTH - 2 * _MARGIN) / max(len(logs) - 1, 1)
    return [
        (_MARGIN + i * step, _HEIGHT / 2 - (value - middle) / span * (_HEIGHT - 2 * _MARGIN))
        for i, value in enumerate(logs)
    ]
