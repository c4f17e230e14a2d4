"""Workers that are newly executed interpreters: where forking a process with torch is not safe.

Slower to start than `harness.workers.pool`'s by the time it takes to import torch. Imports no torch
itself.
"""

import contextlib
import os
import signal
import socket
import subprocess
import sys
import threading
from multiprocessing.connection import Connection
from pathlib import Path
from types import TracebackType
from typing import Self

import mambench
from mambench.harness.workers.pool import EXIT_LIMIT_S, Code, Worker, environment, output_file
from mambench.harness.workers.protocol import WorkerConfig


class SpawnPool:
    """Starts a new interpreter for each worker; see `harness.workers.pool.Pool`."""

    def __init__(self, *, threads: int, code: Code | None = None) -> None:
        self.threads = threads
        self._code = code or Code()
        # Nothing is ever written. Workers hold the reading end, and see its end when this process
        # ends, in whatever way.
        self._reading, self._writing = os.pipe()
        self._processes: dict[int, subprocess.Popen[bytes]] = {}

    def worker(self, config: WorkerConfig) -> Worker:
        """Start an interpreter; it imports torch while the caller goes on."""
        start = Path(mambench.__file__).with_name("_start.py")
        ours, theirs = socket.socketpair()
        output = output_file()
        with theirs:
            process = subprocess.Popen(
                [
                    *(sys.executable, "-P", str(start), *self._code.arguments),
                    *("harness.workers.spawn", str(theirs.fileno()), str(self._reading)),
                ],
                pass_fds=[theirs.fileno(), self._reading],
                stdin=subprocess.DEVNULL,
                stdout=output,
                stderr=output,
                env=environment(self.threads, self._code),
                start_new_session=True,  # Ctrl-C is the runner's to handle
            )
        self._processes[process.pid] = process
        worker = Worker(self, process.pid, Connection(ours.detach()), output)
        worker.send(config)
        return worker

    def wait_ready(self) -> None:
        """Return at once: each worker imports torch by itself."""

    def exit_code(self, pid: int, limit_s: float = EXIT_LIMIT_S) -> int | None:
        """Return how a worker ended: its status, or minus the signal; None if it still runs."""
        process = self._processes[pid]
        if limit_s <= 0:
            return process.poll()
        with contextlib.suppress(subprocess.TimeoutExpired):
            return process.wait(limit_s)
        return None

    def fileno(self) -> int:
        """Return a descriptor that never becomes readable: ends show at the connections."""
        return self._reading

    def close(self) -> None:
        """Kill all workers and wait until they are gone."""
        for pid, process in self._processes.items():
            if process.poll() is None:
                with contextlib.suppress(ProcessLookupError, PermissionError):
                    os.killpg(pid, signal.SIGKILL)
                process.wait()
        os.close(self._writing)
        os.close(self._reading)

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.close()


def main(arguments: list[str]) -> None:
    """Be a worker on an inherited socket, as long as the inherited pipe is open."""
    connection, lifeline = map(int, arguments)
    threading.Thread(target=_die_with, args=(lifeline,), daemon=True).start()
    from mambench.harness import worker

    worker.serve(Connection(connection))
    # Not sys.exit: a library's clean-up must not be able to hang an ended worker.
    os._exit(0)


def _die_with(lifeline: int) -> None:
    os.read(lifeline, 1)
    os.killpg(os.getpid(), signal.SIGKILL)


if __name__ == "__main__":
    main(sys.argv[1:])
