"""Records -> typed rows -> figures -> one offline HTML file."""

from collections.abc import Sequence
from pathlib import Path


def build(run_folders: Sequence[Path], output: Path) -> Path:
    """Write the HTML report of one or several runs; see `mambench.reports.page.build`."""
    from mambench.reports import page

    return page.build(run_folders, output)
