"""The operation's arguments, checked once for every implementation of it."""

import math

import torch
from torch import Tensor

NO_LIMIT = (0.0, math.inf)

# The operation's arguments in the words of an operator's schema.
SSD_TENSORS = (
    *("Tensor x", "Tensor dt", "Tensor A", "Tensor B", "Tensor C"),
    *("Tensor? D", "Tensor? z", "Tensor? dt_bias", "Tensor? initial_states", "Tensor? sequences"),
)
SSD_SEGMENTED = ("bool dt_softplus", "float dt_lowest", "float dt_highest", "int? segments")


def check_arguments(
    x: Tensor,
    dt: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    D: Tensor | None,
    z: Tensor | None,
    dt_bias: Tensor | None,
    initial_states: Tensor | None,
    dt_limit: tuple[float, float],
) -> None:
    """Raise a ValueError that names the first argument with a wrong shape, dtype or device.

    Args:
        x: (B, L, H, P), fp64, fp32, fp16 or bf16.
        dt: (B, L, H), any floating dtype.
        A: (H,).
        B: (B, L, G, N), dtype of x; G divides H.
        C: (B, L, G, N), dtype of x.
        D: (H,) or (H, P), or None.
        z: (B, L, H, P), dtype of x, or None.
        dt_bias: (H,), or None.
        initial_states: (B, H, P, N), or None.
        dt_limit: 0 <= lowest <= highest; dt is clamped to it.
    """
    if x.dim() != 4 or B.dim() != 4:
        raise ValueError(
            f"x is (B, L, H, P) and B is (B, L, G, N), got {_shape(x)} and {_shape(B)}"
        )
    batch, seqlen, nheads, headdim = x.shape
    ngroups, d_state = B.shape[2:]
    if min(x.shape) < 1 or min(B.shape) < 1:
        raise ValueError(f"no size may be 0, got x {_shape(x)} and B {_shape(B)}")
    if nheads % ngroups:
        raise ValueError(f"ngroups divides nheads, got {ngroups} groups and {nheads} heads")
    expected: tuple[tuple[str, Tensor | None, tuple[int, ...]], ...] = (
        ("dt", dt, (batch, seqlen, nheads)),
        ("A", A, (nheads,)),
        ("B", B, (batch, seqlen, ngroups, d_state)),
        ("C", C, (batch, seqlen, ngroups, d_state)),
        ("D", D, (nheads, headdim) if D is not None and D.dim() == 2 else (nheads,)),
        ("z", z, (batch, seqlen, nheads, headdim)),
        ("dt_bias", dt_bias, (nheads,)),
        ("initial_states", initial_states, (batch, nheads, headdim, d_state)),
    )
    for name, tensor, shape in expected:
        if tensor is None:
            continue
        if tensor.shape != shape:
            raise ValueError(f"{name} has shape {shape}, got {_shape(tensor)}")
        if tensor.device != x.device:
            raise ValueError(f"{name} is on {x.device} like x, got {tensor.device}")
        if name in ("B", "C", "z") and tensor.dtype != x.dtype:
            raise ValueError(f"{name} has x's dtype {x.dtype}, got {tensor.dtype}")
        if not tensor.dtype.is_floating_point:
            raise ValueError(f"{name} is a floating-point tensor, got {tensor.dtype}")
    lowest, highest = dt_limit
    if not 0 <= lowest <= highest:
        raise ValueError(f"dt_limit is 0 <= lowest <= highest, got {dt_limit}")


def check_dtype(x: Tensor, allowed: tuple[torch.dtype, ...]) -> None:
    """Raise a ValueError if x's dtype is not one of those allowed."""
    if x.dtype not in allowed:
        names = ", ".join(str(dtype) for dtype in allowed)
        raise ValueError(f"x has one of the dtypes {names}, got {x.dtype}")


def _shape(tensor: Tensor) -> tuple[int, ...]:
    return tuple(tensor.shape)
