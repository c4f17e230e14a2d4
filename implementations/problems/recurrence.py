"""Solve h[t] = decay[t] * h[t-1] + x[t] in two ways that share nothing but the adjoint.

`by_rows` serves the float64 reference and is the recurrence itself: rows of consecutive steps, all
rows at once. `by_doubling` serves the independent solution and never takes a step: neighbouring
intervals are merged, then intervals of intervals. Neither is used by an implementation that is
compared.
"""

# torch leaves what unflatten and apply return untyped.
# pyright: reportUnknownMemberType=false, reportUnknownVariableType=false
# pyright: reportUnknownArgumentType=false

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import pad

# (decay, x) -> h; all (..., L, N), time is the last dimension but one. Neither argument is changed.
Solver = Callable[[Tensor, Tensor], Tensor]

DOUBLING_SPAN = 32


def solve(decay: Tensor, x: Tensor, solver: Solver) -> Tensor:
    """Return h (..., L, N) with h[t] = decay[t] * h[t-1] + x[t] and h[-1] = 0; differentiable.

    decay and x have the shape of h. The gradient is the same recurrence backwards in time:
    grad_x[t] = grad_h[t] + decay[t+1] * grad_x[t+1] and grad_decay[t] = grad_x[t] * h[t-1].
    """
    result: Tensor = _Recurrence.apply(decay, x, solver)
    return result


class _Recurrence(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, decay: Tensor, x: Tensor, solver: Solver) -> Tensor:
        h = solver(decay, x)
        ctx.save_for_backward(decay, h)
        ctx.solver = solver
        return h

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(  # pyright: ignore[reportIncompatibleMethodOverride]
        ctx: Any, *grads: Tensor
    ) -> tuple[Tensor, Tensor, None]:
        (grad_h,) = grads
        decay, h = ctx.saved_tensors
        following = pad(decay[..., 1:, :], (0, 0, 0, 1))  # the last step is followed by none
        grad_x = ctx.solver(following.flip(-2), grad_h.flip(-2)).flip(-2)
        grad_decay = grad_x * pad(h[..., :-1, :], (0, 0, 1, 0))
        return grad_decay, grad_x, None


def by_rows(decay: Tensor, x: Tensor) -> Tensor:
    """Step through rows of about sqrt(L) steps, all rows at once, then carry from row to row."""
    seqlen = x.shape[-2]
    length = 1 << (max(1, seqlen - 1).bit_length() + 1) // 2
    decay, h = _folded(decay, length), _folded(x, length)
    for t in range(1, length):
        h[..., t, :].addcmul_(decay[..., t, :], h[..., t - 1, :])
    since_start = torch.cumprod(decay, dim=-2)
    for row in range(1, h.shape[-3]):
        carry = h[..., row - 1, -1:, :]
        h[..., row, :, :].addcmul_(since_start[..., row, :, :], carry)
    return h.flatten(-3, -2)[..., :seqlen, :]


def by_doubling(decay: Tensor, x: Tensor) -> Tensor:
    """Merge intervals of 1, 2, 4 ... steps within spans of 32, then do the same with the spans."""
    seqlen = x.shape[-2]
    if seqlen == 1:
        return x.clone()
    decay, h = _folded(decay, DOUBLING_SPAN), _folded(x, DOUBLING_SPAN)
    width = 1
    while width < DOUBLING_SPAN:
        pairs_decay = decay.unflatten(-2, (-1, 2 * width))
        pairs_h = h.unflatten(-2, (-1, 2 * width))
        left, right = slice(width - 1, width), slice(width, None)
        pairs_h[..., right, :].addcmul_(pairs_decay[..., right, :], pairs_h[..., left, :])
        pairs_decay[..., right, :] *= pairs_decay[..., left, :].clone()
        width *= 2
    ends = by_doubling(decay[..., -1, :], h[..., -1, :])
    before = pad(ends[..., :-1, :], (0, 0, 1, 0)).unsqueeze(-2)
    return h.addcmul_(decay, before).flatten(-3, -2)[..., :seqlen, :]


def _folded(values: Tensor, length: int) -> Tensor:
    """Copy (..., L, N) into rows (..., ceil(L / length), length, N), zero after the end."""
    missing = -values.shape[-2] % length
    copied = pad(values, (0, 0, 0, missing)) if missing else values.clone()
    return copied.contiguous().unflatten(-2, (-1, length))
