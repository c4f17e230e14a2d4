"""How the Triton kernels of the selective scan (S6) are cut up; imports neither torch nor triton.

Fixed tables and no tuning at run time: the same shape runs the same code in every process.
"""

from dataclasses import dataclass

# Warps that keep a large GPU busy: 16 for each of the 132 SMs of an H100, about.
_WANTED_WARPS = 2048


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
    16: Config(tile=8, block=32, warps=1),
    32: Config(tile=8, block=16, warps=1),
    64: Config(tile=8, block=32, warps=4),
    128: Config(tile=8, block=16, warps=4),
    256: Config(tile=8, block=16, warps=8),
}

_BACKWARD = {
    16: Config(tile=4, block=16, warps=1, outer=2),
    32: Config(tile=4, block=16, warps=2, outer=2),
    64: Config(tile=4, block=16, warps=4, outer=2),
    128: Config(tile=4, block=8, warps=4, outer=1),
    256: Config(tile=4, block=8, warps=8, outer=1),
}


def padded_states(d_state: int) -> int:
    """Return the number of states that the kernels compute with, a power of two of at least 16."""
    return max(16, 1 << (d_state - 1).bit_length())


def chunk_size(d_state: int) -> int:
    """Return the steps between kept states: fewer bytes than half of a bf16 u up to 16 states."""
    return 64 if d_state <= 16 else 128


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
    """Divide the backward as the forward; then let programs take several blocks of channels each.

    The partial sums of dB and dC cost 8 N bytes per step and program column. Where time and batch
    alone give programs enough, fewer columns do.
    """
    config = config or _BACKWARD[padded_states(d_state)]
    chunk = chunk_size(d_state)
    group_blocks = _ceil(d_inner // ngroups, config.block)
    blocks = ngroups * group_blocks
    segment = _segment(seqlen, chunk, batch * blocks * config.warps)
    segments = _ceil(seqlen, segment)
    columns = _ceil(_WANTED_WARPS, batch * ngroups * segments * config.warps)
    if columns < group_blocks:
        # so many segments and batches: shorten segments no further, share columns out evenly
        columns = _ceil(group_blocks, group_blocks // columns)
    return Cut(
        config=config,
        blocks=blocks,
        segment=segment,
        segments=segments,
        chunk=chunk,
        partials=min(columns, group_blocks),
    )


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
    tiles = cut.chunk // cut.config.tile
    scratch = programs * tiles * cut.config.block * padded_states(d_state)
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
