"""The parts that the forward and the backward pass of the Triton SSD operation share.

Time is cut into chunks of Q tokens, and chunks are grouped into segments that run in parallel.
Everything here is in base 2: with A2 = A * log2(e),

    cum_t   = sum of max(dt_s * A2, -126) over the chunk's tokens s <= t    (never positive)
    cumj_t  = cum_t - log2(dt_t)

so that the weight of token j in token i of one chunk is exp2(cum_i - cumj_j), dt included.
Below -126 a step's decay is no fp32 number but 0: the floor keeps such a step from rounding away
what the later ones of its chunk add. Arguments of exponentials that are decays are never positive:
masked before, not after. Past the end of the sequence dt is 0: cum stays constant, cumj is +inf and
the weight 0. Both are stored fp32 as (B, H, chunks * Q): a chunk's tokens are contiguous and
nothing reads past the end.

State tiles are [N, P] in registers (fp32) and (P, N) in memory, like the interface's states.
A.1 of the Mamba-2 paper ("Transformers are SSMs", 2024, section 6) has the algorithm over chunks.
"""

import triton
import triton.language as tl

LOG2_E = tl.constexpr(1.4426950408889634)
LEAST_LOG2_DECAY = tl.constexpr(-126.0)  # of a step; 2 ** -126 is the least normal fp32 number
LEAST_A2 = tl.constexpr(-3.4028234663852886e38)  # finite, so that past the end 0 * A2 is 0
_RUNTIME_SIZES = ["seqlen", "nchunks", "nsegments", "segment_chunks", "nheads", "heads_per_group"]


@triton.jit
def softplus(x):
    """log(1 + exp(x)) to fp32 accuracy: the fast logarithm is too coarse for small dt.

    log1p(e) = 2 atanh(s) with s = e / (2 + e) <= 1/3: the series to s^15 is exact to 1e-9.
    """
    e = tl.exp2(-tl.abs(x) * LOG2_E)
    s = e / (2.0 + e)
    s2 = s * s
    series = 1.0 / 15.0
    series = series * s2 + 1.0 / 13.0
    series = series * s2 + 1.0 / 11.0
    series = series * s2 + 1.0 / 9.0
    series = series * s2 + 1.0 / 7.0
    series = series * s2 + 1.0 / 5.0
    series = series * s2 + 1.0 / 3.0
    series = series * s2 + 1.0
    return tl.maximum(x, 0.0, propagate_nan=tl.PropagateNan.ALL) + 2.0 * s * series


@triton.jit
def sigmoid(x):
    """1 / (1 + exp(-x)); overflow of the exponential gives the right limit, 0."""
    return 1.0 / (1.0 + tl.exp2(-x * LOG2_E))


@triton.jit
def column_mask(rows, columns, SIZE: tl.constexpr, BLOCK: tl.constexpr):
    """Mask of a [rows, BLOCK] tile: rows as given, columns below SIZE; cheap when SIZE is BLOCK."""
    mask = rows[:, None]
    if SIZE != BLOCK:
        mask = mask & (columns < SIZE)[None, :]
    return mask


@triton.jit
def state_offsets(n, p, N: tl.constexpr):
    """Offsets of an [N, P] register tile in a (P, N) matrix."""
    return p[None, :] * N + n[:, None]


@triton.jit
def state_mask(n, p, P: tl.constexpr, N: tl.constexpr):
    """Mask of an [N, P] register tile whose blocks may be larger than the matrix."""
    return (p < P)[None, :] & (n < N)[:, None]


@triton.jit
def load_gated(
    dout_ptr, z_ptr, row_dout, row_z, q, p, stride_dout, stride_z, mask, HAS_Z: tl.constexpr
):
    """Load the gradient of the output before the gate, dout * silu(z) or dout, as fp32.

    Tile [q, p] of the rows that begin at the offsets row_dout and row_z.
    """
    tile = q[:, None] * stride_dout + p[None, :]
    grad_y = tl.load(dout_ptr + row_dout + tile, mask=mask, other=0.0).to(tl.float32)
    if HAS_Z:
        tile = q[:, None] * stride_z + p[None, :]
        z = tl.load(z_ptr + row_z + tile, mask=mask, other=0.0).to(tl.float32)
        grad_y = grad_y * z * sigmoid(z)
    return grad_y


@triton.jit
def head_block(heads_per_group, block_heads):
    """Return (group, block in the group, first head, number of heads) of this program."""
    blocks = tl.cdiv(heads_per_group, block_heads)
    group = tl.program_id(1) // blocks
    block = (tl.program_id(1) % blocks).to(tl.int64)
    within = (tl.program_id(1) % blocks) * block_heads
    count = tl.minimum(block_heads, heads_per_group - within)
    return group, block, group * heads_per_group + within, count


@triton.jit
def sequence_masks(seq_ptr, first, q, rows, seqlen, Q: tl.constexpr):
    """Say what a chunk's tokens have to do with its ends, where a row holds several sequences.

    seq_ptr is the row's, (L,) of numbers that never decrease. Returns the tokens' numbers [q];
    whether they see the state that enters, and whether the state that leaves sees them, [q] each;
    and whether the one state goes into the other. The decay between two sequences is zero, and the
    running sums of log-decay know nothing of them: weights are masked instead.
    """
    seq = tl.load(seq_ptr + first + q, mask=rows, other=0)
    entered = tl.load(seq_ptr + tl.maximum(first - 1, 0))
    left = tl.load(seq_ptr + tl.minimum(first + Q, seqlen) - 1)
    seq = tl.where(rows, seq, left)  # what lies past the end goes with the last sequence
    return seq, seq == entered, seq == left, entered == left


@triton.jit(do_not_specialize=["seqlen", "nchunks", "nheads", "dt_min", "dt_max"])
def dt_kernel(
    dt_ptr, A_ptr, bias_ptr,
    cum_ptr, cumj_ptr, dt_out_ptr,
    seqlen, nchunks, nheads, dt_min, dt_max,
    stride_batch, stride_token, stride_head,
    Q: tl.constexpr, BLOCK_H: tl.constexpr,
    HAS_BIAS: tl.constexpr, SOFTPLUS: tl.constexpr, STORE_DT: tl.constexpr,
):  # fmt: skip
    """One chunk of BLOCK_H heads: dt after bias, softplus and limits; sums of its log-decay."""
    chunk = tl.program_id(0)
    h = tl.program_id(1) * BLOCK_H + tl.arange(0, BLOCK_H)
    b = tl.program_id(2).to(tl.int64)
    t = chunk * Q + tl.arange(0, Q)
    heads = h < nheads
    mask = (t < seqlen)[:, None] & heads[None, :]
    A2 = tl.load(A_ptr + h, mask=heads, other=0.0).to(tl.float32) * LOG2_E
    A2 = tl.maximum(A2, LEAST_A2, propagate_nan=tl.PropagateNan.ALL)
    offsets = t[:, None].to(tl.int64) * stride_token + h[None, :] * stride_head
    dt = tl.load(dt_ptr + b * stride_batch + offsets, mask=mask, other=0.0).to(tl.float32)
    if HAS_BIAS:
        dt += tl.load(bias_ptr + h, mask=heads, other=0.0).to(tl.float32)[None, :]
    if SOFTPLUS:
        dt = softplus(dt)
    dt = tl.maximum(dt, dt_min, propagate_nan=tl.PropagateNan.ALL)
    dt = tl.minimum(dt, dt_max, propagate_nan=tl.PropagateNan.ALL)
    dt = tl.where(mask, dt, 0.0)
    log_decay = dt * A2[None, :]
    log_decay = tl.maximum(log_decay, LEAST_LOG2_DECAY, propagate_nan=tl.PropagateNan.ALL)
    cum = tl.cumsum(log_decay, 0)
    out = (b * nheads + h[None, :]) * nchunks * Q + t[:, None]
    tl.store(cum_ptr + out, cum, mask=heads[None, :])
    log_dt = tl.log2(tl.where(dt > 0, dt, 1.0))
    tl.store(cumj_ptr + out, tl.where(dt > 0, cum - log_dt, float("inf")), mask=heads[None, :])
    if STORE_DT:
        tl.store(dt_out_ptr + out, dt, mask=heads[None, :])


@triton.jit(do_not_specialize=_RUNTIME_SIZES)
def state_kernel(
    v_ptr, z_ptr, m_ptr, cum_ptr, cumj_ptr, seq_ptr,
    entry_ptr, chunk_states_ptr, end_ptr, decay_ptr, passed_ptr,
    seqlen, nchunks, nsegments, segment_chunks, nheads, heads_per_group,
    stride_v_batch, stride_v_token: tl.constexpr, stride_v_head,
    stride_z_batch, stride_z_token: tl.constexpr, stride_z_head,
    stride_m_batch, stride_m_token: tl.constexpr, stride_m_group,
    P: tl.constexpr, N: tl.constexpr, Q: tl.constexpr,
    BLOCK_P: tl.constexpr, BLOCK_N: tl.constexpr, STAGES: tl.constexpr,
    REVERSE: tl.constexpr, CHUNK_STATES: tl.constexpr, HAS_ENTRY: tl.constexpr,
    STORE_END: tl.constexpr, HAS_Z: tl.constexpr, HAS_SEQ: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """Walk one segment with the state in registers, in one of four ways.

    Forward in time it is the state (v = x, m = B); in reverse it is the state's gradient (v = dout,
    m = C). Without CHUNK_STATES the walk starts from zero and leaves the segment's own contribution
    in the slot of the segment it enters next, and the segment's log-decay. With it, the walk starts
    from the segment's slot and stores what enters each chunk; STORE_END then keeps the last value
    of the walk's last segment (in reverse, the gradient of the initial state).

    In reverse, the chunks' slots hold the states of the walk forward in time, and get their
    gradients instead. What is left of the states is <G, S> of each chunk and block of P, in
    passed_ptr (B, H, chunks, blocks) fp32.
    """
    nblocks: tl.constexpr = (P + BLOCK_P - 1) // BLOCK_P
    segment = tl.program_id(0) // nblocks
    if REVERSE and not CHUNK_STATES:
        segment += 1
    h = tl.program_id(1)
    b = tl.program_id(2).to(tl.int64)
    first = segment * segment_chunks
    count = tl.minimum(segment_chunks, nchunks - first)
    q = tl.arange(0, Q)
    p = (tl.program_id(0) % nblocks) * BLOCK_P + tl.arange(0, BLOCK_P)
    n = tl.arange(0, BLOCK_N)
    head = b * nheads + h
    v_ptr += b * stride_v_batch + h.to(tl.int64) * stride_v_head
    if HAS_Z:
        z_ptr += b * stride_z_batch + h.to(tl.int64) * stride_z_head
    m_ptr += b * stride_m_batch + (h // heads_per_group).to(tl.int64) * stride_m_group
    tile = state_offsets(n, p, N)
    tile_mask = state_mask(n, p, P, N)
    state = tl.zeros([BLOCK_N, BLOCK_P], dtype=tl.float32)
    if HAS_ENTRY:
        slot = (head * nsegments + segment) * P * N
        state = tl.load(entry_ptr + slot + tile, mask=tile_mask, other=0.0).to(tl.float32)
    log_decay = 0.0
    if REVERSE and CHUNK_STATES:  # a chunk ahead: nothing else of the walk waits for memory so long
        slot = (head * nchunks + first + count - 1) * P * N
        ahead = tl.load(chunk_states_ptr + slot + tile, mask=tile_mask, other=0.0)
    for k in tl.range(0, count, num_stages=STAGES):
        chunk = first + k
        if REVERSE:
            chunk = first + count - 1 - k
        t0 = (chunk * Q).to(tl.int64)
        rows = chunk * Q + q < seqlen
        mask_v = column_mask(rows, p, P, BLOCK_P * nblocks)
        if CHUNK_STATES:
            slot = (head * nchunks + chunk) * P * N
            if REVERSE:
                product = tl.sum(ahead.to(tl.float32) * state)
                part = (head * nchunks + chunk) * nblocks + tl.program_id(0) % nblocks
                tl.store(passed_ptr + part, product)
                more = tile_mask & (k + 1 < count)
                ahead = tl.load(chunk_states_ptr + slot - P * N + tile, mask=more, other=0.0)
            kept = state.to(chunk_states_ptr.dtype.element_ty)
            tl.store(chunk_states_ptr + slot + tile, kept, mask=tile_mask)
        cum_row = head * nchunks * Q + t0
        total = tl.load(cum_ptr + cum_row + Q - 1)
        through = total
        if HAS_SEQ:
            _, sees, seen, whole = sequence_masks(
                seq_ptr + b * seqlen, chunk * Q, q, rows, seqlen, Q
            )
            through = tl.where(whole, total, float("-inf"))
        if REVERSE:
            weight = tl.exp2(tl.load(cum_ptr + cum_row + q))
            v = load_gated(
                v_ptr, z_ptr, t0 * stride_v_token, t0 * stride_z_token, q, p,
                stride_v_token, stride_z_token, mask_v, HAS_Z,
            )  # fmt: skip
        else:
            weight = tl.exp2(total - tl.load(cumj_ptr + cum_row + q))
            offsets_v = t0 * stride_v_token + (q[:, None] * stride_v_token + p[None, :])
            v = tl.load(v_ptr + offsets_v, mask=mask_v, other=0.0).to(tl.float32)
        if HAS_SEQ:
            weight = tl.where(sees if REVERSE else seen, weight, 0.0)
        offsets_m = t0 * stride_m_token + (q[:, None] * stride_m_token + n[None, :])
        m = tl.load(m_ptr + offsets_m, mask=column_mask(rows, n, N, BLOCK_N), other=0.0)
        weighted = (v * weight[:, None]).to(m.dtype)
        state = tl.dot(
            tl.trans(m), weighted, acc=state * tl.exp2(through), input_precision=PRECISION
        )
        log_decay += through
    if CHUNK_STATES:
        last = nsegments - 1
        if REVERSE:
            last = 0
        if STORE_END and segment == last:
            tl.store(end_ptr + head * P * N + tile, state, mask=tile_mask)
    else:
        into = segment + 1
        if REVERSE:
            into = segment - 1
        tl.store(end_ptr + (head * nsegments + into) * P * N + tile, state, mask=tile_mask)
        if tl.program_id(0) % nblocks == 0:
            tl.store(decay_ptr + head * nsegments + segment, log_decay)


@triton.jit(do_not_specialize=["nsegments"])
def prefix_kernel(
    slots_ptr, decay_ptr, start_ptr,
    nsegments,
    SIZE: tl.constexpr, BLOCK: tl.constexpr, STAGES: tl.constexpr,
    REVERSE: tl.constexpr, HAS_START: tl.constexpr,
):  # fmt: skip
    """Turn each segment's own contribution into what enters the segment, in place.

    slots (B, H, segments, P, N) fp32, decay (B, H, segments) log2; start (B, H, P, N) or none
    enters the walk's first segment.
    """
    head = tl.program_id(1).to(tl.int64)
    e = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    mask = e < SIZE
    carry = tl.zeros([BLOCK], dtype=tl.float32)
    if HAS_START:
        carry = tl.load(start_ptr + head * SIZE + e, mask=mask, other=0.0).to(tl.float32)
    slots_ptr += head * nsegments * SIZE + e
    decay_ptr += head * nsegments
    if REVERSE:
        tl.store(slots_ptr + (nsegments - 1) * SIZE, carry, mask=mask)
    else:
        tl.store(slots_ptr, carry, mask=mask)
    for k in tl.range(1, nsegments, num_stages=STAGES):
        segment = k
        left = k - 1
        if REVERSE:
            segment = nsegments - 1 - k
            left = segment + 1
        slot = slots_ptr + segment * SIZE
        own = tl.load(slot, mask=mask, other=0.0)
        carry = carry * tl.exp2(tl.load(decay_ptr + left)) + own
        tl.store(slot, carry, mask=mask)
