"""Ours against the best peer as bars: one SVG, light and dark, from the rows of `ratios`."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import jinja2

from mambench.harness.spec import Family
from mambench.reports import units
from mambench.reports.ratios import Ratio, described
from mambench.reports.style import Style, styles

WIDTH, TOP, STEP, BAR, BOTTOM = 980, 66, 24, 15, 30
LEFT, RIGHT = 330, 300  # of the bars: names stand before them, times after
_OURS = {Family.S6: "selective_scan", Family.SSD: "ssd"}  # whose colours the families have


@dataclass(frozen=True, kw_only=True)
class Bar:
    """One question in the picture's coordinates."""

    label: str
    y: int
    length: float
    look: Style
    behind: bool  # a peer is ahead
    value: str
    times: str


def chart(ratios: Sequence[Ratio], *, subtitle: str) -> str:
    """Return a bar for every question with a ratio, `peer / ours` long; a line stands at 1.

    Raises ValueError where there is none.
    """
    shown = [(ratio, ratio.value) for ratio in ratios if ratio.value is not None]
    if not shown:
        raise ValueError("expected a question that ours and a peer answered, got none")
    most = max(1.0, *(value for _, value in shown))
    scale = (WIDTH - LEFT - RIGHT) / most
    looks = styles(_OURS.values())
    bars = [
        Bar(
            label=ratio.label,
            y=TOP + STEP * place,
            length=round(scale * value, 1),
            look=looks[_OURS[ratio.problem.family]],
            behind=ratio.peer is not None and ratio.winner is ratio.peer,
            value=f"{units.digits(value)}{units.TIMES}",
            times=described(ratio),
        )
        for place, (ratio, value) in enumerate(shown)
    ]
    environment = jinja2.Environment(
        loader=jinja2.FileSystemLoader(Path(__file__).parent / "templates"),
        autoescape=True,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    return environment.get_template("bars.svg.j2").render(
        width=WIDTH,
        height=TOP + STEP * len(bars) + BOTTOM,
        left=LEFT,
        one=round(LEFT + scale, 1),
        top=TOP - 8,
        bottom=TOP + STEP * len(bars),
        bar=BAR,
        title="Times faster than the fastest other project's kernel",
        subtitle=subtitle,
        bars=bars,
    )
