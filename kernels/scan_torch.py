"""A parallel prefix scan of linear recurrences in plain PyTorch, and s6 and ssd built on it.

The steps of h[t] = decay[t] h[t-1] + x[t] compose: (a, x) then (a', x') is (a' a, a' x + x'), which
is associative, so all prefixes follow in 2 log2(L) passes (Blelloch 1990; S5, Smith et al. 2023,
section 2.2, uses the same operator). The pairs are combined in place, in a tree: up, doubling the
intervals, then down, filling in between; about 2 L combinations in all. The state of every step is
materialised: (B, D, L, N) for s6, (B, H, L, P, N) for ssd, in fp32 (fp64 for fp64 inputs).

The gradient is the same scan backwards in time; it needs the decays and the states and nothing
else.
"""

# A, B and C are the papers' names of tensors.
# pyright: reportConstantRedefinition=false

# torch leaves what unflatten and apply return untyped.
# pyright: reportUnknownMemberType=false, reportUnknownVariableType=false
# pyright: reportUnknownArgumentType=false

from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import pad, silu, softplus

NO_LIMIT = (0.0, float("inf"))


def selective_scan(
    u: Tensor,
    delta: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    D: Tensor | None = None,
    z: Tensor | None = None,
    delta_bias: Tensor | None = None,
    delta_softplus: bool = False,
    return_last_state: bool = False,
    *,
    initial_state: Tensor | None = None,
) -> Tensor | tuple[Tensor, Tensor]:
    """Compute Mamba-1's scan with the arguments and results of `selective_scan_fn`.

    u, delta, z (B, D, L); A (D, N) fp32; B, C (B, G, N, L); D, delta_bias (D,) fp32; initial_state
    (B, D, N), which `selective_scan_fn` has not. Returns out (B, D, L) in u's dtype, or (out,
    last_state (B, D, N) in fp32).
    """
    wide = torch.promote_types(u.dtype, torch.float32)
    split = (B.shape[1], -1)  # channels into groups and channels of a group
    x, dt = u.to(wide), delta.to(wide)
    if delta_bias is not None:
        dt = dt + delta_bias[:, None]
    if delta_softplus:
        dt = softplus(dt)
    decay = torch.exp((dt[..., None] * A[:, None]).unflatten(1, split))  # (B, G, D/G, L, N)
    inflow = (dt * x).unflatten(1, split)[..., None] * B.to(wide).mT[:, :, None]
    if initial_state is not None:
        initial = initial_state.to(wide).unflatten(1, split)
        inflow[..., 0, :] += decay[..., 0, :] * initial
    states = scan(decay, inflow, dim=-2)
    del decay, inflow
    y = (states * C.to(wide).mT[:, :, None]).sum(-1).flatten(1, 2)
    y = _finish(y, x, None if D is None else D[:, None], z).to(u.dtype)
    return (y, states[..., -1, :].flatten(1, 2)) if return_last_state else y


def state_space_dual(
    x: Tensor,
    dt: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    chunk_size: int,
    D: Tensor | None = None,
    z: Tensor | None = None,
    dt_bias: Tensor | None = None,
    initial_states: Tensor | None = None,
    dt_softplus: bool = False,
    dt_limit: tuple[float, float] = NO_LIMIT,
    return_final_states: bool = False,
    *,
    seq_idx: Tensor | None = None,
) -> Tensor | tuple[Tensor, Tensor]:
    """Compute Mamba-2's recurrence with the arguments and results of `mamba_chunk_scan_combined`.

    x, z (B, L, H, P); dt (B, L, H); A (H,) fp32; B, C (B, L, G, N); D (H,) or (H, P) fp32; dt_bias
    (H,) fp32; initial_states (B, H, P, N); chunk_size is not used, as there are no chunks; seq_idx
    (B, L) integers: where they change the state is zero again. Returns out (B, L, H, P) in x's
    dtype, or (out, final_states (B, H, P, N) in fp32).
    """
    wide = torch.promote_types(x.dtype, torch.float32)
    split = (B.shape[2], -1)  # heads into groups and heads of a group
    dt = dt.to(wide)
    if dt_bias is not None:
        dt = dt + dt_bias
    if dt_softplus:
        dt = softplus(dt)
    if dt_limit != NO_LIMIT:
        dt = dt.clamp(*dt_limit)
    rows = x.to(wide)
    decay = torch.exp(dt * A)
    if seq_idx is not None:
        begins = pad(seq_idx[:, 1:] != seq_idx[:, :-1], (1, 0))
        decay = decay.masked_fill(begins[..., None], 0.0)
    decay = decay.unflatten(2, split).movedim(1, 3)[..., None, None]
    B, C = (value.to(wide).transpose(1, 2)[:, :, None, :, None] for value in (B, C))
    scaled = (rows * dt[..., None]).unflatten(2, split).movedim(1, 3)  # (B, G, H/G, L, P)
    inflow = scaled[..., None] * B  # (B, G, H/G, L, P, N)
    if initial_states is not None:
        initial = initial_states.to(wide).unflatten(1, split)
        inflow[..., 0, :, :] += decay[..., 0, :, :] * initial
    states = scan(decay, inflow, dim=-3)
    del inflow
    y = (states * C).sum(-1).movedim(3, 1).flatten(2, 3)
    skip = D if D is None or D.dim() == 2 else D[:, None]
    y = _finish(y, rows, skip, z).to(x.dtype)
    return (y, states[..., -1, :, :].flatten(1, 2)) if return_final_states else y


def scan(decay: Tensor, x: Tensor, *, dim: int) -> Tensor:
    """Turn x into h with h[t] = decay[t] * h[t-1] + x[t] along `dim`, h before the start being 0.

    Args:
        decay: any shape that broadcasts to that of x, with the full length along `dim`.
        x: the inflow; its memory becomes that of the result, so it must not be used afterwards.
        dim: the dimension of time, negative.

    Returns: h, in the memory of x; differentiable in decay and x.
    """
    result: Tensor = _Scan.apply(decay, x, dim)  # pyright: ignore[reportUnknownMemberType]
    return result


class _Scan(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, decay: Tensor, x: Tensor, dim: int) -> Tensor:
        _combine_prefixes(decay.clone(), x, dim)
        ctx.mark_dirty(x)
        ctx.save_for_backward(decay, x)
        ctx.dim = dim
        return x

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(  # pyright: ignore[reportIncompatibleMethodOverride]
        ctx: Any, *grads: Tensor
    ) -> tuple[Tensor, Tensor, None]:
        decay, states = ctx.saved_tensors
        dim, steps = ctx.dim, states.shape[ctx.dim]
        following = torch.zeros_like(decay)  # decay of the next step; after the last, none
        following.narrow(dim, 0, steps - 1).copy_(decay.narrow(dim, 1, steps - 1))
        grad_x = grads[0].clone(memory_format=torch.contiguous_format)
        _combine_prefixes(following, grad_x, dim, backwards=True)
        del following
        later, earlier = grad_x.narrow(dim, 1, steps - 1), states.narrow(dim, 0, steps - 1)
        grad_decay = torch.zeros_like(decay)
        product = (later * earlier).sum_to_size(decay.narrow(dim, 1, steps - 1).shape)
        grad_decay.narrow(dim, 1, steps - 1).copy_(product)
        return grad_decay, grad_x, None


def _combine_prefixes(decay: Tensor, h: Tensor, dim: int, *, backwards: bool = False) -> None:
    """Replace h by its scan, in place; decay is used up. `backwards` scans from the last step."""
    steps = h.shape[dim]

    def every(first: int, stride: int, count: int) -> tuple[Any, ...]:
        start = steps - 1 - first - (count - 1) * stride if backwards else first
        chosen = slice(start, start + (count - 1) * stride + 1, stride)
        return (Ellipsis, chosen, *(slice(None),) * (-dim - 1))

    width = 1
    while 2 * width <= steps:  # up: intervals of `width` become intervals of twice that
        count = steps // (2 * width)
        left, right = (every(end, 2 * width, count) for end in (width - 1, 2 * width - 1))
        h[right].addcmul_(decay[right], h[left])
        decay[right] *= decay[left]
        width *= 2
    while width >= 1:  # down: prefixes that end `width` steps after a finished one
        count = (steps - width) // (2 * width)
        if count > 0:
            done, ahead = (every(end, 2 * width, count) for end in (2 * width - 1, 3 * width - 1))
            h[ahead].addcmul_(decay[ahead], h[done])
        width //= 2


def _finish(y: Tensor, x: Tensor, skip: Tensor | None, z: Tensor | None) -> Tensor:
    """Add the skip connection and multiply by the gate, where there are any."""
    if skip is not None:
        y = y + skip * x
    return y if z is None else y * silu(z.to(y.dtype))
