"""Read run folders and fold them: large ones in two processes, which is done in half the time.

Each process parses the lines of its own cases and folds them. The cases are split in the order of
their first lines, so that one process' results follow the other's as they would from one.
"""

import pickle
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from itertools import accumulate
from pathlib import Path

from mambench.harness import analysis, beside
from mambench.harness.analysis import Analysis, Loaded, Result
from mambench.harness.store import RunFolder

# Share of the bytes that this process takes: the other one's results have to be sent, too.
OURS = 0.56
LARGE = 4000  # lines, from which on two processes are sooner done
_ID = b'"case_id":"'
_ID_LENGTH = 12

Folders = Mapping[str, Sequence[Loaded[RunFolder]]]  # by source
Folded = dict[str, list[Result]]  # by source


def load(run_folders: Sequence[Path]) -> Analysis:
    """Read run folders and fold them.

    Raises RunFolderError where one is not a sound run folder.
    """
    loaded: list[Loaded[RunFolder]] = []
    for path in map(Path, run_folders):
        folder = RunFolder.unparsed(path)
        run = analysis.make_run(folder.manifest, path, notes=folder.warnings)
        loaded.append((run, folder, folder.manifest))
    by_source = analysis.pooled(loaded)
    count = sum(len(folder.lines) for _, folder, _ in loaded)
    found = _in_two(by_source) if beside.worthwhile(count, LARGE) else None
    return analysis.assembled(by_source, found or _folded(by_source, lambda source, line: True))


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
        for _, folder, _ in entries:
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
        source: analysis.fold(
            [
                (run.run_id, observation)
                for run, folder, _ in entries
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
