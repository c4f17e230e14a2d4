"""The Triton state update on a GPU: `pytest -m gpu tests/kernels/state_update`."""

import random

import pytest
import torch

pytest.importorskip("triton")

pytestmark = pytest.mark.gpu

BF16 = torch.bfloat16
SHAPE = {
    "batch": 5, "entries": 24, "groups": 3, "headdim": 64, "d_state": 128, "dtype": BF16,
    "state_dtype": BF16, "gated": True, "skip": True, "bias": True, "softplus": True,
    "strided": False, "extreme": False,
}  # fmt: skip


def update(*args, **kwargs):
    from mambench.kernels.state_update import triton_update

    return triton_update.selective_state_update(*args, **kwargs)


@pytest.mark.filterwarnings("ignore")  # torch's own, while it compiles
@pytest.mark.parametrize("headdim", [64, None])
def test_a_decoding_loop_compiles_whole(cases, headdim):
    shape = SHAPE | {"headdim": headdim, "entries": 24 if headdim else 240}
    assert cases.traced(update, shape, "cuda", "inductor") == []


def test_sixty_random_shapes(cases):
    draw, found = random.Random(0), {}
    for seed in range(60):
        shape = cases.draw_shape(draw, small=False)
        if wrong := cases.wrong(update, shape, seed=seed, device="cuda"):
            found[cases.describe(shape)] = wrong
    assert found == {}


@pytest.mark.parametrize("headdim", [64, None])
def test_every_configuration(cases, headdim):
    from mambench.kernels.state_update.config import CONFIGS

    shape = SHAPE | {"headdim": headdim, "entries": 24 if headdim else 240}
    for config in CONFIGS:
        wrong = cases.wrong(update, shape, seed=1, device="cuda", config=config)
        assert wrong == {}, str(config)


@pytest.mark.parametrize("dt", [0.0, 1e-9, 60.0, 1e4])
@pytest.mark.parametrize("rate", [0.0, -1e-8, -1e6])
def test_extreme_steps_and_rates(cases, dt, rate):
    positional, keywords = cases.make(SHAPE, seed=0, device="cuda")
    positional[2].fill_(dt)
    positional[3].fill_(rate)
    keywords |= {"dt_softplus": False, "dt_bias": None}
    y_true, state_true = cases.reference(positional, keywords)
    y = update(*positional, **keywords)
    for got, want in ((y, y_true), (positional[0], state_true)):
        assert float((got.double() - want).norm()) <= 5e-3 * float(want.norm()) + 1e-30


@pytest.mark.alone  # for its memory
def test_offsets_past_32_bits(cases):
    free, _ = torch.cuda.mem_get_info()
    states = 600 * 128 * 128 * 256
    assert states > 1 << 31
    if free < 16 * states:
        pytest.skip("needs 40 GB of GPU memory")
    generator = torch.Generator(device="cuda").manual_seed(0)
    state = torch.empty(600, 128, 128, 256, device="cuda", dtype=BF16).normal_(generator=generator)
    small = SHAPE | {"batch": 600, "entries": 128, "groups": 1, "headdim": 128, "d_state": 256}
    positional, keywords = cases.make(small | {"batch": 2}, seed=0, device="cuda")
    tensors = [state]
    for name, tensor in zip(("x", "dt", "A", "B", "C"), positional[1:], strict=True):
        grown = tensor if name == "A" else tensor.repeat(300, *[1] * (tensor.dim() - 1))
        tensors.append(grown.contiguous())
    keywords |= {"z": None}
    last = [t if t.dim() == 1 else t[-1:].clone() for t in tensors]
    y_true, state_true = cases.reference(last, keywords)
    y = update(*tensors, **keywords)
    for got, want in ((y[-1:], y_true), (state[-1:], state_true)):
        assert float((got.double() - want).norm() / want.norm()) < 5e-3


def test_a_graph_of_many_updates_is_as_many_calls(cases):
    positional, keywords = cases.make(SHAPE, seed=0, device="cuda")
    again, _ = cases.make(SHAPE, seed=0, device="cuda")
    for _ in range(11):
        eager = update(*again, **keywords)
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        update(*positional, **keywords)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph, stream=stream):
            y = update(*positional, **keywords)
        for _ in range(10):
            graph.replay()
    torch.cuda.synchronize()
    assert torch.equal(y, eager)
    assert torch.equal(positional[0], again[0])


def test_the_output_is_written_completely(cases, monkeypatch):
    def poisoned(allocate):
        def allocated(*how, **options):
            return allocate(*how, **options).fill_(torch.nan)

        return allocated

    for headdim in (33, None):
        shape = SHAPE | {"headdim": headdim, "d_state": 100}
        for seed in (2, 3):  # the first call of a kind, and one that repeats it
            with monkeypatch.context() as patched:
                for name in ("empty", "empty_like"):
                    patched.setattr(torch, name, poisoned(getattr(torch, name)))
                assert cases.wrong(update, shape, seed=seed, device="cuda") == {}
