"""Launches of the rotary embedding and of the SiLU-gated product; see `triton_kernels`.

fp32, fp16 and bf16, computed in fp32; compute capability 8.0 or newer. These are parts of a layer's
own gradient (see implementations/blocks), not differentiable by themselves.
"""

from typing import Any

from torch import Tensor

from mambench.kernels.activations import assembly
from mambench.kernels.elementwise import triton_kernels
from mambench.kernels.prepared import Calls, Recording
from mambench.kernels.registered import Options, Tensors

_BLOCK, _WARPS = 1024, 4


def rotate_(qkv: Tensor, cos: Tensor, sin: Tensor) -> None:
    """Rotate queries and keys by their positions, in place.

    Args:
        qkv: (B, L, 3, H, P), contiguous; values stay as they are.
        cos, sin: (L, 1, 1, P), contiguous; the sine's first half negative (`rotary_tables`).
    """
    _rotate((qkv, cos, sin), ())


def rotate_back(dq: Tensor, dk: Tensor, dv: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Return the gradient of qkv (B, L, 3, H, P) before `rotate_`, from those of q, k and v after.

    Args:
        dq, dk, dv: (B, L, H, P); copied where the last axis is not contiguous.
        cos, sin: as in `rotate_`.
    """
    dq, dk, dv = (t if t.stride(3) == 1 else t.contiguous() for t in (dq, dk, dv))
    (dqkv,) = _unrotate((dq, dk, dv, cos, sin), ())
    assert dqkv is not None
    return dqkv


def gated_product(gate_up: Tensor) -> Tensor:
    """Return silu(gate) * up, (rows, width), of gate_up (rows, 2 width), contiguous."""
    (out,) = _gated((gate_up,), ())
    assert out is not None
    return out


def gated_product_backward(gate_up: Tensor, dout: Tensor) -> tuple[Tensor, Tensor]:
    """Return the gradient of gate_up, and the product again in dout's memory; all contiguous."""
    dgate_up, out = _gated_back((gate_up, dout), ())
    assert dgate_up is not None
    assert out is not None
    return dgate_up, out


def _run_rotate(recording: Recording, tensors: Tensors, options: Options) -> Any:
    qkv, cos, sin = tensors
    batch, seqlen, _, nheads, headdim = qkv.shape
    pairs = nheads * headdim
    recording.launch(
        triton_kernels.rotary_forward,
        (batch * seqlen, -(-pairs // _BLOCK)),
        (qkv, cos, sin, seqlen, pairs),
        {"HALF": headdim // 2, "BLOCK": _BLOCK},
        num_warps=_WARPS,
    )
    return (qkv,)


def _run_unrotate(recording: Recording, tensors: Tensors, options: Options) -> Any:
    dq, dk, dv, cos, sin = tensors
    batch, seqlen, nheads, headdim = dq.shape
    pairs = nheads * headdim // 2
    dqkv = recording.output((batch, seqlen, 3, nheads, headdim), dq.dtype, dq.device)
    strides = [stride for t in (dq, dk, dv) for stride in t.stride()[:3]]
    recording.launch(
        triton_kernels.rotary_backward,
        (batch * seqlen, -(-pairs // _BLOCK)),
        (dq, dk, dv, cos, sin, dqkv, seqlen, pairs, *strides),
        {"HALF": headdim // 2, "BLOCK": _BLOCK},
        num_warps=_WARPS,
    )
    return (dqkv,)


def _run_gated(recording: Recording, tensors: Tensors, options: Options) -> Any:
    (gate_up,) = tensors
    rows, width = gate_up.shape[0], gate_up.shape[1] // 2
    out = recording.output((rows, width), gate_up.dtype, gate_up.device)
    recording.launch(
        triton_kernels.gated_forward,
        (rows, -(-width // _BLOCK)),
        (gate_up, out, width),
        {"ASSEMBLY": assembly(), "BLOCK": _BLOCK},
        num_warps=_WARPS,
    )
    return (out,)


def _run_gated_back(recording: Recording, tensors: Tensors, options: Options) -> Any:
    gate_up, dout = tensors
    rows, width = dout.shape
    dgate_up = recording.output(gate_up.shape, gate_up.dtype, gate_up.device)
    recording.launch(
        triton_kernels.gated_backward,
        (rows, -(-width // _BLOCK)),
        (gate_up, dout, dgate_up, width),
        {"ASSEMBLY": assembly(), "BLOCK": _BLOCK},
        num_warps=_WARPS,
    )
    return dgate_up, dout


def _as_given(tensors: Tensors, options: Options) -> Tensors:
    return tensors


_rotate = Calls(_run_rotate, _as_given)
_unrotate = Calls(_run_unrotate, _as_given)
_gated = Calls(_run_gated, _as_given)
_gated_back = Calls(_run_gated_back, _as_given)
