"""The Hopper scan as a differentiable operation: when it keeps states, and its gradients."""

from typing import Any

import pytest
import torch
import torch.nn.functional as F

pytest.importorskip("triton.experimental.gluon")

from torch import Tensor

from mambench.kernels.prepared import Calls
from mambench.kernels.s6 import hopper_op, hopper_scan

SHAPES = (  # batch, d_inner, seqlen, ngroups, d_state
    (1, 48, 1040, 1, 16),
    (2, 20, 333, 2, 16),
    (8, 32, 258, 1, 24),
    (1, 16, 129, 1, 128),
    (1, 17, 1, 1, 5),
)


def tensors(shape: tuple[int, ...], dtype: torch.dtype, device: str) -> dict[str, Tensor]:
    batch, d_inner, seqlen, ngroups, d_state = shape
    gen = torch.Generator().manual_seed(seqlen)

    def draw(*sizes: int) -> Tensor:
        return torch.randn(*sizes, generator=gen)

    A = -torch.rand(d_inner, d_state, generator=gen) - 0.1
    A[: d_inner // 4] *= 1e-2  # long memory
    made = {
        "u": draw(batch, d_inner, seqlen).to(dtype),
        "delta": (0.5 * draw(batch, d_inner, seqlen)).to(dtype),
        "A": A,
        "B": draw(batch, ngroups, d_state, seqlen).to(dtype),
        "C": draw(batch, ngroups, d_state, seqlen).to(dtype),
        "D": draw(d_inner),
        "z": draw(batch, d_inner, seqlen).to(dtype),
        "delta_bias": 0.1 * draw(d_inner),
    }
    return {name: value.to(device).requires_grad_() for name, value in made.items()}


def recurrence(u, delta, A, B, C, D, z, delta_bias) -> tuple[Tensor, Tensor]:
    """Out and last state of the recurrence in the dtype given, softplus of delta."""
    dt = F.softplus(delta + delta_bias[:, None], threshold=1e9)
    B, C = (t.repeat_interleave(u.shape[1] // B.shape[1], 1) for t in (B, C))
    h = u.new_zeros(*u.shape[:2], A.shape[1])
    ys = []
    for i in range(u.shape[2]):
        h = torch.exp(dt[..., i, None] * A) * h + (dt * u)[..., i, None] * B[..., i]
        ys.append((h * C[..., i]).sum(-1))
    return (torch.stack(ys, -1) + D[:, None] * u) * F.silu(z), h


@pytest.fixture
def recorded(monkeypatch: pytest.MonkeyPatch) -> list[int | None]:
    """Replace the kernel by nothing, and record how often it is asked to keep states."""
    calls: list[int | None] = []

    def run(recording: Any, tensors: Any, options: Any) -> Any:
        u, _, A, *_ = tensors
        calls.append(options[1])
        kept = None if options[1] is None else u.new_zeros(1)
        return torch.zeros_like(u), torch.zeros_like(A)[None], kept

    ready = hopper_scan._ready  # pyright: ignore[reportPrivateUsage]
    monkeypatch.setattr(hopper_scan, "_calls", Calls(run, ready))
    return calls


def test_states_are_kept_only_for_a_backward(recorded) -> None:
    t = tensors((1, 4, 8, 1, 16), torch.float32, "cpu")
    with torch.no_grad():
        hopper_op.selective_scan(**t)
    hopper_op.selective_scan(**{name: value.detach() for name, value in t.items()})
    assert recorded == [None, None]
    out = hopper_op.selective_scan(**t)
    assert recorded[2:] == [64]
    assert isinstance(out, Tensor)
    assert out.requires_grad


def test_it_takes_what_the_interface_promises(recorded) -> None:
    t = tensors((1, 4, 8, 1, 16), torch.float32, "cpu")
    out, last = hopper_op.selective_scan(
        t["u"], t["delta"], t["A"], t["B"][:, 0], t["C"][:, 0], return_last_state=True
    )
    assert out.shape == (1, 4, 8)
    assert last.shape == (1, 4, 16)
    with pytest.raises(ValueError, match="delta: expected shape"):
        hopper_op.selective_scan(t["u"], t["delta"][..., 1:], t["A"], t["B"], t["C"])
    wide = {name: value.double() for name, value in t.items()}
    with pytest.raises(TypeError, match="float64"):
        hopper_op.selective_scan(**wide)


@pytest.mark.gpu
@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_outputs_and_gradients_against_float64(shape, dtype) -> None:
    t = tensors(shape, dtype, "cuda")
    exact = {name: value.detach().double().requires_grad_() for name, value in t.items()}
    got = hopper_op.selective_scan(**t, delta_softplus=True, return_last_state=True)
    want = recurrence(**exact)
    grads = [torch.randn_like(value) for value in got]
    torch.autograd.backward(got, grads)
    torch.autograd.backward(want, [grad.double() for grad in grads])
    limit = 1e-4 if dtype == torch.float32 else 1e-2
    pairs = {name: (t[name].grad, exact[name].grad) for name in t}
    pairs |= {"out": (got[0], want[0]), "last": (got[1], want[1])}
    for name, (value, reference) in pairs.items():
        # A gradient may be exactly zero: that of A at one token.
        error = (value.double() - reference).norm() / reference.norm().clamp_min(1e-12)
        assert error < limit, f"{name}: {error:.1e}"


@pytest.mark.gpu
def test_views_are_copied() -> None:
    t = tensors((2, 16, 64, 1, 16), torch.bfloat16, "cuda")
    t = {name: value.detach() for name, value in t.items()}
    want = hopper_op.selective_scan(**t)
    t["u"] = t["u"].transpose(1, 2).contiguous().transpose(1, 2)
    t["z"] = torch.cat([t["z"], t["z"]], 1)[:, 16:]
    assert torch.equal(hopper_op.selective_scan(**t), want)
