"""A Mamba-2 block: the state-space dual with everything the paper puts around it.

    z, xBC, dt = in_proj(norm(x));  x', B, C = silu(conv(xBC))
    y = ssd(x', softplus(dt + dt_bias), -exp(A_log), B, C, D)
    out = x + out_proj(norm(y * silu(z)))

Transformers are SSMs (Dao and Gu 2024), section 7 and figure 6. With d_inner = 2 d_model the two
projections have 6 d_model^2 weights and few more. A_log, D and dt_bias stay in fp32.
"""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from mambench.harness.spec import Problem
from mambench.implementations.blocks.fused import runs_fused
from mambench.implementations.blocks.layers import CausalConv, RMSNorm, linear, linear_weight
from mambench.implementations.blocks.sizes import d_model_of, d_state_of
from mambench.implementations.problems.draws import Draws, long_memory, memory_scale
from mambench.implementations.problems.ssd import CHUNK_SIZE

_DT_GAIN = 0.25  # how far the input moves the step size
_STATE_GAIN = 2.5  # of B and C, so that the state counts in the output, not D x alone


class Mamba2Block(nn.Module):
    """One block around a mixer with the signature of `mamba_chunk_scan_combined`."""

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
        d_model, d_inner, nheads = d_model_of(problem), problem.d_inner, problem.nheads
        shared = (problem.ngroups or 1) * d_state_of(problem)
        exact = torch.promote_types(dtype, torch.float32)
        self.mixer = mixer
        self.heads = (nheads, d_inner // nheads)
        self.groups = (problem.ngroups or 1, d_state_of(problem))
        self.widths = (d_inner, d_inner + 2 * shared, nheads)  # of z, xBC, dt
        self.conv_widths = (d_inner, shared, shared)
        self.norm = RMSNorm(d_model, dtype=dtype, device=device)
        self.in_proj = linear(d_model, sum(self.widths), dtype=dtype, device=device)
        self.conv = CausalConv(self.widths[1], dtype=dtype, device=device)
        self.dt_bias = nn.Parameter(torch.empty(nheads, dtype=exact, device=device))
        self.A_log = nn.Parameter(torch.empty(nheads, dtype=exact, device=device))
        self.D = nn.Parameter(torch.empty(nheads, dtype=exact, device=device))
        self.gated_norm = RMSNorm(d_inner, dtype=dtype, device=device)
        self.out_proj = linear(d_inner, d_model, dtype=dtype, device=device)

    def forward(self, x: Tensor) -> Tensor:
        """Map x (B, L, d_model) to the same shape."""
        if runs_fused(x, self.fused):
            from mambench.implementations.blocks import fused_mamba2

            return fused_mamba2.forward(self, x)
        z, mixed, dt = self.in_proj(self.norm(x)).split(self.widths, dim=-1)
        inner, B, C = self.conv(mixed, channels_last=True).split(self.conv_widths, dim=-1)
        y = self.mix(inner, dt, B, C).flatten(-2)
        return x + self.out_proj(self.gated_norm(y * F.silu(z)))

    def mix(self, inner: Tensor, dt: Tensor, B: Tensor, C: Tensor) -> Tensor:
        """Call the mixer: inner (B, L, H P), dt (B, L, H), B and C (B, L, G N); (B, L, H, P)."""
        return self.mixer(
            inner.unflatten(-1, self.heads),
            dt,
            -torch.exp(self.A_log),
            B.unflatten(-1, self.groups),
            C.unflatten(-1, self.groups),
            CHUNK_SIZE,
            D=self.D,
            dt_bias=self.dt_bias,
            dt_softplus=True,
        )

    def draw(self, draws: Draws, problem: Problem) -> dict[str, Tensor]:
        """Draw weights, fp32, as the operation's own problem draws its parameters (see `draws`)."""
        nheads = self.heads[0]
        decay = draws.uniform(nheads, low=1.0, high=16.0)
        decay = torch.where(long_memory(nheads, draws.device), 1.0, decay)
        in_proj = linear_weight(self.in_proj, draws)
        in_proj[2 * self.widths[0] : -nheads] *= _STATE_GAIN
        in_proj[-nheads:] *= _DT_GAIN
        return {
            **{f"norm.{key}": value for key, value in self.norm.draw(draws).items()},
            "in_proj.weight": in_proj,
            **{f"conv.{key}": value for key, value in self.conv.draw(draws).items()},
            "dt_bias": draws.dt_bias(nheads),
            "A_log": (decay * memory_scale(nheads, problem.length, draws.device)).log(),
            "D": draws.skip(nheads),
            **{f"gated_norm.{key}": v for key, v in self.gated_norm.draw(draws).items()},
            "out_proj.weight": linear_weight(self.out_proj, draws),
        }
