"""How the RMS norm's kernels are cut up; imports neither torch nor triton.

Fixed tables and no tuning at run time: the same shape runs the same code in every process.
"""

from dataclasses import dataclass

_ELEMENTS = 1024  # of a program at least: several rows where they are short
_PER_THREAD = 16
# Programs of the backward on a multiprocessor, each of which leaves a partial sum of the weight's
# gradient: two, or four where they are small and get this many rows even so.
_ROWS_OF_FOUR = 8
_SMALL = 2048


@dataclass(frozen=True, kw_only=True)
class Config:
    """A program's rows at a time, its width (a power of two) and its warps."""

    rows: int
    block: int
    warps: int
    programs_per_sm: int | None = None  # of the backward; None: as `programs` says


def choose(width: int) -> Config:
    """Return the tile for rows of a width."""
    block = max(16, 1 << (width - 1).bit_length())
    rows = max(1, _ELEMENTS // block)
    warps = min(16, max(4, rows * block // (32 * _PER_THREAD)))
    return Config(rows=rows, block=block, warps=warps)


def programs(rows: int, config: Config, multiprocessors: int) -> int:
    """Return how many programs share the rows in the backward."""
    groups = -(-rows // config.rows)
    each = config.programs_per_sm
    if each is None:
        many = groups >= 4 * _ROWS_OF_FOUR * multiprocessors
        each = 4 if many and config.rows * config.block <= _SMALL else 2
    return max(1, min(groups, each * multiprocessors))
