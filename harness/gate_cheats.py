"""The known ways to fool a benchmark, each with the rule that finds it. Used by `harness.gate`.

| cheat | found by |
|---|---|
| no output written | fresh memory is filled with NaN in the first call |
| a result of an earlier call returned again | two calls on different inputs, compared bit by bit |
| the previous result's buffer written again | the first result is compared after the second call |
| an output that is an input's memory | storages are compared |
| an input changed in place | inputs are hashed before and after |
| a result computed only when it is read | its type must be a plain tensor on the inputs' device |
| work left on a thread or another stream | what was NaN at once and is not after waiting; and on a
  GPU, a replay of the captured call must write the result by itself, or, where it cannot be
  captured, the call must see what was written on its stream before it |
| right while it is watched, cached while it is timed | the operation is called again after timing |

Inputs are altered behind autograd's back, so that neither address nor version counter tells. What
is not found: a cache keyed by the contents of all inputs, which costs a read of them, and shows as
a time that the memory's bandwidth does not allow.
"""

import math
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

SETTLE_S = 0.5  # waited for work that was left running, once a result was found incomplete
SKETCH = 64
CHUNK = 1 << 22  # elements sketched at once
HOLD_CYCLES = 100_000_000  # some 50 ms; what takes longer to launch is not found
UNJOINED = "unjoined work"  # CUDA, of a capture that ends while a forked stream has not come back
SAME = 0.05  # of a result's norm; atomics change a result by far less, other inputs by far more


class RejectedError(Exception):
    """The candidate broke a rule that needs no reference; the message is the reason."""


def require_plain(named: Mapping[str, Tensor], device: torch.device) -> None:
    """Reject what is not simply a tensor with memory on the device of the inputs."""
    for name, tensor in named.items():
        kind = type(tensor)
        if kind not in (Tensor, torch.nn.Parameter):
            raise RejectedError(
                f"{name}: a {kind.__name__}, expected a plain torch.Tensor: a result may not be "
                f"evaluated lazily, when it is read"
            )
        if tensor.device != device:
            raise RejectedError(f"{name}: on {tensor.device}, expected {device}")


def require_own_memory(named: Mapping[str, Tensor], inputs: Mapping[str, Tensor]) -> None:
    """Reject a result that lies in the memory of an input."""
    owners = {_storage(tensor): name for name, tensor in inputs.items()}
    for name, tensor in named.items():
        if (owner := owners.get(_storage(tensor))) is not None:
            raise RejectedError(f"{name}: shares its memory with the input {owner} (aliased)")


def require_fresh(
    first: Mapping[str, Tensor],
    second: Mapping[str, Tensor],
    before: Mapping[str, int],
    after: Mapping[str, int],
    second_prints: Mapping[str, int],
) -> None:
    """Reject a second result, of other inputs, that is the first one over again.

    Args:
        first: results of the first call, still alive.
        second: results of the second call.
        before: fingerprints of the first results when they were made.
        after: their fingerprints after the second call.
        second_prints: fingerprints of the second results.
    """
    for name, tensor in first.items():
        if before[name] != after[name]:
            raise RejectedError(f"{name}: the second call overwrote the first call's result")
        if tensor.numel() and _storage(tensor) == _storage(second[name]):
            raise RejectedError(
                f"{name}: on other inputs the very result of the first call was returned again "
                f"(cached)"
            )
    outputs = [name for name in first if not name.startswith("grad_")]
    for name in outputs:
        if first[name].numel() and before[name] == second_prints[name]:
            raise RejectedError(
                f"{name}: other inputs gave the very same result: that of an earlier call was "
                f"returned again (cached)"
            )


def incomplete(named: Mapping[str, Tensor]) -> str | None:
    """Say which result has values that are NaN or infinite, and whether they were only late."""
    for name, tensor in named.items():
        finite = torch.isfinite(tensor)
        if finite.all():
            continue
        count = tensor.numel() - int(finite.sum())
        wait(tensor.device)
        if torch.isfinite(tensor).all():
            return (
                f"{name}: {count} of {tensor.numel()} values were still being written when the "
                f"call returned: work left on a thread or on another stream"
            )
        return f"{name}: {count} of {tensor.numel()} values are NaN or infinite"
    return None


def wait(device: torch.device) -> None:
    """Give work that was left somewhere the time to end."""
    if device.type == "cuda":
        torch.cuda.synchronize()
    time.sleep(SETTLE_S)


@dataclass(frozen=True, kw_only=True)
class Sketch:
    """A few numbers by which a result is known again, rounding aside."""

    sums: tuple[float, ...]
    norm: float

    @classmethod
    def of(cls, tensor: Tensor) -> "Sketch":
        """Sum the values with fixed random signs into a few numbers, in fp64."""
        values = tensor.detach().flatten()
        length = min(CHUNK, -(-values.numel() // SKETCH) * SKETCH)
        generator = torch.Generator(device=values.device).manual_seed(0)
        bits = torch.randint(0, 2, (length,), generator=generator, device=values.device)
        signs = (2 * bits - 1).double()
        sums = torch.zeros(SKETCH, dtype=torch.float64, device=values.device)
        square = torch.zeros((), dtype=torch.float64, device=values.device)
        for chunk in torch.split(values, max(1, length)):
            wide = torch.nn.functional.pad(chunk.double(), (0, -chunk.numel() % SKETCH))
            sums += (wide * signs[: wide.numel()]).view(-1, SKETCH).sum(dim=0)
            square += (wide * wide).sum()
        return cls(sums=tuple(float(total) for total in sums.cpu()), norm=float(square.sqrt()))

    def differs(self, other: "Sketch") -> bool:
        """Whether the two are of results that differ by more than rounding; NaN does."""
        difference = sum((a - b) ** 2 for a, b in zip(self.sums, other.sums, strict=True)) ** 0.5
        return not difference <= SAME * max(self.norm, other.norm)


def require_written_by_replay(
    graph: torch.cuda.CUDAGraph, results: Sequence[Tensor], inputs: Iterable[Tensor]
) -> None:
    """Reject a captured call whose replay does not write all of its results.

    What ran on another stream, was computed when read or came from a cache is not in the graph.
    Results that are an input's memory, as of an update in place, are left alone.
    """
    owned = {_storage(tensor) for tensor in inputs}
    mine = [t for t in results if _storage(t) not in owned and t.is_floating_point()]
    for tensor in mine:
        tensor.detach().fill_(torch.nan)
    graph.replay()
    torch.cuda.synchronize()
    for index, tensor in enumerate(mine):
        count = int(torch.isnan(tensor).sum())
        if count:
            raise RejectedError(
                f"result {index}: replaying the call leaves {count} of {tensor.numel()} values "
                f"unwritten: work left on another stream, or a cached result"
            )


def unjoined(not_captured: str | None) -> str | None:
    """Say what it means that a capture failed, if it means that work was left on a stream."""
    if UNJOINED not in (not_captured or ""):
        return None
    return (
        f"the call returned before it had waited for its work left on another stream ({UNJOINED})"
    )


def require_stream_order(
    execute: Callable[[], Sequence[Tensor]],
    altered: Callable[[], AbstractContextManager[None]],
    inputs: Iterable[Tensor],
) -> None:
    """Reject a call that does not see what was written on its stream just before it.

    The stream is held, the inputs are altered on it, and the call is made: work on another stream
    that waits for nothing reads the inputs as they were. Streams that are forked from ours and
    joined again wait as ours does. The call is then made again with the device idle. All of it is
    done once before: to load a kernel CUDA may wait for the device, and so for the held stream.
    """
    owned = {_storage(tensor) for tensor in inputs}

    def is_judged(tensor: Tensor) -> bool:
        return tensor.is_floating_point() and tensor.numel() > 0 and _storage(tensor) not in owned

    def sketches() -> list[Sketch]:
        results = execute()
        torch.cuda.synchronize()
        return [Sketch.of(tensor) for tensor in results if is_judged(tensor)]

    with altered():
        execute()
    torch.cuda.synchronize()
    hold_stream()
    with altered():
        held = sketches()
        free = sketches()
    torch.cuda.synchronize()
    for index, (one, other) in enumerate(zip(held, free, strict=True)):
        if math.isfinite(other.norm) and one.differs(other):
            raise RejectedError(
                f"result {index}: the call did not wait for what was queued before it: work left "
                f"on another stream"
            )


def hold_stream() -> None:
    """Keep the current stream waiting, and the other ones free."""
    wait: Any = torch.cuda._sleep  # pyright: ignore
    wait(HOLD_CYCLES)


def _storage(tensor: Tensor) -> int:
    return tensor.untyped_storage().data_ptr()
