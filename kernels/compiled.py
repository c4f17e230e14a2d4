"""torch.compile as the harness needs it: for many lengths, and backwards that run repeatedly."""

from collections.abc import Callable
from typing import Any

import torch

_RECOMPILATIONS = 64  # lengths of one sweep; beyond torch's default it silently stops compiling


def compiled(function: Callable[..., Any], *, dynamic: bool | None = True) -> Callable[..., Any]:
    """Return `function` compiled by torch.

    Args:
        function: takes and returns tensors.
        dynamic: True: one compilation for all sizes; False: one for each, which is then exact.

    Sets two of torch's process-wide options, because they are read when a graph is compiled: a
    backward may be run again (the harness times it alone), so the memory of what the forward kept
    must not be reused, and a sweep may have more sizes than torch would compile for.
    """
    import torch._dynamo.config as dynamo
    import torch._functorch.config as functorch

    functorch.donated_buffer = False
    dynamo.recompile_limit = max(dynamo.recompile_limit, _RECOMPILATIONS)
    return torch.compile(function, dynamic=dynamic)  # pyright: ignore[reportUnknownMemberType]
