"""What the selective scan (S6) accepts, checked once for all of its kernels."""

from torch import Tensor

MAX_D_STATE = 256

# The operation's arguments in the words of an operator's schema.
S6_TENSORS = (
    *("Tensor u", "Tensor delta", "Tensor A", "Tensor B", "Tensor C"),
    *("Tensor? D", "Tensor? z", "Tensor? delta_bias", "Tensor? initial_state"),
)
S6_OPTIONS = ("bool delta_softplus",)


def check_arguments(
    u: Tensor,
    delta: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    D: Tensor | None,
    z: Tensor | None,
    delta_bias: Tensor | None,
    initial_state: Tensor | None = None,
) -> None:
    """Check shapes and dtypes of `selective_scan`'s arguments; B and C are (B, G, N, L) here.

    Raises:
        ValueError: a shape is not as the others demand.
        TypeError: delta, z, B or C has another dtype than u, or u is not floating point.
    """
    if u.dim() != 3 or A.dim() != 2 or B.dim() != 4:
        raise ValueError(
            "expected u (batch, d_inner, seqlen), A (d_inner, d_state) and B (batch, ngroups, "
            f"d_state, seqlen), got {tuple(u.shape)}, {tuple(A.shape)} and {tuple(B.shape)}"
        )
    batch, d_inner, seqlen = u.shape
    d_state, ngroups = A.shape[1], B.shape[1]
    if min(batch, d_inner, seqlen, d_state, ngroups) < 1 or d_inner % ngroups:
        raise ValueError(
            "expected sizes of at least 1 and d_inner a multiple of ngroups, got "
            f"u {tuple(u.shape)}, A {tuple(A.shape)}, B {tuple(B.shape)}"
        )
    if d_state > MAX_D_STATE:
        raise ValueError(f"expected d_state of at most {MAX_D_STATE}, got {d_state}")
    shared = (batch, ngroups, d_state, seqlen)
    expected = {
        "delta": (delta, u.shape),
        "A": (A, (d_inner, d_state)),
        "B": (B, shared),
        "C": (C, shared),
        "D": (D, (d_inner,)),
        "z": (z, u.shape),
        "delta_bias": (delta_bias, (d_inner,)),
        "initial_state": (initial_state, (batch, d_inner, d_state)),
    }
    for name, (tensor, shape) in expected.items():
        if tensor is not None and tensor.shape != shape:
            raise ValueError(f"{name}: expected shape {tuple(shape)}, got {tuple(tensor.shape)}")
    if not u.dtype.is_floating_point:
        raise TypeError(f"u: expected a floating-point dtype, got {u.dtype}")
    for name, tensor in (("delta", delta), ("B", B), ("C", C), ("z", z)):
        if tensor is not None and tensor.dtype != u.dtype:
            raise TypeError(f"{name}: expected u's dtype {u.dtype}, got {tensor.dtype}")
