"""Training steps repeated on the GPU: the first one's bits and memory, wherever they run."""

import pytest
import torch

pytestmark = pytest.mark.gpu

pytest.importorskip("triton.experimental.gluon")

BF16, FP32 = torch.bfloat16, torch.float32


def draw(*shape, dtype=BF16):
    return torch.randn(shape, device="cuda").to(dtype)


def s6(*, batch=1, seqlen=1000, d_inner=256, d_state=16, gated=False):
    rows, shared = (batch, d_inner, seqlen), (batch, 1, d_state, seqlen)
    tensors = {
        "u": draw(*rows), "delta": 0.1 * draw(*rows), "A": -draw(d_inner, d_state).abs().float(),
        "B": draw(*shared), "C": draw(*shared), "D": draw(d_inner, dtype=FP32),
        "delta_bias": draw(d_inner, dtype=FP32) - 4,
    }  # fmt: skip
    if gated:
        tensors["z"] = draw(*rows)
    return tensors, {"delta_softplus": True, "return_last_state": True}


def ssd(*, batch=1, seqlen=1000, nheads=8, segments=None, start=True, gated=False):
    shared, tokens = (batch, seqlen, 1, 128), (batch, seqlen, nheads)
    tensors = {
        "x": draw(*tokens, 64), "dt": draw(*tokens), "A": -draw(nheads, dtype=FP32).abs(),
        "B": draw(*shared), "C": draw(*shared), "D": draw(nheads, dtype=FP32),
        "dt_bias": draw(nheads, dtype=FP32) - 4,
    }  # fmt: skip
    if gated:
        tensors["z"] = draw(*tokens, 64)
    if start:
        tensors["initial_states"] = draw(batch, nheads, 64, 128, dtype=FP32)
    options = {"chunk_size": 64, "dt_softplus": True, "segments": segments}
    return tensors, options | {"return_final_states": True}


CASES = {
    "s6": ("s6 hopper", s6, {}),
    "s6, sums in the gradients": ("s6 hopper", s6, {"seqlen": 2048, "d_inner": 2048}),
    "s6, one segment, gated": ("s6 hopper", s6, {"batch": 8, "seqlen": 512, "gated": True}),
    "s6, 64 states": ("s6 hopper", s6, {"seqlen": 2048, "d_state": 64}),
    "ssd": ("ssd hopper", ssd, {"nheads": 32}),
    "ssd, one segment": ("ssd hopper", ssd, {"segments": 1, "batch": 2}),
    "ssd, gated": ("ssd hopper", ssd, {"gated": True, "start": False}),
    "portable ssd": ("ssd triton", ssd, {"seqlen": 777}),
}


def operation(name):
    """Return an operation and what remembers its calls."""
    from mambench.kernels.s6 import hopper_backward, hopper_scan
    from mambench.kernels.s6.hopper_op import selective_scan
    from mambench.kernels.ssd import hopper_op, triton_ssd

    return {
        "s6 hopper": (selective_scan, (hopper_scan._calls, hopper_backward._calls)),
        "ssd hopper": (hopper_op.ssd, (hopper_op._calls, hopper_op._gradients._calls)),
        "ssd triton": (triton_ssd.ssd, (triton_ssd._calls, triton_ssd._gradients._calls)),
    }[name]


class Steps:
    """Steps of a case on copies of its tensors, so that every one has addresses of its own."""

    def __init__(self, case):
        name, make, sizes = CASES[case]
        self.op, self.calls = operation(name)
        self.tensors, self.options = make(**sizes)
        with torch.no_grad():
            self.grads = [torch.randn_like(t) for t in self.op(**self.tensors, **self.options)]
        for each in self.calls:
            each.clear()

    def copies(self, wanted=None):
        return {
            name: value.clone().requires_grad_(wanted is None or name in wanted)
            for name, value in self.tensors.items()
        }

    def __call__(self, copies=None, **how):
        copies = copies or self.copies()
        outs = self.op(**copies, **self.options)
        leaves = [t for t in copies.values() if t.requires_grad]
        return torch.autograd.grad(outs, leaves, self.grads, **how)

    @property
    def known(self):
        return [len(each._known) for each in self.calls]


def same(got, want):
    return len(got) == len(want) and all(map(torch.equal, got, want))


@pytest.mark.parametrize("case", CASES)
def test_a_repeated_step_gives_the_bits_of_the_first(case):
    step = Steps(case)
    want = step()
    assert step.known == [1, 1]
    held = []
    for repeat in range(5):
        held.append(torch.full((1 << (12 + repeat),), float("nan"), device="cuda"))
        assert same(step(retain_graph=repeat == 2), want)
    assert step.known == [1, 1]
    names = list(step.tensors)[1::2]
    some = [g for name, g in zip(step.tensors, want, strict=True) if name in names]
    assert same(step(step.copies(names)), some)


@pytest.mark.parametrize("case", CASES)
def test_a_repeated_step_is_captured_and_runs_on_any_stream(case):
    step = Steps(case)
    want, copies = step(), step.copies()
    torch.cuda.synchronize()
    stream = torch.cuda.Stream()
    with torch.cuda.stream(stream):
        found = step(copies)
    stream.synchronize()
    assert same(found, want)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        found = step(copies)
    for gradient in found:
        gradient.fill_(3)
    for _ in range(2):
        graph.replay()
    assert same(found, want)
    assert step.known == [1, 1]


@pytest.mark.alone
@pytest.mark.parametrize("case", CASES)
def test_a_repeated_step_takes_the_memory_of_the_first(case):
    step, peaks = Steps(case), []
    step()  # compiled
    for each in step.calls:
        each.clear()
    for _ in range(3):
        copies = step.copies()
        torch.cuda.synchronize()
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        step(copies)
        peaks.append(torch.cuda.max_memory_allocated() - before)
    assert max(peaks[1:]) <= peaks[0] + (1 << 20)  # a large block is split from 1 MiB on
