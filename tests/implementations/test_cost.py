import subprocess
import sys
from pathlib import Path

import pytest

from mambench.harness.spec import Case, DType, Family, Level, Pass, Problem
from mambench.implementations.cost import case_cost

S6 = Problem(family=Family.S6, batch=2, seqlen=128, d_inner=64, d_state=16, ngroups=1)
SSD = Problem(family=Family.SSD, batch=2, seqlen=128, d_inner=64, headdim=16, d_state=16)
ATTENTION = Problem(family=Family.ATTENTION, batch=2, seqlen=128, d_inner=64, headdim=16)
BLOCK = Problem(
    family=Family.SSD,
    level=Level.BLOCK,
    batch=2,
    seqlen=128,
    d_inner=64,
    d_model=32,
    headdim=16,
    d_state=16,
    ngroups=1,
)


def cost(problem, pass_=Pass.FORWARD, dtype=DType.FP32):
    case = Case(implementation="x", variant="x", problem=problem, pass_=pass_, dtype=dtype)
    return case_cost(case)


@pytest.mark.parametrize("problem", [S6, SSD, ATTENTION, BLOCK])
def test_bytes_cover_the_activations_and_scale_with_the_dtype(problem):
    wide, narrow = cost(problem), cost(problem, dtype=DType.BF16)
    assert wide.model_flop == narrow.model_flop > 0
    assert wide.compulsory_bytes >= 2 * problem.tokens * (problem.d_model or problem.d_inner) * 4
    assert narrow.compulsory_bytes < wide.compulsory_bytes <= 2 * narrow.compulsory_bytes


@pytest.mark.parametrize("problem", [S6, SSD, ATTENTION])
def test_training_is_at_least_forward_and_backward(problem):
    parts = [cost(problem, pass_) for pass_ in (Pass.FORWARD, Pass.BACKWARD)]
    training = cost(problem, Pass.TRAINING)
    assert training.model_flop == sum(part.model_flop for part in parts)
    assert training.compulsory_bytes >= max(part.compulsory_bytes for part in parts)


def test_only_a_block_has_weights():
    assert cost(S6).weight_count is None
    weights = cost(BLOCK).weight_count
    assert weights is not None
    assert weights > 2 * 3 * 32 * 64  # two blocks, in_proj and out_proj alone


def test_a_missing_size_is_named():
    with pytest.raises(ValueError, match="d_state"):
        cost(Problem(family=Family.S6, batch=1, seqlen=8, d_inner=4))


def test_it_needs_no_torch():
    start = Path(__file__).resolve().parents[2] / "mambench" / "_start.py"
    program = (
        "import runpy, sys, pathlib; "
        f"runpy.run_path({str(start)!r})['load_package'](pathlib.Path({str(start.parent)!r})); "
        "import mambench.implementations.cost, mambench.kernels.s6.cost, "
        "mambench.kernels.ssd.cost, mambench.kernels.attention.cost, "
        "mambench.implementations.ops.naive_recurrence, "
        "mambench.implementations.ops.associative_scan; "
        "sys.exit('torch' in sys.modules or 'triton' in sys.modules)"
    )
    subprocess.run([sys.executable, "-P", "-c", program], check=True)
