"""A Mamba block: the selective scan with everything the paper puts around it.

    u, z = in_proj(norm(x));  u = silu(conv(u))
    dt, B, C = x_proj(u);     delta = dt_proj(dt)
    y = x + out_proj(scan(u, softplus(delta + dt_bias), -exp(A_log), B, C, D) * silu(z))

Mamba (Gu and Dao 2023), section 3.4 and figure 3. With d_inner = 2 d_model the two outer
projections have 6 d_model^2 weights. A_log, D and dt_bias stay in fp32.
"""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from mambench.harness.spec import Problem
from mambench.implementations.blocks.fused import runs_fused
from mambench.implementations.blocks.layers import CausalConv, RMSNorm, linear, linear_weight
from mambench.implementations.blocks.sizes import d_model_of, d_state_of, dt_rank
from mambench.implementations.problems.draws import Draws, memory_scale

_SELECTION_GAIN = 1.6  # of x_proj, against the smaller variance that SiLU leaves
_STATE_GAIN = 2.0  # of B and C beyond that, so that the state counts in the output, not D u alone
_DELTA_GAIN = 0.25  # how far the input moves the step size
_OUT_GAIN = 2.0  # gives the branch the size of the residual stream


class MambaBlock(nn.Module):
    """One block around a mixer with the signature of `selective_scan_fn`."""

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
        d_state, ngroups = d_state_of(problem), problem.ngroups or 1
        exact = torch.promote_types(dtype, torch.float32)
        self.mixer = mixer
        self.groups = (ngroups, d_state)
        self.widths = (dt_rank(d_model), ngroups * d_state, ngroups * d_state)
        self.norm = RMSNorm(d_model, dtype=dtype, device=device)
        self.in_proj = linear(d_model, 2 * d_inner, dtype=dtype, device=device)
        self.conv = CausalConv(d_inner, dtype=dtype, device=device)
        self.x_proj = linear(d_inner, sum(self.widths), dtype=dtype, device=device)
        self.dt_proj = linear(self.widths[0], d_inner, dtype=dtype, device=device)
        self.dt_bias = nn.Parameter(torch.empty(d_inner, dtype=exact, device=device))
        self.A_log = nn.Parameter(torch.empty(d_inner, d_state, dtype=exact, device=device))
        self.D = nn.Parameter(torch.empty(d_inner, dtype=exact, device=device))
        self.out_proj = linear(d_inner, d_model, dtype=dtype, device=device)

    def forward(self, x: Tensor) -> Tensor:
        """Map x (B, L, d_model) to the same shape."""
        if runs_fused(x, self.fused):
            from mambench.implementations.blocks import fused_mamba

            return fused_mamba.forward(self, x)
        batch, seqlen, _ = x.shape
        # The mixer wants time contiguous. Weights from the left give that without a transposition.
        tokens = self.norm(x).flatten(0, 1)  # (B L, d_model)
        u, z = _time_last(self.in_proj.weight @ tokens.T, batch).chunk(2, dim=1)  # (B, D, L) each
        u = self.conv(u, channels_last=False)
        selection = u.transpose(1, 2).reshape(batch * seqlen, -1) @ self.x_proj.weight.T
        dt, B, C = selection.split(self.widths, dim=-1)
        delta = _time_last(self.dt_proj.weight @ dt.T, batch)
        B = _time_last(B.T, batch).contiguous()  # pyright: ignore[reportConstantRedefinition]
        C = _time_last(C.T, batch).contiguous()  # pyright: ignore[reportConstantRedefinition]
        return x + self.out_proj(self.mix(u, delta, B, C, z).transpose(1, 2))

    def mix(self, u: Tensor, delta: Tensor, B: Tensor, C: Tensor, z: Tensor) -> Tensor:
        """Call the mixer: u, delta, z (B, D, L), B and C (B, G N, L); returns (B, D, L)."""
        return self.mixer(
            u,
            delta,
            -torch.exp(self.A_log),
            B.unflatten(1, self.groups),
            C.unflatten(1, self.groups),
            D=self.D,
            z=z,
            delta_bias=self.dt_bias,
            delta_softplus=True,
        )

    def draw(self, draws: Draws, problem: Problem) -> dict[str, Tensor]:
        """Draw weights, fp32, as the scan's own problem draws its parameters (see `draws`)."""
        d_inner, d_state = self.A_log.shape
        decay = torch.arange(1, d_state + 1, dtype=torch.float32, device=draws.device)
        decay = decay * memory_scale(d_inner, problem.length, draws.device)[:, None]
        x_proj = linear_weight(self.x_proj, draws, gain=_SELECTION_GAIN)
        x_proj[self.widths[0] :] *= _STATE_GAIN
        return {
            **{f"norm.{key}": value for key, value in self.norm.draw(draws).items()},
            "in_proj.weight": linear_weight(self.in_proj, draws),
            **{f"conv.{key}": value for key, value in self.conv.draw(draws).items()},
            "x_proj.weight": x_proj,
            "dt_proj.weight": linear_weight(self.dt_proj, draws, gain=_DELTA_GAIN),
            "dt_bias": draws.dt_bias(d_inner),
            "A_log": decay.log() + draws.normal(d_inner, d_state, scale=0.1),
            "D": draws.skip(d_inner),
            "out_proj.weight": linear_weight(self.out_proj, draws, gain=_OUT_GAIN),
        }


def _time_last(columns: Tensor, batch: int) -> Tensor:
    """View (D, B L) as (B, D, L), with time contiguous."""
    return columns.view(columns.shape[0], batch, -1).transpose(0, 1)
