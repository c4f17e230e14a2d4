"""Decode of the families s6 and ssd: one token, and a state that is updated in place.

    dt = softplus(dt_raw + dt_bias)
    state = exp(dt A) state + dt x B^T
    y = (state C + D x) * silu(z)                           silu(z) only when the problem is gated

Mamba (Gu and Dao 2023), equation 2; Transformers are SSMs (Dao and Gu 2024), equation 1. Inputs are
drawn as the families draw them, the state as a model's is after many tokens: the recurrence is
an autoregression, so that its states have the variance (dt x B)^2 / (1 - decay^2). Repeating an
update with the same inputs moves the state to the fixed point dt x B / (1 - decay), which is of
the order of x B / |A|: it neither grows nor falls into the denormal range, however often it is
timed.
"""

# A, B and C are the papers' names of tensors.
# pyright: reportConstantRedefinition=false

from collections.abc import Callable
from dataclasses import replace
from typing import Any, ClassVar

import torch
from torch import Tensor
from torch.nn.functional import silu, softplus

from mambench.harness.spec import Family, Problem
from mambench.implementations.problems.base import Inputs, Outputs, ProblemFamily, Sample
from mambench.implementations.problems.draws import choose, choose_some, index
from mambench.implementations.problems.s6 import S6Problem
from mambench.implementations.problems.ssd import SsdProblem

LASTING = 2048  # tokens that the channels with a long memory remember
JUDGED_STATES = 1 << 24  # states judged at most: 128 MiB in float64

# Axes of the channels or heads, and of the sequences, of every tensor.
_CHANNEL_AXES = {"state": 1, "x": 1, "dt": 1, "z": 1, "A": 0, "D": 0, "dt_bias": 0}
_SEQUENCE_AXES = {"state": 0, "x": 0, "dt": 0, "z": 0, "B": 0, "C": 0}


class StateUpdateProblem(ProblemFamily):
    """One token of s6 or ssd: state, x, dt, A, B, C, D, dt_bias and z, as `base` describes."""

    outputs: ClassVar[tuple[str, ...]] = ("y", "state")

    def __init__(self, family: Family, *, judged_states: int = JUDGED_STATES) -> None:
        self.family = family  # pyright: ignore[reportAttributeAccessIssue]
        self.judged_states = min(judged_states, JUDGED_STATES)

    def make_inputs(
        self, problem: Problem, *, dtype: torch.dtype, device: str, seed: int
    ) -> dict[str, Tensor]:
        """Draw inputs; A, D and dt_bias in fp32 at least, the others and the state in `dtype`."""
        one, lasting = replace(problem, seqlen=1), replace(problem, seqlen=LASTING)
        drawn = self._sequences().make_inputs(one, dtype=dtype, device=device, seed=seed)
        parameters = self._sequences().make_inputs(
            replace(lasting, batch=1, gated=False), dtype=dtype, device=device, seed=seed
        )
        if self.family is Family.S6:
            names = {"x": "u", "dt": "delta", "B": "B", "C": "C", "z": "z"}
            inputs = {new: drawn[old][..., 0] for new, old in names.items() if old in drawn}
            inputs["dt_bias"] = parameters["delta_bias"]
        else:
            inputs = {
                name: drawn[name][:, 0] for name in ("x", "dt", "B", "C", "z") if name in drawn
            }
            inputs["dt_bias"] = parameters["dt_bias"]
        inputs |= {name: parameters[name] for name in "AD"}
        inputs = {name: value.contiguous() for name, value in inputs.items()}
        return inputs | {"state": _stationary(inputs, dtype, seed)}

    def differentiable(self, problem: Problem) -> tuple[str, ...]:
        """Name nothing: decoding has no gradients."""
        return ()

    def updated(self, problem: Problem, inputs: Inputs) -> dict[str, Tensor]:
        """Return the state."""
        return {"state": inputs["state"]}

    def reset(self, problem: Problem, inputs: Inputs, *, seed: int) -> None:
        """Draw the state again."""
        inputs["state"].copy_(_stationary(inputs, inputs["state"].dtype, seed))

    def call(self, op: Callable[..., Any], problem: Problem, inputs: Inputs) -> Outputs:
        """Call `op` as one calls `selective_state_update`, with softplus; returns (y, state)."""
        y = op(
            *(inputs[name] for name in ("state", "x", "dt", "A", "B", "C")),
            D=inputs["D"],
            z=inputs.get("z"),
            dt_bias=inputs["dt_bias"],
            dt_softplus=True,
        )
        return y, inputs["state"]

    def sample(self, problem: Problem, *, seed: int) -> Sample:
        """Choose channels or heads, then sequences, within the budget of states."""
        count, each = self._channels(problem)
        total = problem.batch * count * each
        if total <= self.judged_states:
            return Sample()
        wanted = self.judged_states // (problem.batch * each)
        channels = choose(count, tokens=1, at_most=wanted, seed=seed)
        kept = min(count, max(4, wanted))
        sequences = choose_some(problem.batch, self.judged_states // (kept * each), seed=seed)
        if self.family is Family.S6:
            return Sample(channels=channels, sequences=sequences)
        return Sample(heads=channels, sequences=sequences)

    def select_inputs(self, problem: Problem, inputs: Inputs, sample: Sample) -> dict[str, Tensor]:
        """Return the sampled channels or heads and sequences; groups of B and C stay whole."""
        chosen = sample.channels if self.family is Family.S6 else sample.heads
        selected = dict(inputs)
        for indices, axes in ((chosen, _CHANNEL_AXES), (sample.sequences, _SEQUENCE_AXES)):
            for name, value in selected.items():
                if indices is not None and name in axes:
                    at = torch.tensor(indices, device=value.device)
                    selected[name] = value.index_select(axes[name], at)
        return selected

    def select_outputs(self, problem: Problem, outputs: Outputs, sample: Sample) -> Outputs:
        """Return the sampled channels or heads and sequences of y and the state."""
        y, state = outputs
        named: Inputs = {"x": y, "state": state}  # y has the axes of x
        selected = self.select_inputs(problem, named, sample)
        return selected["x"], selected["state"]

    def reference(self, problem: Problem, inputs: Inputs, sample: Sample) -> Outputs:
        """Compute the update by its definition; exact up to the rounding of the inputs' dtype."""
        y, state = self._update(problem, inputs, sample)
        return _gated(y, inputs), state

    def independent(self, problem: Problem, inputs: Inputs, sample: Sample) -> Outputs:
        """Compute it in fp32 and round the state and y to the dtype, y also before it is gated."""
        dtype = inputs["x"].dtype
        y, state = self._update(problem, inputs, sample)
        y = _gated(y.to(dtype).to(y.dtype), inputs) if problem.gated else y
        return y.to(dtype), state.to(inputs["state"].dtype)

    def _update(self, problem: Problem, inputs: Inputs, sample: Sample) -> tuple[Tensor, Tensor]:
        """Return ungated y and the state of the sample, in fp32 or wider."""
        wide = torch.promote_types(inputs["x"].dtype, torch.float32)
        x, dt_raw, old = (inputs[name].to(wide) for name in ("x", "dt", "state"))
        count, _ = self._channels(problem)
        chosen = sample.channels if self.family is Family.S6 else sample.heads
        group = index(chosen, count, x.device) // (count // inputs["B"].shape[1])
        B, C = (inputs[name].to(wide).index_select(1, group) for name in "BC")  # (B, D or H, N)
        dt, A, D = softplus(dt_raw + inputs["dt_bias"]), inputs["A"], inputs["D"]
        if self.family is Family.SSD:
            dt, A, D, B, C = (
                dt[..., None],
                A[:, None, None],
                D[:, None],
                B[:, :, None],
                C[:, :, None],
            )
        state = torch.exp(dt[..., None] * A) * old + (dt * x)[..., None] * B
        return (state * C).sum(-1) + D * x, state

    def _channels(self, problem: Problem) -> tuple[int, int]:
        """Return how many channels or heads there are, and the states of each."""
        if problem.d_state is None:
            raise ValueError(f"family {problem.family} needs d_state, got {problem}")
        if self.family is Family.S6:
            return problem.d_inner, problem.d_state
        return problem.nheads, problem.d_inner // problem.nheads * problem.d_state

    def _sequences(self) -> ProblemFamily:
        return S6Problem() if self.family is Family.S6 else SsdProblem()


def _stationary(inputs: Inputs, dtype: torch.dtype, seed: int) -> Tensor:
    """Draw the state with the deviation it has in the long run, dt / sqrt(1 - decay^2)."""
    dt, A = softplus(inputs["dt_bias"]), inputs["A"]
    per_step = dt[:, None] * A if A.dim() == 2 else (dt * A)[:, None, None]
    dt = dt.view(-1, *[1] * (per_step.dim() - 1))
    deviation = dt / torch.sqrt(-torch.expm1(2 * per_step))
    shape = (*inputs["x"].shape, inputs["B"].shape[-1])
    generator = torch.Generator(device=A.device).manual_seed(seed + 2)
    state = torch.randn(shape, generator=generator, dtype=dtype, device=A.device)
    return state.mul_(deviation.to(dtype))


def _gated(y: Tensor, inputs: Inputs) -> Tensor:
    return y * silu(inputs["z"].to(y.dtype)) if "z" in inputs else y
