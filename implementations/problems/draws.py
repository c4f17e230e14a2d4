"""What the problems of s6 and ssd share: random inputs, the choice of a sample, slicing.

Parameters are drawn as `mamba_simple.Mamba` and `mamba2.Mamba2` initialise them: the step size
after softplus is log-uniform in [0.001, 0.1]. Two things differ on purpose. Every parameter carries
a little noise, so that one read from the wrong channel shows. And every eighth channel (or head)
remembers longer than the sequence: its step size is small and its decay is scaled so that a state
loses about a factor e over the whole sequence, while its skip connection D is zero, so that its
output is what the state carried. A kernel that drops the state anywhere is then wrong by an amount
of order one there.
"""

import math
import random
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.utils import checkpoint as checkpointing

DT_MIN = 1e-3
DT_MAX = 1e-1
LONG_MEMORY_EVERY = 8
FULL_TOKENS = 16_384  # up to here everything is judged, unless it exceeds the family's budget
SLICE_ELEMENTS = 1 << 24  # elements of one float64 temporary of a reference: 128 MiB


class Draws:
    """A stream of random tensors; the same seed and device give the same values."""

    def __init__(self, seed: int, device: str) -> None:
        self.device = device
        self._generator = torch.Generator(device=device).manual_seed(seed)

    def normal(self, *shape: int, dtype: torch.dtype = torch.float32, scale: float = 1.0) -> Tensor:
        """Return normal values of mean 0 and the given standard deviation."""
        values = torch.randn(shape, generator=self._generator, dtype=dtype, device=self.device)
        return values if scale == 1.0 else values.mul_(scale)

    def uniform(self, *shape: int, low: float, high: float) -> Tensor:
        """Return uniform fp32 values in [low, high)."""
        values = torch.rand(shape, generator=self._generator, device=self.device)
        return values.mul_(high - low).add_(low)

    def dt_bias(self, count: int) -> Tensor:
        """Return biases (count,) fp32 whose softplus is log-uniform in [DT_MIN, DT_MAX].

        Those of long-memory entries have a softplus of DT_MIN.
        """
        dt = self.uniform(count, low=math.log(DT_MIN), high=math.log(DT_MAX)).exp_()
        dt = torch.where(long_memory(count, self.device), DT_MIN, dt)
        return dt + torch.log(-torch.expm1(-dt))  # the inverse of softplus

    def skip(self, count: int) -> Tensor:
        """Return D (count,) fp32: about 1, and 0 where memory is long."""
        noisy = 1 + self.normal(count, scale=0.2)
        return torch.where(long_memory(count, self.device), 0.0, noisy)


def long_memory(count: int, device: str | torch.device = "cpu") -> Tensor:
    """Return the mask (count,) of channels or heads that remember longer than the sequence."""
    return torch.arange(count, device=device) % LONG_MEMORY_EVERY == 0


def memory_scale(count: int, seqlen: int, device: str) -> Tensor:
    """Return factors (count,) fp32 for A: where memory is long, a state lasts the sequence."""
    lasting = min(1.0, 1.0 / (DT_MIN * seqlen))
    return torch.where(long_memory(count, device), lasting, 1.0)


def choose(count: int, *, tokens: int, at_most: int, seed: int) -> tuple[int, ...] | None:
    """Choose which of `count` channels or heads are judged; None means all.

    All up to `FULL_TOKENS` tokens, unless `at_most` says less; 64 at most above. The first and last
    are always among them, and half of the others have long memory.
    """
    wanted = min(count, max(4, at_most))
    if tokens > FULL_TOKENS:
        wanted = min(wanted, 64)
    if wanted == count:
        return None
    draw = random.Random(seed)
    chosen = {0, count - 1}
    lasting = [i for i in range(count) if i % LONG_MEMORY_EVERY == 0 and i not in chosen]
    chosen.update(draw.sample(lasting, min(len(lasting), (wanted - 2) // 2)))
    rest = [i for i in range(count) if i not in chosen]
    chosen.update(draw.sample(rest, wanted - len(chosen)))
    return tuple(sorted(chosen))


def choose_some(count: int, at_most: int, *, seed: int) -> tuple[int, ...] | None:
    """Choose which of `count` sequences are judged, first and last among them; None means all."""
    wanted = max(2, at_most)
    if wanted >= count:
        return None
    between = random.Random(seed).sample(range(1, count - 1), wanted - 2)
    return (0, *sorted(between), count - 1)


def index(selected: Sequence[int] | None, count: int, device: torch.device) -> Tensor:
    """Return the selected positions as an int64 tensor; None selects all of `count`."""
    return torch.tensor(selected if selected is not None else range(count), device=device)


def in_slices(
    compute: Callable[[slice], Tensor], count: int, *, elements_each: int, dim: int
) -> Tensor:
    """Concatenate `compute` over slices of `count` along `dim`, with bounded memory.

    A slice holds as many items as fit into `SLICE_ELEMENTS` at `elements_each` per item. When there
    is more than one, autograd recomputes each slice in the backward instead of keeping its
    temporaries.
    """
    size = max(1, min(count, SLICE_ELEMENTS // max(1, elements_each)))
    if size >= count:
        return compute(slice(0, count))
    parts: list[Tensor] = []
    for start in range(0, count, size):
        piece = slice(start, min(start + size, count))
        if torch.is_grad_enabled():
            parts.append(_recomputed(compute, piece))
        else:
            parts.append(compute(piece))
    return torch.cat(parts, dim=dim)


def _recomputed(compute: Callable[[slice], Tensor], piece: slice) -> Tensor:
    untyped: Any = checkpointing
    return untyped.checkpoint(compute, piece, use_reentrant=False, preserve_rng_state=False)
