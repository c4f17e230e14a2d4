"""Make something in a second process while this one goes on: large reports keep two cores busy."""

import os
import threading
import warnings
from collections.abc import Callable, Generator
from contextlib import contextmanager

_DONE = b"\x01"  # ends what was made as a whole


def worthwhile(count: int, least: int) -> bool:
    """Return whether there are a second core and work enough for it, and no thread is in the way.

    What another thread of this process holds locked would stay locked in a copy.
    """
    alone = hasattr(os, "sched_getaffinity") and threading.active_count() == 1
    return count >= least and alone and len(os.sched_getaffinity(0)) > 1


@contextmanager
def making(make: Callable[[], bytes], *, fork: bool) -> Generator[Callable[[], bytes]]:
    """Start `make` in a copy of this process; what is yielded returns its bytes, waiting for them.

    Where the copy fails, or with `fork` false, they are made here, so that what goes wrong is
    raised here too.
    """
    if not fork:
        yield make
        return
    source, sink = os.pipe()
    with warnings.catch_warnings():
        # Python warns that locks of other threads stay locked in the copy. Those are of numpy's
        # linear algebra, which `make` must not use.
        warnings.simplefilter("ignore", DeprecationWarning)
        child = os.fork()
    if child == 0:
        os.close(source)  # else a sink that no one reads would never break
        _send(make, sink)
    os.close(sink)
    with open(source, "rb") as pipe:

        def wait() -> bytes:
            found = pipe.read()
            return found[:-1] if found.endswith(_DONE) else make()

        try:
            yield wait
        finally:
            pipe.close()  # a copy that is still writing ends
            os.waitpid(child, 0)


def _send(make: Callable[[], bytes], sink: int) -> None:
    try:
        with open(sink, "wb") as pipe:
            pipe.write(make() + _DONE)
    finally:
        os._exit(0)  # leave what the process is a copy of, its files and its output, alone
