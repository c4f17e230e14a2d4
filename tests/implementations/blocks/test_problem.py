"""Blocks: against token-by-token models written from the papers, and what the judging sees."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn.functional import silu, softplus

from mambench.harness.spec import Family, Level, Problem
from mambench.implementations.blocks import problem as blocks
from mambench.implementations.blocks.problem import BlockProblem, block_family
from mambench.implementations.problems.base import Sample

NAMES = {
    Family.ATTENTION: ("q", "k", "v"),
    Family.S6: ("u", "delta", "A", "B", "C"),
    Family.SSD: ("x", "dt", "A", "B", "C"),
}


def make_problem(
    family: Family, *, batch: int = 2, seqlen: int = 13, d_model: int = 16, ngroups: int = 1
) -> Problem:
    d_inner = d_model if family is Family.ATTENTION else 2 * d_model
    return Problem(
        family=family,
        level=Level.BLOCK,
        batch=batch,
        seqlen=seqlen,
        d_model=d_model,
        d_inner=d_inner,
        headdim=None if family is Family.S6 else 8,
        d_state=None if family is Family.ATTENTION else 4,
        ngroups=None if family is Family.ATTENTION else ngroups,
    )


def mixer_of(problem: Problem) -> Callable[..., Any]:
    """The family's float64 reference, with the signature of an implementation."""
    solve = blocks._solver(problem.family).reference
    return blocks._MIXERS[problem.family](problem, solve, Sample())


def draw(
    problem: Problem, dtype: torch.dtype = torch.float64, seed: int = 0
) -> tuple[BlockProblem, dict[str, Tensor]]:
    family = block_family(problem)
    assert isinstance(family, BlockProblem)
    return family, family.make_inputs(problem, dtype=dtype, device="cpu", seed=seed)


def norm(x: Tensor, weight: Tensor) -> Tensor:
    return x / (x.square().mean(-1, keepdim=True) + 1e-5).sqrt() * weight


def convolved(rows: list[Tensor], w: dict[str, Tensor]) -> Tensor:
    """The convolution at the last of the rows (B, C) seen so far."""
    total = w["conv.bias"].expand_as(rows[-1])
    for back, row in enumerate(reversed(rows[-4:])):
        total = total + row * w["conv.weight"][3 - back]
    return silu(total)


def step_mamba(x: Tensor, w: dict[str, Tensor], problem: Problem) -> Tensor:
    """One Mamba block, one token after the other, as in decoding."""
    state, seen, out = 0.0, [], []
    rank, n = w["dt_proj.weight"].shape[1], problem.d_state
    for t in range(x.shape[1]):
        u, z = (norm(x[:, t], w["norm.weight"]) @ w["in_proj.weight"].T).chunk(2, -1)
        seen.append(u)
        u = convolved(seen, w)
        dt, B, C = (u @ w["x_proj.weight"].T).split([rank, n, n], -1)
        dt = softplus(dt @ w["dt_proj.weight"].T + w["dt_bias"])[..., None]
        state = torch.exp(dt * -w["A_log"].exp()) * state + dt * u[..., None] * B[:, None]
        y = (state * C[:, None]).sum(-1) + w["D"] * u
        out.append(x[:, t] + (y * silu(z)) @ w["out_proj.weight"].T)
    return torch.stack(out, 1)


def step_mamba2(x: Tensor, w: dict[str, Tensor], problem: Problem) -> Tensor:
    """One Mamba-2 block, one token after the other; one group."""
    state, seen, out = 0.0, [], []
    inner, n, heads = problem.d_inner, problem.d_state, problem.nheads
    for t in range(x.shape[1]):
        projected = norm(x[:, t], w["norm.weight"]) @ w["in_proj.weight"].T
        z, mixed, dt = projected.split([inner, inner + 2 * n, heads], -1)
        seen.append(mixed)
        u, B, C = convolved(seen, w).split([inner, n, n], -1)
        u = u.unflatten(-1, (heads, -1))
        dt = softplus(dt + w["dt_bias"])
        decay = torch.exp(dt * -w["A_log"].exp())[..., None, None]
        state = decay * state + (dt[..., None] * u)[..., None] * B[:, None, None]
        y = (state * C[:, None, None]).sum(-1) + w["D"][:, None] * u
        y = norm(y.flatten(-2) * silu(z), w["gated_norm.weight"])
        out.append(x[:, t] + y @ w["out_proj.weight"].T)
    return torch.stack(out, 1)


def step_transformer(x: Tensor, w: dict[str, Tensor], problem: Problem) -> Tensor:
    """One layer, one token after the other, with a growing cache; rotation as complex numbers."""
    heads, width = problem.nheads, problem.d_inner // problem.nheads
    frequency = 10_000.0 ** (-torch.arange(0, width, 2, dtype=x.dtype) / width)
    keys, values, out = [], [], []

    def turned(vector: Tensor, t: int) -> Tensor:
        real, imaginary = vector.chunk(2, -1)
        turn = torch.polar(torch.ones_like(frequency), t * frequency)
        rotated = torch.complex(real, imaginary) * turn
        return torch.cat((rotated.real, rotated.imag), -1)

    for t in range(x.shape[1]):
        qkv = norm(x[:, t], w["attention_norm.weight"]) @ w["qkv.weight"].T
        q, k, v = (part.unflatten(-1, (heads, width)) for part in qkv.chunk(3, -1))
        keys.append(turned(k, t))
        values.append(v)
        scores = (turned(q, t)[:, None] * torch.stack(keys, 1)).sum(-1) / width**0.5
        mixed = (scores.softmax(1)[..., None] * torch.stack(values, 1)).sum(1)
        h = x[:, t] + mixed.flatten(-2) @ w["out.weight"].T
        gate, up = (norm(h, w["mlp_norm.weight"]) @ w["gate_up.weight"].T).chunk(2, -1)
        out.append(h + (silu(gate) * up) @ w["down.weight"].T)
    return torch.stack(out, 1)


STEPS = {
    Family.ATTENTION: step_transformer,
    Family.S6: step_mamba,
    Family.SSD: step_mamba2,
}


@pytest.mark.parametrize("family", Family)
def test_the_stack_is_the_token_by_token_model(family: Family) -> None:
    problem = make_problem(family)
    judge, inputs = draw(problem)
    (found,) = judge.call(mixer_of(problem), problem, inputs)
    expected = inputs["x"]
    assert problem.nblocks == (1 if family is Family.ATTENTION else 2)
    for index in range(problem.nblocks or 0):
        prefix = f"blocks.{index}."
        weights = {k.removeprefix(prefix): v for k, v in inputs.items() if k.startswith(prefix)}
        expected = STEPS[family](expected, weights, problem)
    torch.testing.assert_close(found, expected)
    assert (found - inputs["x"]).norm() > 0.2 * inputs["x"].norm()


@pytest.mark.parametrize("family", [Family.S6, Family.SSD])
def test_groups_reach_the_mixer_in_its_shapes(family: Family) -> None:
    problem = make_problem(family, ngroups=2)
    judge, inputs = draw(problem)
    seen: list[tuple[int, ...]] = []

    def spy(*arguments: Any, **keywords: Any) -> Tensor:
        seen.append(tuple(arguments[3].shape))
        return mixer_of(problem)(*arguments, **keywords)

    judge.call(spy, problem, inputs)
    assert seen == [(2, 2, 4, 13) if family is Family.S6 else (2, 13, 2, 4)] * 2


@pytest.mark.parametrize("family", Family)
def test_a_late_token_changes_nothing_before_it(family: Family) -> None:
    problem = make_problem(family, seqlen=90)
    judge, inputs = draw(problem)
    (before,) = judge.reference(problem, inputs, Sample())
    changed = inputs["x"].clone()
    changed[:, 70] += 1
    (after,) = judge.reference(problem, inputs | {"x": changed}, Sample())
    assert torch.equal(before[:, :70], after[:, :70])
    assert ((before - after)[:, 70:].abs().amax(-1) > 1e-9).all()


@pytest.mark.parametrize("family", Family)
def test_gradients_are_those_of_finite_differences(family: Family) -> None:
    problem = make_problem(family, batch=1, seqlen=4, d_model=8)
    judge, inputs = draw(problem)
    names = judge.differentiable(problem)
    leaves = [inputs[name].requires_grad_() for name in names]

    def forward(*values: Tensor) -> Tensor:
        return judge.call(
            mixer_of(problem), problem, inputs | dict(zip(names, values, strict=True))
        )[0]

    assert torch.autograd.gradcheck(forward, leaves, fast_mode=True)


@pytest.mark.parametrize("family", Family)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_every_input_is_a_weight_of_the_module_in_its_precision(
    family: Family, dtype: torch.dtype
) -> None:
    problem = make_problem(family)
    judge, inputs = draw(problem, dtype)
    stack = blocks.Stack(problem, mixer_of(problem), dtype=dtype, device="meta")
    weights = {name: (p.shape, p.dtype) for name, p in stack.named_parameters()}
    tables = {"rotary_cos", "rotary_sin"} if family is Family.ATTENTION else set()
    assert set(inputs) == set(weights) | {"x"} | tables
    assert set(judge.differentiable(problem)) == set(weights) | {"x"}
    for name, (shape, kept) in weights.items():
        assert (inputs[name].shape, inputs[name].dtype) == (shape, kept), name
        exact = name.rsplit(".", 1)[-1] in ("A_log", "D", "dt_bias")
        assert kept == (torch.float32 if exact else dtype), name
    assert all(torch.isfinite(value).all() for value in inputs.values())


def test_what_runs_around_the_mixer_is_named() -> None:
    problem = make_problem(Family.S6)
    judge, inputs = draw(problem, torch.bfloat16)
    assert judge.surroundings(inputs) == "plain"
    assert blocks._solver(Family.S6).surroundings(inputs) is None


def test_a_call_leaves_no_weight_behind_in_the_stack() -> None:
    problem = make_problem(Family.SSD)
    judge, inputs = draw(problem)
    mixer = mixer_of(problem)
    judge.call(mixer, problem, inputs)
    assert judge._latest is not None
    assert {p.device.type for p in judge._latest[2].stack.parameters()} == {"meta"}

    def broken(*_: Any, **__: Any) -> Tensor:
        raise RuntimeError("broken")

    with pytest.raises(RuntimeError, match="broken"):
        judge.call(broken, problem, inputs)
    assert {p.device.type for p in judge._latest[2].stack.parameters()} == {"meta"}


@pytest.mark.parametrize("family", [Family.S6, Family.SSD])
def test_a_state_dropped_between_chunks_exceeds_the_budget_many_times(family: Family) -> None:
    problem = make_problem(family, batch=1, seqlen=512, d_model=64)
    judge, inputs = draw(problem, torch.bfloat16)
    (truth,) = judge.reference(problem, {k: v.double() for k, v in inputs.items()}, Sample())
    (honest,) = judge.independent(problem, inputs, Sample())
    time = -1 if family is Family.S6 else 1

    def forgetful(*arguments: Any, **keywords: Any) -> Tensor:
        def half(value: Any, start: int) -> Any:
            timed = isinstance(value, Tensor) and 512 in value.shape
            return value.narrow(time, start, 256) if timed else value

        return torch.cat(
            [
                mixer_of(make_problem(family, batch=1, seqlen=256, d_model=64))(
                    *[half(value, start) for value in arguments],
                    **{name: half(value, start) for name, value in keywords.items()},
                ).to(torch.bfloat16)
                for start in (0, 256)
            ],
            time,
        )

    (wrong,) = judge.call(forgetful, problem, inputs)
    error, allowed = ((y.double() - truth).norm() for y in (wrong, honest))
    assert allowed < 0.03 * truth.norm()
    assert error > 5 * allowed


def test_a_long_transformer_is_judged_at_positions_exactly(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    problem = make_problem(Family.ATTENTION, seqlen=60)
    judge, inputs = draw(problem)
    assert judge.sample(problem, seed=0) == Sample()
    sample = Sample(rows=(0, 31, 59))
    names = judge.differentiable(problem)
    leaves = [inputs[name].requires_grad_() for name in names]
    whole = judge.select_outputs(problem, judge.reference(problem, inputs, Sample()), sample)
    part = judge.reference(problem, inputs, sample)
    torch.testing.assert_close(part, whole)
    grad = torch.randn_like(part[0])
    torch.testing.assert_close(
        torch.autograd.grad(part, leaves, grad), torch.autograd.grad(whole, leaves, grad)
    )
    long = make_problem(Family.ATTENTION, batch=1, seqlen=2**17)
    rows = judge.sample(long, seed=0).rows
    assert rows is not None
    assert {0, 2**17 - 1} <= set(rows)


@pytest.mark.parametrize("family", Family)
def test_recomputing_blocks_changes_no_gradient(
    monkeypatch: pytest.MonkeyPatch, family: Family
) -> None:
    problem = make_problem(family)
    judge, inputs = draw(problem)
    leaves = [inputs[name].requires_grad_() for name in judge.differentiable(problem)]

    def solve() -> tuple[Tensor, ...]:
        (y,) = judge.reference(problem, inputs, Sample())
        return (y, *torch.autograd.grad(y, leaves, torch.ones_like(y)))

    kept = solve()
    monkeypatch.setattr(blocks, "RECOMPUTED_TOKENS", 1)
    torch.testing.assert_close(solve(), kept)
    monkeypatch.setattr(blocks, "WIDE_ELEMENTS", 1)  # the fp32 reference of the largest problems
    for narrow, wide in zip(solve(), kept, strict=True):
        assert (narrow - wide).norm() < 1e-5 * wide.norm()


@pytest.mark.gpu
@pytest.mark.parametrize("family", Family)
@pytest.mark.parametrize(("batch", "seqlen"), [(2, 333), (1, 20_000)])
def test_on_cuda_the_stack_agrees_with_the_reference(
    family: Family, batch: int, seqlen: int
) -> None:
    problem = make_problem(family, batch=batch, seqlen=seqlen, d_model=64)
    judge = block_family(problem)
    inputs = judge.make_inputs(problem, dtype=torch.bfloat16, device="cuda", seed=0)
    sample = judge.sample(problem, seed=0)
    wide = {name: value.double() for name, value in inputs.items()}
    (truth,) = judge.reference(problem, wide, sample)
    (honest,) = judge.independent(problem, inputs, sample)
    error = (honest.double() - truth).norm() / truth.norm()
    assert truth.dtype == torch.float64
    assert 1e-4 < error < 2e-2
