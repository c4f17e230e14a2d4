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

from mambench.kernels.s6 import numba_kernels as kernels
from mambench.kernels.s6.arguments import check_arguments
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
) -> Tensor | tuple[Tensor, Tensor]:
    """Return the selective scan of u, differentiable in every tensor argument.

    Args:
        u, delta, z: (B, D, L), one floating-point dtype.
        A: (D, N), at most 256 states.
        B, C: (B, G, N, L) or (B, N, L), u's dtype; a group serves D / G consecutive channels.
        D, delta_bias: (D,).
        delta_softplus: apply softplus to delta + delta_bias.
        return_last_state: also return the state after the last step.

    Returns:
        out (B, D, L) in u's dtype, or (out, last state (B, D, N) in float32; float64 for float64).

    Raises:
        ValueError, TypeError: see `check_arguments`.
    """
    B = B.unsqueeze(1) if B.dim() == 3 else B
    C = C.unsqueeze(1) if C.dim() == 3 else C
    check_arguments(u, delta, A, B, C, D, z, delta_bias)
    out, last = _SelectiveScan.apply(u, delta, A, B, C, D, z, delta_bias, delta_softplus)
    return (out, last) if return_last_state else out


def precompile(dtype: torch.dtype) -> None:
    """Compile forward and backward for inputs of this dtype, or load them from the cache."""
    u = torch.zeros((1, 1, 1), dtype=dtype, requires_grad=True)
    shared = torch.zeros((1, 1, 1, 1), dtype=dtype)
    out = selective_scan(u, u, torch.zeros((1, 1)), shared, shared)
    assert isinstance(out, Tensor)
    out.sum().backward()


class _SelectiveScan(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        u: Tensor,
        delta: Tensor,
        A: Tensor,
        B: Tensor,
        C: Tensor,
        D: Tensor | None,
        z: Tensor | None,
        delta_bias: Tensor | None,
        delta_softplus: bool,
    ) -> tuple[Tensor, Tensor]:
        dtype = _compute_dtype(u)
        batch, d_inner, seqlen = u.shape
        blocks = block_count(d_inner=d_inner, ngroups=B.shape[1])
        keep = any(ctx.needs_input_grad)
        chunks = -(-seqlen // CHUNK) if keep else 0
        out = torch.empty(u.shape, dtype=dtype)
        last = torch.empty((batch, d_inner, A.shape[1]), dtype=dtype)
        kept = torch.empty((batch, blocks, chunks, A.shape[1], LANES), dtype=dtype)
        arrays = _arrays(dtype, u, delta, A, B, C, D, z, delta_bias)
        results = _numpy(dtype, out, last, kept)
        tasks = batch * blocks
        _in_threads(
            kernels.forward, tasks, *arrays, blocks, delta_softplus, z is not None, keep, *results
        )
        ctx.save_for_backward(u, delta, A, B, C, D, z, delta_bias, kept)
        ctx.delta_softplus = delta_softplus
        ctx.set_materialize_grads(False)
        return out.to(u.dtype), last

    @staticmethod
    def backward(ctx: Any, dout: Tensor | None, dlast: Tensor | None) -> tuple[Tensor | None, ...]:
        u, delta, A, B, C, D, z, delta_bias, kept = ctx.saved_tensors
        dtype = _compute_dtype(u)
        batch, d_inner, seqlen = u.shape
        ngroups, d_state = B.shape[1], A.shape[1]
        blocks = block_count(d_inner=d_inner, ngroups=ngroups)
        partials = partial_count(d_inner=d_inner, d_state=d_state, ngroups=ngroups)
        du, ddelta = torch.empty((2, *u.shape), dtype=dtype)
        dz = torch.empty(u.shape if z is not None else (0, 0, 0), dtype=dtype)
        dA = torch.empty((batch, d_inner, d_state), dtype=dtype)
        dparameters = torch.empty((batch, d_inner, 2), dtype=dtype)
        dB, dC = torch.zeros((2, partials, batch, ngroups, d_state, seqlen), dtype=dtype)
        dout = torch.zeros(u.shape, dtype=dtype) if dout is None else dout
        dlast = torch.zeros(dA.shape, dtype=dtype) if dlast is None else dlast
        arrays = _arrays(dtype, u, delta, A, B, C, D, z, delta_bias)
        _in_threads(
            kernels.backward,
            batch * ngroups * partials,
            *arrays,
            *_numpy(dtype, dout, dlast, kept),
            blocks,
            ctx.delta_softplus,
            z is not None,
            *_numpy(dtype, du, ddelta, dz, dA, dparameters, dB, dC),
        )
        dbias, dD = dparameters.sum(0).unbind(-1)
        return (
            du.to(u.dtype),
            ddelta.to(u.dtype),
            dA.sum(0).to(A.dtype),
            dB.sum(0).to(B.dtype),
            dC.sum(0).to(C.dtype),
            None if D is None else dD.to(D.dtype),
            None if z is None else dz.to(z.dtype),
            None if delta_bias is None else dbias.to(delta_bias.dtype),
            None,
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
