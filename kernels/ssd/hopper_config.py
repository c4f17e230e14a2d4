"""What the Hopper SSD supports and how it divides time. Torch-free."""

from functools import lru_cache

from mambench.kernels.ssd.triton_config import segment_chunks

CHUNK = 64  # tokens, Q
CHANNELS = 64  # of one head that one consumer holds
WITHIN_CHUNKS = 16  # of a segment whose walk makes its own sums, and needs no launch before it
_FILLED_FRAC = 0.9  # of the multiprocessors, by one wave
_WHOLE_CHUNKS = 8
MOST_COMBINED = 2  # segments: of more, a launch adds up what enters them faster than the scan
LONGEST_WALK = 256  # chunks of a segment
MOST_SEGMENTS = 32  # whose flags one warp watches
_LEAST_CHUNKS = 2  # of a segment: the states of shorter ones would take more memory than the output
ONE_LAUNCH_CHUNKS = 512  # of all pairs of heads
ONE_LAUNCH_CHUNKS_OF_FEW = 2048  # where few pairs of heads share the scores,
_FEW_PAIRS = 2
_BLOCKS_OF_FEW = range(16, 33)  # of all pairs, as timed
_SOON_MADE = 8  # chunks whose scores one block makes without making others wait for long,
_SOON_MADE_IN_ALL = 64  # as long as all blocks together make no more than these
_MULTIPROCESSORS = 132  # of an H100 and an H200 with NVLink
# Of a look back, in units of the time that the outputs of a chunk take.
_STATE_COST = 0.5
_HAND_OVER_COST = 2.0
_SEGMENT_COST = 0.25
MAX_HEADDIM = 128
MAX_D_STATE = 128  # at 256 the scan spills registers


def refusal(*, headdim: int, d_state: int) -> str | None:
    """Return why the kernels cannot serve these sizes, or None."""
    if headdim % 8 or not 8 <= headdim <= MAX_HEADDIM:
        return f"headdim {headdim}: the Hopper SSD takes multiples of 8 up to {MAX_HEADDIM}"
    if d_state % 8 or not 8 <= d_state <= MAX_D_STATE:
        return f"d_state {d_state}: the Hopper SSD takes multiples of 8 up to {MAX_D_STATE}"
    return None


def pairs(heads_per_group: int, headdim: int) -> int:
    """Return how many blocks of two consumers serve the heads of one group."""
    return -(-heads_per_group * -(-headdim // CHANNELS) // 2)


def chunks_per_segment(
    *, batch: int, seqlen: int, nheads: int, headdim: int, ngroups: int, multiprocessors: int
) -> int:
    """Return how many chunks a segment has, so that its blocks fill the device in whole waves.

    Up to 8 chunks time stays whole: what a split saves, the start of two more kernels takes, and
    their launches are host time that so short a scan does not hide. One wave that fills most of the
    device is taken before several that fill all of it: on an H100, four waves took 45 % longer a
    token at L = 131,072 than one did at 32,768 (published/h100-long).
    """
    nchunks = -(-seqlen // CHUNK)
    if nchunks <= _WHOLE_CHUNKS:
        return nchunks
    blocks = batch * ngroups * pairs(nheads // ngroups, headdim)
    segments = multiprocessors // blocks
    if segments * blocks >= _FILLED_FRAC * multiprocessors:
        return max(_LEAST_CHUNKS, -(-nchunks // segments))
    return max(_LEAST_CHUNKS, segment_chunks(nchunks, blocks, multiprocessors))


def one_launch(
    *, batch: int, seqlen: int, nheads: int, headdim: int, ngroups: int, d_state: int
) -> bool:  # fmt: skip
    """Return whether the walk with a helper (`hopper_fused`) is faster than the one without.

    It is where a walk is mostly starting and waiting, unless the other can be the only launch too;
    where it is long, the helper's share of the tensor cores takes more than its own sums and scores
    cost the other, except where few heads share the scores.
    """
    per_group = pairs(nheads // ngroups, headdim)
    blocks = batch * ngroups * per_group
    alone = walks_alone(
        batch=batch, seqlen=seqlen, nheads=nheads, headdim=headdim, ngroups=ngroups,
        d_state=d_state,
    )  # fmt: skip
    few = per_group == _FEW_PAIRS and blocks in _BLOCKS_OF_FEW and not padded(headdim, d_state)
    most = ONE_LAUNCH_CHUNKS_OF_FEW if few else ONE_LAUNCH_CHUNKS
    return not alone and blocks * -(-seqlen // CHUNK) <= most


@lru_cache(maxsize=256)
def walks_alone(
    *, batch: int, seqlen: int, nheads: int, headdim: int, ngroups: int, d_state: int
) -> bool:  # fmt: skip
    """Return whether the walk should be the only launch: it can be, and its scores are in time.

    It can be where time is divided into short segments whose blocks are all resident, and no state
    is padded. Scores are made by one block per pair of heads, which makes a group's chunks over its
    pairs, one after the other; where that is more than a segment has, the others wait for it
    (published/experiments/h100-ssd-walk-makers.json).
    """
    nchunks, per_group = -(-seqlen // CHUNK), pairs(nheads // ngroups, headdim)
    segment = chunks_per_segment(
        batch=batch, seqlen=seqlen, nheads=nheads, headdim=headdim, ngroups=ngroups,
        multiprocessors=_MULTIPROCESSORS,
    )  # fmt: skip
    soon = batch * ngroups * nchunks <= _SOON_MADE_IN_ALL
    in_time = -(-nchunks // per_group) <= max(segment, _SOON_MADE if soon else 0)
    possible = segment < nchunks and segment <= WITHIN_CHUNKS and may_look_back(
        segments=-(-nchunks // segment), blocks=batch * ngroups * per_group,
        headdim=headdim, d_state=d_state, multiprocessors=_MULTIPROCESSORS,
    )  # fmt: skip
    return possible and in_time


def may_look_back(
    *, segments: int, blocks: int, headdim: int, d_state: int, multiprocessors: int
) -> bool:  # fmt: skip
    """Return whether blocks may look back: all segments' have a place, and no slot is padded.

    Padded slots would take more memory than the states that four launches keep. Blocks that make
    scores come before them and end soon; those of the last segment take their places.

    Args:
        segments: of time.
        blocks: of one segment.
        headdim: channels of a head.
        d_state: states of a channel.
        multiprocessors: of the device.
    """
    there = segments <= MOST_SEGMENTS and segments * blocks <= multiprocessors
    return there and not padded(headdim, d_state)


def padded(headdim: int, d_state: int) -> bool:
    """Return whether a block's states are larger than those that are asked for."""
    return headdim % CHANNELS != 0 or d_state < 16 or d_state & (d_state - 1) != 0


def look_back_chunks(
    *, batch: int, seqlen: int, nheads: int, headdim: int, ngroups: int, multiprocessors: int
) -> int:
    """Return how many chunks a segment has where blocks look back at earlier segments.

    Of the divisions whose blocks fill the device at most once: a chunk's outputs are one unit of
    time, its part of the state another half, the hand-over and each segment looked at the rest.
    """
    nchunks = -(-seqlen // CHUNK)
    blocks = batch * ngroups * pairs(nheads // ngroups, headdim)
    least = _LEAST_CHUNKS * max(1, CHANNELS // headdim)

    def duration(count: int) -> float:
        chunks = -(-nchunks // count)
        if count == 1:
            return float(chunks)
        return chunks * (1 + _STATE_COST) + _HAND_OVER_COST + _SEGMENT_COST * (count - 1)

    most = max(1, min(MOST_SEGMENTS, multiprocessors // blocks, nchunks // least))
    return -(-nchunks // min(range(1, most + 1), key=duration))


def workspace_bytes(
    *, batch: int, seqlen: int, nheads: int, headdim: int, d_state: int, ngroups: int
) -> int:
    """Return what a forward pass allocates beside inputs and outputs, on 132 multiprocessors.

    Running sums of the log-decay, scores of every chunk and group, and states between segments;
    of fp16, whose scores and states take twice the bytes of bf16. The walk that looks back keeps
    the states of whole pairs of heads, and no sums if it is the only launch.
    """
    nchunks = -(-seqlen // CHUNK)
    sizes = {
        "batch": batch, "seqlen": seqlen, "nheads": nheads, "headdim": headdim, "ngroups": ngroups,
    }  # fmt: skip
    blocks = batch * ngroups * pairs(nheads // ngroups, headdim)
    if one_launch(**sizes, d_state=d_state):
        segments = -(-nchunks // look_back_chunks(**sizes, multiprocessors=_MULTIPROCESSORS))
        block_n = max(32, 1 << (d_state - 1).bit_length())
        return 4 * blocks * 2 * (segments - 1) * (CHANNELS * block_n + 1)
    sums = 2 * 4 * batch * nheads * nchunks * CHUNK
    scores = 4 * batch * ngroups * nchunks * CHUNK * CHUNK
    per_segment = chunks_per_segment(**sizes, multiprocessors=_MULTIPROCESSORS)
    segments = -(-nchunks // per_segment)
    if walks_alone(**sizes, d_state=d_state):
        return scores + 4 * blocks * 2 * (segments - 1) * (CHANNELS * d_state + 1)
    states = 0 if segments == 1 else 4 * batch * nheads * segments * (headdim * d_state + 1)
    return sums + scores + states
