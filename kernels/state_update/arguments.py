"""What the state update accepts, checked once for all of its kernels."""

from torch import Tensor

from mambench.kernels.state_update.config import MAX_D_STATE


def check_arguments(
    state: Tensor,
    x: Tensor,
    dt: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    D: Tensor | None,
    z: Tensor | None,
    dt_bias: Tensor | None,
) -> None:
    """Check shapes, dtypes and devices; B and C are (B, G, N) here.

    Raises:
        ValueError: a shape is not as the others demand, or a tensor is on another device.
        TypeError: x, dt, z, B or C is not of one floating-point dtype, or a parameter not of fp32
            (of fp64 with an fp64 x).
    """
    if state.dim() not in (3, 4) or x.dim() != state.dim() - 1 or B.dim() != 3:
        raise ValueError(
            "expected state (B, D, N) and x (B, D), or state (B, H, P, N) and x (B, H, P), and B "
            f"(B, G, N), got {tuple(state.shape)}, {tuple(x.shape)} and {tuple(B.shape)}"
        )
    batch, entries, d_state, ngroups = *x.shape[:2], state.shape[-1], B.shape[1]
    if min(state.shape) < 1 or ngroups < 1 or entries % ngroups:
        raise ValueError(
            "expected sizes of at least 1 and a number of channels or heads that ngroups divides, "
            f"got state {tuple(state.shape)} and B {tuple(B.shape)}"
        )
    if d_state > MAX_D_STATE:
        raise ValueError(f"expected d_state of at most {MAX_D_STATE}, got {d_state}")
    expected = {
        "state": (state, (*x.shape, d_state)),
        "dt": (dt, (batch, entries)),
        "A": (A, (entries, d_state) if state.dim() == 3 else (entries,)),
        "B": (B, (batch, ngroups, d_state)),
        "C": (C, (batch, ngroups, d_state)),
        "D": (D, (entries,)),
        "z": (z, tuple(x.shape)),
        "dt_bias": (dt_bias, (entries,)),
    }
    for name, (tensor, shape) in expected.items():
        if tensor is None:
            continue
        if tensor.shape != shape:
            raise ValueError(f"{name}: expected shape {shape}, got {tuple(tensor.shape)}")
        if tensor.device != state.device:
            raise ValueError(f"{name}: expected on {state.device}, got {tensor.device}")
        if not tensor.dtype.is_floating_point:
            raise TypeError(f"{name}: expected a floating-point dtype, got {tensor.dtype}")
    if not rows_contiguous(state):
        raise ValueError(
            f"state: expected a sequence's states contiguous, got strides {state.stride()}; it is "
            "updated in place, so it is not copied"
        )


def rows_contiguous(tensor: Tensor) -> bool:
    """Whether everything of one sequence is contiguous; the batch may be strided."""
    return tensor[0].is_contiguous()
