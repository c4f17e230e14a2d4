"""The selective scan as its definition reads, one step at a time: what the kernels are judged by.

Kept apart from the package on purpose: no kernel, and no reference of the package, is imported.
"""

import math

import torch
from torch import Tensor

NAMES = ("u", "delta", "A", "B", "C", "D", "z", "delta_bias")


def scan(
    u: Tensor,
    delta: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    D: Tensor | None = None,
    z: Tensor | None = None,
    delta_bias: Tensor | None = None,
    delta_softplus: bool = False,
    initial_state: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """Return out (B, D, L) and the last state (B, D, N); every operand is used in its own dtype."""
    dt = delta if delta_bias is None else delta + delta_bias[:, None]
    if delta_softplus:
        dt = torch.logaddexp(dt, torch.zeros_like(dt))
    repeats = u.shape[1] // B.shape[1]
    B, C = B.repeat_interleave(repeats, 1), C.repeat_interleave(repeats, 1)
    state = u.new_zeros(u.shape[0], *A.shape) if initial_state is None else initial_state
    steps = []
    # unbind, because the gradient of an index into time would be as long as time at every step
    for dt_t, x_t, B_t, C_t in zip(*(v.unbind(-1) for v in (dt, dt * u, B, C)), strict=True):
        decay = torch.exp(dt_t[..., None] * A)
        state = decay * state + x_t[..., None] * B_t
        steps.append((state * C_t).sum(-1))
    out = torch.stack(steps, -1)
    if D is not None:
        out = out + D[:, None] * u
    if z is not None:
        out = out * z * torch.sigmoid(z)
    return out, state


def draw(
    batch: int,
    d_inner: int,
    seqlen: int,
    d_state: int,
    ngroups: int = 1,
    *,
    dtype: torch.dtype = torch.float32,
    device: str = "cpu",
    seed: int = 0,
    without: tuple[str, ...] = (),
    started: bool = False,
) -> dict[str, Tensor]:
    """Draw leaf tensors. dt lies about 0.02, and A between -0.001 and -1600."""
    generator = torch.Generator().manual_seed(seed)

    def normal(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator, dtype=torch.float64)

    uniform = torch.rand((d_inner, d_state), generator=generator, dtype=torch.float64)
    wide = torch.float64 if dtype == torch.float64 else torch.float32
    tensors = {
        "u": normal(batch, d_inner, seqlen).to(dtype),
        "delta": normal(batch, d_inner, seqlen).to(dtype),
        "A": -torch.exp(math.log(1e-3) + uniform * math.log(1.6e6)).to(wide),
        "B": normal(batch, ngroups, d_state, seqlen).to(dtype),
        "C": normal(batch, ngroups, d_state, seqlen).to(dtype),
        "D": normal(d_inner).to(wide),
        "z": normal(batch, d_inner, seqlen).to(dtype),
        "delta_bias": (normal(d_inner) - 4).to(wide),
    }
    if started:
        tensors["initial_state"] = normal(batch, d_inner, d_state).to(wide)
    return {
        name: tensor.to(device).requires_grad_()
        for name, tensor in tensors.items()
        if name not in without
    }


def run(op, inputs: dict[str, Tensor], seed: int = 1, softplus: bool = True) -> dict[str, Tensor]:
    """Return out, the last state and the gradients of both, for random cotangents, by name."""
    leaves = {name: tensor.detach().requires_grad_() for name, tensor in inputs.items()}
    out, last = op(**leaves, delta_softplus=softplus)
    generator = torch.Generator().manual_seed(seed)
    cotangents = [  # representable in every dtype, so that all runs get the same
        torch.randn(tensor.shape, generator=generator).to(torch.bfloat16).to(tensor)
        for tensor in (out, last)
    ]
    gradients = torch.autograd.grad((out, last), tuple(leaves.values()), cotangents)
    named = {f"d{name}": gradient for name, gradient in zip(leaves, gradients, strict=True)}
    return {"out": out.detach(), "last": last.detach(), **named}


def truth(inputs: dict[str, Tensor], softplus: bool = True) -> dict[str, Tensor]:
    """Return `run` of the definition in float64."""
    return run(scan, {k: v.detach().double() for k, v in inputs.items()}, softplus=softplus)


def in_fp32(inputs: dict[str, Tensor], softplus: bool = True) -> dict[str, Tensor]:
    """Return `run` of the definition in float32: the measure of an honest error."""
    return run(scan, {k: v.detach().float() for k, v in inputs.items()}, softplus=softplus)


def distance(got: Tensor, want: Tensor) -> float:
    """Return the difference's norm relative to the norm of `want`; NaN counts as infinitely far."""
    got, want = got.detach().double(), want.detach().double()
    far = (got - want).norm() / want.norm().clamp_min(1e-300)
    return math.inf if far.isnan() else far.item()


def excesses(
    inputs: dict[str, Tensor], got: dict[str, Tensor], softplus: bool = True
) -> dict[str, str]:
    """Name what is wrong in `got`, a `run` of a kernel that computes in fp32.

    Allowed is twice the error of the definition in fp32, a floor for the order of additions (an
    error over a few values is a noisy number: below 32 it grows as sqrt(32 / values)), and for
    results in a narrower dtype one rounding (unit roundoff) of every element.
    """
    want, honest = truth(inputs, softplus), in_fp32(inputs, softplus)
    wrong = {}
    for name, exact in want.items():
        rounding = torch.finfo(got[name].dtype).eps / 2
        floor = 5e-7 * math.sqrt(max(1.0, 32 / exact.numel()))
        allowed = 2 * distance(honest[name], exact) + floor
        allowed += rounding if got[name].dtype != torch.float32 else 0
        error = distance(got[name], exact)
        if not error <= allowed:
            wrong[name] = f"{error:.1e} > {allowed:.1e}"
        if got[name].shape != exact.shape:
            wrong[name] = f"shape {tuple(got[name].shape)}, expected {tuple(exact.shape)}"
    return wrong
