"""FlexAttention: its mask and layout without compilation, and on a GPU as it is compiled."""

import warnings

import pytest
import torch

from mambench.harness.spec import Family, Problem
from mambench.implementations.problems.attention import AttentionProblem
from mambench.kernels.attention import flex

SEQLEN = 150  # not a multiple of the mask's blocks of 128
PROBLEM = Problem(family=Family.ATTENTION, batch=2, seqlen=SEQLEN, d_inner=96, headdim=32)


@pytest.fixture
def uncompiled(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Run what would be compiled; returns the lengths that a mask was made for."""
    lengths: list[int] = []
    original = flex.create_block_mask

    def counted(*arguments, _compile):
        lengths.append(arguments[3])
        return original(*arguments)

    monkeypatch.setattr(flex, "create_block_mask", counted)
    monkeypatch.setattr(flex, "compiled", lambda function, dynamic: function)
    return lengths


def called(op, problem, dtype=torch.float32, device="cpu"):
    family = AttentionProblem()
    inputs = family.make_inputs(problem, dtype=dtype, device=device, seed=3)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # that it runs uncompiled
        (out,) = family.call(op, problem, inputs)
    (expected,) = family.reference(
        problem, {k: v.double() for k, v in inputs.items()}, family.sample(problem, seed=0)
    )
    return out, expected


def test_it_attends_to_earlier_tokens_alone(uncompiled):
    out, expected = called(flex.causal(), PROBLEM)
    torch.testing.assert_close(out.double(), expected, rtol=1e-5, atol=1e-5)


def test_a_mask_that_hides_the_token_itself_is_seen(uncompiled, monkeypatch):
    monkeypatch.setattr(flex, "_earlier", lambda b, h, query, key: query > key)
    out, expected = called(flex.causal(), PROBLEM)
    assert not torch.allclose(out[:, 1:].double(), expected[:, 1:], rtol=1e-2, atol=1e-2)


def test_the_mask_of_a_length_is_made_once(uncompiled):
    op = flex.causal()
    for _ in range(2):
        called(op, PROBLEM)
    assert uncompiled == [SEQLEN]


@pytest.mark.gpu
@pytest.mark.filterwarnings("ignore")  # torch's own, while it compiles
def test_compiled_it_is_right_and_differentiable_twice():
    op = flex.causal()
    out, expected = called(op, PROBLEM, device="cuda")
    torch.testing.assert_close(out.double(), expected, rtol=1e-2, atol=1e-2)
    inputs = AttentionProblem().make_inputs(PROBLEM, dtype=torch.bfloat16, device="cuda", seed=1)
    leaves = [value.requires_grad_() for value in inputs.values()]
    out = op(*leaves)
    first, again = (
        torch.autograd.grad(out, leaves, torch.ones_like(out), retain_graph=True) for _ in range(2)
    )
    for a, b in zip(first, again, strict=True):
        torch.testing.assert_close(a, b)
