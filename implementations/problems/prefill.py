"""Prefill of the families s6 and ssd: the forward pass, and the state that decoding goes on from.

The state after the last step is not taken from the recurrence but from its solution,

    state[L] = sum over t of exp(A sum of dt after t) dt[t] x[t] B[t]^T,

so that it is a check of its own. Attention needs no such thing: the keys and values that it is
given are its cache.
"""

# A, B and C are the papers' names of tensors.
# pyright: reportConstantRedefinition=false

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import pad, softplus

from mambench.harness.spec import Problem
from mambench.implementations.problems.base import Inputs, Outputs, Sample
from mambench.implementations.problems.draws import in_slices, index
from mambench.implementations.problems.s6 import S6Problem
from mambench.implementations.problems.ssd import CHUNK_SIZE, SsdProblem


class S6Prefill(S6Problem):
    """Selective scan that returns y (B, D, L) and the last state (B, D, N) in fp32."""

    def call(self, op: Callable[..., Any], problem: Problem, inputs: Inputs) -> Outputs:
        """Call `op` as one calls `selective_scan_fn` to fill a cache."""
        return op(
            *(inputs[name] for name in ("u", "delta", "A", "B", "C", "D")),
            z=inputs.get("z"),
            delta_bias=inputs["delta_bias"],
            delta_softplus=True,
            return_last_state=True,
        )

    def reference(self, problem: Problem, inputs: Inputs, sample: Sample) -> Outputs:
        """Return y by the recurrence and the last state by its solution."""
        return (*super().reference(problem, inputs, sample), _s6_state(problem, inputs, sample))

    def independent(self, problem: Problem, inputs: Inputs, sample: Sample) -> Outputs:
        """Return both in the case's own dtype; the state is fp32."""
        return (*super().independent(problem, inputs, sample), _s6_state(problem, inputs, sample))


class SsdPrefill(SsdProblem):
    """State-space dual that returns y (B, L, H, P) and the final state (B, H, P, N) in fp32."""

    def call(self, op: Callable[..., Any], problem: Problem, inputs: Inputs) -> Outputs:
        """Call `op` as one calls `mamba_chunk_scan_combined` to fill a cache."""
        return op(
            *(inputs[name] for name in ("x", "dt", "A", "B", "C")),
            CHUNK_SIZE,
            D=inputs["D"],
            z=inputs.get("z"),
            dt_bias=inputs["dt_bias"],
            dt_softplus=True,
            return_final_states=True,
        )

    def select_outputs(self, problem: Problem, outputs: Outputs, sample: Sample) -> Outputs:
        """Return the sampled heads of y (B, L, H, P) and of the state (B, H, P, N)."""
        (y,), state = super().select_outputs(problem, outputs[:1], sample), outputs[1]
        if sample.heads is not None:
            state = state.index_select(1, torch.tensor(sample.heads, device=state.device))
        return y, state

    def reference(self, problem: Problem, inputs: Inputs, sample: Sample) -> Outputs:
        """Return y chunk by chunk and the final state by the recurrence's solution."""
        dtype = inputs["x"].dtype
        state = _ssd_state(problem, inputs, sample, dtype)
        return (*super().reference(problem, inputs, sample), state)

    def independent(self, problem: Problem, inputs: Inputs, sample: Sample) -> Outputs:
        """Return both in the case's own dtype, of which the state's operands are; it is fp32."""
        state = _ssd_state(problem, inputs, sample, inputs["x"].dtype)
        return (*super().independent(problem, inputs, sample), state)


def _s6_state(problem: Problem, inputs: Inputs, sample: Sample) -> Tensor:
    """Return the last state (B, C, N) of the sampled channels, in fp32 or wider."""
    u, delta = inputs["u"], inputs["delta"]
    wide = torch.promote_types(u.dtype, torch.float32)
    batch, count, seqlen = u.shape
    channels, d_state = problem.d_inner, inputs["A"].shape[1]
    group = index(sample.channels, channels, u.device) // (channels // inputs["B"].shape[1])

    def state(part: slice) -> Tensor:
        dt = softplus(delta[:, part].to(wide) + inputs["delta_bias"][part, None])
        B = inputs["B"].index_select(1, group[part]).to(wide)  # (B, C, N, L)
        decay = torch.exp(_sum_after(dt)[:, :, None] * inputs["A"][part, :, None])
        return (decay * B * (dt * u[:, part].to(wide))[:, :, None]).sum(-1)

    return in_slices(state, count, elements_each=batch * seqlen * d_state, dim=1)


def _ssd_state(problem: Problem, inputs: Inputs, sample: Sample, dtype: torch.dtype) -> Tensor:
    """Return the final state (B, h, P, N) of the sampled heads; products are of `dtype` values."""
    x = inputs["x"]
    wide = torch.promote_types(x.dtype, torch.float32)
    batch, seqlen, count, headdim = x.shape
    nheads, d_state = problem.nheads, inputs["B"].shape[-1]
    group = index(sample.heads, nheads, x.device) // (nheads // inputs["B"].shape[2])

    def state(part: slice) -> Tensor:
        dt = softplus(inputs["dt"][:, :, part].to(wide) + inputs["dt_bias"][part])
        dt = dt.transpose(1, 2)  # (B, h, L)
        decay = torch.exp(_sum_after(dt) * inputs["A"][part, None])
        B = inputs["B"].index_select(2, group[part]).to(wide).transpose(1, 2)
        added = x[:, :, part].to(wide).transpose(1, 2) * dt[..., None]
        left, right = (v.to(dtype).to(wide) for v in (added, B * decay[..., None]))
        return left.mT @ right

    each = batch * seqlen * max(headdim, d_state)
    return in_slices(state, count, elements_each=each, dim=1)


def _sum_after(dt: Tensor) -> Tensor:
    """Return at [..., t] the sum of dt over the steps after t."""
    return pad(dt[..., 1:], (0, 1)).flip(-1).cumsum(-1).flip(-1)
