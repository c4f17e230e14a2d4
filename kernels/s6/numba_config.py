"""How the CPU kernels of the selective scan (S6) are cut up; imports neither torch nor numba."""

# Numba's cache does not see these change: touch numba_kernels.py as well.
LANES = 16  # channels of a block, the elements of a vector
CHUNK = 64  # steps whose tiles stay in the first-level cache; a state is kept before each

_LEAST_PARTIALS = 8


def block_count(*, d_inner: int, ngroups: int) -> int:
    """Return the blocks of LANES channels, none of which spans two groups."""
    return ngroups * -(-(d_inner // ngroups) // LANES)


def partial_count(*, d_inner: int, d_state: int, ngroups: int) -> int:
    """Return how many dB and dC are held per group.

    Enough for parallelism, no larger than u and delta, and a function of the shape alone, so that
    the order of additions is too.
    """
    group_blocks = block_count(d_inner=d_inner, ngroups=ngroups) // ngroups
    return min(group_blocks, max(_LEAST_PARTIALS, d_inner // d_state))


def workspace_bytes(
    *,
    batch: int,
    seqlen: int,
    d_inner: int,
    d_state: int,
    ngroups: int,
    backward: bool,
    itemsize: int,
) -> int:
    """Count the bytes of kept states and partial sums of dB and dC; the forward has none."""
    if not backward:
        return 0
    blocks = block_count(d_inner=d_inner, ngroups=ngroups)
    kept = batch * blocks * -(-seqlen // CHUNK) * d_state * LANES
    partials = partial_count(d_inner=d_inner, d_state=d_state, ngroups=ngroups)
    return itemsize * (kept + 2 * partials * batch * ngroups * d_state * seqlen)
