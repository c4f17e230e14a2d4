"""Causal depthwise convolution and SiLU in Triton: forward, and backward without atomics.

    pre[b, c, t] = bias[c] + sum_w weight[c, w] x[b, c, t - (W - 1) + w],   x zero before t = 0
    out = pre sigmoid(pre), or pre
    dpre = dout sigmoid(pre) (1 + pre (1 - sigmoid(pre)))
    dx[t] = sum_w weight[w] dpre[t + (W - 1) - w];  dweight[w] = sum dpre[t] x[t - (W - 1) + w]

x (B, C, L) with any strides, of which either time's or the channel's is 1; everything is computed
in fp32. The backward keeps nothing: it computes `pre` from x again, which it reads anyway.

Both layouts read every value once from memory, in pieces of 16 bytes, and need its neighbours in
time. Where time is contiguous a thread has eight steps in registers, split off its 16-byte piece,
and reads the pieces before and after as well (its neighbours' lanes just did: they are in the L1
cache). Where channels are contiguous a thread walks in time and keeps the last taps.
"""

import triton
import triton.language as tl

from mambench.kernels.activations import sigmoid

RUN = tl.constexpr(8)  # steps of a thread where time is contiguous


@triton.jit
def _split_runs(x, ROWS: tl.constexpr, RUNS: tl.constexpr):
    """Split (ROWS, RUNS * 8) into the eight steps of every run, each (ROWS, RUNS) fp32."""
    x = tl.reshape(x.to(tl.float32), [ROWS, RUNS, 2, 2, 2])
    even, odd = tl.split(x)
    x04, x26 = tl.split(even)
    x15, x37 = tl.split(odd)
    x0, x4 = tl.split(x04)
    x2, x6 = tl.split(x26)
    x1, x5 = tl.split(x15)
    x3, x7 = tl.split(x37)
    return x0, x1, x2, x3, x4, x5, x6, x7


@triton.jit
def _join_runs(x, ROWS: tl.constexpr, RUNS: tl.constexpr):
    """Undo `_split_runs`."""
    x04, x26 = tl.join(x[0], x[4]), tl.join(x[2], x[6])
    x15, x37 = tl.join(x[1], x[5]), tl.join(x[3], x[7])
    joined = tl.join(tl.join(x04, x26), tl.join(x15, x37))
    return tl.reshape(joined, [ROWS, RUNS * 8])


@triton.jit
def _silu_gradient(pre, ASSEMBLY: tl.constexpr):
    """Return d silu(pre) / d pre."""
    gate = sigmoid(pre, ASSEMBLY)
    return gate * (1.0 + pre * (1.0 - gate))


@triton.jit
def _load_tap(weight_ptr, channel, live, tap, stride_channel, stride_tap, TAPS: tl.constexpr):
    """Return a tap's weights, the last tap being number 3; zero for taps that are not there."""
    at = weight_ptr + channel * stride_channel + (tap - (4 - TAPS)) * stride_tap
    return tl.load(at, mask=live & (tap >= 4 - TAPS), other=0.0).to(tl.float32)


@triton.jit
def conv_time_forward(
    x_ptr, weight_ptr, bias_ptr, out_ptr,
    channels, seqlen, stride_x_batch, stride_x_channel, stride_out_batch, stride_out_channel,
    stride_weight_channel, stride_weight_tap,
    TAPS: tl.constexpr, HAS_BIAS: tl.constexpr, SILU: tl.constexpr, ASSEMBLY: tl.constexpr,
    BLOCK_C: tl.constexpr, BLOCK_T: tl.constexpr,
):  # fmt: skip
    """Convolve BLOCK_C channels over BLOCK_T steps; time is contiguous."""
    RUNS: tl.constexpr = BLOCK_T // RUN
    pid = tl.program_id(0)
    time_blocks = tl.cdiv(seqlen, BLOCK_T)
    channel_blocks = tl.cdiv(channels, BLOCK_C)
    batch = (pid // (time_blocks * channel_blocks)).to(tl.int64)
    channel = pid // time_blocks % channel_blocks * BLOCK_C + tl.arange(0, BLOCK_C)
    time = pid % time_blocks * BLOCK_T + tl.arange(0, BLOCK_T)
    live = channel < channels
    row = batch * stride_x_batch + channel.to(tl.int64) * stride_x_channel
    at = x_ptr + row[:, None] + time[None, :]
    mask = live[:, None] & (time < seqlen)[None, :]
    here = tl.load(at, mask=mask, other=0.0)
    mask_before = live[:, None] & ((time >= RUN) & (time < seqlen + RUN))[None, :]
    before = tl.load(at - RUN, mask=mask_before, other=0.0)
    x = _split_runs(before, BLOCK_C, RUNS) + _split_runs(here, BLOCK_C, RUNS)
    bias = tl.zeros([BLOCK_C], tl.float32)
    if HAS_BIAS:
        bias = tl.load(bias_ptr + channel, mask=live, other=0.0).to(tl.float32)
    results = ()
    for k in tl.static_range(8):
        pre = bias[:, None] + tl.zeros([BLOCK_C, RUNS], tl.float32)
        for tap in tl.static_range(4 - TAPS, 4):
            weight = _load_tap(
                weight_ptr, channel, live, tap, stride_weight_channel, stride_weight_tap, TAPS
            )
            pre += weight[:, None] * x[5 + k + tap]
        if SILU:
            pre *= sigmoid(pre, ASSEMBLY)
        results = results + (pre,)  # noqa: RUF005
    out = _join_runs(results, BLOCK_C, RUNS)
    row = batch * stride_out_batch + channel.to(tl.int64) * stride_out_channel
    tl.store(out_ptr + row[:, None] + time[None, :], out.to(out_ptr.dtype.element_ty), mask=mask)


@triton.jit
def conv_time_backward(
    x_ptr, weight_ptr, bias_ptr, dout_ptr, more_ptr, dx_ptr, partial_ptr,
    channels, seqlen, segment, segments,
    stride_x_batch, stride_x_channel, stride_dout_batch, stride_dout_channel,
    stride_more_batch, stride_more_channel, stride_dx_batch, stride_dx_channel,
    stride_weight_channel, stride_weight_tap,
    TAPS: tl.constexpr, HAS_BIAS: tl.constexpr, SILU: tl.constexpr, ASSEMBLY: tl.constexpr,
    HAS_MORE: tl.constexpr, BLOCK_C: tl.constexpr, BLOCK_T: tl.constexpr,
):  # fmt: skip
    """Go back through BLOCK_C channels of a segment of time, which is contiguous.

    The output's gradient is dout, plus `more` where HAS_MORE. partial (B * segments, 5, C) fp32
    gets the segment's part of the gradients of the four taps and of the bias.
    """
    RUNS: tl.constexpr = BLOCK_T // RUN
    pid = tl.program_id(0)
    channel_blocks = tl.cdiv(channels, BLOCK_C)
    part = pid // channel_blocks  # (batch, segment)
    batch = (part // segments).to(tl.int64)
    begin = part % segments * segment
    channel = pid % channel_blocks * BLOCK_C + tl.arange(0, BLOCK_C)
    live = channel < channels
    wide = channel.to(tl.int64)
    x_row = x_ptr + (batch * stride_x_batch + wide * stride_x_channel)[:, None]
    dout_row = dout_ptr + (batch * stride_dout_batch + wide * stride_dout_channel)[:, None]
    dx_row = dx_ptr + (batch * stride_dx_batch + wide * stride_dx_channel)[:, None]
    bias = tl.zeros([BLOCK_C], tl.float32)
    if HAS_BIAS:
        bias = tl.load(bias_ptr + channel, mask=live, other=0.0).to(tl.float32)
    w0 = _load_tap(weight_ptr, channel, live, 0, stride_weight_channel, stride_weight_tap, TAPS)
    w1 = _load_tap(weight_ptr, channel, live, 1, stride_weight_channel, stride_weight_tap, TAPS)
    w2 = _load_tap(weight_ptr, channel, live, 2, stride_weight_channel, stride_weight_tap, TAPS)
    w3 = _load_tap(weight_ptr, channel, live, 3, stride_weight_channel, stride_weight_tap, TAPS)
    w0, w1, w2, w3 = w0[:, None], w1[:, None], w2[:, None], w3[:, None]
    d0 = tl.zeros([BLOCK_C, RUNS], tl.float32)
    d1, d2, d3, dbias = d0, d0, d0, d0
    for first in range(begin, begin + segment, BLOCK_T):
        time = first + tl.arange(0, BLOCK_T)
        mask = live[:, None] & (time < seqlen)[None, :]
        mask_before = live[:, None] & ((time >= RUN) & (time < seqlen + RUN))[None, :]
        mask_after = live[:, None] & (time < seqlen - RUN)[None, :]
        at = x_row + time[None, :]
        before = tl.load(at - RUN, mask=mask_before, other=0.0)
        here = tl.load(at, mask=mask, other=0.0)
        after = tl.load(at + RUN, mask=mask_after, other=0.0)
        at = dout_row + time[None, :]
        dout = tl.load(at, mask=mask, other=0.0).to(tl.float32)
        dout_after = tl.load(at + RUN, mask=mask_after, other=0.0).to(tl.float32)
        if HAS_MORE:
            more_row = more_ptr + (batch * stride_more_batch + wide * stride_more_channel)[:, None]
            dout += tl.load(more_row + time[None, :], mask=mask, other=0.0).to(tl.float32)
            dout_after += tl.load(
                more_row + time[None, :] + RUN, mask=mask_after, other=0.0
            ).to(tl.float32)  # fmt: skip
        x = (
            _split_runs(before, BLOCK_C, RUNS)
            + _split_runs(here, BLOCK_C, RUNS)
            + _split_runs(after, BLOCK_C, RUNS)
        )
        dpre = _split_runs(dout, BLOCK_C, RUNS) + _split_runs(dout_after, BLOCK_C, RUNS)
        gradients = ()
        for k in tl.static_range(11):  # a run, and the three steps after it that need it
            gradient = dpre[k]
            if SILU:
                pre = w0 * x[5 + k] + w1 * x[6 + k] + w2 * x[7 + k] + w3 * x[8 + k]
                gradient *= _silu_gradient(pre + bias[:, None], ASSEMBLY)
            if k < 8:
                d0 += gradient * x[5 + k]
                d1 += gradient * x[6 + k]
                d2 += gradient * x[7 + k]
                d3 += gradient * x[8 + k]
                dbias += gradient
            gradients = gradients + (gradient,)  # noqa: RUF005
        results = ()
        for k in tl.static_range(8):
            dx = w3 * gradients[k] + w2 * gradients[k + 1]
            dx += w1 * gradients[k + 2] + w0 * gradients[k + 3]
            results = results + (dx,)  # noqa: RUF005
        dx = _join_runs(results, BLOCK_C, RUNS)
        tl.store(dx_row + time[None, :], dx.to(dx_ptr.dtype.element_ty), mask=mask)
    at = partial_ptr + part.to(tl.int64) * 5 * channels + channel
    tl.store(at, tl.sum(d0, 1), mask=live)
    tl.store(at + channels, tl.sum(d1, 1), mask=live)
    tl.store(at + 2 * channels, tl.sum(d2, 1), mask=live)
    tl.store(at + 3 * channels, tl.sum(d3, 1), mask=live)
    tl.store(at + 4 * channels, tl.sum(dbias, 1), mask=live)


@triton.jit
def _step_before(x_at, back, begin, seqlen, stride_time, live):
    """Return x `back` steps before a run's begin; zero where there is no such step."""
    mask = live & (begin >= back) & (begin - back < seqlen)
    return tl.load(x_at - back * stride_time, mask=mask, other=0.0).to(tl.float32)


@triton.jit
def conv_channels_forward(
    x_ptr, weight_ptr, bias_ptr, out_ptr,
    channels, seqlen, stride_x_batch, stride_x_time, stride_out_batch, stride_out_time,
    stride_weight_channel, stride_weight_tap,
    TAPS: tl.constexpr, HAS_BIAS: tl.constexpr, SILU: tl.constexpr, ASSEMBLY: tl.constexpr,
    ROWS: tl.constexpr, BLOCK_C: tl.constexpr, STEPS: tl.constexpr, AHEAD: tl.constexpr,
):  # fmt: skip
    """Convolve BLOCK_C channels over ROWS runs of STEPS steps; channels are contiguous.

    AHEAD steps are loaded before they are used; it divides STEPS.
    """
    pid = tl.program_id(0)
    channel_blocks = tl.cdiv(channels, BLOCK_C)
    time_blocks = tl.cdiv(seqlen, ROWS * STEPS)
    batch = (pid // (time_blocks * channel_blocks)).to(tl.int64)
    channel = pid % channel_blocks * BLOCK_C + tl.arange(0, BLOCK_C)
    live = channel < channels
    begin = (pid // channel_blocks % time_blocks * ROWS + tl.arange(0, ROWS)) * STEPS
    begin = begin.to(tl.int64)[:, None]
    bias = tl.zeros([BLOCK_C], tl.float32)
    if HAS_BIAS:
        bias = tl.load(bias_ptr + channel, mask=live, other=0.0).to(tl.float32)
    w0 = _load_tap(weight_ptr, channel, live, 0, stride_weight_channel, stride_weight_tap, TAPS)
    w1 = _load_tap(weight_ptr, channel, live, 1, stride_weight_channel, stride_weight_tap, TAPS)
    w2 = _load_tap(weight_ptr, channel, live, 2, stride_weight_channel, stride_weight_tap, TAPS)
    w3 = _load_tap(weight_ptr, channel, live, 3, stride_weight_channel, stride_weight_tap, TAPS)
    w0, w1, w2, w3, bias = w0[None, :], w1[None, :], w2[None, :], w3[None, :], bias[None, :]
    x_at = x_ptr + batch * stride_x_batch + begin * stride_x_time + channel[None, :]
    out_at = out_ptr + batch * stride_out_batch + begin * stride_out_time + channel[None, :]
    live = live[None, :]
    x0 = _step_before(x_at, 3, begin, seqlen, stride_x_time, live)
    x1 = _step_before(x_at, 2, begin, seqlen, stride_x_time, live)
    x2 = _step_before(x_at, 1, begin, seqlen, stride_x_time, live)
    for step in range(0, STEPS, AHEAD):
        loaded = ()
        for i in tl.static_range(AHEAD):
            mask = live & (begin + (step + i) < seqlen)
            value = tl.load(x_at + (step + i) * stride_x_time, mask=mask, other=0.0)
            loaded = loaded + (value,)  # noqa: RUF005
        for i in tl.static_range(AHEAD):
            x3 = loaded[i].to(tl.float32)
            out = bias + w0 * x0 + w1 * x1 + w2 * x2 + w3 * x3
            if SILU:
                out *= sigmoid(out, ASSEMBLY)
            mask = live & (begin + (step + i) < seqlen)
            at = out_at + (step + i) * stride_out_time
            tl.store(at, out.to(out_ptr.dtype.element_ty), mask=mask)
            x0, x1, x2 = x1, x2, x3


@triton.jit
def conv_channels_backward(
    x_ptr, weight_ptr, bias_ptr, dout0_ptr, dout1_ptr, dout2_ptr, dx_ptr, partial_ptr,
    channels, seqlen, width0, width1, width2, segments,
    stride_x_batch, stride_x_time,
    stride0_batch, stride0_time, stride1_batch, stride1_time, stride2_batch, stride2_time,
    stride_dx_batch, stride_dx_time, stride_weight_channel, stride_weight_tap,
    TAPS: tl.constexpr, HAS_BIAS: tl.constexpr, SILU: tl.constexpr, ASSEMBLY: tl.constexpr,
    PARTS: tl.constexpr,
    ROWS: tl.constexpr, BLOCK_C: tl.constexpr, STEPS: tl.constexpr, AHEAD: tl.constexpr,
):  # fmt: skip
    """Go back through BLOCK_C channels over ROWS runs of STEPS steps; channels are contiguous.

    The output's gradient comes in PARTS tensors of consecutive channels, `width`s of them. partial
    (B * segments, 5, C) fp32 gets the program's part of the gradients of the four taps and the
    bias. AHEAD steps are loaded before they are used; it divides STEPS.
    """
    pid = tl.program_id(0)
    blocks0 = tl.cdiv(width0, BLOCK_C)
    channel_blocks = blocks0
    if PARTS > 1:
        channel_blocks += tl.cdiv(width1, BLOCK_C)
    if PARTS > 2:
        channel_blocks += tl.cdiv(width2, BLOCK_C)
    part = pid // channel_blocks  # (batch, segment)
    batch = (part // segments).to(tl.int64)
    begin = (part % segments * ROWS + tl.arange(0, ROWS)) * STEPS
    begin = begin.to(tl.int64)[:, None]
    block = pid % channel_blocks
    dout_ptr, stride_batch, stride_time = dout0_ptr, stride0_batch, stride0_time
    offset, width, first = block * 0, width0, block
    if PARTS > 1:
        blocks1 = tl.cdiv(width1, BLOCK_C)
        second = block >= blocks0
        dout_ptr = tl.where(second, dout1_ptr, dout_ptr)
        stride_batch = tl.where(second, stride1_batch, stride_batch)
        stride_time = tl.where(second, stride1_time, stride_time)
        offset = tl.where(second, width0, offset)
        width = tl.where(second, width1, width)
        first = tl.where(second, block - blocks0, first)
        if PARTS > 2:
            third = block >= blocks0 + blocks1
            dout_ptr = tl.where(third, dout2_ptr, dout_ptr)
            stride_batch = tl.where(third, stride2_batch, stride_batch)
            stride_time = tl.where(third, stride2_time, stride_time)
            offset = tl.where(third, width0 + width1, offset)
            width = tl.where(third, width2, width)
            first = tl.where(third, block - blocks0 - blocks1, first)
    in_part = first * BLOCK_C + tl.arange(0, BLOCK_C)
    live = in_part < width
    channel = offset + in_part
    bias = tl.zeros([BLOCK_C], tl.float32)
    if HAS_BIAS:
        bias = tl.load(bias_ptr + channel, mask=live, other=0.0).to(tl.float32)
    w0 = _load_tap(weight_ptr, channel, live, 0, stride_weight_channel, stride_weight_tap, TAPS)
    w1 = _load_tap(weight_ptr, channel, live, 1, stride_weight_channel, stride_weight_tap, TAPS)
    w2 = _load_tap(weight_ptr, channel, live, 2, stride_weight_channel, stride_weight_tap, TAPS)
    w3 = _load_tap(weight_ptr, channel, live, 3, stride_weight_channel, stride_weight_tap, TAPS)
    w0, w1, w2, w3, bias = w0[None, :], w1[None, :], w2[None, :], w3[None, :], bias[None, :]
    x_at = x_ptr + batch * stride_x_batch + begin * stride_x_time + channel[None, :]
    dx_at = dx_ptr + batch * stride_dx_batch + begin * stride_dx_time + channel[None, :]
    dout_at = dout_ptr + batch * stride_batch + begin * stride_time + in_part[None, :]
    alive = live[None, :]
    x0 = _step_before(x_at, 3, begin, seqlen, stride_x_time, alive)
    x1 = _step_before(x_at, 2, begin, seqlen, stride_x_time, alive)
    x2 = _step_before(x_at, 1, begin, seqlen, stride_x_time, alive)
    g0 = tl.zeros([ROWS, BLOCK_C], tl.float32)  # the gradients of the last three `pre`
    g1, g2 = g0, g0
    d0, d1, d2, d3, dbias = g0, g0, g0, g0, g0
    for step in range(0, STEPS, AHEAD):
        loaded, given = (), ()
        for i in tl.static_range(AHEAD):
            mask = alive & (begin + (step + i) < seqlen)
            value = tl.load(x_at + (step + i) * stride_x_time, mask=mask, other=0.0)
            loaded = loaded + (value,)  # noqa: RUF005
            value = tl.load(dout_at + (step + i) * stride_time, mask=mask, other=0.0)
            given = given + (value,)  # noqa: RUF005
        for i in tl.static_range(AHEAD):
            x3, g3 = loaded[i].to(tl.float32), given[i].to(tl.float32)
            if SILU:
                pre = bias + w0 * x0 + w1 * x1 + w2 * x2 + w3 * x3
                g3 *= _silu_gradient(pre, ASSEMBLY)
            d0 += g3 * x0
            d1 += g3 * x1
            d2 += g3 * x2
            d3 += g3 * x3
            dbias += g3
            dx = w3 * g0 + w2 * g1 + w1 * g2 + w0 * g3  # of three steps ago
            # Those before the run are the run before's.
            mask = alive & (step + i >= 3) & (begin + (step + i - 3) < seqlen)
            at = dx_at + (step + i - 3) * stride_dx_time
            tl.store(at, dx.to(dx_ptr.dtype.element_ty), mask=mask)
            x0, x1, x2 = x1, x2, x3
            g0, g1, g2 = g1, g2, g3
    for i in tl.static_range(3):  # the run's last steps need what comes after them
        mask = alive & (begin + (STEPS + i) < seqlen)
        x3 = tl.load(x_at + (STEPS + i) * stride_x_time, mask=mask, other=0.0).to(tl.float32)
        g3 = tl.load(dout_at + (STEPS + i) * stride_time, mask=mask, other=0.0).to(tl.float32)
        if SILU:
            pre = bias + w0 * x0 + w1 * x1 + w2 * x2 + w3 * x3
            g3 *= _silu_gradient(pre, ASSEMBLY)
        dx = w3 * g0 + w2 * g1 + w1 * g2 + w0 * g3
        mask = alive & (begin + (STEPS + i - 3) < seqlen)
        at = dx_at + (STEPS + i - 3) * stride_dx_time
        tl.store(at, dx.to(dx_ptr.dtype.element_ty), mask=mask)
        x0, x1, x2 = x1, x2, x3
        g0, g1, g2 = g1, g2, g3
    at = partial_ptr + part.to(tl.int64) * 5 * channels + channel
    tl.store(at, tl.sum(d0, 0), mask=live)
    tl.store(at + channels, tl.sum(d1, 0), mask=live)
    tl.store(at + 2 * channels, tl.sum(d2, 0), mask=live)
    tl.store(at + 3 * channels, tl.sum(d3, 0), mask=live)
    tl.store(at + 4 * channels, tl.sum(dbias, 0), mask=live)


@triton.jit
def conv_sum_partials(
    partial_ptr, dweight_ptr, dbias_ptr, parts, channels,
    TAPS: tl.constexpr, HAS_BIAS: tl.constexpr, BLOCK_P: tl.constexpr, BLOCK_C: tl.constexpr,
):  # fmt: skip
    """Add up the partial sums of one tap, or of the bias, in a fixed order.

    partial (parts, 5, C); dweight (C, TAPS) with the taps far apart, that is (TAPS, C); dbias (C,).
    """
    kind = tl.program_id(1) + (4 - TAPS)
    channel = tl.program_id(0) * BLOCK_C + tl.arange(0, BLOCK_C)
    part = tl.arange(0, BLOCK_P)
    live = channel < channels
    total = tl.zeros([BLOCK_P, BLOCK_C], tl.float32)
    at = partial_ptr + (part.to(tl.int64)[:, None] * 5 + kind) * channels + channel[None, :]
    for first in range(0, parts, BLOCK_P):
        mask = (first + part < parts)[:, None] & live[None, :]
        total += tl.load(at, mask=mask, other=0.0)
        at += BLOCK_P * 5 * channels
    summed = tl.sum(total, 0)
    if kind < 4:
        weight_at = dweight_ptr + (kind - (4 - TAPS)) * channels + channel
        tl.store(weight_at, summed.to(dweight_ptr.dtype.element_ty), mask=live)
    if HAS_BIAS:  # noqa: SIM102 (known when compiling)
        if kind == 4:
            tl.store(dbias_ptr + channel, summed.to(dbias_ptr.dtype.element_ty), mask=live)
