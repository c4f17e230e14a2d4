"""The recurrences' one step in plain PyTorch: what a decoding model does for every token.

    dt = softplus(dt_raw + dt_bias)
    state = exp(dt A) state + dt x B^T
    y = (state C + D x) * silu(z)

Mamba (Gu and Dao 2023), equation 2; Transformers are SSMs (Dao and Gu 2024), equation 1. Computed
in fp32 (fp64 for fp64 inputs) whatever the dtype of the state, which is updated in place.
"""

# A, B, C and D are the papers' names of tensors.
# pyright: reportConstantRedefinition=false

# torch leaves what it returns here untyped.
# pyright: reportUnknownMemberType=false, reportUnknownVariableType=false

import torch
from torch import Tensor
from torch.nn.functional import silu, softplus


def selective_state_update(
    state: Tensor,
    x: Tensor,
    dt: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    D: Tensor | None = None,
    z: Tensor | None = None,
    dt_bias: Tensor | None = None,
    dt_softplus: bool = False,
) -> Tensor:
    """Update the state by one token and return its output.

    Args:
        state: (B, D, N), or (B, H, P, N) with A a scalar per head; updated in place.
        x, z: (B, D) or (B, H, P).
        dt: (B, D) or (B, H).
        A: (D, N) or (H,) fp32.
        B, C: (B, G, N), or (B, N) for one group.
        D, dt_bias: (D,) or (H,) fp32.
        dt_softplus: apply softplus to dt + dt_bias.

    Returns:
        (B, D) or (B, H, P) in x's dtype.
    """
    wide = torch.promote_types(x.dtype, torch.float32)
    entries = x.shape[1]  # channels or heads
    x_wide, dt = x.to(wide), dt.to(wide)
    B, C = (_per_entry(v.to(wide), entries) for v in (B, C))
    if dt_bias is not None:
        dt = dt + dt_bias
    if dt_softplus:
        dt = softplus(dt)
    if state.dim() == 4:
        dt, A, B, C = dt[..., None], A[:, None, None], B[:, :, None], C[:, :, None]
        D = None if D is None else D[:, None]
    updated = torch.exp(dt[..., None] * A) * state.to(wide) + (dt * x_wide)[..., None] * B
    state.copy_(updated)
    y = (updated * C).sum(-1)
    if D is not None:
        y = y + D * x_wide
    if z is not None:
        y = y * silu(z.to(wide))
    return y.to(x.dtype)


def _per_entry(shared: Tensor, entries: int) -> Tensor:
    """Give each channel or head its group's row: (B, G, N) to (B, 1 or entries, N)."""
    if shared.dim() == 2:
        return shared[:, None]
    groups = shared.shape[1]
    return shared if groups == 1 else shared.repeat_interleave(entries // groups, dim=1)
