"""The associative scan on a GPU in Triton, its state materialised: s6 and ssd built on it.

The kernels and their mathematics are in `scan_triton_kernels`. The states of all steps are in
memory once in the forward pass, (B, channels, N, L) in fp32, and their gradients beside them in the
backward; nothing else as large is. fp32, fp16 and bf16; any length, and up to 256 states.
"""

# A, B and C are the papers' names of tensors.
# pyright: reportConstantRedefinition=false

# Tensors from torch.autograd.Function and Triton's launchers are untyped.
# pyright: reportUnknownMemberType=false, reportUnknownVariableType=false
# pyright: reportUnknownArgumentType=false, reportMissingParameterType=false

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import silu

from mambench.kernels import scan_triton_kernels as kernels
from mambench.kernels.s6.arguments import check_arguments as check_s6
from mambench.kernels.ssd.arguments import check_arguments as check_ssd

NO_LIMIT = (0.0, float("inf"))
MAX_D_STATE = 256
_DTYPES = (torch.float32, torch.float16, torch.bfloat16)
_TILE = 2048  # states of a program's tile: 16 for each of 128 threads
_SHARED_TILE = (16, 64)  # states and steps of a tile of the sums over channels
_PROGRAMS = 1024  # of those sums, about: several for each multiprocessor of a large GPU


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
) -> Tensor | tuple[Tensor, Tensor]:
    """Compute Mamba-1's scan with the arguments and results of `selective_scan_fn`.

    u, delta, z (B, D, L) in fp32, fp16 or bf16; A (D, N) fp32; B, C (B, G, N, L); D, delta_bias
    (D,) fp32. Returns out (B, D, L) in u's dtype, or (out, last_state (B, D, N) in fp32).
    Differentiable in every tensor argument. Raises ValueError or TypeError for what does not fit.
    """
    B = B.unsqueeze(1) if B.dim() == 3 else B
    C = C.unsqueeze(1) if C.dim() == 3 else C
    check_s6(u, delta, A, B, C, D, z, delta_bias)
    _check_dtype(u)
    out, last = _Scan.apply(
        u.mT[..., None],
        delta.mT,
        A,
        B.permute(0, 3, 1, 2),
        C.permute(0, 3, 1, 2),
        None if D is None else D[:, None],
        None if z is None else z.mT[..., None],
        delta_bias,
        None,
        delta_softplus,
        NO_LIMIT,
    )
    y = out.squeeze(-1).mT
    return (y, last.squeeze(2)) if return_last_state else y


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
) -> Tensor | tuple[Tensor, Tensor]:
    """Compute Mamba-2's recurrence with the arguments and results of `mamba_chunk_scan_combined`.

    x, z (B, L, H, P) in fp32, fp16 or bf16; dt (B, L, H); A (H,) fp32; B, C (B, L, G, N); D (H,) or
    (H, P) fp32; dt_bias (H,) fp32; initial_states (B, H, P, N); chunk_size is not used. Returns out
    (B, L, H, P) in x's dtype, or (out, final_states (B, H, P, N) in fp32). Differentiable in every
    tensor argument. Raises ValueError or TypeError for what does not fit.
    """
    check_ssd(x, dt, A, B, C, D, z, dt_bias, initial_states, dt_limit)
    _check_dtype(x)
    if B.shape[-1] > MAX_D_STATE:
        raise ValueError(f"expected d_state of at most {MAX_D_STATE}, got {B.shape[-1]}")
    tied = A[:, None].expand(-1, B.shape[-1])
    skip = None if D is None else D[:, None].expand(-1, x.shape[-1]) if D.dim() == 1 else D
    out, last = _Scan.apply(
        x, dt, tied, B, C, skip, z, dt_bias, initial_states, dt_softplus, dt_limit
    )
    return (out, last) if return_final_states else out


def _check_dtype(x: Tensor) -> None:
    if x.dtype not in _DTYPES:
        raise TypeError(f"expected float32, float16 or bfloat16, got {x.dtype}")


@dataclass(frozen=True, kw_only=True, eq=False)
class _Inputs:
    """Both families' arguments in one form; a tensor's strides say the rest."""

    x: Tensor  # (B, L, H, P); s6: a head of width 1 for each channel
    dt: Tensor  # (B, L, H)
    A: Tensor  # (H, N) fp32
    B: Tensor  # (B, L, G, N)
    C: Tensor
    D: Tensor | None  # (H, P) fp32
    z: Tensor | None
    bias: Tensor | None  # (H,) fp32
    entry: Tensor | None  # (B, H, P, N) fp32, contiguous
    softplus: bool
    limit: tuple[float, float]

    @property
    def rows(self) -> tuple[int, int]:
        """Channels and sequences: the grid of the scans."""
        batch, _, nheads, headdim = self.x.shape
        return nheads * headdim, batch

    @property
    def flags(self) -> dict[str, bool]:
        """How dt is made, as the kernels take it."""
        return {
            "HAS_BIAS": self.bias is not None,
            "SOFTPLUS": self.softplus,
            "LIMITED": self.limit != NO_LIMIT,
        }

    @property
    def tile(self) -> dict[str, int]:
        """Size of a program's tile of states and steps, and the warps that share it."""
        states = 1 << (self.A.shape[1] - 1).bit_length()
        steps = min(256, max(16, _TILE // states), 1 << (self.x.shape[1] - 1).bit_length())
        return {"BLOCK_N": states, "BLOCK_L": max(steps, 2), "num_warps": 4 if states < 256 else 8}

    def new_states(self) -> Tensor:
        """Return uninitialised states of all steps, (B, channels, N, L) fp32."""
        channels, batch = self.rows
        sizes = (batch, channels, self.A.shape[1], self.x.shape[1])
        return torch.empty(sizes, dtype=torch.float32, device=self.x.device)


class _Scan(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        dt: Tensor,
        A: Tensor,
        B: Tensor,
        C: Tensor,
        D: Tensor | None,
        z: Tensor | None,
        bias: Tensor | None,
        entry: Tensor | None,
        softplus: bool,
        limit: tuple[float, float],
    ) -> tuple[Tensor, Tensor]:
        inputs = _inputs(x, dt, A, B, C, D, z, bias, entry, softplus, limit)
        states = _states(inputs)
        out = _output(inputs, states, torch.empty_like(x), gated=True)
        if any(ctx.needs_input_grad):
            ctx.save_for_backward(x, dt, A, B, C, D, z, bias, entry, states)
            ctx.options = (softplus, limit)
        last = states[..., -1].unflatten(1, x.shape[2:])
        return out, last.clone()  # not a view: the caller would hold the states of all steps

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(  # pyright: ignore[reportIncompatibleMethodOverride]
        ctx: Any, grad_out: Tensor, grad_last: Tensor
    ) -> tuple[Tensor | None, ...]:
        *tensors, states = ctx.saved_tensors
        inputs = _inputs(*tensors, *ctx.options)
        x, dt, A, B, C, _, _, bias, entry = tensors
        dy, grad_z = _before_gate(inputs, states, grad_out)
        grad_x, grad_dt, grad_A, grad_entry, grad_states = _grad_states(
            inputs, states, dy, grad_last
        )
        grad_B, grad_C = _grad_shared(inputs, states, grad_states, dy)
        heads = (*x.shape[:1], *x.shape[2:], x.shape[1])  # (B, H, P, L)
        grad_x, dy = grad_x.view(heads), dy.view(heads)
        grad_D = None
        if inputs.D is not None:
            grad_x = grad_x + inputs.D[..., None] * dy
            grad_D = (dy * x.permute(0, 2, 3, 1)).sum((0, 3)).to(inputs.D.dtype)
        grad_dt = grad_dt.view(heads).sum(2)  # (B, H, L)
        grad_bias = None if bias is None else grad_dt.sum((0, 2)).to(bias.dtype)
        grad_entry = None if entry is None else grad_entry.to(entry.dtype)
        return (
            grad_x.permute(0, 3, 1, 2).to(x.dtype),
            grad_dt.mT.to(dt.dtype),
            grad_A.to(A.dtype),
            grad_B.to(B.dtype),
            grad_C.to(C.dtype),
            grad_D,
            grad_z,
            grad_bias,
            grad_entry,
            None,
            None,
        )


def _inputs(
    x: Tensor,
    dt: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    D: Tensor | None,
    z: Tensor | None,
    bias: Tensor | None,
    entry: Tensor | None,
    softplus: bool,
    limit: tuple[float, float],
) -> _Inputs:
    return _Inputs(
        x=x,
        dt=dt,
        A=A.float(),
        B=B,
        C=C,
        D=None if D is None else D.float(),
        z=z,
        bias=None if bias is None else bias.float().contiguous(),
        entry=None if entry is None else entry.float().contiguous(),
        softplus=softplus,
        limit=limit,
    )


def _states(inputs: _Inputs) -> Tensor:
    states = inputs.new_states()
    per_group = inputs.x.shape[2] // inputs.B.shape[2]
    kernels.states_kernel[inputs.rows](
        *(inputs.x, inputs.dt, inputs.A, inputs.B, inputs.bias, inputs.entry, states),
        *(inputs.x.shape[1], inputs.A.shape[1], inputs.x.shape[3], per_group),
        *(inputs.limit),
        *(*inputs.x.stride(), *inputs.dt.stride(), *inputs.A.stride(), *inputs.B.stride()),
        HAS_ENTRY=inputs.entry is not None,
        **inputs.flags,
        **inputs.tile,
    )
    return states


def _output(inputs: _Inputs, states: Tensor, out: Tensor, *, gated: bool) -> Tensor:
    """Fill out (B, L, H, P) from the states; `gated`: apply the gate, if there is one."""
    channels, batch = inputs.rows
    tile, z = inputs.tile, inputs.z if gated else None
    _, seqlen, nheads, headdim = inputs.x.shape
    blocks = -(-seqlen // tile["BLOCK_L"])
    kernels.output_kernel[(channels * blocks, batch)](
        *(states, inputs.x, inputs.C, inputs.D, z, out),
        *(seqlen, inputs.A.shape[1], channels, headdim, nheads // inputs.C.shape[2]),
        *inputs.x.stride(),
        *((0,) * 4 if z is None else z.stride()),
        *(*out.stride(), *inputs.C.stride()),
        *((0, 0) if inputs.D is None else inputs.D.stride()),
        HAS_D=inputs.D is not None,
        HAS_Z=z is not None,
        **tile,
    )
    return out


def _before_gate(inputs: _Inputs, states: Tensor, grad_out: Tensor) -> tuple[Tensor, Tensor | None]:
    """Return the gradient of the ungated output, (B, H, P, L) fp32 contiguous, and that of z."""
    dy, grad_z = grad_out.float(), None
    if inputs.z is not None:
        wide = torch.empty_like(inputs.x, dtype=torch.float32)
        y = _output(inputs, states, wide, gated=False)
        z = inputs.z.float()
        sigmoid = torch.sigmoid(z)
        grad_z = (dy * y * sigmoid * (1 + z * (1 - sigmoid))).to(inputs.z.dtype)
        dy = dy * silu(z)
    return dy.permute(0, 2, 3, 1).contiguous(), grad_z


def _grad_states(
    inputs: _Inputs, states: Tensor, dy: Tensor, grad_last: Tensor
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Return the gradients of x and dt by channel, of A, of the entry and of all states."""
    grad_states = torch.empty_like(states)
    channels, batch = inputs.rows
    _, seqlen, nheads, headdim = inputs.x.shape
    d_state = inputs.A.shape[1]
    grad_x = torch.empty(batch, channels, seqlen, dtype=torch.float32, device=dy.device)
    grad_dt = torch.empty_like(grad_x)
    grad_A = torch.empty(batch, nheads, headdim, d_state, dtype=torch.float32, device=dy.device)
    grad_entry = torch.empty_like(grad_A)
    kernels.grad_states_kernel[inputs.rows](
        *(inputs.x, inputs.dt, inputs.A, inputs.B, inputs.C, inputs.bias, inputs.entry),
        *(states, dy, grad_last.float().contiguous()),
        *(grad_states, grad_x, grad_dt, grad_A, grad_entry),
        *(seqlen, d_state, headdim, nheads // inputs.B.shape[2], *inputs.limit),
        *(*inputs.x.stride(), *inputs.dt.stride(), *inputs.A.stride()),
        *(*inputs.B.stride(), *inputs.C.stride()),
        HAS_ENTRY=inputs.entry is not None,
        **inputs.flags,
        **inputs.tile,
    )
    return grad_x, grad_dt, grad_A.sum((0, 2)), grad_entry, grad_states


def _grad_shared(
    inputs: _Inputs, states: Tensor, grad_states: Tensor, dy: Tensor
) -> tuple[Tensor, Tensor]:
    """Return the gradients of B and C, (B, L, G, N) fp32, summed over the channels of a group."""
    channels, batch = inputs.rows
    seqlen, d_state, groups = inputs.x.shape[1], inputs.A.shape[1], inputs.B.shape[2]
    block_n, block_l = _SHARED_TILE
    tiles = (-(-seqlen // block_l), -(-d_state // block_n))
    per_group = channels // groups
    wanted = max(1, _PROGRAMS // (tiles[0] * tiles[1] * batch * groups))
    per_split = -(-per_group // min(wanted, per_group))
    splits = -(-per_group // per_split)
    sums = torch.empty(
        (2, splits, batch, groups, d_state, seqlen), dtype=torch.float32, device=dy.device
    )
    kernels.grad_shared_kernel[(*tiles, batch * groups * splits)](
        *(inputs.x, inputs.dt, inputs.bias, states, grad_states, dy, sums[0], sums[1]),
        *(seqlen, d_state, channels, inputs.x.shape[3], per_split, splits, per_group),
        *(*inputs.limit, *inputs.x.stride(), *inputs.dt.stride()),
        **inputs.flags,
        BLOCK_N=block_n,
        BLOCK_L=block_l,
        num_warps=4,
    )
    grad_B, grad_C = sums.sum(1).permute(0, 1, 4, 2, 3)
    return grad_B, grad_C
