"""Inputs and references of attention's decode."""

from dataclasses import replace

import pytest
import torch

from mambench.harness.spec import Family, Problem
from mambench.implementations.problems import attention_decode
from mambench.implementations.problems.attention import AttentionProblem
from mambench.implementations.problems.attention_decode import AttentionDecodeProblem
from mambench.implementations.problems.base import Sample

PROBLEM = Problem(family=Family.ATTENTION, batch=3, seqlen=37, d_inner=32, headdim=8)
OWNER = AttentionDecodeProblem()


def draw(problem=PROBLEM):
    return OWNER.make_inputs(problem, dtype=torch.float64, device="cpu", seed=1)


def test_the_reference_is_the_last_row_of_causal_attention(assert_close):
    inputs = draw()
    context = PROBLEM.length
    full = {
        "k": torch.cat((inputs["k_cache"][:, :context], inputs["k"]), 1),
        "v": torch.cat((inputs["v_cache"][:, :context], inputs["v"]), 1),
    }
    full["q"] = torch.zeros_like(full["k"])
    full["q"][:, -1:] = inputs["q"]
    longer = replace(PROBLEM, seqlen=context + 1)
    (expected,) = AttentionProblem().reference(longer, full, Sample())
    y, k, v = OWNER.reference(PROBLEM, OWNER.select_inputs(PROBLEM, inputs, Sample()), Sample())
    assert_close(y, expected[:, -1:], 1e-12)
    assert torch.equal(k, inputs["k"])
    assert torch.equal(v, inputs["v"])


def test_a_cache_has_room_for_the_token_and_an_end_that_must_not_be_seen():
    inputs = draw()
    assert inputs["k_cache"].shape[1] > PROBLEM.length + 1
    assert bool((inputs["k_cache"][:, PROBLEM.length + 1 :] != 0).all())
    full = draw(replace(PROBLEM, seqlen=attention_decode.CAPACITY_MULTIPLE - 1))
    assert full["k_cache"].shape[1] == attention_decode.CAPACITY_MULTIPLE


def test_what_may_change_is_the_tokens_position_alone():
    inputs = draw()
    for view in OWNER.updated(PROBLEM, inputs).values():
        assert view.shape == (3, 1, 4, 8)
        view.fill_(7.0)
    for name in ("k_cache", "v_cache"):
        assert bool((inputs[name][:, PROBLEM.length] == 7).all())
        assert not bool((inputs[name][:, PROBLEM.length + 1 :] == 7).any())
    OWNER.reset(PROBLEM, inputs, seed=1)
    assert all(torch.equal(tensor, draw()[name]) for name, tensor in inputs.items())


def test_a_sample_is_the_same_part_of_everything(monkeypatch: pytest.MonkeyPatch):
    problem = replace(PROBLEM, batch=9)
    inputs = draw(problem)
    complete = OWNER.reference(problem, OWNER.select_inputs(problem, inputs, Sample()), Sample())
    monkeypatch.setattr(attention_decode, "JUDGED_ELEMENTS", 3 * 38 * 8)
    sample = OWNER.sample(problem, seed=0)
    assert sample.heads is not None
    assert sample.sequences is not None
    assert len(sample.heads) * len(sample.sequences) < 9 * 4
    part = OWNER.reference(problem, OWNER.select_inputs(problem, inputs, sample), sample)
    for whole, some in zip(OWNER.select_outputs(problem, complete, sample), part, strict=True):
        torch.testing.assert_close(whole, some)
