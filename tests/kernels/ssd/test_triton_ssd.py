import json
import random
from pathlib import Path

import pytest
import torch

pytest.importorskip("triton")

# Triton's interpreter multiplies the bits of bf16 operands, so bf16 is judged on the GPU alone.
INTERPRETED = [
    {"seqlen": 1, "d_state": 16, "D": 0, "gated": False, "bias": False, "start": False},
    {"seqlen": 70, "nheads": 4, "ngroups": 2, "d_state": 32, "segments": 3},
    {
        "batch": 2,
        "nheads": 1,
        "seqlen": 40,
        "headdim": 20,
        "d_state": 24,
        "D": 2,
        "dt_limit": [0.05, 0.3],
        "segments": 2,
    },
    {"seqlen": 33, "headdim": 48, "dt_softplus": False, "bias": False, "final": False},
    {"seqlen": 40, "dtype": "float16", "nheads": 3, "D": 2, "segments": 2, "headdim": 80},
    {"seqlen": 100, "dtype": "float16", "long_memory": True, "start": False, "gated": False},
    {"seqlen": 70, "lengths": [[16, 15, 1, 38]], "segments": 2, "long_memory": True},
    {"seqlen": 70, "jolt": 50, "gated": False},
    {"seqlen": 70, "gone": True, "segments": 2},
    {
        "batch": 2,
        "seqlen": 50,
        "lengths": [[1, 16, 33], [17, 31, 2]],
        "ngroups": 2,
        "segments": 3,
        "gated": False,
        "D": 2,
        "long_memory": True,
    },
    {"seqlen": 40, "lengths": [[20, 20]], "cumulative": True, "dtype": "float16", "start": False},
]
# As on Hopper: all channels of a head in one tile of the backward.
WHOLE = {"whole_heads": True}
INTERPRETED += [
    {"seqlen": 50, "nheads": 5, "gated": False, "segments": 3, "tiling": WHOLE},
    {"seqlen": 40, "batch": 2, "headdim": 20, "D": 2, "gated": False, "tiling": WHOLE},
    {
        "seqlen": 33,
        "D": 0,
        "nheads": 4,
        "ngroups": 2,
        "dtype": "float16",
        "gated": False,
        "tiling": WHOLE,
    },
    {"seqlen": 70, "jolt": 50, "gated": False, "start": False, "segments": 2, "tiling": WHOLE},
    {
        "seqlen": 50,
        "lengths": [[16, 15, 1, 18]],
        "segments": 2,
        "long_memory": True,
        "nheads": 3,
        "gated": False,
        "tiling": WHOLE,
    },
]


@pytest.fixture(scope="module")
def interpreted_errors(interpret):
    """Errors of all cases, from one process that interprets the kernels."""
    return interpret(Path(__file__).with_name("ssd_cases.py"), json.dumps(INTERPRETED))


@pytest.mark.parametrize("index", range(len(INTERPRETED)), ids=lambda i: str(INTERPRETED[i]))
def test_interpreted_kernels_agree_with_the_loop(cases, interpreted_errors, index):
    bound = cases.tolerance(INTERPRETED[index].get("dtype", "float32"))
    wrong = {k: error for k, error in interpreted_errors[index].items() if not error <= bound}
    assert not wrong
    names = {"out", "final_states"}
    if not INTERPRETED[index].get("gone"):
        names |= {"grad_x", "grad_dt"}
    assert names <= set(interpreted_errors[index])


def gpu_op():
    from mambench.kernels.ssd.triton_ssd import ssd

    return ssd


GPU = [
    {"seqlen": 1},
    {"seqlen": 17, "D": 0, "gated": False, "bias": False, "start": False},
    {"seqlen": 333, "headdim": 64, "d_state": 128, "nheads": 4},
    {"seqlen": 333, "headdim": 64, "d_state": 128, "nheads": 4, "gated": False, "D": 2},
    {"seqlen": 256, "headdim": 128, "d_state": 64, "nheads": 6, "ngroups": 2, "D": 2},
    {"seqlen": 200, "headdim": 64, "d_state": 256, "nheads": 2, "ngroups": 2},
    {"seqlen": 200, "headdim": 16, "d_state": 16, "nheads": 24, "ngroups": 8, "batch": 2},
    {"seqlen": 150, "headdim": 80, "d_state": 200, "nheads": 3, "dt_limit": (0.05, 0.3)},
    {"seqlen": 130, "dt_softplus": False, "bias": False, "final": False},
    {"seqlen": 1500, "headdim": 64, "d_state": 64, "long_memory": True, "start": False},
]


@pytest.mark.gpu
@pytest.mark.usefixtures("poisoned")
@pytest.mark.parametrize(
    ("case", "dtype"),
    [
        *((case, "bfloat16") for case in GPU),
        *((case, dtype) for case in (GPU[2], GPU[4], GPU[6]) for dtype in ("float32", "float16")),
    ],
    ids=str,
)
def test_outputs_and_gradients_agree_with_the_loop_on_the_gpu(cases, case, dtype):
    assert not cases.failures(gpu_op(), {**case, "dtype": dtype}, device="cuda")


@pytest.mark.gpu
@pytest.mark.usefixtures("poisoned")
@pytest.mark.parametrize("seed", range(4))
def test_random_problems_agree_with_the_loop_on_the_gpu(cases, seed):
    draw = random.Random(seed)
    ngroups = draw.choice([1, 2, 4, 8])
    case = {
        "batch": draw.randint(1, 3),
        "seqlen": draw.randint(2, 400),
        "ngroups": ngroups,
        "nheads": ngroups * draw.randint(1, 5),
        "headdim": draw.choice([16, 32, 64, 128]),
        "d_state": draw.choice([16, 64, 128]),
        "D": draw.randint(0, 2),
        "gated": draw.random() < 0.5,
        "start": draw.random() < 0.5,
        "dtype": draw.choice(["float32", "bfloat16"]),
        "seed": seed,
    }
    segments = draw.choice([None, 1, 3, 7])
    assert not cases.failures(gpu_op(), case, device="cuda", segments=segments)


def long_inputs(cases, seqlen, dtype=torch.bfloat16, **sizes):
    sizes = {"nheads": 4, "headdim": 64, "d_state": 128, **sizes}
    drawn = cases.draw(seqlen=seqlen, long_memory=True, start=False, dtype="bfloat16", **sizes)
    return cases.cast(drawn, dtype, "cuda")


def results(inputs, **keywords):
    """Return outputs and gradients of one call on the GPU."""
    for value in inputs.values():
        value.grad = None
    out, final = gpu_op()(
        **inputs, chunk_size=256, dt_softplus=True, return_final_states=True, **keywords
    )
    generator = torch.Generator("cuda").manual_seed(0)
    grad = torch.randn(out.shape, device="cuda", generator=generator).to(out.dtype)
    torch.autograd.backward([out, final], [grad, final.detach()])
    return {"out": out, "final": final} | {name: v.grad for name, v in inputs.items()}


@pytest.mark.gpu
@pytest.mark.usefixtures("poisoned")
def test_repeated_calls_are_bitwise_equal_on_the_gpu(cases):
    inputs = long_inputs(cases, 4096)
    first = results(inputs)
    for _ in range(20):
        again = results(inputs)
        assert all(torch.equal(first[name], again[name]) for name in first)


@pytest.mark.gpu
@pytest.mark.usefixtures("poisoned")
@pytest.mark.parametrize("seqlen", [16_384, 20_001])
def test_segments_do_not_change_the_result_on_the_gpu(cases, seqlen):
    inputs = long_inputs(cases, seqlen)
    whole = results(inputs, segments=1)
    for segments in (None, 2, 17):
        split = results(inputs, segments=segments)
        for name, value in split.items():
            assert cases.relative_error(value, whole[name].double().cpu()) < 2.0**-6, name


@pytest.mark.gpu
def test_long_sequences_agree_with_the_torch_variant_on_the_gpu(cases):
    from mambench.kernels.ssd.torch_ssd import ssd as torch_ssd

    inputs = long_inputs(cases, 20_001)
    wide = {name: value.detach().double().requires_grad_() for name, value in inputs.items()}
    out, _ = torch_ssd(**wide, chunk_size=64, dt_softplus=True, return_final_states=True)
    got = gpu_op()(**inputs, chunk_size=64, dt_softplus=True)
    generator = torch.Generator("cuda").manual_seed(0)
    grad = torch.randn(out.shape, device="cuda", generator=generator).bfloat16()
    out.backward(grad.double())
    got.backward(grad)
    assert cases.relative_error(got, out.detach().cpu()) < cases.tolerance("bfloat16")
    for name, value in inputs.items():
        error = cases.relative_error(value.grad, wide[name].grad.cpu())
        assert error < cases.tolerance("bfloat16"), name


@pytest.mark.gpu
@pytest.mark.alone  # for its memory
@pytest.mark.parametrize("variant", ["triton", "hopper"])
def test_a_million_tokens_beyond_32_bit_offsets_are_right_on_the_gpu(cases, variant):
    op = gpu_op()
    if variant == "hopper":
        if torch.cuda.get_device_capability() != (9, 0):
            pytest.skip("needs compute capability 9.0")
        from mambench.kernels.ssd.hopper_op import ssd as op
    seqlen, nheads = 1 << 20, 33  # seqlen * nheads * headdim > 2^31
    if torch.cuda.mem_get_info()[0] < 20e9:
        pytest.skip("needs 20 GB of GPU memory")
    inputs = long_inputs(cases, 256, nheads=1, headdim=64, d_state=16, gated=False, D=0, bias=False)
    tail = {name: inputs[name].detach() for name in ("x", "dt", "B", "C")}
    x = torch.zeros(1, seqlen, nheads, 64, dtype=torch.bfloat16, device="cuda")
    dt = torch.full((1, seqlen, nheads), -30.0, dtype=torch.bfloat16, device="cuda")
    B = torch.zeros(1, seqlen, 1, 16, dtype=torch.bfloat16, device="cuda")
    C = torch.zeros_like(B)
    x[:, -256:, -1:], dt[:, -256:, -1:] = tail["x"], tail["dt"]
    B[:, -256:], C[:, -256:] = tail["B"], tail["C"]
    A = inputs["A"].detach()
    from mambench.kernels.ssd.torch_ssd import ssd as torch_ssd

    wide = {name: value.double() for name, value in (*tail.items(), ("A", A))}
    with torch.no_grad():
        # Not the operation itself on the tail: of few tokens it may take another kernel.
        want = torch_ssd(**wide, chunk_size=64, dt_softplus=True)
        got = op(x, dt, A.expand(nheads), B, C, 64, dt_softplus=True)
    error = cases.relative_error(got[:, -256:, -1:], want.cpu())
    assert error < cases.tolerance("bfloat16")
    assert not got[:, :-256].any()


@pytest.mark.gpu
def test_views_of_one_tensor_are_read_in_place_on_the_gpu(cases):
    inputs = long_inputs(cases, 500, gated=False, D=0)
    x, B, C = (inputs[name].detach() for name in ("x", "B", "C"))
    packed = torch.cat([x.flatten(2), B.flatten(2), C.flatten(2)], 2)
    x_view, B_view, C_view = packed.split([256, 128, 128], 2)
    rest = {name: inputs[name].detach() for name in ("dt", "A", "dt_bias")}
    views = {"x": x_view.unflatten(2, (4, 64)), "B": B_view[:, :, None], "C": C_view[:, :, None]}
    with torch.no_grad():
        got = gpu_op()(**rest, **views, chunk_size=64, dt_softplus=True)
        want = gpu_op()(**rest, x=x, B=B, C=C, chunk_size=64, dt_softplus=True)
    assert torch.equal(got, want)


@pytest.mark.gpu
def test_very_strong_decay_neither_overflows_nor_loses_the_gradient_on_the_gpu(cases):
    inputs = cases.cast(cases.draw(seqlen=80, D=0, gated=False), torch.bfloat16, "cuda")
    inputs["A"] = torch.tensor([-1e4, -1e-6], device="cuda", requires_grad=True)
    out = gpu_op()(**inputs, chunk_size=64, dt_softplus=True)
    out.float().square().sum().backward()
    assert all(value.grad.isfinite().all() for value in inputs.values())
