"""A pre-norm transformer layer: rotary causal attention and a gated MLP, no biases.

    h = x + out(attention(rotary(q), rotary(k), v)),  q, k, v = qkv(norm(x))
    y = h + down(silu(gate) * up),                    gate, up = gate_up(norm(h))

The layer of LLaMA (Touvron et al. 2023, section 2.2), which the papers of Mamba and Mamba-2 call
Transformer++. With d_inner = d_model it has 4 d_model^2 weights in attention and 8 d_model^2 in the
MLP, see `sizes.mlp_width`. Rotary embedding as in Su et al. 2021, channel i rotated with channel
i + P/2.
"""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from mambench.harness.spec import Problem
from mambench.implementations.blocks.fused import runs_fused
from mambench.implementations.blocks.layers import RMSNorm, linear, linear_weight
from mambench.implementations.blocks.sizes import d_model_of, mlp_width
from mambench.implementations.problems.draws import Draws

ROTARY_BASE = 10_000.0
_ATTENTION_GAIN = 3.0  # an average over many values is small; trained models make up for it


class TransformerBlock(nn.Module):
    """One layer around a mixer `mixer(q, k, v)`, all (B, L, H, P)."""

    def __init__(
        self,
        problem: Problem,
        mixer: Callable[..., Any],
        *,
        dtype: torch.dtype,
        device: str,
        fused: bool | None = None,
    ) -> None:
        super().__init__()
        self.fused = fused  # None: where it can be
        d_model, d_inner = d_model_of(problem), problem.d_inner
        width = mlp_width(d_model)
        self.heads = (problem.nheads, d_inner // problem.nheads)
        self.mixer = mixer
        self.attention_norm = RMSNorm(d_model, dtype=dtype, device=device)
        self.qkv = linear(d_model, 3 * d_inner, dtype=dtype, device=device)
        self.out = linear(d_inner, d_model, dtype=dtype, device=device)
        self.mlp_norm = RMSNorm(d_model, dtype=dtype, device=device)
        self.gate_up = linear(d_model, 2 * width, dtype=dtype, device=device)
        self.down = linear(width, d_model, dtype=dtype, device=device)

    def forward(self, x: Tensor, rotary_cos: Tensor, rotary_sin: Tensor) -> Tensor:
        """Map x (B, L, d_model) to the same shape; tables as of `rotary_tables`."""
        if runs_fused(x, self.fused):
            from mambench.implementations.blocks import fused_transformer

            return fused_transformer.forward(self, x, rotary_cos, rotary_sin)
        qkv = self.qkv(self.attention_norm(x)).unflatten(-1, (3, *self.heads))
        q, k = rotate(qkv[:, :, :2], rotary_cos, rotary_sin).unbind(2)
        x = x + self.out(self.mixer(q, k, qkv[:, :, 2]).flatten(-2))
        gate, up = self.gate_up(self.mlp_norm(x)).chunk(2, dim=-1)
        return x + self.down(F.silu(gate) * up)

    def draw(self, draws: Draws, problem: Problem) -> dict[str, Tensor]:
        """Draw weights, fp32, that give both residual branches the size of the stream."""
        norms = {"attention_norm": self.attention_norm, "mlp_norm": self.mlp_norm}
        return {
            **{f"{name}.{key}": w for name, n in norms.items() for key, w in n.draw(draws).items()},
            "qkv.weight": linear_weight(self.qkv, draws),
            "out.weight": linear_weight(self.out, draws, gain=_ATTENTION_GAIN),
            "gate_up.weight": linear_weight(self.gate_up, draws),
            "down.weight": linear_weight(self.down, draws, gain=2.0),
        }


def rotary_tables(
    seqlen: int, headdim: int, *, dtype: torch.dtype, device: str
) -> tuple[Tensor, Tensor]:
    """Return cos and signed sin of the rotation, each (L, 1, 1, P), computed in float64.

    The sine's first half is negative, so that a rotation is `t * cos + swap_halves(t) * sin`.
    """
    frequency = ROTARY_BASE ** -(
        torch.arange(0, headdim, 2, dtype=torch.float64, device=device) / headdim
    )
    angle = torch.arange(seqlen, dtype=torch.float64, device=device)[:, None] * frequency
    cos = torch.cat((angle.cos(), angle.cos()), -1)
    sin = torch.cat((-angle.sin(), angle.sin()), -1)
    return cos.to(dtype)[:, None, None], sin.to(dtype)[:, None, None]


def rotate(values: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Rotate values (B, L, ., H, P) by their positions."""
    first, second = values.chunk(2, dim=-1)
    return torch.addcmul(values * cos, torch.cat((second, first), -1), sin)
