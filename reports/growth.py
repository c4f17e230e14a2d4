"""What grows with the sequence: bytes that each further token adds to a pass, by part.

From measured memory at the shortest and the longest length of a curve: the slope between them is
what a token adds, to inputs (a key-value cache is one), to results, to what is kept for backward
and to the rest, in which kernels keep states between chunks or all of them.
"""

from collections import defaultdict
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from typing import Any

from mambench.harness.analysis.results import Analysis, Result
from mambench.harness.spec import Case, Family, Outcome, Pass
from mambench.reports import units
from mambench.reports.markdown import escape

LARGEST, WORTH_NAMING = 2, 0.01  # tensors, and the least share of the peak

Bytes = Callable[[Result], float | None]


def _rest(result: Result) -> float | None:
    """What the pass allocated beside its results."""
    extra, out = result.extra_memory_bytes, result.value("output_bytes")
    return None if extra is None or out is None else max(0.0, extra - out)


PARTS: Mapping[str, Bytes] = {
    "peak": lambda result: result.peak_memory_bytes,
    "inputs": lambda result: result.value("input_bytes"),
    "results": lambda result: result.value("output_bytes"),
    "kept for backward": lambda result: result.value("saved_bytes"),
    "beside results": _rest,
}


def table(analysis: Analysis, *, batch: int | None = None) -> str:
    """Return the bytes that a token adds to each part, one row per curve of at least two lengths.

    A case without a length (an SSM's decoding) is a row without growth. Sorted by pass and family,
    what grows least first.

    Args:
        analysis: of one machine.
        batch: the batch size; all if None.
    """
    curves: dict[tuple[str, Case], list[Result]] = defaultdict(list)
    for result in analysis.results:
        if result.outcome is Outcome.OK and result.peak_memory_bytes is not None:
            if batch not in (None, result.case.problem.batch):
                continue
            problem = replace(result.case.problem, seqlen=None)
            curves[result.source, replace(result.case, problem=problem)].append(result)
    found = [row for results in curves.values() if (row := _ends(results)) is not None]
    if not found:
        return "No memory was measured at two lengths."
    head = ["pass", "implementation", "L", *PARTS, "largest tensors at the longest"]
    lines = [
        "Bytes that a further token adds, measured between the shortest and the longest length.",
        "",
        f"| {' | '.join(head)} |",
        f"|---|---|---|{'---:|' * len(PARTS)}---|",
    ]
    return "\n".join([*lines, *map(_line, sorted(found, key=_order))])


Ends = tuple[Result, Result]


def _ends(results: Sequence[Result]) -> Ends | None:
    """Return the results at the shortest and longest length; a case without a length is both."""
    ordered = sorted(results, key=lambda result: result.case.problem.seqlen or 0)
    if ordered[0].case.problem.seqlen is None:
        return ordered[0], ordered[0]
    return (ordered[0], ordered[-1]) if len(ordered) > 1 else None


def slope(ends: Ends, part: Bytes) -> float | None:
    """Return the bytes that a token adds to a part, None where it was not measured."""
    first, last = ends
    low, high = part(first), part(last)
    if low is None or high is None:
        return None
    short, long = first.case.problem.seqlen, last.case.problem.seqlen
    return 0.0 if short is None or long is None else (high - low) / (long - short)


def _line(ends: Ends) -> str:
    first, last = ends
    lengths = [units.length(result.case.problem.seqlen) for result in ends]
    cells = [
        first.case.pass_.value,
        _name(first.case),
        "any" if first is last else f"{lengths[0]} to {lengths[1]}",
        *(units.memory(slope(ends, part)) for part in PARTS.values()),
        _largest(last),
    ]
    return f"| {' | '.join(cells)} |"


def _largest(result: Result) -> str:
    rows: Sequence[Mapping[str, Any]] = result.found.get("memory", {}).get("largest") or ()
    shares = [(row["name"], row.get("share") or 0.0) for row in rows[:LARGEST]]
    named = [f"{name} {share:.0%}" for name, share in shares if share >= WORTH_NAMING]
    return escape(", ".join(named)) or ("none named" if rows else units.MISSING)


def _name(case: Case) -> str:
    p = case.problem
    sizes = [f"B={p.batch}", *([f"N={p.d_state}"] if p.d_state is not None else [])]
    return escape(f"{p.family.value} {case.implementation}:{case.variant} {' '.join(sizes)}")


def _order(ends: Ends) -> tuple[int, int, float, str]:
    case = ends[0].case
    place = list(Pass).index(case.pass_), list(Family).index(case.problem.family)
    return (*place, slope(ends, PARTS["peak"]) or 0.0, _name(case))
