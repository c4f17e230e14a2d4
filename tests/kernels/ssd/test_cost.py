import pytest

from mambench.kernels.ssd.cost import cost

SIZES = {"batch": 2, "seqlen": 48, "nheads": 6, "headdim": 8, "d_state": 4, "ngroups": 3}


class Counted:
    """A number that counts the arithmetic done with it."""

    count = 0

    def __init__(self, value=0.0):
        self.value = value

    def _combine(self, other, value):
        Counted.count += 1
        return Counted(value)

    def __mul__(self, other):
        return self._combine(other, self.value * other.value)

    def __add__(self, other):
        return self._combine(other, self.value + other.value)


def recurrence_step(x, B, C, state, *, gated):
    """One token of one head in counted numbers: the literal forward recurrence."""
    decay = dt = skip = gate = z = Counted(0.5)
    outputs = []
    for p, value in enumerate(x):
        u = dt * value
        y = Counted()
        for n in range(len(B)):
            state[p][n] = decay * state[p][n] + u * B[n]
            y = y + state[p][n] * C[n]
        y = y + skip * value
        outputs.append(y * (z * gate) if gated else y)
    return outputs


@pytest.mark.parametrize("gated", [False, True])
def test_forward_flop_are_those_counted_in_the_recurrence(gated):
    headdim, d_state = SIZES["headdim"], SIZES["d_state"]
    vector = [Counted(1.0) for _ in range(d_state)]
    state = [[Counted() for _ in range(d_state)] for _ in range(headdim)]
    Counted.count = 0
    recurrence_step([Counted(1.0)] * headdim, vector, vector, state, gated=gated)
    flop, _ = cost(pass_name="forward", **SIZES, gated=gated, itemsize=2)
    assert flop == Counted.count * SIZES["batch"] * SIZES["seqlen"] * SIZES["nheads"]


@pytest.mark.parametrize("gated", [False, True])
def test_bytes_are_those_of_the_tensors(gated):
    batch, seqlen, nheads = SIZES["batch"], SIZES["seqlen"], SIZES["nheads"]
    x = batch * seqlen * nheads * SIZES["headdim"] * 2
    dt = batch * seqlen * nheads * 2
    B = batch * seqlen * SIZES["ngroups"] * SIZES["d_state"] * 2
    final = batch * nheads * SIZES["headdim"] * SIZES["d_state"] * 4
    z = x if gated else 0
    forward_inputs = x + z + dt + B + B
    _, forward = cost(pass_name="forward", **SIZES, gated=gated, itemsize=2)
    _, backward = cost(pass_name="backward", **SIZES, gated=gated, itemsize=2)
    assert forward == forward_inputs + x + final
    assert backward == forward_inputs + x + forward_inputs  # inputs, grad_out; one gradient each


def test_training_is_forward_and_backward():
    keywords = {**SIZES, "gated": True, "itemsize": 4}
    parts = [cost(pass_name=name, **keywords) for name in ("forward", "backward")]
    assert cost(pass_name="training", **keywords) == tuple(map(sum, zip(*parts, strict=True)))


def test_values_are_exact_integers_beyond_fp64():
    huge = {**SIZES, "batch": 1 << 20, "seqlen": 1 << 30, "nheads": 129}
    flop, moved = cost(pass_name="training", **huge, gated=True, itemsize=2)
    assert isinstance(flop, int)
    assert isinstance(moved, int)
    assert flop > 1 << 53
    assert flop % (1 << 50) == 0


def test_an_unknown_pass_is_refused():
    with pytest.raises(ValueError, match="'sideways'"):
        cost(pass_name="sideways", **SIZES, gated=False, itemsize=2)
