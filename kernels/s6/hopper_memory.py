"""What the Hopper scan's backward allocates, and how it divides time for that. Torch-free.

The gradients of u, delta and z are as large as their inputs: nothing can be done about that. What
comes on top is kept small in two ways:

- The states that the forward kept go into du: a chunk's states of a channel take the place of the
  chunk's first steps, where the kernel reads them before it writes du. So the memory that the
  forward kept is free again before anything else is allocated.
- Time is divided into windows, from the last to the first. The partial sums of dB and dC, one for
  every block of channels, are those of one window; what is passed back in time goes from window to
  window. A window costs three launches, which only a long scan does not feel.
"""

from dataclasses import dataclass
from itertools import pairwise

STATES = 16  # states that a block holds at a time
_MOST_WINDOWS = 3  # of three launches each: a training step is to launch at most 13 kernels
_WINDOW = 1 << 23  # elements of u to a window: its launches take time (docs/experiments.md)


@dataclass(frozen=True, kw_only=True)
class Window:
    """Steps that one set of launches goes through: whole chunks, but for the sequence's end."""

    first: int
    steps: int
    segments: int
    segment_chunks: int


@dataclass(frozen=True, kw_only=True)
class Division:
    """A backward's windows, from the last to the first, and blocks of channels of a group."""

    windows: tuple[Window, ...]
    blocks: int

    @property
    def steps(self) -> int:
        """The steps of the longest window."""
        return max(window.steps for window in self.windows)

    @property
    def segments(self) -> int:
        """The most segments of a window."""
        return max(window.segments for window in self.windows)


def divide(
    *, batch: int, seqlen: int, d_inner: int, ngroups: int, chunk: int, block: int, slots: int,
    segments: int | None = None, windows: int | None = None,
) -> Division:  # fmt: skip
    """Divide time into windows, and these into segments that run at once.

    Args:
        batch, seqlen, d_inner, ngroups: of the problem.
        chunk: steps between kept states.
        block: channels of a thread block.
        slots: thread blocks that the GPU holds at once.
        segments: how many in a window; None: as fill the GPU.
        windows: how many; None: up to three, by the size of the scan.
    """
    blocks = _ceil(d_inner // ngroups, block)
    chunks = _ceil(seqlen, chunk)
    if segments is None:
        segments = max(1, slots // (batch * ngroups * blocks))
    if windows is None:
        windows = min(_MOST_WINDOWS, max(1, round(batch * d_inner * seqlen / _WINDOW)))
    rounds = _ceil(chunks, segments)  # a window of whole rounds gives every segment the same work
    windows = min(windows, rounds)
    starts = [i * rounds // windows * segments * chunk for i in range(windows)] + [seqlen]
    found = [_window(first, end - first, segments, chunk) for first, end in pairwise(starts)]
    return Division(windows=tuple(reversed(found)), blocks=blocks)


def _window(first: int, steps: int, segments: int, chunk: int) -> Window:
    chunks = _ceil(steps, chunk)
    each = _ceil(chunks, min(segments, chunks))
    return Window(first=first, steps=steps, segments=_ceil(chunks, each), segment_chunks=each)


def states_fit(*, seqlen: int, chunk: int, d_state: int, itemsize: int) -> bool:
    """Whether every chunk of a row of du has room for the fp32 states before it, aligned."""
    shortest = seqlen - (_ceil(seqlen, chunk) - 1) * chunk
    return seqlen * itemsize % 4 == 0 and shortest * itemsize >= 4 * d_state


def scratch_elements(
    division: Division, *, batch: int, d_inner: int, d_state: int, ngroups: int
) -> dict[str, int]:
    """Return the fp32 elements of each buffer that the kernels share, by name.

    dA, dD and dbias by segment; dBC, of dB and dC by block of channels; end and total, what a
    segment passes back; r, for more than 16 states; first, what a window passes back (twice: it
    is read while the next is written).
    """
    rows = batch * division.segments
    channels, states = rows * d_inner, rows * d_inner * d_state
    blocks_of_states = _ceil(d_state, STATES)
    passed = 2 * batch * d_inner * d_state if len(division.windows) > 1 else 0
    return {
        "dA": states,
        "dD": channels,
        "dbias": channels,
        "dBC": division.blocks * batch * ngroups * blocks_of_states * division.steps * 2 * STATES,
        "end": states if division.segments > 1 else 0,
        "total": channels if division.segments > 1 else 0,
        "r": states if d_state > STATES else 0,
        "first": passed,
    }


def training_bytes(
    *, batch: int, seqlen: int, d_inner: int, d_state: int, ngroups: int, itemsize: int,
    gated: bool, chunk: int, block: int, slots: int,
) -> int:  # fmt: skip
    """Return the most that a training step holds at once beside its inputs: forward, then backward.

    The output and all gradients included, with D and bias; of torch's allocator, rounding excepted.
    """
    division = divide(
        batch=batch, seqlen=seqlen, d_inner=d_inner, ngroups=ngroups, chunk=chunk, block=block,
        slots=slots,
    )  # fmt: skip
    tokens = itemsize * batch * seqlen * d_inner
    kept = 4 * batch * _ceil(seqlen, chunk) * d_inner * d_state
    scratch = scratch_elements(
        division, batch=batch, d_inner=d_inner, d_state=d_state, ngroups=ngroups
    )
    shared = itemsize * 2 * batch * ngroups * d_state * seqlen
    parameters = 4 * d_inner * (d_state + 2)
    last = tokens * (3 + gated) + 4 * sum(scratch.values()) + shared + parameters
    moved = states_fit(seqlen=seqlen, chunk=chunk, d_state=d_state, itemsize=itemsize)
    return max(2 * tokens + kept, last) if moved else last + kept


def _ceil(a: int, b: int) -> int:
    return -(-a // b)
