"""Sizes of the SSD operation in torch products, and the memory they imply. Torch-free."""

LARGEST_CHUNK = 64  # longer chunks do more arithmetic per token than they save in calls
KEEP = 8  # every KEEP-th chunk's entering state is kept for the backward


def workspace_bytes(
    *,
    batch: int,
    seqlen: int,
    nheads: int,
    headdim: int,
    d_state: int,
    itemsize: int,
    needs_grad: bool,
) -> int:
    """Estimate the bytes needed beyond inputs, outputs and gradients.

    Two dt-sized tensors; a chunk's weights and a few tiles; kept states (the forward keeps them
    only for a gradient) and those that the backward recomputes.
    """
    width = 8 if itemsize == 8 else 4
    per_head = batch * nheads * width
    states = -(-seqlen // (LARGEST_CHUNK * KEEP)) + KEEP if needs_grad else 2
    tiles = 4 * LARGEST_CHUNK * (LARGEST_CHUNK + 2 * headdim)
    return per_head * (3 * seqlen + states * headdim * d_state + tiles)
