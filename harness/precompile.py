"""Compiles ahead, in parallel and outside every time limit. Imports neither torch nor triton.

An implementation that declares `precompile(case) -> None` is asked to fill its compiler's cache on
disk, in a worker that is thrown away: before timing begins, because compilers need the processors
that are to be timed.
"""

import os
import time
from collections.abc import Iterable, Sequence

from mambench.harness import registry
from mambench.harness.errors import UsageError
from mambench.harness.pool import Pool, Worker
from mambench.harness.progress import PRECOMPILE, Listener
from mambench.harness.protocol import Done, Precompile, WorkerConfig
from mambench.harness.spec import Case, DeviceKind, digest

POLL_S = 0.02
MAX_PARALLEL = 8  # each may hold a CUDA context


def compile_ahead(
    cases: Sequence[Case], pool: Pool, config: WorkerConfig, listener: Listener
) -> None:
    """Let each implementation compile what its cases need.

    What fails is told to the listener and forgotten: the case itself will fail where it is
    recorded. What takes longer than the limit of a first call for each case is stopped.
    """
    able = [case for case in cases if _compiles(case.implementation)]
    waiting = _groups(able, on_gpu=config.device.kind is DeviceKind.CUDA)
    active: dict[Worker, tuple[Sequence[Case], float]] = {}
    parallel = min(MAX_PARALLEL, os.cpu_count() or 1)
    try:
        while waiting or active:
            while waiting and len(active) < parallel:
                group = waiting.pop(0)
                listener.on_phase(group[0], PRECOMPILE)
                worker = pool.worker(config)
                limit_s = config.settings.compile_limit_s * len(group)
                active[worker] = group, time.monotonic() + limit_s
                worker.send(Precompile(cases=tuple(group)))
            for worker, (group, deadline) in list(active.items()):
                if _ended(worker, group[0], deadline, listener):
                    del active[worker]
                    worker.kill()
    finally:
        for worker in active:
            worker.kill()


def _compiles(implementation: str) -> bool:
    """Whether it compiles anything ahead; one that only a worker knows may."""
    try:
        return hasattr(registry.get(implementation), "precompile")
    except UsageError:
        return True


def _groups(cases: Iterable[Case], *, on_gpu: bool) -> list[list[Case]]:
    """Divide the cases among workers, one for each list.

    On a CPU an implementation compiles once for all its cases of a dtype, and its widths tell them
    apart. On a GPU compilers take most of a first run and work alone: every variant, pass and width
    has a worker, and no case is left out, because kernels are specialised on lengths too.
    """
    groups: dict[str, dict[str, Case]] = {}
    for case in cases:
        values = case.to_dict()
        widths = {"problem": {**values["problem"], "batch": None, "seqlen": None}}
        key = digest(values | widths)
        if on_gpu:
            groups.setdefault(key, {}).setdefault(digest(values), case)
        else:
            groups.setdefault(case.implementation, {}).setdefault(key, case)
    return [list(group.values()) for group in groups.values()]


def _ended(worker: Worker, case: Case, deadline: float, listener: Listener) -> bool:
    try:
        message = worker.receive(POLL_S)
    except EOFError:
        message = Done(reason=f"compiling {case.implementation} ahead: the worker died")
    if isinstance(message, Done):
        if message.reason:
            listener.on_note(message.reason)
        return True
    if time.monotonic() > deadline:
        listener.on_note(f"compiling {case.implementation} ahead took too long and was stopped")
        return True
    return False
