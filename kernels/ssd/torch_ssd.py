"""State-space duality (Mamba-2) in torch products, chunk after chunk, with a frugal backward.

For every batch element and head, with dt after bias, softplus and limits:

    state_t = exp(dt_t A) state_{t-1} + dt_t x_t B_t^T          (P, N)
    y_t     = state_t C_t + D x_t
    out_t   = y_t silu(z_t)

One chunk of Q tokens is a handful of batched products over all batch elements and heads: scores
C B^T once per group; the scores, weighted by the decay between their tokens, times x; C times the
entering state and B^T x into it, each as one product per group that shares B and C among its heads.
Only one chunk's (H, Q, Q) weights exist at a time. fp16 and bf16 inputs are computed in fp32, fp64
in fp64. The backward walks the chunks in reverse; the forward keeps every `KEEP`-th chunk's
entering state and the backward recomputes those between, so that no state per chunk is held.

States are laid out (B, G, N, H/G * P) inside, so that products over a group are plain ones. Any
device, any seqlen. Source: section 6 of "Transformers are SSMs" (2024); the gradients are those
derived in triton_ssd_backward.py.
"""

import math
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
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
from mambench.kernels.ssd.arguments import SSD_TENSORS, check_arguments, check_dtype
from mambench.kernels.ssd.torch_config import KEEP, LARGEST_CHUNK
from mambench.kernels.ssd.varlen import sequence_numbers

DTYPES = (torch.float64, torch.float32, torch.float16, torch.bfloat16)
# Of a step: a decay of 2 ** -126 is none, and a lower sum would round away what later steps add.
_LEAST_LOG_DECAY = -126 * math.log(2)


@dataclass(frozen=True, kw_only=True)
class _Sizes:
    """Shapes and options of one call."""

    batch: int
    seqlen: int
    nheads: int
    headdim: int
    ngroups: int
    d_state: int
    chunk: int
    dt_softplus: bool
    dt_limit: tuple[float, float]
    dtype: torch.dtype  # of the arithmetic

    def chunks(self) -> list[slice]:
        """Return the tokens of every chunk, the last one possibly shorter."""
        starts = range(0, self.seqlen, self.chunk)
        return [slice(start, min(start + self.chunk, self.seqlen)) for start in starts]


def _flat_state(states: Tensor, s: _Sizes) -> Tensor:
    """(B, H, P, N) to (B, G, N, H/G * P)."""
    grouped = states.to(s.dtype).view(s.batch, s.ngroups, -1, s.headdim, s.d_state)
    return grouped.permute(0, 1, 4, 2, 3).reshape(s.batch, s.ngroups, s.d_state, -1)


def _interface_state(flat: Tensor, s: _Sizes) -> Tensor:
    """(B, G, N, H/G * P) to (B, H, P, N)."""
    shape = (s.batch, s.ngroups, s.d_state, s.nheads // s.ngroups, s.headdim)
    states = flat.view(shape).permute(0, 1, 3, 4, 2)
    return states.reshape(s.batch, s.nheads, s.headdim, s.d_state)


def _heads_first(x: Tensor, s: _Sizes) -> Tensor:
    """(B, q, H, P) to (B, H, q, P), contiguous, in the arithmetic's dtype."""
    return x.transpose(1, 2).to(s.dtype).contiguous()


def _by_group(x: Tensor, s: _Sizes) -> Tensor:
    """(B, H, q, P) to (B, G, q, H/G * P), contiguous."""
    q = x.shape[2]
    grouped = x.view(s.batch, s.ngroups, -1, q, s.headdim).transpose(2, 3)
    return grouped.reshape(s.batch, s.ngroups, q, -1)


def _by_head(x: Tensor, s: _Sizes) -> Tensor:
    """(B, G, q, H/G * P) to (B, H, q, P), contiguous."""
    q = x.shape[2]
    grouped = x.view(s.batch, s.ngroups, q, -1, s.headdim).transpose(2, 3)
    return grouped.reshape(s.batch, s.nheads, q, s.headdim)


def _decay_rows(log_decay: Tensor, s: _Sizes) -> Tensor:
    """(B, H) log-decay to a factor of a flat state: (B, G, 1, H/G * P)."""
    factor = log_decay.exp().view(s.batch, s.ngroups, 1, -1, 1)
    return factor.expand(-1, -1, -1, -1, s.headdim).reshape(s.batch, s.ngroups, 1, -1)


class _Chunk:
    """What both passes need of one chunk: B, C, their scores, decays and dt.

    Where `seq` (B, L) numbers the tokens' sequences, decays between two sequences are zero.
    """

    def __init__(
        self,
        s: _Sizes,
        t: slice,
        B: Tensor,
        C: Tensor,
        dt: Tensor,
        A: Tensor,
        seq: Tensor | None,
    ) -> None:
        self.B = B[:, t].transpose(1, 2).to(s.dtype).contiguous()  # (B, G, q, N)
        self.C = C[:, t].transpose(1, 2).to(s.dtype).contiguous()
        self.dt = dt[:, t].transpose(1, 2).contiguous()  # (B, H, q)
        log_decay = (self.dt * A[:, None]).clamp(min=_LEAST_LOG_DECAY)
        self.cum = log_decay.cumsum(2)  # (B, H, q)
        self.total = self.cum[:, :, -1]  # (B, H)
        self.to_end = (self.total[:, :, None] - self.cum).exp()
        self.into = self.cum.exp()
        self.apart: Tensor | None = None  # (B, 1, q, q), tokens of different sequences
        if seq is not None:
            own, before = seq[:, None, t], seq[:, None, max(t.start - 1, 0)]
            self.apart = own[..., :, None] != own[..., None, :]
            self.to_end = self.to_end.masked_fill(own != own[..., -1:], 0.0)
            self.into = self.into.masked_fill(own != before[..., None], 0.0)
            self.total = self.total.masked_fill(before != own[..., -1], -math.inf)

    def scores(self, s: _Sizes) -> Tensor:
        """C_i . B_j, (B, G, 1, q, q)."""
        return (self.C @ self.B.transpose(2, 3))[:, :, None]

    def decay(self) -> Tensor:
        """exp(cum_i - cum_j) for j <= i, else 0: (B, H, q, q); masked before the exponential."""
        gap = self.cum[:, :, :, None] - self.cum[:, :, None, :]
        q = gap.shape[-1]
        future = torch.ones(q, q, dtype=torch.bool, device=gap.device).triu_(1)
        gap.masked_fill_(future, -math.inf)
        if self.apart is not None:
            gap.masked_fill_(self.apart, -math.inf)
        return gap.exp_()

    def sum_after(self, values: Tensor) -> Tensor:
        """Sum (B, H, q) over the tokens of the sequence from each one on."""
        if self.apart is None:
            return values.flip(2).cumsum(2).flip(2)
        # A sum for each token: differences of sums would mix in other sequences' rounding.
        q = values.shape[2]
        earlier = torch.ones(q, q, dtype=torch.bool, device=values.device).tril_(-1)
        rows = values[:, :, None, :].expand(-1, -1, q, -1)
        return rows.masked_fill(self.apart | earlier, 0.0).sum(3)

    def next_state(self, s: _Sizes, state: Tensor, x: Tensor) -> Tensor:
        """Return the state that leaves the chunk; x is (B, H, q, P)."""
        weighted = _by_group(x * (self.dt * self.to_end)[..., None], s)
        return torch.addcmul(self.B.transpose(2, 3) @ weighted, state, _decay_rows(self.total, s))

    def output(self, s: _Sizes, state: Tensor, x: Tensor) -> Tensor:
        """Return y without the skip, (B, H, q, P)."""
        weights = self.decay().mul_(self.dt[:, :, None, :])
        q = weights.shape[-1]
        grouped = weights.view(s.batch, s.ngroups, -1, q, q)
        grouped *= self.scores(s)
        y = _by_head(self.C @ state, s).mul_(self.into[..., None])
        return y.add_(weights @ x)


def _discretise(s: _Sizes, dt: Tensor, dt_bias: Tensor | None) -> tuple[Tensor, Tensor]:
    """Return dt before softplus and after softplus and limits, (B, L, H)."""
    raw = dt.to(s.dtype)
    if dt_bias is not None:
        raw = raw + dt_bias.to(s.dtype)
    return raw, (F.softplus(raw) if s.dt_softplus else raw).clamp(*s.dt_limit)


def _skip(D: Tensor | None, s: _Sizes) -> Tensor | None:
    """Return D as a factor of (B, H, q, P)."""
    return None if D is None else D.to(s.dtype).view(s.nheads, 1, -1)


def _forward(s: _Sizes, tensors: Tensors, *, keep: bool) -> Results:
    """Return out, the final states and, if wanted, every `KEEP`-th chunk's entering state."""
    x, dt_raw, A, B, C, D, z, dt_bias, initial, seq = tensors
    _, dt = _discretise(s, dt_raw, dt_bias)
    A, skip = A.to(s.dtype), _skip(D, s)
    out, final, kept = _empty_results(s, x, keep=keep)
    state = _entering(s, x, initial)
    for index, t in enumerate(s.chunks()):
        if keep and index % KEEP == 0:
            kept[index // KEEP] = state
        chunk = _Chunk(s, t, B, C, dt, A, seq)
        x_chunk = _heads_first(x[:, t], s)
        y = chunk.output(s, state, x_chunk)
        if skip is not None:
            y.addcmul_(x_chunk, skip)
        if z is not None:
            y *= F.silu(_heads_first(z[:, t], s))
        out[:, t] = y.transpose(1, 2)
        state = chunk.next_state(s, state, x_chunk)
    return out, final.copy_(_interface_state(state, s)), kept


def _empty_results(s: _Sizes, x: Tensor, *, keep: bool) -> Results:
    """Allocate out, the final states (fp32 or fp64) and the kept ones, or nothing for those."""
    chunks = (s.seqlen + s.chunk - 1) // s.chunk
    columns = s.nheads // s.ngroups * s.headdim
    shape = ((chunks + KEEP - 1) // KEEP, s.batch, s.ngroups, s.d_state, columns)
    options: dict[str, Any] = {"dtype": s.dtype, "device": x.device}
    out = torch.empty(x.shape, dtype=x.dtype, device=x.device)
    final = torch.empty((s.batch, s.nheads, s.headdim, s.d_state), **options)
    return out, final, torch.empty(shape if keep else (0,), **options)


def _entering(s: _Sizes, x: Tensor, initial: Tensor | None) -> Tensor:
    """Return the state before the first token, flat."""
    if initial is not None:
        return _flat_state(initial, s)
    columns = s.nheads // s.ngroups * s.headdim
    return torch.zeros(s.batch, s.ngroups, s.d_state, columns, dtype=s.dtype, device=x.device)


class _Gradients:
    """Accumulates the gradients of all inputs while the chunks are walked in reverse."""

    def __init__(self, s: _Sizes, tensors: Tensors, dout: Tensor) -> None:
        self.s = s
        self.x, dt_raw, A, self.B, self.C, self.D, self.z, self.dt_bias, _, self.seq = tensors
        self.raw, self.dt = _discretise(s, dt_raw, self.dt_bias)
        self.A, self.skip, self.dout = A.to(s.dtype), _skip(self.D, s), dout
        self.grad_x = torch.empty(self.x.shape, dtype=self.x.dtype, device=self.x.device)
        self.grad_z = None if self.z is None else torch.empty_like(self.grad_x)
        self.grad_B = torch.empty(self.B.shape, dtype=self.B.dtype, device=self.x.device)
        self.grad_C = torch.empty_like(self.grad_B)
        self.grad_dt = torch.empty_like(self.dt)
        self.grad_A = torch.zeros_like(self.A)
        self.grad_D = None if self.skip is None else torch.zeros_like(self.skip)

    def chunk(self, t: slice) -> _Chunk:
        """Return the chunk of these tokens."""
        return _Chunk(self.s, t, self.B, self.C, self.dt, self.A, self.seq)

    def step(self, t: slice, state: Tensor, grad_state: Tensor) -> Tensor:
        """Take one chunk: `state` enters it; return its gradient, given that of what leaves."""
        s = self.s
        chunk = self.chunk(t)
        x = _heads_first(self.x[:, t], s)
        grad_y = self._ungate(t, chunk, state, x)
        if self.grad_D is not None:
            skip_gradient = (grad_y * x).sum((0, 2))[:, None]
            self.grad_D += skip_gradient.sum_to_size(self.grad_D.shape)
        into = chunk.into[..., None]  # (B, H, q, 1)
        from_end = chunk.to_end[..., None]

        decay, scores = chunk.decay(), chunk.scores(s)
        q = decay.shape[-1]
        grouped = (s.batch, s.ngroups, -1, q, q)
        product = (grad_y @ x.transpose(2, 3)).mul_(decay)  # [i, j]: grad_y_i . x_j
        grad_scores = (product * chunk.dt[:, :, None, :]).view(grouped).sum(2)
        product.view(grouped).mul_(scores)
        decay.view(grouped).mul_(scores)
        read = product.sum(2)  # grad_u_j . x_j within the chunk
        written = torch.matmul(product, chunk.dt[..., None])[..., 0]

        to_state = _by_head(chunk.B @ grad_state, s).mul_(from_end)
        kept = (to_state * x).sum(3)  # grad_u_j . x_j through the state
        grad_u = to_state.add_(decay.transpose(2, 3) @ grad_y)
        grad_x = grad_u * chunk.dt[..., None]
        if self.skip is not None:
            grad_x.addcmul_(grad_y, self.skip)
        self.grad_x[:, t] = grad_x.transpose(1, 2)

        gated_in = _by_group(grad_y * into, s)
        weighted = _by_group(x * (chunk.dt[..., None] * from_end), s)
        outgoing = (_by_head(chunk.C @ state, s) * grad_y).sum(3) * into[..., 0]
        grad_C = grad_scores @ chunk.B + gated_in @ state.transpose(2, 3)
        grad_B = grad_scores.transpose(2, 3) @ chunk.C + weighted @ grad_state.transpose(2, 3)
        self.grad_C[:, t] = grad_C.transpose(1, 2)
        self.grad_B[:, t] = grad_B.transpose(1, 2)

        rows = _decay_rows(chunk.total, s)
        decayed = grad_state * rows
        passed = (decayed * state).sum(2).view(s.batch, s.nheads, s.headdim).sum(2)
        after = chunk.sum_after(outgoing + written - read * chunk.dt)
        before = (kept * chunk.dt).cumsum(2) - kept * chunk.dt
        grad_a = after + before + passed[:, :, None]
        grad_a *= chunk.dt * self.A[:, None] > _LEAST_LOG_DECAY  # else the decay is constant, 0
        self.grad_A += (grad_a * chunk.dt).sum((0, 2))
        self.grad_dt[:, t] = (grad_a * self.A[:, None] + read + kept).transpose(1, 2)
        return decayed.add_(chunk.C.transpose(2, 3) @ gated_in)

    def _ungate(self, t: slice, chunk: _Chunk, state: Tensor, x: Tensor) -> Tensor:
        """Return the gradient of y before the gate, (B, H, q, P); stores the gate's gradient."""
        s = self.s
        dout = _heads_first(self.dout[:, t], s)
        if self.z is None or self.grad_z is None:
            return dout
        y = chunk.output(s, state, x)
        if self.skip is not None:
            y.addcmul_(x, self.skip)
        z = _heads_first(self.z[:, t], s)
        gate = z.sigmoid()
        grad_z = dout * y * gate * (1 + z * (1 - gate))
        self.grad_z[:, t] = grad_z.transpose(1, 2)
        return dout * z * gate

    def finish(self, grad_initial: Tensor) -> tuple[Tensor | None, ...]:
        """Return the gradients in the order of the inputs, before they are cast to their dtypes."""
        s = self.s
        grad_dt = self.grad_dt
        free = F.softplus(self.raw) if s.dt_softplus else self.raw
        lowest, highest = s.dt_limit
        grad_dt = grad_dt * ((free >= lowest) & (free <= highest))
        if s.dt_softplus:
            grad_dt = grad_dt * self.raw.sigmoid()
        grad_bias = None if self.dt_bias is None else grad_dt.sum((0, 1))
        grad_D = None
        if self.D is not None and self.grad_D is not None:
            grad_D = self.grad_D.reshape(self.D.shape)
        return (
            self.grad_x, grad_dt, self.grad_A, self.grad_B, self.grad_C,
            grad_D, self.grad_z, grad_bias, grad_initial,
        )  # fmt: skip


def _backward(
    s: _Sizes,
    tensors: Tensors,
    kept: Tensor,
    dout: Tensor | None,
    dfinal: Tensor | None,
) -> tuple[Tensor | None, ...]:
    """Return the gradients in the order of the inputs."""
    x = tensors[0]
    dout = torch.zeros_like(x) if dout is None else dout
    grad_state = torch.zeros_like(kept[0]) if dfinal is None else _flat_state(dfinal, s)
    gradients = _Gradients(s, tensors, dout)
    chunks = s.chunks()
    for first in reversed(range(0, len(chunks), KEEP)):
        run = chunks[first : first + KEEP]
        states = [kept[first // KEEP]]
        for t in run[:-1]:
            state = gradients.chunk(t).next_state(s, states[-1], _heads_first(x[:, t], s))
            states.append(state)
        for t in reversed(run):
            grad_state = gradients.step(t, states.pop(), grad_state)
    return gradients.finish(_interface_state(grad_state, s))


class _Ssd(torch.autograd.Function):
    """Saves the inputs and every `KEEP`-th chunk's entering state."""

    @staticmethod
    def forward(ctx: Any, s: _Sizes, *tensors: Tensor | None) -> Any:
        out, final, kept = _forward(s, tensors, keep=True)
        ctx.s = s
        ctx.save_for_backward(kept, *tensors)
        ctx.set_materialize_grads(False)
        return out, final

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dout: Tensor | None, dfinal: Tensor | None) -> Any:
        kept, *tensors = ctx.saved_tensors
        gradients = (*_backward(ctx.s, tuple(tensors), kept, dout, dfinal), None)
        cast = (
            gradient.to(tensor.dtype) if gradient is not None and wanted else None
            for tensor, gradient, wanted in zip(
                tensors, gradients, ctx.needs_input_grad[1:], strict=True
            )
        )
        return None, *cast


def ssd(
    x: Tensor,
    dt: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    chunk_size: int,
    D: Tensor | None = None,
    z: Tensor | None = None,
    dt_bias: Tensor | None = None,
    initial_states: Tensor | None = None,
    dt_softplus: bool = False,
    dt_limit: tuple[float, float] = (0.0, math.inf),
    return_final_states: bool = False,
    *,
    seq_idx: Tensor | None = None,
    cu_seqlens: Tensor | None = None,
) -> Tensor | tuple[Tensor, Tensor]:
    """Compute the SSD operation in torch products; semantics of mamba_chunk_scan_combined.

    Args:
        x: (B, L, H, P), fp64, fp32, fp16 or bf16.
        dt: (B, L, H), any floating dtype.
        A: (H,), not positive.
        B: (B, L, G, N), dtype of x.
        C: (B, L, G, N), dtype of x.
        chunk_size: tokens per chunk, at most `LARGEST_CHUNK`; results do not depend on it.
        D: (H,) or (H, P).
        z: (B, L, H, P), dtype of x.
        dt_bias: (H,).
        initial_states: (B, H, P, N); enter the first sequence of each row.
        dt_softplus: whether dt goes through softplus, after the bias.
        dt_limit: range that dt is clamped to, last.
        return_final_states: whether to return the final states too, of each row's last sequence.
        seq_idx: (B, L), integers: a new sequence, whose state is zero, begins where they change.
        cu_seqlens: (sequences + 1,), integers, for B = 1: where sequences begin and end, instead.

    Returns:
        out (B, L, H, P) in x's dtype, or (out, final_states (B, H, P, N)); the states are fp32, for
        fp64 inputs fp64. Differentiable once in every floating-point tensor.

    Raises:
        ValueError: an argument has a wrong shape, dtype or device.
    """
    check_dtype(x, DTYPES)
    check_arguments(x, dt, A, B, C, D, z, dt_bias, initial_states, dt_limit)
    if chunk_size < 1:
        raise ValueError(f"chunk_size is at least 1, got {chunk_size}")
    traced = is_traced()
    seq = sequence_numbers(x, seq_idx, cu_seqlens, check=not traced)
    tensors = (x, dt, A, B, C, D, z, dt_bias, initial_states, seq)
    options = (min(chunk_size, LARGEST_CHUNK), dt_softplus, *dt_limit)
    if traced:
        out, final = _traced(tensors, options)
    elif needs_gradient(tensors):
        out, final = _Ssd.apply(_sizes(tensors, options), *tensors)
    else:
        out, final, _ = _forward(_sizes(tensors, options), tensors, keep=False)
    return (out, final) if return_final_states else out


def _sizes(tensors: Tensors, options: Options) -> _Sizes:
    x, _, _, B, *_ = tensors
    chunk, dt_softplus, lowest, highest = options
    batch, seqlen, nheads, headdim = x.shape
    return _Sizes(
        batch=batch,
        seqlen=seqlen,
        nheads=nheads,
        headdim=headdim,
        ngroups=B.shape[2],
        d_state=B.shape[3],
        chunk=chunk,
        dt_softplus=dt_softplus,
        dt_limit=(lowest, highest),
        dtype=torch.float64 if x.dtype is torch.float64 else torch.float32,
    )


def _traced_backward(
    dout: Tensor | None, dfinal: Tensor | None, kept: Tensor, tensors: Tensors, options: Options
) -> list[Tensor]:
    gradients = _backward(_sizes(tensors, options), tensors, kept, dout, dfinal)
    return [
        gradient.to(tensor.dtype)
        for tensor, gradient in zip(tensors, (*gradients, None), strict=True)
        if tensor is not None and gradient is not None
    ]


_traced = register(
    Operation(
        name="ssd_torch",
        tensors=SSD_TENSORS,
        options=("SymInt chunk", "bool dt_softplus", "float dt_lowest", "float dt_highest"),
        forward=lambda tensors, options, keep: _forward(
            _sizes(tensors, options), tensors, keep=keep
        ),
        shapes=lambda tensors, options, keep: _empty_results(
            _sizes(tensors, options), tensors[0], keep=keep
        ),
        backward=_traced_backward,
    )
)
