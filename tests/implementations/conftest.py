"""The recurrences once more, for tests alone: literal, in the dtype given, one step at a time."""

import pytest
import torch
from torch.nn.functional import silu, softplus


def literal_s6(u, delta, A, B, C, D, delta_bias, z=None):
    """(B, D, L) inputs; returns y (B, D, L) and the last state (B, D, N)."""
    per_group = u.shape[1] // B.shape[1]
    state = torch.zeros(*u.shape[:2], A.shape[1], dtype=u.dtype)
    columns = []
    for t in range(u.shape[2]):
        dt = softplus(delta[:, :, t] + delta_bias)
        rows = [A.new_zeros(0)] * u.shape[1]
        for d in range(u.shape[1]):
            kept = torch.exp(dt[:, d, None] * A[d]) * state[:, d]
            rows[d] = kept + dt[:, d, None] * u[:, d, t, None] * B[:, d // per_group, :, t]
        state = torch.stack(rows, dim=1)
        grouped = C[:, :, :, t].repeat_interleave(per_group, dim=1)
        columns.append(torch.einsum("bdn,bdn->bd", state, grouped) + D * u[:, :, t])
    y = torch.stack(columns, dim=2)
    return (y if z is None else y * silu(z)), state


def literal_ssd(x, dt, A, B, C, D, dt_bias, z=None, initial_states=None):
    """(B, L, H, P) inputs; returns y (B, L, H, P) and the last state (B, H, P, N)."""
    batch, seqlen, nheads, headdim = x.shape
    per_group = nheads // B.shape[2]
    state = torch.zeros(batch, nheads, headdim, B.shape[3], dtype=x.dtype)
    if initial_states is not None:
        state = initial_states
    steps = []
    for t in range(seqlen):
        step = softplus(dt[:, t] + dt_bias)
        inflow = torch.einsum(
            "bh,bhp,bhn->bhpn", step, x[:, t], B[:, t].repeat_interleave(per_group, dim=1)
        )
        state = torch.einsum("bh,bhpn->bhpn", torch.exp(step * A), state) + inflow
        read = C[:, t].repeat_interleave(per_group, dim=1)
        skip = D[:, None] if D.dim() == 1 else D
        steps.append(torch.einsum("bhpn,bhn->bhp", state, read) + skip * x[:, t])
    y = torch.stack(steps, dim=1)
    return (y if z is None else y * silu(z)), state


@pytest.fixture(name="literal_s6")
def _literal_s6():
    return literal_s6


@pytest.fixture(name="literal_ssd")
def _literal_ssd():
    return literal_ssd


@pytest.fixture
def assert_close():
    """Relative L2 difference of two tensors, at most `rtol`."""

    def check(actual, expected, rtol):
        assert actual.shape == expected.shape
        difference = (actual.double() - expected.double()).norm()
        assert difference <= rtol * expected.double().norm(), float(
            difference / expected.double().norm()
        )

    return check
