"""The recurrences of s6 and ssd as the papers write them, one step at a time, in plain PyTorch.

This is the specification, written to be read. Mamba (Gu and Dao 2023), equations 2a and 2b with the
discretisation of section 3.2; Transformers are SSMs (Dao and Gu 2024), equation 1 with A a scalar
times the identity. The state is fp32 (fp64 for fp64 inputs) whatever the dtype of the activations.
"""

# torch leaves what unflatten and apply return untyped.
# pyright: reportUnknownMemberType=false, reportUnknownVariableType=false
# pyright: reportUnknownArgumentType=false

import torch
from torch import Tensor
from torch.nn.functional import silu, softplus

NO_LIMIT = (0.0, float("inf"))


def selective_scan(
    u: Tensor,
    delta: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    D: Tensor | None = None,
    z: Tensor | None = None,
    delta_bias: Tensor | None = None,
    delta_softplus: bool = False,
    return_last_state: bool = False,
    *,
    initial_state: Tensor | None = None,
) -> Tensor | tuple[Tensor, Tensor]:
    """Compute Mamba-1's scan with the arguments and results of `selective_scan_fn`.

    u, delta, z (B, D, L); A (D, N) fp32; B, C (B, G, N, L); D, delta_bias (D,) fp32; initial_state
    (B, D, N), which `selective_scan_fn` has not. Returns out (B, D, L) in u's dtype, or (out,
    last_state (B, D, N) in fp32).
    """
    wide = torch.promote_types(u.dtype, torch.float32)
    x, dt = u.to(wide), delta.to(wide)
    if delta_bias is not None:
        dt = dt + delta_bias[:, None]
    if delta_softplus:
        dt = softplus(dt)
    grouped = (B.shape[1], u.shape[1] // B.shape[1])  # channels as (G, D / G)
    A_g = A.unflatten(0, grouped)
    state = x.new_zeros(u.shape[0], *A_g.shape)  # (B, G, D / G, N)
    if initial_state is not None:
        state = initial_state.to(wide).unflatten(1, grouped)
    outputs: list[Tensor] = []
    for x_t, dt_t, B_t, C_t in zip(*(v.unbind(-1) for v in (x, dt, B, C)), strict=True):
        x_t, dt_t = (v.unflatten(1, grouped)[..., None] for v in (x_t, dt_t))
        B_t, C_t = (v.to(wide)[:, :, None] for v in (B_t, C_t))  # (B, G, 1, N)
        state = torch.exp(dt_t * A_g) * state + (dt_t * x_t) * B_t
        outputs.append((state * C_t).sum(-1).flatten(1, 2))
    y = torch.stack(outputs, dim=-1)
    if D is not None:
        y = y + D[:, None] * x
    if z is not None:
        y = y * silu(z.to(wide))
    y = y.to(u.dtype)
    return (y, state.flatten(1, 2)) if return_last_state else y


def state_space_dual(
    x: Tensor,
    dt: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    chunk_size: int,
    D: Tensor | None = None,
    z: Tensor | None = None,
    dt_bias: Tensor | None = None,
    initial_states: Tensor | None = None,
    dt_softplus: bool = False,
    dt_limit: tuple[float, float] = NO_LIMIT,
    return_final_states: bool = False,
    *,
    seq_idx: Tensor | None = None,
) -> Tensor | tuple[Tensor, Tensor]:
    """Compute Mamba-2's recurrence with the arguments and results of `mamba_chunk_scan_combined`.

    x, z (B, L, H, P); dt (B, L, H); A (H,) fp32; B, C (B, L, G, N); D (H,) or (H, P) fp32; dt_bias
    (H,) fp32; initial_states (B, H, P, N); chunk_size is not used; seq_idx (B, L) integers: where
    they change the state is zero again. Returns out (B, L, H, P) in x's dtype, or (out,
    final_states (B, H, P, N) in fp32).
    """
    batch, _, nheads, headdim = x.shape
    wide = torch.promote_types(x.dtype, torch.float32)
    dt = dt.to(wide)
    if dt_bias is not None:
        dt = dt + dt_bias
    if dt_softplus:
        dt = softplus(dt)
    if dt_limit != NO_LIMIT:
        dt = dt.clamp(*dt_limit)
    heads_per_group = nheads // B.shape[2]
    state = dt.new_zeros(batch, nheads, headdim, B.shape[-1])  # (B, H, P, N)
    if initial_states is not None:
        state = initial_states.to(wide)
    outputs: list[Tensor] = []
    steps = zip(*(v.unbind(1) for v in (x, dt, B, C)), strict=True)
    for t, (x_t, dt_t, B_t, C_t) in enumerate(steps):
        B_t = B_t.to(wide).repeat_interleave(heads_per_group, dim=1)[:, :, None]  # (B, H, 1, N)
        C_t = C_t.to(wide).repeat_interleave(heads_per_group, dim=1)[:, :, None]
        decay = torch.exp(dt_t * A)[..., None, None]
        if seq_idx is not None and t > 0:
            begins = seq_idx[:, t] != seq_idx[:, t - 1]
            decay = decay.masked_fill(begins[:, None, None, None], 0.0)
        state = decay * state + (dt_t[..., None] * x_t)[..., None] * B_t
        outputs.append((state * C_t).sum(-1))
    y = torch.stack(outputs, dim=1)
    if D is not None:
        y = y + (D if D.dim() == 2 else D[:, None]) * x.to(wide)
    if z is not None:
        y = y * silu(z.to(wide))
    y = y.to(x.dtype)
    return (y, state) if return_final_states else y
