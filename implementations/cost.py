"""Dispatch of a case to the cost model of its family or block. Imports neither torch nor triton."""

from typing import Any

from mambench.harness.spec import Case, Cost, Family, Level


def case_cost(case: Case) -> Cost:
    """Return the arithmetic and the compulsory traffic of one execution of the case's pass.

    Raises ValueError if the problem lacks a size that its family needs.
    """
    problem = case.problem
    if problem.level is Level.BLOCK:
        from mambench.implementations.blocks.cost import cost as block_cost

        return block_cost(problem, case.pass_, case.dtype)
    sizes: dict[str, Any] = {
        "batch": problem.batch,
        "seqlen": problem.seqlen,
        "itemsize": case.dtype.itemsize,
    }
    if problem.family is Family.S6:
        from mambench.kernels.s6.cost import cost as family_cost

        sizes |= {"d_inner": problem.d_inner}
    elif problem.family is Family.SSD:
        from mambench.kernels.ssd.cost import cost as family_cost

        sizes |= {"nheads": problem.nheads, "headdim": _known(problem.headdim)}
    else:
        from mambench.kernels.attention.cost import cost as family_cost

        sizes |= {"nheads": problem.nheads, "headdim": _known(problem.headdim)}
    if problem.family is not Family.ATTENTION:
        sizes |= {"d_state": _known(problem.d_state), "ngroups": problem.ngroups or 1}
        sizes |= {"gated": problem.gated}
    model_flop, compulsory_bytes = family_cost(pass_name=case.pass_.value, **sizes)
    return Cost(model_flop=model_flop, compulsory_bytes=compulsory_bytes)


def _known(size: int | None) -> int:
    if size is None:
        raise ValueError("the problem lacks a size that its family needs (headdim or d_state)")
    return size
