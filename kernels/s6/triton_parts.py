"""Pieces shared by the Triton kernels of the selective scan (S6).

A tile is a tensor (TILE steps, N states, BLOCK channels). Triton spreads a tensor's last axes over
lanes first, so that with N * BLOCK of at least 32 per warp a thread holds all steps of its states:
a scan over axis 0 is then a chain of multiply-adds in registers, without shuffles, and the
decays' products that the scan's definition asks for are never used and cost nothing.
"""

import triton
import triton.language as tl

LOG2E = tl.constexpr(1.4426950408889634)
LN2 = tl.constexpr(0.6931471805599453)
# Not compiled anew for one segment or one block: both follow from the length and the width, and no
# address is aligned by them.
COUNTS = ["segments", "blocks"]


@triton.jit
def combine(decay_left, input_left, decay_right, input_right):
    """Compose two steps of h = decay h + input, the left one first."""
    return decay_left * decay_right, decay_right * input_left + input_right


@triton.jit
def combine_keeping_input(
    decay_left, h_left, scale_left, before_left, decay_right, h_right, scale_right, before_right
):
    """As `combine`, giving besides the value h before the last step, plus a term of that step.

    Of a single step, scale is one and `before` the term to add to the previous h.
    """
    return (
        decay_left * decay_right,
        decay_right * h_left + h_right,
        scale_right * decay_left,
        scale_right * h_left + before_right,
    )


@triton.jit
def pick_right(left, right):
    """Return the later one; reduces an axis to its last entry."""
    return right


@triton.jit
def widen(x, ASSEMBLY: tl.constexpr):
    """Convert to fp32, in the layout that x was loaded in.

    B and C are read once by a warp and then given to all lanes. The compiler would give the narrow
    values and convert in every lane, at two instructions each; it does not move inline assembly.
    """
    if x.dtype == tl.float32:
        return x
    elif not ASSEMBLY:
        return x.to(tl.float32)
    elif x.dtype == tl.bfloat16:
        return tl.inline_asm_elementwise(
            "mov.b32 $0, {0, $1};", "=r,h", [x], dtype=tl.float32, is_pure=False, pack=1
        )
    else:
        return tl.inline_asm_elementwise(
            "cvt.f32.f16 $0, $1;", "=r,h", [x], dtype=tl.float32, is_pure=False, pack=1
        )


@triton.jit
def softplus(x):
    """log(1 + exp(x)), to 1e-7 relative also where it is small.

    log1p(e) / e on [0, 1] by a polynomial of least relative error (5e-9), because lg2.approx has an
    absolute error and 1 + e loses e's last digits.
    """
    e = tl.exp2(tl.abs(x) * -LOG2E)
    p = -3.244021128e-3
    p = p * e + 1.985144411e-2
    p = p * e - 5.695949996e-2
    p = p * e + 1.060365141e-1
    p = p * e - 1.530559052e-1
    p = p * e + 1.967593854e-1
    p = p * e - 2.495413352e-1
    p = p * e + 3.332996240e-1
    p = p * e - 4.999990242e-1
    p = p * e + 1.0
    return tl.maximum(x, 0.0) + p * e


@triton.jit
def sigmoid(x):
    """1 / (1 + exp(-x)); exp(-|x|) cannot overflow, and neither branch cancels."""
    e = tl.exp2(tl.abs(x) * -LOG2E)
    return tl.where(x >= 0.0, 1.0, e) / (1.0 + e)


@triton.jit
def locate(block, D, G, BLOCK: tl.constexpr):
    """Return a channel block's group, first channel and the end of the group's channels."""
    per_group = D // G
    group_blocks = tl.cdiv(per_group, BLOCK)
    group = block // group_blocks
    first = group * per_group + (block % group_blocks) * BLOCK
    return group, first, (group + 1) * per_group
