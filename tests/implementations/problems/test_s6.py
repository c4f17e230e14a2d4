import pytest
import torch

from mambench.harness.spec import Family, Problem
from mambench.implementations.problems import draws
from mambench.implementations.problems.base import Sample
from mambench.implementations.problems.s6 import S6Problem

ALL = Sample()


def make(**changes):
    sizes = {"batch": 2, "seqlen": 37, "d_inner": 8, "d_state": 3, "ngroups": 1}
    return Problem(family=Family.S6, **{**sizes, **changes})


def inputs_of(problem, dtype=torch.float64, seed=0):
    inputs = S6Problem().make_inputs(problem, dtype=dtype, device="cpu", seed=seed)
    for tensor in inputs.values():
        tensor.requires_grad_()
    return inputs


@pytest.mark.parametrize("seqlen", [1, 2, 37, 130])
@pytest.mark.parametrize(("ngroups", "gated"), [(1, False), (2, True)])
def test_reference_equals_the_literal_loop(literal_s6, assert_close, seqlen, ngroups, gated):
    problem = make(seqlen=seqlen, ngroups=ngroups, gated=gated)
    inputs = inputs_of(problem)
    (y,) = S6Problem().reference(problem, inputs, ALL)
    expected, _ = literal_s6(**inputs)
    grad = torch.randn_like(expected)
    assert_close(y, expected, 1e-12)
    actual_grads = torch.autograd.grad(y, list(inputs.values()), grad)
    expected_grads = torch.autograd.grad(expected, list(inputs.values()), grad)
    for actual, wanted in zip(actual_grads, expected_grads, strict=True):
        assert_close(actual, wanted, 1e-12)


def test_reference_in_slices_equals_it_whole(monkeypatch, assert_close):
    problem = make(ngroups=2)
    results = []
    for elements in (1 << 24, 1):
        monkeypatch.setattr(draws, "SLICE_ELEMENTS", elements)
        inputs = inputs_of(problem)
        (y,) = S6Problem().reference(problem, inputs, ALL)
        results.append((y, *torch.autograd.grad(y.square().sum(), list(inputs.values()))))
    for whole, sliced in zip(*results, strict=True):
        assert_close(sliced, whole, 1e-14)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_independent_is_close_and_rounds_to_the_dtype(assert_close, dtype):
    problem = make(seqlen=200, ngroups=2, gated=True)
    inputs = inputs_of(problem, dtype)
    wide = {name: tensor.double() for name, tensor in inputs.items()}
    (expected,) = S6Problem().reference(problem, wide, ALL)
    (y,) = S6Problem().independent(problem, inputs, ALL)
    assert y.dtype == dtype
    assert_close(y, expected, 4 * torch.finfo(dtype).eps)


def test_a_sample_has_the_outputs_and_gradients_of_the_whole(assert_close):
    problem, family = make(d_inner=16, ngroups=4), S6Problem()
    sample = Sample(channels=(0, 5, 8, 15))
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


def test_inputs_are_as_a_fresh_model_draws_them():
    problem = make(d_inner=512, seqlen=64, d_state=16)
    inputs = S6Problem().make_inputs(problem, dtype=torch.bfloat16, device="cpu", seed=3)
    dt = torch.nn.functional.softplus(inputs["delta_bias"].double())
    assert dt.min() >= 0.999e-3
    assert dt.max() <= 0.1001
    lasting = draws.long_memory(512)
    assert 0.4 < (dt[~lasting] < 1e-2).double().mean() < 0.6  # log-uniform: half of each decade
    assert (inputs["A"] < 0).all()
    assert inputs["A"].dtype == inputs["D"].dtype == torch.float32
    assert inputs["u"].dtype == inputs["B"].dtype == torch.bfloat16
    again = S6Problem().make_inputs(problem, dtype=torch.bfloat16, device="cpu", seed=3)
    assert all(torch.equal(inputs[name], again[name]) for name in inputs)
    other = S6Problem().make_inputs(problem, dtype=torch.bfloat16, device="cpu", seed=4)
    assert not torch.equal(inputs["u"], other["u"])


@pytest.mark.parametrize("seqlen", [512, 65_536])
def test_some_channels_remember_longer_than_the_sequence(seqlen):
    problem = make(batch=1, seqlen=seqlen, d_inner=16, d_state=2)
    inputs = S6Problem().make_inputs(problem, dtype=torch.float32, device="cpu", seed=0)
    dt = torch.nn.functional.softplus(inputs["delta"] + inputs["delta_bias"][:, None])
    kept = torch.exp((dt[0] * inputs["A"][:, :1]).sum(-1))  # of the first state, over the sequence
    lasting = draws.long_memory(16)
    assert (kept[lasting] > 0.1).all()
    assert (inputs["D"][lasting] == 0).all()
    assert kept[~lasting].median() < 0.1


def test_sampling_starts_above_the_budget_and_the_token_limit():
    family = S6Problem()
    assert family.sample(make(batch=1, seqlen=16_384, d_inner=64), seed=0) == Sample()
    large = make(batch=1, seqlen=131_072, d_inner=2048, d_state=16)
    channels = family.sample(large, seed=0).channels
    assert channels is not None
    assert len(channels) == 32  # 2 ** 26 states
    assert {0, 2047} <= set(channels)
    assert sum(c % draws.LONG_MEMORY_EVERY == 0 for c in channels) >= len(channels) // 2
    assert channels != family.sample(large, seed=1).channels
    few = S6Problem(judged_states=1).sample(make(d_inner=64), seed=0).channels
    assert few is not None
    assert len(few) == 4
