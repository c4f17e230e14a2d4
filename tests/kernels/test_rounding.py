"""No sum over lanes begins with a product that the compiler contracts: lanes would differ."""

import importlib.util
import re
from pathlib import Path

import pytest
import torch

pytest.importorskip("triton")

from mambench.harness.static.record import record

FP32 = torch.float32
_SHUFFLE = re.compile(r"shfl\.sync\.bfly\.b32\s+(%\w+),")
_ADDEND = re.compile(r"fma\.rn\S*\s+%\w+, %\w+, %\w+, (%\w+);")


def contracted(ptx):
    """Count multiply-adds to what another lane sent."""
    received = set(_SHUFFLE.findall(ptx))
    return sum(addend in received for addend in _ADDEND.findall(ptx))


def update(draw):
    """Update states of 20, which are not aligned: a lane loads one of them."""
    from mambench.kernels.state_update.config import Config
    from mambench.kernels.state_update.triton_update import selective_state_update

    batch, channels, d_state = 3, 10, 20
    selective_state_update(
        draw(batch, channels, d_state), draw(batch, channels), draw(batch, channels),
        draw(channels, d_state, dtype=FP32), draw(batch, 2, d_state), draw(batch, 2, d_state),
        config=Config(elements=512, warps=1, sequences=4),
    )  # fmt: skip


def scan(draw, op, d_state):
    """Take gradients of a selective scan at an odd size."""
    shape, shared = (2, 34, 75), (2, 2, d_state, 75)
    out = op(
        draw(*shape, grad=True), draw(*shape, grad=True),
        draw(34, d_state, dtype=FP32, grad=True), draw(*shared, grad=True),
        draw(*shared, grad=True), draw(34, dtype=FP32, grad=True),
    )  # fmt: skip
    draw.backward(out)


def portable(draw):
    from mambench.kernels.s6.triton_scan import selective_scan

    scan(draw, selective_scan, 20)


def associative(draw):
    from mambench.kernels.scan_triton import selective_scan

    scan(draw, selective_scan, 16)


@pytest.mark.parametrize(
    ("call", "kernel"),
    [
        (update, "s6_update_kernel"),
        (portable, "scan_backward"),
        (associative, "grad_states_kernel"),
    ],
)
def test_lanes_add_up_the_same_products(call, kernel):
    (launch,) = (found for found in record(call, 90) if found.name == kernel)
    ptx = launch.compile().asm["ptx"]
    assert _SHUFFLE.search(ptx)
    assert contracted(ptx) == 0


def test_a_sum_that_lanes_round_differently_is_noticed():
    path = Path(__file__).parents[1] / "faults" / "races.py"
    spec = importlib.util.spec_from_file_location("races_of_rounding", path)
    races = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(races)
    (launch,) = record(lambda draw: races.contracted_sum(), 90)
    assert contracted(launch.compile().asm["ptx"]) == races._ROWS
