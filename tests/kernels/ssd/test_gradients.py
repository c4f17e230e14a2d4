"""Gradients of every input of the SSD, at random shapes, against float64 autograd of the loop."""

import importlib
import random
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch

SHAPES = 200


def operation(module):
    return importlib.import_module(f"mambench.kernels.ssd.{module}").ssd


def random_case(seed, *, sizes, longest, varied, dtype, odd=False, **changes):
    """Draw a case: sizes are few where each is compiled for, the length and options are free."""
    draw = random.Random(seed)
    nheads, ngroups, headdim, d_state = draw.choice(sizes)
    batch, seqlen = draw.randint(1, 3), 2 + int(longest ** draw.random()) | odd
    case = {
        "batch": batch, "seqlen": seqlen, "nheads": nheads, "ngroups": ngroups,
        "headdim": headdim, "d_state": d_state, "D": 1, "gated": draw.random() < 0.5,
        "start": draw.random() < 0.5, "final": draw.random() < 0.7,
        "long_memory": draw.random() < 0.3, "dtype": dtype, "seed": seed, **changes,
    }  # fmt: skip
    if varied and seqlen >= 20 and draw.random() < 0.5:
        rows = (sorted(draw.sample(range(1, seqlen), draw.randint(0, 6))) for _ in range(batch))
        case["lengths"] = [
            [b - a for a, b in zip([0, *cuts], [*cuts, seqlen], strict=True)] for cuts in rows
        ]
    return case


SMALL = [(2, 1, 16, 16), (6, 3, 5, 3), (4, 2, 24, 8), (3, 1, 16, 40)]


@pytest.mark.usefixtures("poisoned")
@pytest.mark.parametrize("dtype", ["float64", "float32"])
def test_random_shapes_on_the_cpu(cases, dtype):
    wrong = {}
    for seed in range(20):
        case = random_case(seed, sizes=SMALL, longest=200, varied=True, dtype=dtype, D=seed % 3)
        found = cases.failures(operation("torch_ssd"), case)
        wrong |= {seed: (case, found)} if found else {}
    assert not wrong


def test_the_hopper_ssd_refuses_several_sequences_in_a_row(cases):
    pytest.importorskip("triton.experimental.gluon")
    told = {"seq_idx": torch.zeros(1, 8, dtype=torch.int32)}
    with pytest.raises(ValueError, match="one sequence a row, got seq_idx or cu_seqlens"):
        operation("hopper_op")(**cases.draw(seqlen=8), chunk_size=4, **told)


# On a GPU: what is given besides x, dt, A, B and C. Each form is compiled for, and a length once if
# it is a multiple of 16 and once for the rest: so lengths are free, but odd.
FORMS = (
    {"gated": True, "start": True, "final": True},
    {"gated": False, "start": False, "final": True},
    {"gated": True, "start": False, "final": False},
    {"gated": False, "start": True, "final": True},
)


@pytest.mark.gpu
@pytest.mark.usefixtures("poisoned")
@pytest.mark.parametrize("module", ["triton_ssd", "hopper_op"])
def test_two_hundred_shapes_on_the_gpu(cases, module):
    op, sizes = operation(module), [(4, 2, 64, 128), (8, 1, 32, 16)]
    options = {"sizes": sizes, "longest": 180, "varied": module == "triton_ssd", "odd": True}

    def judge(seed):
        case = random_case(seed, dtype="bfloat16", **options, **FORMS[seed % len(FORMS)])
        segments = random.Random(seed).choice([1, 2, 5])
        errors = cases.errors(op, case, device="cuda", segments=segments)
        bound = cases.tolerance("bfloat16")
        # Of a few values, each a sum that may cancel, the error is a noisy number.
        bounds = dict.fromkeys(("grad_A", "grad_D", "grad_dt_bias"), 3 * bound)
        far = {name: e for name, e in errors.items() if not e <= bounds.get(name, bound)}
        return {seed: (case, segments, far)} if far else {}

    torch.zeros(1, device="cuda").requires_grad_().sum().backward()
    with ThreadPoolExecutor(8) as pool:  # compiles most of the forms side by side
        found = list(pool.map(judge, range(SHAPES)))
    assert not {seed: what for wrong in found for seed, what in wrong.items()}
