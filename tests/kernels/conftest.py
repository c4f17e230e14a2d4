"""What the kernels compile to, from the inventory that `check --static` judges too."""

import functools
from collections.abc import Callable

import pytest

from mambench.harness.static.binary import Binary
from mambench.harness.static.record import record

Binaries = Callable[..., dict[str, Binary]]


@pytest.fixture(scope="session")
def binaries() -> Binaries:
    """Return a function of an entry's name, an architecture and kernels' names: {name: binary}.

    Of a kernel that is launched in several forms, the one with the largest stack.
    """
    from mambench.kernels.inventory import ENTRIES

    calls = {entry.name: entry.call for entry in ENTRIES}

    @functools.cache
    def of(entry: str, architecture: int, *kernels: str) -> dict[str, Binary]:
        return compiled(calls[entry], architecture, *kernels)

    return of


@pytest.fixture(scope="session")
def compile_call() -> Binaries:
    """Return the same of a call that is not in the inventory; nothing is remembered."""
    return compiled


def compiled(call: Callable, architecture: int, *kernels: str) -> dict[str, Binary]:
    found: dict[str, Binary] = {}
    for launch in record(call, architecture):
        if kernels and launch.name not in kernels:
            continue
        binary = Binary.of(launch.compile())
        kept = found.get(launch.name)
        if kept is None or binary.stack_bytes > kept.stack_bytes:
            found[launch.name] = binary
    assert set(kernels) <= set(found)
    return found
