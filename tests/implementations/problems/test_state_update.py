"""Inputs and references of the state update: the literal recurrence, and many tokens."""

from dataclasses import replace

import pytest
import torch

from mambench.harness.spec import Case, Device, DeviceKind, DType, Family, Pass, Problem
from mambench.implementations.problems.base import Sample
from mambench.implementations.problems.state_update import StateUpdateProblem
from mambench.implementations.workload import Workload
from mambench.kernels.state_update.torch_update import selective_state_update

CPU = Device(kind=DeviceKind.CPU, name="cpu", memory_bytes=1 << 33)
S6 = Problem(family=Family.S6, batch=3, seqlen=None, d_inner=32, d_state=8, ngroups=2, gated=True)
SSD = Problem(family=Family.SSD, batch=3, seqlen=None, d_inner=64, headdim=8, d_state=16, ngroups=2)


def draw(problem, dtype=torch.float64, seed=3):
    owner = StateUpdateProblem(problem.family)
    return owner, owner.make_inputs(problem, dtype=dtype, device="cpu", seed=seed)


@pytest.mark.parametrize("problem", [S6, SSD])
def test_a_state_of_zero_is_the_first_step_of_the_recurrence(
    problem, literal_s6, literal_ssd, assert_close
):
    owner, inputs = draw(problem)
    inputs["state"].zero_()
    y, state = owner.reference(problem, inputs, owner.sample(problem, seed=0))
    x, dt, A, B, C, D = (inputs[name] for name in ("x", "dt", "A", "B", "C", "D"))
    bias, z = inputs["dt_bias"], inputs.get("z")
    if problem.family is Family.S6:
        steps = (t[..., None] for t in (x, dt))
        shared = (t[..., None] for t in (B, C))
        z = None if z is None else z[..., None]
        y_true, state_true = literal_s6(*steps, A, *shared, D, bias, z)
        y_true = y_true[..., 0]
    else:
        y_true, state_true = literal_ssd(
            x[:, None], dt[:, None], A, B[:, None], C[:, None], D, bias
        )
        y_true = y_true[:, 0]
    assert_close(y, y_true, 1e-12)
    assert_close(state, state_true, 1e-12)


@pytest.mark.parametrize("problem", [S6, SSD])
def test_the_state_is_that_of_a_model_after_many_tokens(problem):
    """Updates with fresh inputs leave its size as it was drawn, channel by channel."""
    problem = replace(problem, batch=32)
    owner, inputs = draw(problem, torch.float32)
    drawn = inputs["state"].square().mean(dim=(0, -1)).sqrt()
    state = inputs["state"].clone()
    for _ in range(300):
        token = {name: torch.randn(inputs[name].shape) for name in ("x", "dt", "B", "C")}
        token["dt"] *= 0.25
        _, state = owner.reference(problem, {**inputs, **token, "state": state}, Sample())
    # dt varies around its bias, so that the sizes agree to some ten per cent.
    ratio = state.square().mean(dim=(0, -1)).sqrt() / drawn
    assert float(ratio.min()) > 0.6
    assert float(ratio.max()) < 1.6


@pytest.mark.parametrize("problem", [S6, SSD])
@pytest.mark.parametrize("dtype", [DType.FP32, DType.FP16, DType.BF16])
def test_repeating_one_update_neither_overflows_nor_becomes_denormal(problem, dtype):
    case = Case(implementation="x", variant="x", problem=problem, pass_=Pass.DECODE, dtype=dtype)
    made = Workload(
        case=case,
        family=StateUpdateProblem(problem.family),
        op=selective_state_update,
        device="cpu",
        seed=1,
    )
    execute, state = made.prepare(Pass.DECODE), made.inputs["state"]
    for _ in range(3000):
        y, _ = execute()
    assert torch.isfinite(y).all()
    assert torch.isfinite(state).all()
    assert float(state.abs().max()) < 1e3
    tiny = torch.finfo(torch.float32 if dtype is not DType.FP16 else torch.float16).tiny
    assert float((state.abs() < tiny).float().mean()) < 0.01
    made.reset()
    again = StateUpdateProblem(problem.family).make_inputs(
        problem, dtype=state.dtype, device="cpu", seed=1
    )
    assert torch.equal(state, again["state"])


@pytest.mark.parametrize("problem", [S6, SSD])
def test_a_sample_is_the_same_part_of_everything(problem):
    problem = replace(problem, batch=40)
    owner, inputs = draw(problem)
    small = StateUpdateProblem(problem.family, judged_states=800)
    sample = small.sample(problem, seed=0)
    chosen = sample.channels or sample.heads
    assert chosen is not None
    assert sample.sequences is not None
    assert {0, problem.batch - 1} <= set(sample.sequences)
    complete = owner.reference(problem, inputs, owner.sample(problem, seed=0))
    part = small.reference(problem, small.select_inputs(problem, inputs, sample), sample)
    for whole, some in zip(small.select_outputs(problem, complete, sample), part, strict=True):
        torch.testing.assert_close(whole, some)


def test_some_channels_remember_for_long():
    _, inputs = draw(SSD)
    dt = torch.nn.functional.softplus(inputs["dt_bias"])
    assert float((inputs["A"] * dt).abs()[0]) < 1 / 1000
    assert float(inputs["D"][0]) == 0
