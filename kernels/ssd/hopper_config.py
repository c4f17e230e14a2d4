"""What the Hopper SSD supports and how it divides time. Torch-free."""

from mambench.kernels.ssd.triton_config import segment_chunks

CHUNK = 64  # tokens, Q
CHANNELS = 64  # of one head that one consumer holds
_FILLED_FRAC = 0.9  # of the multiprocessors, by one wave
_WHOLE_CHUNKS = 8
MOST_COMBINED = 2  # segments: of more, a launch adds up what enters them faster than the scan
LONGEST_WALK = 256  # chunks of a segment
MOST_SEGMENTS = 32  # whose flags one warp watches
_LEAST_CHUNKS = 2  # of a segment: the states of shorter ones would take more memory than the output
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


def workspace_bytes(
    *, batch: int, seqlen: int, nheads: int, headdim: int, d_state: int, ngroups: int
) -> int:
    """Return what a forward pass allocates beside inputs and outputs, on 132 multiprocessors.

    Running sums of the log-decay, scores of every chunk and group, and states between segments;
    of fp16, whose scores and states take twice the bytes of bf16.
    """
    nchunks = -(-seqlen // CHUNK)
    sums = 2 * 4 * batch * nheads * nchunks * CHUNK
    scores = 4 * batch * ngroups * nchunks * CHUNK * CHUNK
    per_segment = chunks_per_segment(
        batch=batch, seqlen=seqlen, nheads=nheads, headdim=headdim, ngroups=ngroups,
        multiprocessors=132,
    )  # fmt: skip
    segments = -(-nchunks // per_segment)
    states = 0 if segments == 1 else 4 * batch * nheads * segments * (headdim * d_state + 1)
    return sums + scores + states
