"""The history of results: a store that only grows, series over commits, and change points.

The store is one file (`NAME.jsonl`) or a folder with one file a run, which two branches can both
grow without a conflict; either can be kept by a CI cache or on a branch. Series are kept apart by
machine: between machines times differ by more than what is looked for. Imports no torch.
"""

import fcntl
import json
import math
import os
import re
from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, cast

import numpy as np
from numpy.typing import NDArray

from mambench.harness.analysis import loading
from mambench.harness.analysis.results import Result
from mambench.harness.errors import RunFolderError, UsageError
from mambench.harness.spec import Case, Outcome, digest
from mambench.harness.store import RunFolder

VERSION = 1
METRICS = ("time_s", "call_time_s", "peak_memory_bytes", "dram_bytes", "kernel_count")
LEAST_SIDE = 5  # points on each side of a change
LEAST_CHANGE_FRAC = 0.03
PENALTY = 5.0  # times the variance and log n: what another change must explain; see the tests
_CLIP = 3.0  # standard deviations; an outlier is one point, not a change
_MAD = 1.4826  # of a normal distribution, standard deviation over median absolute deviation

Array = NDArray[np.float64]


@dataclass(frozen=True, kw_only=True)
class Entry:
    """One case of one run, as it is stored."""

    run_id: str
    created_at: str  # ISO 8601, UTC
    code: str  # commit, marked where it had changes
    fingerprint: str  # of the machine
    machine: str  # for a person
    case: Case
    outcome: Outcome
    values: Mapping[str, float]

    def to_line(self) -> str:
        """Return the JSON line, without its newline."""
        record = {
            **{"schema": VERSION, "run_id": self.run_id, "created_at": self.created_at},
            **{"code": self.code, "fingerprint": self.fingerprint, "machine": self.machine},
            **{"case_id": self.case.case_id, "case": self.case.to_dict()},
            **{"outcome": self.outcome.value, "values": dict(self.values)},
        }
        return json.dumps(record, separators=(",", ":"))

    @classmethod
    def from_line(cls, line: str) -> "Entry":
        """Parse a line; raises ValueError with what is wrong with it."""
        record: Any = json.loads(line)
        if not isinstance(record, dict):
            raise ValueError("not a JSON object")
        found = cast("dict[str, Any]", record)
        if found.get("schema") != VERSION:
            raise ValueError(
                f"schema version {found.get('schema')!r}, this version reads {VERSION}"
            )
        texts = ("run_id", "created_at", "code", "fingerprint", "machine")
        try:
            return cls(
                **{name: str(found[name]) for name in texts},
                case=Case.from_dict(found["case"]),
                outcome=Outcome(found["outcome"]),
                values={str(k): float(v) for k, v in found["values"].items()},
            )
        except (KeyError, TypeError, AttributeError) as error:
            raise ValueError(f"lacks or mistakes {error}") from error


@dataclass(frozen=True, kw_only=True)
class Change:
    """A place in a series from which on values are different."""

    at: int  # index of the first point after it
    change_frac: float  # of the median after over the median before


@dataclass(frozen=True, kw_only=True)
class Series:
    """One case's metric on one machine, in order of time."""

    case: Case
    metric: str
    fingerprint: str
    machine: str
    codes: tuple[str, ...]
    created_at: tuple[str, ...]
    values: tuple[float, ...]
    changes: tuple[Change, ...] = ()


# --- the store -----------------------------------------------------------------------------------


def add(store: Path, run: Path) -> int:
    """Append a run to the store and return how many cases that were.

    Raises UsageError if the run is there already, RunFolderError if run or store are broken.
    """
    entries = entries_of(run)
    known = {entry.run_id for entry in read(store)} if store.exists() else set[str]()
    run_id = entries[0].run_id if entries else ""
    if not entries:
        raise UsageError(f"{run} holds no case that was measured: there is nothing to add.")
    if run_id in known:
        raise UsageError(f"run {run_id} is in {store} already.")
    text = "".join(f"{entry.to_line()}\n" for entry in entries)
    try:
        if _is_file(store):
            store.parent.mkdir(parents=True, exist_ok=True)
            _append(store, text)
        else:
            store.mkdir(parents=True, exist_ok=True)
            begun = "".join(c for c in entries[0].created_at if c.isalnum())
            path = store / f"{begun}-{run_id}.jsonl"
            temporary = store / f".{path.name}.{os.getpid()}"
            temporary.write_text(text, encoding="utf-8")
            temporary.replace(path)
    except OSError as error:
        raise RunFolderError(f"{store} cannot be written: {error.strerror}.") from error
    return len(entries)


def _append(path: Path, text: str) -> None:
    """Append whole lines; a last line that was torn is ended first, so that it stays alone."""
    with path.open("a+b") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        file.seek(0, os.SEEK_END)
        if file.tell():
            file.seek(-1, os.SEEK_END)
            torn = file.read(1) != b"\n"
            if torn:
                _drop_last_line(file)
        file.write(text.encode())
        file.flush()
        os.fsync(file.fileno())


def _drop_last_line(file: Any) -> None:
    file.seek(0)
    content: bytes = file.read()
    file.truncate(content.rfind(b"\n") + 1)


def entries_of(run: Path) -> list[Entry]:
    """Return what a run has to tell; raises RunFolderError where it is not a sound run folder."""
    manifest = RunFolder.open(run).manifest
    loaded = loading.load([run])
    made = loaded.runs[0]
    machine = loaded.sources[0].device_name
    return [
        Entry(
            run_id=made.run_id,
            created_at=made.created_at,
            code=made.code_version,
            fingerprint=fingerprint(manifest),
            machine=machine,
            case=result.case,
            outcome=result.outcome,
            values=_values(result),
        )
        for result in loaded.results
        if result.outcome is Outcome.OK or result.outcome.failed
    ]


def _values(result: Result) -> dict[str, float]:
    found = {name: result.value(name) for name in METRICS}
    return {
        name: float(value)
        for name, value in found.items()
        if value is not None and math.isfinite(value)
    }


def fingerprint(manifest: Mapping[str, Any]) -> str:
    """Return what two results must share to be of one machine: processor, GPU, its driver."""
    environment: Mapping[str, Any] = manifest["environment"]
    cpu: Mapping[str, Any] = environment.get("cpu") or {}
    gpu: Mapping[str, Any] = environment.get("gpu") or {}
    device: Mapping[str, Any] = manifest["device"]
    return digest(
        [
            *(cpu.get("model"), cpu.get("logical_cores"), device.get("name")),
            *(gpu.get("uuid"), gpu.get("driver")),
        ]
    )


def read(store: Path) -> list[Entry]:
    """Return everything in a store, the oldest run first.

    A torn last line is left out: a run killed while it wrote. Raises RunFolderError for any other
    broken line, UsageError if there is no store.
    """
    if not store.exists():
        raise UsageError(f"there is no history at {store}: `history add RUN_DIR` begins one.")
    paths = [store] if _is_file(store) else sorted(store.glob("*.jsonl"))
    entries = [entry for path in paths for entry in _entries(path)]
    # Stable: cases keep the order in which their run told them.
    return sorted(entries, key=lambda entry: (entry.created_at, entry.run_id))


def _is_file(store: Path) -> bool:
    return store.is_file() or store.suffix == ".jsonl"


def _entries(path: Path) -> Iterable[Entry]:
    text = path.read_text(encoding="utf-8", errors="replace")
    *lines, last = text.split("\n")
    for number, line in enumerate(lines, start=1):
        try:
            yield Entry.from_line(line)
        except ValueError as error:
            raise RunFolderError(f"{path}:{number}: {error}.") from error
    del last  # empty, or a line without its end


# --- series --------------------------------------------------------------------------------------


def series(entries: Sequence[Entry], metric: str = "time_s") -> list[Series]:
    """Return every case's values on every machine, with their change points."""
    found: dict[tuple[str, str], list[Entry]] = defaultdict(list)
    for entry in entries:
        if entry.outcome is Outcome.OK and entry.values.get(metric, 0.0) > 0:
            found[entry.fingerprint, entry.case.case_id].append(entry)
    made = [_series(kept, metric) for kept in found.values()]
    machines = list(dict.fromkeys(fingerprint for fingerprint, _ in found))
    # A check measures in random order; a person looks for the length.
    return sorted(made, key=lambda one: (machines.index(one.fingerprint), _natural(one.case.label)))


def _natural(text: str) -> list[tuple[int, str]]:
    """Return a key by which 512 comes before 1024."""
    parts = re.split(r"(\d+)", text)
    return [(int(part), "") if part.isdigit() else (-1, part) for part in parts]


def _series(entries: Sequence[Entry], metric: str) -> Series:
    newest = entries[-1]
    made = Series(
        case=newest.case,
        metric=metric,
        fingerprint=newest.fingerprint,
        machine=newest.machine,
        codes=tuple(entry.code for entry in entries),
        created_at=tuple(entry.created_at for entry in entries),
        values=tuple(entry.values[metric] for entry in entries),
    )
    return replace(made, changes=change_points(made.values))


def change_points(values: Sequence[float]) -> tuple[Change, ...]:
    """Return where a series' level changes, by at least 3 % and with five points on each side.

    The best division into levels by least squares of the logarithms, found exactly by dynamic
    programming, each change costing `PENALTY` times variance times log n (as the Bayesian
    information criterion does); neighbouring levels closer than 3 % are then joined. The variance
    is that of neighbours' differences, which a change of level does not enlarge. That, and not a
    library: exact over some thousand points, it is twenty lines.

    Source: Jackson et al., An algorithm for optimal partitioning of data on an interval (2005).
    """
    logs = np.log(np.asarray(values, dtype=np.float64))
    if len(logs) < 2 * LEAST_SIDE:
        return ()
    deviation = _noise(logs)
    clipped = _clipped(logs, deviation)
    bounds = _joined(logs, _divided(clipped, PENALTY * deviation**2 * math.log(len(logs))))
    return tuple(
        Change(at=at, change_frac=math.exp(_level(logs, at, end) - _level(logs, begin, at)) - 1)
        for begin, at, end in zip(bounds, bounds[1:], bounds[2:], strict=False)
        if at == _best_split(clipped[begin:end]) + begin
    )


def _best_split(values: Array) -> int:
    """Return where two levels divide values best, with any number of points on each side.

    A change that lies nearer to an end than it may is found at the nearest place allowed: not yet
    a change.
    """
    counts = np.arange(1, len(values))
    apart = np.cumsum(values - values.mean())[:-1]
    return int(np.argmax(apart**2 / (counts * (len(values) - counts)))) + 1


def _noise(logs: Array) -> float:
    """Return the standard deviation of a point around its level."""
    apart = np.abs(np.diff(logs))
    return max(float(np.median(apart)) * _MAD / math.sqrt(2), 1e-6)


def _clipped(logs: Array, deviation: float) -> Array:
    """Bring what lies far from all its neighbours near to them."""
    padded = np.pad(logs, LEAST_SIDE // 2, mode="reflect")
    windows = np.lib.stride_tricks.sliding_window_view(padded, LEAST_SIDE)
    around = np.median(windows, axis=1)
    return np.clip(logs, around - _CLIP * deviation, around + _CLIP * deviation)


def _divided(values: Array, cost_of_change: float) -> list[int]:
    """Return the bounds of the best levels, 0 and n included."""
    n = len(values)
    sums = np.concatenate([[0.0], np.cumsum(values - values.mean())])
    squares = np.concatenate([[0.0], np.cumsum((values - values.mean()) ** 2)])
    best = np.full(n + 1, np.inf)
    best[0] = -cost_of_change
    before = np.zeros(n + 1, dtype=np.int64)
    for end in range(LEAST_SIDE, n + 1):
        begin = np.arange(0, end - LEAST_SIDE + 1)
        spread = squares[end] - squares[begin] - (sums[end] - sums[begin]) ** 2 / (end - begin)
        total = best[begin] + spread + cost_of_change
        before[end] = int(np.argmin(total))
        best[end] = total[before[end]]
    bounds = [n]
    while bounds[-1]:
        bounds.append(int(before[bounds[-1]]))
    return bounds[::-1]


def _joined(logs: Array, bounds: list[int]) -> list[int]:
    """Join neighbouring levels that are closer than 3 %, the closest first."""
    least = math.log1p(LEAST_CHANGE_FRAC)
    while len(bounds) > 2:
        steps = [
            abs(_level(logs, at, end) - _level(logs, begin, at))
            for begin, at, end in zip(bounds, bounds[1:], bounds[2:], strict=False)
        ]
        closest = int(np.argmin(steps))
        if steps[closest] >= least:
            break
        bounds = [*bounds[: closest + 1], *bounds[closest + 2 :]]
    return bounds


def _level(logs: Array, begin: int, end: int) -> float:
    return float(np.median(logs[begin:end]))
