"""Pinned tilings of the Triton SSD kernels, and how time is divided among programs. Torch-free.

A tiling is a function of the element size, headdim and d_state alone: the same on every device, and
nothing is tuned while something is timed. Each was chosen so that no kernel spills registers on
sm_80, sm_90, sm_100 and sm_120, which a test checks.
"""

from dataclasses import dataclass
from functools import lru_cache

MAX_HEADDIM = 128
MAX_D_STATE = 256

# What a split of time costs: two more launches and a prefix, in units of the time that one program
# takes for one chunk; and the pass over the segments' end states, relative to the scan.
_SPLIT_OVERHEAD_CHUNKS = 6.0
_STATE_PASS_FRAC = 0.4


@dataclass(frozen=True, kw_only=True)
class Tiling:
    """Sizes of the tiles and launch parameters of every kernel, for one (itemsize, P, N)."""

    chunk: int  # Q, tokens per chunk; a power of two of at least 16
    block_n: int  # N rounded up to a power of two
    block_p: int  # columns of the state held by one program of the scan and state kernels
    grad_chunk: int  # tokens per chunk of the backward pass; divides `chunk`
    grad_block_p: int  # columns that the gradient kernels take at a time
    precision: str  # of products of fp32 inputs
    state_warps: int = 4
    state_stages: int = 2
    scan_warps: int = 4
    scan_stages: int = 2
    scan_programs_per_sm: int = 2
    grad_c_warps: int = 4
    grad_c_stages: int = 1
    grad_b_warps: int = 4
    grad_b_stages: int = 1
    grad_programs_per_sm: int = 2


@lru_cache(maxsize=256)
def tiling(itemsize: int, headdim: int, d_state: int) -> Tiling:
    """Return the pinned tiling for elements of `itemsize` bytes.

    Raises:
        ValueError: headdim or d_state is beyond what the kernels hold in registers.
    """
    if not 1 <= headdim <= MAX_HEADDIM or not 1 <= d_state <= MAX_D_STATE:
        raise ValueError(
            f"headdim is 1..{MAX_HEADDIM} and d_state 1..{MAX_D_STATE}, "
            f"got headdim {headdim} and d_state {d_state}"
        )
    block_n = max(16, _power_of_two(d_state))
    full_p = max(16, _power_of_two(headdim))
    wide = itemsize == 4
    chunk = 32 if wide else 64
    largest_p = 32 if wide else 64
    block_p = min(full_p, largest_p, max(16, 8192 // block_n))
    return Tiling(
        chunk=chunk,
        block_n=block_n,
        block_p=block_p,
        grad_chunk=32,
        grad_block_p=min(full_p, 64),
        precision="tf32x3" if wide else "tf32",
    )


@lru_cache(maxsize=1024)
def segment_chunks(nchunks: int, programs: int, slots: int) -> int:
    """Return how many chunks one segment has, so that a scan over segments takes the least time.

    Args:
        nchunks: chunks in the sequence.
        programs: independent programs per segment (batch * heads * blocks of headdim).
        slots: programs that the device runs at once.

    The model: programs run in whole waves, each as long as a segment; more than one segment costs
    the pass over end states (all but one segment) and two more launches.
    """

    def duration(segment: int) -> float:
        nsegments = -(-nchunks // segment)
        waves = -(-programs * nsegments // slots)
        scan = waves * segment
        if nsegments == 1:
            return float(scan)
        state_waves = -(-programs * (nsegments - 1) // slots)
        return scan + _STATE_PASS_FRAC * state_waves * segment + _SPLIT_OVERHEAD_CHUNKS

    largest_split = min(nchunks, max(1, 4 * slots // programs))
    candidates = {-(-nchunks // count) for count in range(1, largest_split + 1)}
    return min(candidates, key=lambda segment: (duration(segment), -segment))


@lru_cache(maxsize=1024)
def heads_per_program(heads_per_group: int, programs: int, slots: int) -> int:
    """Return how many heads of a group one program of the gradient kernels sums over.

    Args:
        heads_per_group: H / G.
        programs: programs if each summed over a whole group (batch * chunks * groups).
        slots: programs that the device runs at once.

    More heads amortise B, C and their product and leave fewer partial sums (worth about one head
    of work per program); fewer fill the device.
    """

    def duration(heads: int) -> float:
        blocks = -(-heads_per_group // heads)
        return -(-programs * blocks // slots) * (heads + 1.0)

    return min(range(1, heads_per_group + 1), key=lambda heads: (duration(heads), -heads))


def _power_of_two(size: int) -> int:
    return 1 << (size - 1).bit_length()
