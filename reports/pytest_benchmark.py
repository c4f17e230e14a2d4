"""Results as pytest-benchmark's JSON, so that `pytest-benchmark compare` and what reads it work.

Source: pytest-benchmark's documentation, "Comparing past runs", and the files that it writes.
"""

import json
import statistics
from collections.abc import Mapping, Sequence
from typing import Any

from mambench.harness.analysis.results import Result
from mambench.reports.rows import Report

VERSION = "5.1.0"  # of the form of the file


def render(report: Report) -> str:
    """Return the timed results of a report; what has no time is not there."""
    first = report.analysis.runs[0]
    devices = {s.key: {"kind": s.kind, "name": s.device_name} for s in report.analysis.sources}
    commit = str(first.code.get("commit") or "unversioned")
    return json.dumps(
        {
            "machine_info": {
                "node": str(first.device.get("name")),
                "cpu": dict(first.environment.get("cpu") or {}),
                "python_version": str(first.environment.get("python")),
                "system": str(first.environment.get("platform") or ""),
            },
            "commit_info": {
                "id": commit,
                "time": None,
                "author_time": None,
                "dirty": bool(first.code.get("dirty")),
                "project": "mambench",
                "branch": "(unknown)",
            },
            "benchmarks": [
                _benchmark(row.result, devices[row.result.source])
                for row in report.rows
                if row.result.time_s is not None and row.result.samples_s
            ],
            "datetime": first.created_at,
            "version": VERSION,
        },
        indent=1,
        allow_nan=False,
    )


def _benchmark(result: Result, device: Mapping[str, str]) -> dict[str, Any]:
    case = result.case
    return {
        "group": f"{case.problem.family} {case.pass_}",
        "name": case.label,
        "fullname": f"mambench::{case.label}",
        "params": None,
        "param": None,
        "extra_info": {
            "mambench": {"case": case.to_dict(), "case_id": case.case_id, "device": dict(device)}
        },
        "options": {
            **{"disable_gc": False, "timer": result.method or "", "min_rounds": 1},
            **{"max_time": 0.0, "min_time": 0.0, "warmup": True},
        },
        "stats": statistics_of(result.samples_s),
    }


def statistics_of(samples_s: Sequence[float]) -> dict[str, Any]:
    """Return pytest-benchmark's statistics of samples of one execution each."""
    ordered = sorted(samples_s)
    mean, middle = statistics.fmean(ordered), statistics.median(ordered)
    several = len(ordered) > 1
    deviation = statistics.stdev(ordered) if several else 0.0
    q1, q3 = ordered[0], ordered[-1]
    if several:
        q1, _, q3 = statistics.quantiles(ordered, n=4, method="inclusive")
    reach = 1.5 * (q3 - q1)
    inside = [value for value in ordered if q1 - reach <= value <= q3 + reach]
    far = sum(abs(value - mean) > deviation for value in ordered)
    return {
        **{"min": ordered[0], "max": ordered[-1], "mean": mean, "stddev": deviation},
        **{"rounds": len(ordered), "median": middle, "iqr": q3 - q1, "q1": q1, "q3": q3},
        **{"iqr_outliers": len(ordered) - len(inside), "stddev_outliers": far},
        "outliers": f"{far};{len(ordered) - len(inside)}",
        **{"ld15iqr": inside[0], "hd15iqr": inside[-1], "ops": 1 / mean, "total": sum(ordered)},
        **{"data": list(samples_s), "iterations": 1},
    }
