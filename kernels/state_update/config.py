"""How the Triton state update is cut into programs; imports neither torch nor triton.

A fixed table and no tuning at run time: the same shape runs the same code in every process. What
the kernel must do is read and write the state once, so that a configuration is good if enough bytes
are in flight on every multiprocessor and no program is so small that its beginning shows.
"""

from dataclasses import dataclass

MAX_D_STATE = 256
CACHED_BYTES = 24 << 20  # a state up to this size is taken to stay in the L2 from token to token


@dataclass(frozen=True, kw_only=True)
class Config:
    """A program's tile, warps, and what the caches are told."""

    elements: int = 4096  # of the state, in a program (of each sequence)
    warps: int = 4
    sequences: int = 1  # s6: of the batch in a program, which share the exponents' A
    stream: bool = False  # the state is not read again soon: evict it from the caches first

    def rows(self, *, d_state: int, available: int) -> int:
        """Return the channels (s6) or rows of a head (ssd) of a program, a power of two."""
        wanted = max(1, self.elements // padded(d_state))
        return min(wanted, padded(available))


# What `choose` takes from, and what is compared where it is tuned.
CONFIGS: tuple[Config, ...] = tuple(
    Config(elements=elements, warps=warps, stream=stream)
    for elements, warps in ((1024, 1), (1024, 2), (2048, 2), (2048, 4), (4096, 4), (8192, 8))
    for stream in (False, True)
) + tuple(
    Config(elements=elements, warps=warps, sequences=sequences, stream=stream)
    for elements, warps, sequences in ((512, 1, 4), (1024, 2, 2), (1024, 4, 4), (2048, 4, 2))
    for stream in (False, True)
)


def choose(*, batch: int, entries: int, headdim: int | None, d_state: int, itemsize: int) -> Config:
    """Return the configuration of a shape.

    Args:
        batch: B.
        entries: channels (s6) or heads (ssd).
        headdim: P of ssd; None: s6.
        d_state: N.
        itemsize: bytes per element of the state.
    """
    states = batch * entries * (headdim or 1) * d_state
    stream = states * itemsize > CACHED_BYTES
    if states <= 1 << 20:  # few programs of the usual size: smaller ones reach more SMs
        return Config(elements=1024, warps=2, stream=stream)
    if headdim is None and batch >= 8:
        return Config(elements=1024, warps=2, sequences=2, stream=stream)
    return Config(elements=4096, warps=4, stream=stream)


def padded(size: int) -> int:
    """Return the next power of two."""
    return 1 << (size - 1).bit_length()
