"""What an operation launches, found without a GPU."""

import pytest

pytest.importorskip("triton.experimental.gluon")

from mambench.harness.static.record import record
from mambench.kernels.inventory import ENTRIES

CALLS = {entry.name: entry.call for entry in ENTRIES}


def test_a_backward_pass_divides_time_for_the_device_that_is_asked_about():
    """Of one multiprocessor it would not: neither kernel between segments would be launched."""
    names = [launch.name for launch in record(CALLS["s6 hopper bf16 N=16"], 90)]
    assert names == [
        "scan_forward_kernel",
        "segment_adjoint_kernel",
        "pass_back_kernel",
        "scan_backward_kernel",
    ]
