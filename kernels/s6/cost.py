"""What the selective scan (S6) must compute and move, from shapes alone; imports nothing.

Shapes: u, delta, z, out (B, D, L); B, C (B, G, N, L); A (D, N), D, delta_bias (D,) in fp32.
"""

_STATE_BYTES = 4  # the last state of a prefill is fp32
_PARAMETER_BYTES = 4  # A, D and delta_bias are fp32 whatever the activations are

# Per (b, d, l, n), an exponential counting as one operation.
_FORWARD_STATE_FLOP = 7  # dt A; exp; (dt u) B; decay h + input; y + C h
_BACKWARD_STATE_FLOP = 15  # dh: 3; decay dh h: 2; into dA, ddt, dx, dB and dC: 2 each
# Per (b, d, l).
_FORWARD_TOKEN_FLOP = 7  # delta + bias; softplus: 3; dt u; y + D u: 2
_BACKWARD_TOKEN_FLOP = 11  # du: 3; ddt: 2; softplus': 3; dD: 2; dbias
_FORWARD_GATE_FLOP = 5  # y z sigmoid(z)
_BACKWARD_GATE_FLOP = 10  # dy: 5; dz: 5


def state_bytes(*, batch: int, d_inner: int, d_state: int, itemsize: int) -> int:
    """Return the bytes of the state (B, D, N) that decoding keeps."""
    return itemsize * batch * d_inner * d_state


def cost(
    *,
    pass_name: str,
    batch: int,
    seqlen: int,
    d_inner: int,
    d_state: int,
    ngroups: int,
    gated: bool,
    itemsize: int,
) -> tuple[int, int]:
    """Return (model_flop, compulsory_bytes) of one pass.

    With z = 1 if gated else 0 and e = itemsize (lower case l, d, n, g: sizes):

    - forward flop:  b d l (7 n + 7 + 5 z)
    - backward flop: b d l (15 n + 11 + 10 z); the states are taken as given, so that recomputing
      them is not credited
    - forward bytes:  e ((3 + z) b d l + 2 b g n l) + 4 (d n + 2 d): u, delta, z and out; B and C;
      A, D and delta_bias
    - backward bytes: e ((5 + 2 z) b d l + 4 b g n l) + 8 (d n + 2 d): u, delta, z, dout, du, ddelta
      and dz; B, C, dB and dC; the parameters and their gradients
    - training: forward + backward
    - prefill: forward, and the last state written, 4 b d n bytes
    - decode: forward of one step (seqlen 1), and the state, in e bytes, read and written: 2 e b d n

    Args:
        pass_name: "forward", "backward", "training", "prefill" or "decode".
        seqlen: l; not used by decode.
        itemsize: bytes per element of the activations, B and C, and of decode's state.

    Raises:
        ValueError: pass_name is none of these.
    """
    if pass_name == "decode":
        seqlen = 1
    gate = int(gated)
    tokens = batch * seqlen
    channels = tokens * d_inner
    shared = tokens * ngroups * d_state
    parameter_bytes = _PARAMETER_BYTES * (d_inner * d_state + 2 * d_inner)
    forward = (
        channels
        * (_FORWARD_STATE_FLOP * d_state + _FORWARD_TOKEN_FLOP + _FORWARD_GATE_FLOP * gate),
        itemsize * ((3 + gate) * channels + 2 * shared) + parameter_bytes,
    )
    backward = (
        channels
        * (_BACKWARD_STATE_FLOP * d_state + _BACKWARD_TOKEN_FLOP + _BACKWARD_GATE_FLOP * gate),
        itemsize * ((5 + 2 * gate) * channels + 4 * shared) + 2 * parameter_bytes,
    )
    if pass_name == "forward":
        return forward
    if pass_name == "backward":
        return backward
    if pass_name == "training":
        return forward[0] + backward[0], forward[1] + backward[1]
    state = batch * d_inner * d_state
    if pass_name == "prefill":
        return forward[0], forward[1] + _STATE_BYTES * state
    if pass_name == "decode":
        return forward[0], forward[1] + 2 * itemsize * state
    raise ValueError(
        f"pass_name: got {pass_name!r}, expected forward, backward, training, prefill or decode"
    )
