"""One child process under Nsight Compute: started, watched, and its findings put together.

Imports no torch. What is counted, and how, say `harness.counters.count` and
`harness.counters.child`.
"""

import contextlib
import getpass
import json
import math
import os
import re
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import psutil

import mambench
from mambench.harness.counters import ncu
from mambench.harness.spec import Device, Outcome
from mambench.harness.workers.guard import Limits, Stopwatch
from mambench.harness.workers.pool import START_LIMIT_S, Code
from mambench.harness.workers.pool import environment as code_environment
from mambench.harness.workers.protocol import COMPILE

POLL_S = 0.1
MAX_PER_CHILD = 500  # each names two ranges on the command line
OVER = "the time for counting was over"
METHOD, RANGE_METHOD = "ncu-kernel-replay", "ncu-app-range"
KNOWN = "known"  # the item that comes first where ranges are counted: a copy of known bytes
KNOWN_TOLERANCE = 0.02
ALL_LAUNCHES = "all launches, counted as one range"
EXIT_LIMIT_S = 60.0  # ncu prints its table after the child has ended
INTERRUPT_LIMIT_S = 8.0  # ... where a person waits for it


@dataclass(frozen=True, kw_only=True)
class Counted:
    """What was counted for one case; values are tags of `spec.METRICS`."""

    outcome: Outcome = Outcome.OK
    reason: str | None = None
    values: Mapping[str, float | int | None] = field(default_factory=dict[str, float | int | None])
    details: Mapping[str, Any] = field(default_factory=dict[str, Any])
    duration_s: float = 0.0
    method: str = METHOD


@dataclass(frozen=True, kw_only=True)
class Request:
    """What the cases of one count share."""

    device: Device
    seed: int = 0
    threads: int = 1
    plugins: tuple[str, ...] = ()
    sys_path: tuple[str, ...] = ()
    code: Code = field(default_factory=Code)  # what the child imports
    compile_limit_s: float = 300.0
    time_limit_s: float = 60.0  # per case; ncu makes an execution slower than it is
    per_child: int = MAX_PER_CHILD  # ncu tells what it counted when its child has ended
    total_limit_s: float = math.inf  # of all cases; what is counted by then is kept
    keep: Path | None = None  # a folder for what ncu and the child wrote, to look into
    ranges: bool = False  # count all launches of an execution as one


Item = dict[str, Any]  # id, and one of case, copy_bytes, read_bytes, write_bytes, known


class Batch:
    """One child under ncu, and the items it was given."""

    def __init__(
        self,
        items: Sequence[Item],
        request: Request,
        folder: Path,
        begin: Callable[[str], None],
        ends_at: float = math.inf,
    ) -> None:
        proof: list[Item] = [{"id": KNOWN, "known": True}] if request.ranges else []
        self._items, self._request, self._folder = [*proof, *items], request, folder
        self._begin, self._ends_at = begin, ends_at
        self._log, self._report = folder / "ncu.log", folder / "report.jsonl"
        self._output = folder / "output.txt"
        self._read_bytes = 0
        self._ended: dict[str, Counted] = {}
        self._current: str | None = None
        self._begun_at = 0.0
        self._child: int | None = None
        self._l2: Mapping[str, Any] = {}
        self._known_bytes = 0
        self._proof: dict[str, int] = {}  # of the copy of known bytes
        self._ranges: list[str] = []
        self._starts = 0
        self.interrupted = False  # by a person: what was counted before is returned all the same
        limits = Limits(
            set_up_s=request.compile_limit_s, measure_s=request.time_limit_s, memory_bytes=0
        )
        self._limits, self._watch = limits, Stopwatch(limits)
        self._deadline = time.monotonic() + START_LIMIT_S

    def run(self) -> tuple[dict[str, Counted], str | None]:
        """Return how items ended, and why the others cannot be counted, if so."""
        self._report.touch()
        try:
            process = self._start()
        except OSError as error:
            return {}, f"Nsight Compute cannot be started: {error.strerror}"
        try:
            late = self._watch_over(process)
        except KeyboardInterrupt:
            self.interrupted, late = True, OVER
            self._kill_child(process)
            with contextlib.suppress(subprocess.TimeoutExpired):
                process.wait(INTERRUPT_LIMIT_S)
        finally:
            self._kill_all(process)
        if late is None and process.returncode and self._current is None and not self._ended:
            late = f"it ended with status {process.returncode} before the first case"
        return self._finish(late)

    def _start(self) -> "subprocess.Popen[bytes]":
        request = self._request
        values = {
            "device": _plain(request.device),
            "seed": request.seed,
            "runner": os.getpid(),
            "plugins": list(request.plugins),
            "sys_path": list(request.sys_path),
            "items": list(self._items),
            "ranges": request.ranges,
        }
        path = self._folder / "request.json"
        path.write_text(json.dumps(values))
        start = Path(mambench.__file__).with_name("_start.py")
        program = [sys.executable, "-P", str(start), *request.code.arguments]
        program += ["harness.counters.child"]
        names = [item["id"] for item in self._items]
        program += [str(path), str(self._report)]
        command = ncu.command("ncu", self._log, names, program, ranges=request.ranges)
        # ncu's lock file would otherwise be another user's in /tmp, and not ours to write.
        environment = code_environment(request.threads, request.code) | {
            "TMPDIR": str(self._folder),
            "TORCHINDUCTOR_CACHE_DIR": _inductor_cache(),  # in TMPDIR it would always be empty
            "TORCHINDUCTOR_COMPILE_THREADS": "1",  # else a pool of processes, each under ncu
        }
        with self._output.open("wb") as output:
            return subprocess.Popen(
                command,
                stdin=subprocess.DEVNULL,
                stdout=output,
                stderr=output,
                env=environment,
                start_new_session=True,
            )

    def _watch_over(self, process: "subprocess.Popen[bytes]") -> str | None:
        """Wait for the end; kills a child that is late and returns why."""
        late: str | None = None
        while True:
            with contextlib.suppress(subprocess.TimeoutExpired):
                process.wait(POLL_S)
                self._read_report()
                return late
            self._read_report()
            if late is None and (late := self._late()):
                self._kill_child(process)
                self._deadline = time.monotonic() + EXIT_LIMIT_S
            elif late is not None and time.monotonic() > self._deadline:
                self._kill_all(process)

    def _late(self) -> str | None:
        if ncu.PERMISSION in self._text():
            return "no permission"
        if time.monotonic() > self._ends_at and len(self._ended) < len(self._items):
            return OVER  # else ncu is about to print what it counted
        if self._current is not None:
            return self._watch.exceeded()
        if time.monotonic() < self._deadline:
            return None
        waited_for = "end" if self._ended else "begin"
        return f"it did not {waited_for} in time"

    def _kill_child(self, process: "subprocess.Popen[bytes]") -> None:
        """Kill only the child where it is known: ncu then still prints what it has counted."""
        if self._child is None or not _belongs(self._child, process.pid):
            self._kill_all(process)
            return
        with contextlib.suppress(ProcessLookupError, PermissionError):
            os.kill(self._child, signal.SIGKILL)

    def _kill_all(self, process: "subprocess.Popen[bytes]") -> None:
        """Kill what still runs of ncu and its child, and wait for ncu."""
        child = self._child
        with contextlib.suppress(ProcessLookupError, PermissionError):
            if child is not None and _belongs(child, process.pid):
                os.kill(child, signal.SIGKILL)
        with contextlib.suppress(ProcessLookupError, PermissionError):
            if process.poll() is None:  # once it is reaped its number may be another's
                os.killpg(process.pid, signal.SIGKILL)
        process.wait()

    def _read_report(self) -> None:
        with self._report.open("rb") as file:
            file.seek(self._read_bytes)
            data = file.read()
        whole = data[: data.rfind(b"\n") + 1]
        self._read_bytes += len(whole)
        for line in whole.splitlines():
            self._heard(json.loads(line))

    def _heard(self, message: Mapping[str, Any]) -> None:
        event = message["event"]
        if event == "start":  # more than once where ncu needs the program again for more passes
            self._child = message["pid"]
            self._starts += 1
            self._ended, self._current, self._ranges = {}, None, []
        elif event == "ready":
            self._l2, self._known_bytes = message["l2"], message.get("known_bytes", 0)
        elif event == "range":
            self._ranges.append(message["name"])
        elif event == "begin":
            self._current, self._begun_at = message["id"], time.monotonic()
            self._watch = Stopwatch(self._limits)
            self._watch.enter(COMPILE)
            if message["id"] != KNOWN:
                self._begin(message["id"])
        elif event == "phase":
            self._watch.enter(message["phase"])
        else:
            self._end(Outcome(message["outcome"]), message.get("reason"))

    def _end(self, outcome: Outcome, reason: str | None) -> None:
        assert self._current is not None
        self._ended[self._current] = Counted(
            outcome=outcome, reason=reason, duration_s=time.monotonic() - self._begun_at
        )
        self._current = None
        self._deadline = time.monotonic() + EXIT_LIMIT_S

    def _finish(self, late: str | None) -> tuple[dict[str, Counted], str | None]:
        """Join what the child told with what ncu counted."""
        text = self._text()
        known, error = ncu.known_problem(text), ncu.first_error(text)
        try:
            launches = ncu.parse(text, self._ranges)
        except ncu.FormatError as problem:
            return {}, str(problem)
        if not launches and known is not None:
            return {}, f"Nsight Compute: {known}"
        cut_off = self._current is not None
        if cut_off:
            phase = self._watch.phase
            died = f"the process under ncu died in phase '{phase}': {self._tail()}"
            ending = {None: Outcome.CRASHED, OVER: Outcome.SKIPPED}.get(late, Outcome.TIMEOUT)
            self._end(ending, late or died)
        elif not self._ended and late is not None:
            return {}, f"Nsight Compute: {error or late}: {self._tail()}"
        passes = ncu.passes(text + _read(self._output))
        if self._request.ranges:
            passes = passes or self._starts
            lost = cut_off and KNOWN not in launches  # with the child, as all else
            wrong = self._known_wrong(launches, passes, error)
            if wrong is not None and not (lost and self._ended):
                return {}, wrong
        found: dict[str, Counted] = {}
        for name, told in self._ended.items():
            if told.outcome is not Outcome.OK:
                found[name] = told
            elif name in launches or not cut_off:  # else lost with the child: count it again
                found[name] = self._counted(launches.get(name, {}), passes, told, error)
        return found, None

    def _known_wrong(
        self,
        launches: Mapping[str, Mapping[str, Sequence[ncu.Kernel]]],
        passes: int | None,
        error: str | None,
    ) -> str | None:
        """Return why the ranges of this ncu are not to be believed, by the copy of known bytes."""
        told = self._ended.pop(KNOWN, None)
        if told is None or told.outcome is not Outcome.OK:
            why = error or (told and told.reason) or self._tail()
            return f"a copy of known bytes could not be counted as one range: {why}"
        counted = self._counted(launches.get(KNOWN, {}), passes, told, error)
        if counted.outcome is not Outcome.OK:
            return f"a copy of known bytes was not counted as one range: {counted.reason}"
        self._proof = {"known_bytes": self._known_bytes}
        for tag in ("dram_read_bytes", "dram_write_bytes"):
            got = round(counted.values[tag] or 0)
            self._proof[tag] = got
            if abs(got - self._known_bytes) > KNOWN_TOLERANCE * self._known_bytes:
                return (
                    f"of a copy of {self._known_bytes:,} bytes in many launches ncu's range "
                    f"counted {got:,} as {tag}"
                )
        return None

    def _counted(
        self,
        ranges: Mapping[str, Sequence[ncu.Kernel]],
        passes: int | None,
        told: Counted,
        error: str | None,
    ) -> Counted:
        kernels, drain = ranges.get(ncu.RUN, ()), ranges.get(ncu.DRAIN, ())
        if not kernels:
            reason = error or "ncu saw no kernel in the case's range"
            return replace(told, outcome=Outcome.ERROR, reason=f"Nsight Compute: {reason}")
        read = _total([kernel.read_bytes for kernel in kernels])
        drained = _total([kernel.write_bytes for kernel in drain])
        written = _total([kernel.write_bytes for kernel in kernels])
        if read is None or written is None or drained is None or not drain:
            reason = error or "the counters of HBM traffic have no value on this GPU"
            return replace(told, outcome=Outcome.UNAVAILABLE, reason=f"Nsight Compute: {reason}")
        values = {
            "dram_read_bytes": read,
            "dram_write_bytes": written + drained,
            "dram_bytes": read + written + drained,
        }
        details = {
            "kernels": by_name(kernels),
            "launches": len(kernels),
            "left_dirty_in_l2_bytes": drained,  # part of dram_write_bytes
            "l2": {**self._l2, "after": "dirty lines written back and charged to the case"},
            "passes": passes,
            "clocks": "not locked",
            "not_counted": "cudaMemcpyAsync and cudaMemsetAsync, which are not kernels",
        }
        if not self._request.ranges:
            return replace(told, values=values, details=details)
        # One result for all launches: ncu says neither how many nor which they were.
        (whole,) = by_name(kernels)
        whole |= {"name": ALL_LAUNCHES, "launches": None}
        details |= {"kernels": [whole], "launches": None, "not_counted": None, "proof": self._proof}
        return replace(told, values=values, details=details, method=RANGE_METHOD)

    def _text(self) -> str:
        """Return what ncu wrote to its log, or else to its output."""
        log = _read(self._log)
        return log if log.strip() else _read(self._output)

    def _tail(self) -> str:
        lines = [line for line in _read(self._output).splitlines() if line.strip()]
        return lines[-1][:200] if lines else "it printed nothing"


def _belongs(child: int, ncu_pid: int) -> bool:
    """Whether a process is ncu's, and not one that got its number since."""
    try:
        process = psutil.Process(child)
        return os.getpgid(child) == ncu_pid or ncu_pid in (p.pid for p in process.parents())
    except (psutil.Error, OSError):
        return False


def by_name(kernels: Sequence[ncu.Kernel]) -> list[dict[str, Any]]:
    """Sum launches of one name, in the order of their first launch."""
    groups: dict[str, list[ncu.Kernel]] = {}
    for kernel in kernels:
        groups.setdefault(kernel.name, []).append(kernel)
    return [
        {
            "name": name,
            "launches": len(group),
            "dram_read_bytes": _total([kernel.read_bytes for kernel in group]),
            "dram_write_bytes": _total([kernel.write_bytes for kernel in group]),
            "profiled_time_s": _seconds([kernel.time_s for kernel in group]),
        }
        for name, group in groups.items()
    ]


def _inductor_cache() -> str:
    """Return where torch's compiler keeps what it compiled, as it chooses by itself."""
    if chosen := os.environ.get("TORCHINDUCTOR_CACHE_DIR"):
        return chosen
    try:
        user = getpass.getuser()
    except (KeyError, OSError):
        user = str(os.getuid())
    user = re.sub(r'[\\/:*?"<>|]', "_", user)
    return os.path.join(tempfile.gettempdir(), f"torchinductor_{user}")


def _total(values: Sequence[int | None]) -> int | None:
    """Return the sum, None if any is missing: a part would look like the whole."""
    known = [value for value in values if value is not None]
    return sum(known) if len(known) == len(values) else None


def _seconds(values: Sequence[float | None]) -> float | None:
    known = [value for value in values if value is not None]
    return sum(known) if len(known) == len(values) else None


def _plain(device: Device) -> dict[str, Any]:
    return {
        "kind": device.kind.value,
        "index": device.index,
        "name": device.name,
        "compute_capability": device.compute_capability,
        "memory_bytes": device.memory_bytes,
    }


def _read(path: Path) -> str:
    try:
        return path.read_text(errors="replace")
    except OSError:
        return ""
