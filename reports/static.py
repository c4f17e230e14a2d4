"""Every chart over length as a file, for papers and READMEs: SVG always, PNG where resvg-py is."""

import importlib
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from mambench.harness.analysis import loading
from mambench.harness.errors import UsageError
from mambench.reports import figures, rows, svg
from mambench.reports.page import write_atomically
from mambench.reports.rows import Report

ZOOM = 2  # pixels of a PNG per unit of the SVG
HOW = "PNG needs resvg-py: pip install 'mambench[png]'; SVG needs nothing."


def write(run_folders: Sequence[Path], folder: Path, *, png: bool = True) -> tuple[Path, ...]:
    """Write each selection's charts and return their paths; equal runs give equal SVG.

    Raises RunFolderError where a folder is not a sound run, UsageError if PNG is asked for and
    resvg-py is missing: the SVG files are written before.
    """
    report = rows.make(loading.load(run_folders))
    pictures = charts(report)
    written: list[Path] = []
    for name, text in pictures.items():
        write_atomically(folder / f"{name}.svg", text)
        written.append(folder / f"{name}.svg")
    if png and pictures:
        draw = _rasteriser()
        for name, text in pictures.items():
            path = folder / f"{name}.png"
            path.write_bytes(bytes(draw(svg_string=text, zoom=ZOOM)))
            written.append(path)
    return tuple(written)


def charts(report: Report) -> dict[str, str]:
    """Return SVG by file name, without ending, of every chart that has a point."""
    several = len(report.sources) > 1
    places = {source.key: place for place, source in enumerate(report.sources, start=1)}
    found: dict[str, str] = {}
    for part in report.slices:
        for kind in figures.CHARTS:
            drawn = figures.over_length(report, part, kind)["data"]
            if all(trace["meta"].get("failure") for trace in drawn):
                continue
            words = [kind.name, *([f"machine{places[part.key.source]}"] if several else [])]
            name = "-".join([*words, *(str(word) for word in part.key[1:])])
            found[name] = svg.chart(report, part, kind)
    return found


def _rasteriser() -> Any:
    try:
        return importlib.import_module("resvg_py").svg_to_bytes
    except ImportError:
        raise UsageError(HOW) from None
