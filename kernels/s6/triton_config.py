"""How the Triton kernels of the selective scan (S6) are cut up; imports neither torch nor triton.

Fixed tables and no tuning at run time: the same shape runs the same code in every process.
"""

from dataclasses import dataclass

# Warps that keep a large GPU busy: 16 for each of the 132 SMs of an H100, about.
_WANTED_WARPS = 2048

# Steps that the backward prepares at a time.
AHEAD = 32


@dataclass(frozen=True, kw_only=True)
class Config:
    """One kernel's tile, for a number of states (padded to a power of two)."""

    tile: int  # steps in registers
    block: int  # channels of a program
    warps: int
    outer: int = 1  # backward: channels of a thread; `block` is this times those across lanes


@dataclass(frozen=True, kw_only=True)
class Cut:
    """How a pass is divided into programs."""

    config: Config
    blocks: int  # channel blocks, of all groups together
    segment: int  # steps of a segment of time
    segments: int
    chunk: int  # steps between the states kept for the backward
    partials: int = 1  # backward: programs that share a group's channels


_FORWARD = {
    16: Config(tile=4, block=32, warps=1),
    32: Config(tile=4, block=16, warps=1),
    64: Config(tile=8, block=32, warps=4),
    128: Config(tile=8, block=16, warps=4),
    256: Config(tile=8, block=16, warps=8),
}

_BACKWARD = {
    16: Config(tile=4, block=16, warps=1, outer=2),
    32: Config(tile=4, block=16, warps=2, outer=2),
    64: Config(tile=4, block=8, warps=2, outer=2),
    128: Config(tile=4, block=8, warps=4, outer=2),
    256: Config(tile=4, block=8, warps=8, outer=2),
}


def padded_states(d_state: int) -> int:
    """Return the number of states that the kernels compute with, a power of two of at least 16."""
    return max(16, 1 << (d_state - 1).bit_length())


def chunk_size(d_state: int) -> int:
    """Return the steps between kept states: fewer bytes than half of a bf16 u up to 16 states."""
    return 64 if d_state <= 16 else 128


def scratch_size(cut: Cut, d_state: int) -> int:
    """Return the fp32 elements that a program of the backward keeps of a chunk.

    The state before each tile, and dt, its derivative and dy.
    """
    states = padded_states(d_state) * cut.chunk // cut.config.tile
    return cut.config.block * (states + 3 * cut.chunk)


def forward_cut(
    *,
    batch: int,
    seqlen: int,
    d_inner: int,
    d_state: int,
    ngroups: int,
    config: Config | None = None,
) -> Cut:
    """Divide the forward: by channels and batch first, then time until the GPU is busy."""
    config = config or _FORWARD[padded_states(d_state)]
    chunk = chunk_size(d_state)
    blocks = ngroups * _ceil(d_inner // ngroups, config.block)
    segment = _segment(seqlen, chunk, batch * blocks * config.warps)
    return Cut(
        config=config, blocks=blocks, segment=segment, segments=_ceil(seqlen, segment), chunk=chunk
    )


def backward_cut(
    *,
    batch: int,
    seqlen: int,
    d_inner: int,
    d_state: int,
    ngroups: int,
    config: Config | None = None,
) -> Cut:
    """Divide the backward by batch and time, and by columns of channel blocks for the rest.

    A column's programs add up dB and dC of its blocks in one partial sum, 8 N bytes per step; a
    segment costs three states per channel. Of the divisions that keep the GPU busy, the one that
    moves the fewest bytes is taken, or the one with the most programs where none does.
    """
    config = config or _BACKWARD[padded_states(d_state)]
    chunk = chunk_size(d_state)
    group_blocks = _ceil(d_inner // ngroups, config.block)

    def rank(columns: int) -> tuple[int, int]:
        warps = batch * ngroups * columns * config.warps
        segments = _ceil(seqlen, _segment(seqlen, chunk, warps))
        moved = 2 * ngroups * d_state * seqlen * columns + 3 * d_inner * d_state * segments
        return -min(warps * segments, _WANTED_WARPS), moved

    columns = min(_columns(group_blocks), key=rank)
    segment = _segment(seqlen, chunk, batch * ngroups * columns * config.warps)
    return Cut(
        config=config,
        blocks=ngroups * group_blocks,
        segment=segment,
        segments=_ceil(seqlen, segment),
        chunk=chunk,
        partials=columns,
    )


def _columns(group_blocks: int) -> list[int]:
    """Return the numbers of columns that give each 1, 2, 4, ... blocks."""
    shares = [1 << power for power in range(group_blocks.bit_length())]
    return [_ceil(group_blocks, share) for share in shares]


def workspace_bytes(
    *, batch: int, seqlen: int, d_inner: int, d_state: int, ngroups: int, backward: bool
) -> int:
    """Count the bytes held at once: segments' and kept states, scratch, partial sums; all fp32."""
    sizes = {
        "batch": batch,
        "seqlen": seqlen,
        "d_inner": d_inner,
        "d_state": d_state,
        "ngroups": ngroups,
    }
    states = batch * d_inner * d_state
    segments = forward_cut(**sizes).segments
    held = states + (2 * states * segments if segments > 1 else 0)
    if not backward:
        return 4 * held
    cut = backward_cut(**sizes)
    kept = states * _ceil(seqlen, cut.chunk)
    programs = batch * cut.segments * ngroups * cut.partials
    scratch = programs * scratch_size(cut, d_state)
    partial_sums = cut.partials * 2 * batch * ngroups * d_state * seqlen
    per_segment = 4 * states * cut.segments
    return 4 * (kept + max(held, scratch + partial_sums + per_segment))


def _segment(seqlen: int, chunk: int, warps: int) -> int:
    """Return a segment's steps, a multiple of the chunk, so that `warps` a segment fill the GPU."""
    wanted = max(1, _WANTED_WARPS // warps)
    chunks = _ceil(seqlen, chunk)
    return chunk * _ceil(chunks, min(wanted, chunks))


def _ceil(a: int, b: int) -> int:
    return -(-a // b)
