"""RMS norm on the GPU in Triton, gated by SiLU or not: the public operation, and its launches.

The kernels and their mathematics are in `triton_kernels`, the division into programs in
`triton_config`. fp32, fp16 and bf16, computed in fp32; any number of rows of up to 32,768 values;
compute capability 8.0 or newer. The same bits from run to run.
"""

from functools import lru_cache
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from mambench.kernels.activations import assembly
from mambench.kernels.norm import triton_kernels
from mambench.kernels.norm.arguments import NORM_OPTIONS, NORM_TENSORS, check_arguments
from mambench.kernels.norm.triton_config import Config, choose, programs
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
_SUM_PARTS, _SUM_COLUMNS, _SUM_WARPS = 256, 16, 8


def rms_norm(x: Tensor, weight: Tensor, z: Tensor | None = None, *, eps: float = 1e-5) -> Tensor:
    """Return g / rms(g) * weight over the last axis, g = x silu(z) or x; differentiable once.

    Args:
        x: (..., width), fp32, fp16 or bf16; rows may be strided evenly, else they are copied.
        weight: (width,), any floating dtype.
        z: like x.
        eps: added to the mean square.

    Returns:
        (..., width) in x's dtype, contiguous.

    Raises:
        ValueError, TypeError: see `check_arguments`; x is of none of the dtypes above.
    """
    tensors = (x, weight, z)
    if is_traced():
        _check(tensors)  # of an eager call the first of a kind does
        return _traced(tensors, (eps,))[0]
    if needs_gradient(tensors):
        return _RmsNorm.apply(eps, *tensors)
    return norm_forward(x, weight, z, eps)[0]


def _check(tensors: Tensors) -> None:
    check_arguments(*tensors[:3])
    if tensors[0].dtype not in DTYPES:
        raise TypeError(f"x: expected float32, float16 or bfloat16, got {tensors[0].dtype}")


class _RmsNorm(torch.autograd.Function):
    """Saves its inputs and a number for every row."""

    @staticmethod
    def forward(ctx: Any, eps: float, *tensors: Tensor | None) -> Tensor:
        out, rstd = norm_forward(*tensors, eps)  # pyright: ignore[reportArgumentType]
        ctx.save_for_backward(*tensors, rstd)
        return out

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dout: Tensor) -> tuple[Tensor | None, ...]:
        x, weight, z, rstd = ctx.saved_tensors
        found = norm_backward(x, weight, z, rstd, dout)
        return None, found.dx, found.dweight, found.dz


class Gradients(NamedTuple):
    """What the backward returns; `out` is the forward's result again, where it was asked for."""

    dx: Tensor
    dweight: Tensor
    dz: Tensor | None
    out: Tensor | None


def norm_forward(x: Tensor, weight: Tensor, z: Tensor | None, eps: float) -> tuple[Tensor, Tensor]:
    """Return the norm, and the reciprocal root mean squares (rows,) fp32 for the backward."""
    rows = as_rows(x)
    out, rstd = _forward((rows, weight, None if z is None else as_rows(z)), (eps,))
    assert out is not None
    assert rstd is not None
    return out.view(x.shape), rstd


def norm_backward(
    x: Tensor,
    weight: Tensor,
    z: Tensor | None,
    rstd: Tensor,
    dout: Tensor,
    *,
    residual: Tensor | None = None,
    dz: Tensor | None = None,
    give_out: bool = False,
    overwrite: bool = False,
) -> Gradients:
    """Return the gradients of x, weight and z.

    Args:
        x, weight, z, rstd: of the forward.
        dout: like x.
        residual: like x; a gradient that reaches x on another way, and is added to dx.
        dz: where to put the gradient of z, else it is allocated; rows may be strided evenly.
        give_out: whether to return the forward's result, too.
        overwrite: whether the gradient of x may take dout's memory.
    """
    tensors = (x, weight, z, rstd, dout, residual, dz)
    rows = tuple(
        t if t is None or i in (1, 3) else as_rows(t) for i, t in enumerate(tensors)
    )  # fmt: skip
    dx, dweight, found, out = _backward(rows, (give_out, overwrite))
    assert dx is not None
    assert dweight is not None
    return Gradients(
        dx=dx.view(x.shape),
        dweight=dweight,
        dz=dz if dz is not None else None if found is None else found.view(x.shape),
        out=None if out is None else out.view(x.shape),
    )


def as_rows(tensor: Tensor) -> Tensor:
    """Return (..., width) as (rows, width) with unit stride along a row; copies only if it must."""
    if tensor.dim() != 2:
        tensor = tensor.reshape(-1, tensor.shape[-1])
    return tensor if tensor.stride(1) == 1 else tensor.contiguous()


def _run_forward(
    recording: Recording, tensors: Tensors, options: Options, config: Config | None = None
) -> Any:
    x, weight, z = tensors
    rows, width = x.shape
    tile = config or choose(width)
    out = recording.output((rows, width), x.dtype, x.device)
    rstd = recording.output((rows,), torch.float32, x.device)
    recording.launch(
        triton_kernels.rms_norm_forward,
        (-(-rows // tile.rows),),
        (x, z, weight, out, rstd, rows, width, *_pitches(x, z, out), *options),
        {"GATED": z is not None, "ASSEMBLY": assembly(), "ROWS": tile.rows, "BLOCK": tile.block},
        num_warps=tile.warps,
    )
    return out, rstd


def _run_backward(
    recording: Recording, tensors: Tensors, options: Options, config: Config | None = None
) -> Any:
    x, weight, z, rstd, dout, residual, dz = tensors
    rows, width = x.shape
    tile = config or choose(width)
    count = programs(rows, tile, _multiprocessors(x.device))
    give_out, overwrite = options
    # A program is done with a row of dout when it writes that of dx.
    dx = dout if overwrite else recording.output((rows, width), x.dtype, x.device)
    if z is not None and dz is None:
        dz = recording.output((rows, width), z.dtype, x.device)
    out = recording.output((rows, width), x.dtype, x.device) if give_out else None
    dweight = recording.output((width,), weight.dtype, x.device)
    partial = recording.scratch((count, width), torch.float32, x.device)
    recording.launch(
        triton_kernels.rms_norm_backward,
        (count,),
        (x, z, weight, rstd, dout, residual, dx, dz, out, partial, rows, width,
         *_pitches(x, z, dout, residual, dx, dz, out)),
        {
            "GATED": z is not None, "ASSEMBLY": assembly(), "HAS_RESIDUAL": residual is not None,
            "GIVE_OUT": out is not None, "ROWS": tile.rows, "BLOCK": tile.block,
        },
        num_warps=tile.warps,
    )  # fmt: skip
    recording.launch(
        triton_kernels.rms_norm_sum_partials,
        (-(-width // _SUM_COLUMNS),),
        (partial, dweight, count, width),
        {"BLOCK_P": _SUM_PARTS, "BLOCK": _SUM_COLUMNS},
        num_warps=_SUM_WARPS,
    )
    return dx, dweight, dz, out


def _pitches(*tensors: Tensor | None) -> tuple[int, ...]:
    """Return the strides of rows; zero for None."""
    return tuple(0 if t is None else t.stride(0) for t in tensors)


@lru_cache(maxsize=32)
def _multiprocessors(device: torch.device) -> int:
    """Return the device's number of multiprocessors; 1 for the CPU (Triton's interpreter)."""
    if device.type != "cuda":
        return 1
    return torch.cuda.get_device_properties(device).multi_processor_count


def _ready(tensors: Tensors, options: Options) -> Tensors:
    _check(tensors)
    return tensors


_forward = Calls(_run_forward, _ready)
_backward = Calls(_run_backward, lambda tensors, options: tensors)


def _traced_forward(tensors: Tensors, options: Options, keep: bool) -> Results:
    out, rstd = norm_forward(*tensors, *options)
    return out, out.new_empty(0), rstd


def _traced_shapes(tensors: Tensors, options: Options, keep: bool) -> Results:
    x = tensors[0]
    rstd = x.new_empty((x.numel() // x.shape[-1],), dtype=torch.float32)
    return x.new_empty(x.shape), x.new_empty(0), rstd


def _traced_backward(
    dout: Tensor | None, _: Tensor | None, kept: Tensor, tensors: Tensors, options: Options
) -> list[Tensor]:
    x, weight, z = tensors
    dout = torch.zeros_like(x) if dout is None else dout
    found = norm_backward(x, weight, z, kept, dout)
    return [g for g in (found.dx, found.dweight, found.dz) if g is not None]


_traced = register(
    Operation(
        name="rms_norm_triton",
        tensors=NORM_TENSORS,
        options=NORM_OPTIONS,
        forward=_traced_forward,
        shapes=_traced_shapes,
        backward=_traced_backward,
    )
)
