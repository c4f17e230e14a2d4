"""Nsight Compute's command line and output: counters of memory traffic, per kernel. No torch.

Ranges are NVTX start/end ranges, which hold for the whole process: push/pop ranges are a thread's
own, and autograd launches a backward's kernels from another thread than the one that asked for it.

In `ranges` mode (ncu's app-range) all that is launched between the profiler's start and stop is
counted as one result, and runs as it would without ncu: what launches thousands of kernels is
counted in about the time it takes. The NVTX range around it names the result.

Source: NVIDIA, Nsight Compute CLI, "NVTX Filtering" and "Command Line Options"; Profiling Guide,
"Replay" (application range replay).
"""

import csv
import io
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

READ, WRITE, TIME = "dram__bytes_read.sum", "dram__bytes_write.sum", "gpu__time_duration.sum"
METRICS = (READ, WRITE, TIME)
RUN, DRAIN = "run", "drain"  # the two ranges of each case
PRIME = "prime"  # instead of a case's id: ranges that are counted to be forgotten
PERMISSION = "ERR_NVGPUCTRPERM"
PERMISSION_FIX = (
    "on the host: options nvidia NVreg_RestrictProfilingToAdminUsers=0 in /etc/modprobe.d, then "
    "reload the driver; in a container also --cap-add=SYS_ADMIN"
)

_RANGE = re.compile(r"mambench-([0-9a-z]+)-(run|drain)\b")
_PASSES = re.compile(r"-\s*(\d+) pass(?:es)?\b")
_FACTORS: Mapping[str, float] = {
    # ncu's prefixes are decimal. Base units are asked for; other versions may write others.
    **{"byte": 1, "kbyte": 1e3, "mbyte": 1e6, "gbyte": 1e9, "tbyte": 1e12},
    **{"b": 1, "kb": 1e3, "mb": 1e6, "gb": 1e9, "tb": 1e12},
    **{"ns": 1e-9, "us": 1e-6, "ms": 1e-3, "s": 1},
    **{"nsecond": 1e-9, "usecond": 1e-6, "msecond": 1e-3, "second": 1},
}
# What ncu says, and what a person can do about it.
_KNOWN = (
    (PERMISSION, PERMISSION_FIX),
    ("driver resource was unavailable", "end other profilers, or `dcgmi profile --pause`"),
    ("Failed to find metric", "this GPU has no such counter, or ncu is too old for it"),
    ("not compatible", "install the Nsight Compute that fits the driver"),
    ("InterprocessLockFailed", "remove /tmp/nsight-compute-lock, or set TMPDIR"),
)


class FormatError(Exception):
    """ncu's output is not of the form that is known; names what was found."""


@dataclass(frozen=True, kw_only=True)
class Kernel:
    """One profiled launch; a counter that ncu could not read is None."""

    name: str
    read_bytes: int | None
    write_bytes: int | None
    time_s: float | None


def range_name(case_id: str, part: str) -> str:
    """Return the name of one of a case's NVTX ranges."""
    return f"mambench-{case_id}-{part}"


def command(
    ncu: str,
    log: Path,
    case_ids: Sequence[str],
    program: Sequence[str],
    *,
    ranges: bool = False,
) -> list[str]:
    """Return the command that profiles what a program launches within the ranges of these cases.

    Clocks are not locked and caches are left alone: the program puts L2 into a stated condition.
    Ranges are named one by one: in a pattern, ncu gives some signs a meaning of its own. A name
    without a slash is that of a start/end range. With `ranges` the program calls the profiler's
    start and stop itself.
    """
    names = [range_name(case_id, part) for case_id in (PRIME, *case_ids) for part in (RUN, DRAIN)]
    included = [word for name in names for word in ("--nvtx-include", name)]
    return [
        ncu,
        *("--clock-control", "none", "--cache-control", "none"),
        *("--metrics", ",".join(METRICS)),
        "--nvtx",
        *(("--replay-mode", "app-range") if ranges else included),
        *("--csv", "--print-units", "base", "--log-file", str(log)),
        *program,
    ]


def parse(text: str, order: Sequence[str] = ()) -> dict[str, dict[str, list[Kernel]]]:
    """Return the launches by case and range, in the order of launching.

    Rows of one launch share an ID; each holds one metric.

    Args:
        text: ncu's log.
        order: the names of the ranges that were executed, where each is one result: for a version
            of ncu that names none.

    Raises FormatError for a table that lacks a column, a launch outside our ranges, or a unit that
    is not known.
    """
    found: dict[str, dict[str, list[Kernel]]] = {}
    launches: dict[tuple[str, str, str], dict[str, float | None]] = {}
    names: dict[tuple[str, str, str], str] = {}
    rows = list(_rows(text))
    by_id = _in_order(rows, order)
    for row in rows:
        case_id, part = by_id.get(row["ID"]) or _range_of(row)
        key = (case_id, part, f"{row.get('Process ID', '')}:{row['ID']}")
        launches.setdefault(key, {})[row["Metric Name"]] = _value(row)
        names[key] = row["Kernel Name"]
    for key, metrics in launches.items():
        kernel = Kernel(
            name=names[key],
            read_bytes=_whole(metrics.get(READ)),
            write_bytes=_whole(metrics.get(WRITE)),
            time_s=metrics.get(TIME),
        )
        found.setdefault(key[0], {}).setdefault(key[1], []).append(kernel)
    return found


def passes(text: str) -> int | None:
    """Return the most passes that a launch took; None if ncu did not say.

    In more than one pass a kernel is run again, from memory that was saved and restored in between:
    then L2 is not in the condition that the program had put it into.
    """
    counts = [int(match[1]) for match in _PASSES.finditer(text)]
    return max(counts, default=None)


def known_problem(text: str) -> str | None:
    """Return what keeps ncu from counting anything here, and what to do about it, or None."""
    for sign, fix in _KNOWN:
        for line in text.splitlines():
            if sign.lower() in line.lower():
                return f"{_message(line)}. To enable: {fix}"
    return None


def first_error(text: str) -> str | None:
    """Return ncu's first error, other than that the program failed, or None."""
    for line in text.splitlines():
        if line.startswith("==ERROR==") and "returned an error code" not in line:
            return _message(line)
    return None


def _message(line: str) -> str:
    return re.sub(r"^==\w+==\s*", "", line.strip()).rstrip(".")[:200]


def _rows(text: str) -> Iterator[Mapping[str, str]]:
    """Yield the rows of the table, wherever it begins among ncu's messages."""
    lines = text.splitlines()
    start = next((i for i, line in enumerate(lines) if line.startswith('"ID"')), None)
    if start is None:
        return
    # A field may span lines; ncu's messages and the program's go between rows, not into them.
    table = "\n".join(line for line in lines[start:] if not line.startswith("=="))
    reader = csv.DictReader(io.StringIO(table))
    wanted = ("ID", "Kernel Name", "Metric Name", "Metric Unit", "Metric Value")
    missing = [name for name in wanted if name not in (reader.fieldnames or ())]
    if missing:
        raise FormatError(f"ncu's table lacks the columns {', '.join(missing)}")
    for row in reader:
        if row["Metric Name"] in METRICS:
            yield {name: row.get(name) or "" for name in reader.fieldnames or ()}


def _in_order(
    rows: Sequence[Mapping[str, str]], order: Sequence[str]
) -> dict[str, tuple[str, str]]:
    """Return each ID's case and part by its place, if no row names a range; else nothing."""
    ids = list(dict.fromkeys(row["ID"] for row in rows))
    if len(ids) != len(order) or any(_named(row) for row in rows):
        return {}
    matches = (_RANGE.search(name) for name in order)
    return {number: (m[1], m[2]) for number, m in zip(ids, matches, strict=True) if m}


def _range_of(row: Mapping[str, str]) -> tuple[str, str]:
    if (match := _named(row)) is None:
        raise FormatError(f"ncu names no range for the kernel {row['Kernel Name'][:80]}")
    return match[1], match[2]


def _named(row: Mapping[str, str]) -> re.Match[str] | None:
    others: Iterable[str] = (value for name, value in row.items() if name != "Kernel Name")
    return next((match for value in others if (match := _RANGE.search(value))), None)


def _value(row: Mapping[str, str]) -> float | None:
    text, unit = row["Metric Value"].replace(",", "").strip(), row["Metric Unit"].strip().lower()
    try:
        number = float(text)
    except ValueError:  # "n/a": this GPU or driver has no such counter
        return None
    if number != number:
        return None
    if unit not in _FACTORS:
        raise FormatError(f"{row['Metric Name']} has the unit '{row['Metric Unit']}'")
    return number * _FACTORS[unit]


def _whole(value: float | None) -> int | None:
    return None if value is None else round(value)
