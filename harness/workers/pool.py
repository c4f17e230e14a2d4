"""Worker processes: forked from a server that has torch imported, killed without leaving anything.

Imports neither torch nor triton: the runner's own process stays light and free of CUDA.
"""

import contextlib
import fcntl
import os
import pickle
import select
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Mapping
from dataclasses import dataclass, field
from multiprocessing.connection import Connection
from pathlib import Path
from types import TracebackType
from typing import IO, Any, Protocol, Self

import mambench
from mambench.harness.errors import MeasurementError
from mambench.harness.workers.protocol import WorkerConfig

START_LIMIT_S = 300.0  # importing torch from a cold network disk takes minutes
FORK_LIMIT_S = 60.0
EXIT_LIMIT_S = 10.0
TAIL_BYTES = 4000
_THREAD_VARIABLES = (
    "OMP_NUM_THREADS",
    "MKL_NUM_THREADS",
    "OPENBLAS_NUM_THREADS",
    "NUMBA_NUM_THREADS",
)


class Processes(Protocol):
    """What a worker's handle needs of where it came from."""

    def exit_code(self, pid: int, limit_s: float = EXIT_LIMIT_S) -> int | None:
        """Return how a worker ended: its status, or minus the signal; None if it still runs."""

    def fileno(self) -> int:
        """Return a descriptor that may become readable when a worker ends."""
        ...


class Pool(Processes, Protocol):
    """Starts workers; a context manager that leaves no process behind."""

    def worker(self, config: WorkerConfig) -> "Worker":
        """Start a worker; raises MeasurementError if that cannot be done."""
        ...

    def wait_ready(self) -> None:
        """Wait until a worker can be started at once; raises MeasurementError if none ever can."""

    def close(self) -> None:
        """End all workers, and wait until they are gone."""

    def __enter__(self) -> Self: ...

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None: ...


@dataclass(frozen=True, kw_only=True)
class Code:
    """What a pool's processes import, where that is not what this process would."""

    root: Path | None = None  # the checkout of `implementations` and `kernels`; this one if None
    path: tuple[str, ...] = ()  # folders before all others on their sys.path
    variables: Mapping[str, str] = field(default_factory=dict[str, str])  # unless set already

    @property
    def arguments(self) -> tuple[str, ...]:
        """What `mambench/_start.py` is told."""
        return ("--code", str(self.root)) if self.root else ()


def make_pool(*, threads: int, code: Code | None = None) -> Pool:
    """Return the pool for this system: forking on Linux, elsewhere a new interpreter per worker."""
    if sys.platform == "linux":
        return WorkerPool(threads=threads, code=code)
    from mambench.harness.workers.spawn import SpawnPool

    return SpawnPool(threads=threads, code=code)


class WorkerPool:
    """Forks workers from a server that has torch imported; Linux only."""

    def __init__(self, *, threads: int, code: Code | None = None) -> None:
        """Start the fork server; it imports torch while the caller goes on.

        Args:
            threads: CPU threads of each worker. OpenMP reads its variable when torch is imported,
                so this belongs to the server and not to a worker.
            code: what the workers import, if it is not what this process would.
        """
        self.threads = threads
        code = code or Code()
        self._output = tempfile.TemporaryFile()  # noqa: SIM115 - closed by close()
        self._control, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        start = Path(mambench.__file__).with_name("_start.py")
        with theirs:
            self._server = subprocess.Popen(
                [
                    *(sys.executable, "-P", str(start), *code.arguments, "harness.workers.server"),
                    *(str(theirs.fileno()), str(os.getpid())),
                ],
                pass_fds=[theirs.fileno()],
                stdin=subprocess.DEVNULL,
                stdout=self._output,
                stderr=self._output,
                env=environment(threads, code),
                start_new_session=True,  # Ctrl-C is the runner's to handle
            )
        self._ready = False
        self._exits: dict[int, int] = {}

    def wait_ready(self) -> None:
        """Wait until torch is imported; raises MeasurementError if it cannot be."""
        if not self._ready:
            self._receive("ready", START_LIMIT_S)
            self._ready = True

    def worker(self, config: WorkerConfig) -> "Worker":
        """Fork a worker; raises MeasurementError if the server cannot."""
        self.wait_ready()
        ours, theirs = socket.socketpair()
        output = output_file()
        with theirs:
            try:
                socket.send_fds(self._control, [b"fork"], [theirs.fileno(), output.fileno()])
            except OSError as error:
                raise self._broken() from error
        (pid,) = self._receive("forked", FORK_LIMIT_S)
        worker = Worker(self, pid, Connection(ours.detach()), output)
        worker.send(config)
        return worker

    def exit_code(self, pid: int, limit_s: float = EXIT_LIMIT_S) -> int | None:
        """Return how a worker ended: its status, or minus the signal; None if it still runs."""
        deadline = time.monotonic() + limit_s
        while pid not in self._exits:
            left = deadline - time.monotonic()
            if not self._poll(max(0.0, left)) and left <= 0:
                return None
        return self._exits[pid]

    def close(self) -> None:
        """End the server and all workers, and wait until they are gone."""
        self._control.close()
        if not self._ready:  # it imports torch, looks at nothing meanwhile, and has no workers
            self._server.kill()
        try:
            self._server.wait(EXIT_LIMIT_S)
        except subprocess.TimeoutExpired:
            self._server.kill()
            self._server.wait()
        self._output.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.close()

    def fileno(self) -> int:
        """The server's socket, readable when a worker has ended."""
        return self._control.fileno()

    def _receive(self, wanted: str, limit_s: float) -> tuple[Any, ...]:
        deadline = time.monotonic() + limit_s
        while (left := deadline - time.monotonic()) > 0:
            message = self._poll(left)
            if message and message[0] == wanted:
                return message[1:]
        raise self._broken(f"did not answer within {limit_s:.0f} s")

    def _poll(self, timeout_s: float) -> tuple[Any, ...] | None:
        """Take one message of the server, noting a worker's end; None if there was none in time."""
        ready, _, _ = select.select([self._control], [], [], timeout_s)
        if not ready:
            return None
        try:
            data = self._control.recv(4096)
        except ConnectionResetError:
            data = b""
        if not data:
            raise self._broken()
        message: tuple[Any, ...] = pickle.loads(data)
        if message[0] == "exited":
            self._exits[message[1]] = message[2]
        elif message[0] == "forked":  # the number may have been an earlier worker's
            self._exits.pop(message[1], None)
        return message

    def _broken(self, what: str = "ended") -> MeasurementError:
        tail = read_tail(self._output)
        return MeasurementError(
            f"the server of worker processes {what}: {tail or 'it printed nothing'}\n"
            f"Check that `{sys.executable} -c 'import torch'` works."
        )


class Worker:
    """One worker process as the runner sees it."""

    def __init__(
        self, pool: "Processes", pid: int, connection: Connection, output: IO[bytes]
    ) -> None:
        self.pid = pid
        self.connection = connection
        self._pool = pool
        self._output = output

    def send(self, message: object) -> None:
        """Send a message; a worker that is gone is noticed when its answer is awaited."""
        with contextlib.suppress(BrokenPipeError, ConnectionResetError):
            self.connection.send(message)

    def receive(self, timeout_s: float) -> Any:
        """Return the next message, None if there is none in time; raises EOFError at its end."""
        ready, _, _ = select.select([self.connection, self._pool], [], [], timeout_s)
        if self.connection in ready:
            try:
                return self.connection.recv()
            except (ConnectionResetError, pickle.UnpicklingError) as error:
                raise EOFError from error
        # What the worker started may hold its end of the socket open: then there is no end of
        # file, and only the server knows that the worker is gone.
        if self._pool in ready and self._pool.exit_code(self.pid, limit_s=0) is not None:
            raise EOFError
        return None

    def clear_output(self) -> None:
        """Forget what was printed so far."""
        os.ftruncate(self._output.fileno(), 0)

    def output_tail(self) -> str:
        """Return the end of what the worker printed."""
        return read_tail(self._output)

    def kill(self) -> int | None:
        """Kill it and what it started, if it still runs; returns the exit code, see `exit_code`."""
        if self._pool.exit_code(self.pid, limit_s=0) is None:  # else its number may be another's
            for kill in (os.killpg, os.kill):
                with contextlib.suppress(ProcessLookupError, PermissionError):
                    kill(self.pid, signal.SIGKILL)
        return self.end()

    def end(self) -> int | None:
        """Close the connection, at which an idle worker ends, and return the exit code."""
        self.connection.close()
        code = self._pool.exit_code(self.pid)
        self._output.close()
        return code


def thread_environment(threads: int) -> dict[str, str]:
    """Return the environment of a process whose libraries use this many threads."""
    return os.environ | dict.fromkeys(_THREAD_VARIABLES, str(threads))


def environment(threads: int, code: Code) -> dict[str, str]:
    """Return the environment of a process that imports this code on so many threads."""
    found = {**code.variables, **thread_environment(threads)}
    path = [*code.path, *filter(None, [found.get("PYTHONPATH")])]
    return found | ({"PYTHONPATH": os.pathsep.join(path)} if code.path else {})


def output_file() -> IO[bytes]:
    """Make a nameless file for a worker's output, that can be emptied while it is written."""
    file = tempfile.TemporaryFile(buffering=0)  # noqa: SIM115 - the worker's `end` closes it
    flags = fcntl.fcntl(file.fileno(), fcntl.F_GETFL)
    fcntl.fcntl(file.fileno(), fcntl.F_SETFL, flags | os.O_APPEND)
    return file


def read_tail(file: IO[bytes]) -> str:
    """Return the end of a file of output as text."""
    size = os.fstat(file.fileno()).st_size
    data = os.pread(file.fileno(), TAIL_BYTES, max(0, size - TAIL_BYTES))
    return data.decode(errors="replace").strip()


def signal_name(exit_code: int) -> str:
    """Return "SIGSEGV" for -11."""
    try:
        return signal.Signals(-exit_code).name
    except ValueError:
        return f"signal {-exit_code}"
