"""SSD backward without a gate, where one tile holds all channels of a head.

`whole_kernel` and `finish_kernel` do what `triton_ssd_backward.grad_b_kernel` and `sum_kernel` do,
divided otherwise:

    whole_kernel    grad_x, grad_B, the rest of grad_C, and what every token's grad_a sums
    finish_kernel   grad_dt; a chunk's part of grad_A, grad_dt_bias and grad_D; grad_B and grad_C
                    over blocks of heads (several blocks only)

All that a head needs is asked for at once, so that the memory's latency is waited for once a head,
not at every product. The sums over a chunk's tokens, which are a row of threads' work and a chain
of barriers for the others, are left to the second kernel. grad_B has no registers beside the
products within a chunk: a second loop adds it up.
"""

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from mambench.kernels.integers import next_power_of_2
from mambench.kernels.prepared import Recording
from mambench.kernels.ssd import triton_parts as parts
from mambench.kernels.ssd.triton_launch import Launch, Operands, strides3

_SUM_BLOCK = 1024
_BLOCK_H = 8
_SIZES = ["seqlen", "nchunks", "heads_per_group", "block_heads"]


@triton.jit(do_not_specialize=_SIZES)
def whole_kernel(
    x_ptr, B_ptr, C_ptr, D_ptr, dout_ptr, cum_ptr, dt_ptr, seq_ptr, v_ptr, grad_states_ptr,
    partial_C_ptr, grad_x_ptr, grad_B_ptr, grad_C_ptr, read_kept_ptr, diag_ptr, partial_D_ptr,
    seqlen, nchunks, nheads: tl.constexpr, heads_per_group, block_heads, ngroups: tl.constexpr,
    stride_x_batch, stride_x_token: tl.constexpr, stride_x_head,
    stride_B_batch, stride_B_token: tl.constexpr, stride_B_group,
    stride_C_batch, stride_C_token: tl.constexpr, stride_C_group,
    stride_dout_batch, stride_dout_token: tl.constexpr, stride_dout_head,
    P: tl.constexpr, N: tl.constexpr, Q: tl.constexpr,
    BLOCK_P: tl.constexpr, BLOCK_N: tl.constexpr,
    D_DIMS: tl.constexpr, HAS_SEQ: tl.constexpr, PRECISION: tl.constexpr,
    STAGES: tl.constexpr, STAGES_B: tl.constexpr,
):  # fmt: skip
    """One chunk, a block of heads of one group: all gradients but that of dt, if there is no gate.

    [j, i] tiles have the token that is read (j) in rows and the one that is written (i) in columns.
    For every token and head it leaves, fp32, what finish_kernel sums: in v (B, H, chunks * Q) what
    its output has from earlier tokens; in read_kept (B, H, chunks * Q, 2) what later ones have from
    its input, within the chunk and through the state; in diag (B, H, chunks * Q) x . grad_y.
    """
    chunk = tl.program_id(0)
    group, block, first_head, count = parts.head_block(heads_per_group, block_heads)
    b = tl.program_id(2).to(tl.int64)
    q = tl.arange(0, Q)
    n = tl.arange(0, BLOCK_N)
    p = tl.arange(0, BLOCK_P)
    t0 = (chunk * Q).to(tl.int64)
    rows = chunk * Q + q < seqlen
    mask_n = parts.column_mask(rows, n, N, BLOCK_N)
    mask_p = parts.column_mask(rows, p, P, BLOCK_P)
    B_ptr += b * stride_B_batch + t0 * stride_B_token + group.to(tl.int64) * stride_B_group
    C_ptr += b * stride_C_batch + t0 * stride_C_token + group.to(tl.int64) * stride_C_group
    B = tl.load(B_ptr + q[:, None] * stride_B_token + n[None, :], mask=mask_n, other=0.0)
    C = tl.load(C_ptr + q[:, None] * stride_C_token + n[None, :], mask=mask_n, other=0.0)
    grad_scores = tl.zeros([Q, Q], dtype=tl.float32)  # [j, i], summed over the heads
    causal = q[:, None] <= q[None, :]
    if HAS_SEQ:
        seq, _, seen, _ = parts.sequence_masks(seq_ptr + b * seqlen, chunk * Q, q, rows, seqlen, Q)
        causal = causal & (seq[:, None] == seq[None, :])
    tile_x = q[:, None] * stride_x_token + p[None, :]
    tile_dout = q[:, None] * stride_dout_token + p[None, :]
    state_tile = parts.state_offsets(n, p, N)
    state_mask = parts.state_mask(n, p, P, N)
    x_ptr += b * stride_x_batch + t0 * stride_x_token
    dout_ptr += b * stride_dout_batch + t0 * stride_dout_token
    for k in tl.range(0, count, num_stages=STAGES, disable_licm=True):
        h = (first_head + k).to(tl.int64)
        head = b * nheads + h
        token = head * nchunks * Q + t0
        cum = tl.load(cum_ptr + token + q)
        total = tl.load(cum_ptr + token + Q - 1)
        dt = tl.load(dt_ptr + token + q)
        slot = (head * nchunks + chunk) * P * N
        x = tl.load(x_ptr + h * stride_x_head + tile_x, mask=mask_p, other=0.0)
        grad_y = tl.load(dout_ptr + h * stride_dout_head + tile_dout, mask=mask_p, other=0.0)
        grad_state = tl.load(grad_states_ptr + slot + state_tile, mask=state_mask, other=0.0)
        product = tl.dot(x, tl.trans(grad_y), input_precision=PRECISION)  # [j, i]
        if D_DIMS == 1:
            diagonal = tl.where(q[:, None] == q[None, :], product, 0.0)
            tl.store(diag_ptr + token + q, tl.sum(diagonal, 1))
        scores = tl.dot(B, tl.trans(C), input_precision=PRECISION)  # [j, i]
        gap = tl.where(causal, cum[None, :] - cum[:, None], float("-inf"))
        decay = tl.exp2(gap)
        product *= decay
        grad_scores += product * dt[:, None]
        product *= scores
        read = tl.sum(product, 1)  # grad_u_j . x_j within the chunk
        v = tl.load(v_ptr + token + q) + tl.sum(product * dt[:, None], 0)
        tl.store(v_ptr + token + q, v)
        weights = (scores * decay * dt[:, None]).to(B.dtype)
        to_end = tl.exp2(total - cum)
        if HAS_SEQ:
            to_end = tl.where(seen, to_end, 0.0)
        xf = x.to(tl.float32)
        grad_yf = grad_y.to(tl.float32)
        grad_x = tl.dot(B, grad_state, input_precision=PRECISION) * to_end[:, None]
        kept = tl.sum(grad_x * xf, 1)  # grad_u_j . x_j through the state
        pair = read_kept_ptr + 2 * (token + q)[:, None] + tl.arange(0, 2)[None, :]
        tl.store(pair, tl.join(read, kept))
        grad_x *= dt[:, None]
        if D_DIMS == 1:
            grad_x += grad_yf * tl.load(D_ptr + h).to(tl.float32)
        elif D_DIMS == 2:
            skip = tl.load(D_ptr + h * P + p, mask=p < P, other=0.0).to(tl.float32)
            grad_x += grad_yf * skip[None, :]
            out = partial_D_ptr + ((b * nchunks + chunk) * nheads + h) * P + p
            tl.store(out, tl.sum(grad_yf * xf, 0), mask=p < P)
        grad_x = tl.dot(weights, grad_y, acc=grad_x, input_precision=PRECISION)
        row_out = ((b * seqlen + t0) * nheads + h) * P
        tile_out = row_out + q[:, None] * (nheads * P) + p[None, :]
        tl.store(grad_x_ptr + tile_out, grad_x.to(grad_x_ptr.dtype.element_ty), mask=mask_p)

    grad_B = tl.zeros([Q, BLOCK_N], dtype=tl.float32)
    for k in tl.range(0, count, num_stages=STAGES_B, disable_licm=True):
        h = (first_head + count - 1 - k).to(tl.int64)  # first what was read last
        head = b * nheads + h
        token = head * nchunks * Q + t0
        total = tl.load(cum_ptr + token + Q - 1)
        weight = tl.exp2(total - tl.load(cum_ptr + token + q)) * tl.load(dt_ptr + token + q)
        if HAS_SEQ:
            weight = tl.where(seen, weight, 0.0)
        slot = (head * nchunks + chunk) * P * N
        grad_state = tl.load(grad_states_ptr + slot + state_tile, mask=state_mask, other=0.0)
        x = tl.load(x_ptr + h * stride_x_head + tile_x, mask=mask_p, other=0.0)
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


@triton.jit(
    do_not_specialize=[
        "seqlen", "nchunks", "tails", "blocks", "slots_C", "size", "dt_min", "dt_max"
    ]
)  # fmt: skip
def finish_kernel(
    A_ptr, dt_raw_ptr, bias_ptr, cum_ptr, dt_ptr, seq_ptr, v_ptr, passed_ptr,
    read_kept_ptr, diag_ptr, partial_B_ptr, partial_C_ptr,
    grad_dt_ptr, grad_B_ptr, grad_C_ptr, partial_heads_ptr,
    seqlen, nchunks, nheads: tl.constexpr, tails, blocks, slots_C, size, dt_min, dt_max,
    stride_dt_batch, stride_dt_token, stride_dt_head,
    Q: tl.constexpr, BLOCK_H: tl.constexpr, HAS_BIAS: tl.constexpr, SOFTPLUS: tl.constexpr,
    HAS_SEQ: tl.constexpr, HAS_SKIP: tl.constexpr, PASSED: tl.constexpr,
    SUMS: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """The first `tails` programs take a chunk of BLOCK_H heads, the others sum blocks in order.

    partial_heads is (B * chunks, 3, H) fp32: grad_A, grad_dt_bias and grad_D of the chunk. What the
    chunk's last token adds to every token's grad_a is exp(total) <G, S>, of PASSED parts. Of
    slots_C slots of grad_C, each block has left its sum in the first of its share.
    """
    program = tl.program_id(0)
    if program < tails:
        head_blocks: tl.constexpr = (nheads + BLOCK_H - 1) // BLOCK_H
        chunk = (program // head_blocks) % nchunks
        b = (program // head_blocks // nchunks).to(tl.int64)
        column = tl.arange(0, BLOCK_H)
        h = (program % head_blocks) * BLOCK_H + column
        heads = h < nheads
        every = heads[None, :]
        q = tl.arange(0, Q)
        rows = chunk * Q + q < seqlen
        slot = (b * nheads + h) * nchunks + chunk
        token = slot[None, :] * Q + q[:, None]
        dt = tl.load(dt_ptr + token, mask=every, other=0.0)
        read = tl.load(read_kept_ptr + 2 * token, mask=every, other=0.0)
        kept = tl.load(read_kept_ptr + 2 * token + 1, mask=every, other=0.0)
        own = tl.load(v_ptr + token, mask=every, other=0.0) - read * dt
        passed = tl.load(passed_ptr + slot * PASSED, mask=heads, other=0.0)
        for part in tl.static_range(1, PASSED):
            passed += tl.load(passed_ptr + slot * PASSED + part, mask=heads, other=0.0)
        through = tl.load(cum_ptr + slot * Q + Q - 1, mask=heads, other=0.0)
        if HAS_SEQ:
            seq, _, _, whole = parts.sequence_masks(
                seq_ptr + b * seqlen, chunk * Q, q, rows, seqlen, Q
            )
            through = tl.where(whole, through, float("-inf"))
        own += tl.where(q[:, None] == Q - 1, (passed * tl.exp2(through))[None, :], 0.0)
        if HAS_SEQ:  # a sum for each token: differences would mix in other sequences' rounding
            later = (q[:, None] <= q[None, :]) & (seq[:, None] == seq[None, :])
            after = tl.zeros([Q, BLOCK_H], dtype=tl.float32)
            for k in tl.static_range(0, BLOCK_H):
                one = tl.sum(tl.where(column[None, :] == k, own, 0.0), 1)
                one = tl.sum(tl.where(later, one[None, :], 0.0), 1)
                after = tl.where(column[None, :] == k, one[:, None], after)
        else:
            after = tl.cumsum(own, 0, reverse=True)
        before = tl.cumsum(kept * dt, 0) - kept * dt
        A = tl.load(A_ptr + h, mask=heads, other=0.0).to(tl.float32)[None, :]
        kept_some = dt * A * parts.LOG2_E > parts.LEAST_LOG2_DECAY  # else the decay is constant, 0
        grad_a = tl.where(kept_some, after + before, 0.0)
        grad_dt = grad_a * A + read + kept
        t = (chunk * Q + q).to(tl.int64)
        inside = rows[:, None] & every
        tile = b * stride_dt_batch + t[:, None] * stride_dt_token + h[None, :] * stride_dt_head
        raw = tl.load(dt_raw_ptr + tile, mask=inside, other=0.0)
        raw = raw.to(tl.float32)
        if HAS_BIAS:
            raw += tl.load(bias_ptr + h, mask=heads, other=0.0).to(tl.float32)[None, :]
        free = raw
        if SOFTPLUS:
            free = parts.softplus(raw)
            grad_dt *= parts.sigmoid(raw)
        grad_dt = tl.where(inside & (free >= dt_min) & (free <= dt_max), grad_dt, 0.0)
        out = grad_dt_ptr + (b * seqlen + t)[:, None] * nheads + h[None, :]
        tl.store(out, grad_dt.to(grad_dt_ptr.dtype.element_ty), mask=inside)
        partial = partial_heads_ptr + (b * nchunks + chunk) * 3 * nheads + h
        tl.store(partial, tl.sum(grad_a * dt, 0), mask=heads)
        tl.store(partial + nheads, tl.sum(grad_dt, 0), mask=heads)
        if HAS_SKIP:
            diagonal = tl.load(diag_ptr + token, mask=every, other=0.0)
            tl.store(partial + 2 * nheads, tl.sum(diagonal, 0), mask=heads)
    elif SUMS:
        half = tl.cdiv(size, BLOCK)
        e = ((program - tails) % half).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
        mask = e < size
        source = partial_B_ptr
        target = grad_B_ptr
        slots = blocks
        if program - tails >= half:
            source = partial_C_ptr
            target = grad_C_ptr
            slots = slots_C
        total = tl.zeros([BLOCK], dtype=tl.float32)
        for k in tl.range(0, blocks):
            slot = (k * slots // blocks) * size.to(tl.int64)
            total += tl.load(source + slot + e, mask=mask, other=0.0)
        tl.store(target + e, total.to(grad_B_ptr.dtype.element_ty), mask=mask)


def fetching(launch: Launch, operands: Operands, dout: Tensor, seq: Tensor | None) -> Any:
    """Return the module of Gluon launches where they can serve a call, or None."""
    if not launch.tiling.fetched:
        return None
    from mambench.kernels.ssd import hopper_grad

    return hopper_grad if hopper_grad.fits(launch, operands, dout, seq) else None


def run_whole(
    recording: Recording,
    launch: Launch,
    operands: Operands,
    shape: Any,
    dout: Tensor,
    times: Any,
    seq: Tensor | None,
    states: tuple[Tensor, Tensor],
    partial_C: Tensor,
    gradients: dict[str, Tensor],
) -> tuple[Tensor, Tensor | None]:
    """Launch both kernels, as `triton_ssd_backward` launches its own (`_run_grad_b`)."""
    x, B, C, D = operands.x, operands.B, operands.C, operands.D
    skip, blocks, before = shape.options["D_DIMS"], shape.blocks, partial_C.shape[0]
    fetched, division = fetching(launch, operands, dout, seq), None
    if fetched is not None:
        division = fetched.Division.of(launch, x.device, most=before)
        blocks = division.blocks
    fp32: Any = (torch.float32, x.device)
    partial_B = recording.scratch((blocks, *B.shape), *fp32) if blocks > 1 else None
    per_chunk = launch.batch * launch.nchunks
    partial_heads = recording.scratch((per_chunk, 3, launch.nheads), *fp32)
    partial_D = None
    if D is not None and skip == 2:
        partial_D = recording.scratch((per_chunk, *D.shape), *fp32)
    read_kept = recording.scratch((*times.cum.shape, 2), *fp32)
    diag = times.cumj  # which was last used in the walks
    for name, tensor in (("x", x), ("dt", operands.dt), ("B", B), ("C", C)):
        gradients[name] = recording.output(tensor.shape, tensor.dtype, x.device)
    grad_states, passed = states
    written = (
        gradients["x"],
        gradients["B"] if partial_B is None else partial_B,
        gradients["C"] if partial_B is None else partial_C,
        read_kept, diag, partial_D,
    )  # fmt: skip
    if fetched is not None:
        fetched.run_grad(
            recording, launch, operands, division, dout, times, grad_states, partial_C, written
        )
    else:
        _run_whole_kernel(
            recording, launch, operands, shape, dout, times, seq, grad_states, partial_C, written
        )
    tails = per_chunk * -(-launch.nheads // _BLOCK_H)
    sums = 0 if partial_B is None else 2 * -(-B.numel() // _SUM_BLOCK)
    arguments = (
        operands.A, operands.dt, operands.dt_bias, times.cum, times.dt, seq, times.v, passed,
        read_kept, diag, partial_B, partial_C,
        gradients["dt"], gradients["B"], gradients["C"], partial_heads,
        launch.seqlen, launch.nchunks, launch.nheads, tails, blocks, before, B.numel(),
        *launch.dt_limit, *operands.dt.stride(),
    )  # fmt: skip
    constants = {
        "Q": launch.chunk, "BLOCK_H": _BLOCK_H, "HAS_BIAS": operands.dt_bias is not None,
        "SOFTPLUS": launch.dt_softplus, "HAS_SEQ": seq is not None, "HAS_SKIP": skip == 1,
        "PASSED": launch.blocks_p, "SUMS": sums > 0, "BLOCK": _SUM_BLOCK,
    }  # fmt: skip
    recording.launch(finish_kernel, (tails + sums,), arguments, constants, num_warps=4)
    return partial_heads, partial_D


def _run_whole_kernel(
    recording: Recording,
    launch: Launch,
    operands: Operands,
    shape: Any,
    dout: Tensor,
    times: Any,
    seq: Tensor | None,
    grad_states: Tensor,
    partial_C: Tensor,
    written: tuple[Any, ...],
) -> None:
    x, B, C, tiles = operands.x, operands.B, operands.C, launch.tiling
    arguments = (
        x, B, C, operands.D, dout, times.cum, times.dt, seq, times.v, grad_states, partial_C,
        *written, *shape.sizes, *strides3(x), *strides3(B), *strides3(C), *strides3(dout),
    )  # fmt: skip
    constants = {name: value for name, value in shape.options.items() if name != "HAS_Z"} | {
        "BLOCK_P": max(16, next_power_of_2(launch.headdim)), "STAGES": tiles.whole_stages,
        "STAGES_B": tiles.whole_sum_stages,
    }  # fmt: skip
    warps = tiles.grad_b_warps
    recording.launch(whole_kernel, shape.grid, arguments, constants, num_warps=warps)
