"""A page over many runs: what each asked, of what, on which machine, and what it found.

It has no script: it is meant for the artifacts of a CI job and for static sites.
"""

import os
from dataclasses import dataclass
from pathlib import Path
from urllib.parse import quote

from mambench.harness.analysis import loading
from mambench.harness.analysis.runs import Run
from mambench.harness.errors import RunFolderError
from mambench.harness.spec import Outcome
from mambench.reports import page, rows, summary, verdicts

PAGE = "report.html"


@dataclass(frozen=True, kw_only=True)
class Entry:
    """One run on the index."""

    run: Run
    device: str
    cases: int
    ok: int
    answer: str  # of its most informative selection
    where: str
    verdict: str | None
    link: str  # to its report, relative to the index


@dataclass(frozen=True, kw_only=True)
class Unread:
    """A folder that looks like a run and is none."""

    path: str
    reason: str


def build(folder: Path, output: Path | None = None) -> Path:
    """Write the index of all runs below a folder, newest first, and return its path.

    A run without a report gets one. Raises RunFolderError if the folder is none; a run that cannot
    be read stands on the page with the reason.
    """
    output = output or folder / "index.html"
    found, unread = collect(folder, output.parent)
    template = page.environment().get_template("index.html.j2")
    css, name = page.stylesheet("report.css"), folder.resolve().name
    html = template.render(entries=found, unread=unread, css=css, folder=name)
    page.write_atomically(output, html)
    return output


def collect(folder: Path, beside: Path) -> tuple[list[Entry], list[Unread]]:
    """Return the runs below a folder, newest first, and what could not be read."""
    if not folder.is_dir():
        raise RunFolderError(f"{folder} is not a folder: name one that holds runs.")
    found: list[Entry] = []
    unread: list[Unread] = []
    for manifest in sorted(folder.rglob("manifest.json")):
        try:
            found.append(_entry(manifest.parent, beside))
        except RunFolderError as error:
            unread.append(Unread(path=str(manifest.parent.relative_to(folder)), reason=str(error)))
    return sorted(found, key=lambda entry: entry.run.created_at, reverse=True), unread


def _entry(path: Path, beside: Path) -> Entry:
    report = rows.make(loading.load([path]))
    run = report.analysis.runs[0]
    first = summary.summarise_slice(report.slices[0]) if report.slices else None
    if not (path / PAGE).exists():
        page.write_atomically(path / PAGE, page.render(report))
    judged = verdicts.load([run])
    return Entry(
        run=run,
        device=report.sources[0].label,
        cases=len(report.rows),
        ok=sum(row.outcome is Outcome.OK for row in report.rows),
        answer=first.crossing if first else "No case yet.",
        where=first.part.title if first else "",
        verdict=judged[0].conclusion if judged else None,
        link=_link(path / PAGE, beside),
    )


def _link(target: Path, beside: Path) -> str:
    return quote(Path(os.path.relpath(target.resolve(), beside.resolve())).as_posix())
