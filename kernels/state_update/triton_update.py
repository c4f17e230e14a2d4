"""The state update in Triton: the public operation and the launching of its kernels.

Any batch, number of channels, heads and groups, odd ones too; up to 256 states; state and
activations fp32, fp16 or bf16, each its own; compute capability 8.0 or newer.
"""

from typing import Any

import torch
from torch import Tensor

from mambench.kernels.state_update.arguments import check_arguments, rows_contiguous
from mambench.kernels.state_update.config import Config, choose, padded
from mambench.kernels.state_update.triton_kernels import s6_update_kernel, ssd_update_kernel

_DTYPES = (torch.float32, torch.float16, torch.bfloat16)
_KEPT = 1 << 14  # launches remembered: more are more shapes than a process decodes with


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
    # What a launch depends on. A decoding model calls with the same shapes for every token: what
    # they were checked and compiled for the first time holds for the next.
    parts: list[Any] = [dt_softplus, config, state.device]
    for tensor in tensors:
        if tensor is None:
            parts.append(None)
        else:
            parts += (tensor.shape, tensor.stride(), tensor.dtype, tensor.data_ptr() % 16)
    key = tuple(parts)
    launch = _launches.get(key)
    if launch is None:
        if len(_launches) >= _KEPT:
            _launches.clear()
        launch = _launches[key] = _Launch(tensors, dt_softplus, config)
    return launch(tensors)


class _Launch:
    """A launch on tensors of given shapes, strides, dtypes and alignment."""

    def __init__(
        self, tensors: tuple[Tensor | None, ...], softplus: bool, config: Config | None
    ) -> None:
        check_arguments(*tensors)  # pyright: ignore[reportArgumentType]
        state, x, dt, _, B, *_ = (t for t in tensors if t is not None)
        for name, tensor in zip(("state", "x", "dt", "B"), (state, x, dt, B), strict=True):
            if tensor.dtype not in _DTYPES:
                raise TypeError(f"{name}: expected fp32, fp16 or bf16, got {tensor.dtype}")
        batch, entries, d_state = x.shape[0], x.shape[1], state.shape[-1]
        headdim = x.shape[2] if x.dim() == 3 else None
        sizes = {"batch": batch, "entries": entries, "headdim": headdim, "d_state": d_state}
        config = config or choose(**sizes, itemsize=state.element_size())
        groups = B.shape[1]
        available = headdim or entries // groups
        rows = config.rows(d_state=d_state, available=available)
        sequences = 1 if headdim else min(config.sequences, padded(batch))
        tiles = -(-available // rows)
        self.kernel: Any = ssd_update_kernel if headdim else s6_update_kernel
        outer = batch * entries if headdim else -(-batch // sequences) * groups
        self.grid = (outer * tiles, 1, 1)
        self.copied = tuple(
            t is not None and not (_ready(t) if i in _PARAMETERS else rows_contiguous(t))
            for i, t in enumerate(tensors)
        )
        self.copies = any(self.copied)
        self.warps = config.warps
        constants = (
            entries, headdim or 1, d_state, groups, rows, padded(d_state), sequences, softplus,
            "evict_first" if config.stream else "",
        )  # fmt: skip
        self.device = state.device.index if state.is_cuda else None
        strides = [0 if t is None else t.stride(0) for t in self.prepared(tensors)]
        numbers = (batch, *(strides[i] for i in _BATCHED))
        self.numbers = (*numbers, *constants)
        self.dense = x.is_contiguous()
        self.compiled: Any = None

    def prepared(self, tensors: tuple[Tensor | None, ...]) -> tuple[Tensor | None, ...]:
        """Return the tensors with a sequence's values contiguous and the parameters in fp32."""
        if not self.copies:
            return tensors
        return tuple(
            (t.to(_FP32) if i in _PARAMETERS else t).contiguous() if t is not None and copy else t
            for i, (t, copy) in enumerate(zip(tensors, self.copied, strict=True))
        )

    def __call__(self, tensors: tuple[Tensor | None, ...]) -> Tensor:
        """Launch on the tensors' device and return the output."""
        if self.device is not None and torch.cuda.current_device() != self.device:
            with torch.cuda.device(self.device):
                return self._launched(tensors)
        return self._launched(tensors)

    def _launched(self, tensors: tuple[Tensor | None, ...]) -> Tensor:
        state, x, dt, A, B, C, D, z, bias = self.prepared(tensors)
        assert x is not None
        out = torch.empty_like(x) if self.dense else x.new_empty(x.shape)
        arguments = (state, x, dt, A, B, C, D, z, bias, out, *self.numbers)
        if self.compiled is not None:
            self.compiled[self.grid](*arguments)
            return out
        launched = self.kernel[self.grid](*arguments, num_warps=self.warps)
        # Copies are not known to be aligned every time; in Triton's interpreter there is no kernel.
        if launched is not None and not self.copies:
            self.compiled = launched
        return out


def _ready(parameter: Tensor) -> bool:
    return parameter.dtype == _FP32 and parameter.is_contiguous()


_FP32 = torch.float32
_PARAMETERS = (3, 6, 8)  # A, D and dt_bias among the tensors
_BATCHED = (0, 1, 2, 4, 5, 7)  # state, x, dt, B, C and z
_launches: dict[tuple[Any, ...], _Launch] = {}
