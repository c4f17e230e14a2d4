"""One token of s6 and ssd in place, on the CPU: the compiled kernels.

A task is one channel (s6) or head (ssd) of one sequence; threads call the kernels with ranges of
tasks, without holding the interpreter's lock. Rows of states are walked in vectors of LANES, as in
the scan's kernels, whose vectors these are; the number of states is a multiple of LANES.

Only what is as large as the state is done here; what is as large as x is torch's.
"""

from typing import Any

from mambench.kernels.s6.numba_config import LANES
from mambench.kernels.s6.numba_kernels import (
    _jit as jit,  # pyright: ignore[reportPrivateUsage]
)
from mambench.kernels.s6.numba_kernels import exp2, load, store, total

Array = Any


@jit(nogil=True)
def _row(
    tile: Array, row: int, vectors: int, decay: Any, added: Any, B: Array, C: Array, at: int
) -> Any:
    """Update a row of whole vectors with one decay; return its product with C's row."""
    state = load(tile, row) * decay + load(B, at) * added
    store(tile, row, state)
    products = state * load(C, at)
    for k in range(1, vectors):
        state = load(tile, row + k) * decay + load(B, at + k) * added
        store(tile, row + k, state)
        products = products + state * load(C, at + k)
    return total(products)


@jit(nogil=True)
def _decaying_row(
    tile: Array, row: int, vectors: int, dt: Any, rates: Array, rate: int, added: Any, B: Array,
    C: Array, at: int,
) -> Any:  # fmt: skip
    """Update a row of whole vectors, each state with its own decay; return its product with C's."""
    state = load(tile, row) * exp2(load(rates, rate) * dt) + load(B, at) * added
    store(tile, row, state)
    products = state * load(C, at)
    for k in range(1, vectors):
        state = load(tile, row + k) * exp2(load(rates, rate + k) * dt) + load(B, at + k) * added
        store(tile, row + k, state)
        products = products + state * load(C, at + k)
    return total(products)


@jit(nogil=True)
def ssd_update(
    begin: int, end: int, state: Array, decay: Array, added: Array, B: Array, C: Array, out: Array
) -> None:
    """Update the heads of tasks begin to end.

    state (B H P N / LANES, LANES); decay (B, H); added = dt x and out (B, H, P); B, C (B, G, N /
    LANES, LANES). All contiguous and of one dtype.
    """
    nheads, headdim = added.shape[1:]
    groups, vectors = B.shape[1:3]
    B_rows, C_rows = B.reshape(-1, LANES), C.reshape(-1, LANES)
    for task in range(begin, end):
        b, h = task // nheads, task % nheads
        at = (b * groups + h // (nheads // groups)) * vectors
        for p in range(headdim):
            row = (task * headdim + p) * vectors
            out[b, h, p] = _row(
                state, row, vectors, decay[b, h], added[b, h, p], B_rows, C_rows, at
            )


@jit(nogil=True)
def s6_update(
    begin: int, end: int, state: Array, dt: Array, rates: Array, added: Array, B: Array, C: Array,
    out: Array,
) -> None:  # fmt: skip
    """Update the channels of tasks begin to end.

    state (B D N / LANES, LANES); dt, added = dt x and out (B, D); rates = A log2(e) (D N / LANES,
    LANES); B, C (B, G, N / LANES, LANES). All contiguous and of one dtype.
    """
    channels = dt.shape[1]
    groups, vectors = B.shape[1:3]
    B_rows, C_rows = B.reshape(-1, LANES), C.reshape(-1, LANES)
    for task in range(begin, end):
        b, d = task // channels, task % channels
        at = (b * groups + d // (channels // groups)) * vectors
        out[b, d] = _decaying_row(
            state, task * vectors, vectors, dt[b, d], rates, d * vectors, added[b, d], B_rows,
            C_rows, at,
        )  # fmt: skip
