"""The Triton RMS norm without a GPU: in the interpreter, and as compiled for GPUs."""

import random
from pathlib import Path

import pytest
import torch

from mambench.kernels.norm.triton_config import choose, programs

pytest.importorskip("triton")


@pytest.fixture(scope="module")
def interpreted(interpret):
    return interpret(Path(__file__).with_name("norm_cases.py"), "8")


def test_random_calls_agree_with_float64_in_the_interpreter(interpreted):
    assert interpreted["wrong"] == {}


def test_every_planted_fault_is_noticed(interpreted):
    assert interpreted["unnoticed"] == []


def test_compilers_and_transforms_give_the_bits_of_an_eager_call(interpreted):
    assert interpreted["traced"] == {}


def test_wrong_arguments_are_named():
    from mambench.kernels.norm.triton_norm import rms_norm

    x = torch.zeros(2, 8)
    with pytest.raises(ValueError, match=r"weight \(width,\), got \(2, 8\) and \(7,\)"):
        rms_norm(x, torch.ones(7))
    with pytest.raises(ValueError, match=r"z: expected shape \(2, 8\), got \(3, 8\)"):
        rms_norm(x, torch.ones(8), torch.ones(3, 8))
    with pytest.raises(TypeError, match="x: expected float32, float16 or bfloat16"):
        rms_norm(x.double(), torch.ones(8))
    with pytest.raises(ValueError, match="a width of at most 32768, got 32769"):
        rms_norm(torch.zeros(1, 32769), torch.ones(32769))


@pytest.mark.parametrize("entry", ["norm bf16", "norm bf16 gated"])
def test_rows_stay_in_registers_and_move_16_bytes_at_a_time(binaries, entry):
    for name, binary in binaries(entry, 90).items():
        assert binary.stack_bytes == 0, name
        assert binary.registers <= 128, name
        assert binary.global_loads <= 10, name  # 16 values of up to three tensors, and rstd


@pytest.mark.parametrize("width", [1, 100, 2048, 4096, 5440, 1 << 15])
def test_tiles_hold_whole_rows(width):
    config = choose(width)
    assert config.block >= width
    assert config.block == 1 << (config.block.bit_length() - 1)
    assert 4 <= config.warps <= 16
    for rows in (1, 100, 8192, 1 << 20):
        assert 1 <= programs(rows, config, 132) <= min(-(-rows // config.rows), 4 * 132)


@pytest.mark.gpu
def test_sixty_random_calls_on_a_gpu(cases):
    draw, found = random.Random(0), {}
    for seed in range(60):
        shape = cases.draw_shape(draw, small=False)
        if wrong := cases.wrong(shape, seed=seed, device="cuda"):
            found[str(shape)] = wrong
    assert found == {}
