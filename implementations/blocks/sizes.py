"""Widths that follow from a block-level problem; torch-free, for the modules and the cost model."""

from mambench.harness.spec import Problem

CONV_WIDTH = 4  # taps of the causal convolution of both Mamba blocks
_MLP_MULTIPLE = 64


def d_model_of(problem: Problem) -> int:
    """Return the width of the residual stream; raises ValueError where the problem has none."""
    if problem.d_model is None:
        raise ValueError(f"level {problem.level} needs d_model, got {problem}")
    return problem.d_model


def d_state_of(problem: Problem) -> int:
    """Return the state size; raises ValueError where the problem has none."""
    if problem.d_state is None:
        raise ValueError(f"family {problem.family} needs d_state, got {problem}")
    return problem.d_state


def nblocks_of(problem: Problem) -> int:
    """Return how many blocks run in sequence: one transformer layer weighs two Mamba blocks."""
    return problem.nblocks or 1


def mlp_width(d_model: int) -> int:
    """Return the hidden width of the gated MLP: 8/3 d_model to the nearest multiple of 64.

    Its three matrices then have the 8 d_model^2 weights that a plain MLP of width 4 d_model has,
    and the layer 12 d_model^2: exactly where 24 divides d_model, else to within 8 / d_model of it.
    """
    multiples = (16 * d_model + 3 * _MLP_MULTIPLE) // (6 * _MLP_MULTIPLE)  # 8/3 d, rounded half up
    return _MLP_MULTIPLE * max(1, multiples)


def dt_rank(d_model: int) -> int:
    """Return the rank of Mamba's projection to the step size: d_model / 16, rounded up."""
    return -(-d_model // 16)
