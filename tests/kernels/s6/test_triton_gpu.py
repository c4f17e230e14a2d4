"""The Triton selective scan on a GPU: `pytest -m gpu tests/kernels/s6`."""

import math
from concurrent.futures import ThreadPoolExecutor
from functools import partial

import pytest
import torch

pytest.importorskip("triton")

pytestmark = [pytest.mark.gpu, pytest.mark.usefixtures("poisoned")]

# dtype, d_state, without; all with last state, two batches and groups, odd sizes, several segments
CASES = {
    "bf16": (torch.bfloat16, 16, ()),
    "fp16": (torch.float16, 16, ()),
    "fp32": (torch.float32, 16, ()),
    "bare": (torch.bfloat16, 16, ("D", "z", "delta_bias")),
    "n5": (torch.bfloat16, 5, ("z",)),
    "n32": (torch.bfloat16, 32, ()),
    "n64": (torch.bfloat16, 64, ("z",)),
    "n128": (torch.float32, 128, ("z",)),
    "n256": (torch.bfloat16, 256, ("z",)),
}


def scan(**arguments):
    from mambench.kernels.s6 import triton_scan

    return triton_scan.selective_scan(**arguments, return_last_state=True)


@pytest.fixture(scope="module")
def runs(literal):
    """Run all cases, compiling them side by side: one after the other it would take minutes."""

    def one(case):
        dtype, d_state, without = case
        inputs = literal.draw(2, 70, 277, d_state, 2, dtype=dtype, device="cuda", without=without)
        return inputs, literal.run(scan, inputs)

    torch.zeros(1, device="cuda").requires_grad_().sum().backward()
    with ThreadPoolExecutor(len(CASES)) as pool:
        return dict(zip(CASES, pool.map(one, CASES.values()), strict=True))


@pytest.mark.parametrize("name", CASES)
def test_values_and_gradients(literal, runs, name):
    inputs, got = runs[name]
    assert got["out"].dtype == got["dB"].dtype == CASES[name][0]
    assert got["last"].dtype == got["dA"].dtype == torch.float32
    assert not literal.excesses(inputs, got)


@pytest.mark.parametrize("wanted_warps", [1, 1 << 20])
def test_any_division_gives_the_same(literal, runs, monkeypatch, wanted_warps):
    from mambench.kernels.s6 import triton_config

    inputs, _ = runs["fp32"]
    monkeypatch.setattr(triton_config, "_WANTED_WARPS", wanted_warps)
    assert not literal.excesses(inputs, literal.run(scan, inputs))


def test_long_sequence(literal):
    # Sampled: the gradient of the output is zero but for four channels, which alone are computed
    # in float64, by the CPU's kernel (the literal loop would take half a minute). They forget
    # slowly, so that the state crosses every chunk and segment.
    from mambench.kernels.s6 import numba_scan

    seqlen, channels = 100_003, torch.tensor([0, 37, 64, 95], device="cuda")
    axes = {"u": 1, "delta": 1, "A": 0, "D": 0, "delta_bias": 0}
    inputs = literal.draw(1, 96, seqlen, 16, dtype=torch.bfloat16, device="cuda", without=("z",))
    with torch.no_grad():
        inputs["A"].copy_(-torch.exp(-10 * torch.rand_like(inputs["A"])))
    cotangent = torch.zeros(1, 96, seqlen, device="cuda", dtype=torch.bfloat16)
    cotangent[:, channels] = torch.randn(1, 4, seqlen, device="cuda").bfloat16()
    out, last = scan(**inputs, delta_softplus=True)
    got = torch.autograd.grad(out, tuple(inputs.values()), cotangent)

    def sampled(name, tensor):
        return tensor.index_select(axes[name], channels) if name in axes else tensor

    exact = {k: sampled(k, v.detach()).cpu().double().requires_grad_() for k, v in inputs.items()}
    want_out, want_last = numba_scan.selective_scan(
        **exact, delta_softplus=True, return_last_state=True
    )
    want = torch.autograd.grad(
        want_out, tuple(exact.values()), cotangent[:, channels].cpu().double()
    )
    assert literal.distance(out[:, channels].cpu(), want_out) < 2**-8
    assert literal.distance(last[:, channels].cpu(), want_last) < 1e-4
    for name, ours, theirs in zip(inputs, got, want, strict=True):
        allowed = 2**-8 if ours.dtype == torch.bfloat16 else 1e-4
        assert literal.distance(sampled(name, ours).cpu(), theirs) < allowed, name


@pytest.mark.alone  # for its memory
def test_offsets_beyond_32_bits():
    # 2,304 channels of a million steps: the last channels, alone, must come out the same.
    d_inner, seqlen, tail = 2304, 1_000_000, 32
    if torch.cuda.mem_get_info()[0] < 45e9:
        pytest.skip("needs 45 GB of GPU memory")
    make = partial(torch.randn, device="cuda", dtype=torch.bfloat16)
    u = make(1, d_inner, seqlen).requires_grad_()
    delta = make(1, d_inner, seqlen).sub_(4).requires_grad_()
    shared = {"B": make(1, 1, 16, seqlen), "C": make(1, 1, 16, seqlen)}
    A = -torch.rand(d_inner, 16, device="cuda")
    assert u.numel() > 2**31
    out, last = scan(u=u, delta=delta, A=A, **shared, delta_softplus=True)
    du, ddelta = torch.autograd.grad(out, (u, delta), out.detach())

    few_u, few_delta = (t[:, -tail:].detach().clone().requires_grad_() for t in (u, delta))
    few_out, few_last = scan(u=few_u, delta=few_delta, A=A[-tail:], **shared, delta_softplus=True)
    few = torch.autograd.grad(few_out, (few_u, few_delta), few_out.detach())
    for whole, part in ((out, few_out), (last, few_last), (du, few[0]), (ddelta, few[1])):
        part, whole = part.detach().float(), whole[:, -tail:].detach().float()
        assert ((whole - part).norm() / part.norm()).item() < 2**-8


def test_same_bits_on_every_run(literal):
    inputs = literal.draw(1, 512, 4096, 16, dtype=torch.bfloat16, device="cuda")
    first, second = literal.run(scan, inputs), literal.run(scan, inputs)
    assert all(torch.equal(first[name], second[name]) for name in first)


def test_strided_inputs_and_expanded_gradient(literal):
    packed = torch.randn(2, 140, 277, device="cuda", dtype=torch.bfloat16)
    u, z = packed.chunk(2, dim=1)
    drawn = literal.draw(2, 70, 277, 16, 2, dtype=torch.bfloat16, device="cuda")
    inputs = {k: v.detach() for k, v in drawn.items()} | {"u": u, "z": z}
    inputs["delta"].requires_grad_()
    out, _ = scan(**inputs, delta_softplus=True)
    again, _ = scan(**{k: v.contiguous() for k, v in inputs.items()}, delta_softplus=True)
    assert torch.equal(out, again)
    out.sum().backward()
    assert inputs["delta"].grad is not None
    assert inputs["delta"].grad.isfinite().all()


def test_the_state_stays_on_the_chip(literal):
    inputs = {
        k: v.detach()
        for k, v in literal.draw(4, 2048, 1024, 16, dtype=torch.bfloat16, device="cuda").items()
    }
    scan(**inputs, delta_softplus=True)
    torch.cuda.synchronize()
    before = torch.cuda.memory_allocated()
    torch.cuda.reset_peak_memory_stats()
    scan(**inputs, delta_softplus=True)
    extra = torch.cuda.max_memory_allocated() - before
    states = 4 * 4 * 2048 * 1024 * 16
    output = 2 * 4 * 2048 * 1024
    assert output <= extra < output + states / 16
    assert math.isfinite(extra)
