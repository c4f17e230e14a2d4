"""The folded results as CSV and JSON, one entry per case and machine, quantities in SI."""

import csv
import io
import json
from typing import Any

from mambench.harness import analysis
from mambench.reports.rows import Report, environment


def records(report: Report) -> list[dict[str, Any]]:
    """Return one flat dictionary per row, in the order of the report."""
    return [analysis.record(row.result, {row.slice.source: row.device}) for row in report.rows]


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
