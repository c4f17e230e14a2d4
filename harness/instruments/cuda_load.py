"""Keeps a GPU busy with one execution. Imports torch at module level; used by workers only."""

import time
from collections import deque
from collections.abc import Callable

import torch

from mambench.harness.instruments.cuda_timing import NotCapturableError, capture
from mambench.harness.instruments.timing import Execute, repetitions

CHUNK_S = 0.005  # of work put into the queue at a time
QUEUED_CHUNKS = 2
MAX_EXECUTIONS_PER_GRAPH = 100
NAP_S = 0.0005


class Load:
    """Repeats an execution without a pause: a chunk is queued before the one before it has ended.

    Attributes:
        method: how executions are launched.
        not_captured: why no graph is replayed; then the device may pause between kernels.
    """

    def __init__(self, execute: Execute, once_s: float, *, not_capturable: str | None) -> None:
        self._launch, self._each = execute, 1
        self._graph: torch.cuda.CUDAGraph | None = None
        self.method, self.not_captured = "eager", not_capturable
        if not_capturable is None:
            try:
                self._each = min(repetitions(once_s, CHUNK_S), MAX_EXECUTIONS_PER_GRAPH)
                self._graph = capture(execute, self._each)
                self._launch, self.method = self._graph.replay, "cuda-graph"
            except NotCapturableError as error:
                self._each, self.not_captured = 1, str(error)
        self._launches = repetitions(once_s * self._each, CHUNK_S)
        self._queued: deque[torch.cuda.Event] = deque()

    def burst(self, poll: Callable[[], None]) -> int:
        """Queue a chunk, wait for the oldest while polling; returns the executions that ended."""
        for _ in range(self._launches):
            self._launch()
        event = torch.cuda.Event()
        event.record()
        self._queued.append(event)
        if len(self._queued) <= QUEUED_CHUNKS:
            return 0
        oldest = self._queued.popleft()
        while not oldest.query():
            poll()
            time.sleep(NAP_S)
        poll()
        return self._launches * self._each

    def close(self) -> None:
        """Wait for what is queued, and drop the graph."""
        torch.cuda.synchronize()
        self._queued.clear()
        if self._graph is not None:
            self._graph.reset()
