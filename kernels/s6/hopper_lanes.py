"""Building blocks of the Hopper selective scan: widening, softplus, the scan over a warp's lanes.

All are Gluon device functions without memory access. The lane functions take tensors of layout
(channels, 32 lanes) in which every thread holds one value per channel, and are inline PTX because
Gluon has no shuffles of its own. Accumulation is fp32 throughout.
"""

from triton.experimental import gluon
from triton.experimental.gluon import language as gl


@gluon.jit
def to_fp32(x):
    """Widen to fp32; bf16 by pairs, one instruction an element (Triton: one and a half)."""
    if x.dtype == gl.bfloat16:
        bits = gl.inline_asm_elementwise(
            "shl.b32 $0, $2, 16;\nand.b32 $1, $2, 0xffff0000;",
            "=r,=r,r",
            [x],
            dtype=gl.int32,
            is_pure=True,
            pack=2,
        )
        return bits.to(gl.float32, bitcast=True)
    else:
        return x.to(gl.float32)


@gluon.jit
def softplus(x):
    """log(1 + exp(x)), relative error below 1e-6 for every x.

    log1p(e) on [0, 1] is e times a degree-7 minimax polynomial of log1p(e) / e: it keeps its
    relative accuracy for tiny dt, which lg2.approx does not, and leaves the special-function unit
    to the scan's exponentials.
    """
    e = gl.exp2(-gl.abs(x) * 1.4426950408889634)
    p = gl.fma(gl.full_like(e, -0.008539300411939621), e, 0.0440901443362236)
    p = gl.fma(p, e, -0.1076827421784401)
    p = gl.fma(p, e, 0.1774533987045288)
    p = gl.fma(p, e, -0.2449551224708557)
    p = gl.fma(p, e, 0.332754909992218)
    p = gl.fma(p, e, -0.4999740719795227)
    p = gl.fma(p, e, 0.9999998211860657)
    return gl.fma(p, e, gl.maximum(x, 0.0))


@gluon.jit
def silu(x):
    """x * sigmoid(x)."""
    denominator = 1.0 + gl.exp2(-x * 1.4426950408889634)
    return x * gl.inline_asm_elementwise(
        "rcp.approx.ftz.f32 $0, $1;",
        "=f,f",
        [denominator],
        dtype=gl.float32,
        is_pure=True,
        pack=1,
    )


@gluon.jit
def lane_above(x):
    """The value of the previous lane; lane 0 keeps its own."""
    return gl.inline_asm_elementwise(
        "shfl.sync.up.b32 $0, $1, 1, 0, 0xffffffff;",
        "=f,f",
        [x],
        dtype=gl.float32,
        is_pure=False,
        pack=1,
    )


@gluon.jit
def lane_from(x, source):
    """The value of lane `source` (int32, the same shape as x)."""
    return gl.inline_asm_elementwise(
        "shfl.sync.idx.b32 $0, $1, $2, 0x1f, 0xffffffff;",
        "=f,f,r",
        [x, source],
        dtype=gl.float32,
        is_pure=False,
        pack=1,
    )


@gluon.jit
def lane_scan(decay, end, entering, lane):
    """Return the state before each lane's run, h = decay * h_before + end_before.

    decay is over the run of the lane before, end what a lane's run ends with from a zero state,
    entering what enters lane 0; lanes 0 and 1 hold it.

    A Kogge-Stone scan of the ends moved up by one lane, whose first round takes them from where
    they are: after the round of distance o a lane covers the 2 o lanes below it. From the second
    on the shuffle's predicate is false in the lanes that already reach back to lane 0, for which
    the products of decays, which do not wait for the ends, are of no use.
    """
    return gl.inline_asm_elementwise(
        """{
        .reg .pred p, q; .reg .f32 a, b, c, d, h, t;
        shfl.sync.up.b32 t, $1, 1, 0, 0xffffffff; mul.f32 a, $1, t;
        shfl.sync.up.b32 t, a, 2, 0, 0xffffffff; mul.f32 b, a, t;
        shfl.sync.up.b32 t, b, 4, 0, 0xffffffff; mul.f32 c, b, t;
        shfl.sync.up.b32 t, c, 8, 0, 0xffffffff; mul.f32 d, c, t;
        setp.eq.s32 p, $4, 0; setp.le.s32 q, $4, 1;
        shfl.sync.up.b32 h, $2, 1, 0, 0xffffffff;
        shfl.sync.up.b32 t, $2, 2, 0, 0xffffffff;
        selp.f32 h, $3, h, p; selp.f32 t, $3, t, q;
        @!p fma.rn.f32 h, $1, t, h;
        shfl.sync.up.b32 t|p, h, 2, 0, 0xffffffff; @p fma.rn.f32 h, a, t, h;
        shfl.sync.up.b32 t|p, h, 4, 0, 0xffffffff; @p fma.rn.f32 h, b, t, h;
        shfl.sync.up.b32 t|p, h, 8, 0, 0xffffffff; @p fma.rn.f32 h, c, t, h;
        shfl.sync.up.b32 t|p, h, 16, 0, 0xffffffff; @p fma.rn.f32 h, d, t, h;
        mov.f32 $0, h;
        }""",
        "=f,f,f,f,r",
        [decay, end, entering, lane],
        dtype=gl.float32,
        is_pure=False,
        pack=1,
    )


@gluon.jit
def affine(decay_before, value_before, decay, value):
    """Compose two steps of h = decay * h + value, the earlier first."""
    return decay_before * decay, gl.fma(decay, value_before, value)


@gluon.jit
def last(_before, value):
    """The later of two values: a reduction that keeps the last one."""
    return value


@gluon.jit
def first(value, _after):
    """The earlier of two values: a reduction that keeps the first one."""
    return value


@gluon.jit
def sum_steps_over_lanes(x, LANES: gl.constexpr):
    """Sum each step over LANES (4 or 8) lanes, of a tensor whose registers are steps.

    Every LANES consecutive registers are summed over as many lanes (lane bits 0 up); the first of
    them then holds the sum of step `lane % LANES`, the rest hold nothing of use. Lanes exchange
    half of what they hold in each round, so that it costs LANES - 1 shuffles, not LANES log LANES.
    """
    if LANES == 4:
        return gl.inline_asm_elementwise(
            """{
            .reg .pred p, q; .reg .b32 l, i; .reg .f32 k0, k1, s0, s1;
            mov.u32 l, %laneid;
            and.b32 i, l, 2; setp.ne.b32 q, i, 0;
            and.b32 i, l, 1; setp.ne.b32 p, i, 0;
            selp.f32 s0, $4, $6, q; selp.f32 k0, $6, $4, q;
            selp.f32 s1, $5, $7, q; selp.f32 k1, $7, $5, q;
            shfl.sync.bfly.b32 s0, s0, 2, 0x1f, 0xffffffff;
            shfl.sync.bfly.b32 s1, s1, 2, 0x1f, 0xffffffff;
            add.f32 k0, k0, s0; add.f32 k1, k1, s1;
            selp.f32 s0, k0, k1, p; selp.f32 k0, k1, k0, p;
            shfl.sync.bfly.b32 s0, s0, 1, 0x1f, 0xffffffff;
            add.f32 $0, k0, s0;
            mov.f32 $1, 0f00000000; mov.f32 $2, 0f00000000; mov.f32 $3, 0f00000000;
            }""",
            "=&f,=&f,=&f,=&f,f,f,f,f",
            [x],
            dtype=gl.float32,
            is_pure=False,
            pack=4,
        )
    else:
        gl.static_assert(LANES == 8)
        return gl.inline_asm_elementwise(
            """{
            .reg .pred p, q, r; .reg .b32 l, i; .reg .f32 k0, k1, k2, k3, s0, s1, s2, s3;
            mov.u32 l, %laneid;
            and.b32 i, l, 4; setp.ne.b32 r, i, 0;
            and.b32 i, l, 2; setp.ne.b32 q, i, 0;
            and.b32 i, l, 1; setp.ne.b32 p, i, 0;
            selp.f32 s0, $8, $12, r; selp.f32 k0, $12, $8, r;
            selp.f32 s1, $9, $13, r; selp.f32 k1, $13, $9, r;
            selp.f32 s2, $10, $14, r; selp.f32 k2, $14, $10, r;
            selp.f32 s3, $11, $15, r; selp.f32 k3, $15, $11, r;
            shfl.sync.bfly.b32 s0, s0, 4, 0x1f, 0xffffffff;
            shfl.sync.bfly.b32 s1, s1, 4, 0x1f, 0xffffffff;
            shfl.sync.bfly.b32 s2, s2, 4, 0x1f, 0xffffffff;
            shfl.sync.bfly.b32 s3, s3, 4, 0x1f, 0xffffffff;
            add.f32 k0, k0, s0; add.f32 k1, k1, s1; add.f32 k2, k2, s2; add.f32 k3, k3, s3;
            selp.f32 s0, k0, k2, q; selp.f32 k0, k2, k0, q;
            selp.f32 s1, k1, k3, q; selp.f32 k1, k3, k1, q;
            shfl.sync.bfly.b32 s0, s0, 2, 0x1f, 0xffffffff;
            shfl.sync.bfly.b32 s1, s1, 2, 0x1f, 0xffffffff;
            add.f32 k0, k0, s0; add.f32 k1, k1, s1;
            selp.f32 s0, k0, k1, p; selp.f32 k0, k1, k0, p;
            shfl.sync.bfly.b32 s0, s0, 1, 0x1f, 0xffffffff;
            add.f32 $0, k0, s0;
            mov.f32 $1, 0f00000000; mov.f32 $2, 0f00000000; mov.f32 $3, 0f00000000;
            mov.f32 $4, 0f00000000; mov.f32 $5, 0f00000000; mov.f32 $6, 0f00000000;
            mov.f32 $7, 0f00000000;
            }""",
            "=&f,=&f,=&f,=&f,=&f,=&f,=&f,=&f,f,f,f,f,f,f,f,f",
            [x],
            dtype=gl.float32,
            is_pure=False,
            pack=8,
        )
