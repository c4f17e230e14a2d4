"""What a stack of blocks must do, from shapes alone. Torch-free.

Counted are the matrix products of the projections (2 FLOP per weight and token forward, 4 backward:
the gradients of the input and of the weight), the causal convolution likewise, and the mixer by its
own model. Norms, rotary embedding, SiLU, the Mamba-2 gate and residual additions are not: together
they are a few operations per channel and token, below a percent of the products.

Compulsory bytes see the stack as one operation: forward reads x and the weights and writes y;
backward reads x, grad_y and the weights and writes the gradients of x and of the weights; training
is both. What is kept between the passes, and what goes in and out of the kernels inside a block, is
an implementation's choice.
"""

from mambench.harness.spec import Cost, DType, Family, Pass, Problem
from mambench.implementations.blocks.sizes import (
    CONV_WIDTH,
    d_model_of,
    d_state_of,
    dt_rank,
    mlp_width,
    nblocks_of,
)
from mambench.kernels.attention.cost import cost as attention_cost
from mambench.kernels.s6.cost import cost as s6_cost
from mambench.kernels.ssd.cost import cost as ssd_cost

_FORWARDS = {Pass.FORWARD: 1, Pass.BACKWARD: 2, Pass.TRAINING: 3}  # products, in forwards' worth


def cost(problem: Problem, pass_: Pass, dtype: DType) -> Cost:
    """Return the model FLOP, compulsory bytes and weights of all blocks of a problem.

    Args:
        problem: of level block; d_model is set.
        pass_: what is executed once.
        dtype: of x and of all weights but A_log, D and dt_bias, which are fp32 at least.
    """
    nblocks = nblocks_of(problem)
    multiplied, others, exact = (nblocks * count for count in _weights(problem))
    mixer_flop, _ = _mixer(problem, pass_, dtype)
    products = 2 * problem.tokens * multiplied * _FORWARDS[pass_]
    weight_bytes = (multiplied + others) * dtype.itemsize + exact * max(dtype.itemsize, 4)
    stream_bytes = problem.tokens * d_model_of(problem) * dtype.itemsize
    one_way = 2 * stream_bytes + weight_bytes  # read x and the weights, write y
    back = 3 * stream_bytes + 2 * weight_bytes
    moved = {Pass.FORWARD: one_way, Pass.BACKWARD: back, Pass.TRAINING: one_way + back}
    return Cost(
        model_flop=products + nblocks * mixer_flop,
        compulsory_bytes=moved[pass_],
        weight_count=multiplied + others + exact,
    )


def _weights(problem: Problem) -> tuple[int, int, int]:
    """Count one block's weights: multiplied with each token; other; kept in fp32 at least."""
    d_model, d_inner = d_model_of(problem), problem.d_inner
    if problem.family is Family.ATTENTION:
        return 4 * d_model * d_inner + 3 * d_model * mlp_width(d_model), 2 * d_model, 0
    d_state = d_state_of(problem)
    shared = 2 * (problem.ngroups or 1) * d_state  # B and C
    if problem.family is Family.S6:
        rank = dt_rank(d_model)
        projections = 3 * d_model * d_inner + d_inner * (rank + shared) + rank * d_inner
        return projections + CONV_WIDTH * d_inner, d_model + d_inner, d_inner * (d_state + 2)
    convolved = d_inner + shared
    projections = d_model * (d_inner + convolved + problem.nheads) + d_inner * d_model
    others = d_model + convolved + d_inner  # norm, bias of the convolution, gated norm
    return projections + CONV_WIDTH * convolved, others, 3 * problem.nheads


def _mixer(problem: Problem, pass_: Pass, dtype: DType) -> tuple[int, int]:
    batch, seqlen, itemsize = problem.batch, problem.length, dtype.itemsize
    if problem.family is Family.ATTENTION:
        return attention_cost(
            pass_name=pass_.value,
            batch=batch,
            seqlen=seqlen,
            nheads=problem.nheads,
            headdim=problem.d_inner // problem.nheads,
            itemsize=itemsize,
        )
    d_state, ngroups = d_state_of(problem), problem.ngroups or 1
    if problem.family is Family.S6:
        return s6_cost(
            pass_name=pass_.value,
            batch=batch,
            seqlen=seqlen,
            d_inner=problem.d_inner,
            d_state=d_state,
            ngroups=ngroups,
            gated=True,
            itemsize=itemsize,
        )
    return ssd_cost(
        pass_name=pass_.value,
        batch=batch,
        seqlen=seqlen,
        nheads=problem.nheads,
        headdim=problem.d_inner // problem.nheads,
        d_state=d_state,
        ngroups=ngroups,
        gated=False,
        itemsize=itemsize,
    )
