"""Layers that the blocks share, in plain torch."""

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from mambench.implementations.blocks.sizes import CONV_WIDTH
from mambench.implementations.problems.draws import Draws

NORM_EPS = 1e-5


class RMSNorm(nn.Module):
    """x / rms(x) * weight over the last axis; the statistics are in fp32 where x is narrower."""

    def __init__(self, width: int, *, dtype: torch.dtype, device: str) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.empty(width, dtype=dtype, device=device))

    def forward(self, x: Tensor) -> Tensor:
        """Normalise x (..., width)."""
        return F.rms_norm(x, self.weight.shape, self.weight, NORM_EPS)

    def draw(self, draws: Draws) -> dict[str, Tensor]:
        """Draw weights around 1."""
        return {"weight": 1 + draws.normal(self.weight.numel(), scale=0.1)}


class CausalConv(nn.Module):
    """Depthwise convolution over the current and the last three tokens, then SiLU.

    Written as a sum of shifted products: torch's grouped convolution is several times slower where
    every group is one channel, above all in the backward. A fused kernel would read x once and not
    four times; every Mamba block pays the same for it, whichever mixer it has.
    """

    def __init__(self, channels: int, *, dtype: torch.dtype, device: str) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.empty(CONV_WIDTH, channels, dtype=dtype, device=device))
        self.bias = nn.Parameter(torch.empty(channels, dtype=dtype, device=device))

    def forward(self, x: Tensor, *, channels_last: bool) -> Tensor:
        """Convolve x, (B, L, C) if `channels_last`, else (B, C, L); returns the same shape."""
        time = 1 if channels_last else 2
        seqlen, before = x.shape[time], CONV_WIDTH - 1
        weight, out = (
            (self.weight, self.bias)
            if channels_last
            else (self.weight[..., None], self.bias[:, None])
        )
        padded = F.pad(x, (0, 0, before, 0) if channels_last else (before, 0))
        for tap in range(CONV_WIDTH):
            out = torch.addcmul(out, padded.narrow(time, tap, seqlen), weight[tap])
        return F.silu(out)

    def draw(self, draws: Draws) -> dict[str, Tensor]:
        """Draw taps that favour the current token.

        Their sum stays away from zero: where it vanished, the slowly varying gradients of channels
        with a long memory would cancel, and leave the rounding of whoever computes them.
        """
        channels = self.bias.numel()
        weight = 0.2 + draws.normal(CONV_WIDTH, channels, scale=0.1)
        weight[-1] += 0.6
        return {
            "weight": weight,
            "bias": draws.normal(channels, scale=0.1),
        }


def linear(width_in: int, width_out: int, *, dtype: torch.dtype, device: str) -> nn.Linear:
    """Return a linear layer without bias."""
    return nn.Linear(width_in, width_out, bias=False, dtype=dtype, device=device)


def linear_weight(layer: nn.Linear, draws: Draws, *, gain: float = 1.0) -> Tensor:
    """Draw a weight that multiplies the standard deviation of independent inputs by `gain`."""
    return draws.normal(layer.out_features, layer.in_features, scale=gain * layer.in_features**-0.5)
