"""How an implementation is drawn: colour, marker and dash, the same in every chart.

Colours are told apart by people with the common kinds of colour blindness, and have a contrast of
at least 3:1 to the page in both schemes (tested). Marker and dash say the same without colour.
"""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass

DASHES = ("solid", "dash", "dot", "dashdot", "longdash", "longdashdot")
LIGHT_PAGE, DARK_PAGE = "#ffffff", "#14171c"


@dataclass(frozen=True, kw_only=True)
class Style:
    """One implementation's look; marker and dash are Plotly's names."""

    light: str
    dark: str
    marker: str
    dash: str


# Attention is the reference that the others are held against, hence the neutral colour.
_KNOWN = {
    "flash_attention": Style(light="#24292f", dark="#e6e9ee", marker="square", dash="dash"),
    "selective_scan": Style(light="#0062b1", dark="#5ab0f5", marker="circle", dash="solid"),
    "ssd": Style(light="#c84a00", dark="#ff8a4c", marker="diamond", dash="solid"),
    "associative_scan": Style(light="#00805c", dark="#3ccba0", marker="triangle-up", dash="dot"),
    "naive_recurrence": Style(light="#9a4f96", dark="#d79bd4", marker="cross", dash="dashdot"),
}
# Drawn with equal styles by the blocks around them.
_SPARE = (
    Style(light="#8a6a00", dark="#e3c04a", marker="triangle-down", dash="longdash"),
    Style(light="#0b7f93", dark="#4fc8dc", marker="star", dash="longdashdot"),
    Style(light="#b03060", dark="#f58cb0", marker="hexagon", dash="dot"),
    Style(light="#5b5bd6", dark="#a5a5ff", marker="pentagon", dash="dashdot"),
    Style(light="#6b7280", dark="#a9b1bd", marker="bowtie", dash="dash"),
)
_BASIC = ("circle", "square", "diamond", "cross", "triangle-up", "triangle-down", "star", "hexagon")


def styles(implementations: Iterable[str]) -> Mapping[str, Style]:
    """Return a style for each name: the known ones their own, others in alphabetical order."""
    names = sorted(set(implementations))
    others = [name for name in names if name not in _KNOWN]
    spare = {name: _SPARE[i % len(_SPARE)] for i, name in enumerate(others)}
    return {name: _KNOWN.get(name) or spare[name] for name in names}


def marker(style: Style, *, family_rank: int = 0, variant_rank: int = 0) -> str:
    """Return the marker: open for further families, another shape for further variants."""
    shape = style.marker
    if variant_rank:
        shape = [m for m in _BASIC if m != style.marker][(variant_rank - 1) % (len(_BASIC) - 1)]
    return f"{shape}-open" if family_rank else shape


def contrast(first: str, second: str) -> float:
    """Return the WCAG 2 contrast ratio of two #rrggbb colours."""
    bright, dark = sorted((_luminance(first), _luminance(second)), reverse=True)
    return (bright + 0.05) / (dark + 0.05)


def _luminance(colour: str) -> float:
    channels = [int(colour[i : i + 2], 16) / 255 for i in (1, 3, 5)]
    linear = [c / 12.92 if c <= 0.04045 else ((c + 0.055) / 1.055) ** 2.4 for c in channels]
    return 0.2126 * linear[0] + 0.7152 * linear[1] + 0.0722 * linear[2]
