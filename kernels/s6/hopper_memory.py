"""What the Hopper scan's backward of up to 16 states allocates, and how it divides its work.

Torch-free. The gradients of u, delta and z are as large as their inputs: nothing can be done about
that. What comes on top goes into their memory, before they are written:

- The states that the forward kept take the place of the first steps of their chunk in du, where
  the kernel reads them before it writes du. So the memory that the forward kept is free again
  before anything else is allocated.
- What a part of a segment gets passed back lies behind the states of its first chunk.
- The blocks' partial sums of dB and dC of a chunk, 32 sums a step, are exactly as long as ddelta
  of as many channels as a chunk has steps. They lie in ddelta of the next chunk but one, and are
  added up before that is written; those of the last two in their own, which is written late.
- A row's sums of dA, dD and dbias take the place of its last chunk of du.

Where rows do not divide into these places, all but the kept states is scratch memory: two sets of
the partial sums of a chunk, whatever the length.
"""

from dataclasses import dataclass
from functools import lru_cache

STATES = 16  # of a warp
_PARTS, _LEAST = (4, 2), 4  # of a segment, the most wanted first, and a part's least chunks
_ADJOINT = 1 / 3  # what making a chunk's adjoint takes of the time of its backward
COUNTERS = 64  # int32 of a set of counters: two, on cache lines of their own


@dataclass(frozen=True, kw_only=True)
class Division:
    """How blocks go through a backward's items, each a segment of time of a batch element.

    Of `segments` a batch element, of `segment_chunks` each; `rows` of blocks at once, of `blocks`
    in a group. in_place: sums and states lie in du and ddelta, not in scratch memory. What a
    segment passes back is made in `parts`, by blocks of their own.
    """

    segments: int
    segment_chunks: int
    blocks: int
    rows: int
    in_place: bool
    parts: int = 1

    @property
    def total_parts(self) -> int:
        """Parts of all segments of a batch element."""
        return self.segments * self.parts


def divide(
    *, batch: int, seqlen: int, d_inner: int, d_state: int, ngroups: int, itemsize: int,
    chunk: int, block: int, slots: int, segments: int | None = None,
) -> Division:  # fmt: skip
    """Divide time into segments, and the items that this makes among rows of blocks.

    Args:
        batch, seqlen, d_inner, d_state, ngroups: of the problem.
        itemsize: bytes of an element of u.
        chunk: steps between kept states.
        block: channels of a thread block.
        slots: thread blocks that the GPU holds at once.
        segments: how many; None: as fill the GPU.
    """
    channels = d_inner // ngroups
    blocks = _ceil(channels, block)
    most = max(1, slots // (ngroups * blocks))
    chunks = _ceil(seqlen, chunk)
    if segments is None:
        segments = _segments(batch, chunks, most, seqlen % chunk == 0)
    each = _ceil(chunks, min(segments, chunks))
    segments = _ceil(chunks, each)
    rows = min(most, batch * segments)
    # a chunk that is cut short has no room for another's sums; it is the first of its segment
    last = chunks - each * (segments - 1)
    whole = seqlen % chunk == 0 or (rows == batch * segments and last > 1)
    fits = d_state <= STATES and channels % block == 0 and block >= chunk
    wide = chunk * itemsize >= 128 and seqlen * itemsize % 4 == 0
    in_place = whole and fits and wide
    even = in_place and segments > 1 and segments * each * chunk == seqlen
    return Division(
        segments=segments, segment_chunks=each, blocks=blocks, rows=rows, in_place=in_place,
        parts=_parts(each) if even else 1,
    )  # fmt: skip


def _parts(chunks: int) -> int:
    """Return the parts of a segment; more end sooner where they are long enough."""
    return next((n for n in _PARTS if chunks % n == 0 and chunks // n >= _LEAST), 1)


@lru_cache(maxsize=256)
def _segments(batch: int, chunks: int, rows: int, whole: bool) -> int:
    """Return the segments with which the rows are done soonest, the fewest of those.

    Where a chunk is cut short, no more than rows go through at once: sums then stay in place.
    """

    def cost(segments: int) -> float:
        each = _ceil(chunks, segments)
        rounds = _ceil(batch * segments, rows)
        adjoints = batch * (segments - 1) * each / rows if segments > 1 else 0
        return rounds * each + _ADJOINT * adjoints

    most = rows if whole else max(1, rows // batch)
    return min(range(1, min(most, chunks) + 1), key=cost)


def resident(*, d_inner: int, ngroups: int, block: int, slots: int) -> bool:
    """Whether a GPU holds a block for all channels at once, as the kernel needs it."""
    return ngroups * _ceil(d_inner // ngroups, block) <= slots


def states_fit(*, seqlen: int, chunk: int, d_state: int, itemsize: int) -> bool:
    """Whether every chunk of a row of du has room for the fp32 states before it, aligned."""
    shortest = seqlen - (_ceil(seqlen, chunk) - 1) * chunk
    return seqlen * itemsize % 4 == 0 and shortest * itemsize >= 4 * d_state


def scratch_elements(
    division: Division,
    *,
    batch: int,
    d_inner: int,
    d_state: int,
    ngroups: int,
    chunk: int,
) -> dict[str, int]:
    """Return the 4-byte elements of each buffer that the kernels share, by name.

    counters; total, the sums of dt by part; and, if not in place: r, what is passed back to each
    segment; parts, partial sums of dB and dC; records, rows' sums of dA, dD and dbias.
    """
    items, columns = batch * division.segments, ngroups * division.blocks
    scratch = {
        "counters": COUNTERS * (division.rows * ngroups + columns),
        "total": batch * division.total_parts * d_inner if division.segments > 1 else 0,
    }
    if division.in_place:
        return scratch | {"r": 0, "parts": 0, "records": 0}
    return scratch | {
        "r": items * d_inner * d_state if division.segments > 1 else 0,
        "parts": 2 * division.rows * columns * chunk * 2 * STATES,
        "records": division.rows * d_inner * (d_state + 4),  # whose states are aligned
    }


def training_bytes(
    *, batch: int, seqlen: int, d_inner: int, d_state: int, ngroups: int, itemsize: int,
    gated: bool, chunk: int, block: int, slots: int,
) -> int:  # fmt: skip
    """Return the most that a training step holds at once beside its inputs: forward, then backward.

    The output and all gradients included, with D and bias; of torch's allocator, rounding excepted.
    """
    division = divide(
        batch=batch, seqlen=seqlen, d_inner=d_inner, d_state=d_state, ngroups=ngroups,
        itemsize=itemsize, chunk=chunk, block=block, slots=slots,
    )  # fmt: skip
    tokens = itemsize * batch * seqlen * d_inner
    kept = 4 * batch * _ceil(seqlen, chunk) * d_inner * d_state
    scratch = 4 * sum(
        scratch_elements(
            division, batch=batch, d_inner=d_inner, d_state=d_state, ngroups=ngroups, chunk=chunk
        ).values()
    )
    shared = itemsize * 2 * batch * ngroups * d_state * seqlen
    parameters = 4 * d_inner * (d_state + 2)
    last = tokens * (3 + gated) + scratch + shared + parameters
    moved = states_fit(seqlen=seqlen, chunk=chunk, d_state=d_state, itemsize=itemsize)
    return max(2 * tokens + kept + scratch, last) if moved else last + kept


def _ceil(a: int, b: int) -> int:
    return -(-a // b)
