"""Records -> typed rows -> figures -> one offline HTML file."""

from collections.abc import Sequence
from pathlib import Path


def build(run_folders: Sequence[Path], output: Path) -> Path:
    """Write the HTML report of one or several runs; see `mambench.reports.page.build`."""
    from mambench.reports import page

    return page.build(run_folders, output)


def index_page(folder: Path, output: Path | None = None) -> Path:
    """Write the page over all runs below a folder; see `mambench.reports.index.build`."""
    from mambench.reports import index

    return index.build(folder, output)


def write_figures(
    run_folders: Sequence[Path], folder: Path, *, png: bool = True
) -> tuple[Path, ...]:
    """Write every chart as a file; see `mambench.reports.static.write`."""
    from mambench.reports import static

    return static.write(run_folders, folder, png=png)


def write_parquet(run_folders: Sequence[Path], path: Path) -> Path:
    """Write the results of one or several runs as Parquet.

    Raises RunFolderError where a folder is not a sound run, UsageError without pyarrow.
    """
    from mambench.harness.analysis import loading
    from mambench.reports import export, rows

    return export.to_parquet(rows.make(loading.load(run_folders)), path)


FORMATS = ("text", "markdown", "csv", "json", "pytest-benchmark")


def render(run_folders: Sequence[Path], format: str) -> str:
    """Return the report of one or several runs in one of `FORMATS`.

    Raises RunFolderError where a folder is not a sound run, UsageError for another format.
    """
    from mambench.harness.analysis import loading
    from mambench.harness.errors import UsageError, unknown_name
    from mambench.reports import export, markdown, pytest_benchmark, rows, text

    writers = {
        "text": text.render,
        "markdown": markdown.render,
        "csv": export.to_csv,
        "json": export.to_json,
        "pytest-benchmark": pytest_benchmark.render,
    }
    if format not in writers:
        raise UsageError(unknown_name("format", format, FORMATS))
    return writers[format](rows.make(loading.load(run_folders)))
