"""The attention problem: its references against a textbook formula, and what the sample sees."""

import pytest
import torch
from torch import Tensor

from mambench.harness import gate_errors
from mambench.harness.spec import DType, Family, Problem
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


@pytest.mark.parametrize("block_bytes", [2**15, 2**26])
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


def flash_grad_q(
    q: Tensor, k: Tensor, v: Tensor, grad_out: Tensor, *, spoil: float = 1.0
) -> Tensor:
    """The gradient of q as fused kernels compute it: fp32 log-sum-exp, and out as it was stored."""
    dtype, scale = q.dtype, q.shape[-1] ** -0.5
    q, k, v, grad_out = (tensor.float().transpose(1, 2) for tensor in (q, k, v, grad_out))
    scores = (q @ k.mT * scale).masked_fill(torch.ones(q.shape[2], q.shape[2]).triu(1) > 0, -1e30)
    probabilities = torch.exp(scores - scores.logsumexp(-1, keepdim=True))
    out = (probabilities.to(dtype).float() @ v).to(dtype).float()
    delta = (grad_out * out).sum(-1, keepdim=True) * spoil
    grad_scores = (probabilities * (grad_out @ v.mT - delta)).to(dtype).float()
    return (grad_scores @ k * scale).transpose(1, 2).to(dtype)


@pytest.mark.parametrize(("spoil", "passes"), [(1.0, True), (1.05, False)])
def test_the_stored_outputs_rounding_is_granted_and_no_more(spoil: float, passes: bool) -> None:
    # In the first rows few keys share the weight, and grad_scores is a small difference of products
    # of which one holds the rounded output: there an honest kernel errs far more than elsewhere.
    problem = make_problem(batch=1, seqlen=256, nheads=4, headdim=64)
    inputs = FAMILY.make_inputs(problem, dtype=torch.bfloat16, device="cpu", seed=0)
    grad_out = torch.randn(inputs["q"].shape, generator=torch.Generator().manual_seed(1)).bfloat16()
    sample = Sample(rows=tuple(range(64)))  # sampled rows are judged one by one

    def solved(wide: bool) -> Tensor:
        leaves = {
            name: (tensor.double() if wide else tensor.clone()).requires_grad_()
            for name, tensor in FAMILY.select_inputs(problem, inputs, sample).items()
        }
        (out,) = (FAMILY.reference if wide else FAMILY.independent)(problem, leaves, sample)
        return gradients(out, leaves, grad_out[:, :64].to(out.dtype))["q"]

    candidate = flash_grad_q(**inputs, grad_out=grad_out, spoil=spoil)[:, :64]
    energies = gate_errors.measure(candidate, reference=solved(True), independent=solved(False))
    judged = gate_errors.judge("grad_q", energies, dtype=DType.BF16, seqlen=problem.seqlen)
    assert (judged.excess <= 1) is passes
