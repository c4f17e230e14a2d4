"""How the Hopper scan's backward divides its work, and what it allocates for that."""

from collections import Counter

import pytest

from mambench.kernels.s6 import hopper_memory
from mambench.kernels.s6.hopper_memory import Division, divide, resident, states_fit

SIZES = {"d_inner": 2048, "d_state": 16, "ngroups": 1, "itemsize": 2, "chunk": 64, "block": 64}
SLOTS = 264


def made(**sizes: int) -> Division:
    return divide(**{"batch": 1, "seqlen": 8192, "slots": SLOTS} | SIZES | sizes)


def chunks_of_rows(division: Division, batch: int, chunks: int) -> list[list[tuple[int, int]]]:
    """Return what each row goes through, as the kernel does: batch element and chunk."""
    rows: list[list[tuple[int, int]]] = []
    for row in range(division.rows):
        rows.append([])
        for item in range(row, batch * division.segments, division.rows):
            first = item % division.segments * division.segment_chunks
            end = min(first + division.segment_chunks, chunks)
            assert end > first, "a segment without chunks"
            rows[-1] += [(item // division.segments, chunk) for chunk in range(first, end)]
    return rows


@pytest.mark.parametrize("batch", [1, 2, 3, 5, 8, 9, 40])
@pytest.mark.parametrize("seqlen", [1, 64, 130, 2048, 4000])
@pytest.mark.parametrize("d_inner", [40, 768, 2048, 5120])
def test_rows_go_through_every_chunk_once(batch: int, seqlen: int, d_inner: int) -> None:
    division = made(batch=batch, seqlen=seqlen, d_inner=d_inner)
    chunks = -(-seqlen // 64)
    rows = chunks_of_rows(division, batch, chunks)
    assert all(rows), "a row of blocks without work waits for the others all the same"
    found = Counter(chunk for row in rows for chunk in row)
    assert set(found.values()) == {1}
    assert len(found) == batch * chunks
    assert division.rows * division.blocks <= SLOTS, "blocks wait for each other"


@pytest.mark.parametrize(
    ("batch", "most"), [(1, 4), (2, 8), (3, 12), (5, 20), (7, 32), (8, 32), (9, 36)]
)
def test_no_row_has_much_more_to_do_than_the_others(batch: int, most: int) -> None:
    """Chunks of the longest of 8 rows at 2,048 steps; three batch elements on 8 rows: 12 of 96."""
    rows = chunks_of_rows(made(batch=batch, seqlen=2048), batch, 32)
    assert max(map(len, rows)) == most


def test_sums_are_in_place_only_where_they_have_room() -> None:
    assert made().in_place
    assert made(seqlen=8190).in_place, "a chunk cut short, but not where sums go"
    assert not made(seqlen=8191).in_place, "rows that are not aligned to four bytes"
    assert not made(seqlen=34).in_place, "sums in a chunk cut short"
    assert not made(seqlen=8190, batch=9).in_place, "sums in the next item's cut chunk"
    assert not made(d_inner=2056).in_place, "a block without all its channels"
    assert not made(d_state=17).in_place
    assert not made(block=32).in_place, "fewer rows than a chunk has steps"


def test_parts_of_a_segment_are_not_too_short() -> None:
    assert made().parts == 4
    assert made(seqlen=4096).parts == 2
    assert made(seqlen=2048).parts == 1
    assert made(batch=8).parts == 1, "one segment, which passes nothing back"
    assert made(seqlen=8190).parts == 1, "a part whose first chunk is cut short"


def test_scratch_is_as_long_for_every_length() -> None:
    """In place only counters and sums of dt; otherwise two sets of a chunk's partial sums."""
    sizes = {"batch": 1, "d_inner": 2048, "d_state": 16, "ngroups": 1, "chunk": 64}
    scratch = [
        hopper_memory.scratch_elements(
            made(seqlen=seqlen, d_inner=2040), **(sizes | {"d_inner": 2040})
        )
        for seqlen in (2048, 1 << 20)
    ]
    assert scratch[0] == scratch[1]
    assert scratch[0]["parts"] == 2 * 8 * 32 * 64 * 32
    small = hopper_memory.scratch_elements(made(seqlen=2048), **sizes)
    assert 4 * sum(small.values()) < 1 << 18


def test_what_a_gpu_holds_at_once() -> None:
    assert resident(d_inner=64 * 264, ngroups=1, block=64, slots=264)
    assert not resident(d_inner=64 * 265, ngroups=1, block=64, slots=264)
    assert not resident(d_inner=2048, ngroups=512, block=64, slots=264)


def test_states_fit_where_the_last_chunk_has_room_too() -> None:
    assert states_fit(seqlen=8192, chunk=64, d_state=16, itemsize=2)
    assert states_fit(seqlen=8192 + 32, chunk=64, d_state=16, itemsize=2)
    assert not states_fit(seqlen=8192 + 30, chunk=64, d_state=16, itemsize=2)
    assert not states_fit(seqlen=8191, chunk=64, d_state=16, itemsize=2)
    assert not states_fit(seqlen=8192, chunk=32, d_state=128, itemsize=2)
