"""Decode of attention: one token, whose key and value join the cache that it attends to.

    k_cache[context] = k;  v_cache[context] = v
    out = softmax(q k_cache[:context + 1]^T / sqrt(P)) v_cache[:context + 1]

q, k, v and out are (B, 1, H, P), the caches (B, S, H, P) with S > context. The problem's seqlen is
the context. Repeating the call writes the same key and value to the same place.
"""

from collections.abc import Callable
from typing import Any, ClassVar

import numpy as np
import torch
from torch import Tensor

from mambench.harness.spec import Family, Problem
from mambench.implementations.problems.attention import choose_heads
from mambench.implementations.problems.base import Inputs, Outputs, ProblemFamily, Sample
from mambench.implementations.problems.draws import choose_some

CAPACITY_MULTIPLE = 128  # a cache is allocated in pages or powers of two, never token by token
JUDGED_ELEMENTS = 1 << 24  # of the keys: 128 MiB in float64

_CACHES = ("k_cache", "v_cache")


class AttentionDecodeProblem(ProblemFamily):
    """One token of attention: q, k, v (B, 1, H, P); k_cache, v_cache (B, S, H, P)."""

    family: ClassVar[Family] = Family.ATTENTION
    outputs: ClassVar[tuple[str, ...]] = ("y", *_CACHES)

    def make_inputs(
        self, problem: Problem, *, dtype: torch.dtype, device: str, seed: int
    ) -> dict[str, Tensor]:
        """Draw all from the normal distribution, also the caches' unused end, drawn on the device.

        What lies behind the context in a cache of its own is finite but arbitrary, so that a kernel
        that attends to it is wrong.
        """
        generator = torch.Generator(device=device).manual_seed(seed)
        headdim = problem.d_inner // problem.nheads
        capacity = -(-(problem.length + 1) // CAPACITY_MULTIPLE) * CAPACITY_MULTIPLE
        lengths = {"q": 1, "k": 1, "v": 1, **dict.fromkeys(_CACHES, capacity)}
        inputs = {
            name: torch.randn(
                (problem.batch, length, problem.nheads, headdim),
                generator=generator,
                dtype=dtype,
                device=device,
            )
            for name, length in lengths.items()
        }
        self.reset(problem, inputs, seed=seed)
        return inputs

    def differentiable(self, problem: Problem) -> tuple[str, ...]:
        """Name nothing: decoding has no gradients."""
        return ()

    def updated(self, problem: Problem, inputs: Inputs) -> dict[str, Tensor]:
        """Return the position in both caches that the token's key and value are written to."""
        at = problem.length
        return {name: inputs[name][:, at : at + 1] for name in _CACHES}

    def reset(self, problem: Problem, inputs: Inputs, *, seed: int) -> None:
        """Empty the position again."""
        for view in self.updated(problem, inputs).values():
            view.zero_()

    def call(self, op: Callable[..., Any], problem: Problem, inputs: Inputs) -> Outputs:
        """Call `op(q, k, v, k_cache, v_cache, context)`; returns (y, new key, new value)."""
        y = op(*(inputs[name] for name in ("q", "k", "v", *_CACHES)), problem.length)
        return y, *self.updated(problem, inputs).values()

    def sample(self, problem: Problem, *, seed: int) -> Sample:
        """Choose heads, then sequences, within the budget of keys."""
        per_head = (problem.length + 1) * (problem.d_inner // problem.nheads)
        if problem.batch * problem.nheads * per_head <= JUDGED_ELEMENTS:
            return Sample()
        count = max(1, min(4, JUDGED_ELEMENTS // (problem.batch * per_head)))
        heads = choose_heads(problem.nheads, count, np.random.default_rng(seed))
        affordable = JUDGED_ELEMENTS // (len(heads) * per_head)
        return Sample(heads=heads, sequences=choose_some(problem.batch, affordable, seed=seed))

    def select_inputs(self, problem: Problem, inputs: Inputs, sample: Sample) -> dict[str, Tensor]:
        """Return the sampled heads and sequences; of the caches the context alone."""
        end = problem.length
        return {
            name: _select(value[:, :end] if name in _CACHES else value, sample)
            for name, value in inputs.items()
        }

    def select_outputs(self, problem: Problem, outputs: Outputs, sample: Sample) -> Outputs:
        """Return the sampled heads and sequences of the output and of the new key and value."""
        return tuple(_select(out, sample) for out in outputs)

    def reference(self, problem: Problem, inputs: Inputs, sample: Sample) -> Outputs:
        """Attend by definition, in the inputs' dtype."""
        y = _attend(inputs, rounded=None)
        return y, inputs["k"], inputs["v"]

    def independent(self, problem: Problem, inputs: Inputs, sample: Sample) -> Outputs:
        """Attend in fp32 or wider; the probabilities and y are rounded to the dtype."""
        dtype = inputs["q"].dtype
        wide = torch.promote_types(dtype, torch.float32)
        y = _attend({name: value.to(wide) for name, value in inputs.items()}, rounded=dtype)
        return y.to(dtype), inputs["k"], inputs["v"]


def _attend(inputs: Inputs, *, rounded: torch.dtype | None) -> Tensor:
    """Return y (B, 1, H, P); the probabilities are rounded to a dtype before they weigh v."""
    q = inputs["q"].transpose(1, 2)
    keys, values = (
        torch.cat((inputs[f"{name}_cache"], inputs[name]), dim=1).transpose(1, 2) for name in "kv"
    )
    probabilities = (q @ keys.mT * q.shape[-1] ** -0.5).softmax(-1)  # (B, H, 1, L + 1)
    if rounded is not None:
        probabilities = probabilities.to(rounded).to(q.dtype)
    return (probabilities @ values).transpose(1, 2)


def _select(value: Tensor, sample: Sample) -> Tensor:
    for axis, indices in ((2, sample.heads), (0, sample.sequences)):
        if indices is not None:
            value = value.index_select(axis, torch.tensor(indices, device=value.device))
    return value
