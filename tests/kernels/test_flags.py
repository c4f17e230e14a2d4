"""Flags of launches: who shares them, and that what is captured has its own."""

from itertools import pairwise

import pytest
import torch

from mambench.kernels import flags


@pytest.fixture
def captured(monkeypatch):
    """Say which capture a stream is in."""
    known = {"capture": 1}
    monkeypatch.setattr(flags, "_capture", lambda stream: known["capture"])
    return known


def test_without_a_gpu_they_are_new_zeros():
    first = flags.flags(5, torch.device("cpu"))
    first += 1
    assert flags.flags(5, torch.device("cpu")).tolist() == [0] * 5


def test_a_capture_shares_them_on_a_stream_and_with_no_other(captured):
    kept = flags._ForGraphs(torch.zeros(1024, dtype=torch.int32))
    first = kept.take(40, 7)
    assert kept.take(30, 7).data_ptr() == first.data_ptr()
    beside = kept.take(40, 8)  # another stream of the capture
    assert abs(beside.data_ptr() - first.data_ptr()) >= 4 * 40
    larger = kept.take(100, 7)
    captured["capture"] = 2
    later = kept.take(40, 7)
    pieces = sorted((t.data_ptr(), t.numel() * 4) for t in (first, beside, larger, later))
    for (begin, size), (following, _) in pairwise(pieces):
        assert begin + size <= following
        assert begin % 128 == pieces[0][0] % 128


def test_a_capture_of_no_known_number_shares_nothing(captured):
    captured["capture"] = 0
    kept = flags._ForGraphs(torch.zeros(1024, dtype=torch.int32))
    assert kept.take(40, 7).data_ptr() != kept.take(40, 7).data_ptr()


def test_when_all_are_given_out_there_are_none(captured):
    kept = flags._ForGraphs(torch.zeros(64, dtype=torch.int32))
    assert kept.take(40, 7) is not None
    assert kept.take(1, 8) is None


@pytest.mark.gpu
def test_captures_have_flags_of_their_own():
    device = torch.device("cuda", torch.cuda.current_device())
    eager = flags.flags(64, device)
    assert flags.flags(64, device).data_ptr() == eager.data_ptr()
    with torch.cuda.stream(torch.cuda.Stream()):
        assert flags.flags(64, device).data_ptr() != eager.data_ptr()
    found = []
    for _ in range(2):
        with torch.cuda.graph(torch.cuda.CUDAGraph()):
            found.append([flags.flags(64, device).data_ptr() for _ in range(3)])
            torch.ones(1, device=device)  # torch warns of a graph that holds nothing
    assert len(set(found[0])) == len(set(found[1])) == 1
    assert len({eager.data_ptr(), found[0][0], found[1][0]}) == 3
