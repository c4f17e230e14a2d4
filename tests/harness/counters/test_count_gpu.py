"""Counters and ceilings on a GPU: known bytes, and rates against what the maker states."""

import pytest

from mambench.harness import machine
from mambench.harness.counters import count as counters
from mambench.harness.counters.count import Request
from mambench.harness.instruments import ceilings
from mambench.harness.spec import Case, DType, Family, Outcome, Pass, Problem

pytestmark = [pytest.mark.gpu, pytest.mark.alone]

CASE = Case(
    implementation="selective_scan",
    variant="triton",
    problem=Problem(family=Family.S6, batch=1, seqlen=4096, d_inner=1024, d_state=16, ngroups=1),
    pass_=Pass.BACKWARD,  # its kernels are launched from autograd's thread
    dtype=DType.BF16,
)


@pytest.fixture(scope="module")
def found():
    import torch

    device = machine.detect("cuda")
    size = 8 * torch.cuda.get_device_properties(0).L2_cache_size // 4096 * 4096
    items = [
        {"id": "copy", "copy_bytes": size},
        {"id": "read", "read_bytes": size},
        {"id": "write", "write_bytes": size},
        {"id": "case", "case": CASE.to_dict()},
    ]
    counted = counters.count_probes(items, Request(device=device))
    for result in counted.values():
        if result.outcome is Outcome.UNAVAILABLE:
            pytest.skip(result.reason or "counters are not available")
    return size, counted


@pytest.mark.parametrize(
    ("name", "reads", "writes"), [("copy", 1, 1), ("read", 1, 0), ("write", 0, 1)]
)
def test_known_bytes_are_counted_within_two_per_cent(found, name, reads, writes):
    size, counted = found
    values = counted[name].values
    assert values["dram_read_bytes"] == pytest.approx(reads * size, abs=0.02 * size)
    assert values["dram_write_bytes"] == pytest.approx(writes * size, abs=0.02 * size)
    assert counted[name].details["passes"] in (1, None)  # not every ncu says it


def test_a_backward_is_seen_although_another_thread_launches_it(found):
    _, counted = found
    assert counted["case"].outcome is Outcome.OK, counted["case"].reason
    assert counted["case"].details["launches"] >= 1


def test_a_range_counts_what_its_launches_move(found):
    size, one_by_one = found
    device = machine.detect("cuda")
    items = [{"id": "copy", "copy_bytes": size}, {"id": "case", "case": CASE.to_dict()}]
    ranges = counters.count_probes(items, Request(device=device, ranges=True))
    for name, counted in ranges.items():
        if counted.outcome is Outcome.UNAVAILABLE:
            pytest.skip(counted.reason or "this ncu counts no ranges")
        assert counted.outcome is Outcome.OK, counted.reason
        assert counted.method == "ncu-app-range"
        expected = one_by_one[name].values["dram_bytes"]
        assert counted.values["dram_bytes"] == pytest.approx(expected, rel=0.05), name


def test_measured_ceilings_lie_below_what_is_stated():
    device = machine.detect("cuda")
    measured = ceilings.measure(device, 4)
    for ceiling in measured.ceilings.values():
        assert ceiling.value is not None, ceiling
        if ceiling.datasheet is not None:
            assert 0.3 * ceiling.datasheet < ceiling.value < 1.05 * ceiling.datasheet, ceiling
