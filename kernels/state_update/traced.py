"""The state update as an operator that PyTorch knows: torch.compile takes a decoding loop whole.

An eager call does without it, as of the other operations (`mambench.kernels.registered`). It has no
gradient.
"""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from mambench.kernels.registered import NAMESPACE

_ARGUMENTS = (
    "Tensor(a!) state, Tensor x, Tensor dt, Tensor A, Tensor B, Tensor C, Tensor? D, Tensor? z, "
    "Tensor? dt_bias, bool dt_softplus"
)


def register(name: str, update: Callable[..., Tensor]) -> Callable[..., Tensor]:
    """Register `<name>` with the arguments of `selective_state_update`, all by position.

    Args:
        name: the operator's, in the namespace `mambench`.
        update: changes the state in place and returns the output, new and contiguous.
    """
    operator = torch.library.custom_op(
        f"{NAMESPACE}::{name}",
        update,
        mutates_args=("state",),
        schema=f"({_ARGUMENTS}) -> Tensor",
    )

    @operator.register_fake
    def _(state: Tensor, x: Tensor, *others: Any) -> Tensor:
        return x.new_empty(x.shape)

    return getattr(getattr(torch.ops, NAMESPACE), name).default
