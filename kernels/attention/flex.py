"""torch's FlexAttention with a causal mask, compiled for each length.

The mask of blocks is made once for each length and kept, as a model that calls it in every layer
keeps it; making it is no part of the time, and its memory is counted with the first call.
"""

from collections.abc import Callable
from functools import cache

import torch
from torch import Tensor
from torch.nn.attention.flex_attention import BlockMask, create_block_mask, flex_attention

from mambench.kernels.compiled import compiled


def causal() -> Callable[[Tensor, Tensor, Tensor], Tensor]:
    """Return `op(q, k, v)`, all (B, L, H, P); causal, scale P ** -0.5. CUDA only."""
    attend = compiled(flex_attention, dynamic=False)

    @cache
    def mask(seqlen: int, device: torch.device) -> BlockMask:
        # Compiled, because uncompiled it holds an (L, L) matrix.
        return create_block_mask(_earlier, None, None, seqlen, seqlen, device, _compile=True)

    def attention(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        heads_first = (tensor.transpose(1, 2) for tensor in (q, k, v))
        out: Tensor = attend(*heads_first, block_mask=mask(q.shape[1], q.device))
        return out.transpose(1, 2)

    return attention


def _earlier(batch: Tensor, head: Tensor, query: Tensor, key: Tensor) -> Tensor:
    return query >= key
