"""Pinned tilings of the Triton SSD kernels, and how time is divided among programs. Torch-free.

A tiling is a function of the element size, headdim, d_state and the kind of tensor core alone:
nothing is tuned while something is timed. Each was chosen by the registers its kernels need.
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
    grad_c_block_p: int  # ... in grad_c where there is no gate, whose gradient needs registers
    precision: str  # of products of fp32 inputs
    state_warps: int = 4
    state_stages: int = 2
    scan_warps: int = 4
    scan_stages: int = 2
    scan_programs_per_sm: int = 2
    grad_c_warps: int = 4
    grad_c_stages: int = 1  # where there is no gate; else 1
    grad_b_warps: int = 4
    grad_b_stages: int = 1
    grad_programs_per_sm: int = 2
    whole_heads: bool = False  # without a gate, whole_kernel takes a head's tiles at once
    # ... or, where TMA can read them, Gluon kernels do (hopper_grad); the Hopper operation sets it.
    fetched: bool = False
    whole_stages: int = 2
    whole_sum_stages: int = 3


@lru_cache(maxsize=256)
def tiling(itemsize: int, headdim: int, d_state: int, *, wgmma: bool) -> Tiling:
    """Return the pinned tiling.

    Args:
        itemsize: bytes per element of the activations; 4 needs the registers of three products.
        headdim: P.
        d_state: N.
        wgmma: whether products of 64 rows read their operands from shared memory (compute
            capability 9). Elsewhere operands take registers and tiles are smaller; so too with
            capability 10, where Triton 3.6 fails to compile the gradients of 64-row products.

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
    if itemsize == 4:
        chunk, grad_chunk, state_elements, grad_block_p = 16, 16, 4096, 32
    elif wgmma:
        chunk, grad_chunk, state_elements, grad_block_p = 64, 64, 8192, 32
    else:
        chunk, grad_chunk, state_elements, grad_block_p = 32, 32, 4096, 64
    if block_n == 256:
        grad_chunk = min(grad_chunk, 32 if wgmma else 16)
    # On an H100 at P = 64, N = 128: all columns at once and a stage more take a quarter off grad_c
    # and a stage more a tenth off the states; in grad_b the same spills or costs a third.
    deep = wgmma and itemsize == 2 and block_n <= 128
    return Tiling(
        chunk=chunk,
        grad_chunk=grad_chunk,
        block_n=block_n,
        block_p=min(full_p, 64, max(16, state_elements // block_n)),
        grad_block_p=min(full_p, grad_block_p),
        grad_c_block_p=min(full_p, 64 if deep else grad_block_p),
        precision="tf32x3" if itemsize == 4 else "tf32",
        scan_programs_per_sm=1 if wgmma and block_n == 256 else 2,
        state_stages=3 if deep else 2,
        grad_c_stages=3 if deep else 1,
        whole_heads=deep and full_p <= 64,
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
