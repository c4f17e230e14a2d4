"""Selective scan (S6) on the CPU: the public operation around the compiled kernels.

The mathematics and the arrangement of the work are told in `numba_kernels`. float64 is computed in
float64; float32, bfloat16 and float16 in float32.
"""

import threading
from collections.abc import Callable
from itertools import pairwise
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from mambench.kernels.registered import (
    Operation,
    Options,
    Results,
    Tensors,
    is_traced,
    needs_gradient,
    register,
)
from mambench.kernels.s6 import numba_kernels as kernels
from mambench.kernels.s6.arguments import S6_OPTIONS, S6_TENSORS, check_arguments
from mambench.kernels.s6.numba_config import CHUNK, LANES, block_count, partial_count

_RANGES_PER_THREAD = 4  # so that a thread that is held up delays the end by a quarter of its share


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
    """Return the selective scan of u, differentiable once in every tensor argument.

    Args:
        u, delta, z: (B, D, L), one floating-point dtype.
        A: (D, N), at most 256 states.
        B, C: (B, G, N, L) or (B, N, L), u's dtype; a group serves D / G consecutive channels.
        D, delta_bias: (D,).
        delta_softplus: apply softplus to delta + delta_bias.
        return_last_state: also return the state after the last step.
        initial_state: (B, D, N), the state before the first step; None: zeros.

    Returns:
        out (B, D, L) in u's dtype, or (out, last state (B, D, N) in float32; float64 for float64).

    Raises:
        ValueError, TypeError: see `check_arguments`.
    """
    B = B.unsqueeze(1) if B.dim() == 3 else B
    C = C.unsqueeze(1) if C.dim() == 3 else C
    check_arguments(u, delta, A, B, C, D, z, delta_bias, initial_state)
    tensors = (u, delta, A, B, C, D, z, delta_bias, initial_state)
    if is_traced():
        out, last = _traced(tensors, (delta_softplus,))
    elif needs_gradient(tensors):
        out, last = _SelectiveScan.apply(delta_softplus, *tensors)
    else:
        out, last, _ = _forward(tensors, (delta_softplus,), False)
    return (out, last) if return_last_state else out


def precompile(dtype: torch.dtype) -> None:
    """Compile forward and backward for inputs of this dtype, or load them from the cache."""
    u = torch.zeros((1, 1, 1), dtype=dtype, requires_grad=True)
    shared = torch.zeros((1, 1, 1, 1), dtype=dtype)
    out = selective_scan(u, u, torch.zeros((1, 1)), shared, shared)
    assert isinstance(out, Tensor)
    out.sum().backward()


class _SelectiveScan(torch.autograd.Function):
    """Saves the inputs and the state before every CHUNK-th step."""

    @staticmethod
    def forward(ctx: Any, delta_softplus: bool, *tensors: Tensor | None) -> tuple[Tensor, Tensor]:
        out, last, kept = _forward(tensors, (delta_softplus,), True)
        ctx.save_for_backward(kept, *tensors)
        ctx.delta_softplus = delta_softplus
        ctx.set_materialize_grads(False)
        return out, last

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dout: Tensor | None, dlast: Tensor | None) -> tuple[Tensor | None, ...]:
        kept, *tensors = ctx.saved_tensors
        found = iter(_backward(dout, dlast, kept, tuple(tensors), (ctx.delta_softplus,)))
        return (None, *(None if tensor is None else next(found) for tensor in tensors))


def _forward(tensors: Tensors, options: Options, keep: bool) -> Results:
    """Return out, the last state and, if `keep`, the states before every CHUNK-th step."""
    u, _, _, B, *_, z, _, initial = tensors
    out, last, kept = _empty_results(tensors, options, keep)
    dtype = last.dtype
    out = out if out.dtype == dtype else torch.empty(u.shape, dtype=dtype)
    blocks = block_count(d_inner=u.shape[1], ngroups=B.shape[1])
    start = torch.zeros(last.shape, dtype=dtype) if initial is None else initial
    kept_array = kept if keep else kept.view(0, 0, 0, 0, 0)
    _in_threads(
        kernels.forward,
        u.shape[0] * blocks,
        *_arrays(dtype, *tensors[:8]),
        *_numpy(dtype, start),
        blocks,
        options[0],
        z is not None,
        keep,
        *_numpy(dtype, out, last, kept_array),
    )
    return out.to(u.dtype), last, kept


def _empty_results(tensors: Tensors, options: Options, keep: bool) -> Results:
    """Allocate out, the last state and what is kept, (B, blocks, chunks, N, LANES) or nothing."""
    u, _, A, B, *_ = tensors
    batch, d_inner, seqlen = u.shape
    dtype = _compute_dtype(u)
    blocks = block_count(d_inner=d_inner, ngroups=B.shape[1])
    shape = (batch, blocks, -(-seqlen // CHUNK), A.shape[1], LANES) if keep else (0,)
    out = torch.empty(u.shape, dtype=u.dtype, device=u.device)
    last = torch.empty((batch, d_inner, A.shape[1]), dtype=dtype, device=u.device)
    return out, last, torch.empty(shape, dtype=dtype, device=u.device)


def _backward(
    dout: Tensor | None, dlast: Tensor | None, kept: Tensor, tensors: Tensors, options: Options
) -> list[Tensor]:
    """Return the gradient of every tensor that is not None, in order and in its dtype."""
    u, _, A, B, _, _, z, _, _ = tensors
    dtype = _compute_dtype(u)
    batch, d_inner, seqlen = u.shape
    ngroups, d_state = B.shape[1], A.shape[1]
    partials = partial_count(d_inner=d_inner, d_state=d_state, ngroups=ngroups)
    du, ddelta = (torch.empty(u.shape, dtype=dtype) for _ in range(2))
    dz = torch.empty(u.shape if z is not None else (0, 0, 0), dtype=dtype)
    dA, dinitial = (torch.empty((batch, d_inner, d_state), dtype=dtype) for _ in range(2))
    dparameters = torch.empty((batch, d_inner, 2), dtype=dtype)
    dB, dC = torch.zeros((2, partials, batch, ngroups, d_state, seqlen), dtype=dtype)
    dout = torch.zeros(u.shape, dtype=dtype) if dout is None else dout
    dlast = torch.zeros(dA.shape, dtype=dtype) if dlast is None else dlast
    _in_threads(
        kernels.backward,
        batch * ngroups * partials,
        *_arrays(dtype, *tensors[:8]),
        *_numpy(dtype, dout, dlast, kept),
        block_count(d_inner=d_inner, ngroups=ngroups),
        options[0],
        z is not None,
        *_numpy(dtype, du, ddelta, dz, dA, dparameters, dinitial, dB, dC),
    )
    dbias, dD = dparameters.sum(0).unbind(-1)
    gradients = (du, ddelta, dA.sum(0), dB.sum(0), dC.sum(0), dD, dz, dbias, dinitial)
    return [
        gradient.to(tensor.dtype)
        for gradient, tensor in zip(gradients, tensors, strict=True)
        if tensor is not None
    ]


_traced = register(
    Operation(
        name="s6_numba",
        tensors=S6_TENSORS,
        options=S6_OPTIONS,
        forward=_forward,
        shapes=_empty_results,
        backward=_backward,
    )
)


def _compute_dtype(u: Tensor) -> torch.dtype:
    return torch.float64 if u.dtype == torch.float64 else torch.float32


def _arrays(
    dtype: torch.dtype,
    u: Tensor,
    delta: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    D: Tensor | None,
    z: Tensor | None,
    delta_bias: Tensor | None,
) -> tuple[np.ndarray, ...]:
    """Return the kernels' leading arguments."""
    parameters = torch.zeros((u.shape[1], 2), dtype=dtype)
    for column, parameter in enumerate((delta_bias, D)):
        if parameter is not None:
            parameters[:, column] = parameter.detach()
    rates = A.detach().to(dtype) * kernels.LOG2E
    gate = torch.empty((0, 0, 0), dtype=dtype) if z is None else z
    return _numpy(dtype, u, delta, rates, B, C, parameters, gate)


def _numpy(dtype: torch.dtype, *tensors: Tensor) -> tuple[np.ndarray, ...]:
    """View tensors as contiguous arrays of a dtype, copying only where they are not."""
    return tuple(tensor.detach().to(dtype).contiguous().numpy() for tensor in tensors)


def _in_threads(kernel: Callable[..., None], tasks: int, *arguments: Any) -> None:
    """Run tasks 0 to `tasks` on as many threads as torch uses."""
    threads = min(torch.get_num_threads(), tasks)
    if threads == 1:
        kernel(0, tasks, *arguments)
        return
    ranges = min(tasks, threads * _RANGES_PER_THREAD)
    edges = [tasks * i // ranges for i in range(ranges + 1)]
    pending = iter(list(pairwise(edges)))
    lock = threading.Lock()
    failures: list[BaseException] = []

    def work() -> None:
        try:
            while True:
                with lock:
                    part = next(pending, None)
                if part is None:
                    return
                kernel(*part, *arguments)
        except BaseException as failure:  # raised below, in the caller's thread
            failures.append(failure)

    # Started anew for every call: a pool would not survive a fork.
    helpers = [threading.Thread(target=work) for _ in range(threads - 1)]
    for helper in helpers:
        helper.start()
    work()
    for helper in helpers:
        helper.join()
    if failures:
        raise failures[0]
