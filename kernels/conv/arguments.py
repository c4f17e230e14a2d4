"""What the causal convolution accepts, checked once for all of its kernels."""

from torch import Tensor

MOST_TAPS = 4
ACTIVATIONS = (None, "silu")

# The operation's arguments in the words of an operator's schema.
CONV_TENSORS = ("Tensor x", "Tensor weight", "Tensor? bias")
CONV_OPTIONS = ("bool silu",)


def check_arguments(x: Tensor, weight: Tensor, bias: Tensor | None) -> None:
    """Check shapes and dtypes of `causal_conv1d`'s arguments.

    Raises:
        ValueError: a shape is not as the others demand, or there are more than 4 taps.
        TypeError: an argument is not floating point.
    """
    if x.dim() != 3 or weight.dim() != 2:
        raise ValueError(
            "expected x (batch, channels, seqlen) and weight (channels, taps), got "
            f"{tuple(x.shape)} and {tuple(weight.shape)}"
        )
    if min(x.shape) < 1:
        raise ValueError(f"x: expected sizes of at least 1, got {tuple(x.shape)}")
    channels, taps = weight.shape
    if channels != x.shape[1] or not 1 <= taps <= MOST_TAPS:
        raise ValueError(
            f"weight: expected ({x.shape[1]}, 1 to {MOST_TAPS}), got {tuple(weight.shape)}"
        )
    if bias is not None and bias.shape != (channels,):
        raise ValueError(f"bias: expected shape ({channels},), got {tuple(bias.shape)}")
    for name, tensor in (("x", x), ("weight", weight), ("bias", bias)):
        if tensor is not None and not tensor.dtype.is_floating_point:
            raise TypeError(f"{name}: expected a floating-point dtype, got {tensor.dtype}")


def check_activation(activation: str | None) -> None:
    """Raise a ValueError for an activation that is none of `ACTIVATIONS`."""
    if activation not in ACTIVATIONS:
        raise ValueError(f"activation: expected None or 'silu', got {activation!r}")
