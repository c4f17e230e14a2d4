"""`naive_recurrence`: the recurrences as the papers write them, one step at a time, in plain PyTorch.

This is the specification. Mamba (Gu and Dao 2023), equations 2a and 2b with the discretisation of
section 3.2; Transformers are SSMs (Dao and Gu 2024), equation 1 with A a scalar times the identity.
The state is fp32 (fp64 for fp64 inputs) whatever the dtype of the activations.
"""

from collections.abc import Callable
from typing import TYPE_CHECKING, Any

from mambench.harness.spec import Case, Device, Family, Problem
from mambench.implementations.base import Implementation, Variant

if TYPE_CHECKING:
    from torch import Tensor

STATE_BYTES = 4


class NaiveRecurrence(Implementation):
    """Step by step in time, one small tensor operation after another."""

    name = "naive_recurrence"
    families = (Family.S6, Family.SSD)
    summary = "the step-by-step recurrence in plain PyTorch: the specification"

    def variants(self, device: Device) -> tuple[Variant, ...]:
        """Return the one variant, which runs everywhere."""
        return (Variant(name="torch"),)

    def op(self, family: Family, variant: str) -> Callable[..., Any]:
        """Return the family's step-by-step operation."""
        return selective_scan if family is Family.S6 else state_space_dual

    def workspace_bytes(self, case: Case) -> int:
        """Estimate: activations in fp32; with gradients, what autograd keeps of every step."""
        problem = case.problem
        activations = 4 * problem.tokens * problem.d_inner * STATE_BYTES
        if not case.pass_.needs_grad:
            return activations + 4 * _state_bytes(problem)
        kept_per_step = 2 if problem.family is Family.S6 else 1  # the state, and s6's decay
        return 3 * activations + (kept_per_step * problem.seqlen + 4) * _state_bytes(problem)


def _state_bytes(problem: Problem) -> int:
    return problem.batch * problem.d_inner * (problem.d_state or 0) * STATE_BYTES


def selective_scan(
    u: "Tensor",
    delta: "Tensor",
    A: "Tensor",
    B: "Tensor",
    C: "Tensor",
    D: "Tensor | None" = None,
    z: "Tensor | None" = None,
    delta_bias: "Tensor | None" = None,
    delta_softplus: bool = False,
    return_last_state: bool = False,
) -> "Tensor | tuple[Tensor, Tensor]":
    """Compute Mamba-1's scan with the arguments and results of `selective_scan_fn`.

    u, delta, z (B, D, L); A (D, N) fp32; B, C (B, G, N, L); D, delta_bias (D,) fp32. Returns
    out (B, D, L) in u's dtype, or (out, last_state (B, D, N) in fp32).
    """
    import torch
    from torch.nn.functional import silu, softplus

    wide = torch.promote_types(u.dtype, torch.float32)
    x, dt = u.to(wide), delta.to(wide)
    if delta_bias is not None:
        dt = dt + delta_bias[:, None]
    if delta_softplus:
        dt = softplus(dt)
    channels_per_group = u.shape[1] // B.shape[1]
    state = x.new_zeros(*A.shape).expand(u.shape[0], -1, -1)  # (B, D, N)
    outputs: list[Tensor] = []
    for x_t, dt_t, B_t, C_t in zip(*(v.unbind(-1) for v in (x, dt, B, C)), strict=True):
        B_t = B_t.to(wide).repeat_interleave(channels_per_group, dim=1)  # (B, D, N)
        C_t = C_t.to(wide).repeat_interleave(channels_per_group, dim=1)
        decay = torch.exp(dt_t[..., None] * A)
        state = decay * state + (dt_t * x_t)[..., None] * B_t
        outputs.append((state * C_t).sum(-1))
    y = torch.stack(outputs, dim=-1)
    if D is not None:
        y = y + D[:, None] * x
    if z is not None:
        y = y * silu(z.to(wide))
    y = y.to(u.dtype)
    return (y, state) if return_last_state else y


def state_space_dual(
    x: "Tensor",
    dt: "Tensor",
    A: "Tensor",
    B: "Tensor",
    C: "Tensor",
    chunk_size: int,
    D: "Tensor | None" = None,
    z: "Tensor | None" = None,
    dt_bias: "Tensor | None" = None,
    initial_states: "Tensor | None" = None,
    dt_softplus: bool = False,
    dt_limit: tuple[float, float] = (0.0, float("inf")),
    return_final_states: bool = False,
) -> "Tensor | tuple[Tensor, Tensor]":
    """Compute Mamba-2's recurrence with the arguments and results of `mamba_chunk_scan_combined`.

    x, z (B, L, H, P); dt (B, L, H); A (H,) fp32; B, C (B, L, G, N); D (H,) or (H, P) fp32; dt_bias
    (H,) fp32; initial_states (B, H, P, N); chunk_size is not used. Returns out (B, L, H, P) in x's
    dtype, or (out, final_states (B, H, P, N) in fp32).
    """
    import torch
    from torch.nn.functional import silu, softplus

    batch, _, nheads, headdim = x.shape
    wide = torch.promote_types(x.dtype, torch.float32)
    dt = dt.to(wide)
    if dt_bias is not None:
        dt = dt + dt_bias
    if dt_softplus:
        dt = softplus(dt)
    if dt_limit != (0.0, float("inf")):
        dt = dt.clamp(*dt_limit)
    heads_per_group = nheads // B.shape[2]
    state = dt.new_zeros(batch, nheads, headdim, B.shape[-1])  # (B, H, P, N)
    if initial_states is not None:
        state = initial_states.to(wide)
    outputs: list[Tensor] = []
    for x_t, dt_t, B_t, C_t in zip(*(v.unbind(1) for v in (x, dt, B, C)), strict=True):
        B_t = B_t.to(wide).repeat_interleave(heads_per_group, dim=1)[:, :, None]  # (B, H, 1, N)
        C_t = C_t.to(wide).repeat_interleave(heads_per_group, dim=1)[:, :, None]
        decay = torch.exp(dt_t * A)[..., None, None]
        state = decay * state + (dt_t[..., None] * x_t)[..., None] * B_t
        outputs.append((state * C_t).sum(-1))
    y = torch.stack(outputs, dim=1)
    if D is not None:
        y = y + (D if D.dim() == 2 else D[:, None]) * x.to(wide)
    if z is not None:
        y = y * silu(z.to(wide))
    y = y.to(x.dtype)
    return (y, state) if return_final_states else y
