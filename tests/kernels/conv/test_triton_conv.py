"""The Triton causal convolution without a GPU: in the interpreter, and as compiled for GPUs."""

import random
from pathlib import Path

import pytest
import torch

from mambench.kernels.conv.triton_config import (
    ChannelConfig,
    TimeConfig,
    channel_config,
    time_segment,
)

pytest.importorskip("triton")


@pytest.fixture(scope="module")
def interpreted(interpret):
    return interpret(Path(__file__).with_name("conv_cases.py"), "4")


def test_random_calls_agree_with_float64_in_the_interpreter(interpreted):
    assert interpreted["wrong"] == {}


def test_every_planted_fault_is_noticed(interpreted):
    assert interpreted["unnoticed"] == []


def test_compilers_and_transforms_give_the_bits_of_an_eager_call(interpreted):
    assert interpreted["traced"] == {}


def test_wrong_arguments_are_named():
    from mambench.kernels.conv.triton_conv import causal_conv1d, conv_backward

    x, weight = torch.zeros(1, 4, 8), torch.zeros(4, 4)
    with pytest.raises(ValueError, match="activation: expected None or 'silu', got 'relu'"):
        causal_conv1d(x, weight, None, "relu")
    with pytest.raises(ValueError, match=r"weight: expected \(4, 1 to 4\), got \(4, 5\)"):
        causal_conv1d(x, torch.zeros(4, 5))
    with pytest.raises(ValueError, match=r"bias: expected shape \(4,\), got \(3,\)"):
        causal_conv1d(x, weight, torch.zeros(3))
    with pytest.raises(TypeError, match="x: expected float32, float16 or bfloat16"):
        causal_conv1d(x.double(), weight)
    with pytest.raises(ValueError, match="expected one tensor for contiguous time, got 2"):
        conv_backward(x, weight, None, (x[:, :2], x[:, 2:]), True)
    with pytest.raises(ValueError, match="`more` with time contiguous"):
        conv_backward(x.mT.contiguous().mT, weight, None, (x,), True, more=x)


@pytest.mark.parametrize(("entry", "wide"), [("conv bf16 time", 16), ("conv bf16 channels", 8)])
def test_values_move_in_wide_pieces_and_nothing_spills(binaries, entry, wide):
    for name, binary in binaries(entry, 90).items():
        assert binary.stack_bytes == 0, name
        assert binary.registers <= 128, name  # 16 warps of a multiprocessor at least
        if "sum" not in name:
            # A thread's pieces of x alone would be that many loads of single values.
            assert binary.global_loads < 64 // wide * 6, name


def test_long_runs_where_the_gpu_is_busy_anyway():
    long = {"batch": 8, "channels": 4096, "seqlen": 8192}
    assert time_segment(**long, config=TimeConfig()) == 2048
    assert time_segment(batch=1, channels=64, seqlen=8192, config=TimeConfig()) == 256
    assert channel_config(**long, backward=True).steps == 64
    assert channel_config(batch=1, channels=512, seqlen=100, backward=True).steps == 16


@pytest.mark.parametrize(
    "config", [ChannelConfig(), channel_config(batch=1, channels=4352, seqlen=2048, backward=True)]
)
def test_runs_are_whole_groups_of_what_is_loaded_ahead(config):
    assert config.steps % config.ahead == 0
    assert config.steps >= 4  # what a run needs of the next one lies in the next


@pytest.mark.gpu
def test_sixty_random_calls_on_a_gpu(cases):
    draw, found = random.Random(0), {}
    for seed in range(60):
        shape = cases.draw_shape(draw, small=False)
        if wrong := cases.wrong(shape, seed=seed, device="cuda"):
            found[str(shape)] = wrong
    assert found == {}
