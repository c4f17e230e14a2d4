"""One run per device at a time: two would disturb each other's times. Imports no torch."""

import fcntl
import json
import os
import re
import tempfile
import time
from collections.abc import Callable, Generator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from mambench.harness.errors import DeviceBusyError

POLL_S = 0.5


@contextmanager
def device_lock(
    key: str,
    *,
    holder: str,
    wait: bool = False,
    folder: Path | None = None,
    on_wait: Callable[[str], None] | None = None,
    pause: Callable[[float], None] = time.sleep,
) -> Generator[None]:
    """Hold a device, named by its UUID or "cpu", while the block runs.

    The lock belongs to the process: however it ends, the kernel releases it. It holds between all
    users of the machine who share the temporary folder.

    Args:
        key: GPU UUID or "cpu".
        holder: what to show to others who find the device busy, such as the run's folder.
        wait: wait for the device instead of raising.
        folder: where lock files are; the system's temporary folder if None.
        on_wait: called once, with a sentence, before waiting.
        pause: waits between two attempts.

    Raises DeviceBusyError if another run holds the device.
    """
    path = _lock_path(key, folder)
    descriptor = _open(path)
    try:
        told = False
        while not _try_lock(descriptor):
            text = _busy(key, descriptor)
            if not wait:
                raise DeviceBusyError(f"{text} Wait for it to end, or run again with --wait.")
            if on_wait and not told:
                on_wait(f"{text} Waiting for it to end.")
                told = True
            pause(POLL_S)
        _write_holder(descriptor, holder)
        yield
    finally:
        os.close(descriptor)  # releases the lock; the file stays, removing it would race


def _lock_path(key: str, folder: Path | None) -> Path:
    name = re.sub(r"[^A-Za-z0-9-]", "_", key)
    return (folder or Path(tempfile.gettempdir())) / f"mambench-{name}.lock"


def _open(path: Path) -> int:
    # Open without O_CREAT first: in a sticky folder Linux refuses O_CREAT on another user's file.
    try:
        return os.open(path, os.O_RDWR | os.O_CLOEXEC)
    except FileNotFoundError:
        descriptor = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o666)
        if os.fstat(descriptor).st_uid == os.getuid():
            os.chmod(path, 0o666)
        return descriptor


def _try_lock(descriptor: int) -> bool:
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    return True


def _write_holder(descriptor: int, holder: str) -> None:
    os.ftruncate(descriptor, 0)
    os.pwrite(descriptor, json.dumps({"pid": os.getpid(), "holder": holder}).encode(), 0)


def _busy(key: str, descriptor: int) -> str:
    try:
        found: dict[str, Any] = json.loads(os.pread(descriptor, 4096, 0))
        who = f"process {found['pid']} ({found['holder']})"
    except (ValueError, KeyError, TypeError):
        who = "another process"
    return f"{'the CPU' if key == 'cpu' else key} is in use by another run: {who}."
