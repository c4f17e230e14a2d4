"""What an operation launches, found without a GPU."""

import re
from pathlib import Path

import pytest

pytest.importorskip("triton.experimental.gluon")

import mambench.kernels
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


def test_what_is_judged_has_every_kernel_of_our_operations():
    """An operation that comes to launch another's kernels leaves its own unjudged."""
    (folder,) = mambench.kernels.__path__
    sources = {path.stem: path.read_text() for path in Path(folder).rglob("*.py")}
    defined = {
        (module, name)
        for module, source in sources.items()
        for name in re.findall(r"^def ([a-z]\w*_kernel)\(", source, re.MULTILINE)
    }
    launched = {
        (launch.kernel.fn.__module__.rpartition(".")[2], launch.name)
        for entry in ENTRIES
        if 90 in entry.architectures
        for launch in record(entry.call, 90)
    }
    assert len(defined) > 20
    assert not defined - launched
