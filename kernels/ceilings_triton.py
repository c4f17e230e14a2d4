"""Kernels that do one thing only, to measure what a GPU can do of it at most.

Each program holds BLOCK independent chains of dependent operations, eight a thread, which hides the
latency of each; nothing is read, and a program writes its chains' sum, so that they are not
dropped. `ex2.approx.ftz` is the instruction that every fast exponential comes down to: plain
`exp2` adds multiplications that treat denormal numbers.
"""

import triton
import triton.language as tl
from torch import Tensor

BLOCK = 1024
WARPS = 4
UNROLL = 16
PROGRAMS_PER_SM = 64  # four full loads of 2048 threads: the last one is short against the whole


@triton.jit
def _exponentials_kernel(out_ptr, rounds, BLOCK: tl.constexpr, UNROLL: tl.constexpr):
    value = tl.arange(0, BLOCK).to(tl.float32) / BLOCK
    for _ in range(rounds):
        for _ in tl.static_range(UNROLL):
            # 2 ** -x stays within (0, 1]; the negation runs on other units meanwhile.
            value = tl.inline_asm_elementwise(
                "{ .reg .f32 n; neg.ftz.f32 n, $1; ex2.approx.ftz.f32 $0, n; }",
                "=f,f",
                [value],
                dtype=tl.float32,
                is_pure=True,
                pack=1,
            )
    tl.store(out_ptr + tl.program_id(0), tl.sum(value))


@triton.jit
def _fused_multiply_add_kernel(out_ptr, rounds, BLOCK: tl.constexpr, UNROLL: tl.constexpr):
    value = tl.arange(0, BLOCK).to(tl.float32) / BLOCK
    scale = 0.5 + tl.program_id(0).to(tl.float32) * 0.0  # not a constant to the compiler
    for _ in range(rounds):
        for _ in tl.static_range(UNROLL):
            value = tl.fma(value, scale, scale)
    tl.store(out_ptr + tl.program_id(0), tl.sum(value))


@triton.jit
def _empty_kernel(out_ptr):
    pass


def exponentials(out: Tensor, rounds: int) -> int:
    """Compute exponentials in all programs; returns how many.

    Args:
        out: (programs,) fp32, written.
        rounds: of UNROLL exponentials of each chain.
    """
    _exponentials_kernel[(out.numel(),)](out, rounds, BLOCK=BLOCK, UNROLL=UNROLL, num_warps=WARPS)
    return out.numel() * BLOCK * UNROLL * rounds


def multiply_adds(out: Tensor, rounds: int) -> int:
    """Compute fp32 multiply-adds in all programs; returns their FLOP, two each. See above."""
    grid = (out.numel(),)
    _fused_multiply_add_kernel[grid](out, rounds, BLOCK=BLOCK, UNROLL=UNROLL, num_warps=WARPS)
    return 2 * out.numel() * BLOCK * UNROLL * rounds


def nothing(out: Tensor) -> None:
    """Launch one program that does nothing."""
    _empty_kernel[(1,)](out, num_warps=1)
