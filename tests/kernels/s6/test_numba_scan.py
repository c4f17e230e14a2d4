import functools

import pytest
import torch

from mambench.kernels.s6 import numba_kernels, numba_scan
from mambench.kernels.s6.numba_config import CHUNK, LANES, partial_count, workspace_bytes

pytestmark = pytest.mark.usefixtures("poisoned")

with_state = functools.partial(numba_scan.selective_scan, return_last_state=True)
scan = functools.partial(numba_scan.selective_scan, delta_softplus=True)

SHAPES = [
    # batch, d_inner, seqlen, d_state, ngroups
    (1, LANES, CHUNK, 16, 1),
    (2, LANES + 1, 2 * CHUNK + 5, 16, 1),
    (1, 1, 1, 1, 1),
    (1, 3 * (LANES + 3), 67, 5, 3),
    (1, 8, 41, 256, 2),
]


@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_values_and_gradients(literal, shape):
    inputs = literal.draw(*shape)
    assert not literal.excesses(inputs, literal.run(with_state, inputs))


@pytest.mark.parametrize(
    "without", [("z",), ("D",), ("delta_bias",), ("D", "z", "delta_bias")], ids=str
)
def test_optional_arguments(literal, without):
    inputs = literal.draw(1, LANES + 2, CHUNK + 7, 4, without=without)
    assert not literal.excesses(inputs, literal.run(with_state, inputs))


def test_without_softplus(literal):
    inputs = literal.draw(1, 5, 70, 4)
    with torch.no_grad():
        inputs["delta"].abs_().mul_(0.01)
        inputs["delta_bias"].abs_().mul_(0.01)
    got = literal.run(with_state, inputs, softplus=False)
    assert not literal.excesses(inputs, got, softplus=False)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_narrow_dtypes(literal, dtype):
    inputs = literal.draw(2, 21, 90, 16, dtype=dtype)
    got = literal.run(with_state, inputs)
    assert got["out"].dtype == got["du"].dtype == got["dB"].dtype == dtype
    assert got["last"].dtype == got["dA"].dtype == torch.float32
    assert not literal.excesses(inputs, got)


def test_gradcheck(literal):
    inputs = literal.draw(1, 3, 6, 2, ngroups=3, dtype=torch.float64, started=True)
    names = tuple(inputs)

    def function(*tensors):
        return with_state(**dict(zip(names, tensors, strict=True)), delta_softplus=True)

    assert torch.autograd.gradcheck(function, tuple(inputs.values()), atol=1e-7)


@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_initial_state(literal, shape):
    inputs = literal.draw(*shape, started=True)
    got = literal.run(with_state, inputs)
    assert got["dinitial_state"].shape == inputs["initial_state"].shape
    assert not literal.excesses(inputs, got)


def test_whole_equals_parts(literal):
    inputs = {k: v.detach() for k, v in literal.draw(1, 20, 200, 8).items()}
    cut = 77

    def part(begin, end, **state):
        along_time = {k: inputs[k][..., begin:end] for k in ("u", "delta", "B", "C", "z")}
        return with_state(**{**inputs, **along_time}, **state, delta_softplus=True)

    out, last = part(0, 200)
    head_out, head = part(0, cut)
    tail_out, tail = part(cut, 200, initial_state=head)
    assert literal.distance(out[..., :cut], head_out) < 1e-7
    assert literal.distance(out[..., cut:], tail_out) < 1e-6
    assert literal.distance(tail, last) < 1e-6


def test_a_forgotten_state_is_noticed(literal):
    # What the tests above would see of a kernel that starts every chunk from zero.
    def forgetful(**arguments):
        outs = []
        for begin in range(0, arguments["u"].shape[2], CHUNK):
            along_time = {
                k: arguments[k][..., begin : begin + CHUNK] for k in ("u", "delta", "B", "C", "z")
            }
            out, last = with_state(**{**arguments, **along_time})
            outs.append(out)
        return torch.cat(outs, -1), last

    inputs = literal.draw(1, 20, 3 * CHUNK, 16)
    wrong = literal.excesses(inputs, literal.run(forgetful, inputs))
    assert {"out", "last", "du", "dB", "dA"} <= set(wrong)


def test_same_bits_on_every_run_and_for_every_number_of_threads(literal):
    inputs = literal.draw(2, 150, 130, 16)
    threads = torch.get_num_threads()
    try:
        runs = []
        for count in (1, 2, 3):
            torch.set_num_threads(count)
            runs.append(literal.run(with_state, inputs))
    finally:
        torch.set_num_threads(threads)
    for other in runs[1:]:
        assert all(torch.equal(runs[0][name], other[name]) for name in runs[0])


def test_strided_inputs_and_expanded_gradient(literal):
    packed = torch.randn(2, 40, 70)
    u, z = packed.chunk(2, dim=1)
    inputs = {k: v.detach() for k, v in literal.draw(2, 20, 70, 4).items()} | {"u": u, "z": z}
    out = scan(**inputs)
    assert torch.equal(out, scan(**{k: v.contiguous() for k, v in inputs.items()}))
    leaf = u.detach().requires_grad_()
    scan(**{**inputs, "u": leaf}).sum().backward()
    assert leaf.grad is not None
    assert leaf.grad.isfinite().all()


def test_nan_and_infinity_reach_the_output(literal):
    inputs = {k: v.detach() for k, v in literal.draw(1, 4, 10, 2, without=("z",)).items()}
    inputs["delta"][0, 1, 5] = float("nan")
    inputs["u"][0, 2, 5] = float("inf")
    out = scan(**inputs)
    assert out[0, 1, 5:].isnan().all()
    assert not out[0, 2, 5].isfinite()
    assert out[0, [0, 3]].isfinite().all()


def test_three_dimensional_B_and_C(literal):
    inputs = {k: v.detach() for k, v in literal.draw(1, 4, 10, 2).items()}
    flat = {**inputs, "B": inputs["B"][:, 0], "C": inputs["C"][:, 0]}
    assert torch.equal(scan(**flat), scan(**inputs))


@pytest.mark.parametrize(
    ("name", "value", "message"),
    [
        ("delta", torch.zeros(1, 4, 9), r"delta: expected shape \(1, 4, 10\), got \(1, 4, 9\)"),
        ("B", torch.zeros(1, 3, 2, 10), "multiple of ngroups"),
        ("z", torch.zeros(1, 4, 10, dtype=torch.float64), "z: expected u's dtype"),
        ("A", torch.zeros(4, 257), "at most 256"),
    ],
)
def test_bad_arguments_are_refused(literal, name, value, message):
    inputs = {k: v.detach() for k, v in literal.draw(1, 4, 10, 2).items()}
    with pytest.raises((ValueError, TypeError), match=message):
        numba_scan.selective_scan(**{**inputs, name: value})


def test_workspace_is_what_the_backward_allocates(literal):
    sizes = {"batch": 1, "seqlen": 130, "d_inner": 300, "d_state": 16, "ngroups": 1}
    assert workspace_bytes(**sizes, backward=False, itemsize=4) == 0
    partials = partial_count(d_inner=300, d_state=16, ngroups=1)
    kept = 19 * 3 * 16 * LANES  # blocks, chunks
    assert partials == 18
    expected = 4 * (kept + 2 * partials * 16 * 130)
    assert workspace_bytes(**sizes, backward=True, itemsize=4) == expected


def test_kernels_compile_where_no_cache_can_be_written(monkeypatch):
    def njit(*, cache=False, **options):
        def decorate(function):
            if cache:
                raise RuntimeError("cannot cache function: no locator available")
            return function, options

        return decorate

    def kernel():
        """Stand in for a kernel."""

    monkeypatch.setattr(numba_kernels, "njit", njit)
    assert numba_kernels._jit(nogil=True)(kernel) == (kernel, {"nogil": True})


def test_a_failure_in_a_thread_reaches_the_caller():
    def fail_at_last(begin, end):
        if end == 100:
            raise MemoryError("out of memory")

    with pytest.raises(MemoryError, match="out of memory"):
        numba_scan._in_threads(fail_at_last, 100)
