"""The ssd family: Mamba-2's state-space dual, in the terms of `mamba_chunk_scan_combined`.

    dt = softplus(dt + dt_bias)
    H[t] = exp(dt[t] A) H[t-1] + dt[t] x[t] B[t]^T          per head, a (P, N) state, A a scalar
    y[t] = (H[t] C[t] + D x[t]) * silu(z[t])                silu(z) only when the problem is gated

Transformers are SSMs (Dao and Gu 2024), sections 5 to 7. The reference splits the sequence into
chunks of 64 (section 6), in float64. The independent solution never passes a state from chunk to
chunk: it halves the sequence, and halves the halves, and adds to every right half what its left
half left behind.
"""

# A, B and C are the papers' names of tensors.
# pyright: reportConstantRedefinition=false

# torch leaves what unflatten and apply return untyped.
# pyright: reportUnknownMemberType=false, reportUnknownVariableType=false
# pyright: reportUnknownArgumentType=false

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import pad, silu, softplus

from mambench.harness.spec import Family, Problem
from mambench.implementations.problems.base import Inputs, Outputs, ProblemFamily, Sample
from mambench.implementations.problems.draws import (
    Draws,
    choose,
    in_slices,
    index,
    long_memory,
    memory_scale,
)

CHUNK_SIZE = (
    256  # what callers of the reference interface pass; implementations may choose their own
)
JUDGED_STATES = (
    1 << 34
)  # batch * seqlen * heads * headdim * d_state judged at most, 4 heads at least
CHUNK = 64  # of the float64 reference
LEAF = 32  # steps that the independent solution takes by one quadratic form

# Computes y (B, h, L, P) from x (B, h, L, P), dt and log_decay (B, h, L), B and C (B, h, L, N).
HeadSolver = Callable[[Tensor, Tensor, Tensor, Tensor, Tensor], Tensor]


class SsdProblem(ProblemFamily):
    """State-space dual: x, z (B, L, H, P); dt (B, L, H); A, D, dt_bias (H,); B, C (B, L, G, N)."""

    family = Family.SSD

    def __init__(self, *, judged_states: int = JUDGED_STATES) -> None:
        self.judged_states = judged_states

    def make_inputs(
        self, problem: Problem, *, dtype: torch.dtype, device: str, seed: int
    ) -> dict[str, Tensor]:
        """Draw inputs; A, D and dt_bias in fp32 at least, the others in `dtype`."""
        batch, seqlen, nheads, headdim, d_state = _sizes(problem)
        groups = problem.ngroups or 1
        draws = Draws(seed, device)
        parameter_dtype = torch.promote_types(dtype, torch.float32)
        A = -draws.uniform(nheads, low=1.0, high=16.0)
        A = torch.where(long_memory(nheads, device), -1.0, A)
        A *= memory_scale(nheads, seqlen, device)
        inputs = {
            "x": draws.normal(batch, seqlen, nheads, headdim, dtype=dtype),
            "dt": draws.normal(batch, seqlen, nheads, dtype=dtype, scale=0.25),
            "A": A.to(parameter_dtype),
            "B": draws.normal(batch, seqlen, groups, d_state, dtype=dtype),
            "C": draws.normal(batch, seqlen, groups, d_state, dtype=dtype),
            "D": draws.skip(nheads).to(parameter_dtype),
            "dt_bias": draws.dt_bias(nheads).to(parameter_dtype),
        }
        if problem.gated:
            inputs["z"] = draws.normal(batch, seqlen, nheads, headdim, dtype=dtype)
        return inputs

    def differentiable(self, problem: Problem) -> tuple[str, ...]:
        """Name all inputs: each has a gradient."""
        names = ("x", "dt", "A", "B", "C", "D", "dt_bias")
        return (*names, "z") if problem.gated else names

    def call(self, op: Callable[..., Any], problem: Problem, inputs: Inputs) -> Outputs:
        """Call `op` as one calls `mamba_chunk_scan_combined`; returns (y (B, L, H, P),)."""
        y = op(
            *(inputs[name] for name in ("x", "dt", "A", "B", "C")),
            CHUNK_SIZE,
            D=inputs["D"],
            z=inputs.get("z"),
            dt_bias=inputs["dt_bias"],
            dt_softplus=True,
        )
        return (y,)

    def sample(self, problem: Problem, *, seed: int) -> Sample:
        """Choose heads: all up to 16,384 tokens and the budget of states, at most 64 above."""
        _, _, nheads, headdim, d_state = _sizes(problem)
        affordable = self.judged_states // (problem.tokens * headdim * d_state)
        return Sample(heads=choose(nheads, tokens=problem.tokens, at_most=affordable, seed=seed))

    def select_inputs(self, problem: Problem, inputs: Inputs, sample: Sample) -> dict[str, Tensor]:
        """Return the sampled heads' slices; B and C, which heads share, stay whole."""
        if sample.heads is None:
            return dict(inputs)
        axes = {"x": 2, "dt": 2, "z": 2, "A": 0, "D": 0, "dt_bias": 0}
        return {
            name: _selected(value, axes[name], sample) if name in axes else value
            for name, value in inputs.items()
        }

    def select_outputs(self, problem: Problem, outputs: Outputs, sample: Sample) -> Outputs:
        """Return the sampled heads of y (B, L, H, P)."""
        return tuple(_selected(value, 2, sample) for value in outputs)

    def reference(self, problem: Problem, inputs: Inputs, sample: Sample) -> Outputs:
        """Pass a state from chunk to chunk; exact up to the rounding of the inputs' dtype."""
        y = _state_space_dual(problem, inputs, sample, _by_chunks)
        return (_gated(y, inputs),)

    def independent(self, problem: Problem, inputs: Inputs, sample: Sample) -> Outputs:
        """Halve recursively; x dt and operands of products rounded to the dtype, sums in fp32.

        With a gate, y is rounded before it is multiplied: a kernel may leave the gate to its
        caller.
        """
        dtype = inputs["x"].dtype
        y = _state_space_dual(problem, inputs, sample, _Halving(dtype)).to(dtype)
        return (_gated(y.to(torch.promote_types(dtype, torch.float32)), inputs).to(dtype),)


def _sizes(problem: Problem) -> tuple[int, int, int, int, int]:
    if problem.d_state is None or problem.headdim is None:
        raise ValueError(f"family {problem.family} needs headdim and d_state, got {problem}")
    return problem.batch, problem.length, problem.nheads, problem.headdim, problem.d_state


def _selected(value: Tensor, axis: int, sample: Sample) -> Tensor:
    if sample.heads is None:
        return value
    return value.index_select(axis, torch.tensor(sample.heads, device=value.device))


def _gated(y: Tensor, inputs: Inputs) -> Tensor:
    return y * silu(inputs["z"].to(y.dtype)) if "z" in inputs else y


def _state_space_dual(
    problem: Problem, inputs: Inputs, sample: Sample, solver: HeadSolver
) -> Tensor:
    """Compute ungated y (B, L, h, P) of the sampled heads in fp32 or wider, some at a time."""
    batch, seqlen, nheads, headdim, d_state = _sizes(problem)
    wide = torch.promote_types(inputs["x"].dtype, torch.float32)
    per_group = nheads // inputs["B"].shape[2]
    group = index(sample.heads, nheads, inputs["x"].device) // per_group

    def output(part: slice) -> Tensor:
        x = inputs["x"][:, :, part].to(wide).transpose(1, 2)  # (B, h, L, P)
        bias = inputs["dt_bias"][part]
        dt = softplus(inputs["dt"][:, :, part].to(wide) + bias).transpose(1, 2)
        log_decay = dt * inputs["A"][part, None]
        B, C = (inputs[name].index_select(2, group[part]).to(wide).transpose(1, 2) for name in "BC")
        y = solver(x, dt, log_decay, B, C) + inputs["D"][part, None, None] * x
        return y.transpose(1, 2)

    each = batch * seqlen * max(headdim, d_state, CHUNK)
    return in_slices(output, inputs["x"].shape[2], elements_each=each, dim=2)


def _folded(values: Tensor, length: int) -> Tensor:
    """Split time, dimension 2, into rows of `length`, zero after the end."""
    missing = -values.shape[2] % length
    padded = pad(values, (0, 0) * (values.dim() - 3) + (0, missing)) if missing else values
    return padded.unflatten(2, (-1, length))


def _interval_decay(log_decay: Tensor) -> Tensor:
    """Return exp of the sum of log_decay over (s, t] at [..., t, s], zero for s > t."""
    steps = log_decay.shape[-1]
    total = torch.cumsum(log_decay, dim=-1)
    causal = torch.ones(steps, steps, dtype=torch.bool, device=log_decay.device).tril()
    difference = total[..., :, None] - total[..., None, :]
    return torch.exp(difference.masked_fill(~causal, float("-inf")))


def _by_chunks(x: Tensor, dt: Tensor, log_decay: Tensor, B: Tensor, C: Tensor) -> Tensor:
    seqlen = x.shape[2]
    x, B, C = (_folded(value, CHUNK) for value in (x * dt[..., None], B, C))  # (B, h, chunks, Q, .)
    log_decay = _folded(log_decay, CHUNK)
    total = torch.cumsum(log_decay, dim=-1)  # (B, h, chunks, Q)
    within = ((C @ B.mT) * _interval_decay(log_decay)) @ x
    left_behind = (B * torch.exp(total[..., -1:] - total)[..., None]).mT @ x  # (..., N, P)
    after = _interval_decay(total[..., -1]) @ left_behind.flatten(-2)
    before = pad(after[:, :, :-1], (0, 0, 1, 0)).view_as(left_behind)
    y = within + torch.exp(total)[..., None] * (C @ before)
    return y.flatten(2, 3)[:, :, :seqlen]


class _Halving:
    """The independent solution: quadratic forms over leaves, then halves merged level by level."""

    def __init__(self, dtype: torch.dtype) -> None:
        self.dtype = dtype

    def __call__(self, x: Tensor, dt: Tensor, log_decay: Tensor, B: Tensor, C: Tensor) -> Tensor:
        seqlen = x.shape[2]
        width = LEAF
        x = (x * dt[..., None]).to(self.dtype).to(x.dtype)  # the gradient is rounded too
        y = self._leaves(x, log_decay, B, C)[:, :, :seqlen]
        while width < seqlen:
            y = y + self._from_left_halves(x, log_decay, B, C, width)[:, :, :seqlen]
            width *= 2
        return y

    def _leaves(self, x: Tensor, log_decay: Tensor, B: Tensor, C: Tensor) -> Tensor:
        x, log_decay, B, C = (_folded(value, LEAF) for value in (x, log_decay, B, C))
        weights = self._product(C, B.mT) * _interval_decay(log_decay)
        return self._product(weights, x).flatten(2, 3)

    def _from_left_halves(
        self, x: Tensor, log_decay: Tensor, B: Tensor, C: Tensor, width: int
    ) -> Tensor:
        """Return what the right half of each interval of 2 * width steps owes to its left half."""
        x, log_decay, B, C = (
            _folded(value, 2 * width).unflatten(3, (2, width)) for value in (x, log_decay, B, C)
        )
        left, right = log_decay[:, :, :, 0], log_decay[:, :, :, 1]
        to_the_middle = _exclusive_suffix_sum(left).exp()
        state = self._product((B[:, :, :, 0] * to_the_middle[..., None]).mT, x[:, :, :, 0])
        from_the_middle = torch.cumsum(right, dim=-1).exp()
        owed = self._product(C[:, :, :, 1], state) * from_the_middle[..., None]
        return torch.stack((torch.zeros_like(owed), owed), dim=3).flatten(2, 4)

    def _product(self, a: Tensor, b: Tensor) -> Tensor:
        result: Tensor = _RoundedProduct.apply(a, b, self.dtype)
        return result


def _exclusive_suffix_sum(values: Tensor) -> Tensor:
    following = pad(values[..., 1:], (0, 1))
    return torch.cumsum(following.flip(-1), dim=-1).flip(-1)


class _RoundedProduct(torch.autograd.Function):
    """a @ b as a tensor core does it: operands in the low-precision dtype, sums in fp32."""

    @staticmethod
    def forward(ctx: Any, a: Tensor, b: Tensor, dtype: torch.dtype) -> Tensor:
        a, b = _rounded(a, dtype), _rounded(b, dtype)
        ctx.save_for_backward(a, b)
        ctx.dtype = dtype
        return a @ b

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(  # pyright: ignore[reportIncompatibleMethodOverride]
        ctx: Any, *grads: Tensor
    ) -> tuple[Tensor, Tensor, None]:
        a, b = ctx.saved_tensors
        grad = _rounded(grads[0], ctx.dtype)
        return grad @ b.mT, a.mT @ grad, None


def _rounded(value: Tensor, dtype: torch.dtype) -> Tensor:
    return value.to(dtype).to(value.dtype)
