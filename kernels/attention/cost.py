"""What causal softmax attention must do, from shapes alone. Torch-free.

Per head, attention is a set of (L, L) by P matrix products of which causality leaves half the
square, the convention of the FlashAttention papers (Dao et al. 2022, section 3.1; Dao 2023):

- forward, 2 products: scores = q k^T, out = probabilities v;
- backward, 5 products: the scores once more (recomputed, not stored), grad_probabilities =
  grad_out v^T, grad_v, grad_q and grad_k.

Exponentials and the row statistics are not counted, they are of order L^2 without the factor P.
"""

_ROW_STATISTIC_BYTES = 4  # log-sum-exp of a query row, fp32

_FORWARD_PRODUCTS = 2
_BACKWARD_PRODUCTS = 5


def state_bytes(
    *, pass_name: str, batch: int, seqlen: int, nheads: int, headdim: int, itemsize: int
) -> int:
    """Return the bytes of the keys and values that decoding keeps; in decode one token more."""
    kept = seqlen + (pass_name == "decode")
    return 2 * itemsize * batch * kept * nheads * headdim


def cost(
    *, pass_name: str, batch: int, seqlen: int, nheads: int, headdim: int, itemsize: int
) -> tuple[int, int]:
    """Count the arithmetic and the unavoidable memory traffic of one pass.

    Bytes count each tensor once: forward reads q, k, v and writes out; backward reads q, k, v,
    out, grad_out and the saved log-sum-exp (fp32, one per query row and head) and writes the three
    gradients; training is both, and writes the log-sum-exp in its forward. Prefill is the forward
    pass: the keys and values it reads are the cache, and are not copied. Decode computes one token
    of each sequence, which attends to itself and the seqlen before it: it reads q, the new key and
    value and the cache, and writes the new key and value into the cache, and out.

    Args:
        pass_name: "forward", "backward", "training", "prefill" or "decode".
        batch: sequences.
        seqlen: tokens of each sequence; in decode those before the one computed.
        nheads: heads of q, of k and of v alike.
        headdim: channels of each head.
        itemsize: bytes per element of q, k, v and out.

    Returns:
        `(model_flop, compulsory_bytes)`.

    Raises:
        ValueError: `pass_name` is none of these.
    """
    if pass_name == "decode":
        token = batch * nheads * headdim
        flop = _FORWARD_PRODUCTS * 2 * token * (seqlen + 1)  # all keys are seen, not half of them
        return flop, itemsize * token * (2 * seqlen + 6)
    product_flop = batch * nheads * seqlen * seqlen * headdim  # 2 L^2 P, of which half is causal
    tensor = itemsize * batch * seqlen * nheads * headdim
    statistics = _ROW_STATISTIC_BYTES * batch * seqlen * nheads
    forward = (_FORWARD_PRODUCTS * product_flop, 4 * tensor)
    backward = (_BACKWARD_PRODUCTS * product_flop, 8 * tensor + statistics)
    if pass_name in ("forward", "prefill"):
        return forward
    if pass_name == "backward":
        return backward
    if pass_name == "training":
        return forward[0] + backward[0], forward[1] + backward[1] + statistics
    raise ValueError(
        f"pass_name is {pass_name!r}, expected 'forward', 'backward', 'training', 'prefill' or "
        "'decode'"
    )
