"""Sequences of different lengths in one row of tokens: which token belongs to which."""

import torch
from torch import Tensor
from torch.nn.functional import pad


def sequence_numbers(
    x: Tensor, seq_idx: Tensor | None, cu_seqlens: Tensor | None, *, check: bool
) -> Tensor | None:
    """Return the number of every token's sequence, (B, L) int32, or None where neither is given.

    Numbers never decrease along a row, so that two tokens are of one sequence if and only if their
    numbers are equal.

    Args:
        x: (B, L, ...), whose tokens are meant.
        seq_idx: (B, L), integers: a sequence begins where the value differs from the one before.
        cu_seqlens: (S + 1,), integers: sequence s is the tokens cu_seqlens[s] to cu_seqlens[s + 1],
            from 0 to L; B is 1. A sequence may be empty.
        check: look at the values of cu_seqlens if they are on the CPU; a GPU would be waited for.

    Raises:
        ValueError: both are given, or one has a wrong shape, dtype, device or values.
    """
    batch, seqlen = x.shape[:2]
    if seq_idx is not None and cu_seqlens is not None:
        raise ValueError("expected seq_idx or cu_seqlens, got both")
    for name, tensor in (("seq_idx", seq_idx), ("cu_seqlens", cu_seqlens)):
        if tensor is None:
            continue
        if tensor.is_floating_point() or tensor.device != x.device:
            raise ValueError(
                f"{name}: expected integers on {x.device}, got {tensor.dtype} on {tensor.device}"
            )
    if seq_idx is not None:
        if seq_idx.shape != (batch, seqlen):
            raise ValueError(
                f"seq_idx: expected shape {(batch, seqlen)}, got {tuple(seq_idx.shape)}"
            )
        begins = pad(seq_idx[:, 1:] != seq_idx[:, :-1], (1, 0))
        return begins.cumsum(1, dtype=torch.int32)
    if cu_seqlens is None:
        return None
    if cu_seqlens.dim() != 1 or cu_seqlens.shape[0] < 2 or batch != 1:
        raise ValueError(
            "cu_seqlens: expected shape (sequences + 1,) and batch 1, got "
            f"{tuple(cu_seqlens.shape)} and batch {batch}"
        )
    if check and cu_seqlens.device.type == "cpu":
        _check_ends(cu_seqlens, seqlen)
    tokens = torch.arange(seqlen, device=x.device, dtype=cu_seqlens.dtype)
    return torch.searchsorted(cu_seqlens[1:], tokens, right=True, out_int32=True)[None]


def _check_ends(cu_seqlens: Tensor, seqlen: int) -> None:
    ends = cu_seqlens.tolist()
    if ends[0] != 0 or ends[-1] != seqlen or ends != sorted(ends):
        raise ValueError(f"cu_seqlens: expected 0 to {seqlen}, ascending, got {ends}")
