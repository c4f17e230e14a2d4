"""Static charts for READMEs and papers: the page's figures as SVG, light and dark in one file."""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import Any, cast

import jinja2

from mambench.reports import figures
from mambench.reports.figures import Chart, Figure
from mambench.reports.rows import Report, Slice
from mambench.reports.style import Style, styles

WIDTH, HEIGHT = 860, 460
LEFT, RIGHT, TOP, BOTTOM = 84, 190, 64, 56
_DASHES = {
    "solid": "",
    "dash": "8 5",
    "dot": "2 4",
    "dashdot": "8 3 2 3",
    "longdash": "12 5",
    "longdashdot": "12 3 2 3",
}
_LABEL_STEP = 17.0  # least distance of two labels at the lines' ends


@dataclass(frozen=True, kw_only=True)
class Curve:
    """A line in the picture's coordinates, and where its label stands."""

    label: str
    look: Style
    rank: int
    points: tuple[tuple[float, float], ...]
    label_y: float
    open: bool
    marker: str
    dash: str  # SVG's stroke-dasharray
    gaps: tuple[bool, ...]  # by point, whether gaps between launches are in it

    @property
    def shapes(self) -> list[str]:
        """Path of the marker at each point that has no gaps."""
        return self._shapes(gaps=False)

    @property
    def hollow(self) -> list[str]:
        """Path of the marker at each point that has."""
        return self._shapes(gaps=True)

    def _shapes(self, *, gaps: bool) -> list[str]:
        points = zip(self.points, self.gaps, strict=True)
        return [_marker(self.marker, x, y) for (x, y), has in points if has is gaps]


def chart(
    report: Report, part: Slice, kind: Chart = figures.CHARTS[0], *, inline: bool = False
) -> str:
    """Return one chart over sequence length; equal rows give an equal file.

    `inline` leaves out title and background and takes the page's colours: for use in HTML.
    """
    figure = figures.resolve(figures.over_length(report, part, kind), report.rows)
    layout = figure["layout"]
    curves = _curves(figure, styles(report.implementations), _gaps(report, kind))
    ticks = {name: _ticks(layout[name], name) for name in ("xaxis", "yaxis")}
    environment = jinja2.Environment(
        loader=jinja2.FileSystemLoader(Path(__file__).parent / "templates"),
        autoescape=True,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    return environment.get_template("chart.svg.j2").render(
        inline=inline,
        width=WIDTH,
        height=HEIGHT,
        box=(LEFT, TOP, WIDTH - RIGHT, HEIGHT - BOTTOM),
        title=f"{kind.title} against sequence length",
        subtitle=f"{part.device}: {part.title}",
        axes=(layout["xaxis"]["title"]["text"], layout["yaxis"]["title"]["text"]),
        ticks=ticks,
        curves=curves,
        note=figures.HOLLOW if any(curve.hollow for curve in curves) else "",
    )


def _gaps(report: Report, kind: Chart) -> Sequence[bool]:
    """Return of each row whether gaps between launches are in what a chart shows."""
    timed = kind.metric in figures.TIMED
    return [timed and row.result.launch_gaps for row in report.rows]


def _curves(figure: Figure, looks: Any, gaps: Sequence[bool]) -> list[Curve]:
    layout = figure["layout"]
    lines = [trace for trace in figure["data"] if not trace["meta"].get("failure")]
    placed = [
        [
            (_place(x, layout["xaxis"], "xaxis"), _place(y, layout["yaxis"], "yaxis"))
            for x, y in zip(trace["x"], trace["y"], strict=True)
        ]
        for trace in lines
    ]
    heights = _apart([points[-1][1] for points in placed])
    return [
        Curve(
            label=_short(trace["name"]),
            look=looks[trace["meta"]["implementation"]],
            rank=rank,
            points=tuple((round(x, 1), round(y, 1)) for x, y in points),
            label_y=round(height, 1),
            open=trace["marker"]["symbol"].endswith("-open"),
            marker=trace["marker"]["symbol"].removesuffix("-open"),
            dash=_DASHES[trace["line"]["dash"]],
            gaps=tuple(gaps[index] for index in cast("Sequence[int]", trace["customdata"])),
        )
        for rank, (trace, points, height) in enumerate(zip(lines, placed, heights, strict=True))
    ]


def _short(label: str, most: int = 26) -> str:
    return label if len(label) <= most else label[: most - 1] + "…"


def _place(value: float, axis: Figure, name: str) -> float:
    low, high = axis["range"]
    share = (math.log10(value) - low) / (high - low)
    if name == "xaxis":
        return LEFT + share * (WIDTH - RIGHT - LEFT)
    return HEIGHT - BOTTOM - share * (HEIGHT - BOTTOM - TOP)


def _ticks(axis: Figure, name: str) -> list[tuple[float, str]]:
    if "range" not in axis:
        return []
    low, high = axis["range"]
    return [
        (round(_place(value, axis, name), 1), text)
        for value, text in zip(axis["tickvals"], axis["ticktext"], strict=True)
        if low <= math.log10(value) <= high
    ]


def _apart(heights: list[float]) -> list[float]:
    """Move labels apart, keeping their order, until none overlaps another or leaves the picture."""
    order = sorted(range(len(heights)), key=lambda i: heights[i])
    moved = list(heights)
    for above, below in pairwise(order):
        moved[below] = max(moved[below], moved[above] + _LABEL_STEP)
    limit = HEIGHT - BOTTOM
    for i in reversed(order):
        moved[i] = min(moved[i], limit)
        limit = moved[i] - _LABEL_STEP
    return moved


def _marker(shape: str, x: float, y: float, r: float = 4.2) -> str:
    """Return the path of a marker; circles are two arcs."""
    corners = {
        "square": [(-1, -1), (1, -1), (1, 1), (-1, 1)],
        "diamond": [(0, -1.35), (1.35, 0), (0, 1.35), (-1.35, 0)],
        "triangle-up": [(0, -1.3), (1.2, 1), (-1.2, 1)],
        "triangle-down": [(0, 1.3), (1.2, -1), (-1.2, -1)],
        "bowtie": [(-1.2, -1), (0, 0), (1.2, -1), (1.2, 1), (0, 0), (-1.2, 1)],
        "cross": [
            *((-0.4, -1.2), (0.4, -1.2), (0.4, -0.4), (1.2, -0.4), (1.2, 0.4), (0.4, 0.4)),
            *((0.4, 1.2), (-0.4, 1.2), (-0.4, 0.4), (-1.2, 0.4), (-1.2, -0.4), (-0.4, -0.4)),
        ],
    }.get(shape) or _polygon(shape)
    if not corners:
        return f"M{x - r:.1f} {y:.1f}a{r} {r} 0 1 0 {2 * r} 0a{r} {r} 0 1 0 {-2 * r} 0z"
    return "M" + "L".join(f"{x + dx * r:.1f} {y + dy * r:.1f}" for dx, dy in corners) + "z"


def _polygon(shape: str) -> list[tuple[float, float]]:
    """Corners of the regular markers; none for a circle."""
    count, radii = {"hexagon": (6, (1.2,)), "pentagon": (5, (1.25,)), "star": (10, (1.4, 0.6))}.get(
        shape, (0, (1.0,))
    )
    turns = [(2 * math.pi * i / count, radii[i % len(radii)]) for i in range(count)]
    return [(radius * math.sin(a), -radius * math.cos(a)) for a, radius in turns]
