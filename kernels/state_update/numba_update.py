"""The state update on the CPU: the public operation around the compiled kernels."""

import torch
from torch import Tensor
from torch.nn.functional import silu, softplus

from mambench.kernels.s6.numba_config import LANES
from mambench.kernels.s6.numba_kernels import LOG2E
from mambench.kernels.s6.numba_scan import (
    _in_threads as in_threads,  # pyright: ignore[reportPrivateUsage]
)
from mambench.kernels.state_update import numba_kernels as kernels
from mambench.kernels.state_update.arguments import check_arguments
from mambench.kernels.state_update.traced import register

_DTYPES = (torch.float32, torch.float64)
_LEAST_STATES = 1 << 16  # of a thread: starting one takes as long as updating so many


def selective_state_update(
    state: Tensor,
    x: Tensor,
    dt: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    D: Tensor | None = None,
    z: Tensor | None = None,
    dt_bias: Tensor | None = None,
    dt_softplus: bool = False,
) -> Tensor:
    """Update the state by one token and return its output.

    Args:
        state: (B, D, N), or (B, H, P, N) with A a scalar per head; updated in place; contiguous.
        x, z: (B, D) or (B, H, P).
        dt: (B, D) or (B, H).
        A: (D, N) or (H,).
        B, C: (B, G, N), or (B, N) for one group.
        D, dt_bias: (D,) or (H,).
        dt_softplus: apply softplus to dt + dt_bias.

    Returns:
        (B, D) or (B, H, P) in x's dtype.

    Raises:
        ValueError, TypeError: see `check_arguments`; the state is not contiguous, neither fp32 nor
            fp64, or its rows are not whole vectors.
    """
    B, C = (B[:, None], C[:, None]) if B.dim() == 2 else (B, C)
    update = _traced if torch.compiler.is_compiling() else _update
    return update(state, x, dt, A, B, C, D, z, dt_bias, dt_softplus)


def _update(
    state: Tensor,
    x: Tensor,
    dt: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    D: Tensor | None,
    z: Tensor | None,
    dt_bias: Tensor | None,
    dt_softplus: bool,
) -> Tensor:
    check_arguments(state, x, dt, A, B, C, D, z, dt_bias)
    dtype, d_state = state.dtype, state.shape[-1]
    if dtype not in _DTYPES or not state.is_contiguous() or d_state % LANES:
        raise TypeError(
            f"state: expected contiguous fp32 or fp64, d_state a multiple of {LANES}, got {dtype}, "
            f"shape {tuple(state.shape)}, strides {state.stride()}"
        )
    x_wide, dt = x.detach().to(dtype), dt.detach().to(dtype)
    if dt_bias is not None:
        dt = dt + dt_bias
    if dt_softplus:
        dt = softplus(dt)
    s6 = state.dim() == 3
    decay = (dt, (A.to(dtype) * LOG2E).view(-1, LANES)) if s6 else (torch.exp(dt * A),)
    added = (dt if s6 else dt[..., None]) * x_wide
    shared = (t.detach().unflatten(-1, (-1, LANES)) for t in (B, C))
    y = torch.empty(x.shape, dtype=dtype)
    tensors = (state.detach().view(-1, LANES), *decay, added, *shared)
    arrays = [t.to(dtype).contiguous().numpy() for t in tensors]
    kernel, tasks = kernels.s6_update if s6 else kernels.ssd_update, x.shape[0] * x.shape[1]
    if state.numel() < 2 * _LEAST_STATES:
        kernel(0, tasks, *arrays, y.numpy())
    else:
        in_threads(kernel, tasks, *arrays, y.numpy())
    if D is not None:
        y = torch.addcmul(y, D.to(dtype) if s6 else D.to(dtype)[:, None], x_wide)
    if z is not None:
        y *= silu(z.to(dtype))
    return y.to(x.dtype)


_traced = register("state_update_numba", _update)


def precompile(dtype: torch.dtype) -> None:
    """Compile both families' kernels for a dtype, or load them from the cache."""
    for rows in ((1, 1), (1, 1, 1)):
        x = torch.zeros(rows, dtype=dtype)
        dt, shared = torch.zeros((1, 1), dtype=dtype), torch.zeros((1, 1, LANES), dtype=dtype)
        A = torch.zeros((1, LANES) if len(rows) == 2 else (1,), dtype=dtype)
        selective_state_update(torch.zeros((*rows, LANES), dtype=dtype), x, dt, A, shared, shared)
