"""The attention problem: its references against a textbook formula, and what the sample sees."""

import pytest
import torch
from torch import Tensor

from mambench.harness.spec import Family, Problem
from mambench.implementations.problems import attention
from mambench.implementations.problems.attention import AttentionProblem
from mambench.implementations.problems.base import Sample

FAMILY = AttentionProblem()


def make_problem(*, batch: int = 2, seqlen: int = 37, nheads: int = 3, headdim: int = 8) -> Problem:
    return Problem(
        family=Family.ATTENTION,
        batch=batch,
        seqlen=seqlen,
        d_inner=nheads * headdim,
        headdim=headdim,
    )


def textbook(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """One query at a time, in words: softmax of the scaled products with the keys so far."""
    rows = []
    for t in range(q.shape[1]):
        scores = torch.einsum("bhp,bshp->bhs", q[:, t], k[:, : t + 1]) / q.shape[-1] ** 0.5
        rows.append(torch.einsum("bhs,bshp->bhp", torch.softmax(scores, -1), v[:, : t + 1]))
    return torch.stack(rows, 1)


def gradients(out: Tensor, inputs: dict[str, Tensor], grad: Tensor) -> dict[str, Tensor]:
    return dict(zip(inputs, torch.autograd.grad(out, list(inputs.values()), grad), strict=True))


def draw(problem: Problem) -> dict[str, Tensor]:
    inputs = FAMILY.make_inputs(problem, dtype=torch.float64, device="cpu", seed=3)
    return {name: tensor.requires_grad_() for name, tensor in inputs.items()}


@pytest.mark.parametrize("block_bytes", [1, 2**12, 2**26])
def test_reference_is_the_textbook_formula_whatever_the_block(
    monkeypatch: pytest.MonkeyPatch, block_bytes: int
) -> None:
    monkeypatch.setattr(attention, "_BLOCK_BYTES", block_bytes)
    problem = make_problem()
    inputs = draw(problem)
    (out,) = FAMILY.reference(problem, inputs, Sample())
    expected = textbook(inputs["q"], inputs["k"], inputs["v"])
    torch.testing.assert_close(out, expected)
    grad = torch.randn_like(out)
    torch.testing.assert_close(gradients(out, inputs, grad), gradients(expected, inputs, grad))


def test_a_sample_is_judged_exactly_as_the_whole_is() -> None:
    problem = make_problem(seqlen=100, nheads=4)
    inputs, sample = draw(problem), Sample(heads=(1, 3), rows=(0, 7, 63, 64, 99))
    whole = FAMILY.reference(problem, inputs, Sample())
    grad = torch.zeros_like(whole[0])
    index = (slice(None), torch.tensor(sample.rows)[:, None], torch.tensor(sample.heads)[None])
    grad[index] = torch.randn(2, 5, 2, 8, dtype=grad.dtype)
    whole_grads = gradients(whole[0], inputs, grad)

    selected = {
        name: tensor.detach().requires_grad_()
        for name, tensor in FAMILY.select_inputs(problem, inputs, sample).items()
    }
    (part,) = FAMILY.reference(problem, selected, sample)
    torch.testing.assert_close((part,), FAMILY.select_outputs(problem, whole, sample))
    (grad_part,) = FAMILY.select_outputs(problem, (grad,), sample)
    torch.testing.assert_close(
        gradients(part, selected, grad_part), FAMILY.select_inputs(problem, whole_grads, sample)
    )


@pytest.mark.parametrize("block_bytes", [2**10, 2**26])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
def test_independent_errs_by_about_a_rounding(
    monkeypatch: pytest.MonkeyPatch, dtype: torch.dtype, block_bytes: int
) -> None:
    monkeypatch.setattr(attention, "_BLOCK_BYTES", block_bytes)
    problem = make_problem(seqlen=150, headdim=32)
    inputs = FAMILY.make_inputs(problem, dtype=dtype, device="cpu", seed=0)
    inputs = {name: tensor.requires_grad_() for name, tensor in inputs.items()}
    (out,) = FAMILY.independent(problem, inputs, Sample())
    truth = {name: t.detach().double().requires_grad_() for name, t in inputs.items()}
    (expected,) = FAMILY.reference(problem, truth, Sample())
    grad = torch.randn(out.shape, dtype=dtype)
    found = {"out": out} | gradients(out, inputs, grad)
    wanted = {"out": expected} | gradients(expected, truth, grad.double())
    for name in wanted:
        error = (found[name] - wanted[name]).norm() / wanted[name].norm()
        assert found[name].dtype == dtype
        assert 0.02 * torch.finfo(dtype).eps < error < 8 * torch.finfo(dtype).eps, name


def test_small_problems_are_judged_whole() -> None:
    assert FAMILY.sample(make_problem(), seed=0) == Sample()


@pytest.mark.parametrize(
    ("batch", "seqlen", "nheads"), [(1, 16_384, 32), (8, 4096, 16), (1, 131_072, 32), (1, 2**21, 8)]
)
def test_a_sample_holds_the_ends_and_keeps_the_reference_cheap(
    batch: int, seqlen: int, nheads: int
) -> None:
    problem = make_problem(batch=batch, seqlen=seqlen, nheads=nheads, headdim=64)
    sample = FAMILY.sample(problem, seed=0)
    assert sample.heads is not None
    assert sample.rows is not None
    assert {0, seqlen - 1} <= set(sample.rows)
    assert list(sample.rows) == sorted(set(sample.rows))
    assert sample.rows[-1] < seqlen
    assert len(sample.rows) >= 32
    assert max(sample.heads) < nheads
    pairs = batch * len(sample.heads) * sum(row + 1 for row in sample.rows)
    assert pairs <= max(2 * attention._PAIRS, 64 * batch * seqlen)


def test_a_sample_depends_on_the_seed_alone() -> None:
    problem = make_problem(seqlen=65_536, nheads=32)
    assert FAMILY.sample(problem, seed=1) == FAMILY.sample(problem, seed=1)
    assert FAMILY.sample(problem, seed=1) != FAMILY.sample(problem, seed=2)


def test_a_tile_of_keys_left_out_is_seen_by_the_sample() -> None:
    problem = make_problem(batch=1, seqlen=8192, nheads=8, headdim=32)
    sample = FAMILY.sample(problem, seed=0)
    assert sample.rows is not None
    inputs = FAMILY.make_inputs(problem, dtype=torch.float32, device="cpu", seed=0)
    selected = FAMILY.select_inputs(problem, inputs, sample)
    truth = {name: tensor.double() for name, tensor in selected.items()}
    (expected,) = FAMILY.reference(problem, truth, sample)
    (honest,) = FAMILY.independent(problem, selected, sample)
    faulty = dict(selected)
    faulty["v"] = selected["v"].clone()
    faulty["v"][:, 4096:4160] = 0  # one tile of 64 keys of 8,192 contributes nothing
    (wrong,) = FAMILY.independent(problem, faulty, sample)
    assert (wrong - expected).norm() > 100 * (honest - expected).norm()


def test_the_same_seed_draws_the_same_inputs() -> None:
    problem = make_problem()
    draws = [
        FAMILY.make_inputs(problem, dtype=torch.bfloat16, device="cpu", seed=seed)
        for seed in (0, 0, 1)
    ]
    assert torch.equal(draws[0]["q"], draws[1]["q"])
    assert not torch.equal(draws[0]["q"], draws[2]["q"])
    assert not torch.equal(draws[0]["q"], draws[0]["k"])
