import pytest

from mambench.kernels.ssd.triton_config import heads_per_program, segment_chunks, tiling


@pytest.mark.parametrize("wgmma", [False, True])
@pytest.mark.parametrize("itemsize", [2, 4])
@pytest.mark.parametrize("headdim", [1, 16, 20, 64, 80, 128])
@pytest.mark.parametrize("d_state", [1, 16, 24, 64, 128, 200, 256])
def test_tiles_cover_the_problem_and_fit_the_tensor_cores(itemsize, headdim, d_state, wgmma):
    tiles = tiling(itemsize, headdim, d_state, wgmma=wgmma)
    assert tiles.block_n >= d_state
    for size in (tiles.chunk, tiles.grad_chunk, tiles.block_n, tiles.block_p, tiles.grad_block_p):
        assert size >= 16
        assert size & (size - 1) == 0
    assert tiles.chunk % tiles.grad_chunk == 0
    assert tiles.block_n * tiles.block_p <= 8192  # fp32 state: 64 registers of 128 threads


@pytest.mark.parametrize(("headdim", "d_state"), [(129, 16), (16, 257), (0, 16)])
def test_sizes_beyond_the_kernels_are_refused(headdim, d_state):
    with pytest.raises(ValueError, match=f"got headdim {headdim} and d_state {d_state}"):
        tiling(2, headdim, d_state, wgmma=True)


def test_time_is_split_only_where_the_device_would_be_idle():
    assert segment_chunks(128, programs=264, slots=264) == 128
    assert segment_chunks(128, programs=4000, slots=264) == 128
    assert segment_chunks(1, programs=1, slots=264) == 1
    few = segment_chunks(128, programs=32, slots=264)
    nsegments = -(-128 // few)
    assert nsegments > 1
    assert nsegments * 32 <= 264  # one wave


@pytest.mark.parametrize("nchunks", [1, 2, 17, 128, 2048])
@pytest.mark.parametrize("programs", [1, 24, 80, 160, 1000])
def test_a_split_never_takes_longer_than_none_in_waves(nchunks, programs):
    slots = 264
    segment = segment_chunks(nchunks, programs=programs, slots=slots)
    assert 1 <= segment <= nchunks
    waves = -(-programs * -(-nchunks // segment) // slots)
    assert waves * segment <= -(-programs // slots) * nchunks


@pytest.mark.parametrize("heads", [1, 3, 8, 32, 128])
@pytest.mark.parametrize("programs", [1, 30, 128, 10_000])
def test_blocks_of_heads_shrink_where_programs_are_few(heads, programs):
    chosen = heads_per_program(heads, programs=programs, slots=264)
    assert 1 <= chosen <= heads
    assert heads_per_program(heads, programs=10 * programs, slots=264) >= chosen or chosen == heads
    if programs * heads <= 264:
        assert chosen == 1
