"""Cost model of the state-space duality operation (Mamba-2), from shapes alone.

Letters: B batch, L seqlen, H nheads, P headdim, N d_state, G ngroups, e bytes per element,
z = 1 if gated else 0. Imports neither torch nor triton.

Arithmetic is that of the linear recurrence, the cheapest known way to compute the function, and not
of the chunked products that an implementation may execute instead; a multiply-add counts as two, an
exponential and a logistic function as none.

Forward, per batch element, token and head:

    u = dt * x                            P
    state = decay * state + u B^T         3 P N
    y = state C + D * x                   2 P N + 2 P
    y = y * z * sigmoid(z)                2 P, gated only

Backward, with the states given (recomputing them is the implementation's choice):

    grad_state = decay * grad_state + grad_y C^T      3 P N
    grad_C = sum over heads of state^T grad_y         2 P N
    grad_B = sum over heads of grad_state^T u         2 P N
    grad_u = grad_state B                             2 P N
    grad_decay = <grad_state, previous state>         2 P N
    grad_x = dt * grad_u + D * grad_y                 3 P
    grad_dt += <grad_u, x>, grad_D += <grad_y, x>     4 P
    grad_y = grad_out * silu(z), grad_z               6 P, gated only

Compulsory bytes count each input once and each output once; A, D and dt_bias (H values each) are
left out:

    forward     e (2 + z) B L H P + 2 e B L G N + e B L H + 4 B H P N
    backward    e (3 + 2 z) B L H P + 4 e B L G N + 2 e B L H

The last term of the forward pass is the final state in fp32. Training is forward plus backward.
Prefill is the forward pass. Decode is the recurrence of one token, of whose state, in e bytes an
element, every value is read and written:

    decode      e (2 + z) B H P + 2 e B G N + e B H + 2 e B H P N
"""


def state_bytes(*, batch: int, nheads: int, headdim: int, d_state: int, itemsize: int) -> int:
    """Return the bytes of the state (B, H, P, N) that decoding keeps."""
    return itemsize * batch * nheads * headdim * d_state


def cost(
    *,
    pass_name: str,
    batch: int,
    seqlen: int,
    nheads: int,
    headdim: int,
    d_state: int,
    ngroups: int,
    gated: bool,
    itemsize: int,
) -> tuple[int, int]:
    """Return (model_flop, compulsory_bytes) of one pass.

    Args:
        pass_name: "forward", "backward", "training" (both), "prefill" or "decode".
        batch: B.
        seqlen: L, tokens; not used by decode.
        nheads: H.
        headdim: P.
        d_state: N.
        ngroups: G, the number of distinct B and C projections.
        gated: whether the output is multiplied by silu(z).
        itemsize: bytes per element of the activations, and of decode's state.

    Raises:
        ValueError: pass_name is none of these.
    """
    if pass_name == "decode":
        seqlen = 1
    if pass_name == "training":
        sizes = {"batch": batch, "seqlen": seqlen, "nheads": nheads, "headdim": headdim}
        rest = {"d_state": d_state, "ngroups": ngroups, "gated": gated, "itemsize": itemsize}
        parts = [cost(pass_name=name, **sizes, **rest) for name in ("forward", "backward")]
        return sum(flop for flop, _ in parts), sum(moved for _, moved in parts)
    token_heads = batch * seqlen * nheads
    activations = token_heads * headdim
    projections = batch * seqlen * ngroups * d_state
    if pass_name in ("forward", "prefill", "decode"):
        flop = activations * (5 * d_state + 3 + 2 * gated)
        elements = (2 + gated) * activations + 2 * projections + token_heads
        state = batch * nheads * headdim * d_state
        return flop, itemsize * elements + state * (2 * itemsize if pass_name == "decode" else 4)
    if pass_name == "backward":
        flop = activations * (11 * d_state + 7 + 6 * gated)
        elements = (3 + 2 * gated) * activations + 4 * projections + 2 * token_heads
        return flop, itemsize * elements
    raise ValueError(
        f"pass_name is 'forward', 'backward', 'training', 'prefill' or 'decode', got {pass_name!r}"
    )
