"""Flags between the blocks of a launch: found zero and left zero, with no launch to reset them.

Launches on one stream follow one another and share a stream's flags. What is captured into a graph
may be replayed beside anything, but never beside itself: each captured launch gets flags of its
own, zeroed long before, which are not given out again. A launch must leave its flags zero, and two
must not run at once with the same ones.
"""

import torch
from torch import Tensor
from triton.runtime import driver

_ALIGNED = 32  # flags: 128 bytes
_OF_A_STREAM = 1 << 12  # flags at least
_FOR_GRAPHS = 1 << 17  # flags, on each device that ever launches outside a capture

_streams: dict[tuple[int, int], Tensor] = {}
_graphs: dict[int, tuple[Tensor, int]] = {}  # and how many are given out


def flags(count: int, device: torch.device) -> Tensor:
    """Return `count` int32 zeros for one launch on the current stream, the next one.

    Beside those of graphs, when they are given out, the zeros of a captured launch are written by
    the graph itself, at the cost of a node.
    """
    index = device.index
    if index is None or not torch.cuda.is_initialized():
        return _zeros(count, device)
    if torch.cuda.is_current_stream_capturing():
        return _for_graph(count, device)
    key = (index, driver.active.get_current_stream(index))
    found = _streams.get(key)
    if found is None or found.shape[0] < count:
        found = _streams[key] = _zeros(max(count, _OF_A_STREAM), device)
        if index not in _graphs:
            _graphs[index] = (_zeros(_FOR_GRAPHS, device), 0)
            torch.cuda.synchronize(device)  # a replay on any stream finds them written
    return found


def _for_graph(count: int, device: torch.device) -> Tensor:
    count = -(-count // _ALIGNED) * _ALIGNED
    zeros, given = _graphs.get(device.index, (None, 0))
    if zeros is None or given + count > zeros.shape[0]:
        return _zeros(count, device)
    _graphs[device.index] = (zeros, given + count)
    return zeros[given : given + count]


def _zeros(count: int, device: torch.device) -> Tensor:
    return torch.zeros(count, dtype=torch.int32, device=device)
