"""Keep the figures in documents equal to the published runs that they come from.

A document holds blocks

    <!-- figures:begin NAME -->
    anything; it is replaced
    <!-- figures:end -->

where NAME is a run folder below `published/`, optionally followed by filters of the page's kind
(`level=op pass=forward dtype=bf16 batch=1 width=2048`) that choose the selection; without, the most
informative one is shown. Each block gets provenance, a chart, and the table of times.

With `table=ratios` a block is the table "ours / best peer" instead, of all questions that ours and
a peer were asked; `metric=TAG` chooses another metric than time_s, `ours=` and `peers=` other
implementations (names or globs, separated by commas), `pass=` and `dtype=` some of the questions;
with `chart=bars` bars of the ratios stand before it.
`table=blocks` shows tokens per second and peak memory of whole blocks, of all passes and dtypes or
of those named by `pass=` and `dtype=`.
`table=traffic` shows counted beside modelled bytes, `table=memory` what a token adds to memory (of
one `batch=`), `table=pace` the time per token over the length,
`table=repeat other=RUN` how well a second run of the same cases agrees,
`table=selftest` the file `selftest.json` in the named folder; of a file named without its `.json`,
`table=gate` what repeated checks ended in, and `table=compiled` what kernels compile to.
"""

import os
import re
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import mambench
from mambench.harness.analysis import loading
from mambench.harness.analysis.results import Analysis
from mambench.harness.errors import UsageError, unknown_name
from mambench.reports import (
    bars,
    blocks,
    compiled,
    gates,
    growth,
    markdown,
    pace,
    ratios,
    rows,
    summary,
    svg,
    tables,
)
from mambench.reports.page import write_atomically
from mambench.reports.rows import Report, Slice

_BEGIN = re.compile(r"<!-- figures:begin (?P<spec>[^\n]*?) -->")
_BLOCK = re.compile(_BEGIN.pattern + r".*?<!-- figures:end -->", re.DOTALL)
_FILTERS: tuple[str, ...] = ("level", "pass", "dtype", "batch", "width")
_TABLES: tuple[str, ...] = (
    "ratios",
    "blocks",
    "traffic",
    "memory",
    "pace",
    "repeat",
    "selftest",
    "gate",
    "compiled",
)
_RATIO_WORDS: tuple[str, ...] = ("table", "chart", "metric", "ours", "peers", "pass", "dtype")


@dataclass(frozen=True, kw_only=True)
class Rendered:
    """A document as it should be, and the charts it shows."""

    text: str
    charts: Mapping[Path, str]


def refresh(documents: Sequence[Path], published: Path) -> list[Path]:
    """Bring documents and their charts up to date; returns the files that changed."""
    changed: list[Path] = []
    for document in documents:
        made = render(document, published)
        for path, text in ((document, made.text), *made.charts.items()):
            if not path.exists() or path.read_text(encoding="utf-8") != text:
                write_atomically(path, text)
                changed.append(path)
    return changed


def render(document: Path, published: Path) -> Rendered:
    """Return a document with all blocks made anew; raises UsageError where one names no run."""
    charts: dict[Path, str] = {}

    def replaced(match: re.Match[str]) -> str:
        body = _body(match["spec"], document, published, charts)
        return f"<!-- figures:begin {match['spec']} -->\n{body}\n<!-- figures:end -->"

    text = document.read_text(encoding="utf-8")
    if len(_BEGIN.findall(text)) != len(_BLOCK.findall(text)):
        raise UsageError(f"{document}: a 'figures:begin' has no 'figures:end'.")
    return Rendered(text=_BLOCK.sub(replaced, text), charts=charts)


def _body(spec: str, document: Path, published: Path, charts: dict[Path, str]) -> str:
    name, *filters = spec.split()
    if "table=selftest" in filters:
        return tables.selftest(published / name / "selftest.json")
    if "table=gate" in filters:
        return gates.table(published / f"{name}.json")
    if "table=compiled" in filters:
        return compiled.table(published / f"{name}.json")
    known = sorted(path.parent.name for path in published.glob("*/manifest.json"))
    if name not in known:
        raise UsageError(f"{document}: {unknown_name('published run', name, known)}")
    made = loading.load([published / name])
    where = f"{document}, table of {name}"
    table = dict(word.split("=", 1) for word in filters if "=" in word).get("table")
    if table == "pace":
        return "\n\n".join([pace.table(made), markdown.provenance(made.sources[0])])
    if table == "traffic":
        return "\n\n".join([tables.traffic(made), markdown.provenance(made.sources[0])])
    if table == "memory":
        batch = _words(filters, ("table", "batch"), where).get("batch")
        if batch is not None and not batch.isdigit():
            raise UsageError(f"{where}: batch={batch} is no whole number.")
        shown = growth.table(made, batch=int(batch) if batch else None)
        return "\n\n".join([shown, markdown.provenance(made.sources[0])])
    if table == "blocks":
        words = _words(filters, ("table", "pass", "dtype"), where)
        shown = blocks.table(made, pass_=words.get("pass"), dtype=words.get("dtype"))
        return "\n\n".join([shown, markdown.provenance(made.sources[0])])
    if table == "repeat":
        other = _words(filters, ("table", "other"), where).get("other", "")
        if other not in known:
            raise UsageError(f"{where}: {unknown_name('published run', other, known)}")
        again = loading.load([published / other])
        stated = [markdown.provenance(each.sources[0]) for each in (made, again)]
        return "\n\n".join([tables.repeat(made, again), *stated])
    if table is not None:
        return _ratios(made, filters, where, _Place(document, published / name, charts))
    report = rows.make(made)
    part = _chosen(report, filters, f"{document}, figures of {name}")
    entry = summary.summarise_slice(part)
    picture = published / name / f"time-{'-'.join(str(word) for word in part.key[1:])}.svg"
    charts[picture] = svg.chart(report, part)
    image = _image(f"Time against sequence length. {entry.crossing}", picture, document)
    return "\n\n".join([image, markdown.block(entry), markdown.provenance(report.sources[0])])


def _image(said: str, picture: Path, document: Path) -> str:
    link = Path(os.path.relpath(picture, document.parent)).as_posix()
    return f"![{markdown.escape(said)}]({link})"


@dataclass(frozen=True)
class _Place:
    """Where a block's picture goes, and the document that shows it."""

    document: Path
    folder: Path
    charts: dict[Path, str]


def _ratios(made: Analysis, words: Sequence[str], where: str, place: _Place) -> str:
    wanted = _words(words, _RATIO_WORDS, where)
    if wanted["table"] != "ratios":
        raise UsageError(f"{where}: {unknown_name('table', wanted['table'], _TABLES)}")
    chosen = ratios.make(
        made,
        ours=wanted["ours"].split(",") if "ours" in wanted else ratios.OURS,
        peers=wanted["peers"].split(",") if "peers" in wanted else ratios.PEERS,
        metric=wanted.get("metric", "time_s"),
    )
    for name, attribute in (("pass", "pass_"), ("dtype", "dtype")):
        chosen = [
            r for r in chosen if getattr(r, attribute) == wanted.get(name, getattr(r, attribute))
        ]
    if not chosen:
        raise UsageError(f"{where}: no question was asked of ours and of a peer.")
    shown = [ratios.table(chosen), markdown.provenance(made.sources[0])]
    if "chart" in wanted:
        if wanted["chart"] != "bars":
            raise UsageError(f"{where}: {unknown_name('chart', wanted['chart'], ('bars',))}")
        picture = place.folder / f"ratios-{wanted.get('pass', 'all')}.svg"
        subtitle = f"{made.sources[0].device_name}: GPU time of ours, of the other"
        place.charts[picture] = bars.chart(chosen, subtitle=subtitle)
        shown.insert(0, _image(ratios.sentences(chosen), picture, place.document))
    return "\n\n".join(shown)


def _words(filters: Sequence[str], known: Sequence[str], where: str) -> dict[str, str]:
    wanted = {name: value for name, _, value in (text.partition("=") for text in filters)}
    for name in wanted:
        if name not in known:
            raise UsageError(f"{where}: {unknown_name('filter', name, known)}")
    return wanted


def _chosen(report: Report, filters: Sequence[str], where: str) -> Slice:
    wanted = _words(filters, _FILTERS, where)
    for part in report.slices:
        have: dict[str, str] = dict(zip(_FILTERS, map(str, part.key[1:]), strict=True))
        if all(have[name] == value for name, value in wanted.items()):
            return part
    raise UsageError(f"{where}: no selection has {' '.join(filters) or 'a case'}.")


def main(arguments: Sequence[str]) -> None:
    """Bring the documents named up to date: `_start.py reports.readme FILE...`."""
    documents = [Path(argument).resolve() for argument in arguments]
    for changed in refresh(documents, Path(mambench.__file__).resolve().parents[1] / "published"):
        print(changed)


if __name__ == "__main__":
    main(sys.argv[1:])
