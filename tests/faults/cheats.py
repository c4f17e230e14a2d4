"""A plugin of attention implementations that cheat: each looks fast and passes a careless check."""

import importlib.util
import threading
import time
from pathlib import Path
from typing import Any

_PATH = Path(__file__).with_name("planted.py")
_SPEC = importlib.util.spec_from_file_location("planted_base", _PATH)
assert _SPEC is not None
assert _SPEC.loader is not None
_planted = importlib.util.module_from_spec(_SPEC)
_SPEC.loader.exec_module(_planted)
_Base, _attention = _planted._Planted, _planted._attention

LATE_S = 0.15


def _key(*tensors: Any) -> tuple[Any, ...]:
    return tuple((t.data_ptr(), t._version, t.shape) for t in tensors)


class NeverWrites(_Base):
    name = "never_writes"

    def attention(self, q: Any, k: Any, v: Any) -> Any:
        import torch

        return torch.empty_like(v)


class CachesResult(_Base):
    """Returns the memory of its first result."""

    name = "caches_result"

    def __init__(self) -> None:
        self.kept: dict[Any, Any] = {}

    def attention(self, q: Any, k: Any, v: Any) -> Any:
        key = _key(q, k, v)
        if key not in self.kept:
            self.kept[key] = _attention(q, k, v)
        return self.kept[key]


class CachesCopy(CachesResult):
    """Returns a copy of its first result, in memory of its own."""

    name = "caches_copy"

    def attention(self, q: Any, k: Any, v: Any) -> Any:
        return super().attention(q, k, v).clone()


class CachesOnceProven(CachesResult):
    """Is right for as long as the gate looks."""

    name = "caches_once_proven"
    calls = 0

    def attention(self, q: Any, k: Any, v: Any) -> Any:
        CachesOnceProven.calls += 1
        if CachesOnceProven.calls <= _planted.CALLS_BEFORE_TIMING:
            return _attention(q, k, v)
        return super().attention(q, k, v)


class ReusesBuffer(_Base):
    """Writes every result into the previous one."""

    name = "reuses_buffer"

    def __init__(self) -> None:
        self.buffer: Any = None

    def attention(self, q: Any, k: Any, v: Any) -> Any:
        result = _attention(q, k, v)
        if self.buffer is None:
            self.buffer = result
        return self.buffer.copy_(result)


class AliasesInput(_Base):
    """Saves an allocation: the result is the input's memory."""

    name = "aliases_input"

    def attention(self, q: Any, k: Any, v: Any) -> Any:
        return v.copy_(_attention(q, k, v))


class ChangesInput(_Base):
    name = "changes_input"

    def attention(self, q: Any, k: Any, v: Any) -> Any:
        result = _attention(q, k, v)
        k.data.mul_(0.5)  # as an operation does that keeps a scaled copy in place
        return result


class Lazy(_Base):
    """Computes when somebody reads the result."""

    name = "lazy"

    def attention(self, q: Any, k: Any, v: Any) -> Any:
        return _lazy_type()(lambda: _attention(q, k, v), like=v)


class LeavesThread(_Base):
    """Returns at once; a thread writes the result later."""

    name = "leaves_thread"

    def attention(self, q: Any, k: Any, v: Any) -> Any:
        import torch

        out = torch.empty_like(v)

        def work() -> None:
            time.sleep(LATE_S)
            out.copy_(_attention(q, k, v))

        threading.Thread(target=work).start()
        return out


class LeavesStream(_Base):
    """Runs on a stream of its own, which the caller's does not wait for (GPU only)."""

    name = "leaves_stream"

    def attention(self, q: Any, k: Any, v: Any) -> Any:
        import torch

        if not hasattr(self, "stream"):
            self.stream = torch.cuda.Stream()
        with torch.cuda.stream(self.stream):
            return _attention(q, k, v)


def _lazy_type() -> Any:
    """Return a class of tensors that compute themselves when an operation needs their values."""
    import torch

    class LazyTensor(torch.Tensor):
        @staticmethod
        def __new__(cls, compute: Any, like: Any) -> Any:
            return torch.Tensor._make_wrapper_subclass(cls, like.shape, dtype=like.dtype)

        def __init__(self, compute: Any, like: Any) -> None:
            self.compute = compute

        @classmethod
        def __torch_dispatch__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None):
            def read(value: Any) -> Any:
                return value.compute() if isinstance(value, cls) else value

            return func(*map(read, args), **(kwargs or {}))

    return LazyTensor
