"""The block cost model: weights counted like the real modules', products against counted ones."""

import subprocess
import sys
from pathlib import Path

import pytest
import torch

from mambench.harness.spec import DType, Family, Level, Pass, Problem
from mambench.implementations.blocks import cost as cost_module
from mambench.implementations.blocks.cost import cost
from mambench.implementations.blocks.problem import Stack
from mambench.implementations.blocks.sizes import dt_rank, mlp_width
from mambench.kernels.attention.cost import cost as attention_cost


def make_problem(family: Family, d_model: int = 96, ngroups: int = 1, **sizes: int) -> Problem:
    expansion = 1 if family is Family.ATTENTION else 2
    own = {
        Family.ATTENTION: {"headdim": 16},
        Family.S6: {"d_state": 8, "ngroups": ngroups},
        Family.SSD: {"d_state": 8, "headdim": 16, "ngroups": ngroups},
    }[family]
    shape = {"batch": 2, "seqlen": 64} | sizes
    return Problem(
        family=family,
        level=Level.BLOCK,
        d_model=d_model,
        d_inner=expansion * d_model,
        **own,
        **shape,
    )


def make_stack(problem: Problem) -> Stack:
    return Stack(problem, lambda *_, **__: None, dtype=torch.bfloat16, device="meta")


@pytest.mark.parametrize("family", Family)
@pytest.mark.parametrize(("d_model", "ngroups"), [(96, 1), (128, 2), (1000, 1), (1024, 1)])
def test_weight_count_is_that_of_the_modules(family: Family, d_model: int, ngroups: int) -> None:
    if d_model == 1000 and family is not Family.S6:
        d_model = 1008  # a whole number of heads, and no multiple of 64 either
    problem = make_problem(family, d_model, ngroups)
    count = sum(parameter.numel() for parameter in make_stack(problem).parameters())
    assert cost(problem, Pass.FORWARD, DType.BF16).weight_count == count


@pytest.mark.parametrize("family", Family)
def test_weights_are_read_in_their_own_precision(family: Family) -> None:
    problem = make_problem(family)
    weights = sum(p.numel() * p.element_size() for p in make_stack(problem).parameters())
    stream = 2 * 64 * 96 * 2
    assert cost(problem, Pass.FORWARD, DType.BF16).compulsory_bytes == weights + 2 * stream
    assert cost(problem, Pass.BACKWARD, DType.BF16).compulsory_bytes == 2 * weights + 3 * stream


@pytest.mark.parametrize("family", Family)
@pytest.mark.parametrize("d_model", [768, 1024, 2048, 4096])
def test_a_layer_weighs_as_much_as_two_mamba_blocks(family: Family, d_model: int) -> None:
    problem = make_problem(family, d_model)
    weight_count = cost(problem, Pass.FORWARD, DType.BF16).weight_count
    assert weight_count is not None
    assert 11.8 < weight_count / d_model**2 < 13


def test_the_mlp_is_eight_thirds_wide_to_the_nearest_64() -> None:
    assert [mlp_width(d) for d in (16, 768, 1024, 2048)] == [64, 2048, 2752, 5440]


def test_the_step_size_has_a_sixteenth_of_the_rank() -> None:
    assert [dt_rank(d) for d in (1, 16, 17, 2048)] == [1, 1, 2, 128]


def test_flop_of_a_transformer_layer_counted_by_hand() -> None:
    problem = make_problem(Family.ATTENTION)
    tokens, width = 2 * 64, mlp_width(96)
    products = 2 * tokens * (96 * 3 * 96 + 96 * 96 + 96 * 2 * width + width * 96)
    mixer, _ = attention_cost(
        pass_name="forward", batch=2, seqlen=64, nheads=6, headdim=16, itemsize=2
    )
    assert cost(problem, Pass.FORWARD, DType.BF16).model_flop == products + mixer


@pytest.mark.parametrize("family", Family)
def test_training_is_forward_and_backward(family: Family) -> None:
    problem = make_problem(family)
    parts = [cost(problem, pass_, DType.BF16) for pass_ in (Pass.FORWARD, Pass.BACKWARD)]
    whole = cost(problem, Pass.TRAINING, DType.BF16)
    assert whole.model_flop == sum(part.model_flop for part in parts)
    assert whole.compulsory_bytes == sum(part.compulsory_bytes for part in parts)


def test_the_cost_model_imports_no_torch() -> None:
    code = """
import runpy, sys
from pathlib import Path
root = Path(sys.argv[1])
runpy.run_path(str(root / "mambench" / "_start.py"))["load_package"](root / "mambench")
from mambench.implementations.blocks import cost
print(sorted({"torch", "triton", "numpy"} & set(sys.modules)))
"""
    root = Path(cost_module.__file__).parents[2]
    done = subprocess.run(
        [sys.executable, "-P", "-c", code, str(root)], capture_output=True, text=True, check=True
    )
    assert done.stdout.strip() == "[]"
