"""The commands `history add`, `history show` and `import`. Imports only click at module level."""

import json
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path
from typing import Any

import click

from mambench.harness.cli import options
from mambench.harness.errors import UsageError, unknown_name

FORMATS = ("text", "html", "json")

_store = click.option(
    "--store",
    type=Path,
    default=Path("history"),
    metavar="PATH",
    help="A folder with a file for each run, or one NAME.jsonl.  [default: history]",
)


def make(drawn: Callable[[], Any]) -> click.Group:
    """Return the command group; `drawn` imports what draws histories (`mambench.reports.history`).

    It is handed in, because reports import the harness and not the other way round.
    """
    group = click.Group("history", help=_HELP)
    group.add_command(add)
    shown = click.command("show", short_help="Draw each case over commits, and mark its changes.")
    group.add_command(shown(_show_with(drawn)))
    return group


_HELP = "Results over commits, drawn with their change points."


@click.command()
@click.argument("run_dirs", nargs=-1, required=True, type=Path, metavar="RUN_DIR...")
@_store
def add(run_dirs: tuple[Path, ...], store: Path) -> None:
    """Append runs, or the heads of checks, to the store."""
    from mambench.harness import history
    from mambench.harness.cli.gate import head_of

    for path in run_dirs:
        count = history.add(store, head_of(path))
        click.echo(f"{path}: {count} cases added to {store}")


def _show_with(drawn: Callable[[], Any]) -> Callable[..., None]:
    @_store
    @options.filter_option
    @click.option("--metric", default="time_s", metavar="TAG", help="[default: time_s]")
    @click.option(
        *("-f", "--format", "form"),
        type=options.Name("format", lambda: FORMATS),
        default="text",
        metavar="FORMAT",
        help="text, html or json.  [default: text]",
    )
    @click.option(
        *("-o", "--output"),
        type=Path,
        metavar="FILE",
        help="The HTML file.  [default: history.html]",
    )
    def show(
        store: Path, filters: tuple[str, ...], metric: str, form: str, output: Path | None
    ) -> None:
        """Draw each case over commits and mark where its level changes, machine by machine."""
        found = _series(store, filters, metric)
        if form == "html":
            path = drawn().build(found, output or Path("history.html"))
            click.echo(f"history: {path.resolve()}")
        elif form == "json":
            rows = [asdict(one) | {"case": one.case.to_dict()} for one in found]
            click.echo(json.dumps(rows, indent=1))
        else:
            click.echo(drawn().text(found) or "nothing is stored that fits")

    return show


def _series(store: Path, filters: tuple[str, ...], metric: str) -> list[Any]:
    from mambench.harness import history
    from mambench.harness.filters import compile_filter

    if metric not in history.METRICS:
        raise UsageError(unknown_name("metric", metric, history.METRICS))
    keep = [compile_filter(text) for text in filters]
    entries = [e for e in history.read(store) if all(wanted(e.case) for wanted in keep)]
    return list(history.series(entries, metric))


@click.command("import", short_help="Make a run of pytest-benchmark's JSON.")
@click.argument("file", type=Path)
@click.option(
    *("-o", "--output"),
    type=Path,
    metavar="DIR",
    help="The run's folder.  [default: runs/<time>-...]",
)
def import_run(file: Path, output: Path | None) -> None:
    """Make a run of a JSON file of pytest-benchmark, for report, compare and history.

    Only benchmarks that are cases of Mambench can be: see the fixture `mambench_case`.
    """
    from mambench.harness import pytest_benchmark_import

    path, count, left_out = pytest_benchmark_import.read(file, output)
    click.echo(f"{count} cases, {left_out} other benchmarks left out")
    click.echo(f"results: {path.resolve()}")
