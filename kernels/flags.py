"""Flags between the blocks of a launch: found zero and left zero, with no launch to reset them.

Launches on one stream follow one another and share a stream's flags. What is captured into a graph
may be replayed beside anything, but never beside itself: the launches of one capture on one stream
share flags that were zeroed long before and are given to no other capture. A launch must leave its
flags zero, and two must not run at once with the same ones.
"""

import ctypes
from collections.abc import Callable
from functools import lru_cache

import torch
from torch import Tensor
from triton.runtime import driver

_OF_A_STREAM = 1 << 12  # flags at least
_FOR_GRAPHS = 1 << 17  # flags, on each device that ever launches outside a capture
_ALIGNED = 32  # flags: pieces begin at multiples of 128 bytes

_streams: dict[tuple[int, int], Tensor] = {}
_graphs: dict[int, "_ForGraphs"] = {}


def flags(count: int, device: torch.device) -> Tensor:
    """Return `count` int32 zeros or more, for the next launch on the current stream.

    When those for graphs are given out, or a capture is the first that asks, the graph zeroes its
    flags itself, at the cost of a node.
    """
    index = device.index
    if index is None or not torch.cuda.is_initialized():
        return _zeros(count, device)
    stream = driver.active.get_current_stream(index)
    if torch.cuda.is_current_stream_capturing():
        known = _graphs.get(index)
        found = None if known is None else known.take(count, stream)
        return _zeros(count, device) if found is None else found
    found = _streams.get((index, stream))
    if found is None or found.shape[0] < count:
        found = _streams[index, stream] = _zeros(max(count, _OF_A_STREAM), device)
        if index not in _graphs:
            _graphs[index] = _ForGraphs(_zeros(_FOR_GRAPHS, device))
            torch.cuda.synchronize(device)  # a replay on any stream finds them written
    return found


class _ForGraphs:
    """Zeros of one device, given out to captures for good."""

    def __init__(self, zeros: Tensor) -> None:
        self.zeros = zeros
        self._given = 0
        self._last: dict[tuple[int, int], Tensor] = {}  # of the last capture, by stream

    def take(self, count: int, stream: int) -> Tensor | None:
        """Return zeros for a launch that is captured on a stream; None: there are none left."""
        capture = _capture(stream)
        key = (capture, stream)
        found = self._last.get(key)
        if capture and found is not None and found.shape[0] >= count:
            return found
        size = -(-count // _ALIGNED) * _ALIGNED
        if self._given + size > self.zeros.shape[0]:
            return None
        found = self.zeros[self._given : self._given + size]
        self._given += size
        if any(known[0] != capture for known in self._last):
            self._last.clear()
        self._last[key] = found
        return found


def _capture(stream: int) -> int:
    """Return the number that CUDA gave the capture that a stream is in; 0: not known."""
    ask = _capture_info()
    if ask is None:
        return 0
    status, number = ctypes.c_int(), ctypes.c_uint64()
    asked = ctypes.byref(status), ctypes.byref(number)
    failed = ask(ctypes.c_void_p(stream), *asked, None, None, None)
    return 0 if failed else number.value


@lru_cache(maxsize=1)
def _capture_info() -> Callable[..., int] | None:
    try:
        return ctypes.CDLL("libcuda.so.1").cuStreamGetCaptureInfo_v2
    except (OSError, AttributeError):
        return None


def _zeros(count: int, device: torch.device) -> Tensor:
    return torch.zeros(count, dtype=torch.int32, device=device)
