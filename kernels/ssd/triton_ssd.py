"""State-space duality (Mamba-2) in Triton: a chunked scan in two to four launches, with gradients.

For every batch element and head, with dt after bias, softplus and limits:

    state_t = exp(dt_t A) state_{t-1} + dt_t x_t B_t^T          (P, N)
    y_t     = state_t C_t + D x_t
    out_t   = y_t silu(z_t)

A chunk of Q tokens is computed with four products: the scores C B^T, weighted by the decay between
their tokens, times x; C times the state that enters the chunk; and B^T x added to the state. The
state stays in registers from chunk to chunk, so none is written to memory except at the ends of
segments, which run in parallel when batch and heads alone do not fill the GPU:

    dt_kernel       dt and its log-decay's running sum in each chunk
    state_kernel    each segment's own contribution to the state    (more than one segment only)
    prefix_kernel   what enters each segment                        (more than one segment only)
    scan_kernel     the outputs

Accumulation is in fp32; products take their operands in the input's dtype, for fp32 inputs as
three tf32 products each, which is accurate to fp32. Any seqlen; headdim to 128, d_state to 256;
fp32, fp16, bf16. A must not be positive. Deterministic.
Source: section 6 of "Transformers are SSMs" (2024).
"""

import math
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor
from torch.nn.functional import pad

from mambench.kernels.prepared import Calls, Recording
from mambench.kernels.registered import (
    Operation,
    Options,
    Results,
    Tensors,
    differentiated_once,
    is_traced,
    needs_gradient,
    register,
)
from mambench.kernels.ssd import triton_parts as parts
from mambench.kernels.ssd.arguments import (
    SSD_SEGMENTED,
    SSD_TENSORS,
    check_arguments,
    check_dtype,
)
from mambench.kernels.ssd.triton_launch import (
    Launch,
    Operands,
    plan_launch,
    run_dt,
    segment_entries,
    strides3,
)
from mambench.kernels.ssd.triton_ssd_backward import Backward
from mambench.kernels.ssd.varlen import sequence_numbers

DTYPES = (torch.float32, torch.float16, torch.bfloat16)


@triton.jit(
    do_not_specialize=["seqlen", "nchunks", "nsegments", "segment_chunks", "heads_per_group"]
)
def scan_kernel(
    x_ptr, z_ptr, B_ptr, C_ptr, D_ptr, cum_ptr, cumj_ptr, seq_ptr, entry_ptr, out_ptr, final_ptr,
    seqlen, nchunks, nsegments, segment_chunks, nheads: tl.constexpr, heads_per_group,
    stride_x_batch, stride_x_token: tl.constexpr, stride_x_head,
    stride_z_batch, stride_z_token: tl.constexpr, stride_z_head,
    stride_B_batch, stride_B_token: tl.constexpr, stride_B_group,
    stride_C_batch, stride_C_token: tl.constexpr, stride_C_group,
    P: tl.constexpr, N: tl.constexpr, Q: tl.constexpr,
    BLOCK_P: tl.constexpr, BLOCK_N: tl.constexpr, STAGES: tl.constexpr,
    D_DIMS: tl.constexpr, HAS_Z: tl.constexpr, HAS_ENTRY: tl.constexpr,
    STORE_FINAL: tl.constexpr, HAS_SEQ: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """One segment of BLOCK_P channels of one head; the state enters from its slot."""
    nblocks: tl.constexpr = (P + BLOCK_P - 1) // BLOCK_P
    segment = tl.program_id(0) // nblocks
    h = tl.program_id(1)
    b = tl.program_id(2).to(tl.int64)
    group = (h // heads_per_group).to(tl.int64)
    first = segment * segment_chunks
    count = tl.minimum(segment_chunks, nchunks - first)
    q = tl.arange(0, Q)
    p = (tl.program_id(0) % nblocks) * BLOCK_P + tl.arange(0, BLOCK_P)
    n = tl.arange(0, BLOCK_N)
    head = b * nheads + h
    x_ptr += b * stride_x_batch + h.to(tl.int64) * stride_x_head
    if HAS_Z:
        z_ptr += b * stride_z_batch + h.to(tl.int64) * stride_z_head
    B_ptr += b * stride_B_batch + group * stride_B_group
    C_ptr += b * stride_C_batch + group * stride_C_group
    out_ptr += b * seqlen * nheads * P + h * P
    tile = parts.state_offsets(n, p, N)
    tile_mask = parts.state_mask(n, p, P, N)
    state = tl.zeros([BLOCK_N, BLOCK_P], dtype=tl.float32)
    if HAS_ENTRY:
        slot = (head * nsegments + segment) * P * N
        state = tl.load(entry_ptr + slot + tile, mask=tile_mask, other=0.0).to(tl.float32)
    if D_DIMS == 1:
        skip = tl.load(D_ptr + h).to(tl.float32)
    elif D_DIMS == 2:
        skip = tl.load(D_ptr + h * P + p, mask=p < P, other=0.0).to(tl.float32)[None, :]
    causal = q[:, None] >= q[None, :]
    for k in tl.range(0, count, num_stages=STAGES, disable_licm=True):
        t0 = ((first + k) * Q).to(tl.int64)
        rows = (first + k) * Q + q < seqlen
        mask_p = parts.column_mask(rows, p, P, BLOCK_P * nblocks)
        mask_n = parts.column_mask(rows, n, N, BLOCK_N)
        offsets_x = t0 * stride_x_token + (q[:, None] * stride_x_token + p[None, :])
        offsets_B = t0 * stride_B_token + (q[:, None] * stride_B_token + n[None, :])
        offsets_C = t0 * stride_C_token + (q[:, None] * stride_C_token + n[None, :])
        x = tl.load(x_ptr + offsets_x, mask=mask_p, other=0.0)
        B = tl.load(B_ptr + offsets_B, mask=mask_n, other=0.0)
        C = tl.load(C_ptr + offsets_C, mask=mask_n, other=0.0)
        cum_row = head * nchunks * Q + t0
        cum = tl.load(cum_ptr + cum_row + q)
        cumj = tl.load(cumj_ptr + cum_row + q)
        total = tl.load(cum_ptr + cum_row + Q - 1)
        within = causal
        if HAS_SEQ:
            seq, sees, seen, whole = parts.sequence_masks(
                seq_ptr + b * seqlen, (first + k) * Q, q, rows, seqlen, Q
            )
            within = causal & (seq[:, None] == seq[None, :])

        y = tl.dot(C, state.to(x.dtype), input_precision=PRECISION)
        scores = tl.dot(C, tl.trans(B), input_precision=PRECISION)
        gap = tl.where(within, cum[:, None] - cumj[None, :], float("-inf"))
        weights = (scores * tl.exp2(gap)).to(x.dtype)
        into = tl.exp2(cum)
        if HAS_SEQ:
            into = tl.where(sees, into, 0.0)
        y = tl.dot(weights, x, acc=y * into[:, None], input_precision=PRECISION)
        xf = x.to(tl.float32)
        to_end = tl.exp2(total - cumj)
        if HAS_SEQ:
            to_end = tl.where(seen, to_end, 0.0)
            total = tl.where(whole, total, float("-inf"))
        weighted = (xf * to_end[:, None]).to(x.dtype)
        state = tl.dot(tl.trans(B), weighted, acc=state * tl.exp2(total), input_precision=PRECISION)
        if D_DIMS > 0:
            y += xf * skip
        if HAS_Z:
            offsets_z = t0 * stride_z_token + (q[:, None] * stride_z_token + p[None, :])
            z = tl.load(z_ptr + offsets_z, mask=mask_p, other=0.0).to(tl.float32)
            y *= z * parts.sigmoid(z)
        offsets_out = t0 * nheads * P + (q[:, None] * (nheads * P) + p[None, :])
        tl.store(out_ptr + offsets_out, y.to(out_ptr.dtype.element_ty), mask=mask_p)
    if STORE_FINAL and segment == nsegments - 1:
        tl.store(final_ptr + head * P * N + tile, state, mask=tile_mask)


def run_forward(
    recording: Recording,
    launch: Launch,
    tensors: Operands,
    *,
    return_final_states: bool,
    keep: bool,
    seq: Tensor | None = None,
) -> tuple[Tensor, Tensor | None, Tensor | None]:
    """Return out, the final states if wanted and, with `keep`, what enters each segment.

    seq (B, L) int32: numbers of the tokens' sequences, where a row holds several.
    """
    x, z, B, C, D = tensors.x, tensors.z, tensors.B, tensors.C, tensors.D
    tiles = launch.tiling
    out = recording.output(x.shape, x.dtype, x.device)
    final = None
    if return_final_states:
        shape = (launch.batch, launch.nheads, launch.headdim, launch.d_state)
        final = recording.output(shape, torch.float32, x.device)
    dt, A, bias, start = tensors.dt, tensors.A, tensors.dt_bias, tensors.initial_states
    cum, cumj, _ = run_dt(recording, launch, dt, A, bias, store_dt=False)
    entries = segment_entries(
        recording, launch, x, None, B, cum, cumj, start, seq=seq, reverse=False, keep=keep
    )
    grid = (launch.nsegments * launch.blocks_p, launch.nheads, launch.batch)
    arguments = (
        x, z, B, C, D, cum, cumj, seq, entries, out, final, *launch.sizes,
        *strides3(x), *strides3(z), *strides3(B), *strides3(C),
    )  # fmt: skip
    constants = {
        "P": launch.headdim, "N": launch.d_state, "Q": launch.chunk,
        "BLOCK_P": tiles.block_p, "BLOCK_N": tiles.block_n, "STAGES": tiles.scan_stages,
        "D_DIMS": 0 if D is None else D.dim(), "HAS_Z": z is not None,
        "HAS_ENTRY": entries is not None, "STORE_FINAL": final is not None,
        "HAS_SEQ": seq is not None, "PRECISION": tiles.precision,
    }  # fmt: skip
    recording.launch(scan_kernel, grid, arguments, constants, num_warps=tiles.scan_warps)
    return out, final, entries if keep else None


def _run(recording: Recording, tensors: Tensors, options: Options) -> Any:
    *given, seq = tensors
    *planned, return_final_states, keep = options
    operands = Operands.of(given)
    launch = _plan(operands.x, operands.B, tuple(planned))
    return run_forward(
        recording, launch, operands, return_final_states=return_final_states, keep=keep, seq=seq
    )


def _ready(tensors: Tensors, options: Options) -> Tensors:
    """Check the arguments, and copy those that are not laid out as the kernels read them."""
    *given, seq = tensors
    check_dtype(given[0], DTYPES)
    check_arguments(*given, options[1:3])
    return (*Operands.laid_out(*given).all(), seq)


_calls = Calls(_run, _ready)


class _Ssd(torch.autograd.Function):
    """Saves the inputs and what enters each segment, nothing of the sequence's size besides."""

    @staticmethod
    def forward(ctx: Any, options: Options, return_final: bool, *tensors: Tensor | None) -> Any:
        how = (*options, return_final, True)
        kept, (out, final, entries) = _calls.with_ready(tensors, how)
        ctx.options = options
        entries = None if entries is kept[8] else entries  # the initial states, of one segment
        ctx.save_for_backward(*kept, entries)
        ctx.set_materialize_grads(False)
        return out, final

    @staticmethod
    @differentiated_once
    def backward(ctx: Any, dout: Tensor | None, dfinal: Tensor | None) -> Any:
        *tensors, seq, entries = ctx.saved_tensors
        found = _gradients(tuple(tensors), entries, (dout, dfinal), ctx.options, seq)
        wanted = zip(found, ctx.needs_input_grad[2:-1], strict=True)
        return None, None, *(gradient if asked else None for gradient, asked in wanted), None


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
    segments: int | None = None,
) -> Tensor | tuple[Tensor, Tensor]:
    """Compute the SSD operation on a GPU; semantics of mamba_chunk_scan_combined.

    Args:
        x: (B, L, H, P), fp32, fp16 or bf16.
        dt: (B, L, H), any floating dtype.
        A: (H,), not positive.
        B: (B, L, G, N), dtype of x.
        C: (B, L, G, N), dtype of x.
        chunk_size: accepted for the interface; the kernels choose their own.
        D: (H,) or (H, P).
        z: (B, L, H, P), dtype of x.
        dt_bias: (H,).
        initial_states: (B, H, P, N); enter the first sequence of each row.
        dt_softplus: whether dt goes through softplus, after the bias.
        dt_limit: range that dt is clamped to, last.
        return_final_states: whether to return the final states too, of each row's last sequence.
        seq_idx: (B, L), integers: a new sequence, whose state is zero, begins where they change.
        cu_seqlens: (sequences + 1,), integers, for B = 1: where sequences begin and end, instead.
        segments: into how many segments time is divided; None: as fills the device.

    Returns:
        out (B, L, H, P) in x's dtype, or (out, final_states (B, H, P, N) fp32). Differentiable once
        in every floating-point tensor.

    Raises:
        ValueError: an argument has a wrong shape, dtype or device, or is beyond the kernels' sizes.
    """
    given = (x, dt, A, B, C, D, z, dt_bias, initial_states)
    traced, packed = is_traced(), seq_idx is not None or cu_seqlens is not None
    headdim, d_state = x.shape[-1], B.shape[-1]
    more_p, more_n = _missing(headdim), _missing(d_state)
    if traced or packed or more_p or more_n:  # else an eager call's first of a kind does
        check_dtype(x, DTYPES)
        check_arguments(*given, dt_limit)
    seq = sequence_numbers(x, seq_idx, cu_seqlens, check=not traced) if packed else None
    if more_p or more_n:
        given = _padded(given, more_p, more_n)
    tensors = (*given, seq)
    options = (dt_softplus, *dt_limit, segments)
    if traced:
        out, final = _traced(tensors, options)
    elif needs_gradient(given):
        out, final = _Ssd.apply(options, return_final_states, *tensors)
    else:  # without the cost of a graph node
        out, final, _ = _calls(tensors, (*options, return_final_states, False))
    if more_p or more_n:
        out = out[..., :headdim]
        final = None if final is None else final[..., :headdim, :d_state]
    return (out, final) if return_final_states else out


def _padded(tensors: Tensors, more_p: int, more_n: int) -> Tensors:
    """Add columns of zeros to whatever has headdim or d_state columns."""
    x, dt, A, B, C, D, z, dt_bias, initial_states = tensors
    x, z = pad(x, (0, more_p)), None if z is None else pad(z, (0, more_p))
    B, C = pad(B, (0, more_n)), pad(C, (0, more_n))
    D = pad(D, (0, more_p)) if D is not None and D.dim() == 2 else D
    if initial_states is not None:
        initial_states = pad(initial_states, (0, more_n, 0, more_p))
    return x, dt, A, B, C, D, z, dt_bias, initial_states


def _plan(x: Tensor, B: Tensor, options: Options) -> Launch:
    dt_softplus, lowest, highest, segments = options
    return plan_launch(x, B, dt_softplus=dt_softplus, dt_limit=(lowest, highest), segments=segments)


def _missing(size: int) -> int:
    """Return how many zero columns make a size a power of two of at least 16.

    Triton 3.6 compiles tiles with masked columns wrongly on Hopper: seen with 80 channels and 200
    states in bf16 and fp16, where the interpreter is right and the GPU is not. Columns of zeros
    change no result; what they cost, only such sizes pay.
    """
    return max(16, 1 << (size - 1).bit_length()) - size


def _traced_forward(tensors: Tensors, options: Options, keep: bool) -> Results:
    out, final, entries = _calls(tensors, (*options, True, keep))
    assert out is not None
    assert final is not None
    if entries is None or _plan(tensors[0], tensors[3], options).nsegments == 1:
        entries = final.new_empty(0)  # the initial states enter the only segment
    return out, final, entries


def _traced_shapes(tensors: Tensors, options: Options, keep: bool) -> Results:
    x, B = tensors[0], tensors[3]
    return traced_shapes(x, B, segments=_plan(x, B, options).nsegments if keep else 1)


def traced_shapes(x: Tensor, B: Tensor, *, segments: int) -> Results:
    """Return the results without values: out, the final states, what enters each segment."""
    batch, _, nheads, headdim = x.shape
    states = (headdim, B.shape[3])
    fp32: dict[str, Any] = {"dtype": torch.float32, "device": x.device}
    kept = (batch, nheads, segments, *states) if segments > 1 else (0,)
    out, final = x.new_empty(x.shape), torch.empty((batch, nheads, *states), **fp32)
    return out, final, torch.empty(kept, **fp32)


def _traced_backward(
    dout: Tensor | None, dfinal: Tensor | None, kept: Tensor, tensors: Tensors, options: Options
) -> list[Tensor]:
    *given, seq = tensors
    found = _gradients(tuple(given), kept if kept.numel() else None, (dout, dfinal), options, seq)
    return [gradient for gradient in found if gradient is not None]


_gradients = Backward(_plan)
_traced = register(
    Operation(
        name="ssd_triton",
        tensors=SSD_TENSORS,
        options=SSD_SEGMENTED,
        forward=_traced_forward,
        shapes=_traced_shapes,
        backward=_traced_backward,
    )
)
