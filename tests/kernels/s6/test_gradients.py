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


@pytest.mark.gpu
@pytest.mark.usefixtures("poisoned")
@pytest.mark.parametrize("module", ["triton_scan", "hopper_op"])
def test_two_hundred_shapes_on_the_gpu(literal, module):
    """Sums are fp32, so gradients in fp32 are near; those in bf16 are rounded once."""
    op, options = operation(module), {"dtype": torch.bfloat16, "device": "cuda"}
    started = module == "triton_scan"

    def inputs_of(seed):
        return drawn(literal, seed, started=started, longest=180, **options)

    torch.zeros(1, device="cuda").requires_grad_().sum().backward()
    with ThreadPoolExecutor(8) as pool:  # compiles most of the forms side by side
        list(pool.map(lambda seed: literal.run(op, inputs_of(seed)[1]), range(24)))
    wrong = {}
    for seed in range(SHAPES):
        shape, inputs = inputs_of(seed)
        got, want = literal.run(op, inputs), literal.truth(inputs)
        far = {}
        for name, exact in want.items():
            limit = 2**-7 if got[name].dtype == torch.bfloat16 else 2**-10
            # A gradient may be exactly zero: that of A at one token.
            error = (got[name].double() - exact).norm() / exact.norm().clamp_min(1e-6)
            if not error <= limit:
                far[name] = float(error)
        wrong |= {shape: far} if far else {}
    assert not wrong
