"""The folded results as CSV and JSON, one entry per case and machine, quantities in SI."""

import csv
import importlib
import io
import json
from pathlib import Path
from typing import Any

from mambench.harness.analysis.results import columns
from mambench.harness.errors import UsageError
from mambench.reports.rows import Report, environment


def records(report: Report) -> list[dict[str, Any]]:
    """Return one flat dictionary per row, in the order of the report."""
    devices = {row.slice.source: row.device for row in report.rows}
    table = columns([row.result for row in report.rows], devices)
    return [dict(zip(table, values, strict=True)) for values in zip(*table.values(), strict=True)]


def to_csv(report: Report) -> str:
    """Return a table with a header; missing values are empty.

    A text that a spreadsheet would run as a formula gets an apostrophe in front.
    """
    found = records(report)
    out = io.StringIO()
    writer = csv.DictWriter(out, list(found[0]) if found else ["case_id"], lineterminator="\n")
    writer.writeheader()
    for entry in found:
        writer.writerow({key: _cell(value) for key, value in entry.items()})
    return out.getvalue()


def to_parquet(report: Report, path: Path) -> Path:
    """Write the table with its types, missing values null; raises UsageError without pyarrow."""
    import pandas as pd  # pyright: ignore[reportMissingTypeStubs]

    try:
        importlib.import_module("pyarrow")
    except ImportError:
        raise UsageError("Parquet needs pyarrow: pip install 'mambench[parquet]'.") from None
    path.parent.mkdir(parents=True, exist_ok=True)
    table: Any = pd.DataFrame(records(report))
    table.to_parquet(path, index=False)
    return path


def to_json(report: Report) -> str:
    """Return results and the environment of their runs; missing values are null."""
    runs = [run.run_id for run in report.analysis.runs]
    entries = environment(report.analysis.runs)
    return json.dumps(
        {
            "runs": {
                run: {key: values[i] for key, values in entries} for i, run in enumerate(runs)
            },
            "results": records(report),
        },
        indent=1,
        allow_nan=False,
    )


def _cell(value: Any) -> Any:
    return f"'{value}" if isinstance(value, str) and value[:1] in ("=", "+", "-", "@") else value
