"""One token of s6 and ssd in place, in Triton: the kernels.

    dt = softplus(dt_raw + dt_bias)                         softplus where asked for
    state = exp(dt A) state + dt x B^T
    y = (state C + D x) * silu(z)

Mamba (Gu and Dao 2023), equation 2; Transformers are SSMs (Dao and Gu 2024), equation 1. The state
is read and written once, in its own dtype; everything is computed in fp32, y from the state before
it is rounded. The state is nearly all that is moved, so a program takes a tile of whole rows of N
states, whose loads a thread issues 16 bytes at a time and all before the first is used. D and z are
loaded there too: nothing is moved before a store, and behind it each would wait for memory again.

- ssd: a program is ROWS of the P rows of a head of one sequence: the decay, a scalar per head, is
  one exponential for all of them.
- s6: a program is ROWS channels of SEQUENCES sequences: A, of which every element has its own
  exponential, is as large as fp32 states, and is read once for all of the program's sequences.

Shapes: state (B, H, P, N) or (B, D, N); x, z, out (B, H, P) or (B, D); dt (B, H) or (B, D); A (H,)
or (D, N); B, C (B, G, N); D, dt_bias (H,) or (D,) fp32. Only the batch is strided. 64-bit offsets.
"""

import triton
import triton.language as tl

from mambench.kernels.rounding import rounded_product

LOG2E = tl.constexpr(1.4426950408889634)


@triton.jit
def softplus(x):
    """log(1 + exp(x)) to fp32 accuracy also where it is small.

    log1p(e) = 2 atanh(s) with s = e / (2 + e) <= 1/3: the series to s^15 is exact to 1e-9.
    """
    e = tl.exp2(-tl.abs(x) * LOG2E)
    s = e / (2.0 + e)
    s2 = s * s
    series = s2 * (1.0 / 15.0) + 1.0 / 13.0
    series = series * s2 + 1.0 / 11.0
    series = series * s2 + 1.0 / 9.0
    series = series * s2 + 1.0 / 7.0
    series = series * s2 + 1.0 / 5.0
    series = series * s2 + 1.0 / 3.0
    return tl.maximum(x, 0.0) + 2.0 * s * (series * s2 + 1.0)


@triton.jit
def silu(x):
    """x / (1 + exp(-x)); exp(-|x|) cannot overflow, and neither branch cancels."""
    e = tl.exp2(-tl.abs(x) * LOG2E)
    return x * tl.where(x >= 0.0, 1.0, e) / (1.0 + e)


@triton.jit
def ssd_update_kernel(
    # pointers
    state_ptr,
    x_ptr,
    dt_ptr,
    A_ptr,
    B_ptr,
    C_ptr,
    D_ptr,
    z_ptr,
    bias_ptr,
    out_ptr,
    # sizes and strides of the batch, in elements
    batch,
    stride_state,
    stride_x,
    stride_dt,
    stride_B,
    stride_C,
    stride_z,
    # compile-time
    HEADS: tl.constexpr,
    P: tl.constexpr,
    N: tl.constexpr,
    GROUPS: tl.constexpr,
    ROWS: tl.constexpr,
    N_PADDED: tl.constexpr,
    SEQUENCES: tl.constexpr,
    SOFTPLUS: tl.constexpr,
    EVICTION: tl.constexpr,
):
    """ROWS rows of one head of one sequence; a grid of B H ceil(P / ROWS) programs."""
    TILES: tl.constexpr = (P + ROWS - 1) // ROWS
    tile = tl.program_id(0) % TILES
    head = tl.program_id(0) // TILES % HEADS
    b = (tl.program_id(0) // (TILES * HEADS)).to(tl.int64)
    p = tile * ROWS + tl.arange(0, ROWS)
    n = tl.arange(0, N_PADDED)
    in_p, in_n = p < P, n < N
    tile_ptr = state_ptr + b * stride_state + (head * P + p)[:, None] * N + n[None, :]
    in_tile = in_p[:, None] & in_n[None, :]
    state = tl.load(tile_ptr, in_tile, other=0.0, eviction_policy=EVICTION).to(tl.float32)
    dt = tl.load(dt_ptr + b * stride_dt + head).to(tl.float32)
    if bias_ptr is not None:
        dt += tl.load(bias_ptr + head)
    shared = head // (HEADS // GROUPS) * N + n
    B = tl.load(B_ptr + b * stride_B + shared, in_n, other=0.0).to(tl.float32)
    C = tl.load(C_ptr + b * stride_C + shared, in_n, other=0.0).to(tl.float32)
    x = tl.load(x_ptr + b * stride_x + head * P + p, in_p, other=0.0).to(tl.float32)
    A = tl.load(A_ptr + head) * LOG2E
    if D_ptr is not None:
        D = tl.load(D_ptr + head)
    if z_ptr is not None:
        z = tl.load(z_ptr + b * stride_z + head * P + p, in_p, other=0.0).to(tl.float32)
    if SOFTPLUS:
        dt = softplus(dt)
    state = state * tl.exp2(dt * A) + (dt * x)[:, None] * B[None, :]
    tl.store(tile_ptr, state.to(state_ptr.dtype.element_ty), in_tile, eviction_policy=EVICTION)
    y = tl.sum(rounded_product(state, C[None, :]), 1)
    if D_ptr is not None:
        y += D * x
    if z_ptr is not None:
        y *= silu(z)
    tl.store(out_ptr + (b * HEADS + head) * P + p, y.to(out_ptr.dtype.element_ty), in_p)


@triton.jit
def s6_update_kernel(
    # pointers
    state_ptr,
    x_ptr,
    dt_ptr,
    A_ptr,
    B_ptr,
    C_ptr,
    D_ptr,
    z_ptr,
    bias_ptr,
    out_ptr,
    # sizes and strides of the batch, in elements
    batch,
    stride_state,
    stride_x,
    stride_dt,
    stride_B,
    stride_C,
    stride_z,
    # compile-time
    HEADS: tl.constexpr,  # channels
    P: tl.constexpr,  # 1
    N: tl.constexpr,
    GROUPS: tl.constexpr,
    ROWS: tl.constexpr,
    N_PADDED: tl.constexpr,
    SEQUENCES: tl.constexpr,
    SOFTPLUS: tl.constexpr,
    EVICTION: tl.constexpr,
):
    """ROWS channels of a group and SEQUENCES sequences; a grid of all tiles of all groups."""
    PER_GROUP: tl.constexpr = HEADS // GROUPS
    TILES: tl.constexpr = (PER_GROUP + ROWS - 1) // ROWS
    tile = tl.program_id(0) % (TILES * GROUPS)
    group = tile // TILES
    first = tile % TILES * ROWS
    d = group * PER_GROUP + first + tl.arange(0, ROWS)
    b = (tl.program_id(0) // (TILES * GROUPS)).to(tl.int64) * SEQUENCES + tl.arange(0, SEQUENCES)
    n = tl.arange(0, N_PADDED)
    in_d, in_n = first + tl.arange(0, ROWS) < PER_GROUP, n < N
    in_b = b < batch
    b_d, b_n = in_b[:, None] & in_d[None, :], in_b[:, None] & in_n[None, :]
    d_n = in_d[:, None] & in_n[None, :]
    in_tile = in_b[:, None, None] & d_n[None, :, :]
    tile_ptr = (
        state_ptr + (b * stride_state)[:, None, None] + (d[:, None] * N + n[None, :])[None, :, :]
    )
    state = tl.load(tile_ptr, in_tile, other=0.0, eviction_policy=EVICTION).to(tl.float32)
    A = tl.load(A_ptr + d[:, None] * N + n[None, :], d_n, other=0.0) * LOG2E
    dt = tl.load(dt_ptr + (b * stride_dt)[:, None] + d[None, :], b_d, other=0.0).to(tl.float32)
    if bias_ptr is not None:
        dt += tl.load(bias_ptr + d, in_d, other=0.0)[None, :]
    shared = group * N + n[None, :]
    B = tl.load(B_ptr + (b * stride_B)[:, None] + shared, b_n, other=0.0).to(tl.float32)
    C = tl.load(C_ptr + (b * stride_C)[:, None] + shared, b_n, other=0.0).to(tl.float32)
    x = tl.load(x_ptr + (b * stride_x)[:, None] + d[None, :], b_d, other=0.0).to(tl.float32)
    if D_ptr is not None:
        D = tl.load(D_ptr + d, in_d, other=0.0)
    if z_ptr is not None:
        z = tl.load(z_ptr + (b * stride_z)[:, None] + d[None, :], b_d, other=0.0)
    if SOFTPLUS:
        dt = softplus(dt)
    decay = tl.exp2(dt[:, :, None] * A[None, :, :])
    state = state * decay + (dt * x)[:, :, None] * B[:, None, :]
    tl.store(tile_ptr, state.to(state_ptr.dtype.element_ty), in_tile, eviction_policy=EVICTION)
    y = tl.sum(rounded_product(state, C[:, None, :]), 2)
    if D_ptr is not None:
        y += D[None, :] * x
    if z_ptr is not None:
        y *= silu(z.to(tl.float32))
    tl.store(out_ptr + (b * HEADS)[:, None] + d[None, :], y.to(out_ptr.dtype.element_ty), b_d)
