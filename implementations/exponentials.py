"""How many exponentials a case's pass must compute, from shapes alone. No torch.

A GPU computes an exponential at a sixteenth or less of the rate of its other fp32 arithmetic, so
that they can be what binds: in the selective scan with its N per token and channel, and in
attention with one per pair of tokens. Counted are those of which there are more than one per
element of an input or output; softplus, SiLU and the row statistics of attention are not.

Per batch element:

- s6: decay = exp(dt A), D N per token, in the forward and, anew, in the backward pass;
- ssd: decay = exp(dt A), H per token and pass;
- attention: exp(score), H for each pair of tokens that causality leaves, in the forward and, since
  probabilities are recomputed and not stored, in the backward pass; decode: H for each key.
"""

from mambench.harness.spec import Case, Family, Level

_DECODE = "decode"
_TWICE = "training"


def case_exponentials(case: Case) -> int:
    """Return the exponentials of one execution of the case's pass; of all blocks of a block.

    Raises ValueError if the problem lacks a size that its family needs.
    """
    problem = case.problem
    length = 1 if problem.seqlen is None else problem.seqlen
    decodes = case.pass_.value == _DECODE
    if problem.family is Family.ATTENTION:
        pairs = length + 1 if decodes else length * (length + 1) // 2
        count = problem.nheads * pairs
    else:
        per_token = _per_token(case)
        count = per_token * (1 if decodes else length)
    passes = 2 if case.pass_.value == _TWICE else 1
    blocks = (problem.nblocks or 1) if problem.level is Level.BLOCK else 1
    return problem.batch * count * passes * blocks


def _per_token(case: Case) -> int:
    problem = case.problem
    if problem.family is Family.SSD:
        return problem.nheads
    if problem.d_state is None:
        raise ValueError("the problem lacks a size that its family needs (d_state)")
    return problem.d_inner * problem.d_state
