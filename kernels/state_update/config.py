"""How the Triton state update is cut into programs; imports neither torch nor triton.

A fixed table and no tuning at run time: the same shape runs the same code in every process. What
the kernel must do is read and write the state once, so that a configuration is good if enough bytes
are in flight on every multiprocessor and no program is so small that its beginning shows.
"""

from dataclasses import dataclass

MAX_D_STATE = 256
_MIB = 1 << 20


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


_ALONE = ((1024, 1), (1024, 2), (2048, 2), (2048, 4), (2048, 8), (4096, 4), (8192, 8))
_SHARED = ((512, 1, 4), (512, 4, 2), (1024, 2, 2), (1024, 4, 4), (2048, 4, 2))
# What `choose` takes from, and what is compared where it is tuned.
CONFIGS: tuple[Config, ...] = tuple(
    Config(elements=elements, warps=warps, stream=stream)
    for elements, warps in _ALONE
    for stream in (False, True)
) + tuple(
    Config(elements=elements, warps=warps, sequences=sequences, stream=stream)
    for elements, warps, sequences in _SHARED
    for stream in (False, True)
)


# Bytes of a state. Between the first two it stays in an H100's L2 of 50 MB from token to token, but
# only if it is not marked as the first to go. Smaller ones stay all the same, and larger ones gain
# from the mark until they are so large that nothing stays.
_KEPT = (8 * _MIB, 24 * _MIB)
_STREAMED = 320 * _MIB
# Up to here a program mostly waits, and ends sooner with four (s6) or eight states a thread.
_SHORT = 3 * _MIB


def choose(*, batch: int, entries: int, headdim: int | None, d_state: int, itemsize: int) -> Config:
    """Return the configuration of a shape.

    Set from all of `CONFIGS` on an H100, bf16, 0.2 to 1,280 MiB of state, warm and cold: where one
    configuration is the best in both, this is at most 2 % behind it. Where none is (a state that
    the L2 just holds), it is the one whose worse side is the best.

    Args:
        batch: B.
        entries: channels (s6) or heads (ssd).
        headdim: P of ssd; None: s6.
        d_state: N.
        itemsize: bytes per element of the state.
    """
    size = batch * entries * (headdim or 1) * d_state * itemsize
    stream = not _KEPT[0] < size <= _KEPT[1] and size <= _STREAMED
    if headdim is None and d_state > 32:
        shared = 4 if itemsize < 4 else 2  # four of fp32 spill registers
        return Config(elements=1024, warps=shared, sequences=shared, stream=stream)
    if headdim is None and size <= _SHORT:
        return Config(elements=512, warps=4, sequences=2, stream=stream)
    if headdim is None:
        return Config(elements=1024, warps=1, stream=stream)
    if size <= _SHORT:
        return Config(elements=2048, warps=8, stream=stream)
    if size <= _KEPT[1]:
        return Config(elements=1024, warps=1, stream=stream)
    return Config(elements=2048, warps=4 if stream else 2, stream=stream)


def padded(size: int) -> int:
    """Return the next power of two."""
    return 1 << (size - 1).bit_length()
