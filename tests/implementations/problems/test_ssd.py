import pytest
import torch

from mambench.harness.spec import Family, Problem
from mambench.implementations.problems import draws
from mambench.implementations.problems.base import Sample
from mambench.implementations.problems.ssd import SsdProblem

ALL = Sample()


def make(**changes):
    sizes = {"batch": 2, "seqlen": 37, "d_inner": 16, "headdim": 4, "d_state": 3, "ngroups": 1}
    return Problem(family=Family.SSD, **{**sizes, **changes})


def inputs_of(problem, dtype=torch.float64, seed=0):
    inputs = SsdProblem().make_inputs(problem, dtype=dtype, device="cpu", seed=seed)
    for tensor in inputs.values():
        tensor.requires_grad_()
    return inputs


@pytest.mark.parametrize("solution", ["reference", "independent"])  # fp64 rounds operands to fp64
@pytest.mark.parametrize("seqlen", [1, 2, 37, 130])
@pytest.mark.parametrize(("ngroups", "gated"), [(1, False), (2, True)])
def test_solutions_equal_the_literal_loop(
    literal_ssd, assert_close, solution, seqlen, ngroups, gated
):
    problem = make(seqlen=seqlen, ngroups=ngroups, gated=gated)
    inputs = inputs_of(problem)
    (y,) = getattr(SsdProblem(), solution)(problem, inputs, ALL)
    expected, _ = literal_ssd(**inputs)
    grad = torch.randn_like(expected)
    assert_close(y, expected, 1e-12)
    actual_grads = torch.autograd.grad(y, list(inputs.values()), grad)
    expected_grads = torch.autograd.grad(expected, list(inputs.values()), grad)
    for actual, wanted in zip(actual_grads, expected_grads, strict=True):
        assert_close(actual, wanted, 1e-12)


def test_reference_in_slices_equals_it_whole(monkeypatch, assert_close):
    problem = make(ngroups=2, gated=True)
    results = []
    for elements in (1 << 24, 1):
        monkeypatch.setattr(draws, "SLICE_ELEMENTS", elements)
        inputs = inputs_of(problem)
        (y,) = SsdProblem().reference(problem, inputs, ALL)
        results.append((y, *torch.autograd.grad(y.square().sum(), list(inputs.values()))))
    for whole, sliced in zip(*results, strict=True):
        assert_close(sliced, whole, 1e-14)


def test_independent_errs_as_much_as_rounded_operands_do(assert_close):
    problem = make(batch=1, seqlen=300, d_inner=32, headdim=16, d_state=16)
    inputs = inputs_of(problem, torch.bfloat16)
    wide = {name: tensor.double() for name, tensor in inputs.items()}
    (expected,) = SsdProblem().reference(problem, wide, ALL)
    (y,) = SsdProblem().independent(problem, inputs, ALL)
    assert y.dtype == torch.bfloat16
    rounding = torch.finfo(torch.bfloat16).eps / 12**0.5  # of one element, root mean square
    error = (y.double() - expected).norm() / expected.norm()
    assert rounding / 2 < error < 4 * rounding


def test_a_sample_has_the_outputs_and_gradients_of_the_whole(assert_close):
    problem, family = make(d_inner=32, ngroups=4), SsdProblem()
    sample = Sample(heads=(0, 3, 7))
    inputs = inputs_of(problem)
    (whole,) = family.reference(problem, inputs, ALL)
    selected = {
        name: tensor.detach().requires_grad_()
        for name, tensor in family.select_inputs(problem, inputs, sample).items()
    }
    (part,) = family.reference(problem, selected, sample)
    (expected,) = family.select_outputs(problem, (whole,), sample)
    assert_close(part, expected, 1e-14)
    grad = torch.randn_like(part)
    grads = torch.autograd.grad(part, list(selected.values()), grad)
    of_whole = torch.autograd.grad(expected, list(inputs.values()), grad)
    wanted = family.select_inputs(problem, dict(zip(inputs, of_whole, strict=True)), sample)
    for actual, name in zip(grads, selected, strict=True):
        assert_close(actual, wanted[name], 1e-12)


@pytest.mark.parametrize("seqlen", [512, 65_536])
def test_some_heads_remember_longer_than_the_sequence(seqlen):
    problem = make(batch=1, seqlen=seqlen, d_inner=64, d_state=1)
    inputs = SsdProblem().make_inputs(problem, dtype=torch.float32, device="cpu", seed=0)
    dt = torch.nn.functional.softplus(inputs["dt"] + inputs["dt_bias"])
    kept = torch.exp((dt[0] * inputs["A"]).sum(0))
    lasting = draws.long_memory(16)
    assert (kept[lasting] > 0.1).all()
    assert (inputs["D"][lasting] == 0).all()
    assert ((inputs["A"][~lasting] <= -1) & (inputs["A"][~lasting] >= -16)).all()


def test_sampling_starts_above_the_budget_and_the_token_limit():
    family = SsdProblem()
    sizes = {"batch": 1, "headdim": 64, "d_state": 128}
    assert family.sample(make(seqlen=16_384, d_inner=8192, **sizes), seed=0) == Sample()
    heads = family.sample(make(seqlen=131_072, d_inner=8192, **sizes), seed=0).heads
    assert heads is not None
    assert len(heads) == 16  # 2 ** 34 states
    assert {0, 127} <= set(heads)
