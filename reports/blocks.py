"""Whole blocks side by side: tokens per second and peak memory against batch and length.

One table for each pass and dtype of a run's block level. A row is a batch and a length, an
implementation has two columns. The fastest and the leanest of a row are bold; times within what two
processes differ anyhow name no fastest.
"""

from collections import defaultdict
from collections.abc import Sequence

from mambench.harness.analysis.results import Analysis, Result
from mambench.harness.curves import PROCESS_FRAC
from mambench.harness.errors import RunFolderError
from mambench.harness.spec import Case, DType, Family, Level, Outcome, Pass
from mambench.reports import units
from mambench.reports.markdown import escape

_NAMES = {Family.ATTENTION: "transformer", Family.S6: "Mamba", Family.SSD: "Mamba-2"}


def table(analysis: Analysis, *, pass_: str | None = None, dtype: str | None = None) -> str:
    """Return the tables as Markdown, each with a sentence that says what its columns are.

    Args:
        analysis: of one run on one machine.
        pass_, dtype: only these, if given.

    Raises RunFolderError where the run has no such case at block level.
    """
    groups: dict[tuple[Pass, DType], list[Result]] = defaultdict(list)
    for result in analysis.results:
        case = result.case
        chosen = pass_ in (None, case.pass_.value) and dtype in (None, case.dtype.value)
        if case.problem.level is Level.BLOCK and chosen:
            groups[case.pass_, case.dtype].append(result)
    if not groups:
        wanted = " ".join(word for word in (pass_, dtype) if word)
        raise RunFolderError(f"the run has no {wanted or 'case'} at block level")
    order = sorted(groups, key=lambda key: (list(Pass).index(key[0]), key[1].value))
    return "\n\n".join(_table(groups[key], *key) for key in order)


def _table(results: Sequence[Result], pass_: Pass, dtype: DType) -> str:
    columns = sorted({_column(r.case) for r in results}, key=_place)
    cells: dict[tuple[int, int], dict[tuple[Family, str], Result]] = defaultdict(dict)
    for result in results:
        problem = result.case.problem
        cells[problem.batch, problem.length][_column(result.case)] = result
    heads = [_NAMES[family] for family, _ in columns]
    if len(set(heads)) < len(heads):
        heads = [f"{head} {who}" for head, (_, who) in zip(heads, columns, strict=True)]
    titles = [f"{head}, tokens/s" for head in heads] + [f"{head}, memory" for head in heads]
    lines = [
        _sentence(results, columns, pass_, dtype),
        "",
        f"| B | L | {' | '.join(map(escape, titles))} |",
        f"|---:|---:|{'---:|' * len(titles)}",
    ]
    for (batch, seqlen), row in sorted(cells.items()):
        found = [row.get(column) for column in columns]
        speeds, sizes = _speeds(found), _sizes(found)
        lines.append(f"| {batch} | {units.count(seqlen)} | {' | '.join([*speeds, *sizes])} |")
    return "\n".join(lines)


def _sentence(
    results: Sequence[Result], columns: Sequence[tuple[Family, str]], pass_: Pass, dtype: DType
) -> str:
    """Say what is compared: who mixes, how wide, how many weights."""
    parts: list[str] = []
    for column in columns:
        of_column = [r for r in results if _column(r.case) == column]
        problem = of_column[0].case.problem
        weights = next((r.weight_count for r in of_column if r.weight_count), None)
        said = [f"{column[1]}"]
        said += [f"N = {problem.d_state}"] if problem.d_state else []
        said += [f"{units.digits(weights / 1e6)} M weights"] if weights else []
        parts.append(f"{_NAMES[column[0]]} ({', '.join(said)})")
    widths = sorted({r.case.problem.d_model for r in results if r.case.problem.d_model})
    width = f", d_model {', '.join(map(units.count, widths))}" if widths else ""
    return escape(f"Blocks, {pass_.value}, {dtype.value}{width}: {'; '.join(parts)}.")


def _speeds(found: Sequence[Result | None]) -> list[str]:
    values = [r.tokens_per_s if r and r.outcome is Outcome.OK else None for r in found]
    known = sorted((value for value in values if value is not None), reverse=True)
    clear = len(known) > 1 and known[0] > known[1] * (1 + PROCESS_FRAC)
    texts: list[str] = []
    for result, value in zip(found, values, strict=True):
        text = _ending(result) if value is None else units.si(value, "").strip()
        texts.append(f"**{text}**" if clear and value == known[0] else text)
    return texts


def _sizes(found: Sequence[Result | None]) -> list[str]:
    values = [r.peak_memory_bytes if r and r.outcome is Outcome.OK else None for r in found]
    known = sorted(value for value in values if value is not None)
    texts: list[str] = []
    for result, value in zip(found, values, strict=True):
        text = _ending(result) if value is None else units.memory(value)
        texts.append(f"**{text}**" if len(known) > 1 and value == known[0] else text)
    return texts


def _ending(result: Result | None) -> str:
    """How a result without the value ended; a row may lack an implementation."""
    if result is None or result.outcome is Outcome.OK:
        return units.MISSING
    return result.outcome.value


def _place(column: tuple[Family, str]) -> tuple[int, str]:
    return list(_NAMES).index(column[0]), column[1]


def _column(case: Case) -> tuple[Family, str]:
    return case.problem.family, f"{case.implementation}:{case.variant}"
