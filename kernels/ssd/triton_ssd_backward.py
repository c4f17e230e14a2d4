"""Gradients of the SSD operation in Triton, deterministic: no atomics anywhere.

With u = dt x, grad_y the gradient before the gate, S_c the state that enters chunk c, G_c the
gradient of the state that leaves it, and in a chunk w_ij = exp(cum_i - cum_j) for i >= j:

    grad_u_j = sum_i w_ij (C_i . B_j) grad_y_i + exp(total - cum_j) G B_j
    grad_B_j = sum over heads: sum_i w_ij (grad_y_i . u_j) C_i + exp(total - cum_j) G^T u_j
    grad_C_i = sum over heads: sum_j w_ij (grad_y_i . u_j) B_j + exp(cum_i) S^T grad_y_i

The log-decay a_t of token t takes part in everything that passes from before t to t or after it:

    grad_a_t = sum over i >= t > j of w_ij (C_i . B_j) (grad_y_i . u_j)      within the chunk
             + sum over i >= t of v_i,  v_i = exp(cum_i) grad_y_i . (S C_i)  state to outputs
             + sum over j < t of e_j,   e_j = exp(total - cum_j) u_j . (G B_j)  inputs to state
             + exp(total) <G, S>                                             state to state

so no sum runs longer than a chunk and nothing large cancels. Launches:

    dt_kernel               dt and its log-decay's running sum
    state_kernel            S of every chunk, from what entered the segments
    grad_c_kernel           grad_C from S, v, grad_z
    state_kernel, prefix    gradient of the state that leaves each segment  (several segments only)
    state_kernel            <G, S> of every chunk, and G in the place of S
    grad_b_kernel           grad_x, grad_dt, grad_B, the rest of grad_C, sums of grad_A, grad_D
    sum_kernel              grad_B and grad_C over blocks of heads          (several blocks only)

Without a gate, where one tile has room for all channels of a head, two other kernels take the place
of the last two (`triton_whole`); and on Hopper, where TMA can read the tensors, others yet that of
all that move the most (`hopper_grad`).

The gradient kernels take one chunk and a block of heads of one group: B and C are read once for the
block (their product is computed again for every head: cheaper than the registers to keep it), and
grad_B and grad_C leave the chip summed over it. The part of both that stays in the chunk needs only
a [Q, Q] tile, summed over heads.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from mambench.kernels.prepared import Calls, Recording, as_given
from mambench.kernels.ssd import triton_parts as parts
from mambench.kernels.ssd.triton_config import heads_per_program
from mambench.kernels.ssd.triton_launch import (
    Launch,
    Operands,
    multiprocessors,
    run_dt,
    segment_entries,
    strides3,
    unit_last,
)
from mambench.kernels.ssd.triton_sums import column_sums
from mambench.kernels.ssd.triton_whole import fetching, run_whole

_SUM_BLOCK = 1024
_SIZES = ["seqlen", "nchunks", "heads_per_group", "block_heads"]


@triton.jit(do_not_specialize=_SIZES)
def grad_c_kernel(
    x_ptr, z_ptr, B_ptr, C_ptr, D_ptr, dout_ptr, cum_ptr, cumj_ptr, seq_ptr, states_ptr,
    grad_C_ptr, v_ptr, grad_z_ptr,
    seqlen, nchunks, nheads: tl.constexpr, heads_per_group, block_heads, ngroups: tl.constexpr,
    stride_x_batch, stride_x_token: tl.constexpr, stride_x_head,
    stride_z_batch, stride_z_token: tl.constexpr, stride_z_head,
    stride_B_batch, stride_B_token: tl.constexpr, stride_B_group,
    stride_C_batch, stride_C_token: tl.constexpr, stride_C_group,
    stride_dout_batch, stride_dout_token: tl.constexpr, stride_dout_head,
    P: tl.constexpr, N: tl.constexpr, Q: tl.constexpr,
    BLOCK_P: tl.constexpr, P_BLOCKS: tl.constexpr, BLOCK_N: tl.constexpr,
    D_DIMS: tl.constexpr, HAS_Z: tl.constexpr, HAS_SEQ: tl.constexpr, PRECISION: tl.constexpr,
    STAGES: tl.constexpr,
):  # fmt: skip
    """One chunk, a block of heads of one group: what the entering states S contribute.

    Stores the block's sum of exp(cum) S^T grad_y as (blocks, B, L, G, N) fp32; v per head; grad_z.
    """
    chunk = tl.program_id(0)
    group, block, first_head, count = parts.head_block(heads_per_group, block_heads)
    b = tl.program_id(2).to(tl.int64)
    q = tl.arange(0, Q)
    n = tl.arange(0, BLOCK_N)
    t0 = (chunk * Q).to(tl.int64)
    rows = chunk * Q + q < seqlen
    mask_n = parts.column_mask(rows, n, N, BLOCK_N)
    C_ptr += b * stride_C_batch + t0 * stride_C_token + group.to(tl.int64) * stride_C_group
    C = tl.load(C_ptr + q[:, None] * stride_C_token + n[None, :], mask=mask_n, other=0.0)
    grad_C = tl.zeros([Q, BLOCK_N], dtype=tl.float32)
    if HAS_Z:
        B_ptr += b * stride_B_batch + t0 * stride_B_token + group.to(tl.int64) * stride_B_group
        B = tl.load(B_ptr + q[:, None] * stride_B_token + n[None, :], mask=mask_n, other=0.0)
        causal = q[:, None] >= q[None, :]
    if HAS_SEQ:
        seq, sees, _, _ = parts.sequence_masks(seq_ptr + b * seqlen, chunk * Q, q, rows, seqlen, Q)
        if HAS_Z:
            causal = causal & (seq[:, None] == seq[None, :])
    for k in tl.range(0, count, num_stages=STAGES, disable_licm=True):
        h = (first_head + k).to(tl.int64)
        head = b * nheads + h
        token = head * nchunks * Q + t0
        cum = tl.load(cum_ptr + token + q)
        if HAS_Z:
            cumj = tl.load(cumj_ptr + token + q)
            scores = tl.dot(C, tl.trans(B), input_precision=PRECISION)
            gap = tl.where(causal, cum[:, None] - cumj[None, :], float("-inf"))
            weights = (scores * tl.exp2(gap)).to(C.dtype)
        slot = (head * nchunks + chunk) * P * N
        row_x = b * stride_x_batch + t0 * stride_x_token + h * stride_x_head
        row_z = b * stride_z_batch + t0 * stride_z_token + h * stride_z_head
        row_dout = b * stride_dout_batch + t0 * stride_dout_token + h * stride_dout_head
        row_out = ((b * seqlen + t0) * nheads + h) * P
        v = tl.zeros([Q], dtype=tl.float32)
        for block_p in tl.range(0, P_BLOCKS):
            p = block_p * BLOCK_P + tl.arange(0, BLOCK_P)
            mask_p = parts.column_mask(rows, p, P, BLOCK_P * P_BLOCKS)
            tile = slot + parts.state_offsets(n, p, N)
            tile_mask = parts.state_mask(n, p, P, N)
            state = tl.load(states_ptr + tile, mask=tile_mask, other=0.0)
            y = tl.dot(C, state, input_precision=PRECISION)
            into = tl.exp2(cum)
            if HAS_SEQ:
                into = tl.where(sees, into, 0.0)
            y *= into[:, None]
            tile_dout = row_dout + q[:, None] * stride_dout_token + p[None, :]
            grad_y = tl.load(dout_ptr + tile_dout, mask=mask_p, other=0.0).to(tl.float32)
            if HAS_Z:
                tile_z = row_z + q[:, None] * stride_z_token + p[None, :]
                z = tl.load(z_ptr + tile_z, mask=mask_p, other=0.0).to(tl.float32)
                gate = parts.sigmoid(z)
                slope = grad_y * gate * (1.0 + z * (1.0 - gate))
                grad_y *= z * gate
            v += tl.sum(grad_y * y, 1)
            if HAS_Z:
                tile_x = row_x + q[:, None] * stride_x_token + p[None, :]
                x = tl.load(x_ptr + tile_x, mask=mask_p, other=0.0)
                if D_DIMS == 1:
                    y += x.to(tl.float32) * tl.load(D_ptr + h).to(tl.float32)
                elif D_DIMS == 2:
                    skip = tl.load(D_ptr + h * P + p, mask=p < P, other=0.0).to(tl.float32)
                    y += x.to(tl.float32) * skip[None, :]
                y = tl.dot(weights, x, acc=y, input_precision=PRECISION)
                tile_out = row_out + q[:, None] * (nheads * P) + p[None, :]
                grad_z = (slope * y).to(grad_z_ptr.dtype.element_ty)
                tl.store(grad_z_ptr + tile_out, grad_z, mask=mask_p)
            weighted = (grad_y * into[:, None]).to(C.dtype)
            grad_C = tl.dot(weighted, tl.trans(state), acc=grad_C, input_precision=PRECISION)
        tl.store(v_ptr + token + q, v)
    row = ((block * tl.num_programs(2) + b) * seqlen + t0) * ngroups + group
    out = grad_C_ptr + row * N + q[:, None] * (ngroups * N) + n[None, :]
    tl.store(out, grad_C, mask=mask_n)


@triton.jit(do_not_specialize=[*_SIZES, "dt_min", "dt_max"])
def grad_b_kernel(
    x_ptr, z_ptr, B_ptr, C_ptr, D_ptr, A_ptr, dt_raw_ptr, bias_ptr,
    dout_ptr, cum_ptr, dt_ptr, seq_ptr, v_ptr, passed_ptr, grad_states_ptr, partial_C_ptr,
    grad_x_ptr, grad_dt_ptr, grad_B_ptr, grad_C_ptr, partial_heads_ptr, partial_D_ptr,
    seqlen, nchunks, nheads: tl.constexpr, heads_per_group, block_heads, ngroups: tl.constexpr,
    dt_min, dt_max,
    stride_x_batch, stride_x_token: tl.constexpr, stride_x_head,
    stride_z_batch, stride_z_token: tl.constexpr, stride_z_head,
    stride_B_batch, stride_B_token: tl.constexpr, stride_B_group,
    stride_C_batch, stride_C_token: tl.constexpr, stride_C_group,
    stride_dt_batch, stride_dt_token, stride_dt_head,
    stride_dout_batch, stride_dout_token: tl.constexpr, stride_dout_head,
    P: tl.constexpr, N: tl.constexpr, Q: tl.constexpr,
    BLOCK_P: tl.constexpr, P_BLOCKS: tl.constexpr, BLOCK_N: tl.constexpr,
    D_DIMS: tl.constexpr, HAS_Z: tl.constexpr, HAS_SEQ: tl.constexpr, HAS_BIAS: tl.constexpr,
    SOFTPLUS: tl.constexpr, PRECISION: tl.constexpr, STAGES: tl.constexpr,
    PASSED: tl.constexpr,
):  # fmt: skip
    """One chunk, a block of heads of one group: all gradients that are not of the gate.

    [j, i] tiles have the token that is read (j) in rows and the one that is written (i) in columns.
    partial_heads is (B * chunks, 3, H) fp32: grad_A, grad_dt_bias and grad_D of the chunk. What the
    chunk's last token adds to every token's grad_a is exp(total) <G, S>, of PASSED parts.
    """
    chunk = tl.program_id(0)
    group, block, first_head, count = parts.head_block(heads_per_group, block_heads)
    b = tl.program_id(2).to(tl.int64)
    q = tl.arange(0, Q)
    n = tl.arange(0, BLOCK_N)
    t0 = (chunk * Q).to(tl.int64)
    rows = chunk * Q + q < seqlen
    mask_n = parts.column_mask(rows, n, N, BLOCK_N)
    B_ptr += b * stride_B_batch + t0 * stride_B_token + group.to(tl.int64) * stride_B_group
    C_ptr += b * stride_C_batch + t0 * stride_C_token + group.to(tl.int64) * stride_C_group
    B = tl.load(B_ptr + q[:, None] * stride_B_token + n[None, :], mask=mask_n, other=0.0)
    C = tl.load(C_ptr + q[:, None] * stride_C_token + n[None, :], mask=mask_n, other=0.0)
    grad_scores = tl.zeros([Q, Q], dtype=tl.float32)  # [j, i], summed over the heads
    causal = q[:, None] <= q[None, :]
    if HAS_SEQ:
        seq, _, seen, whole = parts.sequence_masks(
            seq_ptr + b * seqlen, chunk * Q, q, rows, seqlen, Q
        )
        causal = causal & (seq[:, None] == seq[None, :])
    for k in tl.range(0, count, num_stages=STAGES, disable_licm=True):
        h = (first_head + k).to(tl.int64)
        head = b * nheads + h
        token = head * nchunks * Q + t0
        cum = tl.load(cum_ptr + token + q)
        total = tl.load(cum_ptr + token + Q - 1)
        dt = tl.load(dt_ptr + token + q)
        slot = (head * nchunks + chunk) * P * N
        row_x = b * stride_x_batch + t0 * stride_x_token + h * stride_x_head
        row_z = b * stride_z_batch + t0 * stride_z_token + h * stride_z_head
        row_dout = b * stride_dout_batch + t0 * stride_dout_token + h * stride_dout_head
        row_out = ((b * seqlen + t0) * nheads + h) * P

        product = tl.zeros([Q, Q], dtype=tl.float32)  # [j, i]: x_j . grad_y_i
        for block_p in tl.range(0, P_BLOCKS):
            p = block_p * BLOCK_P + tl.arange(0, BLOCK_P)
            mask_p = parts.column_mask(rows, p, P, BLOCK_P * P_BLOCKS)
            tile_x = row_x + q[:, None] * stride_x_token + p[None, :]
            x = tl.load(x_ptr + tile_x, mask=mask_p, other=0.0)
            grad_yf = parts.load_gated(
                dout_ptr, z_ptr, row_dout, row_z, q, p,
                stride_dout_token, stride_z_token, mask_p, HAS_Z,
            )  # fmt: skip
            turned = tl.trans(grad_yf.to(x.dtype))
            product = tl.dot(x, turned, acc=product, input_precision=PRECISION)
            if D_DIMS == 2:
                out = partial_D_ptr + ((b * nchunks + chunk) * nheads + h) * P + p
                tl.store(out, tl.sum(grad_yf * x.to(tl.float32), 0), mask=p < P)
        partial = partial_heads_ptr + (b * nchunks + chunk) * 3 * nheads + h
        if D_DIMS == 1:
            diagonal = tl.where(q[:, None] == q[None, :], product, 0.0)
            tl.store(partial + 2 * nheads, tl.sum(tl.sum(diagonal, 1), 0))
        scores = tl.dot(B, tl.trans(C), input_precision=PRECISION)  # [j, i]
        gap = tl.where(causal, cum[None, :] - cum[:, None], float("-inf"))
        decay = tl.exp2(gap)
        product *= decay
        grad_scores += product * dt[:, None]
        product *= scores
        read = tl.sum(product, 1)  # grad_u_j . x_j within the chunk
        written = tl.sum(product * dt[:, None], 0)
        weights = (scores * decay * dt[:, None]).to(B.dtype)
        to_end = tl.exp2(total - cum)
        if HAS_SEQ:
            to_end = tl.where(seen, to_end, 0.0)
        kept = tl.zeros([Q], dtype=tl.float32)  # grad_u_j . x_j through the state
        for block_p in tl.range(0, P_BLOCKS):
            p = block_p * BLOCK_P + tl.arange(0, BLOCK_P)
            mask_p = parts.column_mask(rows, p, P, BLOCK_P * P_BLOCKS)
            tile = slot + parts.state_offsets(n, p, N)
            tile_mask = parts.state_mask(n, p, P, N)
            grad_state = tl.load(grad_states_ptr + tile, mask=tile_mask, other=0.0)
            tile_x = row_x + q[:, None] * stride_x_token + p[None, :]
            xf = tl.load(x_ptr + tile_x, mask=mask_p, other=0.0).to(tl.float32)
            grad_x = tl.dot(B, grad_state, input_precision=PRECISION) * to_end[:, None]
            kept += tl.sum(grad_x * xf, 1)
            grad_x *= dt[:, None]
            grad_yf = parts.load_gated(
                dout_ptr, z_ptr, row_dout, row_z, q, p,
                stride_dout_token, stride_z_token, mask_p, HAS_Z,
            )  # fmt: skip
            if D_DIMS == 1:
                grad_x += grad_yf * tl.load(D_ptr + h).to(tl.float32)
            elif D_DIMS == 2:
                skip = tl.load(D_ptr + h * P + p, mask=p < P, other=0.0).to(tl.float32)
                grad_x += grad_yf * skip[None, :]
            grad_y = grad_yf.to(B.dtype)
            grad_x = tl.dot(weights, grad_y, acc=grad_x, input_precision=PRECISION)
            tile_out = row_out + q[:, None] * (nheads * P) + p[None, :]
            tl.store(grad_x_ptr + tile_out, grad_x.to(grad_x_ptr.dtype.element_ty), mask=mask_p)

        passed = tl.load(passed_ptr + (head * nchunks + chunk) * PASSED)
        for part in tl.static_range(1, PASSED):
            passed += tl.load(passed_ptr + (head * nchunks + chunk) * PASSED + part)
        through = total
        if HAS_SEQ:
            through = tl.where(whole, total, float("-inf"))
        v = tl.load(v_ptr + token + q) + tl.where(q == Q - 1, passed * tl.exp2(through), 0.0)
        if HAS_SEQ:  # a sum for each token: differences would mix in other sequences' rounding
            own = (v + written - read * dt)[None, :]
            after = tl.sum(tl.where(causal, own, 0.0), 1)
        else:
            after = tl.cumsum(v + written - read * dt, 0, reverse=True)
        before = tl.cumsum(kept * dt, 0) - kept * dt
        A = tl.load(A_ptr + h).to(tl.float32)
        kept_some = dt * A * parts.LOG2_E > parts.LEAST_LOG2_DECAY  # else the decay is constant, 0
        grad_a = tl.where(kept_some, after + before, 0.0)
        grad_dt = grad_a * A + read + kept
        dt_row = dt_raw_ptr + b * stride_dt_batch + t0 * stride_dt_token + h * stride_dt_head
        raw = tl.load(dt_row + q * stride_dt_token, mask=rows, other=0.0).to(tl.float32)
        if HAS_BIAS:
            raw += tl.load(bias_ptr + h).to(tl.float32)
        free = raw
        if SOFTPLUS:
            free = parts.softplus(raw)
            grad_dt *= parts.sigmoid(raw)
        inside = rows & (free >= dt_min) & (free <= dt_max)
        grad_dt = tl.where(inside, grad_dt, 0.0)
        out = grad_dt_ptr + (b * seqlen + t0 + q) * nheads + h
        tl.store(out, grad_dt.to(grad_dt_ptr.dtype.element_ty), mask=rows)
        tl.store(partial, tl.sum(grad_a * dt))
        tl.store(partial + nheads, tl.sum(grad_dt))

    grad_B = tl.zeros([Q, BLOCK_N], dtype=tl.float32)
    for k in tl.range(0, count, num_stages=STAGES, disable_licm=True):
        h = (first_head + k).to(tl.int64)
        head = b * nheads + h
        token = head * nchunks * Q + t0
        total = tl.load(cum_ptr + token + Q - 1)
        weight = tl.exp2(total - tl.load(cum_ptr + token + q)) * tl.load(dt_ptr + token + q)
        if HAS_SEQ:
            weight = tl.where(seen, weight, 0.0)
        slot = (head * nchunks + chunk) * P * N
        row_x = b * stride_x_batch + t0 * stride_x_token + h * stride_x_head
        for block_p in tl.range(0, P_BLOCKS):
            p = block_p * BLOCK_P + tl.arange(0, BLOCK_P)
            mask_p = parts.column_mask(rows, p, P, BLOCK_P * P_BLOCKS)
            tile = slot + parts.state_offsets(n, p, N)
            grad_state = tl.load(
                grad_states_ptr + tile, mask=parts.state_mask(n, p, P, N), other=0.0
            )
            tile_x = row_x + q[:, None] * stride_x_token + p[None, :]
            x = tl.load(x_ptr + tile_x, mask=mask_p, other=0.0)
            weighted = (x.to(tl.float32) * weight[:, None]).to(x.dtype)
            grad_B = tl.dot(weighted, tl.trans(grad_state), acc=grad_B, input_precision=PRECISION)
    row = ((block * tl.num_programs(2) + b) * seqlen + t0) * ngroups + group
    offsets = row * N + q[:, None] * (ngroups * N) + n[None, :]
    sums = grad_scores.to(B.dtype)
    grad_B = tl.dot(sums, C, acc=grad_B, input_precision=PRECISION)
    tl.store(grad_B_ptr + offsets, grad_B.to(grad_B_ptr.dtype.element_ty), mask=mask_n)
    grad_C = tl.load(partial_C_ptr + offsets, mask=mask_n, other=0.0)
    grad_C = tl.dot(tl.trans(sums), B, acc=grad_C, input_precision=PRECISION)
    tl.store(grad_C_ptr + offsets, grad_C.to(grad_C_ptr.dtype.element_ty), mask=mask_n)


@triton.jit(do_not_specialize=["blocks", "size"])
def sum_kernel(
    B_partial_ptr, C_partial_ptr, grad_B_ptr, grad_C_ptr, blocks, size, BLOCK: tl.constexpr
):
    """Sum (blocks, size) fp32 partials over the blocks, in order; program axis 1 picks B or C."""
    e = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    mask = e < size
    source = B_partial_ptr
    target = grad_B_ptr
    if tl.program_id(1) == 1:
        source = C_partial_ptr
        target = grad_C_ptr
    total = tl.zeros([BLOCK], dtype=tl.float32)
    for k in tl.range(0, blocks):
        total += tl.load(source + k * size.to(tl.int64) + e, mask=mask, other=0.0)
    tl.store(target + e, total.to(grad_B_ptr.dtype.element_ty), mask=mask)


def run_states(
    recording: Recording,
    launch: Launch,
    v: Tensor,
    z: Tensor | None,
    m: Tensor,
    cum: Tensor,
    cumj: Tensor,
    entries: Tensor | None,
    states: Tensor,
    *,
    seq: Tensor | None,
    end: Tensor | None = None,
    passed: Tensor | None = None,
) -> None:
    """Fill states with what enters every chunk, (B, H, chunks, P, N) in the input's dtype.

    With `passed` (B, H, chunks, blocks of P) the walk is in reverse: gradients of states take the
    place of the states, and passed gets what is left of these.
    """
    tiles = launch.tiling
    grid = (launch.nsegments * launch.blocks_p, launch.nheads, launch.batch)
    arguments = (
        v, z, m, cum, cumj, seq, entries, states, end, None, passed, *launch.sizes,
        *strides3(v), *strides3(z), *strides3(m),
    )  # fmt: skip
    constants = {
        "P": launch.headdim, "N": launch.d_state, "Q": launch.chunk,
        "BLOCK_P": tiles.block_p, "BLOCK_N": tiles.block_n, "STAGES": tiles.state_stages,
        "REVERSE": passed is not None, "CHUNK_STATES": True, "HAS_ENTRY": entries is not None,
        "STORE_END": end is not None, "HAS_Z": z is not None, "HAS_SEQ": seq is not None,
        "PRECISION": tiles.precision,
    }  # fmt: skip
    warps = tiles.state_warps
    recording.launch(parts.state_kernel, grid, arguments, constants, num_warps=warps)


class Backward:
    """The gradients of calls, the first of a kind as written and the next ones as recorded.

    Args:
        plan: (x, B, options) to how the forward was divided, the same whenever it is asked.
    """

    def __init__(self, plan: Callable[[Tensor, Tensor, tuple[Any, ...]], Launch]) -> None:
        self._plan = plan
        self._calls = Calls(self._run, _ready)

    def __call__(
        self,
        tensors: tuple[Tensor | None, ...],
        entries: Tensor | None,
        grads: tuple[Tensor | None, Tensor | None],
        options: tuple[Any, ...],
        seq: Tensor | None = None,
    ) -> tuple[Tensor | None, ...]:
        """Return the gradient of every operand, None for those that are not given.

        Args:
            tensors: the operands, in the order of their fields.
            entries: what the forward kept of several segments.
            grads: those of the output and of the final states.
            options: of the forward, as the plan takes them.
            seq: (B, L) int32, numbers of the tokens' sequences, where a row holds several.
        """
        dout, dfinal = grads
        if dout is None:
            dout = torch.zeros_like(tensors[0])  # type: ignore[arg-type]
        return as_given(self._calls((*tensors, entries, dout, dfinal, seq), options), tensors)

    def clear(self) -> None:
        """Forget what was recorded."""
        self._calls.clear()

    def _run(self, recording: Recording, tensors: Any, options: tuple[Any, ...]) -> Any:
        *given, entries, dout, dfinal, seq = tensors
        operands = Operands.of(given)
        launch = self._plan(operands.x, operands.B, options)
        if launch.nsegments == 1:
            entries = operands.initial_states
        gradients = run_backward(recording, launch, operands, entries, dout, dfinal, seq)
        return tuple(gradients.get(name) for name in Operands.__dataclass_fields__)


def _ready(tensors: Any, options: tuple[Any, ...]) -> Any:
    """Copy what is not laid out as the kernels read it."""
    *given, entries, dout, dfinal, seq = tensors
    dfinal = None if dfinal is None else dfinal.contiguous()
    return (*Operands.laid_out(*given).all(), entries, unit_last(dout), dfinal, seq)


def run_backward(
    recording: Recording,
    launch: Launch,
    operands: Operands,
    entries: Tensor | None,
    dout: Tensor,
    dfinal: Tensor | None,
    seq: Tensor | None,
) -> dict[str, Tensor]:
    """Return the gradient of every operand that is given, by name; those of parameters in fp32.

    entries (B, H, segments, P, N) fp32 is what enters each segment, the initial states of one.
    """
    launch = launch.with_chunk(launch.tiling.grad_chunk)
    gradients: dict[str, Tensor] = {}
    dt, A, bias = operands.dt, operands.A, operands.dt_bias
    cum, cumj, dt = run_dt(recording, launch, dt, A, bias, store_dt=True)
    v = recording.scratch(cum.shape, cum.dtype, cum.device)
    times = _Times(cum=cum, cumj=cumj, dt=dt, v=v)
    _run_walks(recording, launch, operands, entries, dout, dfinal, seq, times, gradients)
    return gradients


@dataclass(frozen=True, kw_only=True)
class _Times:
    """A value for every token and head, (B, H, chunks * Q) fp32."""

    cum: Tensor
    cumj: Tensor
    dt: Tensor | None
    v: Tensor


def _run_walks(
    recording: Recording,
    launch: Launch,
    operands: Operands,
    entries: Tensor | None,
    dout: Tensor,
    dfinal: Tensor | None,
    seq: Tensor | None,
    times: _Times,
    gradients: dict[str, Tensor],
) -> None:
    """Launch the walks over time, each followed by the kernel that needs what it leaves.

    The order is one of memory: the states of all chunks are the most that the pass holds, so only
    one set is held. grad_c is done with them when their gradients come, and what the second
    kernel writes is allocated once nothing else of that size is left.
    """
    x, z, B, C = operands.x, operands.z, operands.B, operands.C
    cum, cumj = times.cum, times.cumj
    per_head = (launch.batch, launch.nheads, launch.nchunks)
    states = recording.scratch((*per_head, launch.headdim, launch.d_state), x.dtype, x.device)
    fetched = fetching(launch, operands, dout, seq)
    shape = _Gradients.of(launch, operands, seq)
    if fetched is not None:
        fetched.run_states(recording, launch, x, B, times, entries, states)
        partial_C = fetched.run_grad_c(recording, launch, operands, dout, times, states)
        exits = fetched.run_exits(recording, launch, operands, dout, times, dfinal)
    else:
        run_states(recording, launch, x, None, B, cum, cumj, entries, states, seq=seq)
        partial_C = _run_grad_c(
            recording, launch, operands, shape, dout, times, seq, states, gradients
        )
        exits = segment_entries(
            recording, launch, dout, z, C, cum, cumj, dfinal, seq=seq, reverse=True
        )
    end = None
    if operands.initial_states is not None:
        end = recording.output(operands.initial_states.shape, torch.float32, x.device)
        gradients["initial_states"] = end
    passed = recording.scratch((*per_head, launch.blocks_p), torch.float32, x.device)
    if fetched is not None:
        fetched.run_states(recording, launch, dout, C, times, exits, states, end=end, passed=passed)
    else:
        run_states(
            recording, launch, dout, z, C, cum, cumj, exits, states, seq=seq, end=end,
            passed=passed,
        )  # fmt: skip
    if exits is not None and exits is not dfinal:
        recording.free(exits)
    del exits
    run = run_whole if z is None and launch.tiling.whole_heads else _run_grad_b
    sums = run(
        recording, launch, operands, shape, dout, times, seq, (states, passed), partial_C,
        gradients,
    )  # fmt: skip
    _sum_chunks(recording, operands, *sums, gradients)


@dataclass(frozen=True, kw_only=True)
class _Gradients:
    """How the two kernels over chunks are divided, and the arguments that they share."""

    block_heads: int
    blocks: int  # of heads of a group
    grid: tuple[int, int, int]
    sizes: tuple[int, ...]
    strides: tuple[int, ...]
    options: dict[str, Any]

    @classmethod
    def of(cls, launch: Launch, operands: Operands, seq: Tensor | None) -> "_Gradients":
        x, z, D, tiles = operands.x, operands.z, operands.D, launch.tiling
        slots = multiprocessors(x.device) * tiles.grad_programs_per_sm
        whole = launch.batch * launch.nchunks * launch.ngroups
        block_heads = heads_per_program(launch.heads_per_group, whole, slots)
        blocks = -(-launch.heads_per_group // block_heads)
        return cls(
            block_heads=block_heads,
            blocks=blocks,
            grid=(launch.nchunks, launch.ngroups * blocks, launch.batch),
            sizes=(
                launch.seqlen, launch.nchunks, launch.nheads, launch.heads_per_group, block_heads,
                launch.ngroups,
            ),
            strides=(
                *strides3(x), *strides3(z), *strides3(operands.B), *strides3(operands.C),
            ),
            options={
                "P": launch.headdim, "N": launch.d_state, "Q": launch.chunk,
                "BLOCK_N": tiles.block_n, "D_DIMS": 0 if D is None else D.dim(),
                "HAS_Z": z is not None, "HAS_SEQ": seq is not None, "PRECISION": tiles.precision,
            },
        )  # fmt: skip


def _run_grad_c(
    recording: Recording,
    launch: Launch,
    operands: Operands,
    shape: _Gradients,
    dout: Tensor,
    times: _Times,
    seq: Tensor | None,
    states: Tensor,
    gradients: dict[str, Tensor],
) -> Tensor:
    """Launch the kernel that needs the states; returns grad_C's part, by block of heads."""
    x, z, B, C, tiles = operands.x, operands.z, operands.B, operands.C, launch.tiling
    partial_C = recording.scratch((shape.blocks, *C.shape), torch.float32, x.device)
    if z is not None:
        gradients["z"] = recording.output(z.shape, z.dtype, x.device)
    block_p = tiles.grad_block_p if z is not None else tiles.grad_c_block_p
    arguments = (
        x, z, B, C, operands.D, dout, times.cum, times.cumj, seq, states, partial_C, times.v,
        gradients.get("z"), *shape.sizes, *shape.strides, *strides3(dout),
    )  # fmt: skip
    constants = shape.options | {
        "BLOCK_P": block_p, "P_BLOCKS": -(-launch.headdim // block_p),
        "STAGES": tiles.grad_c_stages if z is None else 1,
    }  # fmt: skip
    warps = tiles.grad_c_warps
    recording.launch(grad_c_kernel, shape.grid, arguments, constants, num_warps=warps)
    return partial_C


def _run_grad_b(
    recording: Recording,
    launch: Launch,
    operands: Operands,
    shape: _Gradients,
    dout: Tensor,
    times: _Times,
    seq: Tensor | None,
    states: tuple[Tensor, Tensor],
    partial_C: Tensor,
    gradients: dict[str, Tensor],
) -> tuple[Tensor, Tensor | None]:
    """Launch the kernel that needs the states' gradients, and the sums over blocks of heads.

    Fills `gradients` of x, dt, B and C; returns what `_sum_chunks` takes.
    """
    x, z, B, C, D = operands.x, operands.z, operands.B, operands.C, operands.D
    tiles, block_p, blocks = launch.tiling, launch.tiling.grad_block_p, shape.blocks
    fp32: Any = (torch.float32, x.device)
    partial_B = recording.scratch((blocks, *B.shape), *fp32) if blocks > 1 else None
    per_chunk = launch.batch * launch.nchunks
    partial_heads = recording.scratch((per_chunk, 3, launch.nheads), *fp32)
    partial_D = None
    if D is not None and D.dim() == 2:
        partial_D = recording.scratch((per_chunk, *D.shape), *fp32)
    for name, tensor in (("x", x), ("dt", operands.dt), ("B", B), ("C", C)):
        gradients[name] = recording.output(tensor.shape, tensor.dtype, x.device)
    grad_states, passed = states
    arguments = (
        x, z, B, C, D, operands.A, operands.dt, operands.dt_bias,
        dout, times.cum, times.dt, seq, times.v, passed, grad_states, partial_C,
        gradients["x"], gradients["dt"],
        gradients["B"] if partial_B is None else partial_B,
        gradients["C"] if partial_B is None else partial_C,
        partial_heads, partial_D, *shape.sizes, *launch.dt_limit, *shape.strides,
        *operands.dt.stride(), *strides3(dout),
    )  # fmt: skip
    constants = shape.options | {
        "BLOCK_P": block_p, "P_BLOCKS": -(-launch.headdim // block_p),
        "HAS_BIAS": operands.dt_bias is not None, "SOFTPLUS": launch.dt_softplus,
        "STAGES": tiles.grad_b_stages, "PASSED": launch.blocks_p,
    }  # fmt: skip
    warps = tiles.grad_b_warps
    recording.launch(grad_b_kernel, shape.grid, arguments, constants, num_warps=warps)
    if partial_B is not None:
        size = B.numel()
        arguments = (partial_B, partial_C, gradients["B"], gradients["C"], blocks, size)
        grid = (-(-size // _SUM_BLOCK), 2)
        recording.launch(sum_kernel, grid, arguments, {"BLOCK": _SUM_BLOCK})
    return partial_heads, partial_D


def _sum_chunks(
    recording: Recording,
    operands: Operands,
    partial_heads: Tensor,
    partial_D: Tensor | None,
    gradients: dict[str, Tensor],
) -> None:
    """Sum the per-chunk parts of the gradients of A, dt_bias and D."""
    D = operands.D
    rows = 3 if D is not None and D.dim() == 1 else 2
    sums = column_sums(recording, partial_heads, rows)
    gradients["A"] = sums[0]
    if operands.dt_bias is not None:
        gradients["dt_bias"] = sums[1]
    if rows == 3:
        gradients["D"] = sums[2]
    elif partial_D is not None:
        gradients["D"] = column_sums(recording, partial_D, partial_D.shape[1])
