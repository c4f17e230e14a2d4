"""The counts, against loops over what an implementation must compute."""

from dataclasses import replace

import pytest

from mambench.harness.spec import Case, DType, Family, Level, Pass, Problem
from mambench.implementations.exponentials import case_exponentials

S6 = Problem(family=Family.S6, batch=2, seqlen=5, d_inner=6, d_state=4, ngroups=1)
SSD = Problem(family=Family.SSD, batch=2, seqlen=5, d_inner=6, headdim=2, d_state=4)
ATTENTION = Problem(family=Family.ATTENTION, batch=2, seqlen=5, d_inner=6, headdim=2)


def count(problem: Problem, pass_: Pass = Pass.FORWARD) -> int:
    case = Case(implementation="x", variant="x", problem=problem, pass_=pass_, dtype=DType.FP32)
    return case_exponentials(case)


def test_forward_counts():
    assert count(S6) == 2 * 5 * 6 * 4
    assert count(SSD) == 2 * 5 * 3
    assert count(ATTENTION) == 2 * 3 * sum(1 for q in range(5) for k in range(5) if k <= q)


@pytest.mark.parametrize("problem", [S6, SSD, ATTENTION])
def test_training_is_forward_and_backward(problem: Problem):
    assert count(problem, Pass.TRAINING) == count(problem) + count(problem, Pass.BACKWARD)
    assert count(problem, Pass.PREFILL) == count(problem)


def test_decode_is_one_token():
    assert count(ATTENTION, Pass.DECODE) == 2 * 3 * (5 + 1)  # the context and itself
    assert count(replace(S6, seqlen=None), Pass.DECODE) == 2 * 6 * 4
    assert count(replace(SSD, seqlen=None), Pass.DECODE) == 2 * 3


def test_two_mamba_blocks_stand_against_one_of_attention():
    assert count(replace(S6, level=Level.BLOCK, d_model=3)) == 2 * count(S6)
    assert count(replace(ATTENTION, level=Level.BLOCK, d_model=3)) == count(ATTENTION)


def test_a_missing_size_is_named():
    with pytest.raises(ValueError, match="d_state"):
        count(replace(S6, d_state=None))
