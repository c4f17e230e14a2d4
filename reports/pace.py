"""Time for each token over the length: whether it stays the same as sequences grow.

A row is a curve of at least two lengths; its last cell says how far the slowest length's time per
token lies above the fastest's.
"""

from collections import defaultdict
from dataclasses import replace

from mambench.harness.analysis.results import Analysis, Result
from mambench.harness.spec import Case, Family, Outcome, Pass
from mambench.reports import units
from mambench.reports.markdown import escape


def table(analysis: Analysis) -> str:
    """Return nanoseconds of GPU time a token, by pass and implementation, of one machine."""
    curves: dict[Case, dict[int, Result]] = defaultdict(dict)
    for result in analysis.results:
        seqlen = result.case.problem.seqlen
        if result.outcome is Outcome.OK and result.time_s and seqlen is not None:
            problem = replace(result.case.problem, seqlen=None)
            curves[replace(result.case, problem=problem)][seqlen] = result
    found = {case: curve for case, curve in curves.items() if len(curve) > 1}
    if not found:
        return "No time was measured at two lengths."
    lengths = sorted({seqlen for curve in found.values() for seqlen in curve})
    head = ["pass", "implementation", *map(units.length, lengths), "slowest over fastest"]
    lines = [
        "Nanoseconds a token, by length.",
        "",
        f"| {' | '.join(head)} |",
        f"|---|---|{'---:|' * (len(lengths) + 1)}",
    ]
    for case in sorted(found, key=_order):
        paces = {seqlen: ns_per_token(result) for seqlen, result in found[case].items()}
        shown = [f"{paces[n]:.3g}" if n in paces else units.MISSING for n in lengths]
        spread = f"+{max(paces.values()) / min(paces.values()) - 1:.1%}"
        lines.append(f"| {' | '.join([case.pass_.value, _name(case), *shown, spread])} |")
    return "\n".join(lines)


def ns_per_token(result: Result) -> float:
    """Return the time of one execution over all tokens of the batch, in nanoseconds."""
    problem, time_s = result.case.problem, result.time_s
    if not time_s or problem.seqlen is None:
        raise ValueError(f"expected a time and a length, got {time_s} and {problem.seqlen}")
    return 1e9 * time_s / (problem.batch * problem.seqlen)


def _name(case: Case) -> str:
    p = case.problem
    sizes = [f"B={p.batch}", *([f"N={p.d_state}"] if p.d_state is not None else [])]
    return escape(f"{p.family.value} {case.implementation}:{case.variant} {' '.join(sizes)}")


def _order(case: Case) -> tuple[int, int, str]:
    return list(Pass).index(case.pass_), list(Family).index(case.problem.family), _name(case)
