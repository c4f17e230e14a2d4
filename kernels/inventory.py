"""What is compiled to judge kernels without a GPU: calls of every operation at pinned sizes.

An entry is a call of a public operation. It is executed without a GPU, on tensors that have no
memory, and what it launches is compiled: so a kernel is judged with the tuning configuration,
specialisation and options that it really gets. A new kernel file needs one entry here.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import Tensor

PORTABLE = (80, 90, 100, 120)
HOPPER = (90,)

BF16, FP32 = torch.bfloat16, torch.float32


class Draw(Protocol):
    """What an entry's call gets: a maker of tensors, and a way to take gradients."""

    def __call__(self, *shape: int, dtype: torch.dtype = BF16, grad: bool = False) -> Tensor:
        """Return a tensor on the GPU that the kernels are compiled for."""
        ...

    def backward(self, out: Any) -> None:
        """Run the backward pass of an output, or of the first of several."""
        ...


@dataclass(frozen=True, kw_only=True)
class Entry:
    """One call of an operation, for one or several architectures (compute capability times 10)."""

    name: str
    call: Callable[[Draw], object]
    architectures: tuple[int, ...] = PORTABLE


def _selective_scan(
    draw: Draw,
    *,
    d_state: int = 16,
    dtype: torch.dtype = BF16,
    batch: int = 1,
    seqlen: int = 8192,
    train: bool = True,
) -> dict[str, Any]:
    """Return the arguments of a selective scan of 2048 channels with every option."""
    d_inner = 2048
    like_u = (batch, d_inner, seqlen)
    like_B = (batch, 1, d_state, seqlen)
    return {
        "u": draw(*like_u, dtype=dtype, grad=train),
        "delta": draw(*like_u, dtype=dtype, grad=train),
        "A": draw(d_inner, d_state, dtype=FP32, grad=train),
        "B": draw(*like_B, dtype=dtype, grad=train),
        "C": draw(*like_B, dtype=dtype, grad=train),
        "D": draw(d_inner, dtype=FP32, grad=train),
        "z": draw(*like_u, dtype=dtype, grad=train),
        "delta_bias": draw(d_inner, dtype=FP32, grad=train),
        "delta_softplus": True,
    }


def _ssd(
    draw: Draw, *, d_state: int = 128, headdim: int = 64, dtype: torch.dtype = BF16,
    train: bool = True, gated: bool = True, seqlen: int = 8192,
) -> dict[str, Any]:  # fmt: skip
    """Return the arguments of an SSD of 32 heads with every option."""
    nheads = 32
    like_x = (1, seqlen, nheads, headdim)
    return {
        "x": draw(*like_x, dtype=dtype, grad=train),
        "dt": draw(1, seqlen, nheads, dtype=dtype, grad=train),
        "A": draw(nheads, dtype=FP32, grad=train),
        "B": draw(1, seqlen, 1, d_state, dtype=dtype, grad=train),
        "C": draw(1, seqlen, 1, d_state, dtype=dtype, grad=train),
        "chunk_size": 64,
        "D": draw(nheads, dtype=FP32, grad=train),
        "z": draw(*like_x, dtype=dtype, grad=train) if gated else None,
        "dt_bias": draw(nheads, dtype=FP32, grad=train),
        "dt_softplus": True,
    }


def _s6_triton(draw: Draw, **sizes: Any) -> None:
    from mambench.kernels.s6.triton_scan import selective_scan

    draw.backward(selective_scan(**_selective_scan(draw, **sizes)))


def _s6_hopper(draw: Draw, **sizes: Any) -> None:
    from mambench.kernels.s6.hopper_op import selective_scan

    out = selective_scan(**_selective_scan(draw, **sizes))
    if sizes.get("train", True):
        draw.backward(out)


def _ssd_triton(draw: Draw, **sizes: Any) -> None:
    from mambench.kernels.ssd.triton_ssd import ssd

    draw.backward(ssd(**_ssd(draw, **sizes)))


def _ssd_hopper(draw: Draw, *, train: bool, **sizes: Any) -> None:
    from mambench.kernels.ssd.hopper_op import ssd

    out = ssd(**_ssd(draw, train=train, **sizes))
    if train and not sizes.get("gated", True):  # else its backward is the portable module's
        draw.backward(out)


def _associative_s6(draw: Draw) -> None:
    from mambench.kernels.scan_triton import selective_scan

    draw.backward(selective_scan(**_selective_scan(draw)))


def _associative_ssd(draw: Draw) -> None:
    from mambench.kernels.scan_triton import state_space_dual

    draw.backward(state_space_dual(**_ssd(draw)))


def _s6_update(draw: Draw) -> None:
    from mambench.kernels.state_update.triton_update import selective_state_update

    batch, d_inner, d_state = 8, 4096, 16
    selective_state_update(
        draw(batch, d_inner, d_state, dtype=FP32),
        draw(batch, d_inner),
        draw(batch, d_inner),
        draw(d_inner, d_state, dtype=FP32),
        *(draw(batch, 1, d_state), draw(batch, 1, d_state)),
        draw(d_inner, dtype=FP32),
        draw(batch, d_inner),
        draw(d_inner, dtype=FP32),
        True,
    )


def _ssd_update(draw: Draw) -> None:
    from mambench.kernels.state_update.triton_update import selective_state_update

    batch, nheads, headdim, d_state = 8, 80, 64, 128
    selective_state_update(
        draw(batch, nheads, headdim, d_state, dtype=FP32),
        draw(batch, nheads, headdim),
        draw(batch, nheads),
        draw(nheads, dtype=FP32),
        *(draw(batch, 1, d_state), draw(batch, 1, d_state)),
        draw(nheads, dtype=FP32),
        draw(batch, nheads, headdim),
        draw(nheads, dtype=FP32),
        True,
    )


def _causal_conv(draw: Draw, *, channels_last: bool) -> None:
    """Convolve as a Mamba block does, or a Mamba-2 block: the gradient comes from two places."""
    from mambench.kernels.conv.triton_conv import conv_backward, conv_forward

    if channels_last:
        x, widths = draw(1, 2048, 4352).mT, (4096, 128, 128)
        dout, more = tuple(draw(1, 2048, width).mT for width in widths), None
    else:
        x, dout, more = draw(1, 4096, 2048), (draw(1, 4096, 2048),), draw(1, 4096, 2048)
    weight, bias = draw(x.shape[1], 4), draw(x.shape[1])
    conv_forward(x, weight, bias, True)
    conv_backward(x, weight, bias, dout, True, more=more)


def _rms_norm(draw: Draw, *, gated: bool) -> None:
    """Normalise as a block does before a product, or a Mamba-2 block after its gate."""
    from mambench.kernels.norm.triton_norm import norm_backward, norm_forward

    rows, width = 2048, 4096 if gated else 2048
    x, weight, dout = draw(rows, width), draw(width), draw(rows, width)
    z, residual = (draw(rows, width), None) if gated else (None, draw(rows, width))
    _, rstd = norm_forward(x, weight, z, 1e-5)
    norm_backward(x, weight, z, rstd, dout, residual=residual, give_out=True, overwrite=True)


def _elementwise(draw: Draw) -> None:
    from mambench.kernels.elementwise.triton_elementwise import (
        gated_product,
        gated_product_backward,
        rotate_,
        rotate_back,
    )

    batch, seqlen, nheads, headdim, width = 1, 2048, 16, 128, 5440
    tables = draw(seqlen, 1, 1, headdim), draw(seqlen, 1, 1, headdim)
    rotate_(draw(batch, seqlen, 3, nheads, headdim), *tables)
    rotate_back(*(draw(batch, seqlen, nheads, headdim) for _ in range(3)), *tables)
    gated_product(draw(seqlen, 2 * width))
    gated_product_backward(draw(seqlen, 2 * width), draw(seqlen, width))


# The portable kernels on every architecture as pinned for bf16; other sizes where most run.
ENTRIES = (
    Entry(name="s6 triton bf16 N=16", call=_s6_triton),
    Entry(name="ssd triton bf16 P=64 N=128", call=_ssd_triton),
    Entry(name="s6 associative bf16 N=16", call=_associative_s6),
    Entry(name="ssd associative bf16 P=64 N=128", call=_associative_ssd),
    Entry(name="s6 update bf16 N=16", call=_s6_update),
    Entry(name="ssd update bf16 P=64 N=128", call=_ssd_update),
    Entry(name="conv bf16 time", call=lambda draw: _causal_conv(draw, channels_last=False)),
    Entry(name="conv bf16 channels", call=lambda draw: _causal_conv(draw, channels_last=True)),
    Entry(name="norm bf16", call=lambda draw: _rms_norm(draw, gated=False)),
    Entry(name="rotation and gated product bf16", call=_elementwise),
    Entry(name="norm bf16 gated", call=lambda draw: _rms_norm(draw, gated=True)),
    Entry(
        name="s6 triton fp32 N=16",
        call=lambda draw: _s6_triton(draw, dtype=FP32),
        architectures=(90,),
    ),
    Entry(
        name="s6 triton bf16 N=64",
        call=lambda draw: _s6_triton(draw, d_state=64),
        architectures=(90,),
    ),
    Entry(
        name="ssd triton bf16 P=64 N=128 without gate",
        call=lambda draw: _ssd_triton(draw, gated=False),
        architectures=(90,),
    ),
    Entry(name="s6 hopper bf16 N=16", call=_s6_hopper, architectures=HOPPER),
    Entry(
        name="s6 hopper bf16 N=128",
        call=lambda draw: _s6_hopper(draw, d_state=128),
        architectures=HOPPER,
    ),
    Entry(
        name="s6 hopper serial bf16 N=16",
        call=lambda draw: _s6_hopper(draw, batch=8, seqlen=2048, train=False),
        architectures=HOPPER,
    ),
    Entry(
        name="ssd hopper bf16 P=64 N=128",
        call=lambda draw: _ssd_hopper(draw, train=False),
        architectures=HOPPER,
    ),
    Entry(
        name="ssd hopper in two launches bf16 P=64 N=128",
        call=lambda draw: _ssd_hopper(draw, train=False, seqlen=16384),
        architectures=HOPPER,
    ),
    Entry(
        name="ssd hopper in one launch bf16 P=64 N=128",
        call=lambda draw: _ssd_hopper(draw, train=False, seqlen=512, gated=False),
        architectures=HOPPER,
    ),
    Entry(
        name="ssd hopper bf16 P=64 N=128 for a backward",
        call=lambda draw: _ssd_hopper(draw, train=True),
        architectures=HOPPER,
    ),
    Entry(
        name="ssd hopper bf16 P=64 N=128 with its backward, without gate",
        call=lambda draw: _ssd_hopper(draw, train=True, gated=False),
        architectures=HOPPER,
    ),
    Entry(
        name="ssd hopper bf16 P=64 N=128 in one segment",
        call=lambda draw: _ssd_hopper(draw, train=True, seqlen=512),
        architectures=HOPPER,
    ),
)
