"""The logistic function for Triton kernels that are nearly bound by instructions."""

import triton
import triton.language as tl

LOG2E = tl.constexpr(1.4426950408889634)


def assembly() -> bool:
    """Whether kernels may hold inline assembly, which Triton's interpreter does not execute."""
    return not triton.knobs.runtime.interpret


@triton.jit
def sigmoid(x, ASSEMBLY: tl.constexpr):
    """Return 1 / (1 + exp(-x)) of fp32, to 1e-7 (1 + |x|) relative; zero below -87.

    The denominator is at least one and what is added to it counts only where it is not tiny: so the
    handling of very small numbers, half of the instructions of an exponential and a division, is
    not needed. Where exp overflows, its reciprocal is the zero that is right. Without ASSEMBLY (in
    the interpreter) in ordinary operations.
    """
    if ASSEMBLY:
        return tl.inline_asm_elementwise(
            """{
            .reg .f32 t;
            mul.f32 t, $1, 0fBFB8AA3B;
            ex2.approx.ftz.f32 t, t;
            add.f32 t, t, 0f3F800000;
            rcp.approx.ftz.f32 $0, t;
            }""",
            "=f,f",
            [x],
            dtype=tl.float32,
            is_pure=True,
            pack=1,
        )
    return 1.0 / (1.0 + tl.exp2(x * -LOG2E))
