"""Attention's decode with a KV cache: how each variant of `flash_attention` computes one token."""

from collections.abc import Callable
from importlib import import_module
from typing import TYPE_CHECKING, Any

from mambench.harness.spec import Case

if TYPE_CHECKING:
    from torch import Tensor

    Decode = Callable[[Tensor, Tensor, Tensor, Tensor, Tensor, int], Tensor]

_FP32_BYTES = 4

# flash-attn 2 and 3 have a function made for decoding, which splits the keys over the GPU; torch's
# flash backend is flash-attn 2's kernel. cuDNN's and flash-attn 4's are made for many queries.
ORDER = ("fa3", "fa2", "sdpa-flash", "sdpa-cudnn", "fa4", "sdpa-efficient", "sdpa-math")
ORDER_CPU = ("sdpa-flash", "sdpa-math")

_WITH_CACHE = {"fa3": "flash_attn_interface", "fa2": "flash_attn"}


def op(variant: str, attention: Callable[..., Any] | None) -> "Decode":
    """Return the variant's `op(q, k, v, k_cache, v_cache, context)`.

    Args:
        variant: a name in ORDER.
        attention: for the variants without a function of their own, `attention(q, k, v)` that lets
            one query attend to all keys; all (B, ., H, P).

    Raises:
        ImportError: the variant's library is not installed.
        ValueError: the variant cannot decode.
    """
    if variant in _WITH_CACHE:
        return _with_cache(import_module(_WITH_CACHE[variant]).flash_attn_with_kvcache)
    if attention is None or variant not in ORDER:
        raise ValueError(f"{variant!r} cannot decode; valid: {', '.join(ORDER)}")
    return _appending(attention)


def workspace_bytes(case: Case) -> int:
    """Estimate what is allocated besides inputs and output.

    The math backend widens keys and values to fp32 and holds scores and probabilities; the others
    hold a log-sum-exp of each row.
    """
    problem = case.problem
    rows = problem.batch * problem.nheads
    if case.variant != "sdpa-math":
        return _FP32_BYTES * rows
    keys = problem.length + 1
    widened = 2 * keys * problem.batch * problem.d_inner if case.dtype.itemsize < _FP32_BYTES else 0
    return max(case.dtype.itemsize, _FP32_BYTES) * (widened + 2 * rows * keys)


def _with_cache(flash_attn_with_kvcache: Callable[..., Any]) -> "Decode":
    """Let the package append to the cache and attend to it in one call."""
    lengths: dict[Any, Tensor] = {}

    def decode(
        q: "Tensor",
        k: "Tensor",
        v: "Tensor",
        k_cache: "Tensor",
        v_cache: "Tensor",
        context: int,
    ) -> "Tensor":
        at = (q.shape[0], context, q.device)
        if at not in lengths:  # an integer would be turned into a tensor on every call
            lengths.clear()
            lengths[at] = q.new_full((q.shape[0],), context, dtype=_int32())
        out: Tensor | tuple[Tensor, ...] = flash_attn_with_kvcache(
            q, k_cache, v_cache, k=k, v=v, cache_seqlens=lengths[at], causal=True
        )
        return out[0] if isinstance(out, tuple) else out

    return decode


def _appending(attention: Callable[..., Any]) -> "Decode":
    """Copy the token's key and value into the cache and attend to the part that is filled."""

    def decode(
        q: "Tensor",
        k: "Tensor",
        v: "Tensor",
        k_cache: "Tensor",
        v_cache: "Tensor",
        context: int,
    ) -> "Tensor":
        end = context + 1
        k_cache[:, context:end] = k
        v_cache[:, context:end] = v
        return attention(q, k_cache[:, :end], v_cache[:, :end])

    return decode


def _int32() -> Any:
    import torch

    return torch.int32
