"""Selective scan forward on Hopper: the launcher of `hopper_kernel`, and what it supports."""

from dataclasses import dataclass

import torch
import triton
from mambench.kernels.s6.hopper_kernel import scan_forward_kernel

RUN = 16  # steps in a lane's registers
STATES = 16  # states per block of B and C in shared memory, and per queue of carries


@dataclass(frozen=True, kw_only=True)
class Config:
    """How the kernel is built: channels a warp, warps a block, states an iteration, switches."""

    channels: int = 2
    warps: int = 8
    wide: bool = True
    pipeline: bool = False
    unroll: int = 1
    paired: bool = False


DEFAULT = Config()
_DTYPES = (torch.bfloat16, torch.float16, torch.float32)


def supported(*, d_state: int, dtype: torch.dtype) -> str | None:
    """Return why the kernel cannot serve a problem, or None; lengths, channels and groups are free.

    That the device has compute capability 9.0 is the caller's to check.
    """
    if dtype not in _DTYPES:
        return f"dtype {dtype}: the Hopper scan takes bfloat16, float16 and float32"
    if not 1 <= d_state <= 256:
        return f"d_state {d_state}: the Hopper scan takes 1 to 256"
    return None


def scan_forward(
    u: torch.Tensor,
    delta: torch.Tensor,
    A: torch.Tensor,
    B: torch.Tensor,
    C: torch.Tensor,
    D: torch.Tensor | None = None,
    z: torch.Tensor | None = None,
    delta_bias: torch.Tensor | None = None,
    delta_softplus: bool = False,
    *,
    checkpoint_every: int | None = None,
    config: Config = DEFAULT,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor | None]:
    """Run the selective scan forward on a Hopper GPU.

    u, delta, z (B, D, L) and B, C (B, G, N, L) of one dtype (bf16, fp16 or fp32); A (D, N), D and
    delta_bias (D,) fp32; G divides the channels. Returns out (B, D, L) in the inputs' dtype, the
    last state (B, D, N) fp32, and, with checkpoint_every = K (a multiple of 16), the fp32 states
    (B, ceil(L / K), D, N) before the steps 0, K, 2 K, ... Raises ValueError for what `supported`
    refuses.
    """
    batch, d_inner, seqlen = u.shape
    ngroups, d_state = B.shape[1], B.shape[2]
    reason = supported(d_state=d_state, dtype=u.dtype)
    if reason is None and checkpoint_every is not None and checkpoint_every % RUN:
        reason = f"checkpoint_every {checkpoint_every} is not a multiple of {RUN}"
    if reason is not None:
        raise ValueError(reason)
    u, delta, B, C = (t.contiguous() for t in (u, delta, B, C))
    z = None if z is None else z.contiguous()
    A, D, delta_bias = (
        None if t is None else t.to(torch.float32).contiguous() for t in (A, D, delta_bias)
    )
    out = torch.empty_like(u)
    last_state = torch.empty(batch, d_inner, d_state, dtype=torch.float32, device=u.device)
    checkpoints, n_checkpoints = None, 0
    if checkpoint_every is not None:
        n_checkpoints = triton.cdiv(seqlen, checkpoint_every)
        checkpoints = last_state.new_empty(batch, n_checkpoints, d_inner, d_state)
    if out.numel() == 0:
        return out, last_state.zero_(), checkpoints
    unit = row_unit(seqlen, (u, delta, B, C, out) if z is None else (u, delta, B, C, z, out))
    group_channels = d_inner // ngroups
    block = config.channels * config.warps
    blocks_per_group = triton.cdiv(group_channels, block)
    constants = specialisation(
        d_inner=d_inner, ngroups=ngroups, d_state=d_state, dtype=u.dtype, unit=unit,
        has_D=D is not None, has_z=z is not None, has_bias=delta_bias is not None,
        softplus=delta_softplus, checkpoint_every=checkpoint_every, config=config,
    )  # fmt: skip
    scan_forward_kernel[(batch * ngroups * blocks_per_group,)](
        u, delta, A, B, C, D, z, delta_bias, out, last_state, checkpoints,
        seqlen // unit, d_inner, ngroups, d_state, blocks_per_group, n_checkpoints,
        **constants, num_warps=config.warps,
    )  # fmt: skip
    return out, last_state, checkpoints


def row_unit(seqlen: int, tensors: tuple[torch.Tensor, ...]) -> int:
    """Return how many elements every row's start is a multiple of: 8, 2 or 1."""
    if any(t.data_ptr() % 16 for t in tensors):
        return 1
    return next(unit for unit in (8, 2, 1) if seqlen % unit == 0)


def specialisation(
    *, d_inner: int, ngroups: int, d_state: int, dtype: torch.dtype, unit: int,
    has_D: bool, has_z: bool, has_bias: bool, softplus: bool,
    checkpoint_every: int | None, config: Config,
) -> dict[str, int | bool]:  # fmt: skip
    """Return the kernel's compile-time arguments for a problem."""
    return {
        "HAS_D": has_D,
        "HAS_Z": has_z,
        "HAS_BIAS": has_bias,
        "SOFTPLUS": softplus,
        "CHECKPOINT_EVERY": checkpoint_every or 0,
        "MASK_CHANNELS": d_inner // ngroups % (config.channels * config.warps) != 0,
        "MASK_STATES": d_state % STATES != 0,
        "STATE_BLOCKS": triton.cdiv(d_state, STATES),
        "UNIT": unit,
        "WIDE": config.wide and dtype != torch.float32,
        "PIPELINE": config.pipeline,
        "UNROLL": config.unroll,
        "PAIRED": config.paired,
        "CHANNELS": config.channels,
        "WARPS": config.warps,
    }
