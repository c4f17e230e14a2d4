"""Selective scan (S6) on the GPU in Triton: the public operation and the launching of its kernels.

The kernels and their mathematics are in `triton_forward` and `triton_backward`, the division into
programs in `triton_config`. State and sums are fp32 for fp32, fp16 and bf16 inputs. Any sequence
length, number of channels and of groups; up to 256 states; compute capability 8.0 or newer.
"""

from typing import Any

import torch
import triton
from torch import Tensor
from torch.autograd.function import once_differentiable

from mambench.kernels.integers import ceil_div
from mambench.kernels.prepared import Calls, Recording
from mambench.kernels.registered import (
    Operation,
    Options,
    Results,
    Tensors,
    is_traced,
    needs_gradient,
    register,
)
from mambench.kernels.s6 import triton_backward, triton_forward
from mambench.kernels.s6.arguments import S6_OPTIONS, S6_TENSORS, check_arguments
from mambench.kernels.s6.triton_config import (
    AHEAD,
    Config,
    Cut,
    backward_cut,
    chunk_size,
    forward_cut,
    padded_states,
    scratch_size,
)

_DTYPES = (torch.float32, torch.float16, torch.bfloat16)
_SUM_BLOCK = 1024


def selective_scan(
    u: Tensor,
    delta: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    D: Tensor | None = None,
    z: Tensor | None = None,
    delta_bias: Tensor | None = None,
    delta_softplus: bool = False,
    return_last_state: bool = False,
    *,
    initial_state: Tensor | None = None,
) -> Tensor | tuple[Tensor, Tensor]:
    """Return the selective scan of u, differentiable once in every tensor argument.

    Args:
        u, delta, z: (B, D, L), all fp32, fp16 or bf16; channels may be strided, time may not.
        A: (D, N) fp32, at most 256 states.
        B, C: (B, G, N, L) or (B, N, L), u's dtype; a group serves D / G consecutive channels.
        D, delta_bias: (D,) fp32.
        delta_softplus: apply softplus to delta + delta_bias.
        return_last_state: also return the state after the last step.
        initial_state: (B, D, N), the state before the first step; None: zeros.

    Returns:
        out (B, D, L) in u's dtype, or (out, last state (B, D, N) fp32).

    Raises:
        ValueError, TypeError: see `check_arguments`; u is of none of the dtypes above.
    """
    B = B.unsqueeze(1) if B.dim() == 3 else B
    C = C.unsqueeze(1) if C.dim() == 3 else C
    tensors = (u, delta, A, B, C, D, z, delta_bias, initial_state)
    if is_traced():
        _check(tensors)  # of an eager call the first of a kind does
        out, last = _traced(tensors, (delta_softplus,))
    elif needs_gradient(tensors):
        out, last = _SelectiveScan.apply(delta_softplus, *tensors)
    else:  # without the cost of a graph node, and without states for a backward
        out, last, _ = _calls(tensors, (delta_softplus, False))
    return (out, last) if return_last_state else out


def _check(tensors: Tensors) -> None:
    check_arguments(*tensors)
    if tensors[0].dtype not in _DTYPES:
        raise TypeError(f"u: expected float32, float16 or bfloat16, got {tensors[0].dtype}")


class _SelectiveScan(torch.autograd.Function):
    """Saves the inputs and the state before every chunk."""

    @staticmethod
    def forward(ctx: Any, delta_softplus: bool, *tensors: Tensor | None) -> tuple[Tensor, Tensor]:
        out, last, kept = _calls(tensors, (delta_softplus, True))
        ctx.save_for_backward(kept, *tensors)
        ctx.delta_softplus = delta_softplus
        ctx.set_materialize_grads(False)
        return out, last

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dout: Tensor | None, dlast: Tensor | None) -> tuple[Tensor | None, ...]:
        kept, *tensors = ctx.saved_tensors
        inputs = _Inputs.of(tuple(tensors), ctx.delta_softplus)
        if dout is None:
            dout = torch.zeros_like(inputs.u)
        return (None, *scan_backward(inputs, kept, _time_contiguous(dout), dlast))


class _Inputs:
    """The operation's arguments as the kernels want them: time contiguous, parameters fp32."""

    __slots__ = (
        *("A", "B", "C", "D", "bias", "delta", "initial", "original", "sizes", "softplus", "u"),
        "z",
    )

    def __init__(
        self,
        u: Tensor,
        delta: Tensor,
        A: Tensor,
        B: Tensor,
        C: Tensor,
        D: Tensor | None,
        z: Tensor | None,
        bias: Tensor | None,
        softplus: bool,
        initial: Tensor | None = None,
    ) -> None:
        self.original = (u, delta, A, B, C, D, z, bias)
        self.initial = None if initial is None else initial.float().contiguous()
        self.u = _time_contiguous(u)
        self.delta = _time_contiguous(delta)
        self.B = _time_contiguous(B)
        self.C = _time_contiguous(C)
        self.z = None if z is None else _time_contiguous(z)
        self.A = A.float().contiguous()
        self.D = None if D is None else D.float().contiguous()
        self.bias = None if bias is None else bias.float().contiguous()
        self.softplus = softplus
        batch, d_inner, seqlen = u.shape
        self.sizes = {
            "batch": batch,
            "seqlen": seqlen,
            "d_inner": d_inner,
            "d_state": A.shape[1],
            "ngroups": B.shape[1],
        }

    @classmethod
    def of(cls, tensors: Tensors, softplus: bool) -> "_Inputs":
        """Take the operation's nine tensors, the initial state last."""
        *given, initial = tensors
        return cls(*given, softplus, initial)

    def strides(self, *names: str) -> list[int]:
        """Return all but the last stride, which is one, of the named tensors; zeros for no z."""
        strides: list[int] = []
        for name in names:
            tensor = getattr(self, name)
            strides += [0, 0] if tensor is None else tensor.stride()[:-1]
        return strides

    def flags(self) -> dict[str, bool]:
        """Return the compile-time switches that all kernels share."""
        return {
            "HAS_BIAS": self.bias is not None,
            "SOFTPLUS": self.softplus,
            "ASSEMBLY": not triton.knobs.runtime.interpret,
        }


def scan_forward(
    recording: Recording, inputs: _Inputs, *, keep: bool, config: Config | None = None
) -> tuple[Tensor, Tensor, Tensor | None]:
    """Run the forward; with `keep` also return the states before every chunk (B, chunks, D, N)."""
    u, d_inner, d_state = inputs.u, inputs.sizes["d_inner"], inputs.sizes["d_state"]
    batch, seqlen, ngroups = u.shape[0], u.shape[2], inputs.sizes["ngroups"]
    cut = forward_cut(**inputs.sizes, config=config)
    tile = {
        "N_TRUE": d_state,
        "N": padded_states(d_state),
        "TILE": cut.config.tile,
        "BLOCK": cut.config.block,
    }
    options = {"num_warps": cut.config.warps, "num_stages": 1}
    fp32, device = torch.float32, u.device
    out = recording.output((batch, d_inner, seqlen), u.dtype, device)
    last = recording.output((batch, d_inner, d_state), fp32, device)
    every = (batch, -(-seqlen // cut.chunk), d_inner, d_state)
    kept = recording.output(every, fp32, device) if keep else None
    start = inputs.initial  # of the only segment
    place = (seqlen, d_inner, ngroups, cut.segment, cut.segments, cut.blocks)
    if cut.segments > 1:
        end, total = _segment_buffers(recording, inputs, cut)
        recording.launch(
            triton_forward.segment_end,
            (batch * (cut.segments - 1) * cut.blocks,),
            (
                *(inputs.u, inputs.delta, inputs.A, inputs.B, inputs.bias, end, total),
                *place,
                *inputs.strides("u", "delta", "B"),
            ),
            tile | inputs.flags(),
            **options,
        )
        start = recording.scratch(end.shape, fp32, device)
        if inputs.initial is not None:
            recording.refuse()
            start[:, 0].copy_(inputs.initial)
        _combine_segments(recording, inputs, cut, end, total, start, reverse=False)
    recording.launch(
        triton_forward.scan_forward,
        (batch * cut.segments * cut.blocks,),
        (
            *(inputs.u, inputs.delta, inputs.A, inputs.B, inputs.C, inputs.D, inputs.z),
            *(inputs.bias, start, out, last, kept),
            *place,
            *inputs.strides("u", "delta", "z", "B", "C"),
        ),
        tile
        | inputs.flags()
        | {
            "CHUNK": cut.chunk,
            "HAS_D": inputs.D is not None,
            "HAS_Z": inputs.z is not None,
            "SEGMENTED": cut.segments > 1,
            "HAS_FIRST": inputs.initial is not None,
            "KEEP": keep,
        },
        **options,
    )
    return out, last, kept


def _run(recording: Recording, tensors: Tensors, options: Options) -> Any:
    softplus, keep = options
    return scan_forward(recording, _Inputs.of(tensors, softplus), keep=keep)


def _ready(tensors: Tensors, options: Options) -> Tensors:
    """Check the arguments; return them with time contiguous and the parameters in fp32."""
    _check(tensors)
    inputs = _Inputs.of(tensors, options[0])
    return (
        *(inputs.u, inputs.delta, inputs.A, inputs.B, inputs.C, inputs.D, inputs.z, inputs.bias),
        inputs.initial,
    )


_calls = Calls(_run, _ready)


def scan_backward(
    inputs: _Inputs,
    kept: Tensor,
    dout: Tensor,
    dlast: Tensor | None,
    *,
    config: Config | None = None,
    adjoint_config: Config | None = None,
) -> tuple[Tensor | None, ...]:
    """Return the gradients of u, delta, A, B, C, D, z, delta_bias and the initial state.

    Without atomics. None for what is not given.
    """
    u, d_inner, d_state = inputs.u, inputs.sizes["d_inner"], inputs.sizes["d_state"]
    batch, seqlen, ngroups = u.shape[0], u.shape[2], inputs.sizes["ngroups"]
    cut = backward_cut(**inputs.sizes, config=config)
    start = _adjoint_at_segment_ends(inputs, cut, dout, dlast, adjoint_config)
    du = torch.empty((batch, d_inner, seqlen), dtype=u.dtype, device=u.device)
    ddelta = torch.empty_like(du)
    dz = None if inputs.z is None else torch.empty_like(du)
    dA = _fp32(u, batch * cut.segments, d_inner, d_state)
    dD = None if inputs.D is None else _fp32(u, batch * cut.segments, d_inner)
    dbias = None if inputs.bias is None else _fp32(u, batch * cut.segments, d_inner)
    dfirst = None if inputs.initial is None else _fp32(u, batch, d_inner, d_state)
    partial_sums = _fp32(u, cut.partials, 2, batch, ngroups, d_state, seqlen)
    dBC = torch.empty(partial_sums.shape[1:], dtype=u.dtype, device=u.device)
    programs = batch * cut.segments * ngroups * cut.partials
    N = padded_states(d_state)
    scratch = _fp32(u, programs, scratch_size(cut, d_state))
    with _on(u):
        triton_backward.scan_backward[(programs,)](
            *(inputs.u, inputs.delta, inputs.A, inputs.B, inputs.C, inputs.D, inputs.z),
            *(inputs.bias, dout, kept, start, scratch, du, ddelta, dz, dA, dD, dbias),
            *(partial_sums, dfirst),
            *(batch, seqlen, d_inner, ngroups, cut.segment, cut.segments, cut.blocks),
            cut.partials,
            *inputs.strides("u", "delta", "z"),
            *dout.stride()[:-1],
            *inputs.strides("B", "C"),
            N_TRUE=d_state,
            N=N,
            TILE=cut.config.tile,
            OUTER=cut.config.outer,
            INNER=cut.config.block // cut.config.outer,
            CHUNK=cut.chunk,
            AHEAD=AHEAD,
            HAS_D=inputs.D is not None,
            HAS_Z=inputs.z is not None,
            HAS_START=start is not None,
            HAS_FIRST=dfirst is not None,
            **inputs.flags(),
            num_warps=cut.config.warps,
            num_stages=1,
        )
        triton_backward.sum_partials[(ceil_div(dBC.numel(), _SUM_BLOCK),)](
            partial_sums, dBC, cut.partials, dBC.numel(), BLOCK=_SUM_BLOCK, num_warps=8
        )
    gradients = (du, ddelta, dA.sum(0), dBC[0], dBC[1], _summed(dD), dz, _summed(dbias), dfirst)
    return tuple(
        None if gradient is None or tensor is None else gradient.to(tensor.dtype)
        for gradient, tensor in zip(gradients, (*inputs.original, inputs.initial), strict=True)
    )


def _adjoint_at_segment_ends(
    inputs: _Inputs, cut: Cut, dout: Tensor, dlast: Tensor | None, config: Config | None
) -> Tensor | None:
    """Return what later segments pass back to each one (B, segments, D, N), or None for zero."""
    d_state, u = inputs.sizes["d_state"], inputs.u
    if cut.segments == 1:
        return None if dlast is None else dlast.float().contiguous()
    config = config or forward_cut(**inputs.sizes).config
    blocks = inputs.sizes["ngroups"] * ceil_div(
        inputs.sizes["d_inner"] // inputs.sizes["ngroups"], config.block
    )
    plain = Recording(None)
    end, total = _segment_buffers(plain, inputs, cut)
    start = torch.empty_like(end)
    if dlast is None:
        start[:, -1].zero_()
    else:
        start[:, -1].copy_(dlast)
    with _on(u):
        triton_backward.segment_adjoint[(u.shape[0] * (cut.segments - 1) * blocks,)](
            *(inputs.delta, inputs.A, inputs.C, inputs.z, inputs.bias, dout, end, total),
            *(u.shape[2], u.shape[1], inputs.sizes["ngroups"], cut.segment, cut.segments, blocks),
            *inputs.strides("delta", "z"),
            *dout.stride()[:-1],
            *inputs.strides("C"),
            N_TRUE=d_state,
            N=padded_states(d_state),
            TILE=config.tile,
            BLOCK=config.block,
            HAS_Z=inputs.z is not None,
            **inputs.flags(),
            num_warps=config.warps,
            num_stages=1,
        )
        _combine_segments(plain, inputs, cut, end, total, start, reverse=True)
    return start


def _segment_buffers(recording: Recording, inputs: _Inputs, cut: Cut) -> tuple[Tensor, Tensor]:
    """Allocate the segments' end states (B, segments, D, N) and sums of dt (B, segments, D)."""
    batch, d_inner = inputs.u.shape[:2]
    sums, device = (batch, cut.segments, d_inner), inputs.u.device
    end = recording.scratch((*sums, inputs.sizes["d_state"]), torch.float32, device)
    return end, recording.scratch(sums, torch.float32, device)


def _combine_segments(
    recording: Recording,
    inputs: _Inputs,
    cut: Cut,
    end: Tensor,
    total: Tensor,
    start: Tensor,
    *,
    reverse: bool,
) -> None:
    d_inner, d_state = inputs.A.shape
    block = 128
    recording.launch(
        triton_forward.segment_start,
        (end.shape[0] * ceil_div(d_inner * d_state, block),),
        (inputs.A, end, total, start, d_inner, cut.segments),
        {
            "REVERSE": reverse,
            "HAS_FIRST": not reverse and inputs.initial is not None,
            "N_TRUE": d_state,
            "TILE": 8,
            "BLOCK": block,
        },
        num_warps=4,
        num_stages=1,
    )


def _on(tensor: Tensor) -> Any:
    """Launch on the tensor's device; in the interpreter there is none."""
    return torch.cuda.device_of(tensor)


def _time_contiguous(tensor: Tensor) -> Tensor:
    return tensor if tensor.stride(-1) == 1 else tensor.contiguous()


def _fp32(like: Tensor, *shape: int) -> Tensor:
    return torch.empty(shape, dtype=torch.float32, device=like.device)


def _summed(parts: Tensor | None) -> Tensor | None:
    return None if parts is None else parts.sum(0)


def _traced_forward(tensors: Tensors, options: Options, keep: bool) -> Results:
    out, last, kept = _calls(tensors, (options[0], keep))
    assert out is not None
    assert last is not None
    return out, last, _fp32(out, 0) if kept is None else kept


def _traced_shapes(tensors: Tensors, options: Options, keep: bool) -> Results:
    u, A = tensors[0], tensors[2]
    batch, d_inner, seqlen = u.shape
    every = chunk_size(A.shape[1])
    kept = (batch, (seqlen + every - 1) // every, d_inner, A.shape[1]) if keep else (0,)
    return u.new_empty(u.shape), _fp32(u, batch, d_inner, A.shape[1]), _fp32(u, *kept)


def _traced_backward(
    dout: Tensor | None, dlast: Tensor | None, kept: Tensor, tensors: Tensors, options: Options
) -> list[Tensor]:
    inputs = _Inputs.of(tensors, options[0])
    dout = torch.zeros_like(inputs.u) if dout is None else _time_contiguous(dout)
    gradients = scan_backward(inputs, kept, dout, dlast)
    return [gradient for gradient in gradients if gradient is not None]


_traced = register(
    Operation(
        name="s6_triton",
        tensors=S6_TENSORS,
        options=S6_OPTIONS,
        forward=_traced_forward,
        shapes=_traced_shapes,
        backward=_traced_backward,
    )
)
