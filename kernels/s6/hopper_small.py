"""Selective scan backward on Hopper: the small launches around the main one, in Triton."""

import triton
import triton.language as tl

MOVE = 1024  # states that a program of `move_states_kernel` copies


@triton.jit(
    do_not_specialize=[
        "size", "segments", "d_inner", "r_batch", "r_segment", "r_channel", "counters",
    ]
)  # fmt: skip
def pass_back_kernel(
    A_ptr, total_ptr, dlast_ptr, r_ptr, counter_ptr,
    size, segments, d_inner, r_batch, r_segment, r_channel, counters,
    D_STATE: tl.constexpr, HAS_LAST: tl.constexpr, BLOCK: tl.constexpr, AHEAD: tl.constexpr,
):  # fmt: skip
    """Make what each segment gets passed back of what each passes back of its own, in its place.

    r (B, segments, D, D_STATE), by strides; total (B, segments, D); dlast (B, D, D_STATE); size is
    dlast's. Segments are loaded AHEAD at a time. Counters are set to zero.
    """
    i = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    for begin in range(0, counters, tl.num_programs(0) * BLOCK):
        tl.store(counter_ptr + begin + i, tl.zeros([BLOCK], tl.int32), mask=begin + i < counters)
    live = i < size
    channel = i // D_STATE % d_inner
    batch = (i // D_STATE // d_inner).to(tl.int64)
    A2 = tl.load(A_ptr + i % (d_inner * D_STATE), mask=live, other=0.0) * 1.4426950408889634
    at = r_ptr + batch * r_batch + channel.to(tl.int64) * r_channel + i % D_STATE
    total_at = total_ptr + batch * segments * d_inner + channel
    r = tl.zeros([BLOCK], tl.float32)
    if HAS_LAST:
        r = tl.load(dlast_ptr + i, mask=live, other=0.0)
    for last in range(segments - 1, -1, -AHEAD):
        own, total = (), ()
        for j in tl.static_range(AHEAD):
            segment = (last - j).to(tl.int64)
            mask = live & (segment > 0)
            own = own + (tl.load(at + segment * r_segment, mask=mask, other=0.0),)  # noqa: RUF005
            total = total + (  # noqa: RUF005
                tl.load(total_at + segment * d_inner, mask=mask, other=0.0),
            )
        for j in tl.static_range(AHEAD):
            segment = (last - j).to(tl.int64)
            tl.store(at + segment * r_segment, r, mask=live & (segment >= 0))
            r = tl.exp2(total[j] * A2) * r + own[j]


@triton.jit(do_not_specialize=["seqlen", "d_inner", "spans", "segment_spans", "segments"])
def move_states_kernel(
    kept_ptr, words_ptr, head_ptr, seqlen, d_inner, spans, segment_spans, segments,
    D_STATE: tl.constexpr, SPAN: tl.constexpr, FIRST: tl.constexpr, BEFORE: tl.constexpr,
    HEADS: tl.constexpr, WORD: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """Copy the states before all spans from FIRST on, (B, spans, D, D_STATE), into du's memory.

    A program takes BLOCK states of one span. In the span BEFORE (1) or their own (0), from the
    first whole word on; if HEADS, those before segments to head (B, segments, D, D_STATE) instead.
    """
    across = tl.cdiv(d_inner * D_STATE, BLOCK)
    row = tl.program_id(0) // across
    span = row % spans
    batch = row // spans
    i = tl.program_id(0) % across * BLOCK + tl.arange(0, BLOCK)
    channel = (i // D_STATE).to(tl.int64)
    live = (i < d_inner * D_STATE) & (span >= FIRST)
    state = tl.load(kept_ptr + row.to(tl.int64) * d_inner * D_STATE + i, mask=live, other=0.0)
    if HEADS:
        head = span % segment_spans == 0
        place = (batch * segments + span // segment_spans).to(tl.int64) * d_inner * D_STATE
        tl.store(head_ptr + place + i, state, mask=live & head)
        live = live & (span % segment_spans != 0)
    place = (batch.to(tl.int64) * d_inner + channel) * seqlen + (span - BEFORE) * SPAN
    tl.store(words_ptr + (place * WORD + 3) // 4 + i % D_STATE, state, mask=live)
