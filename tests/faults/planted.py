"""A plugin of attention implementations: one right, each of the others with one fault."""

import ctypes
import os
import signal
from collections.abc import Callable
from typing import Any

from mambench.harness.spec import Case, Device, Family
from mambench.implementations.base import Implementation, Variant

TOO_MUCH_BYTES = 3 << 30  # where the hoarder gives up if nobody stops it
CALLS_BEFORE_TIMING = 3  # the first call and two of the gate


class _Planted(Implementation):
    """Right, unless `fault` says otherwise."""

    families = (Family.ATTENTION,)
    summary = "planted"

    def variants(self, device: Device) -> tuple[Variant, ...]:
        return (Variant(name="planted"),)

    def op(self, family: Family, variant: str) -> Callable[..., Any]:
        return self.attention

    def attention(self, q: Any, k: Any, v: Any) -> Any:
        self.fault()
        return _attention(q, k, v)

    def fault(self) -> None:
        """Do nothing wrong."""


def _attention(q: Any, k: Any, v: Any) -> Any:
    from torch.nn.functional import scaled_dot_product_attention as sdpa

    return sdpa(*(x.transpose(1, 2) for x in (q, k, v)), is_causal=True).transpose(1, 2)


class Good(_Planted):
    name = "good"


class Wrong(_Planted):
    name = "wrong"

    def attention(self, q: Any, k: Any, v: Any) -> Any:
        return 1.01 * _attention(q, k, v)


class Raises(_Planted):
    name = "raises"

    def fault(self) -> None:
        raise ValueError("planted fault\nwith a second line")


class Leaves(_Planted):
    name = "leaves"

    def fault(self) -> None:
        raise SystemExit(3)


class Refuses(_Planted):
    name = "refuses"

    def fault(self) -> None:
        raise NotImplementedError("headdim 8 is too small")


class RunsOut(_Planted):
    name = "runs_out"

    def fault(self) -> None:
        raise MemoryError


class Segfaults(_Planted):
    name = "segfaults"

    def fault(self) -> None:
        ctypes.string_at(1)


class KillsItself(_Planted):
    name = "kills_itself"

    def fault(self) -> None:
        os.kill(os.getpid(), signal.SIGKILL)


class Exits(_Planted):
    name = "exits"

    def fault(self) -> None:
        os._exit(7)


class HangsAtOnce(_Planted):
    name = "hangs_at_once"

    def fault(self) -> None:
        _hang()


class HangsLater(_Planted):
    name = "hangs_later"
    calls = 0

    def fault(self) -> None:
        HangsLater.calls += 1
        if HangsLater.calls > CALLS_BEFORE_TIMING:
            _hang()


class Hoards(_Planted):
    name = "hoards"

    def fault(self) -> None:
        held = []
        while sum(map(len, held)) < TOO_MUCH_BYTES:
            held.append(b"x" * (64 << 20))
        raise AssertionError("nobody stopped the hoarding")


class Prints(_Planted):
    name = "prints"

    def fault(self) -> None:
        print("x" * 10_000, "last words", flush=True)
        os.abort()


class CompilesBadly(_Planted):
    name = "compiles_badly"

    def precompile(self, case: Case) -> None:
        raise RuntimeError("planted compiler")

    def precompile_share(self, case: Case, share: int, shares: int) -> None:
        raise RuntimeError(f"planted compiler, {share} of {shares}")


class CompilesWhole(_Planted):
    """Knows of no shares, as an older commit's implementations."""

    name = "compiles_whole"

    def precompile(self, case: Case) -> None:
        raise RuntimeError("planted whole compiler")


class Older(_Planted):
    """An implementation of a commit whose base class had fewer hooks than today's."""

    name = "older"

    @property
    def begin_case(self) -> Any:
        raise AttributeError("begin_case")


class DiesCompiling(_Planted):
    name = "dies_compiling"

    def precompile(self, case: Case) -> None:
        os.abort()


class LeavesChild(_Planted):
    """Starts a process that outlives it and holds its end of the connection open."""

    name = "leaves_child"

    def fault(self) -> None:
        if os.fork() == 0:
            _hang()
        os._exit(8)


class Allocates(_Planted):
    """Holds 64 MiB beside its result for a moment."""

    name = "allocates"

    def attention(self, q: Any, k: Any, v: Any) -> Any:
        import torch

        held = torch.ones(64 << 20, dtype=torch.uint8)
        return _attention(q, k, v) + 0 * held[0]


class Tunes(_Planted):
    """Right only at the length for which it was begun last, and begun once for each case."""

    name = "tunes"

    def __init__(self) -> None:
        self.begun: list[int | None] = []

    def begin_case(self, case: Case) -> None:
        self.begun.append(case.problem.seqlen)

    def attention(self, q: Any, k: Any, v: Any) -> Any:
        if self.begun[-1] != q.shape[1] or len(set(self.begun)) < len(self.begun):
            raise RuntimeError(f"begun for {self.begun}, called with {q.shape[1]}")
        return _attention(q, k, v)


def _hang() -> None:
    ctypes.PyDLL(None).pause()  # holds the interpreter's lock: no thread, no handler can run
