"""What the blocks' fused forms share: when they run, and memory for a joint gradient.

On a GPU a block runs as functions with gradients of their own, around whichever mixer it has: the
Triton kernels of `kernels/{conv,norm,elementwise}` between cuBLAS's products, in layouts that need
no copy from one to the next. They keep for the backward what the products and the mixer need and
nothing else: what a norm or a gate made is made again by its own backward, which has its inputs in
registers anyway. Everywhere else a block runs its plain form, which is written from the papers; so
do the float64 reference and the independent solution that the gate judges by.
"""

from collections.abc import Sequence
from functools import cache
from importlib.util import find_spec
from typing import Any

import torch
from torch import Tensor

from mambench.kernels.norm.arguments import MOST_WIDTH

_MOST_D_MODEL = MOST_WIDTH // 2  # Mamba-2 normalises rows of twice as many values
DTYPES = (torch.float32, torch.float16, torch.bfloat16)
_CAPABILITY = (8, 0)  # what the Triton kernels need
# A norm's backward: its result again, for the weight after it; dx in the place of a product's dx.
INTO: dict[str, Any] = {"give_out": True, "overwrite": True}


def runs_fused(x: Tensor, fused: bool | None) -> bool:
    """Whether a block runs its fused form on x; `fused` decides unless it is None."""
    if fused is not None:
        return fused
    fits = x.dtype in DTYPES and x.shape[-1] <= _MOST_D_MODEL
    return x.is_cuda and fits and _supported(x.device) and not _traced()


def _traced() -> bool:
    from mambench.kernels.registered import is_traced

    return is_traced()


@cache
def _supported(device: torch.device) -> bool:
    if find_spec("triton") is None:
        return False
    return torch.cuda.get_device_capability(device) >= _CAPABILITY


class JointGradient:
    """Memory for the gradients of ranges of one product's columns, so that they need no copy.

    Whoever makes a range's gradient may put it in `columns`; the product's own backward then takes
    `joined`, which copies what came from elsewhere. A second backward begins anew.
    """

    def __init__(self, widths: Sequence[int]) -> None:
        self._widths = tuple(widths)
        self._memory: Tensor | None = None

    def columns(self, index: int, like: Tensor) -> Tensor:
        """Return the memory of a range, (..., width), with like's other sizes, dtype and device."""
        if self._memory is None:
            shape = (*like.shape[:-1], sum(self._widths))
            self._memory = torch.empty(shape, dtype=like.dtype, device=like.device)
        return self._memory.narrow(-1, sum(self._widths[:index]), self._widths[index])

    def joined(self, gradients: Sequence[Tensor | None], like: Tensor) -> Tensor:
        """Return all ranges' gradients side by side, (..., sum of widths); None counts as zero."""
        for index, gradient in enumerate(gradients):
            place = self.columns(index, like)
            if gradient is None:
                place.zero_()
            elif gradient.data_ptr() != place.data_ptr() or gradient.stride() != place.stride():
                place.copy_(gradient)
        assert self._memory is not None
        memory, self._memory = self._memory, None
        return memory


def as_matrix(tensor: Tensor) -> Tensor:
    """View (B, L, width) as (B L, width)."""
    return tensor.reshape(-1, tensor.shape[-1])
