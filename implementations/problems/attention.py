"""Causal softmax attention: inputs, calling convention and references.

    scores = q k^T / sqrt(P), -inf above the diagonal;  out = softmax(scores) v

q, k, v and out are (B, L, H, P). Every head is independent, and a query row needs only the keys up
to itself: so a sample of heads and query rows can be judged exactly. Keys and values are selected
by head alone; as the gradient of the output is zero outside the sampled rows, grad_k and grad_v at
all positions depend on the sampled rows only.
"""

from collections.abc import Callable
from functools import partial
from typing import TYPE_CHECKING, Any, ClassVar

import numpy as np
import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from mambench.harness.spec import Family, Problem
from mambench.implementations.problems.base import Inputs, Outputs, ProblemFamily, Sample

# Pairs of a query and a key that are judged: the float64 reference, forward and backward, then
# takes about a second on two CPU cores.
_PAIRS = 2**23
_FEWEST_ROWS = 32
_TILE = 64  # rows beside a multiple of it are where tiled kernels go wrong
_BLOCK_BYTES = 2**26  # scores of one block of query rows


class AttentionProblem(ProblemFamily):
    """Inputs and references of the family `attention`."""

    family: ClassVar[Family] = Family.ATTENTION

    def make_inputs(
        self, problem: Problem, *, dtype: torch.dtype, device: str, seed: int
    ) -> dict[str, Tensor]:
        """Draw q, k, v (B, L, H, P) from the normal distribution, drawn on the device."""
        generator = torch.Generator(device=device).manual_seed(seed)
        shape = (problem.batch, problem.length, problem.nheads, _headdim(problem))
        return {
            name: torch.randn(shape, generator=generator, dtype=dtype, device=device)
            for name in ("q", "k", "v")
        }

    def differentiable(self, problem: Problem) -> tuple[str, ...]:
        """Name all three inputs."""
        return ("q", "k", "v")

    def call(self, op: Callable[..., Any], problem: Problem, inputs: Inputs) -> Outputs:
        """Call `op(q, k, v)`."""
        return (op(inputs["q"], inputs["k"], inputs["v"]),)

    def sample(self, problem: Problem, *, seed: int) -> Sample:
        """Judge everything while it is cheap; else some heads, and some of their query rows."""
        batch, seqlen, nheads = problem.batch, problem.length, problem.nheads
        if batch * nheads * seqlen * seqlen // 2 <= _PAIRS:
            return Sample()
        rng = np.random.default_rng(seed)
        per_head = batch * _FEWEST_ROWS * seqlen // 2
        heads = choose_heads(nheads, max(1, min(4, _PAIRS // per_head)), rng)
        rows = choose_rows(seqlen, rows_within_budget(problem, len(heads)), rng)
        return Sample(heads=heads, rows=rows)

    def select_inputs(self, problem: Problem, inputs: Inputs, sample: Sample) -> dict[str, Tensor]:
        """Return the sampled heads of q, k, v or of their gradients; of q the sampled rows."""
        selected = {name: _select(tensor, 2, sample.heads) for name, tensor in inputs.items()}
        return {
            name: _select(tensor, 1, sample.rows) if name == "q" else tensor
            for name, tensor in selected.items()
        }

    def select_outputs(self, problem: Problem, outputs: Outputs, sample: Sample) -> Outputs:
        """Return the sampled heads and rows of the output (or of its gradient)."""
        return tuple(_select(_select(out, 2, sample.heads), 1, sample.rows) for out in outputs)

    def reference(self, problem: Problem, inputs: Inputs, sample: Sample) -> Outputs:
        """Compute attention by its definition, in the inputs' dtype, a block of rows at a time."""
        q, k, v = inputs["q"], inputs["k"], inputs["v"]
        return (attention_by_rows(q, k, v, sample.rows, _definition),)

    def independent(self, problem: Problem, inputs: Inputs, sample: Sample) -> Outputs:
        """Compute it in the inputs' dtype, rounding where a kernel on matrix units does.

        Products accumulate and the softmax runs in fp32 (or wider, as the inputs are). Rounded to
        the inputs' dtype: the probabilities before they multiply v and grad_out, the output, also
        where the backward subtracts its product with grad_out, grad_scores before they multiply k
        and q, and the three gradients.
        """
        q, k, v = inputs["q"], inputs["k"], inputs["v"]
        wide = torch.promote_types(q.dtype, torch.float32)
        attend = partial(_attend_rounding, dtype=q.dtype)
        out = attention_by_rows(q.to(wide), k.to(wide), v.to(wide), sample.rows, attend)
        return (out.to(q.dtype),)


def choose_heads(nheads: int, count: int, rng: np.random.Generator) -> tuple[int, ...]:
    """Draw `count` different heads, in order."""
    drawn = rng.choice(nheads, size=min(count, nheads), replace=False)
    return tuple(sorted(int(head) for head in drawn))


def rows_within_budget(problem: Problem, heads: int) -> int:
    """Return how many query rows of so many heads are judged."""
    return max(_FEWEST_ROWS, _PAIRS // (problem.batch * heads * max(problem.length // 2, 1)))


def choose_rows(seqlen: int, count: int, rng: np.random.Generator) -> tuple[int, ...]:
    """Choose `count` query positions: first, last, at tile borders, random."""
    if count >= seqlen:
        return tuple(range(seqlen))
    quarter = max(count // 4, 1)
    chosen = {*range(quarter // 2), *range(seqlen - quarter, seqlen)}
    borders = rng.permutation(np.arange(_TILE, seqlen, _TILE))[: max(quarter // 2, 1)]
    chosen.update(int(border) - side for border in borders for side in (0, 1))
    for row in rng.permutation(seqlen) if seqlen <= 2**20 else rng.integers(seqlen, size=4 * count):
        if len(chosen) >= count:
            break
        chosen.add(int(row))
    return tuple(sorted(chosen))


def attention_by_rows(
    q: Tensor, k: Tensor, v: Tensor, rows: tuple[int, ...] | None, attend: Callable[..., Tensor]
) -> Tensor:
    """Attend from a few query rows at a time, so that no (L, L) matrix is ever held.

    Args:
        q: (B, R, H, P), the queries at the positions `rows`.
        k, v: (B, L, H, P).
        rows: ascending positions of the queries; None: all, R = L.
        attend: `attend(q, k, v, hidden)` with (B, H, ., P) tensors and the mask of hidden pairs.

    Returns:
        (B, R, H, P) in q's dtype.
    """
    batch, count, nheads, _ = q.shape
    seqlen = k.shape[1]
    positions = torch.arange(seqlen, device=q.device)
    queries = positions if rows is None else positions[torch.tensor(rows, device=q.device)]
    last = range(seqlen) if rows is None else rows
    size = max(1, _BLOCK_BYTES // (q.element_size() * batch * nheads * seqlen))
    q, k, v = q.transpose(1, 2), k.transpose(1, 2), v.transpose(1, 2)
    blocks: list[Tensor] = []
    for start in range(0, count, size):
        stop = min(start + size, count)
        seen = last[stop - 1] + 1  # no key after the block's last query is needed
        hidden = positions[:seen] > queries[start:stop, None]
        blocks.append(attend(q[:, :, start:stop], k[:, :, :seen], v[:, :, :seen], hidden))
    return torch.cat(blocks, dim=2).transpose(1, 2)


def _definition(q: Tensor, k: Tensor, v: Tensor, hidden: Tensor) -> Tensor:
    scores = q @ k.mT * q.shape[-1] ** -0.5
    return scores.masked_fill(hidden, -torch.inf).softmax(-1) @ v


class _RoundingAttention(torch.autograd.Function):
    """Attention whose gradients are computed as the fused kernels compute them."""

    if TYPE_CHECKING:  # torch's own has no types

        @classmethod
        def apply(cls, *args: Any, **kwargs: Any) -> Tensor: ...

    @staticmethod
    def forward(
        ctx: Any, q: Tensor, k: Tensor, v: Tensor, hidden: Tensor, dtype: torch.dtype
    ) -> Tensor:
        scores = (q @ k.mT) * q.shape[-1] ** -0.5
        probabilities = scores.masked_fill(hidden, -torch.inf).softmax(-1)
        out = _round(probabilities, dtype=dtype) @ v
        ctx.save_for_backward(q, k, v, probabilities, out)
        ctx.dtype = dtype
        return out

    @staticmethod
    def backward(ctx: Any, *grad_outputs: Tensor) -> Any:
        return _rounding_gradients(ctx, *grad_outputs)


@once_differentiable
def _rounding_gradients(ctx: Any, grad_out: Tensor) -> tuple[Tensor, Tensor, Tensor, None, None]:
    q, k, v, probabilities, out = ctx.saved_tensors
    # Kernels know the output as it was stored, rounded: in the first rows, where few keys share
    # the weight, that is most of the error of grad_scores.
    delta = (grad_out * _round(out, dtype=ctx.dtype)).sum(-1, keepdim=True)
    grad_scores = _round(probabilities * (grad_out @ v.mT - delta), dtype=ctx.dtype)
    scale = q.shape[-1] ** -0.5
    grad_v = _round(probabilities, dtype=ctx.dtype).mT @ grad_out
    return grad_scores @ k * scale, grad_scores.mT @ q * scale, grad_v, None, None


def _attend_rounding(
    q: Tensor, k: Tensor, v: Tensor, hidden: Tensor, *, dtype: torch.dtype
) -> Tensor:
    return _RoundingAttention.apply(q, k, v, hidden, dtype)


def _round(tensor: Tensor, *, dtype: torch.dtype) -> Tensor:
    return tensor.to(dtype).to(tensor.dtype)


def _select(tensor: Tensor, dim: int, indices: tuple[int, ...] | None) -> Tensor:
    if indices is None:
        return tensor
    return tensor.index_select(dim, torch.tensor(indices, device=tensor.device))


def _headdim(problem: Problem) -> int:
    if problem.headdim is None:
        raise ValueError("attention needs a headdim")
    return problem.headdim
