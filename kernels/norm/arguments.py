"""What the RMS norm accepts, checked once for all of its kernels."""

from torch import Tensor

MOST_WIDTH = 1 << 15  # a row is held in one program's registers

# The operation's arguments in the words of an operator's schema.
NORM_TENSORS = ("Tensor x", "Tensor weight", "Tensor? z")
NORM_OPTIONS = ("float eps",)


def check_arguments(x: Tensor, weight: Tensor, z: Tensor | None) -> None:
    """Check shapes and dtypes of `rms_norm`'s arguments.

    Raises:
        ValueError: a shape is not as the others demand, or a row is longer than the kernels hold.
        TypeError: an argument is not floating point.
    """
    if x.dim() < 1 or x.numel() < 1 or weight.shape != x.shape[-1:]:
        raise ValueError(
            f"expected x (..., width) and weight (width,), got {tuple(x.shape)} and "
            f"{tuple(weight.shape)}"
        )
    if x.shape[-1] > MOST_WIDTH:
        raise ValueError(f"x: expected a width of at most {MOST_WIDTH}, got {x.shape[-1]}")
    if z is not None and z.shape != x.shape:
        raise ValueError(f"z: expected shape {tuple(x.shape)}, got {tuple(z.shape)}")
    for name, tensor in (("x", x), ("weight", weight), ("z", z)):
        if tensor is not None and not tensor.dtype.is_floating_point:
            raise TypeError(f"{name}: expected a floating-point dtype, got {tensor.dtype}")
