"""Tables for documents that judge the measuring itself: traffic, repeatability, the selftest."""

import json
import math
from collections.abc import Sequence
from pathlib import Path
from statistics import geometric_mean
from typing import Any

from mambench.harness.analysis.results import Analysis, Result
from mambench.harness.errors import RunFolderError
from mambench.harness.spec import Case, Family, Outcome, Pass
from mambench.reports import units
from mambench.reports.markdown import escape

_CLOSE = 0.02  # cells of two runs that differ by less agree
_FP32 = 4
_RANGE = "\u2020"  # dagger


def traffic(analysis: Analysis) -> str:
    """Return the bytes that counters saw beside those that any implementation must move.

    One row per case that was asked for its traffic; a case without says why. Sorted by family,
    pass and ratio, the least first. Above it stands the condition of L2, and a scan's rows say how
    large all states are, so that it shows who writes them out.
    """
    rows = [r for r in analysis.results if "traffic" in r.found or "dram_bytes" in r.values]
    if not rows:
        return "No case was asked for its traffic."
    lines = [
        f"| pass | implementation |{' sizes |' if _differ(rows) else ''} at least (modelled) "
        "| every state once (modelled) | HBM read | HBM written | counted / modelled |",
        f"|---|---|{'---|' if _differ(rows) else ''}---:|---:|---:|---:|---:|",
    ]
    lines += [_traffic_line(row, sizes=_differ(rows)) for row in sorted(rows, key=_by_ratio)]
    return "\n".join([_conditions(rows), "", *lines, *_footnotes(rows)])


def _conditions(rows: Sequence[Result]) -> str:
    """Say what was counted, at which sizes, and in which condition L2 was."""
    same = "" if _differ(rows) else f" at {_sizes(rows[0].case)}"
    said = f"Bytes of one execution{same}, by hardware counters."
    found = [r.found.get("traffic", {}).get("l2") for r in rows if _counted(r)]
    states = {(l2["before"], l2["after"]) for l2 in found if l2}
    if not found:
        return said
    if len(states) != 1 or not all(found):
        return f"{said} The condition of L2 is not the same, or not known, in all of them."
    ((before, after),) = states
    return (
        f"{said} L2 before: {escape(before)}; caches are not emptied between kernels; "
        f"after: {escape(after)}."
    )


def _footnotes(rows: Sequence[Result]) -> list[str]:
    notes: list[str] = []
    if any(_as_range(row) for row in rows):
        notes += ["", f"{_RANGE} All launches counted as one range; the others kernel by kernel."]
    return notes


def _traffic_line(result: Result, *, sizes: bool) -> str:
    case, least = result.case, result.compulsory_bytes
    cells = [case.pass_.value, _name(case) + (f" {_RANGE}" if _as_range(result) else "")]
    cells += [_sizes(case)] if sizes else []
    cells += [units.memory(value) for value in (least, states_bytes(case))]
    if _counted(result):
        cells += [units.memory(result.value(f"dram_{way}_bytes")) for way in ("read", "write")]
    else:
        why = escape(result.missing.get("dram_bytes") or result.reason or "not counted")
        cells += [why, units.MISSING]
    cells += [units.ratio(result.value("traffic_ratio"))]
    return f"| {' | '.join(cells)} |"


def states_bytes(case: Case) -> int | None:
    """Return the bytes of the state after every token, in fp32; None where there is no state."""
    problem = case.problem
    if problem.d_state is None or problem.seqlen is None:
        return None
    return problem.batch * problem.seqlen * problem.d_inner * problem.d_state * _FP32


def _counted(result: Result) -> bool:
    return result.value("dram_bytes") is not None


def _as_range(result: Result) -> bool:
    return _counted(result) and "proof" in result.found.get("traffic", {})


def _differ(rows: Sequence[Result]) -> bool:
    return len({_sizes(row.case) for row in rows}) > 1


def _sizes(case: Case) -> str:
    p = case.problem
    return f"B={p.batch} L={units.count(p.seqlen)} D={units.count(p.d_inner)} {case.dtype.value}"


def _by_ratio(result: Result) -> tuple[int, int, float, str, str]:
    case, ratio = result.case, result.value("traffic_ratio")
    place = list(Family).index(case.problem.family), list(Pass).index(case.pass_)
    return (*place, math.inf if ratio is None else ratio, _name(case), _sizes(case))


def repeat(first: Analysis, second: Analysis) -> str:
    """Return how well two runs of the same cases on one machine agree, as sentences and a table.

    Raises RunFolderError where the runs share no case that was measured in both.
    """
    ratios = _ratios(first, second)
    if not ratios:
        raise RunFolderError("the runs share no case that was measured in both")
    values = list(ratios.values())
    close = sum(abs(value - 1) <= _CLOSE for value in values)
    said = (
        f"{len(values)} cases, each measured in both runs: geometric mean of the ratios "
        f"{geometric_mean(values):.4f}; {close} of them ({close / len(values):.1%}) within "
        f"{_CLOSE:.0%}; from {min(values):.3f} to {max(values):.3f}."
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
