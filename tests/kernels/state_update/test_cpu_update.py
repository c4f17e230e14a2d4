"""The state update on the CPU, in Numba and in torch, and what all refuse."""

import random

import pytest
import torch

from mambench.kernels.state_update import torch_update
from mambench.kernels.state_update.arguments import check_arguments

numba_update = pytest.importorskip("mambench.kernels.state_update.numba_update")
FP32 = torch.float32


def test_torch_on_random_shapes(cases):
    draw = random.Random(0)
    for seed in range(40):
        shape = cases.draw_shape(draw, small=True) | {"dtype": draw.choice(cases.DTYPES)}
        operation = torch_update.selective_state_update
        assert cases.wrong(operation, shape, seed=seed, device="cpu") == {}, cases.describe(shape)


def test_numba_on_random_shapes(cases):
    draw = random.Random(1)
    for seed in range(40):
        shape = cases.draw_shape(draw, small=True) | {"dtype": draw.choice(cases.DTYPES)}
        shape |= {"state_dtype": FP32, "strided": False, "d_state": draw.choice((16, 64, 128))}
        operation = numba_update.selective_state_update
        assert cases.wrong(operation, shape, seed=seed, device="cpu") == {}, cases.describe(shape)


SHAPE = {
    "batch": 4, "entries": 64, "groups": 2, "headdim": 16, "d_state": 64, "dtype": FP32,
    "state_dtype": FP32, "gated": True, "skip": True, "bias": True, "softplus": True,
    "strided": False, "extreme": False,
}  # fmt: skip


@pytest.mark.parametrize("headdim", [16, None])
def test_numba_shares_a_large_state_between_threads(cases, headdim):
    entries = 64 if headdim else 1024
    shape = SHAPE | {"headdim": headdim, "entries": entries}
    assert 4 * entries * (headdim or 1) * 64 >= 2 * (1 << 16)
    before = torch.get_num_threads()
    torch.set_num_threads(3)
    try:
        operation = numba_update.selective_state_update
        assert cases.wrong(operation, shape, seed=0, device="cpu") == {}
    finally:
        torch.set_num_threads(before)


@pytest.mark.filterwarnings("ignore::DeprecationWarning")  # PyTorch's own, while it compiles
@pytest.mark.parametrize("module", [numba_update, torch_update])
@pytest.mark.parametrize("headdim", [16, None])
def test_a_decoding_loop_compiles_whole(cases, module, headdim):
    shape = SHAPE | {"headdim": headdim}
    assert cases.traced(module.selective_state_update, shape, "cpu", "aot_eager") == []


def test_the_operator_is_what_it_declares(cases):
    positional, keywords = cases.make(SHAPE, seed=0, device="cpu")
    given = [keywords[name] for name in ("D", "z", "dt_bias", "dt_softplus")]
    torch.library.opcheck(torch.ops.mambench.state_update_numba.default, (*positional, *given))


def test_numba_computes_in_fp64_what_is_fp64(cases):
    shape = SHAPE | {"dtype": torch.float64, "state_dtype": torch.float64}
    positional, keywords = cases.make(shape, seed=0, device="cpu")
    y_true, state_true = cases.reference(positional, keywords)
    y = numba_update.selective_state_update(*positional, **keywords)
    torch.testing.assert_close(y, y_true, rtol=1e-6, atol=1e-6)  # A and dt_bias are fp32
    torch.testing.assert_close(positional[0], state_true, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize(
    ("change", "says"),
    [
        ({"d_state": 20}, "multiple of 16"),
        ({"state_dtype": torch.bfloat16}, "fp32 or fp64"),
        ({"strided": True}, "contiguous"),
    ],
)
def test_numba_refuses_what_it_cannot_update_in_place(cases, change, says):
    positional, keywords = cases.make(SHAPE | change, seed=0, device="cpu")
    with pytest.raises(TypeError, match=says):
        numba_update.selective_state_update(*positional, **keywords)


def positional():
    return {
        "state": torch.zeros(2, 4, 8, 16), "x": torch.zeros(2, 4, 8), "dt": torch.zeros(2, 4),
        "A": torch.zeros(4), "B": torch.zeros(2, 2, 16), "C": torch.zeros(2, 2, 16),
        "D": torch.zeros(4), "z": None, "dt_bias": None,
    }  # fmt: skip


def test_right_arguments_are_accepted():
    check_arguments(**positional())
    s6 = {"state": torch.zeros(2, 4, 16), "x": torch.zeros(2, 4), "A": torch.zeros(4, 16)}
    check_arguments(**(positional() | s6))


@pytest.mark.parametrize(
    ("change", "error", "says"),
    [
        ({"x": torch.zeros(2, 4, 9)}, ValueError, "state: expected shape"),
        ({"dt": torch.zeros(2, 4, 8)}, ValueError, r"dt: expected shape \(2, 4\)"),
        ({"A": torch.zeros(4, 16)}, ValueError, r"A: expected shape \(4,\)"),
        ({"B": torch.zeros(2, 3, 16)}, ValueError, "ngroups divides"),
        ({"C": torch.zeros(2, 1, 16)}, ValueError, "C: expected shape"),
        ({"D": torch.zeros(4, 8)}, ValueError, "D: expected shape"),
        ({"dt_bias": torch.zeros(4, dtype=torch.int32)}, TypeError, "dt_bias: expected a floating"),
        ({"z": torch.zeros(2, 4, 8, device="meta")}, ValueError, "z: expected on cpu"),
        ({"state": torch.zeros(2, 4, 16, 8).mT}, ValueError, "not copied"),
        ({"state": torch.zeros(2, 4, 8, 0)}, ValueError, "sizes of at least 1"),
    ],
)
def test_wrong_arguments_are_named(change, error, says):
    with pytest.raises(error, match=says):
        check_arguments(**(positional() | change))


def test_too_many_states_are_refused():
    sizes = {"state": torch.zeros(2, 4, 8, 257), "B": torch.zeros(2, 2, 257)}
    with pytest.raises(ValueError, match="at most 256"):
        check_arguments(**(positional() | sizes))
