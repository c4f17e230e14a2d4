"""Gradients of every input of the selective scan, at random shapes, against float64 autograd."""

import functools
import importlib
import random
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch

from mambench.kernels import recurrence_torch, scan_torch

SHAPES = 200
OPTIONAL = ("D", "z", "delta_bias")


def operation(module):
    op = importlib.import_module(f"mambench.kernels.s6.{module}").selective_scan
    return functools.partial(op, return_last_state=True)


def drawn(literal, seed, *, started, longest, d_states=(16,), **options):
    """Draw inputs of a random shape, with some of what is optional."""
    draw = random.Random(seed)
    ngroups = draw.choice((1, 1, 2, 3))
    shape = (
        draw.randint(1, 3),
        ngroups * draw.randint(1, 40),
        int(longest ** draw.random()),
        draw.choice(d_states),
        ngroups,
    )
    without = tuple(name for name in OPTIONAL if draw.random() < 0.2)
    state = started and draw.random() < 0.5
    return shape, literal.draw(*shape, seed=seed, without=without, started=state, **options)


@pytest.mark.usefixtures("poisoned")
def test_random_shapes_on_the_cpu(literal):
    op, wrong = operation("numba_scan"), {}
    for seed in range(30):
        sizes = {"started": True, "longest": 150, "d_states": (1, 5, 16)}
        shape, inputs = drawn(literal, seed, **sizes)
        wrong |= (
            {shape: found} if (found := literal.excesses(inputs, literal.run(op, inputs))) else {}
        )
    assert not wrong


@pytest.mark.parametrize("module", [recurrence_torch, scan_torch], ids=lambda m: m.__name__)
def test_the_plain_implementations_start_from_a_state_too(literal, module):
    op = functools.partial(module.selective_scan, return_last_state=True)
    inputs = literal.draw(2, 6, 23, 3, 2, started=True)
    assert not literal.excesses(inputs, literal.run(op, inputs))
    exact = {name: value.detach().double() for name, value in inputs.items()}
    got, want = literal.run(op, exact), literal.truth(inputs)
    assert all(literal.distance(got[name], want[name]) < 1e-12 for name in want)


def test_the_hopper_scan_refuses_a_state(literal):
    pytest.importorskip("triton.experimental.gluon")
    inputs = {k: v.detach() for k, v in literal.draw(1, 4, 8, 2, started=True).items()}
    with pytest.raises(ValueError, match="starts from zero, got initial_state: use the Triton"):
        operation("hopper_op")(**inputs)


# Of the problems on a GPU: groups, what is left out, whether it begins with a state. Each is
# compiled for, and a size once for 1, once for multiples of 16 and once for the rest: so sizes are
# free, but odd, apart from a few lengths.
FORMS = (
    (1, (), True), (2, (), False), (8, ("z",), True),
    (1, OPTIONAL, False), (2, ("D", "delta_bias"), True), (1, ("z", "D"), False),
)  # fmt: skip
# What is added to delta before softplus, the decay A, and what u is multiplied with.
STEPS = {"usual": 0.0, "tiny": -20.0, "large": 8.0, "huge": 60.0}
DECAYS = {"usual": None, "near 0": -1e-7, "strong": -1e6, "zero": 0.0}
INPUTS = {"usual": 1.0, "zero": 0.0, "huge": 1e4}


def problem_on_the_gpu(literal, seed, *, started):
    """Draw a shape and its inputs; every other problem is extreme in one or several ways."""
    draw = random.Random(seed)
    ngroups, without, state = FORMS[seed % len(FORMS)]
    channels = ngroups * (2 * draw.randint(0, 19) + 1)
    seqlen = draw.choice((1, 128)) if seed % 25 == 0 else 2 * int(90 ** draw.random()) + 1
    shape = (draw.randint(2, 3) if ngroups > 1 else 1, channels, seqlen, 16, ngroups)
    inputs = literal.draw(
        *shape, seed=seed, without=without, started=started and state,
        dtype=torch.bfloat16, device="cuda",
    )  # fmt: skip
    kinds = ("usual",) * 3
    if seed // len(FORMS) % 2:
        kinds = tuple(draw.choice(tuple(of)) for of in (STEPS, DECAYS, INPUTS))
    steps, decay, scale = kinds
    with torch.no_grad():
        inputs["delta"] += STEPS[steps]
        inputs["u"] *= INPUTS[scale]
        if DECAYS[decay] is not None:
            inputs["A"].fill_(DECAYS[decay])
    return (shape, *kinds), inputs


def far(literal, op, inputs, *, tame):
    """Return what is off by name: outputs always; gradients if tame, else what is not finite.

    Sums are fp32, so that what is fp32 is near; what is bf16 is rounded once. In extreme problems a
    gradient that underflows has no relative error to judge.
    """
    got, want = literal.run(op, inputs), literal.truth(inputs)
    wrong = {}
    for name, exact in want.items():
        limit = 2**-7 if got[name].dtype == torch.bfloat16 else 2**-10
        # A gradient may be exactly zero: that of A at one token.
        error = (got[name].double() - exact).norm() / exact.norm().clamp_min(1e-6)
        judged = tame or not name.startswith("d")
        if not (error <= limit if judged else bool(got[name].isfinite().all())):
            wrong[name] = float(error)
    return wrong


@pytest.mark.gpu
@pytest.mark.timeout(600)  # some dozens of kernels are compiled
@pytest.mark.usefixtures("poisoned")
@pytest.mark.parametrize("module", ["triton_scan", "hopper_op"])
def test_two_hundred_shapes_on_the_gpu(literal, module):
    op, started = operation(module), module == "triton_scan"
    problems = [problem_on_the_gpu(literal, seed, started=started) for seed in range(SHAPES)]
    torch.zeros(1, device="cuda").requires_grad_().sum().backward()
    with ThreadPoolExecutor(8) as pool:  # compiles most of the forms side by side
        list(pool.map(lambda problem: literal.run(op, problem[1]), problems[:72]))
    wrong = {}
    for what, inputs in problems:
        if found := far(literal, op, inputs, tame=what[1:] == ("usual",) * 3):
            wrong[what] = found
    assert not wrong


@pytest.mark.gpu
def test_a_decay_that_is_a_little_off_is_noticed(literal):
    def off(*, A, **rest):
        return operation("triton_scan")(A=1.2 * A, **rest)

    problems = [problem_on_the_gpu(literal, seed, started=True) for seed in range(6)]
    assert all(far(literal, off, inputs, tame=True) for what, inputs in problems if what[0][2] > 9)
