"""Read run folders and fold them: large ones in two processes, which is done in half the time.

Each process parses the lines of its own cases and folds them. The cases are split in the order of
their first lines, so that one process' results follow the other's as they would from one.
"""

import pickle
from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from itertools import accumulate
from pathlib import Path
from typing import Any

from mambench.harness import beside
from mambench.harness.analysis import runs
from mambench.harness.analysis.folding import fold
from mambench.harness.analysis.results import TAGS, Analysis, Result
from mambench.harness.analysis.runs import Run
from mambench.harness.records import written
from mambench.harness.spec import Case, Outcome
from mambench.harness.store import RunFolder

# Share of the bytes that this process takes: the other one's results have to be sent, too.
OURS = 0.56
LARGE = 4000  # lines, from which on two processes are sooner done
_ID = b'"case_id":"'
_ID_LENGTH = 12

Folders = Mapping[str, Sequence[tuple[Run, RunFolder]]]  # by source
Folded = dict[str, list[Result]]  # by source


def load(run_folders: Sequence[Path]) -> Analysis:
    """Read run folders and fold them; runs of one source are pooled.

    Raises RunFolderError where one is not a sound run folder.
    """
    opened: list[tuple[Run, RunFolder]] = []
    for path in map(Path, run_folders):
        folder = RunFolder.unparsed(path)
        opened.append((runs.make_run(folder.manifest, path, notes=folder.warnings), folder))
    folders = pooled(opened)
    count = sum(len(folder.lines) for _, folder in opened)
    found = _in_two(folders) if beside.worthwhile(count, LARGE) else None
    return assembled(folders, found or _folded(folders, lambda source, line: True))


def pooled(opened: Sequence[tuple[Run, RunFolder]]) -> Folders:
    """Return the runs by source, in the order that they were begun in, each once."""
    by_source: dict[str, list[tuple[Run, RunFolder]]] = {}
    seen: set[str] = set()
    for run, folder in sorted(opened, key=lambda entry: (entry[0].created_at, entry[0].run_id)):
        if run.run_id not in seen:  # a folder that was named twice
            seen.add(run.run_id)
            by_source.setdefault(run.source, []).append((run, folder))
    return by_source


def assembled(folders: Folders, folded: Mapping[str, Sequence[Result]]) -> Analysis:
    """Return the analysis of each source's folded results and of what was planned beside them."""
    results: list[Result] = []
    for source, entries in folders.items():
        planned: list[Mapping[str, Any]] = []
        for _, folder in entries:
            planned += folder.manifest.get("plan") or []
        results += folded[source]
        if planned:
            known = {result.case for result in folded[source]}
            results += _unmeasured(planned, known, source, entries[-1][0].run_id)
    by_source = {source: [run for run, _ in entries] for source, entries in folders.items()}
    return Analysis(sources=runs.sources_of(by_source), results=tuple(results))


def _unmeasured(
    planned: Iterable[Mapping[str, Any]], known: set[Case], source: str, run_id: str
) -> list[Result]:
    """Planned cases that have no observation: outcomes known beforehand, or not run yet."""
    results: list[Result] = []
    done = {written(case.to_dict()) for case in known}
    for entry in planned:
        asked = entry.get("case") or entry
        if written(asked) in done:  # most are, and to make a case of each would be dear
            continue
        case = Case.from_dict(asked)
        if case in known:
            continue
        known.add(case)
        outcome = Outcome(entry.get("outcome") or Outcome.SKIPPED)
        reason = entry.get("reason") or "planned, but not run: the run was interrupted"
        missing = dict.fromkeys(TAGS, "the case was not run")
        results.append(
            Result(
                source=source,
                run_id=run_id,
                case=case,
                outcome=outcome,
                reason=reason,
                missing=missing,
            )
        )
    return results


def _in_two(folders: Folders) -> Folded | None:
    """Return what `_folded` does, or None where the lines do not tell their cases."""
    first = _first_half(folders)
    if first is None:
        return None

    def theirs() -> bytes:
        second = _folded(folders, lambda source, line: (source, _case_id(line)) not in first)
        for results in second.values():
            for result in results:
                _ = result.case.case_id  # which every reader asks for, and which is kept
        return pickle.dumps(second, pickle.HIGHEST_PROTOCOL)

    with beside.making(theirs, fork=True) as made:
        ours = _folded(folders, lambda source, line: (source, _case_id(line)) in first)
        found = pickle.loads(made())
    both = {source: results + found[source] for source, results in ours.items()}
    return both if all(map(_distinct, both.values())) else None


def _first_half(folders: Folders) -> set[tuple[str, bytes]] | None:
    """Return by source the identities of the cases that come first, None if a line has none."""
    sizes: Counter[tuple[str, bytes]] = Counter()
    for source, entries in folders.items():
        for _, folder in entries:
            for line in folder.lines:
                sizes[source, _case_id(line)] += len(line)
    if any(not name for _, name in sizes):
        return None
    most = OURS * sizes.total()
    ends = accumulate(sizes.values())
    return {case for case, end in zip(sizes, ends, strict=True) if end <= most}


def _case_id(line: bytes) -> bytes:
    """Return the identity that a line as `Observation.to_line` writes it ends with."""
    _, found, rest = line.rpartition(_ID)
    return rest[:_ID_LENGTH] if found else b""


def _folded(folders: Folders, chosen: Callable[[str, bytes], bool]) -> Folded:
    """Parse and fold the lines that are chosen by source and content."""
    return {
        source: fold(
            [
                (run.run_id, observation)
                for run, folder in entries
                for observation in folder.parsed(
                    [i for i, line in enumerate(folder.lines) if chosen(source, line)]
                )
            ],
            source,
        )
        for source, entries in folders.items()
    }


def _distinct(results: Sequence[Result]) -> bool:
    """Whether no case was folded by both processes, as it is where identities are wrong."""
    return len({result.case for result in results}) == len(results)
