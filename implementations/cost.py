"""Dispatch of a case to the cost model of its family or block. Imports neither torch nor triton."""

from typing import Any

from mambench.harness.spec import Case, Cost, Family, Level, Pass

_STATE_ITEMSIZE = 4  # a prefill's last state is fp32


def case_cost(case: Case) -> Cost:
    """Return the arithmetic and the compulsory traffic of one execution of the case's pass.

    Raises ValueError if the problem lacks a size that its family needs.
    """
    problem = case.problem
    if problem.level is Level.BLOCK:
        from mambench.implementations.blocks.cost import cost as block_cost

        return block_cost(problem, case.pass_, case.dtype)
    sizes: dict[str, Any] = {"batch": problem.batch, "itemsize": case.dtype.itemsize}
    seqlen = 1 if problem.seqlen is None else problem.seqlen  # an SSM's decode does not use it
    rest: dict[str, Any] = {"pass_name": case.pass_.value, "seqlen": seqlen}
    if problem.family is Family.S6:
        from mambench.kernels.s6 import cost as model

        sizes |= {"d_inner": problem.d_inner}
    elif problem.family is Family.SSD:
        from mambench.kernels.ssd import cost as model

        sizes |= {"nheads": problem.nheads, "headdim": _known(problem.headdim)}
    else:
        from mambench.kernels.attention import cost as model

        sizes |= {"nheads": problem.nheads, "headdim": _known(problem.headdim)}
    if problem.family is not Family.ATTENTION:
        sizes |= {"d_state": _known(problem.d_state)}
        rest |= {"ngroups": problem.ngroups or 1, "gated": problem.gated}
    model_flop, compulsory_bytes = model.cost(**sizes, **rest)
    state_bytes = None
    if case.pass_.leaves_state:
        kept = dict(sizes)
        if problem.family is Family.ATTENTION:
            kept |= rest
        elif case.pass_ is Pass.PREFILL:
            kept |= {"itemsize": _STATE_ITEMSIZE}
        state_bytes = model.state_bytes(**kept)
    return Cost(model_flop=model_flop, compulsory_bytes=compulsory_bytes, state_bytes=state_bytes)


def _known(size: int | None) -> int:
    if size is None:
        raise ValueError("the problem lacks a size that its family needs (headdim or d_state)")
    return size
