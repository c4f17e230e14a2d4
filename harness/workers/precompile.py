"""Compiles ahead, in parallel and outside every time limit. Imports neither torch nor triton.

An implementation that declares `precompile(case) -> None` is asked to fill its compiler's cache on
disk, in a worker that is thrown away: before timing begins, because compilers need the processors
that are to be timed. One with more to compile than a processor should do alone declares
`compile_shares`, the most workers that its work can be divided among, and
`precompile_share(case, share, shares) -> None`, which compiles one part of it. `compile_s(case)`
is what the plan says of it: seconds of one processor, where nothing is in the cache.
"""

import os
import time
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, replace

from mambench.harness import registry
from mambench.harness.errors import UsageError
from mambench.harness.progress import PRECOMPILE, Listener
from mambench.harness.spec import Case, Device, DeviceKind, Pass, digest
from mambench.harness.text import duration
from mambench.harness.workers.pool import Pool, Worker
from mambench.harness.workers.protocol import Done, Precompile, WorkerConfig

POLL_S = 0.02
MAX_PARALLEL = 16  # each may hold a CUDA context
WORTH_TELLING_S = 10.0
AGAIN_FRAC = 0.4  # of a kind's kernels are specialised on a batch or a length, roughly
START_S = 8.0  # a worker on a GPU loads torch, its context and a compiler


@dataclass(frozen=True, kw_only=True)
class _Job:
    """What one worker compiles."""

    cases: tuple[Case, ...]
    share: int = 0
    shares: int = 1

    @property
    def message(self) -> Precompile:
        """What the worker is told."""
        return Precompile(cases=self.cases, share=self.share, shares=self.shares)


def compile_ahead(
    cases: Sequence[Case],
    pool: Pool,
    config: WorkerConfig,
    listener: Listener,
    clock: Callable[[], float] = time.monotonic,
) -> None:
    """Let each implementation compile what its cases need.

    What fails is told to the listener and forgotten: the case itself will fail where it is
    recorded. What takes longer than the limit of a first call for each case is stopped.
    """
    begun = clock()
    waiting = _jobs(cases, on_gpu=config.device.kind is DeviceKind.CUDA, parallel=_parallel())
    active: dict[Worker, tuple[_Job, float]] = {}
    total = len(waiting)
    try:
        while waiting or active:
            while waiting and len(active) < _parallel():
                job = waiting.pop(0)
                nth = f"{PRECOMPILE} {total - len(waiting)} of {total}"
                listener.on_phase(job.cases[0], nth)
                worker = pool.worker(config)
                limit_s = config.settings.compile_limit_s * len(job.cases)
                active[worker] = job, clock() + limit_s
                worker.send(job.message)
            for worker, (job, deadline) in list(active.items()):
                if _ended(worker, job, clock() > deadline, listener):
                    del active[worker]
                    worker.kill()
    finally:
        for worker in active:
            worker.kill()
    if (took_s := clock() - begun) > WORTH_TELLING_S:
        listener.on_note(f"compiled ahead in {duration(took_s)}")


def seconds(cases: Sequence[Case], device: Device) -> float:
    """Estimate how long compiling ahead takes where nothing is compiled yet; 0 without a GPU.

    The longest job bounds it as much as the work of all does.
    """
    if device.kind is not DeviceKind.CUDA:
        return 0.0
    jobs = _jobs(cases, on_gpu=True, parallel=_parallel())
    times = [START_S + _work_s(job.cases) / job.shares for job in jobs]
    return max(max(times), sum(times) / _parallel()) if times else 0.0


def _parallel() -> int:
    return min(MAX_PARALLEL, os.cpu_count() or 1)


def _work_s(cases: Sequence[Case]) -> float:
    """Seconds of one processor for cases of a kind: those after the first find much of it there."""
    each = sorted(map(_compile_s, cases))
    return each[-1] + AGAIN_FRAC * sum(each[:-1])


def _compile_s(case: Case) -> float:
    """Seconds of one processor, as the implementation estimates them; 0 where it says nothing."""
    try:
        implementation = registry.get(case.implementation)
    except UsageError:
        return 0.0
    return float(registry.ask(implementation, "compile_s", case))


def _jobs(cases: Iterable[Case], *, on_gpu: bool, parallel: int) -> list[_Job]:
    """Divide what the cases need among workers, first what bounds the rest: what is not divided."""
    jobs: list[_Job] = []
    able = [case for case in cases if _compiles(case.implementation)]
    for group in _groups(able, on_gpu=on_gpu):
        shares = min(_shares(group[0]), parallel) if on_gpu else 1
        jobs += [_Job(cases=tuple(group), share=n, shares=shares) for n in range(shares)]
    return sorted(jobs, key=lambda job: job.shares)


def _compiles(implementation: str) -> bool:
    """Whether it compiles anything ahead; one that only a worker knows may."""
    try:
        return hasattr(registry.get(implementation), "precompile")
    except UsageError:
        return True


def _shares(case: Case) -> int:
    """Among how many workers an implementation's compiling can be divided at most."""
    try:
        return getattr(registry.get(case.implementation), "compile_shares", 1)
    except UsageError:
        return 1


def _groups(cases: Iterable[Case], *, on_gpu: bool) -> list[list[Case]]:
    """Divide the cases among workers, one for each list.

    On a CPU an implementation compiles once for all its cases of a dtype, and its widths tell them
    apart. On a GPU compilers take most of a first run and work alone: every variant, pass and width
    has a worker, and no length is left out, because kernels are specialised on lengths too. A
    training step has all that a backward pass needs, so the two are one.
    """
    groups: dict[str, dict[str, Case]] = {}
    for case in cases:
        if case.pass_ is Pass.BACKWARD:
            case = replace(case, pass_=Pass.TRAINING)
        values = case.to_dict()
        widths = {"problem": {**values["problem"], "batch": None, "seqlen": None}}
        key = digest(values | widths)
        if on_gpu:
            groups.setdefault(key, {}).setdefault(digest(values), case)
        else:
            groups.setdefault(case.implementation, {}).setdefault(key, case)
    return [list(group.values()) for group in groups.values()]


def _ended(worker: Worker, job: _Job, late: bool, listener: Listener) -> bool:
    name = job.cases[0].implementation
    try:
        message = worker.receive(POLL_S)
    except EOFError:
        message = Done(reason=f"compiling {name} ahead: the worker died")
    if isinstance(message, Done):
        if message.reason:
            listener.on_note(message.reason)
        return True
    if late:
        listener.on_note(f"compiling {name} ahead took too long and was stopped")
        return True
    return False
