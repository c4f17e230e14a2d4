"""Tables for documents that judge the measuring itself: traffic, repeatability, the selftest."""

import json
import math
from pathlib import Path
from statistics import geometric_mean
from typing import Any

from mambench.harness.analysis import Analysis, Result
from mambench.harness.errors import RunFolderError
from mambench.harness.spec import Case, Outcome
from mambench.reports import units
from mambench.reports.markdown import escape

_CLOSE = 0.02  # cells of two runs that differ by less agree


def traffic(analysis: Analysis) -> str:
    """Return the bytes that counters saw beside those that any implementation must move.

    One row per case that was asked for its traffic; a case without says why. Sorted by family,
    pass and ratio, the least first.
    """
    rows = [r for r in analysis.results if "dram_bytes" in r.values or "dram_bytes" in r.missing]
    if not rows:
        return "No case was asked for its traffic."
    lines = [
        "| pass | implementation | at least (modelled) | HBM (counted) | counted / modelled |",
        "|---|---|---:|---:|---:|",
    ]
    return "\n".join([*lines, *map(_traffic_line, sorted(rows, key=_by_ratio))])


def _traffic_line(result: Result) -> str:
    least = result.compulsory_bytes
    modelled = units.MISSING if least is None else units.memory(least)
    counted, ratio = result.value("dram_bytes"), result.value("traffic_ratio")
    if counted is None:
        seen = escape(result.missing.get("dram_bytes") or result.reason or "not counted")
    else:
        seen = units.memory(counted)
    times = units.MISSING if ratio is None else f"{units.digits(ratio)}{units.TIMES}"
    return f"| {result.case.pass_.value} | {_name(result.case)} | {modelled} | {seen} | {times} |"


def _by_ratio(result: Result) -> tuple[str, str, float, str]:
    case, ratio = result.case, result.value("traffic_ratio")
    least = math.inf if ratio is None else ratio
    return case.problem.family.value, case.pass_.value, least, _name(case)


def repeat(first: Analysis, second: Analysis) -> str:
    """Return how well two runs of the same cases on one machine agree, as sentences and a table.

    Raises RunFolderError where the runs share no case that was measured in both.
    """
    ratios = _ratios(first, second)
    if not ratios:
        raise RunFolderError("the runs share no case that was measured in both")
    values = list(ratios.values())
    close = sum(abs(value - 1) <= _CLOSE for value in values) / len(values)
    said = (
        f"{len(values)} cases, each measured in both runs: geometric mean of the ratios "
        f"{geometric_mean(values):.4f}; {close:.0%} of the cases within {_CLOSE:.0%}; "
        f"from {min(values):.3f} to {max(values):.3f}."
    )
    lines = [
        "| implementation | cases | geometric mean | farthest from 1 |",
        "|---|---:|---:|---:|",
    ]
    groups: dict[str, list[float]] = {}
    for case, value in ratios.items():
        groups.setdefault(_name(case), []).append(value)
    for name, group in sorted(groups.items()):
        farthest = max(group, key=lambda value: abs(math.log(value)))
        lines.append(f"| {name} | {len(group)} | {geometric_mean(group):.4f} | {farthest:.3f} |")
    return "\n".join([said, "", *lines])


def _ratios(first: Analysis, second: Analysis) -> dict[Case, float]:
    """Return second over first, by case; one machine each, as the store keeps runs."""
    before = {r.case: r.time_s for r in first.results if r.outcome is Outcome.OK and r.time_s}
    return {
        r.case: r.time_s / before[r.case]
        for r in second.results
        if r.outcome is Outcome.OK and r.time_s and before.get(r.case)
    }


def selftest(path: Path) -> str:
    """Return what `run_bench.py selftest -o FILE` wrote, one row per check.

    Raises RunFolderError where the file is none of its results.
    """
    try:
        result: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
        counts, checks = result["counts"], result["checks"]
        device, when, code = result["device"]["name"], result["ran_at"], result["code"]
        rows = [
            f"| {escape(c['verdict'])} | {escape(c['part'])} | {escape(c['what'])} | "
            f"{escape(c['expected'])} | {escape(c['got'] or c['reason'] or '')} |"
            for c in checks
        ]
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise RunFolderError(f"{path}: not the result of a selftest: {error!r}") from error
    said = (
        f"{escape(device)}, {escape(when[:10])}, code {escape(code)}: {counts['passed']} passed, "
        f"{counts['failed']} failed, {counts['skipped']} skipped, in {result['wall_s']:.0f} s."
    )
    head = ["| | part | what | expected | got |", "|---|---|---|---|---|"]
    return "\n".join([said, "", *head, *rows])


def _name(case: Case) -> str:
    return escape(f"{case.problem.family.value} {case.implementation}:{case.variant}")
