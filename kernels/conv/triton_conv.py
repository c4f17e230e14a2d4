"""Causal depthwise convolution on the GPU in Triton: the public operation, and its launches.

The kernels and their mathematics are in `triton_kernels`, the division into programs in
`triton_config`. fp32, fp16 and bf16, computed in fp32; any length and number of channels, odd ones
too; 1 to 4 taps; compute capability 8.0 or newer. The same bits from run to run.
"""

from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from mambench.kernels.activations import assembly
from mambench.kernels.conv import triton_kernels
from mambench.kernels.conv.arguments import (
    CONV_OPTIONS,
    CONV_TENSORS,
    check_activation,
    check_arguments,
)
from mambench.kernels.conv.triton_config import (
    TIME_BACKWARD,
    TIME_FORWARD,
    ChannelConfig,
    TimeConfig,
    channel_config,
    time_segment,
)
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

DTYPES = (torch.float32, torch.float16, torch.bfloat16)
_SUM_PARTS, _SUM_CHANNELS = 16, 64


def causal_conv1d(
    x: Tensor, weight: Tensor, bias: Tensor | None = None, activation: str | None = None
) -> Tensor:
    """Return x convolved along time with each channel's own taps, differentiable once.

    Args:
        x: (B, C, L), fp32, fp16 or bf16; copied unless time or channels are contiguous.
        weight: (C, W), at most 4 taps, the last one for the current step; any floating dtype.
        bias: (C,).
        activation: None or "silu".

    Returns:
        (B, C, L) in x's dtype, dense, with time contiguous where x has it so, else channels.

    Raises:
        ValueError, TypeError: see `check_arguments`; x is of none of the dtypes above.
    """
    check_activation(activation)
    tensors, options = (x, weight, bias), (activation == "silu",)
    if is_traced():
        _check(tensors)  # of an eager call the first of a kind does
        return _traced(tensors, options)[0]
    if needs_gradient(tensors):
        return _CausalConv.apply(*options, *tensors)
    return conv_forward(*tensors, *options)


def _check(tensors: Tensors) -> None:
    check_arguments(*tensors[:3])
    if tensors[0].dtype not in DTYPES:
        raise TypeError(f"x: expected float32, float16 or bfloat16, got {tensors[0].dtype}")


class _CausalConv(torch.autograd.Function):
    """Saves its inputs alone."""

    @staticmethod
    def forward(ctx: Any, silu: bool, *tensors: Tensor | None) -> Tensor:
        ctx.save_for_backward(*tensors)
        ctx.silu = silu
        return conv_forward(*tensors, silu)  # pyright: ignore[reportArgumentType]

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dout: Tensor) -> tuple[Tensor | None, ...]:
        x, weight, bias = ctx.saved_tensors
        return (None, *conv_backward(x, weight, bias, (dout,), ctx.silu))


def conv_forward(x: Tensor, weight: Tensor, bias: Tensor | None, silu: bool) -> Tensor:
    """Run the forward; arguments and result as of `causal_conv1d`."""
    x = _strided(x)
    (out,) = _forward((x, weight, bias), (silu,))
    assert out is not None
    return out if _time_contiguous(x) else out.transpose(1, 2)


def conv_backward(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    dout: tuple[Tensor, ...],
    silu: bool,
    *,
    more: Tensor | None = None,
    dx: Tensor | None = None,
) -> tuple[Tensor, Tensor, Tensor | None]:
    """Return the gradients of x, weight and bias.

    Args:
        x, weight, bias, silu: as the forward took them.
        dout: the output's gradient, or that of two or three ranges of consecutive channels, each
            (B, c, L); ranges where channels are contiguous only.
        more: (B, C, L), to be added to dout; where time is contiguous only.
        dx: where to put the gradient of x; of x's dtype and shape, and unit stride where x has it.

    Raises:
        ValueError: ranges or `more` in the other layout, or more than three ranges.
    """
    x = _strided(x)
    if _time_contiguous(x):
        if len(dout) != 1:
            raise ValueError(f"dout: expected one tensor for contiguous time, got {len(dout)}")
        given = tuple(None if t is None else _unit(t, 2) for t in (dout[0], more))
        found = _time_backward((x, weight, bias, *given, dx), (silu,))
    else:
        if more is not None or len(dout) > 3:
            raise ValueError("expected up to three tensors dout, and `more` with time contiguous")
        ranges = [_unit(t, 1) for t in dout] + [None] * (3 - len(dout))
        found = _channel_backward((x, weight, bias, *ranges, dx), (silu,))
    made, dweight, dbias = found
    assert made is not None
    assert dweight is not None
    if dx is None and not _time_contiguous(x):
        made = made.transpose(1, 2)
    return made, dweight.T, dbias


def _time_contiguous(x: Tensor) -> bool:
    return x.stride(2) == 1


def _strided(x: Tensor) -> Tensor:
    return x if x.dim() != 3 or x.stride(2) == 1 or x.stride(1) == 1 else x.contiguous()


def _unit(tensor: Tensor, axis: int) -> Tensor:
    """Return the tensor with unit stride along the axis; copies only where it has not."""
    if tensor.stride(axis) == 1:
        return tensor
    return tensor.transpose(axis, 2).contiguous().transpose(axis, 2)


def _ready(tensors: Tensors, options: Options) -> Tensors:
    _check(tensors)
    return tensors


def _run_forward(
    recording: Recording, tensors: Tensors, options: Options,
    config: TimeConfig | ChannelConfig | None = None,
) -> Any:  # fmt: skip
    x, weight, bias = tensors
    batch, channels, seqlen = x.shape
    flags = _flags(weight, bias, options)
    if _time_contiguous(x):
        tile = config or TIME_FORWARD
        assert isinstance(tile, TimeConfig)
        out = recording.output((batch, channels, seqlen), x.dtype, x.device)
        programs = batch * _ceil(channels, tile.block_c) * _ceil(seqlen, tile.block_t)
        recording.launch(
            triton_kernels.conv_time_forward,
            (programs,),
            (x, weight, bias, out, channels, seqlen, *x.stride()[:2], *out.stride()[:2],
             *weight.stride()),
            flags | {"BLOCK_C": tile.block_c, "BLOCK_T": tile.block_t},
            num_warps=tile.warps,
        )  # fmt: skip
        return (out,)
    runs = config or channel_config(batch=batch, channels=channels, seqlen=seqlen, backward=False)
    assert isinstance(runs, ChannelConfig)
    out = recording.output((batch, seqlen, channels), x.dtype, x.device)
    blocks = _ceil(channels, runs.block_c) * _ceil(seqlen, runs.rows * runs.steps)
    recording.launch(
        triton_kernels.conv_channels_forward,
        (batch * blocks,),
        (x, weight, bias, out, channels, seqlen, x.stride(0), x.stride(2), *out.stride()[:2],
         *weight.stride()),
        flags | _walk(runs),
        num_warps=runs.warps,
    )  # fmt: skip
    return (out,)


def _flags(weight: Tensor, bias: Tensor | None, options: Options) -> dict[str, Any]:
    return {
        "TAPS": weight.shape[1],
        "HAS_BIAS": bias is not None,
        "SILU": options[0],
        "ASSEMBLY": assembly(),
    }


def _walk(config: ChannelConfig) -> dict[str, int]:
    return {
        "ROWS": config.rows,
        "BLOCK_C": config.block_c,
        "STEPS": config.steps,
        "AHEAD": config.ahead,
    }


def _run_time_backward(
    recording: Recording, tensors: Tensors, options: Options, config: TimeConfig | None = None
) -> Any:
    x, weight, bias, dout, more, dx = tensors
    batch, channels, seqlen = x.shape
    tile = config or TIME_BACKWARD
    segment = time_segment(batch=batch, channels=channels, seqlen=seqlen, config=tile)
    segments = _ceil(seqlen, segment)
    if dx is None:
        dx = recording.output((batch, channels, seqlen), x.dtype, x.device)
    partial = _partial(recording, batch * segments, channels, x)
    more_strides = (0, 0) if more is None else more.stride()[:2]
    recording.launch(
        triton_kernels.conv_time_backward,
        (batch * segments * _ceil(channels, tile.block_c),),
        (x, weight, bias, dout, more, dx, partial, channels, seqlen, segment, segments,
         *x.stride()[:2], *dout.stride()[:2], *more_strides, *dx.stride()[:2], *weight.stride()),
        {
            "HAS_MORE": more is not None, "BLOCK_C": tile.block_c, "BLOCK_T": tile.block_t,
        } | _flags(weight, bias, options),
        num_warps=tile.warps,
    )  # fmt: skip
    return dx, *_sum_partials(recording, partial, weight, bias)


def _run_channel_backward(
    recording: Recording, tensors: Tensors, options: Options, config: ChannelConfig | None = None
) -> Any:
    x, weight, bias, *ranges, dx = tensors
    batch, channels, seqlen = x.shape
    given = [t for t in ranges if t is not None]
    widths = [t.shape[1] for t in given]
    runs = config or channel_config(batch=batch, channels=channels, seqlen=seqlen, backward=True)
    segments = _ceil(seqlen, runs.rows * runs.steps)
    out = dx
    if out is None:
        out = recording.output((batch, seqlen, channels), x.dtype, x.device)
        dx = out.transpose(1, 2)
    partial = _partial(recording, batch * segments, channels, x)
    strides = [s for t in given for s in (t.stride(0), t.stride(2))]
    missing = 3 - len(given)
    recording.launch(
        triton_kernels.conv_channels_backward,
        (batch * segments * sum(_ceil(width, runs.block_c) for width in widths),),
        (x, weight, bias, *ranges, dx, partial, channels, seqlen, *widths, *[0] * missing,
         segments, x.stride(0), x.stride(2), *strides, *[0] * 2 * missing,
         dx.stride(0), dx.stride(2), *weight.stride()),
        {
            "PARTS": len(given)
        } | _flags(weight, bias, options) | _walk(runs),
        num_warps=runs.warps,
    )  # fmt: skip
    return out, *_sum_partials(recording, partial, weight, bias)


def _partial(recording: Recording, parts: int, channels: int, x: Tensor) -> Tensor:
    return recording.scratch((parts, 5, channels), torch.float32, x.device)


def _sum_partials(
    recording: Recording, partial: Tensor, weight: Tensor, bias: Tensor | None
) -> tuple[Tensor, Tensor | None]:
    """Return the gradients of the weight, (W, C), and of the bias."""
    channels, taps = weight.shape
    dweight = recording.output((taps, channels), weight.dtype, weight.device)
    dbias = None if bias is None else recording.output((channels,), bias.dtype, bias.device)
    recording.launch(
        triton_kernels.conv_sum_partials,
        (_ceil(channels, _SUM_CHANNELS), taps + (bias is not None)),
        (partial, dweight, dbias, partial.shape[0], channels),
        {
            "TAPS": taps, "HAS_BIAS": bias is not None,
            "BLOCK_P": _SUM_PARTS, "BLOCK_C": _SUM_CHANNELS,
        },
        num_warps=4,
    )  # fmt: skip
    return dweight, dbias


def _ceil(a: int, b: int) -> int:
    return -(-a // b)


_forward = Calls(_run_forward, _ready)
_time_backward = Calls(_run_time_backward, lambda tensors, options: tensors)
_channel_backward = Calls(_run_channel_backward, lambda tensors, options: tensors)


def _traced_forward(tensors: Tensors, options: Options, keep: bool) -> Results:
    out = conv_forward(*tensors, *options)
    return out, out.new_empty(0), out.new_empty(0)


def _traced_shapes(tensors: Tensors, options: Options, keep: bool) -> Results:
    x = tensors[0]
    batch, channels, seqlen = x.shape
    if _time_contiguous(_strided(x)):
        out = x.new_empty((batch, channels, seqlen))
    else:
        out = x.new_empty((batch, seqlen, channels)).transpose(1, 2)
    return out, x.new_empty(0), x.new_empty(0)


def _traced_backward(
    dout: Tensor | None, _: Tensor | None, kept: Tensor, tensors: Tensors, options: Options
) -> list[Tensor]:
    x, weight, bias = tensors
    dout = torch.zeros_like(x) if dout is None else dout
    found = conv_backward(x, weight, bias, (dout,), *options)
    return [gradient for gradient in found if gradient is not None]


_traced = register(
    Operation(
        name="causal_conv1d_triton",
        tensors=CONV_TENSORS,
        options=CONV_OPTIONS,
        forward=_traced_forward,
        shapes=_traced_shapes,
        backward=_traced_backward,
    )
)
