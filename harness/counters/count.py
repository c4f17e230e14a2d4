"""Bytes that cases read from and wrote to HBM, by hardware counters. Imports no torch.

Many cases are counted by one child process under Nsight Compute, so that a suite costs one
start-up. A case that crashes or hangs the child is that case's outcome; the cases after it go on in
another child. What the numbers mean, and in which condition L2 is, says `harness.counters.child`.

ncu handles each launch by itself, which for one of tens of thousands takes longer than anybody
waits. So a case of more than `MOST_KERNELS` launches is counted as one range, in a child of its own
kind: the sum is the same, and what each kernel moved is not known. There a copy of known bytes in a
thousand launches comes first; unless it is counted rightly, nothing that follows is believed, and
what has not too many launches is counted one by one after all.
"""

import itertools
import shutil
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import replace
from pathlib import Path

from mambench.harness.counters.batch import OVER, Batch, Counted, Item, Request
from mambench.harness.spec import Case, Device, DeviceKind, Outcome
from mambench.implementations.cost import case_cost

# Coarse, for the plan: ncu, Python and torch; building, compiling and warming up one case; the
# instrumentation of one launch; one launch of those that are counted together.
START_S, CASE_S, LAUNCH_S, RANGE_LAUNCH_S = 20.0, 0.5, 0.015, 2.5e-4
MOST_KERNELS = 200  # a few seconds of instrumentation
MOST_REPLAYED = 2000  # as many are counted one by one all the same where ranges cannot be
# Launches of the ranges of one child: ncu tells nothing of them unless the child ends by itself.
MOST_PER_CHILD = 200_000
MAX_LAUNCHES = 200_000  # of a range: more do not end within a case's time limit
INSTALL = "install NVIDIA Nsight Compute and put ncu on PATH"


def missing(device: Device) -> str | None:
    """Return why nothing can be counted here, as far as it can be told without trying."""
    if device.kind is not DeviceKind.CUDA:
        return "HBM traffic is counted on a GPU only"
    return None if shutil.which("ncu") else f"Nsight Compute (ncu) is not on PATH: {INSTALL}"


def estimate_s(launches: int) -> float:
    """Estimate the seconds that a case of so many launches adds, the start aside."""
    if launches > MAX_LAUNCHES:
        return 0.0
    return CASE_S + (LAUNCH_S if launches <= MOST_KERNELS else RANGE_LAUNCH_S) * launches


def count_cases(
    cases: Sequence[Case],
    request: Request,
    *,
    launches: Callable[[Case], int] | None = None,
    on_begin: Callable[[Case], None] | None = None,
) -> Iterator[tuple[Case, Counted]]:
    """Count the traffic of cases that are known to run and to be right; yields each once.

    Args:
        cases: what to execute, in this order.
        request: device, seed and limits.
        launches: estimates a case's launches; what has too many is skipped.
        on_begin: told when a case is about to be executed; one that another case cut off, twice.
    """
    by_id = {case.case_id: case for case in cases}
    expected = {name: launches(case) if launches else 0 for name, case in by_id.items()}
    usual = [name for name, count in expected.items() if count <= MOST_KERNELS]
    long = [name for name, count in expected.items() if MOST_KERNELS < count <= MAX_LAUNCHES]
    for name in by_id.keys() - {*usual, *long}:
        reason = f"about {expected[name]:,} launches; over {MAX_LAUNCHES:,} take too long under ncu"
        yield by_id[name], Counted(outcome=Outcome.SKIPPED, reason=reason)

    def begin(name: str) -> None:
        if on_begin:
            on_begin(by_id[name])

    def count(names: Sequence[str], *, ranges: bool = False) -> Iterator[tuple[str, Counted]]:
        items: list[Item] = [{"id": name, "case": by_id[name].to_dict()} for name in names]
        return _count(items, replace(request, ranges=ranges), begin, ends_at)

    ends_at = time.monotonic() + request.total_limit_s
    again: list[str] = []
    ranges = (count(names, ranges=True) for names in _grouped(long, expected))
    for name, counted in itertools.chain(count(usual), *ranges):
        unavailable = name in long and counted.outcome is Outcome.UNAVAILABLE
        if unavailable and expected[name] <= MOST_REPLAYED:
            again.append(name)
        else:
            yield by_id[name], _with_ratio(by_id[name], counted)
    for name, counted in count(again):
        yield by_id[name], _with_ratio(by_id[name], counted)


def _grouped(names: Sequence[str], launches: Mapping[str, int]) -> list[list[str]]:
    """Divide cases, in their order, among children that launch so much each, one case at least."""
    groups: list[list[str]] = []
    room = 0
    for name in names:
        if launches[name] > room:
            groups.append([])
            room = MOST_PER_CHILD
        groups[-1].append(name)
        room -= launches[name]
    return groups


def count_copies(sizes_bytes: Sequence[int], request: Request) -> dict[int, Counted]:
    """Count kernels that read and write a known number of bytes each: the instrument's own test.

    To be right, a size should be several times L2's.
    """
    found = count_probes(
        [{"id": f"copy{size}", "copy_bytes": size} for size in sizes_bytes], request
    )
    return {int(name[4:]): counted for name, counted in found.items()}


def count_probes(
    items: Sequence[Item], request: Request, *, on_begin: Callable[[str], None] | None = None
) -> dict[str, Counted]:
    """Count kernels that copy, read or write a known number of bytes, by their id.

    Args:
        items: each an `id` of lower-case letters and digits, and `copy_bytes`, `read_bytes` or
            `write_bytes`; a `case` is allowed too, and has no ratio.
        request: device, seed and limits.
        on_begin: told the id of what is about to be executed.
    """
    ends_at = time.monotonic() + request.total_limit_s
    return dict(_count(items, request, on_begin or (lambda _: None), ends_at))


def _with_ratio(case: Case, counted: Counted) -> Counted:
    moved = counted.values.get("dram_bytes")
    if moved is None:
        return counted
    ratio = moved / case_cost(case).compulsory_bytes
    return replace(counted, values={**counted.values, "traffic_ratio": ratio})


def _count(
    items: Sequence[Item], request: Request, begin: Callable[[str], None], ends_at: float
) -> Iterator[tuple[str, Counted]]:
    """Count items, with a new child after each one that ends its child."""
    lack = missing(request.device)
    left = list(items)
    while left and lack is None:
        if time.monotonic() > ends_at:
            lack = OVER
            break
        with tempfile.TemporaryDirectory(prefix="mambench-ncu-") as folder:
            batch = Batch(left[: request.per_child], request, Path(folder), begin, ends_at)
            ended, lack = batch.run()
            _keep(Path(folder), request.keep, len(left))
        yield from ended.items()
        if batch.interrupted:
            raise KeyboardInterrupt
        left = [item for item in left if item["id"] not in ended]
        if not ended and lack is None and time.monotonic() < ends_at:
            lack = "Nsight Compute ended without a word about any case"
    for item in left:
        outcome = Outcome.SKIPPED if lack == OVER else Outcome.UNAVAILABLE
        yield item["id"], Counted(outcome=outcome, reason=lack)


def _keep(folder: Path, target: Path | None, number: int) -> None:
    """Copy the files that show what happened."""
    for path in folder.glob("*.*") if target else ():
        if path.is_file() and target:
            target.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(path, target / f"{number}-{path.name}")
