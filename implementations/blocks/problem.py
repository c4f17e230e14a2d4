"""The block level as a problem family: whole blocks around whichever mixer is compared.

What is measured runs fused on a GPU (see `fused`); what it is judged by never does.

The inputs are the residual stream x (B, L, d_model), normal, and every weight by its name in the
module (`blocks.0.in_proj.weight`); a transformer also gets its rotary tables. The reference is the
same stack in float64 around the family's own float64 reference, so that what is judged is the
mixer inside a block, and the rounding of everything else is in the budget through `independent`,
the same stack in the case's dtype around the family's independent solution.

A block mixes all channels, so no channel can be judged alone:

- Mamba blocks are judged whole, at every position, at any length. Memory is bounded instead: the
  families' references go through their channels in slices, each block is recomputed in the backward
  pass from `RECOMPUTED_TOKENS` tokens on, and where a single activation would exceed
  `WIDE_ELEMENTS` elements in float64, the stack runs in fp32 (its error, near 1e-6, is far below
  the floor of the gate). A state dropped at any position shows at all positions after it.
- A transformer layer is judged at sampled positions, chosen as for attention alone: its output
  there depends on the queries of these positions and on all keys and values. Gradients of x and of
  the weights are complete, since the output's gradient is zero elsewhere.
"""

from collections.abc import Callable, Generator, Mapping
from contextlib import contextmanager
from dataclasses import replace
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint  # pyright: ignore[reportUnknownVariableType]

from mambench.harness.spec import Family, Level, Problem
from mambench.implementations.blocks.fused import runs_fused
from mambench.implementations.blocks.mamba import MambaBlock
from mambench.implementations.blocks.mamba2 import Mamba2Block
from mambench.implementations.blocks.sizes import d_model_of, nblocks_of
from mambench.implementations.blocks.transformer import TransformerBlock, rotary_tables
from mambench.implementations.problems.attention import (
    AttentionProblem,
    choose_rows,
    rows_within_budget,
)
from mambench.implementations.problems.base import Inputs, Outputs, ProblemFamily, Sample
from mambench.implementations.problems.draws import FULL_TOKENS, Draws
from mambench.implementations.problems.s6 import S6Problem
from mambench.implementations.problems.ssd import SsdProblem

RECOMPUTED_TOKENS = FULL_TOKENS
WIDE_ELEMENTS = 1 << 27  # 1 GiB in float64

Op = Callable[..., Any]
Solve = Callable[[Problem, Inputs, Sample], Outputs]

_BLOCKS: Mapping[Family, type[TransformerBlock] | type[MambaBlock] | type[Mamba2Block]] = {
    Family.ATTENTION: TransformerBlock,
    Family.S6: MambaBlock,
    Family.SSD: Mamba2Block,
}
_TABLES = ("rotary_cos", "rotary_sin")


def block_family(problem: Problem, op: Op | None = None) -> ProblemFamily:
    """Return the problem family of blocks around mixers of the problem's family.

    `op` is the mixer that will be called; any other can be passed to `call` as well.
    """
    return BlockProblem(problem.family)


class Stack(nn.Module):
    """The blocks of one problem, in sequence, around one mixer."""

    def __init__(
        self,
        problem: Problem,
        mixer: Op,
        *,
        dtype: torch.dtype,
        device: str,
        fused: bool | None = None,
    ) -> None:
        super().__init__()
        block = _BLOCKS[problem.family]
        self.each = [
            block(problem, mixer, dtype=dtype, device=device, fused=fused)
            for _ in range(nblocks_of(problem))
        ]
        self.blocks = nn.ModuleList(self.each)

    def forward(self, x: Tensor, *tables: Tensor) -> Tensor:
        """Map x (B, L, d_model) to the same shape."""
        for block in self.each:
            x = block(x, *tables)
        return x

    def forward_recomputing(self, x: Tensor, *tables: Tensor) -> Tensor:
        """Do the same; autograd keeps only what enters each block."""
        for block in self.each:
            x = _recomputed(block, x, *tables)
        return x

    def slots(self) -> list[tuple[dict[str, Any], str, str]]:
        """Return (parameters of a module, its key there, its full name) for each parameter."""
        found: list[tuple[dict[str, Any], str, str]] = []
        for name, _ in self.named_parameters():
            prefix, _, key = name.rpartition(".")
            parameters: dict[str, Any] = self.get_submodule(prefix)._parameters
            found.append((parameters, key, name))
        return found


class BlockProblem(ProblemFamily):
    """Inputs, calling convention and references of a stack of blocks."""

    def __init__(self, family: Family) -> None:
        self.family = family  # pyright: ignore[reportAttributeAccessIssue]
        self._latest: tuple[Problem, Op, _Bindable] | None = None

    def make_inputs(
        self, problem: Problem, *, dtype: torch.dtype, device: str, seed: int
    ) -> dict[str, Tensor]:
        """Draw x and the weights; A_log, D and dt_bias in fp32 at least, all else in `dtype`."""
        draws = Draws(seed, device)
        shape = (problem.batch, problem.length, d_model_of(problem))
        inputs = {"x": draws.normal(*shape, dtype=dtype)}
        if problem.family is Family.ATTENTION:
            headdim = problem.d_inner // problem.nheads
            tables = rotary_tables(problem.length, headdim, dtype=dtype, device=device)
            inputs.update(zip(_TABLES, tables, strict=True))
        stack = _skeleton(problem, _no_mixer, dtype)
        for index, block in enumerate(stack.each):
            dtypes = {name: weight.dtype for name, weight in block.named_parameters()}
            for name, value in block.draw(draws, problem).items():
                inputs[f"blocks.{index}.{name}"] = value.to(dtypes[name])
        return inputs

    def differentiable(self, problem: Problem) -> tuple[str, ...]:
        """Name x and all weights."""
        stack = _skeleton(problem, _no_mixer, torch.float32)
        return ("x", *(name for name, _ in stack.named_parameters()))

    def call(self, op: Op, problem: Problem, inputs: Inputs) -> Outputs:
        """Run the stack with `op` as its mixer; returns (y (B, L, d_model),)."""
        latest = self._latest
        if latest is None or latest[0] is not problem or latest[1] is not op:
            latest = (problem, op, _Bindable(_skeleton(problem, op, torch.float32)))
            self._latest = latest
        with latest[2].bound(inputs) as stack:
            return (stack(inputs["x"], *_tables(inputs)),)

    def surroundings(self, inputs: Inputs) -> str:
        """Say which form of the blocks `call` runs: `fused` or `plain`."""
        return "fused" if runs_fused(inputs["x"], None) else "plain"

    def sample(self, problem: Problem, *, seed: int) -> Sample:
        """Judge everything, except of a long transformer layer: some positions."""
        if problem.family is not Family.ATTENTION:
            return Sample()
        count = rows_within_budget(problem, problem.nheads)
        if count >= problem.length:
            return Sample()
        return Sample(rows=choose_rows(problem.length, count, np.random.default_rng(seed)))

    def select_inputs(self, problem: Problem, inputs: Inputs, sample: Sample) -> dict[str, Tensor]:
        """Return everything: what is sampled depends on all of it."""
        return dict(inputs)

    def select_outputs(self, problem: Problem, outputs: Outputs, sample: Sample) -> Outputs:
        """Return the sampled positions of y (or of its gradient)."""
        if sample.rows is None:
            return outputs
        rows = torch.tensor(sample.rows, device=outputs[0].device)
        return tuple(output.index_select(1, rows) for output in outputs)

    def reference(self, problem: Problem, inputs: Inputs, sample: Sample) -> Outputs:
        """Run the stack in the inputs' dtype around the family's reference."""
        if problem.tokens * problem.d_inner > WIDE_ELEMENTS:
            inputs = {name: value.to(torch.float32) for name, value in inputs.items()}
        return self._judged(problem, inputs, sample, _solver(problem.family).reference)

    def independent(self, problem: Problem, inputs: Inputs, sample: Sample) -> Outputs:
        """Run the stack in the inputs' dtype around the family's independent solution."""
        return self._judged(problem, inputs, sample, _solver(problem.family).independent)

    def _judged(self, problem: Problem, inputs: Inputs, sample: Sample, solve: Solve) -> Outputs:
        mixer = _MIXERS[problem.family](replace(problem, level=Level.OP), solve, sample)
        stack = _Bindable(_skeleton(problem, mixer, torch.float32, fused=False)).bind(inputs)
        recompute = torch.is_grad_enabled() and problem.tokens > RECOMPUTED_TOKENS
        forward = stack.forward_recomputing if recompute else stack.forward
        y = forward(inputs["x"], *_tables(inputs))
        return self.select_outputs(problem, (y,), sample)


class _Bindable:
    """A stack without weights, and where they go.

    `torch.func.functional_call` does the same at several times the cost of a kernel launch per
    weight, which would be measured as the call's own.
    """

    def __init__(self, stack: Stack) -> None:
        self.stack = stack
        self._slots = stack.slots()
        self._absent = [parameters[key] for parameters, key, _ in self._slots]

    def bind(self, inputs: Inputs) -> Stack:
        """Put the inputs in the weights' places, as they are: autograd sees them as leaves."""
        for parameters, key, name in self._slots:
            parameters[key] = inputs[name]
        return self.stack

    @contextmanager
    def bound(self, inputs: Inputs) -> Generator[Stack, None, None]:
        """Bind for one call; afterwards the stack holds no memory."""
        try:
            yield self.bind(inputs)
        finally:
            for (parameters, key, _), absent in zip(self._slots, self._absent, strict=True):
                parameters[key] = absent


def _skeleton(
    problem: Problem, mixer: Op, dtype: torch.dtype, *, fused: bool | None = None
) -> Stack:
    return Stack(problem, mixer, dtype=dtype, device="meta", fused=fused)


def _recomputed(block: nn.Module, *tensors: Tensor) -> Tensor:
    y: Any = checkpoint(  # pyright: ignore[reportUnknownVariableType]
        block, *tensors, use_reentrant=False, preserve_rng_state=False
    )
    return y  # pyright: ignore[reportUnknownVariableType]


def _no_mixer(*arguments: Any, **keywords: Any) -> Any:
    raise RuntimeError("this stack was made for its weights' names and shapes alone")


def _tables(inputs: Inputs) -> tuple[Tensor, ...]:
    return tuple([inputs[name] for name in _TABLES if name in inputs])


def _solver(family: Family) -> ProblemFamily:
    if family is Family.S6:
        return S6Problem()
    return SsdProblem() if family is Family.SSD else AttentionProblem()


def _attention_mixer(problem: Problem, solve: Solve, sample: Sample) -> Op:
    """Attend from the sampled positions only; the others' outputs are zero and get no gradient."""

    def attend(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        if sample.rows is None:
            return solve(problem, {"q": q, "k": k, "v": v}, sample)[0]
        rows = torch.tensor(sample.rows, device=q.device)
        (out,) = solve(problem, {"q": q.index_select(1, rows), "k": k, "v": v}, sample)
        return torch.zeros_like(q).index_copy(1, rows, out)

    return attend


def _scan_mixer(problem: Problem, solve: Solve, sample: Sample) -> Op:
    """Adapt to the call of a Mamba block, whose scan is gated."""
    gated = replace(problem, gated=True)

    def scan(u: Tensor, delta: Tensor, A: Tensor, B: Tensor, C: Tensor, **rest: Any) -> Tensor:
        named = {name: rest[name] for name in ("D", "z", "delta_bias")}
        inputs = {"u": u, "delta": delta, "A": A, "B": B, "C": C, **named}
        return solve(gated, inputs, Sample())[0]

    return scan


def _dual_mixer(problem: Problem, solve: Solve, sample: Sample) -> Op:
    """Adapt to the call of a Mamba-2 block, which gates after the mixer."""

    def dual(
        x: Tensor, dt: Tensor, A: Tensor, B: Tensor, C: Tensor, chunk_size: int, **rest: Any
    ) -> Tensor:
        inputs = {"x": x, "dt": dt, "A": A, "B": B, "C": C, "D": rest["D"]}
        return solve(problem, {**inputs, "dt_bias": rest["dt_bias"]}, Sample())[0]

    return dual


_MIXERS: Mapping[Family, Callable[[Problem, Solve, Sample], Op]] = {
    Family.ATTENTION: _attention_mixer,
    Family.S6: _scan_mixer,
    Family.SSD: _dual_mixer,
}
