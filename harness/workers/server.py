"""The fork server: has torch imported and little else, and forks a worker for each request.

Started by `harness.workers.pool` in a fresh interpreter. A fork costs milliseconds where importing
torch costs seconds. It is safe because nothing that does not survive a fork has happened here: no
CUDA context, no OpenMP or Numba parallel region, no plugin. It ends, and takes its workers along,
when the socket to its parent closes: however the parent ends, nothing is left behind.
"""

import contextlib
import ctypes
import gc
import importlib
import importlib.util
import os
import pickle
import select
import signal
import socket
import sys
import traceback
from multiprocessing.connection import Connection
from typing import Any, NoReturn

PR_SET_PDEATHSIG = 1


def main(arguments: list[str]) -> None:
    """Serve on the inherited socket whose descriptor is the only argument."""
    control = socket.socket(fileno=int(arguments[0]))
    # While torch is being imported nobody watches the socket, so the kernel watches the parent.
    _die_with_parent(int(arguments[1]))
    _preload()
    gc.freeze()  # keeps the collector from touching, and so copying, the pages workers share
    _set_parent_death_signal(0)
    _Server(control).serve()


def _preload() -> None:
    import torch

    if importlib.util.find_spec("triton") is not None:
        importlib.import_module("triton")
    # Our own modules do nothing when imported; workers need not each import them anew.
    from mambench.harness import gate as gate
    from mambench.harness import registry as registry
    from mambench.harness import worker as worker

    if torch.cuda.is_initialized():
        raise RuntimeError("an import initialised CUDA: workers cannot be forked")


class _Server:
    """Answers a request with ("forked", pid), and tells of each end: ("exited", pid, status)."""

    def __init__(self, control: socket.socket) -> None:
        self._control = control
        self._workers: set[int] = set()

    def serve(self) -> None:
        wake_read, wake_write = os.pipe()
        os.set_blocking(wake_write, False)
        os.set_blocking(wake_read, False)
        signal.set_wakeup_fd(wake_write, warn_on_full_buffer=False)
        signal.signal(signal.SIGCHLD, lambda number, frame: None)
        self._wake = (wake_read, wake_write)
        self._send("ready")
        try:
            while True:
                ready, _, _ = select.select([self._control, wake_read], [], [])
                if wake_read in ready:
                    with contextlib.suppress(BlockingIOError):
                        os.read(wake_read, 4096)
                    self._reap()
                if self._control in ready and not self._answer():
                    return
        finally:
            self._kill_all()

    def _answer(self) -> bool:
        """Fork a worker for one request; returns whether the parent is still there."""
        data, descriptors, _, _ = socket.recv_fds(self._control, 4096, 2)
        if not data:
            return False
        server = os.getpid()
        pid = os.fork()
        if pid == 0:
            self._become_worker(server, *descriptors)
        for descriptor in descriptors:
            os.close(descriptor)
        self._workers.add(pid)
        self._send("forked", pid)
        return True

    def _become_worker(self, server: int, connection: int, output: int) -> NoReturn:
        status = 1
        try:
            self._control.close()
            signal.set_wakeup_fd(-1)
            signal.signal(signal.SIGCHLD, signal.SIG_DFL)
            for descriptor in self._wake:
                os.close(descriptor)
            _die_with_parent(server)
            os.setsid()  # so that what the worker starts dies with it, by killpg
            prepare_process(output)
            from mambench.harness import worker

            worker.serve(Connection(connection))
            status = 0
        except BaseException:
            traceback.print_exc()
        finally:
            # Not sys.exit: nothing of the server's may be run or flushed a second time.
            os._exit(status)

    def _reap(self) -> None:
        while True:
            try:
                pid, status = os.waitpid(-1, os.WNOHANG)
            except ChildProcessError:
                return
            if pid == 0:
                return
            if pid in self._workers:
                self._workers.discard(pid)
                with contextlib.suppress(ProcessLookupError, PermissionError):
                    os.killpg(pid, signal.SIGKILL)  # what the worker had started
                self._send("exited", pid, os.waitstatus_to_exitcode(status))

    def _kill_all(self) -> None:
        for pid in self._workers:
            for kill in (os.killpg, os.kill):  # a worker that has not called setsid has no group
                with contextlib.suppress(ProcessLookupError, PermissionError):
                    kill(pid, signal.SIGKILL)

    def _send(self, *message: Any) -> None:
        with contextlib.suppress(BrokenPipeError, ConnectionResetError):
            self._control.send(pickle.dumps(message))


def prepare_process(output: int) -> None:
    """Give a worker's process its output file, no input, and the first place in an OOM killing."""
    os.dup2(output, 1)
    os.dup2(output, 2)
    nothing = os.open(os.devnull, os.O_RDONLY)
    os.dup2(nothing, 0)
    with contextlib.suppress(OSError), open("/proc/self/oom_score_adj", "w") as file:
        file.write("1000")  # better the worker than the run


def _die_with_parent(parent: int) -> None:
    _set_parent_death_signal(signal.SIGKILL)
    if os.getppid() != parent:  # it died before the call
        os._exit(1)


def _set_parent_death_signal(number: int) -> None:
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, number, 0, 0, 0)


if __name__ == "__main__":
    main(sys.argv[1:])
