"""The state update in Triton: the public operation and the launching of its kernels.

Any batch, number of channels, heads and groups, odd ones too; up to 256 states; state and
activations fp32, fp16 or bf16, each its own; compute capability 8.0 or newer.
"""

from typing import Any

import torch
from torch import Tensor

from mambench.kernels.prepared import Calls, Recording
from mambench.kernels.state_update.arguments import check_arguments, rows_contiguous
from mambench.kernels.state_update.config import Config, choose, padded
from mambench.kernels.state_update.traced import register
from mambench.kernels.state_update.triton_kernels import s6_update_kernel, ssd_update_kernel

_DTYPES = (torch.float32, torch.float16, torch.bfloat16)
_FP32 = torch.float32
_PARAMETERS = (3, 6, 8)  # A, D and dt_bias among the tensors
_BATCHED = (0, 1, 2, 4, 5, 7)  # state, x, dt, B, C and z


def selective_state_update(
    state: Tensor,
    x: Tensor,
    dt: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    D: Tensor | None = None,
    z: Tensor | None = None,
    dt_bias: Tensor | None = None,
    dt_softplus: bool = False,
    *,
    config: Config | None = None,
) -> Tensor:
    """Update the state by one token and return its output.

    Args:
        state: (B, D, N), or (B, H, P, N) with A a scalar per head; updated in place. Only the batch
            may be strided.
        x, z: (B, D) or (B, H, P).
        dt: (B, D) or (B, H).
        A: (D, N) or (H,) fp32.
        B, C: (B, G, N), or (B, N) for one group; a group serves consecutive channels or heads.
        D, dt_bias: (D,) or (H,) fp32.
        dt_softplus: apply softplus to dt + dt_bias.
        config: overrides the choice by shape.

    Returns:
        (B, D) or (B, H, P) in x's dtype.

    Raises:
        ValueError, TypeError: see `check_arguments`; a tensor is of none of the dtypes above.
    """
    if B.dim() == 2:
        B, C = B[:, None], C[:, None]
    tensors = (state, x, dt, A, B, C, D, z, dt_bias)
    if config is None and torch.compiler.is_compiling():
        return _traced(*tensors, dt_softplus)
    return _update(*tensors, dt_softplus, config=config)


def _update(*given: Any, config: Config | None = None) -> Tensor:
    (out,) = _calls(given[:-1], (given[-1], config))
    assert out is not None
    return out


def _ready(tensors: tuple[Any, ...], options: tuple[Any, ...]) -> tuple[Any, ...]:
    """Check the arguments; return them with a sequence's values contiguous, parameters in fp32."""
    check_arguments(*tensors)
    for name, index in (("state", 0), ("x", 1), ("dt", 2), ("B", 4)):
        if tensors[index].dtype not in _DTYPES:
            raise TypeError(f"{name}: expected fp32, fp16 or bf16, got {tensors[index].dtype}")
    return tuple(
        t if t is None
        else t.to(_FP32).contiguous() if i in _PARAMETERS
        else t if rows_contiguous(t)
        else t.contiguous()
        for i, t in enumerate(tensors)
    )  # fmt: skip


def _run(recording: Recording, tensors: tuple[Any, ...], options: tuple[Any, ...]) -> Any:
    """Launch the family's kernel in the configuration given or chosen."""
    state, x, B = tensors[0], tensors[1], tensors[4]
    softplus, config = options
    batch, entries, groups, d_state = *x.shape[:2], B.shape[1], state.shape[-1]
    headdim = x.shape[2] if x.dim() == 3 else None
    config = config or choose(
        batch=batch, entries=entries, headdim=headdim, d_state=d_state,
        itemsize=state.element_size(),
    )  # fmt: skip
    available = headdim or entries // groups
    rows = config.rows(d_state=d_state, available=available)
    sequences = 1 if headdim else min(config.sequences, padded(batch))
    outer = batch * entries if headdim else -(-batch // sequences) * groups
    out = recording.output(x.shape, x.dtype, x.device)
    strides = (0 if tensors[i] is None else tensors[i].stride(0) for i in _BATCHED)
    constants = (
        entries, headdim or 1, d_state, groups, rows, padded(d_state), sequences, softplus,
        "evict_first" if config.stream else "",
    )  # fmt: skip
    kernel: Any = ssd_update_kernel if headdim else s6_update_kernel
    grid = (outer * -(-available // rows), 1, 1)
    arguments = (*tensors, out, batch, *strides, *constants)
    recording.launch(kernel, grid, arguments, {}, num_warps=config.warps)
    return (out,)


_calls = Calls(_run, _ready)
_traced = register("state_update_triton", _update)
