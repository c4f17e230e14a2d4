"""What the Hopper scan's backward of more than 16 states allocates, and how it divides its work.

Torch-free. Beside the gradients there are only the partial sums of dB and dC that are under way,
whatever the length, and counters. The states that the forward kept lie in du, which they fill: with
one segment of time each in the span before its own, so that the last span may be short; with
several each in its own, if spans are whole. What is passed back to a segment lies in ddelta at its
beginning. Where rows do not divide so, segments' first states or what is passed back are in scratch
memory, too.

How many steps' partial sums are under way, and if need be how many segments there are, follows from
`room_bytes`: what mamba_ssm holds beyond outputs and gradients, so that a training step never takes
more than its.
"""

from dataclasses import dataclass, replace

from mambench.kernels.s6 import hopper_memory
from mambench.kernels.s6.hopper_memory import COUNTERS, STATES

_PEER_STEPS = 2048  # between the states that mamba_ssm keeps, two values each
_LAUNCHES = 8  # at most; 4 others are around them in a training step
_SETS = ((16, 2), (8, 2), (8, 1))  # steps of partial sums and how many sets, the fastest first


@dataclass(frozen=True, kw_only=True)
class WideConfig:
    """How the kernel is built.

    Lanes of a warp over states (4 or 8; 4 states each), warps of a block over states and over
    channels, steps between the states that the forward keeps, between those noted first (None: all
    at once) and between notes; of B and C staged at once, of an exchange of partial sums at most,
    replayed in registers; blocks of a multiprocessor, a limit of registers.
    """

    warps_n: int
    warps_d: int
    chunk: int
    lanes_n: int = 4
    mid: int | None = None
    stage: int = 16
    exchange: int = 16
    note: int = 8
    tile: int = 8
    resident: int = 1
    registers: int | None = None

    @property
    def block(self) -> int:
        """Channels of a thread block."""
        return 64 // self.lanes_n * self.warps_d

    @property
    def warps(self) -> int:
        """Warps of a thread block."""
        return self.warps_n * self.warps_d

    @property
    def states(self) -> int:
        """States of a thread block, padded ones included."""
        return 4 * self.lanes_n * self.warps_n


@dataclass(frozen=True, kw_only=True)
class Plan:
    """How blocks go through a backward's items, each a segment of time of a batch element.

    Of `segments` a batch element, of `segment_spans` each; `rows` of blocks at once, of `blocks` in
    a group; as many `launches` as channels need. Partial sums of `exchange` steps in `slots` sets.
    in_du: kept states fit there, in the span `before` their own except the `heads` of segments;
    r_in_ddelta: what is passed back fits there.
    """

    segments: int
    segment_spans: int
    blocks: int
    rows: int
    launches: int
    exchange: int
    slots: int
    in_du: bool
    before: bool
    heads: bool
    r_in_ddelta: bool


def plan(
    config: WideConfig, *, batch: int, seqlen: int, d_inner: int, d_state: int, ngroups: int,
    itemsize: int, resident: int, segments: int | None = None,
) -> Plan:  # fmt: skip
    """Divide time, channels and the partial sums under way.

    Args:
        config: of the kernel.
        batch, seqlen, d_inner, d_state, ngroups: of the problem.
        itemsize: bytes of an element of u.
        resident: thread blocks that the GPU holds at once.
        segments: of time; None: as many as fill the GPU and have room.
    """
    sizes = {
        "batch": batch, "seqlen": seqlen, "d_inner": d_inner, "d_state": d_state,
        "ngroups": ngroups,
    }  # fmt: skip
    room = room_bytes(**sizes)
    wanted = segments
    while True:
        made = _divided(config, **sizes, itemsize=itemsize, resident=resident, segments=wanted)
        for exchange, slots in _SETS:
            if exchange > config.exchange:
                continue
            found = replace(made, exchange=exchange, slots=slots)
            if 4 * sum(scratch_elements(found, config, **sizes).values()) <= room:
                return found
        if segments is not None or made.segments == 1:
            return found
        wanted = made.segments - 1


def _divided(
    config: WideConfig, *, batch: int, seqlen: int, d_inner: int, d_state: int, ngroups: int,
    itemsize: int, resident: int, segments: int | None,
) -> Plan:  # fmt: skip
    """Return a plan of so many segments, with the most partial sums under way."""
    span = config.chunk
    division = hopper_memory.divide(
        batch=batch, seqlen=seqlen, d_inner=d_inner, d_state=d_state, ngroups=ngroups,
        itemsize=itemsize, chunk=span, block=config.block, slots=resident, segments=segments,
    )  # fmt: skip
    each, count = division.segment_chunks, division.segments
    launches = launches_of(blocks=division.blocks, ngroups=ngroups, resident=resident)
    whole = seqlen % span == 0
    shortest = seqlen - (count - 1) * each * span
    words = seqlen * itemsize % 4 == 0
    in_du = span * itemsize >= 4 * d_state
    return Plan(
        segments=count, segment_spans=each, blocks=_ceil(division.blocks, launches),
        rows=division.rows, launches=launches, exchange=config.exchange, slots=2, in_du=in_du,
        before=count == 1 or not whole or not words,
        heads=in_du and count > 1 and not (whole and words),
        r_in_ddelta=words and min(each * span, shortest) * itemsize >= 4 * d_state,
    )  # fmt: skip


def launches_of(*, blocks: int, ngroups: int, resident: int) -> int:
    """Return how many launches a group's blocks are divided among: a GPU holds a launch's."""
    return _ceil(blocks, max(1, resident // ngroups))


def fits(config: WideConfig, *, d_inner: int, ngroups: int, resident: int) -> bool:
    """Whether a GPU holds a block for each group, and the channels need few launches."""
    blocks = _ceil(d_inner // ngroups, config.block)
    launches = launches_of(blocks=blocks, ngroups=ngroups, resident=resident)
    return ngroups <= resident and launches <= _LAUNCHES


def room_bytes(*, batch: int, seqlen: int, d_inner: int, d_state: int, ngroups: int) -> int:
    """Return what mamba_ssm's backward holds beyond outputs and gradients, of 16 bits.

    Two fp32 values a state every 2,048 steps, and dB and dC in fp32 before they are narrowed
    (selective_scan.cpp).
    """
    states = 8 * batch * d_inner * d_state * _ceil(seqlen, _PEER_STEPS)
    return states + 8 * batch * ngroups * d_state * seqlen


def scratch_elements(
    plan: Plan, config: WideConfig, *, batch: int, seqlen: int, d_inner: int, d_state: int,
    ngroups: int,
) -> dict[str, int]:  # fmt: skip
    """Return the 4-byte elements of each buffer that the kernels share, by name.

    counters; parts, partial sums of dB and dC, before that segments' sums of dt; sums of dB and dC
    from launch to launch; heads, the states before segments; r, what is passed back to each.
    """
    columns = ngroups * plan.blocks
    states = batch * plan.segments * d_inner * d_state
    several = plan.segments > 1
    parts = plan.slots * plan.rows * columns * 2 * config.states * plan.exchange
    return {
        "counters": COUNTERS * plan.launches * (plan.rows * ngroups + columns),
        "parts": max(parts, batch * plan.segments * d_inner if several else 0),
        "sums": 2 * batch * ngroups * d_state * seqlen if plan.launches > 1 else 0,
        "heads": states if plan.heads else 0,
        "r": states if several and not plan.r_in_ddelta else 0,
    }


def training_bytes(
    config: WideConfig, *, batch: int, seqlen: int, d_inner: int, d_state: int, ngroups: int,
    itemsize: int, gated: bool, resident: int,
) -> int:  # fmt: skip
    """Return the most that a training step holds at once beside its inputs: forward, then backward.

    The output and all gradients included, with D and bias; of torch's allocator, rounding excepted.
    """
    sizes = {
        "batch": batch, "seqlen": seqlen, "d_inner": d_inner, "d_state": d_state,
        "ngroups": ngroups,
    }  # fmt: skip
    made = plan(config, **sizes, itemsize=itemsize, resident=resident)
    tokens = itemsize * batch * seqlen * d_inner
    kept = 4 * batch * _ceil(seqlen, config.chunk) * d_inner * d_state
    scratch = 4 * sum(scratch_elements(made, config, **sizes).values())
    shared = itemsize * 2 * batch * ngroups * d_state * seqlen
    parameters = 4 * d_inner * (d_state + 2)
    last = tokens * (3 + gated) + scratch + shared + parameters
    return max(2 * tokens + kept + scratch, last) if made.in_du else last + kept


def padded(d_state: int) -> int:
    """Return the states that a kernel computes with."""
    return max(STATES, 1 << (d_state - 1).bit_length())


def _ceil(a: int, b: int) -> int:
    return -(-a // b)
