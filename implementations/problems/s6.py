"""The s6 family: Mamba-1's selective scan, in the terms of `selective_scan_fn`.

    dt = softplus(delta + delta_bias)
    h[t] = exp(dt[t] A) h[t-1] + dt[t] u[t] B[t]           per channel, N states
    y[t] = (C[t] . h[t] + D u[t]) * silu(z[t])             silu(z) only when the problem is gated

Mamba (Gu and Dao 2023), section 3.2 and algorithm 2; the discretisation of B is dt B.
"""

# A, B and C are the papers' names of tensors.
# pyright: reportConstantRedefinition=false

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import silu, softplus

from mambench.harness.spec import Family, Problem
from mambench.implementations.problems.base import Inputs, Outputs, ProblemFamily, Sample
from mambench.implementations.problems.draws import Draws, choose, in_slices, index, memory_scale
from mambench.implementations.problems.recurrence import Solver, by_doubling, by_rows, solve

JUDGED_STATES = 1 << 26  # batch * seqlen * channels * d_state judged at most, 4 channels at least


class S6Problem(ProblemFamily):
    """Selective scan: u, delta, z (B, D, L); A (D, N); B, C (B, G, N, L); D, delta_bias (D,)."""

    family = Family.S6

    def __init__(self, *, judged_states: int = JUDGED_STATES) -> None:
        self.judged_states = judged_states

    def make_inputs(
        self, problem: Problem, *, dtype: torch.dtype, device: str, seed: int
    ) -> dict[str, Tensor]:
        """Draw inputs; A, D and delta_bias in fp32 at least, the others in `dtype`."""
        batch, seqlen, channels, d_state = _sizes(problem)
        groups = problem.ngroups or 1
        draws = Draws(seed, device)
        parameter_dtype = torch.promote_types(dtype, torch.float32)
        s4d_real = -torch.arange(1, d_state + 1, dtype=torch.float32, device=device)
        A = s4d_real * draws.normal(channels, d_state, scale=0.1).exp_()
        A *= memory_scale(channels, seqlen, device)[:, None]
        inputs = {
            "u": draws.normal(batch, channels, seqlen, dtype=dtype),
            "delta": draws.normal(batch, channels, seqlen, dtype=dtype, scale=0.25),
            "A": A.to(parameter_dtype),
            "B": draws.normal(batch, groups, d_state, seqlen, dtype=dtype),
            "C": draws.normal(batch, groups, d_state, seqlen, dtype=dtype),
            "D": draws.skip(channels).to(parameter_dtype),
            "delta_bias": draws.dt_bias(channels).to(parameter_dtype),
        }
        if problem.gated:
            inputs["z"] = draws.normal(batch, channels, seqlen, dtype=dtype)
        return inputs

    def differentiable(self, problem: Problem) -> tuple[str, ...]:
        """Name all inputs: each has a gradient."""
        names = ("u", "delta", "A", "B", "C", "D", "delta_bias")
        return (*names, "z") if problem.gated else names

    def call(self, op: Callable[..., Any], problem: Problem, inputs: Inputs) -> Outputs:
        """Call `op` as one calls `selective_scan_fn`, with softplus; returns (y (B, D, L),)."""
        y = op(
            *(inputs[name] for name in ("u", "delta", "A", "B", "C", "D")),
            z=inputs.get("z"),
            delta_bias=inputs["delta_bias"],
            delta_softplus=True,
        )
        return (y,)

    def sample(self, problem: Problem, *, seed: int) -> Sample:
        """Choose channels: all up to 16,384 tokens and the budget of states, at most 64 above."""
        _, _, channels, d_state = _sizes(problem)
        affordable = self.judged_states // (problem.tokens * d_state)
        return Sample(
            channels=choose(channels, tokens=problem.tokens, at_most=affordable, seed=seed)
        )

    def select_inputs(self, problem: Problem, inputs: Inputs, sample: Sample) -> dict[str, Tensor]:
        """Return the sampled channels' rows; B and C, which channels share, stay whole."""
        if sample.channels is None:
            return dict(inputs)
        axes = {"u": 1, "delta": 1, "z": 1, "A": 0, "D": 0, "delta_bias": 0}
        return {
            name: _selected(value, axes[name], sample) if name in axes else value
            for name, value in inputs.items()
        }

    def select_outputs(self, problem: Problem, outputs: Outputs, sample: Sample) -> Outputs:
        """Return the sampled channels of y (B, D, L)."""
        return tuple(_selected(value, 1, sample) for value in outputs)

    def reference(self, problem: Problem, inputs: Inputs, sample: Sample) -> Outputs:
        """Step through the recurrence; exact up to the rounding of the inputs' dtype."""
        return (_selective_scan(problem, inputs, sample, by_rows),)

    def independent(self, problem: Problem, inputs: Inputs, sample: Sample) -> Outputs:
        """Merge intervals in fp32, as the fused kernels keep their state, and round y to the dtype.

        With a gate, y is rounded before it is multiplied: a kernel may leave the gate to its
        caller.
        """
        ungated = {name: value for name, value in inputs.items() if name != "z"}
        y = _selective_scan(problem, ungated, sample, by_doubling).to(inputs["u"].dtype)
        if problem.gated:
            wide = torch.promote_types(y.dtype, torch.float32)
            y = (y.to(wide) * silu(inputs["z"].to(wide))).to(y.dtype)
        return (y,)


def _sizes(problem: Problem) -> tuple[int, int, int, int]:
    if problem.d_state is None:
        raise ValueError(f"family {problem.family} needs d_state, got {problem}")
    return problem.batch, problem.length, problem.d_inner, problem.d_state


def _selected(value: Tensor, axis: int, sample: Sample) -> Tensor:
    if sample.channels is None:
        return value
    return value.index_select(axis, torch.tensor(sample.channels, device=value.device))


def _selective_scan(problem: Problem, inputs: Inputs, sample: Sample, solver: Solver) -> Tensor:
    """Compute y (B, C, L) of the sampled channels, in fp32 at least, some channels at a time."""
    batch, seqlen, channels, d_state = _sizes(problem)
    u, delta = inputs["u"], inputs["delta"]
    wide = torch.promote_types(u.dtype, torch.float32)
    per_group = channels // inputs["B"].shape[1]
    group = index(sample.channels, channels, u.device) // per_group

    def output(part: slice) -> Tensor:
        x = u[:, part].to(wide)
        dt = softplus(delta[:, part].to(wide) + inputs["delta_bias"][part, None])
        B, C = (_per_channel(inputs[name], group[part]).to(wide) for name in "BC")
        decay = torch.exp(dt[..., None] * inputs["A"][part, None])  # (B, C, L, N)
        h = solve(decay, (dt * x)[..., None] * B, solver)
        y = (h * C).sum(-1) + inputs["D"][part, None] * x
        return y * silu(inputs["z"][:, part].to(wide)) if "z" in inputs else y

    return in_slices(output, u.shape[1], elements_each=batch * seqlen * d_state, dim=1)


def _per_channel(shared: Tensor, group: Tensor) -> Tensor:
    """Give each channel its group's row: (B, G, N, L) to (B, C or 1, L, N)."""
    rows = shared if shared.shape[1] == 1 else shared.index_select(1, group)
    return rows.transpose(-1, -2)
