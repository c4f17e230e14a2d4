"""The Triton state update without a GPU: in the interpreter, and as compiled for GPUs."""

from pathlib import Path

import pytest

from mambench.kernels.state_update.config import CONFIGS, Config, choose, padded

pytest.importorskip("triton")

ARCHITECTURES = (80, 90, 100, 120)
SSD = {"entries": 80, "headdim": 64, "d_state": 128, "itemsize": 2}
S6 = {"entries": 4096, "headdim": None, "d_state": 16, "itemsize": 2}


@pytest.fixture(scope="module")
def interpreted(interpret):
    return interpret(Path(__file__).with_name("update_cases.py"), "10")


def test_random_shapes_in_the_interpreter(interpreted):
    found = interpreted["found"]
    assert len(found) == 10
    assert not {shape: wrong for shape, wrong in found.items() if wrong}


def test_the_interpreter_notices_a_wrong_kernel(interpreted):
    found = interpreted["faulty"]
    assert any(name.startswith("state") for wrong in found.values() for name in wrong)


@pytest.mark.parametrize("arch", ARCHITECTURES)
@pytest.mark.parametrize(("family", "d_state"), [("ssd", 128), ("s6", 16)])
def test_the_state_moves_16_bytes_at_a_time_and_nothing_spills(resources, arch, family, d_state):
    sizes = SSD if family == "ssd" else S6
    config = choose(batch=128, **sizes)
    found = resources.usage(family, "bf16", d_state, config, arch)
    each = config.rows(d_state=d_state, available=sizes["headdim"] or sizes["entries"]) * d_state
    wide = each * config.sequences * 2 // (16 * 32 * config.warps)  # per thread, bf16
    assert found.stack_bytes == 0
    assert found.wide_stores >= wide >= 1
    assert found.wide_loads >= wide
    # Enough blocks fit on a multiprocessor to keep 32 KiB of the state in flight.
    registers = 65536 // (found.registers * 32 * config.warps)
    assert registers * each * config.sequences * 2 >= 32 << 10


@pytest.mark.parametrize(("family", "d_state"), [("ssd", 256), ("s6", 256), ("s6", 100)])
def test_other_sizes_compile_without_spilling(resources, family, d_state):
    sizes = {**(SSD if family == "ssd" else S6), "d_state": d_state, "itemsize": 4}
    found = resources.usage(family, "fp32", d_state, choose(batch=128, **sizes), 90)
    assert found.stack_bytes == 0


def test_a_tile_that_is_too_large_is_seen_to_spill(resources):
    found = resources.usage("ssd", "bf16", 256, Config(elements=1 << 14, warps=1), 90)
    assert found.stack_bytes > 0


@pytest.mark.parametrize("batch", [1, 8, 128, 1024])
@pytest.mark.parametrize("sizes", [SSD, S6])
def test_the_choice_is_one_that_is_compared_where_it_is_tuned(batch, sizes):
    config = choose(batch=batch, **sizes)
    assert config in CONFIGS
    # What an L2 just holds must not be marked to leave it first, nor what is far beyond it.
    assert config.stream == (batch not in ((8, 1024) if sizes is SSD else (128,)))


def test_rows_are_powers_of_two_that_fit():
    for config in CONFIGS:
        for d_state in (1, 16, 100, 256):
            for available in (1, 33, 64, 4096):
                rows = config.rows(d_state=d_state, available=available)
                assert rows == padded(rows) <= padded(available)
                assert rows == 1 or rows * padded(d_state) <= config.elements
